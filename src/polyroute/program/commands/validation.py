"""The rows on which `polyroute train` measures its validation loss."""

from collections.abc import Sequence

import datasets

from polyroute.data.sampling import some_places
from polyroute.data.suite import Suite
from polyroute.errors import InputError
from polyroute.host.output import say
from polyroute.kinds.choose import ModelKind
from polyroute.study.examples import encoded, task_sizes

__all__ = ["with_validation"]

MOST = 32
"""Most validation examples of each task, unless the user says otherwise."""
SHARE = 10
"""One in so many training examples is set aside where a task has no validation split."""
NAMED = 3
"""So many tasks are named in a note."""


def with_validation(
    suite: Suite, tasks: Sequence[str], rows: datasets.Dataset, kind: ModelKind, most: int | None
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Divide the work between training and validation.

    Args:
        suite: where the tasks are.
        tasks: the tasks, in the order of `rows`.
        rows: the encoded training examples of all tasks.
        kind: how examples are encoded.
        most: most validation examples of each task; None for the usual number.

    Returns:
        The rows to train on, and those to validate on.

    Raises:
        InputError: no task has anything to validate on.
    """
    most = MOST if most is None else most
    kept: list[int] = []
    parts: list[datasets.Dataset] = []
    divided: list[str] = []
    without: list[str] = []
    start = 0
    for task, size in zip(tasks, task_sizes(rows), strict=True):
        own = range(start, start + size)
        start += size
        aside: set[int] = set()
        if "validation" in suite.splits(task):
            found = encoded(suite, task, "validation", kind)
            parts.append(found.select(some_places(len(found), most)))
        elif size >= SHARE:
            places = sorted(own[i] for i in some_places(size, min(most, size // SHARE)))
            parts.append(rows.select(places))
            aside = set(places)
            divided.append(task)
        else:
            without.append(task)
        kept += [place for place in own if place not in aside]
    if not parts:
        raise InputError(
            "no task has a validation split or ten training examples: leave out --eval-steps"
        )
    if divided:
        say(
            f"no validation split: up to a tenth of the training examples of {_named(divided)} is "
            "set aside for the validation loss and does not train"
        )
    if without:
        say(f"too few examples to validate on: {_named(without)}")
    return rows.select(kept) if divided else rows, datasets.concatenate_datasets(parts)


def _named(tasks: Sequence[str]) -> str:
    rest = len(tasks) - NAMED
    return ", ".join(tasks[:NAMED]) + (f" and {rest} more" if rest > 0 else "")
