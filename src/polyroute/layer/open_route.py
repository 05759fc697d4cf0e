"""The open route: the tasks of the current forward, and the mixture that was made for them."""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyroute.errors import InputError
from polyroute.layer.factors import Factors
from polyroute.routes.table import Routes

__all__ = [
    "BASE_ALONE",
    "Mixture",
    "Route",
    "RouteScope",
    "Routing",
    "Tasks",
    "check_batch",
    "find_route",
]

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


@dataclass(frozen=True)
class Mixture:
    """What the layers of one forward apply; never changed once made."""

    factors: Sequence[Factors]
    """By site; empty where the base model runs alone."""
    num_examples: int | None
    """B where examples differ, None where one task holds for all."""


BASE_ALONE = Mixture((), None)


class Routing(threading.local):
    """Which route is open, in this thread; one object shared by all routed layers of a model.

    Every thread has its own values, so threads that share a model do not see each other's tasks.
    """

    def __init__(self, prepare: Callable[[], Mixture] | None = None) -> None:
        self.prepare = prepare
        self.is_open = False
        self.route: Route | None = None
        self.mixture: Mixture | None = None
        # The layer that prepared the mixture because a part of the model was called on its own:
        # when it is reached again, that is another forward.
        self.prepared_by: int | None = None
        self.is_recomputing = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "Routing":
        return Routing()

    def __reduce__(self) -> tuple[type["Routing"], tuple[()]]:
        return Routing, ()


class RouteScope(AbstractContextManager[None]):
    """Opens a route, and closes it again also after an error; scopes nest."""

    def __init__(
        self,
        routing: Routing,
        route: Route | None,
        mixture: Mixture | None = None,
        *,
        is_recomputing: bool = False,
    ) -> None:
        self.routing = routing
        self.inner: dict[str, Any] = {
            "is_open": True,
            "route": route,
            "mixture": mixture,
            "prepared_by": None,
            "is_recomputing": is_recomputing,
        }
        self.outer: list[dict[str, Any]] = []

    def __enter__(self) -> None:
        state = self.routing
        self.outer.append({name: getattr(state, name) for name in self.inner})
        state.__dict__.update(self.inner)

    def __exit__(self, *_: object) -> None:
        self.routing.__dict__.update(self.outer.pop())
