"""How many tokens the prompts and the targets of tasks have."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from polyroute.data.sampling import some_places
from polyroute.data.suite import Suite
from polyroute.host.progress import progress
from polyroute.kinds.choose import ModelKind

__all__ = ["SHARE", "Lengths", "chosen_limit", "usual_lengths"]

SHARE = 95
"""The percentage of the examples of every task that is to be read whole."""
OF_A_TASK, IN_ALL, AT_LEAST = 500, 20_000, 20
"""How many examples of a task are looked at: up to the first number, fewer where there are so many
tasks that this would be more than the second number in all, but never fewer than the third."""
STEP = 16
"""Limits are multiples of it."""


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens that are enough for `SHARE` percent of the examples of every task."""

    prompt: int
    target: int
    """Enough for the longest choice too, where there are choices."""
    is_sample: bool
    """Whether only some of the examples were looked at."""


def usual_lengths(suite: Suite, tasks: Sequence[str], split: str, kind: ModelKind) -> Lengths:
    """How long examples are, up to the longest few of each task.

    It is the largest of the tasks' percentiles, so one task with long prompts among many with short
    ones counts. Of a large task, examples drawn with one seed are looked at.

    Args:
        suite: where the tasks are.
        tasks: their names, at least one.
        split: the split to look at.
        kind: how the base model reads; its own limits play no part.
    """
    most = min(OF_A_TASK, max(AT_LEAST, IN_ALL // len(tasks)))
    prompts, targets, is_sample = [], [], False
    for task in progress(tasks, "measuring lengths"):
        rows = suite.split(task, split)
        is_sample = is_sample or len(rows) > most
        # Not every n-th row: turns of a conversation follow one another, and grow.
        found = kind.lengths(rows.select(some_places(len(rows), most))[:])
        prompts.append(_percentile(prompt for prompt, _ in found))
        targets.append(_percentile(target for _, target in found))
    return Lengths(max(prompts), max(targets), is_sample)


def _percentile(lengths: Iterable[int]) -> int:
    """The smallest of the lengths that `SHARE` percent of them do not exceed."""
    ordered = sorted(lengths)
    return ordered[math.ceil(SHARE / 100 * len(ordered)) - 1]


def chosen_limit(length: int, most: int) -> int:
    """A limit for examples of this length: a multiple of `STEP` unless `most` comes before it."""
    return min(-(-length // STEP) * STEP, most)
