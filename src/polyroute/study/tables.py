"""Routing rows as a table of the `datasets` library: columns `task` and `logits`.

routes_to_dataset(model).to_parquet("routes.parquet")
routes_from_dataset(model, datasets.Dataset.from_parquet("routes.parquet"))
"""

from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from polyroute.errors import InputError
from polyroute.model import RoutedModel

__all__ = ["routes_from_dataset", "routes_to_dataset"]

COLUMNS = ("task", "logits")
ROWS_AT_ONCE = 1000


def routes_to_dataset(model: RoutedModel) -> datasets.Dataset:
    """The routing table as data.

    Args:
        model: a model whose tasks are routed.

    Returns:
        One row for each task, in order: `task` is its name, and `logits` a list of the N * H * K
        numbers of its row, in fp32. The numbers are copies.

    Raises:
        InputError: the tasks of the model are not routed.
    """
    logits = model.routes.logits
    if logits is None:
        raise InputError("this model has no routing logits to export: its tasks are not routed")
    width = logits.shape[1]
    flat = logits.detach().to("cpu", torch.float32, copy=True).numpy().reshape(-1)
    rows = pa.FixedSizeListArray.from_arrays(pa.array(flat), width)
    table = pa.table({"task": pa.array(model.tasks, pa.string()), "logits": rows})
    features = datasets.Features(
        {
            "task": datasets.Value("string"),
            "logits": datasets.List(datasets.Value("float32"), length=width),
        }
    )
    return datasets.Dataset(datasets.table.InMemoryTable(table.cast(features.arrow_schema)))


def routes_from_dataset(model: RoutedModel, dataset: datasets.Dataset) -> None:
    """Write the rows of a table into a model: its own tasks are overwritten, others are added.

    If tasks were added, make the optimizer afterwards, as after `RoutedModel.add_task`.

    Args:
        model: a model whose tasks are routed.
        dataset: has the columns `task` and `logits`, as `routes_to_dataset` makes them; rows may be
            in any order, and other columns are ignored.

    Raises:
        InputError: a column is missing, a task is named twice or not at all, or a row has another
            width or numbers that are not finite. Nothing was changed.
    """
    if not isinstance(dataset, datasets.Dataset):
        raise InputError(
            f"routing rows are imported from a datasets.Dataset, not a {type(dataset).__name__}"
        )
    dataset = dataset.with_format(None)
    if not _is_table(dataset.features):
        found = ", ".join(f"{name}: {feature}" for name, feature in dataset.features.items())
        raise InputError(
            "a table of routing rows has the columns 'task', of strings, and 'logits', of lists of "
            f"numbers, and this one has {found}"
        )
    if model.routes.logits is None:
        raise InputError("this model has no routing logits to import: its tasks are not routed")
    width = model.routes.logits.shape[1]
    tasks = dataset["task"][:]
    if len(set(tasks)) < len(tasks):
        seen: set[Any] = set()
        twice = next(t for t in tasks if t in seen or seen.add(t))  # type: ignore[func-returns-value]
        raise InputError(f"task {twice!r} has several rows in the table; keep one")
    chunks = range(0, len(dataset), ROWS_AT_ONCE)
    for start in chunks:
        _rows(dataset, start, width)
    new = [task for task in tasks if task not in model.routes]
    model.add_tasks(new)
    for start in chunks:
        values = torch.from_numpy(_rows(dataset, start, width))
        for task, row in zip(tasks[start : start + ROWS_AT_ONCE], values, strict=True):
            model.routes[task] = row


def _is_table(features: datasets.Features) -> bool:
    task, logits = (features.get(name) for name in COLUMNS)
    item = getattr(logits, "feature", None)
    return (
        getattr(task, "dtype", None) in ("string", "large_string")
        and isinstance(logits, datasets.List | datasets.LargeList)
        and str(getattr(item, "dtype", None)).startswith(("float", "int"))
    )


def _rows(dataset: datasets.Dataset, start: int, width: int) -> npt.NDArray[np.float32]:
    """Some rows of the table, `[n, N * H * K]`."""
    rows = dataset.select_columns(list(COLUMNS)).with_format("arrow")
    part = rows[start : start + ROWS_AT_ONCE]
    values = part["logits"].combine_chunks()
    lengths = set(values.value_lengths().to_pylist()) if len(values) else {width}
    if lengths != {width}:
        wrong = next(i for i, row in enumerate(values) if row.as_py() is None or len(row) != width)
        raise InputError(
            f"the row of task {part['task'][wrong].as_py()!r} does not hold {width} numbers, as "
            "the rows of this model do"
        )
    flat = np.asarray(values.flatten().to_numpy(zero_copy_only=False), dtype=np.float32)
    numbers: npt.NDArray[np.float32] = flat.reshape(-1, width).copy()
    finite = np.isfinite(numbers).all(1)
    if not finite.all():
        wrong = int(finite.argmin())
        raise InputError(
            f"the row of task {part['task'][wrong].as_py()!r} holds numbers that are not finite"
        )
    return numbers
