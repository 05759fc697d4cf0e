"""Few-shot adaptation: from a trained inventory to new tasks, with a handful of examples each.

Every (task, seed, settings) is a *slot*: a route, skills, optimizer, schedule, order of examples
and early stopping of its own. All slots run side by side on one frozen base model, and each ends
where it would end alone.
"""

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from numbers import Integral
from pathlib import Path
from typing import Any

import datasets
from torch import Tensor

from polyroute.adapting.loop import Slot, SlotTraining, train_slots
from polyroute.adapting.settings import AdaptSettings
from polyroute.data.metrics import acceptable_answers
from polyroute.data.sampling import draw_few_shot
from polyroute.data.suite import Suite
from polyroute.errors import InputError, did_you_mean
from polyroute.host.files import finite, make_folder
from polyroute.kinds.batches import Row
from polyroute.kinds.choose import ModelKind
from polyroute.layer.factors import Factors
from polyroute.model import Phase, RoutedModel
from polyroute.saved.peft_export import write_peft_adapter
from polyroute.study.evaluate import score_rows
from polyroute.study.examples import encoded, encoded_records

__all__ = [
    "AdaptSettings",
    "Adapted",
    "adapt_many",
    "adapt_suite",
    "check_learned",
    "check_new",
    "variants",
]


@dataclass(frozen=True)
class Adapted:
    """One slot at its end."""

    task: str
    seed: int
    settings: AdaptSettings
    indices: Sequence[int]
    """Which of the examples it was trained on."""
    trained_parameters: int
    steps: int
    """Steps taken."""
    best_step: int
    """The number of steps after which the result was taken."""
    first_loss: float
    last_loss: float
    """Means over the first and the last tenth of the steps."""
    validation_loss: float | None
    """Of the result; None where no loss of validation examples chose it."""
    diverged_at: int | None
    """The step at which the loss or a number was no longer finite: the result is worthless."""
    seconds: float
    """The slot's share of the wall-clock time of training."""
    route: Tensor | None = field(repr=False)
    """Its routing logits `[N, H, K]`; None where the phase has none."""
    factors: Sequence[Factors] = field(repr=False)
    """What each site applies: the one plain adapter that the slot is."""
    _model: RoutedModel = field(repr=False)

    def export_peft(self, folder: str | os.PathLike[str]) -> None:
        """Write it as an ordinary PEFT adapter.

        Raises:
            InputError: the folder cannot be written.
        """
        write_peft_adapter(folder, self._model.base_model, self._model.sites, self.factors)


