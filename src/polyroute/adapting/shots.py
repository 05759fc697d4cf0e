"""Shots: which of a task's examples a slot learns from, and whether every answer is among them.

A task whose examples all have the same choices has classes: each choice is one.
"""

import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import datasets

from polyroute.adapting.settings import AdaptSettings
from polyroute.adapting.slot import Slot
from polyroute.data.sampling import draw_balanced, draw_few_shot
from polyroute.errors import InputError, first_few
from polyroute.kinds.batches import Row

__all__ = ["Shots", "check_classes", "classes_of"]

Classes = list[Hashable]
"""The class of each example of a task."""
NAMED = 3
"""How many tasks a sentence names."""


class Shots:
    """Draws the examples of slots.

    Args:
        rows: the encoded examples of each task.
        choices: all settings that are tried.

    Raises:
        InputError: the draw is to be stratified, and no task has classes.
    """

    def __init__(self, rows: Mapping[str, Sequence[Row]], choices: Iterable[AdaptSettings]) -> None:
        self._rows = rows
        self._classes = {task: classes_of(own) for task, own in rows.items()}
        self._draws: dict[str, dict[tuple[int, ...], int]] = {task: {} for task in rows}
        """For each task and draw, how many of its classes are missing."""
        self._offered = {
            task: _offered(own[0]["choice_ids"])
            for task, own in rows.items()
            if self._classes[task]
        }
        stratified = [each.stratify for each in choices]
        self._fix = "raise shots" if all(stratified) else "raise shots or set stratify"
        if any(stratified):
            plain = check_classes(self._classes)
            if plain:
                has, its = ("has", "its") if len(plain) == 1 else ("have", "their")
                warnings.warn(
                    f"{_some(plain)} {has} no classes, because {its} examples have no choices or "
                    f"different ones: {its} shots are drawn without stratify",
                    stacklevel=2,
                )

    def slot(self, task: str, seed: int, label: str, settings: AdaptSettings) -> Slot:
        """A slot, with the rows that its seed draws.

        Raises:
            InputError: there are fewer examples than shots.
        """
        rows, classes = self._rows[task], self._classes[task]
        held = settings.validation_shots
        shots = len(rows) - held if settings.shots is None else settings.shots
        try:
            if settings.stratify and classes is not None:
                drawn = draw_balanced(classes, shots + held, seed)
            else:
                drawn = draw_few_shot(len(rows), shots + held, seed)
        except InputError as error:
            raise InputError(f"task {task!r}: {error}") from error
        if shots < 1:
            raise InputError(
                f"task {task!r} has {len(rows)} examples, and {held} are for validation: none is "
                "left"
            )
        indices = drawn[:shots], drawn[shots:]
        if classes is not None:
            missing = self._offered[task].difference(classes[one] for one in indices[0])
            self._draws[task][tuple(indices[0])] = len(missing)
        training, validation = ([rows[i] for i in part] for part in indices)
        return Slot(task, seed, settings, training, validation, label, *indices)

    def warn_of_missing(self) -> None:
        """Warn, in one sentence, of all draws so far that have no example of some class."""
        draws = list(chain.from_iterable(own.values() for own in self._draws.values()))
        lacking = {
            task: [missing for missing in own.values() if missing]
            for task, own in self._draws.items()
            if any(own.values())
        }
        if lacking:
            shown = [
                f"{task}: up to {max(missing)} of {len(self._offered[task])} in {len(missing)} of "
                f"{len(self._draws[task])} draws"
                for task, missing in list(lacking.items())[:NAMED]
            ]
            more = [f"{len(lacking) - NAMED} more tasks"] if len(lacking) > NAMED else []
            warnings.warn(
                f"{sum(map(len, lacking.values()))} of {len(draws)} draws of shots have no example "
                f"of some answer that their task offers ({'; '.join([*shown, *more])}): "
                f"{self._fix}",
                stacklevel=2,
            )


def classes_of(
    rows: Sequence[Mapping[str, Any]], choices: str = "choice_ids", target: str = "target_ids"
) -> Classes | None:
    """The class of each example of a task; None if they do not all have the same choices.

    Args:
        rows: the examples, or a data set of them.
        choices: the column of the choices.
        target: the column of the answer.
    """
    if not (len(rows) and _offered(rows[0][choices]) == _offered(rows[-1][choices])):
        return None  # what most tasks without classes show at once
    if isinstance(rows, datasets.Dataset):
        columns = rows.select_columns([choices, target])[:]
    else:
        columns = {name: [row[name] for row in rows] for name in (choices, target)}
    offered = set(map(_offered, columns[choices]))
    if len(offered) > 1 or not next(iter(offered)):
        return None
    return [_key(answer) for answer in columns[target]]


def _offered(choices: Sequence[Any] | None) -> frozenset[Hashable]:
    return frozenset(map(_key, choices or ()))


def _key(answer: Any) -> Hashable:
    return answer if isinstance(answer, str) else tuple(answer)


def check_classes(classes: Mapping[str, Classes | None]) -> list[str]:
    """Make sure that a stratified draw is possible.

    Args:
        classes: those of each task; None where it has none.

    Returns:
        The tasks that have none, where others have.

    Raises:
        InputError: no task has classes.
    """
    plain = [task for task, own in classes.items() if own is None]
    if len(plain) == len(classes):
        raise InputError(
            f"stratify draws equally many examples of each answer, but {_some(plain)} "
            f"{'has' if len(plain) == 1 else 'have'} no choices that all examples share: leave "
            "stratify out"
        )
    return plain


def _some(tasks: Sequence[str]) -> str:
    """Tasks in words."""
    names = first_few([repr(task) for task in tasks], NAMED)
    return f"{'task' if len(tasks) == 1 else 'tasks'} {names}"
