"""The tasks of a server: those of its run, and those that clients add, each a row on the disk."""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from polyroute.config import MHRConfig
from polyroute.errors import InputError
from polyroute.host.files import make_folder
from polyroute.host.locks import locked
from polyroute.host.output import say
from polyroute.routes.given_rows import flat_rows
from polyroute.routes.nearest import nearest_rows
from polyroute.saved.hub import DESCRIPTION
from polyroute.saved.rows import SavedRoutes, begin_routes, read_description
from polyroute.serving.requests import BASE, SHARED, ServingError
from polyroute.task_names import check_name, composed

__all__ = ["SavedTasks", "row_of"]

ENDINGS = ("/row", "/nearest", "/export", *(f"/{name}" for name in SHARED))
"""What follows the name of a task in addresses, or would look like a name that all share."""
LONGEST_NAME = 256
IN_USE = ".served"
"""The file that a server locks in the folder of clients' tasks."""

Part = tuple[list[str], Tensor]


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
        self._held = ExitStack()
        if BASE in self.run:
            raise InputError(
                f"the run has a task named {BASE!r}, which a server calls the base model alone: "
                "rename the task"
            )
        if folder is not None:
            place = make_folder(folder)
            self._keep_others_out(place)
            if not (place / DESCRIPTION).exists():
                begin_routes(place, run)
            own, other = (read_description(each).get("id") for each in (run, place))
            if own != other:
                raise InputError(
                    f"{place} holds tasks of another inventory than {run}: choose another folder"
                )
            self.added = SavedRoutes(place)

    def _keep_others_out(self, folder: Path) -> None:
        """Lock the folder for as long as this process lives: rows in memory must be those there.

        Raises:
            InputError: another server has it.
        """
        (folder / IN_USE).touch()
        try:
            self._held.enter_context(locked(folder / IN_USE, wait=False))
        except BlockingIOError as error:
            raise InputError(
                f"another server keeps its tasks in {folder}: stop it, or choose another folder"
            ) from error

    def close(self) -> None:
        """Let other servers have the folder of clients' tasks."""
        self._held.close()

    def names(self, prefix: str = "") -> list[str]:
        """The names of all tasks that begin so, sorted.

        Raises:
            ServingError: the disk cannot be read.
        """
        tables = [self.run, *([] if self.added is None else [self.added])]
        with _on_disk():
            return sorted(n for table in tables for n in table.names() if n.startswith(prefix))

    def __contains__(self, name: str) -> bool:
        with _on_disk():
            return name in self.run or (self.added is not None and name in self.added)

    def read(self, name: str) -> Tensor:
        """The logits of a task, `[N, H, K]`.

        Raises:
            InputError: there is no such task.
            ServingError: the disk cannot be read.
        """
        with _on_disk():
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
        if len(name) > LONGEST_NAME:
            raise InputError(
                f"the name has {len(name)} characters, and {LONGEST_NAME} are the most: shorten it"
            )
        if name != composed(name):  # another spelling of the same name would hide it
            raise InputError(f"the name {name!r} is not composed: send it in Unicode's form NFC")
        if name.endswith(ENDINGS) or {".", ".."} & set(name.split("/")):
            raise InputError(
                f"the name {name!r} means something else in an address: choose another one"
            )
        if name in SHARED or name in self.run:
            raise InputError(f"the name {name!r} is taken: choose another one")

    def put(self, name: str, row: Tensor) -> bool:
        """Write the row of a client's task, `[N, H, K]` or flat; returns whether it is new.

        Raises:
            InputError: as `check_new`; or it is no row.
            ServingError: the disk cannot be written.
        """
        self.check_new(name)
        table = self._writable()
        flat = flat_rows(row, table.shape, torch.float32)
        with self._lock, _on_disk():
            is_new = name not in table
            (table.add if is_new else table.write)(name, flat)
        return is_new

    def delete(self, name: str) -> None:
        """Remove a client's task.

        Raises:
            InputError: there is no such task, or the run has it.
            ServingError: the disk cannot be written.
        """
        table = self._writable()
        if name in self.run:
            raise InputError(f"task {name!r} belongs to the run and stays")
        with self._lock:
            if name not in self:
                raise InputError(f"there is no task {name!r}")
            with _on_disk():
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
            for names, rows in _read(table.parts()):
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


@contextmanager
def _on_disk() -> Iterator[None]:
    """What goes wrong inside is the server's fault, and tells clients nothing of its files."""
    try:
        yield
    except (InputError, OSError) as error:
        say(f"serve: {error}")
        raise ServingError("the server cannot read or write its tasks; its log says why") from error


def _read(parts: Iterator[Part]) -> Iterator[Part]:
    with _on_disk():
        yield from parts


def row_of(values: Sequence[object], shape: tuple[int, int, int]) -> Tensor:
    """Nested lists of numbers as logits.

    Raises:
        InputError: they are not.
    """
    try:
        return torch.tensor(values, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"a row is a list of {list(shape)} numbers") from error