def adapt_many(
    model: RoutedModel,
    examples: Mapping[str, datasets.Dataset | Sequence[Mapping[str, Any]]],
    *,
    kind: ModelKind,
    phase: Phase = "mu",
    seeds: Sequence[int] = (0,),
    grid: Mapping[str, Sequence[Any]] | None = None,
    memory: str | int | None = None,
    folder: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> list[Adapted]:
    """Adapt to many tasks in one run: every task, seed and combination of the grid, side by side.

    Each ends, up to rounding, where it would end alone: the same draw of examples, order, schedule
    and clipping, whatever runs beside it. (AdamW enlarges rounding where gradients are tiny.)
    Dropout and noisy gates are off.

        results = adapt_many(model, {"boolq": examples}, kind=kind, phase="z", seeds=[0, 1],
                             grid={"route_lr": [0.03, 0.1]}, steps=100)
        model.add_task("boolq", results[0].route)      # phase z: the route is all there is
        results[0].export_peft("out/boolq")            # any phase: one ordinary LoRA

    Args:
        model: a trained inventory; it is not changed.
        examples: by task: dictionaries with `input`, `target` and, optionally, `instruction` and
            `choices`; or a data set with these columns.
        kind: how the base model reads and learns; see `polyroute.kinds.choose.kind_of`.
        phase: what trains; see `RoutedModel.set_phase`.
        seeds: of the draw of `shots` examples, the initialisation and the order.
        grid: lists of values for fields of `AdaptSettings`.
        memory: for slots and activations, such as `"8GB"`; by default half of what is free. More
            slots than fit are run in waves.
        folder: keep running slots here, so that the same call goes on after an interruption. The
            results are not kept.
        **settings: fields of `AdaptSettings`, the same for all.

    Returns:
        One result for each, tasks first, then the grid, then seeds.

    Raises:
        InputError: an example, a setting or a phase cannot be used; nothing was trained.
    """
    if not isinstance(examples, Mapping) or not examples:
        raise InputError("examples must be a dictionary of a task's name to its examples")
    choices = variants(AdaptSettings(phase=phase, **_known(settings)), grid)
    if not isinstance(seeds, Sequence) or isinstance(seeds, str) or not seeds:
        raise InputError(f"seeds must be a list of whole numbers, not {seeds!r}")
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 2**32:
            raise InputError(f"a seed must be a whole number from 0 to {2**32 - 1}, not {seed!r}")
    for task in examples:
        if not isinstance(task, str) or not task:
            raise InputError(f"a task name must be a non-empty string, not {task!r}")
    slots = []
    for task, given in examples.items():
        rows = _rows(task, given, kind)
        for (label, variant), seed in itertools.product(choices.items(), seeds):
            slots.append(_slot(task, seed, label, variant, rows))
    if len({slot.name for slot in slots}) < len(slots):
        raise InputError(f"seeds must be different numbers, not {list(seeds)}")
    found: dict[str, Adapted] = {}

    def finish(training: SlotTraining) -> None:
        found[training.slot.name] = _result(model, training)

    place = None if folder is None else make_folder(folder)
    train_slots(model, kind, phase, slots, finish=finish, memory=memory, folder=place)
    return [found[slot.name] for slot in slots]


def adapt_suite(
    model: RoutedModel,
    kind: ModelKind,
    suite: Suite,
    tasks: Sequence[str],
    choices: Mapping[str, AdaptSettings],
    *,
    seeds: Sequence[int],
    split: str = "test",
    memory: str | int | None = None,
    folder: Path | None = None,
    done: Sequence[Mapping[str, Any]] = (),
    part: slice = slice(None),
    each: Callable[[dict[str, Any], str], None] | None = None,
) -> list[dict[str, Any]]:
    """Adapt to tasks of a suite, and score each result as it is at the slot's last or best step.

    Args:
        model: a trained inventory; it is not changed.
        kind: how its base model learns and answers.
        suite: where the tasks are.
        tasks: their names.
        choices: settings by label, as `variants` makes them; all of one phase.
        seeds: of the draw, the initialisation and the order.
        split: to score on.
        memory: see `adapt_many`.
        folder: where running slots are kept.
        done: results that are there already; their slots are left out.
        part: which of the others to adapt; the rest is left to other processes.
        each: called with each result that did not diverge, and the route of its slot, while the
            model holds it.

    Returns:
        For each new slot, in order of ending: the scores (None where it diverged), what was
        trained, the losses, seconds of training, and `indices`, the rows of the training split that
        were drawn.

    Raises:
        InputError: the phase has nothing to train, or there are fewer examples than shots; nothing
            was trained. Or all slots diverged; of a part, that is for `check_learned`.
    """
    before = {(r["task"], r["seed"], r["label"]) for r in done}
    slots = []
    for task in tasks:
        check_new(model, task)
        train = encoded(suite, task, "train", kind)
        for (label, variant), seed in itertools.product(choices.items(), seeds):
            if (task, seed, label) not in before:
                slots.append(_slot(task, seed, label, variant, train))
    slots = slots[part]
    results: list[dict[str, Any]] = []

    @cache  # many slots are scored on the same rows
    def scored_on(task: str) -> tuple[datasets.Dataset, Sequence[str | Sequence[str]]]:
        return encoded(suite, task, split, kind), acceptable_answers(suite.split(task, split))

    def chosen_by(training: SlotTraining) -> float:
        slot, by = training.slot, training.settings.choose_by
        rows, answers = scored_on(slot.task)
        if not training.settings.looks_at_test:
            drawn = list(slot.validation_indices)
            rows = encoded(suite, slot.task, "train", kind).select(drawn)
            answers = acceptable_answers(suite.split(slot.task, "train").select(drawn))
        metric = suite.info(slot.task).metric
        score, normalised = score_rows(model, kind, rows, answers, metric, route=training.route)
        return score if normalised is None or not by.endswith("normalised") else normalised

    def finish(training: SlotTraining) -> None:
        task, settings = training.slot.task, training.settings
        adapted = _result(model, training)
        metric = suite.info(task).metric
        score: float | None = None
        normalised: float | None = None
        if adapted.diverged_at is None:
            rows, answers = scored_on(task)
            score, normalised = score_rows(model, kind, rows, answers, metric, route=training.route)
        result = {
            "task": task,
            "seed": training.slot.seed,
            "label": training.slot.label,
            "phase": settings.phase,
            "chosen_by": settings.choose_by,
            "shots": len(training.slot.rows),
            "split": split,
            "metric": metric,
            "score": score,
            "score_normalised": normalised,
            **{name: finite(getattr(adapted, name)) for name in REPORTED},
        }
        results.append(result)
        if each is not None and adapted.diverged_at is None:
            each(result, training.route)

    if slots:
        phase = slots[0].settings.phase
        train_slots(
            model, kind, phase, slots, finish=finish, memory=memory, folder=folder, score=chosen_by
        )
    if results and part == slice(None):
        check_learned([*done, *results])
    return results


REPORTED = (
    "trained_parameters", "steps", "best_step", "first_loss", "last_loss", "validation_loss",
    "diverged_at", "seconds", "indices",
)  # fmt: skip
"""Fields of `Adapted` that a result of `adapt_suite` has."""


def check_learned(results: Sequence[Mapping[str, Any]]) -> None:
    """Make sure that not every adaptation diverged.

    Raises:
        InputError: all did.
    """
    if results and all(result["score"] is None for result in results):
        first = results[0]
        raise InputError(
            f"training diverged for all {len(results)} adaptations ({first['task']} with seed "
            f"{first['seed']} at step {first['diverged_at']}): lower --lr or --route-lr"
        )


def check_new(model: RoutedModel, task: str) -> None:
    """Make sure that a task is not one of those of training.

    Raises:
        InputError: the inventory was trained on the task.
    """
    if task in model.routes:
        raise InputError(
            f"task {task!r} is among those that the inventory was trained on; "
            "`polyroute evaluate` scores it as it is"
        )


def variants(
    settings: AdaptSettings, grid: Mapping[str, Sequence[Any]] | None = None
) -> dict[str, AdaptSettings]:
    """Settings for each combination of a grid's values, by a label such as `lr=0.001,steps=50`.

    Raises:
        InputError: the grid names no setting, repeats or lacks values, or varies the phase.
    """
    grid = grid or {}
    _known(grid)
    if "phase" in grid:
        raise InputError("the phase cannot vary within a run: adapt once for each phase")
    for name, values in grid.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise InputError(f"the grid of {name!r} must be a list of values, not {values!r}")
        if len(set(map(str, values))) < len(values):
            raise InputError(f"the grid of {name!r} repeats a value: {list(values)}")
    found: dict[str, AdaptSettings] = {}
    for values in itertools.product(*grid.values()):
        variant = replace(settings, **dict(zip(grid, values, strict=True)))
        # Sorted, and from the checked values: 1 and 1.0 are one setting, in whatever order.
        found[",".join(f"{name}={getattr(variant, name)}" for name in sorted(grid))] = variant
    return found


def _known(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    names = [f.name for f in fields(AdaptSettings)]
    for name in settings:
        if name not in names:
            raise InputError(f"there is no setting {name!r}: {did_you_mean(name, names)}")
    return settings


def _rows(
    task: str, given: datasets.Dataset | Sequence[Mapping[str, Any]], kind: ModelKind
) -> Sequence[Row]:
    """A task's examples, encoded unless they are."""
    if isinstance(given, datasets.Dataset):
        given = given.with_format(None)
        if set(kind.features) <= set(given.column_names):
            encoded_rows: Sequence[Row] = given
            return encoded_rows
        given = given.to_list()
    if isinstance(given, str | Mapping) or not isinstance(given, Sequence) or not given:
        raise InputError(f"the examples of task {task!r} must be a list of at least one")
    return encoded_records(given, task, kind)


def _slot(task: str, seed: int, label: str, settings: AdaptSettings, rows: Sequence[Row]) -> Slot:
    """A slot with the rows that its seed draws."""
    held = settings.validation_shots
    shots = len(rows) - held if settings.shots is None else settings.shots
    try:
        drawn = draw_few_shot(len(rows), shots + held, seed)
    except InputError as error:
        raise InputError(f"task {task!r}: {error}") from error
    if shots < 1:
        raise InputError(
            f"task {task!r} has {len(rows)} examples, and {held} are for validation: none is left"
        )
    training, validation = ([rows[i] for i in part] for part in (drawn[:shots], drawn[shots:]))
    indices = drawn[:shots], drawn[shots:]
    return Slot(task, seed, settings, training, validation, label, *indices)


def _result(model: RoutedModel, training: SlotTraining) -> Adapted:
    """What a slot became, copied while the model holds it."""
    losses = training.losses
    tenth = max(1, len(losses) // 10)
    return Adapted(
        task=training.slot.task,
        seed=training.slot.seed,
        settings=training.settings,
        indices=training.slot.indices,
        trained_parameters=sum(tensor.numel() for tensor in training.trained),
        steps=training.step,
        best_step=training.best_step,
        first_loss=sum(losses[:tenth]) / tenth,
        last_loss=sum(losses[-tenth:]) / tenth,
        validation_loss=training.best_loss if training.settings.choose_by == "loss" else None,
        diverged_at=training.diverged_at,
        seconds=training.seconds,
        route=None if model.routes.logits is None else model.routes[training.route].cpu(),
        factors=[_copied(factor) for factor in model.factors_of(training.route)],
        _model=model,
    )


def _copied(factors: Any) -> Factors:
    tensors = {f.name: getattr(factors, f.name).detach().cpu().clone() for f in fields(factors)}
    copy: Factors = replace(factors, **tensors)
    return copy
