"""Few-shot adaptation: from a trained inventory to new tasks, with a handful of examples each.

Every (task, seed, settings) is a *slot*: a route, skills, optimizer, schedule, order of examples
and early stopping of its own. All slots run side by side on one frozen base model, and each ends
where it would end alone.
"""

import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from polyroute.adapting.adapted import Adapted, adapted
from polyroute.adapting.loop import SlotCalls, train_slots
from polyroute.adapting.settings import AdaptSettings, check_names, variants
from polyroute.adapting.shots import Shots
from polyroute.adapting.slot import Slot
from polyroute.adapting.slot_training import SlotTraining
from polyroute.data.sampling import some_places
from polyroute.data.suite import Suite, check_tasks
from polyroute.errors import InputError
from polyroute.host.files import finite, make_folder
from polyroute.kinds.batches import Row
from polyroute.kinds.choose import ModelKind
from polyroute.model import Phase, RoutedModel
from polyroute.saved.peft_export import peft_target
from polyroute.settings import SEEDS, flag, whole
from polyroute.study.evaluate import NotFiniteError, Questions, questions, score_rows
from polyroute.study.examples import encoded, encoded_records, warn_of_cuts
from polyroute.task_names import check_names as check_task_names

__all__ = ["SuiteSlots", "adapt_many", "adapt_suite", "check_learned", "check_new", "check_seeds"]


def adapt_many(  # noqa: PLR0913 (public: users know its keywords)
    model: RoutedModel,
    examples: Mapping[str, datasets.Dataset | Sequence[Mapping[str, Any]]],
    *,
    kind: ModelKind,
    phase: Phase = "mu",
    seeds: Sequence[int] = (0,),
    grid: Mapping[str, Sequence[Any]] | None = None,
    memory: str | int | None = None,
    folder: str | os.PathLike[str] | None = None,
    deterministic: bool = False,
    each_step: Callable[[SlotTraining], None] | None = None,
    **settings: Any,
) -> list[Adapted]:
    """Adapt to many tasks in one run: every task, seed and combination of the grid, side by side.

    Each ends, up to rounding, where it would end alone: the same draw of examples, order, schedule
    and clipping, whatever runs beside it. (AdamW enlarges rounding where gradients are tiny.) With
    `deterministic` it ends there to the bit. Dropout and noisy gates are off.

        results = adapt_many(model, {"boolq": examples}, kind=kind, phase="z", seeds=[0, 1],
                             grid={"route_lr": [0.03, 0.1]}, steps=100)
        model.add_task("boolq", results[0].route)      # phase z: the route is all there is
        results[0].export_peft("out/boolq")            # any phase: one ordinary LoRA

    Args:
        model: a trained inventory; it is not changed.
        examples: for each task a list of dictionaries with `input`, `target` and, optionally,
            `instruction` and `choices`; or a data set with these columns.
        kind: how the base model reads and learns; see `polyroute.kinds.choose.kind_of`.
        phase: what trains; see `RoutedModel.set_phase`.
        seeds: a seed decides the draw of `shots` examples, the initialisation and the order.
        grid: lists of values for fields of `AdaptSettings`.
        memory: what slots and activations may take, such as `"8GB"`; by default half of what is
            free. More slots than fit run in waves.
        folder: where running slots are kept, so that the same call goes on after an interruption.
            The results are not kept.
        deterministic: train one slot after the other, which takes longer where they are small.
        each_step: called with each slot after each of its steps, to tell how far it is. What it
            raises ends the training.
        **settings: fields of `AdaptSettings`, the same for all slots.

    Returns:
        One result for each slot, ordered by task, then by the grid, then by seed.

    Raises:
        InputError: an example, a setting or a phase cannot be used; nothing was trained.
    """
    if not isinstance(examples, Mapping) or not examples:
        raise InputError("examples must be a dictionary of a task's name to its examples")
    check_task_names(examples)
    flag()("deterministic", deterministic)
    check_names(settings)
    choices = variants(AdaptSettings(phase=phase, **settings), grid)
    check_seeds(seeds)
    rows = {task: _rows(task, given, kind) for task, given in examples.items()}
    shots = Shots(rows, choices.values())
    slots = [
        shots.slot(task, seed, label, variant)
        for task in rows
        for (label, variant), seed in itertools.product(choices.items(), seeds)
    ]
    shots.warn_of_missing()
    target = peft_target(model.base_model, model.sites, model.wrapping.trained)
    found: dict[str, Adapted] = {}

    def finish(training: SlotTraining) -> None:
        found[training.slot.name] = adapted(model, training, target, kind.prompting)

    place = None if folder is None else make_folder(folder)
    train_slots(
        model, kind, slots, SlotCalls(finish, step=each_step), memory=memory, folder=place,
        is_deterministic=deterministic,
    )  # fmt: skip
    return [found[slot.name] for slot in slots]


