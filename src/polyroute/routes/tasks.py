"""The tasks of a batch: what names them, and the rows of the table that they stand for."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyroute.errors import InputError
from polyroute.routes.table import Routes

__all__ = ["Route", "Tasks", "check_batch", "find_route"]

Tasks = str | int | Sequence[str | int] | Tensor | None
BATCH_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "decoder_input_ids", "labels")
"""Arguments of a base model with one entry per example, which tell how large the batch is."""


@dataclass(frozen=True)
class Route:
    """The tasks of a batch, checked and on the host."""

    rows: tuple[int, ...]
    """One table row per example, or one for the whole batch; `MU_ROW` stands for the average."""
    per_example: bool
    """Whether `rows` are those of the examples, rather than one for a batch of any size."""


def find_route(tasks: Tasks, routes: Routes) -> Route | None:
    """The rows of a table that tasks name; None for the base model alone.

    Args:
        tasks: one name or row number for a batch of any size; or one per example, as a list or an
            integer tensor; None for the base model alone.
        routes: the table.

    Raises:
        InputError: an unknown task, a negative number, or an empty list.
    """
    if tasks is None:
        return None
    if isinstance(tasks, str | int):
        return Route((routes.row(tasks),), per_example=False)
    if isinstance(tasks, Tensor):
        if tasks.is_floating_point() or tasks.dtype == torch.bool or tasks.dim() > 1:
            raise InputError(
                "task ids must be one whole number per example, "
                f"not a {tasks.dtype} tensor of shape {list(tasks.shape)}"
            )
        return find_route(tasks.tolist(), routes)
    if hasattr(tasks, "__array__"):
        array: Any = tasks.__array__()  # numpy's, also of a column of a table
        is_number = array.dtype.kind in "iub"
        return find_route(torch.as_tensor(array) if is_number else array.tolist(), routes)
    if isinstance(tasks, bytes | set | frozenset | Mapping) or not isinstance(tasks, Iterable):
        raise InputError(
            "tasks must be a name, a row number, or a list of one per example, "
            f"not a {type(tasks).__name__}"
        )
    rows = tuple(routes.row(task) for task in tasks)
    if not rows:
        raise InputError("no tasks given: name one task per example")
    return Route(rows, per_example=True)


def check_batch(num_tasks: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Make sure that one task per example fits the arguments of a base model.

    Raises:
        InputError: the batch has another number of examples.
    """
    named = [kwargs[name] for name in BATCH_INPUTS if name in kwargs]
    for value in (*named, *args):
        if isinstance(value, Tensor) and value.dim():
            if len(value) != num_tasks:
                raise InputError(
                    f"{num_tasks} tasks were given for a batch of {len(value)} examples; "
                    "give one per example, or a single name for all"
                )
            return
