"""Encoded examples: the rows of a suite's tasks as token ids, cached on disk by `datasets`."""

from collections.abc import Sequence

import datasets
import numpy as np
from tqdm.auto import tqdm

from polyroute.kinds import ModelKind
from polyroute.suites import Suite, quiet_datasets

__all__ = ["encoded", "encoded_mixture", "task_sizes"]


def encoded(suite: Suite, task: str, split: str, kind: ModelKind) -> datasets.Dataset:
    """One split of one task, with the columns of `ModelKind.features`.

    Raises:
        InputError: the data cannot be read, or the task has no such split.
    """
    rows = suite.split(task, split)
    with quiet_datasets():
        return rows.map(
            kind.encode, batched=True, remove_columns=rows.column_names, features=kind.features
        )


def encoded_mixture(
    suite: Suite, tasks: Sequence[str], split: str, kind: ModelKind
) -> datasets.Dataset:
    """One split of several tasks, one task after the other."""
    progress = tqdm(tasks, "reading tasks", delay=1.0, leave=False)
    return datasets.concatenate_datasets([encoded(suite, task, split, kind) for task in progress])


def task_sizes(rows: datasets.Dataset) -> list[int]:
    """How many consecutive rows each task has, in order of appearance."""
    names = np.asarray(rows.with_format("numpy", columns=["task"])["task"])
    starts = np.flatnonzero(np.r_[True, names[1:] != names[:-1]])
    return [int(n) for n in np.diff(np.r_[starts, len(names)])]