@dataclass(frozen=True, kw_only=True)
class SuiteSlots:
    """What to adapt to: every task of a suite, with every choice of settings and every seed."""

    suite: Suite
    tasks: Sequence[str]
    """Names of the tasks."""
    choices: Mapping[str, AdaptSettings]
    """Settings by label, as `variants` makes them; all of one phase."""
    seeds: Sequence[int]
    """A seed decides the draw, the initialisation and the order of examples."""
    split: str = "test"
    """What results are scored on."""
    max_examples: int | None = None
    """The most examples of each task to score on, the same ones each time; None for all."""
    done: Sequence[Mapping[str, Any]] = ()
    """Results that are there already; their slots are left out."""
    part: slice | None = None
    """Which of the other slots to adapt, where other processes adapt the rest; None for all."""
    deterministic: bool = False
    """See `adapt_many`."""

    def __post_init__(self) -> None:
        """Check what training would otherwise be lost by.

        Raises:
            InputError: there is no such task or split, or a number is out of range.
        """
        check_seeds(self.seeds)
        whole(optional=True)("max_examples", self.max_examples)
        flag()("deterministic", self.deterministic)
        for task in check_tasks(self.suite, self.tasks):
            self.suite.split(task, self.split)

    def slots(self, model: RoutedModel, kind: ModelKind) -> list[Slot]:
        """The slots that are to be trained here.

        Raises:
            InputError: the inventory was trained on one of the tasks, or there are fewer examples
                than shots.
        """
        before = {(r["task"], r["seed"], r["label"]) for r in self.done}
        slots = []
        trains = {}
        for task in self.tasks:
            check_new(model, task)
            trains[task] = encoded(self.suite, task, "train", kind)
        warn_of_cuts(trains.values(), kind)
        shots = Shots(trains, self.choices.values())
        for task in self.tasks:
            for (label, variant), seed in itertools.product(self.choices.items(), self.seeds):
                if (task, seed, label) not in before:
                    slots.append(shots.slot(task, seed, label, variant))
        shots.warn_of_missing()
        return slots if self.part is None else slots[self.part]


