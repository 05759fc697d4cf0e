"""The paper's questions at a scale of CPUs: MHR, Poly and LoRA, few-shot, on two suites.

Every stage writes raw results to `benchmarks/results/paper/STUDY/` and is skipped where they are
there, so an interrupted run goes on where it stopped. `python benchmarks/paper_page.py` then makes
docs/paper.md of them.

    python benchmarks/paper.py generated
    python benchmarks/paper.py real --data ../shared/suite
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from paper_studies import (
    CELLS,
    DEVELOPMENT,
    GENERATED_ADAPTATION,
    GENERATED_CONTINUED,
    GENERATED_TRAINING,
    PAPER_TRAINING,
    TRAINING_SEEDS,
    Cell,
    generated,
    real,
)
from paper_study import Study, adapt, align, finetune, train, zero_shot

from polyroute.slot_training import AdaptSettings

RESULTS = Path(__file__).parent / "results" / "paper"
MAIN = ("shared", "poly", "mhr", "shared-matched", "private")
"""Trained first, with every seed; the others of a study follow."""
CONTINUED = ("shared", "poly", "mhr")
"""Whose average is also trained on, for zero-shot use."""


def run_generated(study: Study) -> None:
    """Every contender from five seeds of training; with each its own draw of few-shot examples."""
    extras = [name for name in study.inventories if name not in MAIN]
    for configs in (MAIN, extras):
        for seed in TRAINING_SEEDS:
            own = replace(study, seeds=(seed,))
            for config in configs:
                _run_generated(own, config, seed)
            if configs is extras:
                values = {**GENERATED_ADAPTATION, "lr": 1e-3}
                settings = AdaptSettings(phase="mu", **values)  # type: ignore[arg-type]
                finetune(own, f"fine-tuning-s{seed}", settings, study.test)


def _run_generated(study: Study, config: str, seed: int) -> None:
    name = f"{config}-s{seed}"
    steps = None if seed else GENERATED_TRAINING.steps // 10
    train(study, name, config, GENERATED_TRAINING, seed=seed, alignment_steps=steps)
    align(study, f"aligned-{name}", name, study.train[::4], 20)
    zero_shot(study, f"zero-shot-{name}", name, study.test)
    for phase in _phases(config):
        settings = AdaptSettings(phase=phase, **GENERATED_ADAPTATION)  # type: ignore[arg-type]
        adapt(study, f"{phase}-{name}", name, {"": settings}, study.test)
    if config in CONTINUED:
        name = f"{config}-continued-s{seed}"
        train(study, name, config, GENERATED_CONTINUED, seed=seed, start=f"{config}-s{seed}")
        zero_shot(study, f"zero-shot-{name}", name, study.test)


def _phases(config: str) -> Sequence[str]:
    if config.startswith("mhr-h"):
        return ("z",)
    return ("z", "mu", "full", "random") if config in ("poly", "mhr") else ("mu",)


def run_real(study: Study, stages: Sequence[str], cells: Sequence[str]) -> None:
    """Inventories of one seed; settings chosen on the development tasks; then the test tasks."""
    for config in ("mhr", "shared", "poly", "shared-matched", "private"):
        if "train" in stages:
            train(study, config, config, PAPER_TRAINING)
    if "develop" in stages:
        for cell in DEVELOPMENT:
            _adapt(replace(study, seeds=cell.seeds), f"develop-{cell.name}", cell, study.develop)
    if "test" in stages:
        for cell in CELLS:
            if not cells or cell.name in cells:
                _adapt(replace(study, seeds=cell.seeds), f"test-{cell.name}", cell, study.test)
        for config in ("shared", "shared-matched", "poly", "mhr", "private"):
            zero_shot(study, f"zero-shot-{config}", config, study.test)
            align(study, f"aligned-{config}", config, study.train[::4], 16)


def _adapt(study: Study, stage: str, cell: Cell, tasks: Sequence[str]) -> None:
    settings = AdaptSettings(**cell.settings)
    adapt(study, stage, cell.inventory, {"": settings}, tasks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=("generated", "real"))
    parser.add_argument("--data", default="../shared/suite", help="of the study `real`")
    parser.add_argument("--work", type=Path, default=Path("runs/paper"), help="for inventories")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--stages", nargs="+", default=["train", "develop", "test"])
    parser.add_argument("--cells", nargs="+", default=[], help="of the test, to share the work")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.study == "generated":
        run_generated(generated(options.work, RESULTS))
    else:
        run_real(real(options.work, RESULTS, options.data), options.stages, options.cells)


if __name__ == "__main__":
    main()
