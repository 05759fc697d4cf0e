"""The study of `paper.py` on a language model, SmolLM2: how skills come to differ, and who wins.

It has the tasks of the study with the sentence encoder. Skills that start alike and routes that
start uniform get the same gradient, so `APART` compares ways of starting them apart by what
training itself shows: its loss, the entropy of the mixtures and the cosine between skills. Only
then are the development tasks looked at, and the held-out tasks only once settings are chosen.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lm_starts import alike, grouped
from paper_studies import real
from paper_study import Prepare, Study, Training

from polyroute.host.dtypes import AUTO, settled_dtype

RANK = 4
MHR: Mapping[str, Any] = {"method": "mhr", "num_skills": 8, "num_heads": 8, "rank": RANK}


def language_model(work: Path, results: Path, data: str) -> Study:
    """SmolLM2-135M-Instruct on the 46, 15 and 35 tasks with choices."""
    return replace(
        real(work, results, data),
        name="lm",
        base="smollm2",
        dtype=settled_dtype(AUTO),
        max_input=256,
        exclude=None,
        inventories={
            "shared": {"method": "shared", "rank": RANK},
            "shared-matched": {"method": "shared", "rank": 8 * RANK},
            "private": {"method": "private", "rank": RANK},
            "poly": {"method": "poly", "num_skills": 8, "rank": RANK},
            "mhr": MHR,
            "spread": {**MHR, "route_spread": 3.0},
        },
        results=results / "lm",
        max_examples=60,
    )


@dataclass(frozen=True)
class Start:
    """One way of starting an inventory."""

    config: str
    prepare: Prepare | None = None


APART: Mapping[str, Start] = {
    "shared": Start("shared"),
    "shared-matched": Start("shared-matched"),
    "twins": Start("mhr"),
    "spread": Start("spread"),
    "spread-alike": Start("spread", alike),
    "grouped": Start("mhr", grouped),
}
APART_TRAINING = Training(steps=300, batch_size=8, lr=2e-3, route_lr=0.1)
APART_ADAPTATION: Mapping[str, Any] = {"shots": 32, "batch_size": 8, "steps": 16}
APART_CELLS: Mapping[str, Mapping[str, Any]] = {
    "mu": {"phase": "mu", "lr": 3e-3},
    "mu-nearest": {"phase": "mu", "lr": 3e-3, "init": "nearest"},
    "random": {"phase": "random", "lr": 3e-3},
}
"""How each start is adapted to the development tasks."""


CONTENDERS: Mapping[str, Start] = {
    name: Start(name) for name in ("shared", "mhr", "poly", "shared-matched", "private")
}
"""The contenders of the held-out table, in the order in which they run."""


@dataclass(frozen=True)
class Plan:
    """What is done with each contender from each seed of training."""

    training: Training
    continued: Training
    """Of the average, on the training tasks, for zero-shot use."""
    seeds: int
    cells: Mapping[str, Mapping[str, Any]]
    """By label, how an inventory is adapted."""


MAIN_TRAINING = Training(steps=1000, batch_size=16, lr=2e-3, route_lr=0.1)
MAIN_PLAN = Plan(
    training=MAIN_TRAINING,
    continued=replace(MAIN_TRAINING, steps=100, lr=5e-4, phase="mu"),
    seeds=2,
    cells={
        f"{label}-{shots}": {"shots": shots, "batch_size": 8, "steps": shots // 2, **settings}
        for shots in (32, 8)
        for label, settings in {
            "mu": {"phase": "mu", "lr": 3e-3},
            "z": {"phase": "z", "route_lr": 1.0},
            "full": {"phase": "full", "lr": 3e-3},
            "random": {"phase": "random", "lr": 3e-3},
        }.items()
    },
)
"""Provisional: the rates are those of `demo-lm`, not yet chosen on the development tasks."""


def cells_of(
    cells: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any]
) -> Mapping[str, Mapping[str, Any]]:
    """The cells that tell something new of a contender.

    One shared LoRA has no routes, and tuned in full it is its average. A fresh LoRA is the same
    whatever inventory it replaces, so it is taken from the shared one alone, without its rank.
    """
    routed = config["method"] in ("poly", "mhr")
    phases = {"mu", "z", "full"} if routed else {"mu"}
    if config == {"method": "shared", "rank": RANK}:
        phases.add("random")
    return {
        label: cell
        for label, cell in cells.items()
        if cell["phase"] in phases and (routed or cell.get("init") != "nearest")
    }
