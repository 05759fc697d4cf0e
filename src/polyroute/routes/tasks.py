"""The tasks of a batch: how a caller names them, and the rows of the table that they have."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from polyroute.errors import InputError
from polyroute.layer.kernels import Segments
from polyroute.layer.media import media_modules
from polyroute.routes.table import RoutingTable

__all__ = [
    "BASE",
    "Route",
    "Tasks",
    "check_batch",
    "find_route",
    "named_inputs",
    "route_of_call",
]

Tasks = str | int | Sequence[str | int] | Tensor | None
FIRST_AXIS = (
    "input_ids", "inputs_embeds", "inputs", "input_features", "input_values", "decoder_input_ids",
    "decoder_inputs_embeds", "labels",
)  # fmt: skip
"""Arguments of base models whose first axis counts examples."""


@dataclass(frozen=True)
class Route:
    """What a block routes: the tasks of a batch, checked and on the host."""

    rows: tuple[int, ...] | None
    """The numbers of the tasks' rows, one per example or one for the whole batch. `MU_ROW` stands
    for the average of the inventory. None is the base model alone."""
    per_example: bool
    """Whether `rows` holds one number per example, not one for a batch of any size."""
    condition: Any = field(default=None, compare=False)
    """What the caller gave for the rule to look at."""
    lengths: Sequence[Sequence[int]] | None = field(default=None, compare=False)
    """For each packed row of a batch the lengths of its examples, as the caller gave them."""
    segments: Segments | None = None
    """Where the examples of packed rows begin and end in the batch of one call."""


BASE = Route(None, per_example=False)
"""The route of the base model alone."""


def find_route(tasks: Tasks, table: RoutingTable) -> Route:
    """The route to the rows that tasks have in a table.

    Args:
        tasks: one name or row number for a batch of any size; or one per example, as a list or an
            integer tensor; None for the base model alone.
        table: the routing table.

    Raises:
        InputError: a task is unknown, a number is negative, or the list is empty.
    """
    if tasks is None:
        return BASE
    if isinstance(tasks, str | int):
        return Route((table.row(tasks),), per_example=False)
    if isinstance(tasks, Tensor):
        if tasks.is_floating_point() or tasks.dtype == torch.bool or tasks.dim() > 1:
            raise InputError(
                "task ids must be one whole number per example, "
                f"not a {tasks.dtype} tensor of shape {list(tasks.shape)}"
            )
        return find_route(tasks.tolist(), table)
    if hasattr(tasks, "__array__"):
        array: Any = tasks.__array__()  # of numpy, or a column of a pandas table
        is_number = array.dtype.kind in "iub"
        return find_route(torch.as_tensor(array) if is_number else array.tolist(), table)
    if isinstance(tasks, bytes | set | frozenset | Mapping) or not isinstance(tasks, Iterable):
        raise InputError(
            "tasks must be a name, a row number, or a list of one per example, "
            f"not a {type(tasks).__name__}"
        )
    rows = tuple(table.row(task) for task in tasks)
    if not rows:
        raise InputError("no tasks given: name one task per example")
    return Route(rows, per_example=True)


def named_inputs(forward: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, including positional ones."""
    try:
        names = [
            name
            for name, parameter in inspect.signature(forward).parameters.items()
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]
    except (TypeError, ValueError):  # a function without a signature
        names = []
    names += [f"argument {i}" for i in range(len(names), len(args))]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def check_batch(num_tasks: int, base_model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Make sure that a batch has as many examples as tasks.

    Args:
        num_tasks: the number of tasks, one per example.
        base_model: decides which arguments count the examples on their first axis.
        inputs: the arguments by name; see `named_inputs`.

    Raises:
        InputError: the batch has another number of examples.
    """
    tensors = {n: v for n, v in inputs.items() if isinstance(v, Tensor) and v.dim()}
    known = {*FIRST_AXIS, getattr(base_model, "main_input_name", "")}
    if "pixel_values" in tensors and not media_modules(base_model):
        known.add("pixel_values")
    counts = [len(value) for name, value in tensors.items() if name in known]
    if not counts:  # the model has names of its own for its arguments
        counts = [len(value) for value in tensors.values()]
        if num_tasks in counts[:1]:
            return
    for count in counts:
        if count != num_tasks:
            raise InputError(
                f"{num_tasks} tasks were given for a batch of {count} examples; "
                "give one per example, or a single name for all"
            )


def route_of_call(route: Route, inputs: Mapping[str, Any]) -> Route:
    """The route of one call: an open route, with segments if the rows of the batch are packed.

    Args:
        route: the open route.
        inputs: the arguments of the base model by name.

    Raises:
        InputError: the lengths of the route do not fit the rows or the number of tasks.
    """
    if not route.per_example:
        return route
    return replace(route, segments=_find_segments(route.lengths, len(route.rows or ()), inputs))


def _find_segments(
    given: Sequence[Sequence[int]] | None, num_tasks: int, inputs: Mapping[str, Any]
) -> Segments | None:
    """Where the examples of packed rows begin and end; None if each row is one example.

    Args:
        given: for each row the lengths of its examples, in tokens; padding may follow. If it is
            None, an example begins wherever `position_ids` are 0.
        num_tasks: the number of examples.
        inputs: the arguments of the base model by name.

    Raises:
        InputError: the lengths do not fit the rows or the number of tasks.
    """
    batch = next((inputs[n] for n in FIRST_AXIS if isinstance(inputs.get(n), Tensor)), None)
    if batch is None or batch.dim() < 2:
        if given is not None:
            raise InputError("segments need a batch of tokens: give input_ids or inputs_embeds")
        return None
    rows, tokens = batch.shape[:2]
    if given is None:
        positions = inputs.get("position_ids")
        if num_tasks <= rows or not isinstance(positions, Tensor) or positions.dim() != 2:
            return None
        given = _lengths(positions.expand(rows, tokens))
    lengths = [list(map(int, row)) for row in given]
    if len(lengths) != rows or any(not row or min(row) < 1 for row in lengths):
        raise InputError(
            f"segments must be a list of lengths for each of the {rows} rows, all positive, "
            f"not {given!r}"
        )
    for row in lengths:
        if sum(row) > tokens:
            raise InputError(f"segments {row} are longer than their row of {tokens} tokens")
        row[-1] += tokens - sum(row)  # padding belongs to the last example
    flat = [length for row in lengths for length in row]
    if len(flat) != num_tasks:
        raise InputError(
            f"{num_tasks} tasks were given for {len(flat)} examples in {rows} packed rows; "
            "give one task per example"
        )
    return Segments(tuple(flat))


def _lengths(positions: Tensor) -> list[list[int]]:
    """The lengths of the examples of each row; an example begins where the position is 0."""
    found = []
    for row in (positions == 0).tolist():
        starts = [place for place, is_start in enumerate(row) if is_start]
        if starts[:1] != [0]:
            raise InputError("position_ids of a packed row must begin at 0 in each of its examples")
        ends = [*starts[1:], len(row)]
        found.append([end - start for start, end in zip(starts, ends, strict=True)])
    return found
