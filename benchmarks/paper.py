"""The paper's questions at a scale of CPUs: MHR, Poly and LoRA, few-shot, on two suites.

Every stage writes raw results to `benchmarks/results/paper/STUDY/`, and is skipped if they exist,
so an interrupted run continues where it stopped. `python benchmarks/paper_page.py` then makes
docs/paper.md from them.

    python benchmarks/paper.py generated
    python benchmarks/paper.py real --data ../shared/suite
    python benchmarks/paper.py seq2seq --data ../shared/suite --stages train test controls
    python benchmarks/paper.py lm --data ../shared/suite --threads 2
    python benchmarks/paper.py lm --data ../shared/suite --threads 2 --stages test
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from lm_studies import (
    APART,
    APART_ADAPTATION,
    APART_EXAMPLES,
    APART_TRAINING,
    AS_IS,
    CONTENDERS,
    MAIN_PLAN,
    READERS_PLAN,
    WAYS,
    WRITTEN,
    Contender,
    Plan,
    language_model,
    named_readers,
    readers,
    unsaid,
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
from paper_study import Study, Training, adapt, align, finetune, has_all, train, zero_shot

from polyroute.adapting.settings import AdaptSettings

RESULTS = Path(__file__).parent / "results" / "paper"
MAIN = ("shared", "poly", "mhr", "shared-matched", "private")
"""Trained first, with every seed; the others of a study follow."""
CONTINUED = ("shared", "poly", "mhr")
"""Whose average is also trained on, for zero-shot use."""
CONTROLLED = ("shared", "shared-matched", "poly", "mhr", "private")
"""Inventories of the real tasks that are scored untuned and whose gradients are compared."""
STUDIES = ("generated", "real", "seq2seq", "lm", "lm-unsaid", "lm-readers", "lm-named-readers")
STAGES = ("train", "own", "develop", "test", "text", "controls", "continued")
"""`own` scores inventories on the tasks that they learned, and `text` those that ask for text; the
language model alone has them. Its `continued` goes with `develop` or `test`."""
HELD_OUT = ("test", "text")
"""Stages of the language model that look at held-out tasks, and run only if they are named."""


OWN = "own-tasks-"
"""Begins the names of the results of stage `own`."""


def run_generated(study: Study, only: Sequence[str]) -> None:
    """Every contender from five seeds of training; with each its own draw of few-shot examples."""
    extras = [name for name in study.inventories if name not in MAIN]
    for configs in (MAIN, extras):
        for seed in TRAINING_SEEDS:
            own = replace(study, seeds=(seed,))
            for config in configs:
                if not only or config in only:
                    _run_generated(own, config, seed)
            if configs is extras and not only:
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
    if config.startswith("mhr-"):
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
    for name in names:
        start, inventory = APART[name], f"apart-{name}"
        if "train" in stages or study.read(f"train-{inventory}") is None:
            train(study, inventory, start.config, APART_TRAINING, prepare=start.prepare)
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
    """Every contender from each seed of training, with a draw of its own on the held-out tasks.

    Rates are chosen before, from one seed on the development tasks, with several draws.
    """
    if "develop" in stages:
        part = replace(study, test=study.develop, seeds=study.seeds[: plan.draws])
        _run_part(study, part, plan, contenders, 0, "develop")
    for seed in plan.seeds:
        if "train" in stages:
            for name, contender in contenders.items():
                _train_contender(study, plan, f"{name}-s{seed}", contender, seed)
        held_out = replace(study, seeds=(study.seeds[seed],))
        parts = {
            "own": replace(held_out, test=study.train),
            "test": held_out,
            "text": replace(held_out, test=study.text, max_target=WRITTEN),
        }
        for role, part in parts.items():
            if role in stages:
                _run_part(study, part, plan, contenders, seed, role)


def _run_part(
    study: Study,
    part: Study,
    plan: Plan,
    contenders: Mapping[str, Contender],
    seed: int,
    role: str,
) -> None:
    for name, contender in contenders.items():
        _run_contender(study, part, plan, f"{name}-s{seed}", contender, seed, role)
    stage = OWN + "base" if role == "own" else f"{role}-zero-shot-base"
    zero_shot(part, stage, "base", part.test)


def _run_contender(
    study: Study,
    part: Study,
    plan: Plan,
    name: str,
    contender: Contender,
    seed: int,
    role: str,
) -> None:
    """Train one contender in `study`, unless all results are there, and score it in `part`."""
    as_is = _as_is(part, name, contender, role)
    choices = _choices(plan, name, contender, role)
    continued = _continued(plan, contender, role)
    stage = f"{role}-continued-{name}"
    done = {result.get("label", "") for result in part.read(stage) or ()}
    has_adapted = all(
        has_all(part.read(own) or (), part.test, settings, part.seeds)
        for own, settings in choices.items()
    )
    if has_adapted and done >= set(continued) and all(part.read(own) is not None for own in as_is):
        return
    _train_contender(study, plan, name, contender, seed)
    for run in as_is.values():
        run()
    for own, settings in choices.items():
        adapt(part, own, name, settings, part.test)
    for label, rate in continued.items():
        own, more = f"{name}-on-{rate}", replace(plan.continued, lr=rate)
        train(study, own, contender.config, more, seed=seed, start=name)
        zero_shot(part, stage, own, part.test, label=label)


def _continued(plan: Plan, contender: Contender, role: str) -> dict[str, float]:
    """By label, the rates at which the average of an inventory is trained on."""
    if not contender.is_continued or role not in ("develop", "test"):
        return {}
    if role == "develop":
        return {str(rate): rate for rate in plan.continued_rates}
    return {"": plan.continued.lr}


def _as_is(
    part: Study, name: str, contender: Contender, role: str
) -> dict[str, Callable[[], object]]:
    """By stage, what scores an inventory without adapting it."""
    method = part.inventories[contender.config]["method"]
    has_routes = method in ("poly", "mhr")
    score = partial(zero_shot, part, tasks=part.test)
    if role == "own":
        route = "mu" if method == "shared" else None
        return {OWN + name: partial(score, stage=OWN + name, inventory=name, route=route)}
    found = {f"{role}-zero-shot-{name}": partial(score, inventory=name)}
    for rule in AS_IS if role == "develop" and has_routes else contender.as_is:
        stage = f"{role}-{rule}-{name}"
        found[stage] = partial(score, inventory=name, route=None, added=AS_IS[rule])
    return {stage: partial(run, stage=stage) for stage, run in found.items()}


def _train_contender(study: Study, plan: Plan, name: str, contender: Contender, seed: int) -> None:
    less = contender.start_examples * len(study.train) // plan.training.batch_size
    training = replace(plan.training, steps=plan.training.steps - less)
    train(study, name, contender.config, training, seed=seed, prepare=contender.prepare)


def _choices(
    plan: Plan, name: str, contender: Contender, role: str
) -> dict[str, dict[str, AdaptSettings]]:
    """By stage, the settings by label with which an inventory is adapted."""
    found: dict[str, dict[str, AdaptSettings]] = {}
    if role == "own":
        return found
    for (way, shots), values in plan.cells.items():
        rates = {"": contender.rates[way]} if way in contender.rates else {}
        if role == "text" and (way, shots) not in plan.written:
            continue
        if rates and role == "develop":
            rates = {str(rate): rate for rate in plan.rates if (way, shots) in plan.developed}
        if rates:
            found[f"{role}-{way}-{shots}-{name}"] = {
                label: AdaptSettings(**values, lr=rate) for label, rate in rates.items()
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data", default="../shared/suite", help="of the studies on real tasks")
    parser.add_argument("--work", type=Path, default=Path("runs/paper"), help="for inventories")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=STAGES,
        help="all; of a language model, no held-out ones, and only what these need is trained",
    )
    parser.add_argument(
        "--only", nargs="+", default=[], help="cells or inventories, to share the work"
    )
    parser.add_argument(
        "--shots", nargs="+", type=int, default=[32, 8], help="of a language model, to share it"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1], help="of training a language model"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.stages is None:
        is_language_model = options.study.startswith("lm")
        # What a stage needs is trained for it; `train` also trains again what was lost since.
        left_out = {"train", *HELD_OUT} if is_language_model else ()
        options.stages = [stage for stage in STAGES if stage not in left_out]
    if options.study == "generated":
        run_generated(generated(options.work, RESULTS), options.only)
    elif options.study == "real":
        study = real(options.work, RESULTS, options.data)
        run_tasks(study, REAL_TRAINING, DEVELOPMENT, CELLS, options.stages, options.only)
    elif options.study.startswith("lm"):
        study, plan = language_model(options.work, RESULTS, options.data), MAIN_PLAN
        chosen = [name.removeprefix("apart-") for name in options.only if "apart-" in name]
        if options.study == "lm-unsaid":
            study = unsaid(study)
        elif options.study == "lm-readers":
            study, plan = readers(study), READERS_PLAN
        elif options.study == "lm-named-readers":
            study, plan = named_readers(study), READERS_PLAN
        elif chosen or not options.only:
            run_apart(study, options.stages, chosen)
        own = {n: c for n, c in CONTENDERS.items() if not options.only or n in options.only}
        cells = {key: cell for key, cell in plan.cells.items() if key[1] in options.shots}
        plan = replace(plan, cells=cells, seeds=options.seeds)
        if "continued" not in options.stages:
            own = {name: replace(c, is_continued=False) for name, c in own.items()}
        if own:
            run_main(study, plan, own, options.stages)
    else:
        study = seq2seq(options.work, RESULTS, options.data)
        run_tasks(study, SEQ2SEQ_TRAINING, [], SEQ2SEQ_CELLS, options.stages, options.only)


if __name__ == "__main__":
    main()
