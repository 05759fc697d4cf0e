"""The paper's questions at a scale of CPUs: MHR, Poly and LoRA, few-shot, on two suites.

Every stage writes raw results to `benchmarks/results/paper/STUDY/`, and is skipped if they exist,
so an interrupted run continues where it stopped. `python benchmarks/paper_page.py` then makes
docs/paper.md from them.

    python benchmarks/paper.py generated
    python benchmarks/paper.py real --data ../shared/suite
    python benchmarks/paper.py seq2seq --data ../shared/suite --stages train test controls
    python benchmarks/paper.py lm --data ../shared/suite --threads 2
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from lm_studies import (
    APART,
    APART_ADAPTATION,
    APART_EXAMPLES,
    APART_TRAINING,
    CONTENDERS,
    MAIN_PLAN,
    WAYS,
    Contender,
    Plan,
    language_model,
)
from paper_studies import (
    CELLS,
    DEVELOPMENT,
    GENERATED_ADAPTATION,
    GENERATED_CONTINUED,
    GENERATED_TRAINING,
    REAL_CONTINUED,
    REAL_TRAINING,
    SEQ2SEQ_CELLS,
    SEQ2SEQ_TRAINING,
    TRAINING_SEEDS,
    Cell,
    generated,
    real,
    seq2seq,
)
from paper_study import Study, Training, adapt, align, finetune, train, zero_shot

from polyroute.adapting.settings import AdaptSettings

RESULTS = Path(__file__).parent / "results" / "paper"
MAIN = ("shared", "poly", "mhr", "shared-matched", "private")
"""Trained first, with every seed; the others of a study follow."""
CONTINUED = ("shared", "poly", "mhr")
"""Whose average is also trained on, for zero-shot use."""
CONTROLLED = ("shared", "shared-matched", "poly", "mhr", "private")
"""Inventories of the real tasks that are scored untuned and whose gradients are compared."""
STAGES = ("train", "develop", "test", "controls", "continued")


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


def run_tasks(
    study: Study,
    trainings: Mapping[str, Training],
    develop: Sequence[Cell],
    test: Sequence[Cell],
    stages: Sequence[str],
    only: Sequence[str],
) -> None:
    """Inventories of one seed; settings chosen on the development tasks; then the test tasks."""
    if "train" in stages:
        for name, training in trainings.items():
            if not only or name in only:
                train(study, name, name, training)
    for stage, cells, tasks in (
        ("develop", develop, study.develop),
        ("test", test, study.test),
    ):
        for cell in cells if stage in stages else ():
            if not only or cell.name in only:
                own, settings = replace(study, seeds=cell.seeds), AdaptSettings(**cell.settings)
                adapt(own, f"{stage}-{cell.name}", cell.inventory, {"": settings}, tasks,
                      start=cell.start)  # fmt: skip
    if "controls" in stages:
        for name in CONTROLLED:
            if name in trainings and (not only or name in only):
                zero_shot(study, f"zero-shot-{name}", name, study.test)
                align(study, f"aligned-{name}", name, study.train[::4], 16)
    if "continued" in stages:
        for config in CONTINUED:
            name = f"{config}-continued"
            train(study, name, config, REAL_CONTINUED, start=config)
            zero_shot(study, f"zero-shot-{name}", name, study.test)


def run_apart(study: Study, stages: Sequence[str], only: Sequence[str]) -> None:
    """Ways of starting skills apart: first what training shows, then the development tasks."""
    study.write("tasks", {"train": study.train, "develop": study.develop, "test": study.test})
    study = replace(study, max_examples=APART_EXAMPLES)
    names = [name for name in APART if not only or name in only]
    for name in names if "train" in stages else ():
        start = APART[name]
        train(study, f"apart-{name}", start.config, APART_TRAINING, prepare=start.prepare)
    if "develop" not in stages:
        return
    zero_shot(study, "apart-zero-shot-base", "base", study.develop)
    for name in names:
        zero_shot(study, f"apart-zero-shot-{name}", f"apart-{name}", study.develop)
        own = replace(study, seeds=study.seeds[:1])
        for way, rate in APART[name].rates.items():
            settings = {"": AdaptSettings(**APART_ADAPTATION, **WAYS[way], lr=rate)}
            adapt(own, f"apart-{way}-{name}", f"apart-{name}", settings, study.develop)


def run_main(
    study: Study, plan: Plan, contenders: Mapping[str, Contender], stages: Sequence[str]
) -> None:
    """Every contender from each seed of training, with a draw of its own.

    Rates are chosen from one seed on the development tasks, before the held-out tasks are scored.
    """
    for role, tasks in (("develop", study.develop), ("test", study.test)):
        if role not in stages:
            continue
        zero_shot(study, f"{role}-zero-shot-base", "base", tasks)
        for seed, draw in enumerate(study.seeds[: plan.seeds if role == "test" else 1]):
            for name, contender in contenders.items():
                own = replace(study, seeds=(draw,))
                _run_main(own, plan, f"{name}-s{seed}", contender, seed, role, tasks)


def _run_main(
    study: Study,
    plan: Plan,
    name: str,
    contender: Contender,
    seed: int,
    role: str,
    tasks: Sequence[str],
) -> None:
    """One contender and seed; nothing is trained where all its results are there."""
    choices = {}
    for (way, shots), values in plan.cells.items():
        rates = {"": contender.rates[way]} if way in contender.rates else {}
        if rates and role == "develop":
            rates = {str(rate): rate for rate in plan.rates if (way, shots) in plan.developed}
        if rates:
            choices[f"{role}-{way}-{shots}-{name}"] = {
                label: AdaptSettings(**values, lr=rate) for label, rate in rates.items()
            }
    continued = f"{name}-continued" if contender.is_continued and role == "test" else ""
    untuned = {f"{role}-zero-shot-{n}": n for n in (name, continued) if n}
    wanted = dict.fromkeys(untuned, len(tasks))
    wanted |= {stage: len(tasks) * len(own) for stage, own in choices.items()}
    if all(len(study.read(stage) or ()) == count for stage, count in wanted.items()):
        return
    training = replace(plan.training, steps=plan.training.steps - contender.start_cost)
    train(study, name, contender.config, training, seed=seed, prepare=contender.prepare)
    if continued:
        train(study, continued, contender.config, plan.continued, seed=seed, start=name)
    for stage, inventory in untuned.items():
        zero_shot(study, stage, inventory, tasks)
    for stage, settings in choices.items():
        adapt(study, stage, name, settings, tasks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=("generated", "real", "seq2seq", "lm"))
    parser.add_argument("--data", default="../shared/suite", help="of the studies on real tasks")
    parser.add_argument("--work", type=Path, default=Path("runs/paper"), help="for inventories")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument(
        "--only", nargs="+", default=[], help="cells or inventories, to share the work"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.study == "generated":
        run_generated(generated(options.work, RESULTS))
    elif options.study == "real":
        study = real(options.work, RESULTS, options.data)
        run_tasks(study, REAL_TRAINING, DEVELOPMENT, CELLS, options.stages, options.only)
    elif options.study == "lm":
        study = language_model(options.work, RESULTS, options.data)
        chosen = [name.removeprefix("apart-") for name in options.only if "apart-" in name]
        if chosen or not options.only:
            run_apart(study, options.stages, chosen)
        own = {n: c for n, c in CONTENDERS.items() if n in (options.only or CONTENDERS)}
        run_main(study, MAIN_PLAN, own, options.stages)
    else:
        study = seq2seq(options.work, RESULTS, options.data)
        run_tasks(study, SEQ2SEQ_TRAINING, [], SEQ2SEQ_CELLS, options.stages, options.only)


if __name__ == "__main__":
    main()
