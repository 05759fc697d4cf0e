"""The tasks of a server: those of its run, and those that clients add, each a row on the disk."""

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from polyroute.config import MHRConfig
from polyroute.errors import InputError
from polyroute.routes.nearest import nearest_rows
from polyroute.routes.table import MU
from polyroute.saved.rows import SavedRoutes, begin_routes, read_description
from polyroute.serving.requests import BASE
from polyroute.task_names import check_name

__all__ = ["SavedTasks", "row_of"]


ENDINGS = ("/row", "/nearest", "/export")
"""What follows the name of a task in addresses."""


class SavedTasks:
    """The rows of all tasks, on the disk.

    Tasks of the run stay as they are. Others lie in a folder of their own, an inventory with the
    same skills, which other commands read too.

    Args:
        run: the folder of the run.
        folder: where clients' tasks are kept, made if missing; None if clients can add none.

    Raises:
        InputError: the run's tasks have no rows, one of them is named as the base model is, or the
            folder holds tasks of another inventory.
    """

    def __init__(self, run: Path, folder: str | os.PathLike[str] | None) -> None:
        self.run = SavedRoutes(run)
        self.added: SavedRoutes | None = None
        self._lock = threading.Lock()
        if BASE in self.run:
            raise InputError(
                f"the run has a task named {BASE!r}, which a server calls the base model alone: "
                "rename the task"
            )
        if folder is not None:
            place = Path(folder)
            if not (place / "polyroute.json").exists():
                begin_routes(place, run)
            own, other = (read_description(each).get("id") for each in (run, place))
            if own != other:
                raise InputError(
                    f"{place} holds tasks of another inventory than {run}: choose another folder"
                )
            self.added = SavedRoutes(place)

    def names(self, prefix: str = "") -> list[str]:
        """The names of all tasks that begin so, sorted."""
        tables = [self.run, *([] if self.added is None else [self.added])]
        return sorted(n for table in tables for n in table.names() if n.startswith(prefix))

    def __contains__(self, name: str) -> bool:
        return name in self.run or (self.added is not None and name in self.added)

    def read(self, name: str) -> Tensor:
        """The logits of a task, `[N, H, K]`.

        Raises:
            InputError: there is no such task.
        """
        if self.added is not None and name in self.added:
            return self.added.read(name)
        if name in self.run:
            return self.run.read(name)
        raise InputError(f"there is no task {name!r}")  # other names may be of other users

    def check_new(self, name: str) -> None:
        """Make sure that clients may give a task this name.

        Raises:
            InputError: the run has such a task, the name is reserved, or clients can add none.
        """
        self._writable()
        check_name(name)
        if name.endswith(ENDINGS) or {".", ".."} & set(name.split("/")):
            raise InputError(
                f"the name {name!r} means something else in an address: choose another one"
            )
        if name in (BASE, MU) or name in self.run:
            raise InputError(f"the name {name!r} is taken: choose another one")

    def put(self, name: str, row: Tensor) -> bool:
        """Write the row of a client's task, `[N, H, K]` or flat; returns whether it is new.

        Raises:
            InputError: as `check_new`; or it is no row.
        """
        self.check_new(name)
        table = self._writable()
        with self._lock:
            is_new = name not in table
            (table.add if is_new else table.write)(name, row)
        return is_new

    def delete(self, name: str) -> None:
        """Remove a client's task.

        Raises:
            InputError: there is no such task, or the run has it.
        """
        table = self._writable()
        with self._lock:
            if name not in table:
                raise InputError(
                    f"task {name!r} belongs to the run and stays"
                    if name in self.run
                    else f"there is no task {name!r}"
                )
            table.delete(name)

    def nearest(
        self, name: str, k: int, config: MHRConfig, prefix: str = ""
    ) -> list[tuple[str, float]]:
        """The tasks that mix skills most like one, best first, without itself.

        Rows are read part by part.

        Args:
            name: the task.
            k: the most that are returned.
            config: decides which weights logits give.
            prefix: of the names that are looked at.

        Raises:
            InputError: there is no such task.
        """
        row = self.read(name)
        tables = [self.run, *([] if self.added is None else [self.added])]
        best: list[tuple[str, float, Tensor]] = []
        for table in tables:
            for names, rows in table.parts():
                kept = [i for i, n in enumerate(names) if n.startswith(prefix) and n != name]
                found = nearest_rows(rows[kept], row, -1, config, k) if kept else []
                best += [(names[kept[i]], cosine, rows[kept[i]]) for i, cosine in found]
        if not best:
            return []
        # Each part has a mean of its own, so its best are compared once more with one another.
        final = nearest_rows(torch.stack([own for *_, own in best]), row, -1, config, k)
        return [(best[i][0], cosine) for i, cosine in final]

    def _writable(self) -> SavedRoutes:
        if self.added is None:
            raise InputError(
                "this server keeps no tasks of clients: start it with --tasks-dir FOLDER"
            )
        return self.added


def row_of(values: Sequence[object], shape: tuple[int, int, int]) -> Tensor:
    """Nested lists of numbers as logits.

    Raises:
        InputError: they are not.
    """
    try:
        return torch.tensor(values, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"a row is a list of {list(shape)} numbers") from error
