"""Means over tasks with bootstrap intervals."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Estimate", "estimates"]

Array = npt.NDArray[np.float64]

RESAMPLES = 10_000
MOST_DRAWS = 8_000_000
"""More than 800 tasks are resampled less often, since their intervals are narrow anyway."""


class Estimate(NamedTuple):
    """A mean over tasks and its 95% interval; a single task has no interval."""

    mean: float
    low: float | None
    high: float | None
    tasks: int


def estimates(values: Array, *, outside: float = 0.05) -> list[Estimate]:
    """Means over tasks with bootstrap intervals: 95% of the means when tasks are drawn again.

    The draws are seeded and the same for all columns, so equal numbers have equal intervals.

    Args:
        values: `[T, n]`, one row for each task; columns are independent.
        outside: the share of the means that lie outside, half on each side.

    Returns:
        One estimate for each column.
    """
    tasks = len(values)
    means = values.mean(0).tolist()
    if tasks == 1:
        return [Estimate(mean, None, None, 1) for mean in means]
    low, high = np.quantile(
        _shares(tasks) @ values, [outside / 2, 1 - outside / 2], axis=0
    ).tolist()
    return [Estimate(*each, tasks) for each in zip(means, low, high, strict=True)]


@lru_cache(maxsize=2)
def _shares(tasks: int) -> Array:
    """The share of each task in each resample, `[B, T]`."""
    resamples = max(200, min(RESAMPLES, MOST_DRAWS // tasks))
    shares = np.empty((resamples, tasks))
    draw = np.random.default_rng(0)
    for row in shares:
        row[:] = np.bincount(draw.integers(tasks, size=tasks), minlength=tasks)
    shares /= tasks
    return shares
