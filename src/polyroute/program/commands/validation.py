"""The rows on which `polyroute train` measures its validation loss."""

from collections.abc import Sequence

import datasets

from polyroute.data.sampling import some_places
from polyroute.data.suite import Suite
from polyroute.errors import InputError
from polyroute.host.output import say
from polyroute.kinds.choose import ModelKind
from polyroute.study.examples import encoded, task_sizes, warn_of_cuts

__all__ = ["with_validation"]

MOST = 32
"""Most validation examples of each task, unless the user says otherwise."""
SHARE = 10
"""One in so many training examples is set aside where a task has no validation split."""
NAMED = 3
"""So many tasks are named in a note."""


def with_validation(
    suite: Suite,
    tasks: Sequence[str],
    rows: datasets.Dataset,
    kind: ModelKind,
    most: int | None,
    *,
    continued: bool,
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Divide the work between training and validation.

    Args:
        suite: where the tasks are.
        tasks: the tasks, in the order of `rows`.
        rows: the encoded training examples of all tasks.
        kind: how examples are encoded.
        most: most validation examples of each task; None for the usual number.
        continued: whether training goes on from a run, which may have trained on the same tasks.

    Returns:
        The rows to train on, and those to validate on.

    Raises:
        InputError: no task has anything to validate on.
    """
    most = MOST if most is None else most
    kept: list[int] = []
    parts: list[datasets.Dataset] = []
    read: list[datasets.Dataset] = []
    divided: list[str] = []
    without: list[str] = []
    start = 0
    for task, size in zip(tasks, task_sizes(rows), strict=True):
        own = range(start, start + size)
        start += size
        aside: set[int] = set()
        if "validation" in suite.splits(task):
            found = encoded(suite, task, "validation", kind)
            read.append(found.select(some_places(len(found), most)))
            parts.append(read[-1])
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
    if read:
        warn_of_cuts(read, kind, "validation ")
    _tell(divided, without, most, continued)
    return rows.select(kept) if divided else rows, datasets.concatenate_datasets(parts)


def _tell(divided: Sequence[str], without: Sequence[str], most: int, continued: bool) -> None:
    """Say which tasks have no validation split, and what that means for them."""
    if divided:
        has, their, each = ("has", "its", "") if len(divided) == 1 else ("have", "their", " each")
        again = (
            "; the run that training goes on from may have trained on these examples"
            if continued
            else ""
        )
        say(
            f"{_named(divided)} {has} no validation split, so a tenth of {their} training "
            f"examples, at most {most}{each}, is set aside and does not train{again}"
        )
    if without:
        has, is_not = ("has", "is not") if len(without) == 1 else ("have", "are not")
        say(
            f"{_named(without)} {has} fewer than {SHARE} training examples and {is_not} validated "
            "on"
        )


def _named(tasks: Sequence[str]) -> str:
    """Tasks in words."""
    rest = len(tasks) - NAMED
    names = [*tasks[:NAMED], *([f"{rest} more"] if rest > 0 else [])]
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
