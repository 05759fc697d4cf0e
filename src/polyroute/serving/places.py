"""Rows in memory: a bounded number of places in a routing table, filled as tasks are asked for."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from polyroute.model import RoutedModel
from polyroute.routes.table import MU
from polyroute.serving.requests import BASE, BusyError

__all__ = ["Held", "Places", "Rows", "place_names"]


class Rows(Protocol):
    """Where the rows of all tasks are."""

    def read(self, name: str) -> Tensor:
        """The logits of a task, `[N, H, K]`.

        Raises:
            InputError: there is no such task.
        """


@dataclass
class Held:
    """What a request routes as, for as long as it is held."""

    route: str | int | None
    """A task of the model by name or by row, `mu`, or None for the base model alone."""
    release: Callable[[], None] = field(default=lambda: None, repr=False)
    """Must be called once when no forward uses the route any more."""


class Places:
    """Gives tasks places in the table of a model, and keeps the rows of those used last.

    A row is read once, and the model is as large with a million tasks as with `count`. A place that
    a request holds is never given to another task.

    Args:
        model: a routed model whose tasks are the places, `place_names(count)`; or, without rows,
            one whose tasks are those that are served.
        rows: has the rows of all tasks; None if the tasks of the model are all there are.
    """

    def __init__(self, model: RoutedModel, rows: Rows | None) -> None:
        self.model, self.rows = model, rows
        self._lock = threading.Lock()
        self._places: OrderedDict[str, int] = OrderedDict()
        """The place of each task in memory; those used last come last."""
        self._holders = [0] * len(model.tasks)
        self._free = list(range(len(model.tasks))) if rows is not None else []
        self._left: set[int] = set()
        """Places whose row was replaced while a request held them."""

    def __len__(self) -> int:
        """The number of rows in memory."""
        return len(self._places)

    def hold(self, name: str) -> Held:
        """The route of a task, whose row is read if it is not in memory.

        Raises:
            InputError: there is no such task.
            BusyError: requests hold all places.
        """
        if name == BASE:
            return Held(None)
        if name == MU:
            return Held(MU)
        if self.rows is None:
            self.model.routes.row(name)  # refuses a name that no task has
            return Held(name)
        with self._lock:
            place = self._places.get(name)
            if place is None:
                row = self.rows.read(name)
                place = self._vacated()
                self.model.routes[place] = row
                self._places[name] = place
            self._places.move_to_end(name)
            self._holders[place] += 1
        return Held(place, lambda: self._release(place))

    def forget(self, name: str) -> None:
        """Read a task's row again the next time: it was changed or deleted."""
        with self._lock:
            place = self._places.pop(name, None)
            if place is None:
                return
            if self._holders[place]:
                self._left.add(place)
            else:
                self._free.append(place)

    def _vacated(self) -> int:
        if self._free:
            return self._free.pop()
        for name, place in self._places.items():
            if not self._holders[place]:
                del self._places[name]
                return place
        raise BusyError

    def _release(self, place: int) -> None:
        with self._lock:
            self._holders[place] -= 1
            if place in self._left and not self._holders[place]:
                self._left.remove(place)
                self._free.append(place)


def place_names(count: int) -> Sequence[str]:
    """The names of the places, as tasks of the model that has them."""
    return [f"place {number}" for number in range(count)]