def adapt_suite(  # noqa: PLR0913 (what it tells, and whom, is apart from what it does)
    model: RoutedModel,
    kind: ModelKind,
    wanted: SuiteSlots,
    *,
    memory: str | int | None = None,
    folder: Path | None = None,
    each: Callable[[dict[str, Any], str], None] | None = None,
    note: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Adapt to tasks of a suite, and score each result as it is at the slot's last or best step.

    Args:
        model: a trained inventory; it is not changed.
        kind: how its base model learns and answers.
        wanted: what to adapt to.
        memory: see `adapt_many`.
        folder: where running slots are kept.
        each: called with each result that did not diverge, and the route of its slot, while the
            model holds it.
        note: called after that with each result, diverged or not.

    Returns:
        For each new slot, in order of ending: the scores (None where it diverged), what was
        trained, the losses, seconds of training, and `indices`, the rows of the training split that
        were drawn.

    Raises:
        InputError: the phase has nothing to train, or there are fewer examples than shots; nothing
            was trained. Or all slots diverged; where only a part of the slots is adapted, that is
            left to `check_learned`.
    """
    slots = wanted.slots(model, kind)
    scores = _SuiteScores(model, kind, wanted)
    results: list[dict[str, Any]] = []

    def finish(training: SlotTraining) -> None:
        results.append(scores.result(training))
        if each is not None and training.diverged_at is None:
            each(results[-1], training.route)
        if note is not None:
            note(results[-1])

    if slots:
        calls = SlotCalls(finish, scores.chosen_by)
        train_slots(
            model, kind, slots, calls, memory=memory, folder=folder,
            is_deterministic=wanted.deterministic,
        )  # fmt: skip
    if results and wanted.part is None:
        check_learned([*wanted.done, *results])
    return results


class _SuiteScores:
    """Scores slots on the tasks of a suite."""

    def __init__(self, model: RoutedModel, kind: ModelKind, wanted: SuiteSlots) -> None:
        self.model, self.kind, self.suite, self.split = model, kind, wanted.suite, wanted.split
        self.most = wanted.max_examples
        self._asked: dict[tuple[str, str], Questions] = {}

    def chosen_by(self, training: SlotTraining) -> float:
        """The score by which a slot chooses its best step."""
        slot, by = training.slot, training.settings.choose_by
        if training.settings.looks_at_test:
            asked = self._scored(slot.task)
        else:
            asked = self._questions(slot.task, "train").select(slot.validation_indices)
        try:
            score, normalised = score_rows(self.model, self.kind, asked, route=training.route)
        except NotFiniteError:
            return math.nan  # which is never the best
        return score if normalised is None or not by.endswith("normalised") else normalised

    def result(self, training: SlotTraining) -> dict[str, Any]:
        """What is written of a slot that ended."""
        slot, settings = training.slot, training.settings
        score: float | None = None
        normalised: float | None = None
        if training.diverged_at is None:
            asked = self._scored(slot.task)
            try:
                score, normalised = score_rows(self.model, self.kind, asked, route=training.route)
            except NotFiniteError:  # its weights are finite, but what they compute is not
                training.diverged_at = training.step
        return {
            "task": slot.task,
            "seed": slot.seed,
            "label": slot.label,
            "phase": settings.phase,
            "chosen_by": settings.choose_by,
            "shots": len(slot.rows),
            "stratify": settings.stratify,
            "split": self.split,
            "examples": len(self._scored(slot.task).rows),
            "metric": self.suite.info(slot.task).metric,
            "score": score,
            "score_normalised": normalised,
            **{name: finite(value) for name, value in training.outcome().items()},
        }

    def _scored(self, task: str) -> Questions:
        """What results of a task are scored on."""
        asked = self._questions(task, self.split)
        return asked.select(some_places(len(asked.rows), self.most))

    def _questions(self, task: str, split: str) -> Questions:
        if (task, split) not in self._asked:  # many slots are scored on the same rows
            asked = self._asked[task, split] = questions(self.suite, task, split, self.kind)
            warn_of_cuts([asked.rows], self.kind)
        return self._asked[task, split]


def check_learned(results: Sequence[Mapping[str, Any]]) -> None:
    """Make sure that at least one adaptation did not diverge.

    Raises:
        InputError: all diverged.
    """
    if results and all(result["score"] is None for result in results):
        first = results[0]
        raise InputError(
            f"training diverged for all {len(results)} adaptations ({first['task']} with seed "
            f"{first['seed']} at step {first['diverged_at']}): lower --lr or --route-lr"
        )


def check_new(model: RoutedModel, task: str) -> None:
    """Make sure that a task is new to the inventory.

    Raises:
        InputError: the inventory was trained on the task.
    """
    if task in model.routes:
        raise InputError(
            f"task {task!r} is among those that the inventory was trained on; "
            "`polyroute evaluate` scores it as it is"
        )


def check_seeds(seeds: Sequence[int]) -> None:
    """Make sure that seeds are different whole numbers.

    Raises:
        InputError: one is not, or there is none.
    """
    if not isinstance(seeds, Sequence) or isinstance(seeds, str) or not seeds:
        raise InputError(f"seeds must be a list of whole numbers, not {seeds!r}")
    for seed in seeds:
        whole(0, most=SEEDS - 1)("a seed", seed)
    if len(set(seeds)) < len(seeds):
        raise InputError(f"seeds must be different numbers, not {list(seeds)}")


def _rows(
    task: str, given: datasets.Dataset | Sequence[Mapping[str, Any]], kind: ModelKind
) -> Sequence[Row]:
    """A task's examples, encoded unless they are encoded already."""
    if isinstance(given, datasets.Dataset):
        given = given.with_format(None)
        if set(kind.features) <= set(given.column_names):
            encoded_rows: Sequence[Row] = given
            return encoded_rows
        given = given.to_list()
    if isinstance(given, str | Mapping) or not isinstance(given, Sequence) or not given:
        raise InputError(f"the examples of task {task!r} must be a list with at least one")
    return encoded_records(given, task, kind)
