"""`polyroute adapt`: from an inventory to adapters for new tasks, and what they score."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from polyroute.adapt import SuiteSlots, adapt_suite, check_learned, check_new
from polyroute.adapting.memory import plan
from polyroute.adapting.settings import AdaptSettings, variants
from polyroute.adapting.shots import check_classes, classes_of
from polyroute.adapting.slots import check_starts
from polyroute.build import loaded
from polyroute.data.suite import SPLITS, Suite, held_out_tasks, validate
from polyroute.errors import InputError
from polyroute.host.files import make_folder, remove, write_json, write_tensors
from polyroute.host.interrupts import resumable
from polyroute.host.output import Result, say
from polyroute.host.paths import check_link
from polyroute.host.processes import count, index, is_first, wait
from polyroute.kinds.choose import ModelKind
from polyroute.loading import load_suite
from polyroute.model import RoutedModel
from polyroute.program.commands.adapted import (
    ROUTE,
    ResultFiles,
    check_adapter,
    line_of,
    place_of,
    tables_of,
)
from polyroute.program.commands.folder import RunFolder
from polyroute.program.commands.runs import base_of, beside, inventory_of
from polyroute.program.commands.tasks import chosen_tasks
from polyroute.program.options.adapt import AdaptOptions
from polyroute.program.plans import AdaptationPlan, plan_of_adapting
from polyroute.saved.hub import locate
from polyroute.saved.manifest import write_manifest
from polyroute.saved.peft_card import write_peft_card
from polyroute.saved.runs import DIGEST, RUNNING, digest, held, read_run

__all__ = ["adapt_run"]


@dataclass(frozen=True)
class Work:
    """What is to be adapted to, and by what."""

    suite: Suite
    kind: ModelKind
    tasks: tuple[str, ...]
    choices: Mapping[str, AdaptSettings]
    """Settings by label, all of one phase."""
    options: AdaptOptions
    card: Callable[[Path], None]
    """Writes the card of an adapter."""

    @property
    def optimizations(self) -> list[str]:
        """In words, each of the ways to optimise once."""
        return list(dict.fromkeys(choice.optimization for choice in self.choices.values()))


def adapt_run(options: AdaptOptions) -> Result:
    """Adapt a run's inventory to every task, once per seed and setting, and score each result.

    All adaptations run side by side. Results are written as they come and running slots about once
    a minute, so `--resume` goes on where it stopped. Each of several processes adapts a share.

    Returns:
        All results or, of a dry run, the plan.

    Raises:
        InputError: an option or the data cannot be used; nothing was trained.
    """
    choices = variants(options.settings, options.grid)
    phase, shots = options.settings.phase, options.settings.shots
    out = options.out
    if out is None:
        out = beside(options.run) / f"adapt-{phase}-{shots}"
        check_link(out)  # nobody named it
    run = Path(locate(options.run))
    folder = RunFolder("adapt", out, options, (run, options.source.data))
    folder.compare_given(options.given)
    checkpoint = inventory_of(run)
    suite = load_suite(options.source.data, options.source.reader)
    base, kind = base_of(run, objective=options.objective, limits=options.limits)
    tasks = chosen_tasks(
        suite, options.tasks, held_out_tasks(suite), kind,
        none=f"{options.source.data} has no held-out task",
    )  # fmt: skip
    card = partial(write_peft_card, prompting=kind.prompting, config=read_run(run)["config"])
    work = Work(suite, kind, tasks, choices, options, card)
    _check_examples(work)
    with loaded(base, checkpoint, run) as model:
        _check_model(model, work)
        budget = plan(model, kind, phase, options.memory)
        config = {
            **options.given.recorded,
            "tasks": list(tasks),
            DIGEST: digest(run),
            "optimization": work.optimizations,
        }
        if options.dry_run:
            folder.compare(config, options.given)
            planned = AdaptationPlan(
                tasks, choices, options.seeds, options.split, options.max_test, folder.path
            )
            return plan_of_adapting(model, suite, budget, planned)
        wait()  # nothing is written before all processes are prepared
        folder.open(config, options.given)
        results = _adapt(model, work, folder.path)
    return _result(results, work, folder.path)


def _check_examples(work: Work) -> None:
    """Make sure that the data are complete, and enough for all shots."""
    split = work.options.split
    validate(work.suite, work.tasks, needs=["train"] if split in SPLITS else ["train", split])
    for task in work.tasks:
        _check_scored(task, split, work.suite.splits(task))
    for task, variant in itertools.product(work.tasks, work.choices.values()):
        _check_shots(task, len(work.suite.split(task, "train")), variant)
    if any(variant.stratify for variant in work.choices.values()):
        splits = {task: work.suite.split(task, "train") for task in work.tasks}
        check_classes({t: classes_of(rows, "choices", "target") for t, rows in splits.items()})


def _check_scored(task: str, split: str, there: Sequence[str]) -> None:
    """Make sure that a task has examples to score on."""
    if split in there:
        return
    others = [f"{one}, whose examples are learned" if one == "train" else one for one in there]
    raise InputError(
        f"task {task!r} has no {split!r} split to score on: write {split} in a column 'split' of "
        f"some rows, or score on another with --split ({'; '.join(others)})"
    )


def _check_shots(task: str, size: int, settings: AdaptSettings) -> None:
    """Make sure that a task has enough examples to learn from and to validate on."""
    held = settings.validation_shots
    shots = "at least one shot" if settings.shots is None else f"{settings.shots} shots"
    if (1 if settings.shots is None else settings.shots) + held > size:
        raise InputError(
            f"task {task!r} has {size} training {'example' if size == 1 else 'examples'}, too few "
            f"for {shots} + {held} validation shots: ask for fewer, or add examples"
        )


def _check_model(model: RoutedModel, work: Work) -> None:
    """Find out, before any work could be lost, whether every task can begin."""
    for task in work.tasks:
        check_new(model, task)
    inits = [each.init for each in work.choices.values()]
    check_starts(model, work.options.settings.phase, inits)


def _adapt(model: RoutedModel, work: Work, folder: Path) -> list[dict[str, Any]]:
    """Do what is left to do in the folder of a run; all results of all processes."""
    options = work.options
    with held(folder) as check, resumable(folder):
        say("\n".join(work.optimizations))
        running = folder / RUNNING
        wait()  # for the first process, which makes the folder of the run
        make_folder(running)
        order = list(itertools.product(work.tasks, work.choices, options.seeds))
        files = ResultFiles(folder / "results.json", running, order)
        done = _whole(folder, files.gather())
        wait()  # all processes have looked before one of them writes
        results = list(done) if is_first() else []
        wanted = SuiteSlots(
            suite=work.suite, tasks=work.tasks, choices=work.choices, seeds=options.seeds,
            split=options.split, max_examples=options.max_test, done=done,
            part=slice(index(), None, count()) if count() > 1 else None,
            deterministic=options.deterministic,
        )  # fmt: skip
        adapted = adapt_suite(
            model, work.kind, wanted, memory=options.memory, folder=running,
            each=_saving(model, folder, files, results, work.card, check),
            note=lambda result: say(line_of(result)),
        )  # fmt: skip
        results += [result for result in adapted if result["score"] is None]
        write_json(files.own, results)
        results = files.gather()
        check_learned(results)
    if is_first():
        remove(running)  # a killed process may have left half a file there
    return results


def _whole(folder: Path, done: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results whose adapters are whole; the others are to be adapted again, which is said."""
    whole = []
    for result in done:
        try:
            if result["score"] is not None:
                check_adapter(place_of(folder, result))
        except InputError as error:
            say(f"{error}; adapting to {result['task']} with seed {result['seed']} again")
        else:
            whole.append(result)
    return whole


def _saving(
    model: RoutedModel,
    folder: Path,
    files: ResultFiles,
    results: list[dict[str, Any]],
    card: Callable[[Path], None],
    check: Callable[[], None],
) -> Callable[[dict[str, Any], str], None]:
    """A function that writes one result and its adapter, and adds it to `results` in place."""

    def save(result: dict[str, Any], route: str) -> None:
        check()
        place = place_of(folder, result)
        model.export_peft(route, place)
        card(place)
        if model.routes.logits is not None:
            write_tensors(place / ROUTE, {"route": model.routes[route]})
        write_manifest(place)
        results.append(result)
        write_json(files.own, results)

    return save


def _result(results: Sequence[Mapping[str, Any]], work: Work, folder: Path) -> Result:
    tables, means = tables_of(results, work.tasks, work.choices)
    diverged = [result for result in results if result["score"] is None]
    if diverged:
        names = ", ".join(f"{r['task']} with seed {r['seed']} {r['label']}" for r in diverged[:3])
        say(f"diverged and left out: {len(diverged)} of {len(results)} ({names}); lower --lr")
    return Result(
        {"out": folder, "means": means, "results": results},
        (*tables, f"results and adapters are in {folder}"),
    )
