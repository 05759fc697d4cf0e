"""The tasks of a batch: how a caller names them, and the rows of the table that they have."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from polyroute.errors import InputError
from polyroute.layer.segments import Segments
from polyroute.routes.table import MU_ROW, RoutingTable

if TYPE_CHECKING:
    from polyroute.routes.rule import RouteRule

__all__ = [
    "BASE",
    "BASE_ROW",
    "Route",
    "Tasks",
    "check_batch",
    "check_list",
    "find_route",
    "keeping_apart",
    "named_inputs",
    "route_of_call",
    "with_rows",
]

Tasks: TypeAlias = "str | int | Sequence[str | int | RouteRule | None] | Tensor | RouteRule | None"
BASE_ROW = -2
"""Stands for the row of the base model alone, where others of a batch have tasks."""
TEXT = ("input_ids", "inputs_embeds", "inputs", "encoder_outputs")
MEDIA = ("input_features", "input_values", "pixel_values")
TARGETS = ("decoder_input_ids", "decoder_inputs_embeds", "labels")
"""Arguments of base models that have the examples on their first axis, in order of importance."""


@dataclass(frozen=True)
class Route:
    """What a block routes: the tasks of a batch, checked and on the host."""

    rows: tuple[int, ...] | None
    """The numbers of the tasks' rows, one per example or one for the whole batch. `MU_ROW` stands
    for the average of the inventory, `BASE_ROW` for the base model. None is the base model alone,
    for the whole batch."""
    per_example: bool
    """Whether `rows` holds one number per example, not one for a batch of any size."""
    condition: Any = field(default=None, compare=False)
    """What the caller gave for the rule to look at."""
    lengths: Sequence[Sequence[int]] | None = field(default=None, compare=False)
    """For each packed row of a batch the lengths of its examples, as the caller gave them."""
    rule: "RouteRule | None" = None
    """Chooses skills in place of the model's rule; the rows then say nothing."""
    segments: Segments | None = None
    """Where the examples of packed rows begin and end in the batch of one call."""


BASE = Route(None, per_example=False)
"""The route of the base model alone."""


def find_route(tasks: Tasks, table: RoutingTable) -> Route:
    """The route to the rows that tasks have in a table.

    Args:
        tasks: one name or row number for a batch of any size; or one per example, as a list or an
            integer tensor; a rule that stands alone, or a list of it; None for the base model
            alone, also in a list.
        table: the routing table.

    Raises:
        InputError: a task is unknown, a number is negative, the list is empty, or a rule cannot
            stand alone or stands among tasks.
    """
    if tasks is None:
        return BASE
    if isinstance(tasks, nn.Module):
        return _rule_alone([tasks], per_example=False)
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
    tasks = list(tasks)
    if any(isinstance(task, nn.Module) for task in tasks):
        return _rule_alone(tasks, per_example=True)
    rows = tuple(BASE_ROW if task is None else table.row(task) for task in tasks)  # type: ignore[arg-type]
    if not rows:
        raise InputError("no tasks given: name one task per example")
    return Route(rows, per_example=True)


def with_rows(rows: Sequence[int]) -> list[int]:
    """Rows in which those of the base model are replaced by others, for a rule to choose for."""
    other = next((row for row in rows if row != BASE_ROW), MU_ROW)
    return [other if row == BASE_ROW else row for row in rows]


def _rule_alone(rules: Sequence[Any], *, per_example: bool) -> Route:
    rule = rules[0]
    if not getattr(rule, "stands_alone", False):
        raise InputError(
            f"{type(rule).__name__} cannot route a model that it does not belong to: give it to "
            "attach, or name a task"
        )
    if any(other is not rule for other in rules):
        raise InputError("a batch has one rule, or tasks: route them in batches of their own")
    return Route((MU_ROW,) * len(rules), per_example=per_example, rule=rule)


def check_list(tasks: object, wanted: str = "tasks must be a list of names") -> None:
    """Make sure that a list of names was given, since a single name is a sequence of letters.

    Args:
        tasks: what was given.
        wanted: how the message begins, with the caller's name for it.

    Raises:
        InputError: it is a single name, or no list; None, for all tasks, is left to the caller.
    """
    if isinstance(tasks, str):
        raise InputError(f"{wanted}, not the single string {tasks!r}")
    if tasks is not None and not isinstance(tasks, Iterable):
        raise InputError(f"{wanted}, not {tasks!r}")


