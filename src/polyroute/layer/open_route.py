"""The open route: the tasks of the current forward, and the mixture that was made for them."""

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from polyroute.layer.factors import Factors

__all__ = ["BASE_ALONE", "Mixture", "RouteScope", "Routing"]


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
        self.route: Any = None
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
        route: Any,
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
