"""Encoded examples: the rows of a suite's tasks as token ids, cached on disk by `datasets`."""

from collections.abc import Sequence

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

from polyroute.errors import InputError
from polyroute.kinds import ModelKind
from polyroute.suite import Suite, quiet_datasets

__all__ = ["encoded", "encoded_mixture", "prompt_lengths", "task_sizes"]


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
    """How many rows each task has, in order of appearance.

    Raises:
        InputError: the rows of a task do not follow one another.
    """
    runs = pc.run_end_encode(_arrow_column(rows, "task"))
    counts = pc.value_counts(runs.values)
    split_up = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(split_up) > 0:
        raise InputError(
            "the rows of a task must follow one another, but those of "
            f"{split_up[0]['values'].as_py()!r} do not; put one task after the other"
        )
    return [int(n) for n in np.diff(runs.run_ends.to_numpy(), prepend=0)]


def prompt_lengths(rows: datasets.Dataset) -> npt.NDArray[np.int64]:
    """Tokens of every prompt, `[rows]`."""
    lengths = pc.list_value_length(_arrow_column(rows, "prompt_ids"))
    return np.asarray(lengths.to_numpy(), dtype=np.int64)


def _arrow_column(rows: datasets.Dataset, name: str) -> pa.Array:
    # In Arrow throughout: a column of a large corpus is never a list of Python objects.
    column = rows.select_columns([name]).with_format("arrow")[:][name]
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