def named_inputs(call: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, in the order of its signature."""
    function = getattr(call, "__func__", call)
    names = list(_names(function))[call is not function :]
    names += [f"argument {i}" for i in range(len(names), len(args))]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return {**{name: given[name] for name in names if name in given}, **given}


def keeping_apart(route: Route, inputs: Mapping[str, Any], forward: Any) -> dict[str, Any]:
    """What a base model's forward needs besides its inputs to keep packed examples apart.

    transformers lets each example attend to itself alone if there is neither a mask nor a cache.
    """
    given = ("attention_mask", "use_cache", "past_key_values")
    if route.segments is None or any(inputs.get(name) is not None for name in given):
        return {}
    has_cache = "use_cache" in _names(getattr(forward, "__func__", forward))
    return {"use_cache": False} if has_cache else {}


@lru_cache(maxsize=256)
def _names(function: Any) -> tuple[str, ...]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a function without a signature
        return ()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(parameter.name for parameter in parameters if parameter.kind in kinds)


def check_batch(
    num_tasks: int, inputs: Mapping[str, Any], *, main: str = "", has_media: bool = False
) -> None:
    """Make sure that a batch has as many examples as tasks.

    Args:
        num_tasks: the number of tasks, one per example.
        inputs: the arguments by name; see `named_inputs`.
        main: the base model's name for its main input.
        has_media: whether the model also sees images or sounds, whose number is not that of the
            examples.

    Raises:
        InputError: the batch has another number of examples.
    """
    media = () if has_media else MEDIA
    counts: list[int] = []
    for names in ((*TEXT, *(() if has_media else (main,)), *media), TARGETS):
        counts = counts or [n for name in names if (n := _examples(inputs.get(name))) is not None]
    if not counts:  # the model has names of its own for its arguments: the first one counts
        counts = [n for value in inputs.values() if (n := _examples(value)) is not None][:1]
    for count in counts:
        if count != num_tasks:
            raise InputError(
                f"{num_tasks} tasks were given for a batch of {count} examples; "
                "give one per example, or a single name for all"
            )


def _examples(value: Any) -> int | None:
    """The length of the first axis of a tensor, or of the first one in a dictionary or tuple."""
    if isinstance(value, Tensor):
        return len(value) if value.dim() else None
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple | list) and value:
        return next((n for one in value if (n := _examples(one)) is not None), None)
    return None


def route_of_call(route: Route, inputs: Mapping[str, Any]) -> Route:
    """The route of one call: an open route, with segments if the rows of the batch are packed.

    Args:
        route: the open route.
        inputs: the arguments of the base model by name.

    Raises:
        InputError: the lengths of the route do not fit the rows or the number of tasks.
    """
    is_plain = route.lengths is None and inputs.get("position_ids") is None
    if is_plain or (not route.per_example and route.lengths is None):
        return route
    count = len(route.rows or ())
    if not route.per_example:  # one task for all examples, which are still kept apart
        count = sum(len(row) for row in route.lengths or () if isinstance(row, list | tuple))
    return replace(route, segments=_find_segments(route.lengths, count, inputs))


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
    batch = next((inputs[n] for n in (*TEXT, *TARGETS) if isinstance(inputs.get(n), Tensor)), None)
    if batch is None or batch.dim() < 2:
        if given is not None:
            raise InputError("segments need a batch of tokens: give input_ids or inputs_embeds")
        return None
    rows, tokens = batch.shape[:2]
    if given is None:
        lengths = _lengths(inputs, rows, tokens, num_tasks)
        if lengths is None:
            return None
    elif _are_lengths(given, rows):
        lengths = [list(row) for row in given]
    else:
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


def _are_lengths(given: Any, rows: int) -> bool:
    return (
        isinstance(given, list | tuple)
        and len(given) == rows
        and all(isinstance(row, list | tuple) and row for row in given)
        and all(type(length) is int and length > 0 for row in given for length in row)
    )


def _lengths(
    inputs: Mapping[str, Any], rows: int, tokens: int, num_tasks: int
) -> list[list[int]] | None:
    """The lengths of the examples of each row, which begin where the position is 0.

    None if every row is one example. Rows with padding, which an attention mask shows, are taken
    for packed ones only if there are more tasks than rows.
    """
    positions = inputs.get("position_ids")
    is_sure = num_tasks > rows
    if not isinstance(positions, Tensor) or positions.dim() != 2:
        return None
    if not is_sure and isinstance(inputs.get("attention_mask"), Tensor):
        return None
    found = []
    for row in (positions.expand(rows, tokens) == 0).tolist():
        starts = [place for place, is_start in enumerate(row) if is_start]
        if starts[:1] != [0]:
            if not is_sure:
                return None
            raise InputError("position_ids of a packed row must begin at 0 in each of its examples")
        ends = [*starts[1:], len(row)]
        found.append([end - start for start, end in zip(starts, ends, strict=True)])
    return None if not is_sure and all(len(row) == 1 for row in found) else found
