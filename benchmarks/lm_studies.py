"""The study of `paper.py` on a language model, SmolLM2: how skills come to differ, and who wins.

It has the tasks of the study with the sentence encoder. Skills that start alike and routes that
start uniform get the same gradient, so `APART` compares ways of starting them apart by what
training itself shows: its loss, the entropy of the mixtures and the cosine between skills. Only
then are the development tasks looked at, and the held-out tasks only once settings are chosen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lm_readers import Readers
from lm_routes import by_examples, by_text, by_usage
from lm_starts import EXAMPLES, alike, grouped
from lm_unsaid import Unsaid
from paper_studies import real
from paper_study import Prepare, Routes, Study, Training

from polyroute.data.suite import held_out_tasks

RANK = 4
MHR: Mapping[str, Any] = {"method": "mhr", "num_skills": 8, "num_heads": 8, "rank": RANK}


def language_model(work: Path, results: Path, data: str) -> Study:
    """SmolLM2-135M-Instruct on the 46, 15 and 35 tasks with choices, and 10 that ask for text."""
    study = real(work, results, data)
    suite = study.suite
    return replace(
        study,
        name="lm",
        kept="smollm2",
        base="smollm2",
        dtype="bfloat16",
        max_input=256,
        exclude=None,
        inventories={
            "shared": {"method": "shared", "rank": RANK},
            "shared-matched": {"method": "shared", "rank": 8 * RANK},
            "private": {"method": "private", "rank": RANK},
            "poly": {"method": "poly", "num_skills": 8, "rank": RANK},
            "mhr": MHR,
            "spread": {**MHR, "route_spread": 3.0},
            "common": {
                "method": "poly",
                "num_skills": len(study.train) + 1,
                "rank": RANK,
                "shared_skill": True,
            },
            "mhr-32": {**MHR, "num_skills": 8 * RANK, "rank": 1},
        },
        results=results / "lm",
        max_examples=120,
        text=[task for task in held_out_tasks(suite) if not suite.info(task).has_choices],
    )


def unsaid(study: Study) -> Study:
    """The same tasks, when nothing but their inputs tells them apart."""
    suite = Unsaid(study.suite)
    results = study.results / "unsaid"
    return replace(study, name="lm-unsaid", suite=suite, results=results, kept="")


def readers(study: Study) -> Study:
    """Readers who want other things of the same texts: three in five to train on."""
    suite = Readers(study.suite)
    return replace(
        study,
        name="lm-readers",
        suite=suite,
        kept="",
        train=[task for remainder in (0, 1, 2) for task in suite.part(remainder)],
        develop=suite.part(3),
        test=suite.part(4),
        text=(),
        results=study.results / "readers",
    )


def named_readers(study: Study) -> Study:
    """The same readers, named in every prompt."""
    study = readers(study)
    suite = replace(study.suite, are_named=True)
    return replace(study, name="lm-named-readers", suite=suite, results=study.results / "named")


@dataclass(frozen=True)
class Contender:
    """An inventory: how it starts, and how it is adapted once it is trained.

    Attributes:
        config: key of `Study.inventories`.
        rates: of the skills, by the way of adapting; a key of `WAYS`.
        prepare: changes the fresh inventory before the first step.
        start_examples: of each task, whose gradients `prepare` takes. It trains on so many less.
        as_is: routes of `AS_IS` that are used on the held-out tasks.
        is_continued: whether its average is also trained on, for zero-shot use.
    """

    config: str
    rates: Mapping[str, float]
    prepare: Prepare | None = None
    start_examples: int = 0
    as_is: Sequence[str] = ()
    is_continued: bool = False


WAYS: Mapping[str, Mapping[str, Any]] = {
    "mu-nearest": {"phase": "mu", "init": "nearest"},
    "mu": {"phase": "mu"},
    "mu-usage": {"phase": "mu", "init": "usage"},
    "z": {"phase": "z", "route_lr": 1.0},
    "full": {"phase": "full"},
    "random": {"phase": "random"},
}
"""Ways of adapting. `usage` is the mean mixture of the training tasks. One shared LoRA has no
routes, and tuned in full it is its average. A fresh LoRA is the same whatever inventory it
replaces."""

AS_IS: Mapping[str, Routes] = {
    "text": by_text(0.1),
    "usage": by_usage,
    "nearest-32": by_examples(32),
}
"""Routes of new tasks that need no training."""

ROUTED = {"mu": 3e-3, "mu-nearest": 3e-3}
APART: Mapping[str, Contender] = {
    "shared": Contender("shared", {"mu": 3e-3, "random": 3e-3}),
    "shared-matched": Contender("shared-matched", {"mu": 3e-3}),
    "twins": Contender("mhr", ROUTED),
    "spread": Contender("spread", ROUTED),
    "spread-alike": Contender("spread", ROUTED, alike),
    "grouped": Contender("mhr", ROUTED, grouped),
}
"""Ways of starting, trained for a short while."""
APART_TRAINING = Training(steps=300, batch_size=8, lr=2e-3, route_lr=0.1)
APART_ADAPTATION: Mapping[str, Any] = {"shots": 32, "batch_size": 8, "steps": 16}
APART_EXAMPLES = 60
"""Of each development task are scored."""


CONTENDERS: Mapping[str, Contender] = {
    "shared": Contender("shared", {"mu": 3e-3, "random": 3e-3}, is_continued=True),
    "grouped": Contender(
        "mhr",
        {"mu-nearest": 6e-3, "mu": 3e-3, "z": 3e-3, "full": 3e-3},
        grouped,
        start_examples=EXAMPLES,
        as_is=("text",),
        is_continued=True,
    ),
    "shared-matched": Contender("shared-matched", {"mu": 1.5e-3}),
    "grouped-32": Contender(
        "mhr-32", {"mu-nearest": 6e-3, "mu": 3e-3}, grouped, start_examples=EXAMPLES
    ),
    "common": Contender("common", {"mu-usage": 3e-3}, grouped),
    "mhr": Contender("mhr", {"mu": 3e-3, "z": 3e-3, "full": 3e-3}, is_continued=True),
    "poly": Contender("poly", {"mu": 3e-3, "z": 3e-3}),
    "private": Contender("private", {"mu": 3e-3}),
}
"""The contenders of the held-out table, in the order in which they run."""


@dataclass(frozen=True)
class Plan:
    """How every contender is trained, chosen and tested.

    Attributes:
        training: from each seed.
        continued: of the average, on the training tasks, for zero-shot use.
        continued_rates: tried on the development tasks.
        seeds: of training, each with its own draw of examples.
        cells: by way and shots, how an inventory is adapted.
        developed: those of `cells` for which the rate is chosen on the development tasks.
        written: those of `cells` that are also for the tasks that ask for text.
        rates: of the skills, tried by every contender.
        draws: of examples, with which rates are tried.
    """

    training: Training
    continued: Training
    continued_rates: Sequence[float]
    seeds: Sequence[int]
    cells: Mapping[tuple[str, int], Mapping[str, Any]]
    developed: Sequence[tuple[str, int]]
    written: Sequence[tuple[str, int]]
    rates: Sequence[float]
    draws: int


WRITTEN = 96
"""Tokens of an answer to the tasks that ask for text; the longest has 49 words."""
MAIN_TRAINING = Training(steps=1000, batch_size=16, lr=2e-3, route_lr=0.1)
MAIN_PLAN = Plan(
    training=MAIN_TRAINING,
    continued=replace(MAIN_TRAINING, steps=100, lr=5e-4, phase="mu"),
    continued_rates=(5e-4, 2e-3),
    seeds=(0, 1),
    cells={
        (way, shots): {"shots": shots, "batch_size": 8, "steps": steps, **WAYS[way]}
        for shots, steps, left_out in ((32, 16, ()), (8, 8, ("z", "full")))
        for way in WAYS
        if way not in left_out
    },
    # Those of z and full are not tried: they are that of mu.
    developed=[("mu-nearest", 32), ("mu", 32), ("mu-usage", 32), ("random", 32)],
    written=[("mu-nearest", 32), ("mu", 32), ("random", 32)],
    rates=(1.5e-3, 3e-3, 6e-3),
    draws=2,
)
READERS_PLAN = replace(MAIN_PLAN, draws=1)
