"""The routing table of a saved inventory, row by row and without its base model."""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyroute.errors import InputError, did_you_mean
from polyroute.host.files import make_folder, read_json, whole_file, write_json
from polyroute.host.locks import is_still_there, locked
from polyroute.host.paths import path_of
from polyroute.routes.given_rows import flat_rows
from polyroute.routes.table import MU
from polyroute.saved.digests import SHA256, described_digest
from polyroute.saved.hub import DESCRIPTION, MODULES, SHARDS, SKILLS, Snapshot, locate
from polyroute.saved.shards import OpenShard, Shard, shard_of, shard_paths
from polyroute.task_names import check_name

__all__ = ["FORMAT", "SavedRoutes", "begin_routes", "lock_inventory", "read_description"]

FORMAT = 2
"""The version of the format of an inventory's folder."""
MOST_SHARDS = 2**16
"""Of a table; they hold two terabytes, or half a billion tasks."""


def read_description(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the description of the inventory in a folder; its entries are not checked.

    Raises:
        InputError: there is no description, or it is damaged or in another format.
    """
    path = path_of(folder)
    if not (path / DESCRIPTION).is_file():
        hint = "" if path.exists() else ", and it is no hub id such as user/inventory"
        raise InputError(f"{path} holds no inventory: there is no {DESCRIPTION} in it{hint}")
    description = read_json(path / DESCRIPTION)
    given: Any = description.get("format") if isinstance(description, dict) else None
    is_number = isinstance(given, int) and not isinstance(given, bool)
    if is_number and given > FORMAT:
        raise InputError(
            f"{path / DESCRIPTION} is in inventory format {given}, which a newer version of "
            f"polyroute wrote; this one reads format {FORMAT}: upgrade polyroute"
        )
    if not is_number or given != FORMAT:
        raise InputError(
            f"{path / DESCRIPTION} is not in inventory format {FORMAT}; "
            "it may come from another version of polyroute"
        )
    if SHA256 in description and description[SHA256] != described_digest(description):
        raise InputError(
            f"{path / DESCRIPTION} is damaged: it does not say what was saved; take an earlier "
            "checkpoint"
        )
    return dict(description)


@contextmanager
def lock_inventory(folder: Path) -> Iterator[None]:
    """Wait until nobody else writes the inventory in a folder, and keep others from it.

    The lock is that of the description, which whoever saves a whole inventory replaces.
    """
    path = folder / DESCRIPTION
    while True:
        with locked(path, wait=True) as (file, _):
            if is_still_there(path, file):
                yield
                return


class SavedRoutes:
    """The routing rows of a saved inventory, one at a time and without its base model.

    Reading a row maps it from disk. `write`, `add` and `delete` replace one shard of about 32 MB,
    whole or not at all. Writers wait for each other, threads and processes alike, on file systems
    that have locks. The number of shards is fixed when the inventory is saved: after many
    additions, load the inventory and save it again.

    Args:
        folder: a folder that `RoutedModel.save_pretrained` wrote. If there is no such folder, an id
            on the hub, `user/inventory`: its table is read-only, and a shard is fetched when it is
            needed.
        revision: a branch, a tag or a commit on the hub; by default the main branch.
        token: a token for the hub, instead of the stored one; False for no token.
        cache_dir: the cache of the hub, instead of the usual one.
        local_files_only: use only what is in the hub's cache, without network.

    Attributes:
        shape: `(N, H, K)` of a row: routers, heads, skills.

    Raises:
        InputError: the inventory is missing or cannot be fetched, or its tasks have no routing
            rows.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> None:
        place = locate(
            folder, (DESCRIPTION,), revision=revision, token=token, cache_dir=cache_dir,
            local_files_only=local_files_only,
        )  # fmt: skip
        self._snapshot = place if isinstance(place, Snapshot) else None
        self.folder = Path(place)
        description = read_description(self.folder)
        table, identity = description.get("rows"), description.get("id")
        if table is None:
            raise InputError(f"the tasks of the inventory in {self.folder} have no routing rows")
        if not _is_table(table) or not isinstance(identity, str):
            raise InputError(
                f"{self.folder / DESCRIPTION} is damaged: 'rows' or 'id' is not what is written "
                "there; save the inventory again"
            )
        self.shape: tuple[int, int, int] = tuple(table["shape"])
        self._identity, self._has_digest = identity, SHA256 in description
        self._paths = shard_paths(self.folder, table["shards"])

    @property
    def width(self) -> int:
        """The numbers in a row, N * H * K."""
        return self.shape[0] * self.shape[1] * self.shape[2]

    def names(self) -> list[str]:
        """The names of the tasks, in order; reads the header of every shard.

        Raises:
            InputError: a shard is damaged.
        """
        return [name for _, name in self._sorted()]

    def __len__(self) -> int:
        return sum(len(opened.names) for opened in self._all())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._opened(name).names

    def read(self, name: str) -> Tensor:
        """The logits of a task, `[N, H, K]`.

        Raises:
            InputError: there is no such task, or its shard is damaged.
        """
        opened = self._opened(name)
        return opened.row(self._position(opened, name)).reshape(self.shape)

    def write(self, name: str, values: Tensor) -> None:
        """Overwrite the logits of a task, given as `[N, H, K]` or flat.

        Raises:
            InputError: there is no such task, the shape is wrong, a value is not finite, the shard
                is damaged, or the table is on the hub.
        """
        with self._changing(name) as opened:
            place = self._position(opened, name)
            shard = opened.load()
            shard.rows[place] = self._flat(values, shard.rows.dtype)
            shard.write(opened.path)

    def add(self, name: str, values: Tensor) -> None:
        """Append a task with its logits, given as `[N, H, K]` or flat.

        Raises:
            InputError: the name exists, is reserved or cannot be one, or as in `write`.
        """
        check_name(name)
        if name == MU:
            raise InputError(f"task name {MU!r} is reserved for the average of the inventory")
        with self._changing(name) as opened:
            if name in opened.names:
                raise InputError(
                    f"task {name!r} exists in {self.folder}; overwrite it with write()"
                )
            shard = opened.load()
            row = self._flat(values, shard.rows.dtype)
            shard.names.append(name)
            shard.order = torch.cat([shard.order, torch.tensor([time.time_ns()])])
            shard.rows = torch.cat([shard.rows, row[None]])
            shard.write(opened.path)

    def delete(self, name: str) -> None:
        """Remove a task.

        Raises:
            InputError: there is no such task, its shard is damaged, or the table is on the hub.
        """
        with self._changing(name) as opened:
            place = self._position(opened, name)
            shard = opened.load()
            kept = [i for i in range(len(shard.names)) if i != place]
            shard.names.pop(place)
            shard.order, shard.rows = shard.order[kept], shard.rows[kept]
            shard.write(opened.path)

    def parts(self) -> Iterator[tuple[list[str], Tensor]]:
        """The names and rows `[R, N, H, K]` of every shard in turn, in no order.

        Raises:
            InputError: a shard is damaged.
        """
        for opened in self._all():
            if opened.names:
                rows = opened.some(list(range(len(opened.names))))
                yield list(opened.names), rows.reshape(-1, *self.shape)

    def copy_into(self, table: Tensor, names: Sequence[str]) -> None:
        """Read the rows of some tasks, from the shards that hold them.

        Args:
            table: `[len(names), N * H * K]`; filled in the order of `names`.
            names: the tasks.

        Raises:
            InputError: there is no such task, or a shard is damaged; some rows of `table` may be
                filled already.
        """
        for rows, places in self.read_by_shard(names):
            table[places] = rows.to(table)

    def check(self, names: Sequence[str]) -> None:
        """Make sure that the rows of some tasks can be read, before anything is changed.

        Raises:
            InputError: there is no such task, or a shard is damaged.
        """
        for _ in self.read_by_shard(names):
            pass

    def read_by_shard(self, names: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield, shard by shard, rows `[P, N * H * K]` and their places in `names`, `[P]`.

        Raises:
            InputError: as `copy_into`.
        """
        places: list[list[int]] = [[] for _ in self._paths]
        for place, name in enumerate(names):
            places[shard_of(name, len(self._paths))].append(place)
        for path, chosen in zip(self._paths, places, strict=True):
            if not chosen:
                continue
            opened = self._open(path)
            position = {name: i for i, name in enumerate(opened.names)}
            for place in chosen:
                if names[place] not in position:
                    raise self._unknown(names[place])
            yield opened.some([position[names[place]] for place in chosen]), torch.tensor(chosen)

    def _sorted(self) -> list[tuple[int, str]]:
        found: list[tuple[int, str]] = []
        for opened in self._all():
            found += zip(opened.order.tolist(), opened.names, strict=True)
        return sorted(found)

    def _all(self) -> Iterator[OpenShard]:
        if self._snapshot is not None:
            self._snapshot.fetch(SHARDS)  # faster at once than one by one
        return map(self._open, self._paths)

    @contextmanager
    def _changing(self, name: str) -> Iterator[OpenShard]:
        """The shard of a task, which no other writer changes within the block."""
        self._check_writable()
        with lock_inventory(self.folder):
            if read_description(self.folder).get("id") != self._identity:
                raise InputError(
                    f"the inventory in {self.folder} was saved again since this table was opened: "
                    "open it again"
                )
            yield self._opened(name)

    def _check_writable(self) -> None:
        if self._snapshot is not None:
            raise InputError(
                f"{self._snapshot} is on the hub, where rows are read-only: write to a copy, which "
                f"`hf download {self._snapshot} --local-dir FOLDER` makes"
            )

    def _open(self, path: Path) -> OpenShard:
        if self._snapshot is not None and not path.is_file():
            self._snapshot.fetch(path.name)
        return OpenShard(path, self._identity, self.width, has_digest=self._has_digest)

    def _opened(self, name: str) -> OpenShard:
        return self._open(self._paths[shard_of(name, len(self._paths))])

    def _position(self, opened: OpenShard, name: str) -> int:
        if name not in opened.names:
            raise self._unknown(name)
        return opened.names.index(name)

    def _unknown(self, name: str) -> InputError:
        place = self._snapshot or self.folder
        return InputError(f"unknown task {name!r} in {place}: {did_you_mean(name, self.names())}")

    def _flat(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        row = flat_rows(values, self.shape, dtype).cpu()
        if not values.is_floating_point():
            raise InputError("a routing row must hold finite fractional numbers; check the values")
        return row


def begin_routes(
    folder: str | os.PathLike[str], like: str | os.PathLike[str], *, shards: int = 256
) -> None:
    """Make a folder with the skills of a saved inventory and a routing table without tasks.

    It is an inventory like the other, and `SavedRoutes` fills it. Nothing of the other is changed.

    Args:
        folder: the new folder, which holds no inventory yet.
        like: the saved inventory, with its `run.json` if it has one.
        shards: of the table, a power of two; 256 hold two million tasks, or eight gigabytes.

    Raises:
        InputError: there is no inventory in `like`, or its tasks have no rows; or the folder holds
            one already.
    """
    routes = SavedRoutes(like)
    place = make_folder(folder)
    if (place / DESCRIPTION).exists():
        raise InputError(f"{place} holds an inventory already: choose another folder")
    for name in (SKILLS, MODULES, "run.json"):
        if (source := routes.folder / name).is_file():
            with whole_file(place / name) as copy:
                shutil.copyfile(source, copy)
    description = read_description(routes.folder)
    description["rows"] = {"shards": shards, "shape": list(routes.shape)}
    rows = torch.empty(0, routes.width)
    for path in shard_paths(place, shards):
        Shard([], torch.empty(0, dtype=torch.long), rows, description["id"]).write(path)
    description.pop(SHA256, None)
    write_json(place / DESCRIPTION, {**description, SHA256: described_digest(description)})


def _is_table(table: object) -> bool:
    """Whether the description's entry on rows is well formed."""
    if not isinstance(table, dict) or table.keys() != {"shards", "shape"}:
        return False
    shards, shape = table["shards"], table["shape"]
    return (
        isinstance(shape, list)
        and len(shape) == 3
        and all(type(n) is int and n > 0 for n in (*shape, shards))
        and shards & (shards - 1) == 0
        and shards <= MOST_SHARDS
    )
