"""Encoded examples: the rows of a suite's tasks as token ids, which `datasets` caches on disk."""

import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from polyroute.data.records import check_record
from polyroute.data.suite import CHAT, COLUMNS, Suite, quiet_datasets
from polyroute.errors import InputError
from polyroute.host.progress import progress
from polyroute.kinds.batches import Row
from polyroute.kinds.choose import ModelKind

__all__ = [
    "digest_of",
    "encoded",
    "encoded_mixture",
    "encoded_records",
    "prompt_lengths",
    "task_sizes",
    "warn_of_cuts",
]

OPTIONAL = {"instruction": "", "input": "", "choices": None, "split": "train"}
"""What a record may leave out, with the value that it then has."""
HASHED_AT_ONCE = 10_000
"""Rows."""


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


def encoded_records(
    records: Sequence[Mapping[str, Any]],
    task: str,
    kind: ModelKind,
    *,
    too_long: Literal["cut", "refuse"] = "cut",
) -> list[Row]:
    """Examples given as dictionaries, as rows with the columns of `ModelKind.features`.

    Args:
        records: each has `target`, `instruction` or `input` or both, and, if the task has choices,
            `choices`. One from a conversation may have `system` and `history`, a list of messages.
        task: the task that they are examples of.
        kind: how the base model reads them.
        too_long: whether records that do not fit are cut, with a warning, or refused.

    Raises:
        InputError: a record lacks a field, a field has the wrong type, or a record is too long.
    """
    whole = []
    for number, record in enumerate(records):
        where = f"task {task!r}, example {number}"
        if not isinstance(record, Mapping):
            raise InputError(f"{where} must be a dictionary, not a {type(record).__name__}")
        whole.append({**OPTIONAL, **record, "task": task})
        check_record(whole[-1], task, where)
    columns = kind.encode(
        {name: [record.get(name) for record in whole] for name in (*COLUMNS, *CHAT)}
    )
    if too_long == "cut":
        warn_of_cuts([columns], kind)
    elif said := _cuts([columns], kind, ""):
        raise InputError(said[0])
    names = list(columns)
    return [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def encoded_mixture(
    suite: Suite, tasks: Sequence[str], split: str, kind: ModelKind
) -> datasets.Dataset:
    """One split of several tasks, one task after the other."""
    bar = progress(tasks, "reading tasks")
    rows = datasets.concatenate_datasets([encoded(suite, task, split, kind) for task in bar])
    warn_of_cuts([rows], kind)
    return rows


def warn_of_cuts(
    tables: Iterable[datasets.Dataset | Mapping[str, Sequence[int]]],
    kind: ModelKind,
    which: str = "",
) -> None:
    """Warn if prompts or answers of encoded rows were too long and lost tokens.

    Args:
        tables: encoded rows, or their columns.
        kind: how they were encoded.
        which: what rows they are, for the warning.
    """
    for sentence in _cuts(tables, kind, which):
        warnings.warn(sentence, stacklevel=2)


def _cuts(
    tables: Iterable[datasets.Dataset | Mapping[str, Sequence[int]]], kind: ModelKind, which: str
) -> list[str]:
    """What `warn_of_cuts` says."""
    lost: dict[str, list[npt.NDArray[np.int64]]] = {"prompt_cut": [], "target_cut": []}
    for table in tables:
        for name, found in lost.items():
            is_table = isinstance(table, datasets.Dataset)
            column = _arrow_column(table, name).to_numpy() if is_table else table[name]
            found.append(np.asarray(column, dtype=np.int64))
    prompts, targets = (np.concatenate(found) for found in lost.values())
    consequences = (
        ("prompts", prompts, f"{kind.cut_part} is left out", kind.remedy("max_input")),
        ("answers", targets, "the rest is left out", kind.remedy("max_target")),
    )
    return [
        f"{np.count_nonzero(tokens):,} of {len(tokens):,} {which}{what} are too long, by up to "
        f"{tokens.max():,} tokens, and {consequence}: {remedy}"
        for what, tokens, consequence, remedy in consequences
        if tokens.any()
    ]


def digest_of(rows: datasets.Dataset) -> str:
    """A hash of encoded rows, in their order: equal where a model sees the same.

    Args:
        rows: with the columns of `ModelKind.features`.
    """
    found = hashlib.sha256(repr(task_sizes(rows)).encode())
    columns = [name for name in rows.column_names if name != "task"]
    for part in rows.select_columns(columns).with_format("arrow").iter(HASHED_AT_ONCE):
        for column in part.columns:
            values = column.combine_chunks()
            while pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
                lengths = pc.fill_null(pc.list_value_length(values), -1)
                found.update(lengths.to_numpy(zero_copy_only=False).tobytes())
                values = values.flatten()
            found.update(values.to_numpy(zero_copy_only=False).tobytes())
    return found.hexdigest()


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
    """The number of tokens of each prompt, `[rows]`."""
    lengths = pc.list_value_length(_arrow_column(rows, "prompt_ids"))
    return np.asarray(lengths.to_numpy(), dtype=np.int64)


def _arrow_column(rows: datasets.Dataset, name: str) -> pa.Array:
    # All in Arrow, so that a column of a large corpus never becomes a list of Python objects.
    column = rows.select_columns([name]).with_format("arrow")[:][name]
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
