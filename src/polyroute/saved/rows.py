"""The routing table on disk: one row can be read or changed without the others.

    routes-00000-of-00004.safetensors ...
        rows [R, N * H * K], order [R] int64, and as metadata, in JSON: id, names

A task is in the shard that a hash of its name says, so finding it takes the header of one file, and
reading it maps one row. `order` sorts tasks: the row number when the table was saved, the time in
nanoseconds for those that were added since. `id` is that of the description beside it, so files of
two saves do not pass for one.
"""

import json
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from polyroute.errors import InputError, did_you_mean
from polyroute.host.files import read_json, write_tensors
from polyroute.routes.table import MU
from polyroute.saved.hub import DESCRIPTION, SHARDS, Snapshot, locate

__all__ = [
    "FORMAT",
    "NOTE",
    "SavedRoutes",
    "read_description",
    "write_rows",
]

FORMAT = 2
NOTE = "polyroute"
"""The one entry of the metadata of tensor files."""
BYTES_PER_SHARD = 2**25
ROWS_PER_SHARD = 2**13
"""A header holds the names of its rows, so it is kept short as well."""


def read_description(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The description of the inventory in a folder, of this format; its entries are not checked.

    Raises:
        InputError: there is none, or it is damaged or of another format.
    """
    path = Path(folder)
    if not (path / DESCRIPTION).is_file():
        hint = "" if path.exists() else ", and it is no hub id such as user/inventory"
        raise InputError(f"{path} holds no inventory: there is no {DESCRIPTION} in it{hint}")
    description = read_json(path / DESCRIPTION)
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise InputError(
            f"{path / DESCRIPTION} is not in inventory format {FORMAT}; "
            "it may come from another version of polyroute"
        )
    return description


def _shard_paths(folder: Path, count: int) -> list[Path]:
    return [folder / f"routes-{i:05d}-of-{count:05d}.safetensors" for i in range(count)]


def write_rows(folder: Path, names: Sequence[str], rows: Tensor, identity: str) -> list[Path]:
    """Write a table, a shard at a time; no second copy of it is made.

    Args:
        folder: where.
        names: of the tasks.
        rows: `[T, N * H * K]`.
        identity: of the save.

    Returns:
        The files, a power of two.
    """
    count = 1
    while count * BYTES_PER_SHARD < rows.nbytes or count * ROWS_PER_SHARD < len(rows):
        count *= 2
    members: list[list[int]] = [[] for _ in range(count)]
    for row, name in enumerate(names):
        members[_place(name, count)].append(row)
    paths = _shard_paths(folder, count)
    for path, chosen in zip(paths, members, strict=True):
        order = torch.tensor(chosen, dtype=torch.long)
        part = rows.detach().index_select(0, order.to(rows.device))
        _Shard([names[row] for row in chosen], order, part, identity).write(path)
    return paths


def _place(name: str, count: int) -> int:
    """The shard of a task; the same on every machine, unlike `hash`."""
    return zlib.crc32(name.encode("utf-8", "surrogatepass")) % count


@dataclass
class _Shard:
    """One file of the table, in memory."""

    names: list[str]
    order: Tensor
    rows: Tensor
    identity: str

    def write(self, path: Path) -> None:
        note = json.dumps({"id": self.identity, "names": self.names})
        write_tensors(path, {"rows": self.rows, "order": self.order}, metadata={NOTE: note})


class SavedRoutes:
    """The routing rows of a saved inventory, one at a time and without its base model.

    Reading maps the row; `write`, `add` and `delete` replace one shard of about 32 MB, whole or not
    at all. One thread of one process may change a table at a time: there is no lock. The number of
    shards stays that of the save: after many additions, load and save the inventory once.

    Args:
        folder: where `RoutedModel.save_pretrained` wrote; or where there is no such folder an id on
            the hub, `user/inventory`, whose table is only read. A shard is fetched when it is
            needed.
        revision: a branch, a tag or a commit of the hub; default its main branch.
        token: for the hub, instead of the one that is logged in; False for none.
        cache_dir: of the hub, instead of its usual one.
        local_files_only: take what is in the hub's cache, without network.

    Attributes:
        shape: `(N, H, K)` of a row: routers, heads, skills.

    Raises:
        InputError: the folder holds no inventory, or one whose tasks have no rows, or cannot be
            had.
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
        self._identity = identity
        self._paths = _shard_paths(self.folder, table["shards"])

    @property
    def width(self) -> int:
        """Numbers in a row, N * H * K."""
        return self.shape[0] * self.shape[1] * self.shape[2]

    def names(self) -> list[str]:
        """The tasks, in order; reads the header of every shard.

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
            InputError: no such task, or its shard is damaged.
        """
        opened = self._opened(name)
        return opened.row(self._position(opened, name)).reshape(self.shape)

    def write(self, name: str, values: Tensor) -> None:
        """Overwrite the logits of a task; `[N, H, K]` or flat.

        Raises:
            InputError: no such task, another shape, values that are not finite, a damaged shard,
                or a table on the hub.
        """
        self._check_writable()
        opened = self._opened(name)
        place = self._position(opened, name)
        shard = opened.load()
        shard.rows[place] = self._flat(values, shard.rows.dtype)
        shard.write(opened.path)

    def add(self, name: str, values: Tensor) -> None:
        """Append a task; `[N, H, K]` or flat.

        Raises:
            InputError: the name exists, is empty or is reserved; otherwise as `write`.
        """
        if not isinstance(name, str) or not name or name == MU:
            raise InputError(f"a task name must be a non-empty string other than {MU!r}: {name!r}")
        self._check_writable()
        opened = self._opened(name)
        if name in opened.names:
            raise InputError(f"task {name!r} exists in {self.folder}; overwrite it with write()")
        shard = opened.load()
        row = self._flat(values, shard.rows.dtype)
        shard.names.append(name)
        shard.order = torch.cat([shard.order, torch.tensor([time.time_ns()])])
        shard.rows = torch.cat([shard.rows, row[None]])
        shard.write(opened.path)

    def delete(self, name: str) -> None:
        """Take a task out.

        Raises:
            InputError: no such task, its shard is damaged, or the table is on the hub.
        """
        self._check_writable()
        opened = self._opened(name)
        place = self._position(opened, name)
        shard = opened.load()
        kept = [i for i in range(len(shard.names)) if i != place]
        shard.names.pop(place)
        shard.order, shard.rows = shard.order[kept], shard.rows[kept]
        shard.write(opened.path)

    def copy_into(self, table: Tensor, names: Sequence[str]) -> None:
        """Read the rows of some tasks, from the shards that hold them.

        Args:
            table: `[len(names), N * H * K]`, is filled in this order.
            names: the tasks.

        Raises:
            InputError: no such task, or a shard is damaged; some rows may have been written.
        """
        for rows, places in self._parts(names):
            table[places] = rows.to(table)

    def check(self, names: Sequence[str]) -> None:
        """Make sure that the rows of some tasks can be read, before anything is changed.

        Raises:
            InputError: no such task, or a shard is damaged.
        """
        for _ in self._parts(names):
            pass

    def _parts(self, names: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Shard by shard the rows of some tasks, `[P, N * H * K]`, and their places in `names`."""
        places: list[list[int]] = [[] for _ in self._paths]
        for place, name in enumerate(names):
            places[_place(name, len(self._paths))].append(place)
        for path, chosen in zip(self._paths, places, strict=True):
            if not chosen:
                continue
            opened = _Opened(path, self)
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

    def _all(self) -> Iterator["_Opened"]:
        if self._snapshot is not None:
            self._snapshot.fetch(SHARDS)  # all at once is faster than one by one
        return (_Opened(path, self) for path in self._paths)

    def _check_writable(self) -> None:
        if self._snapshot is not None:
            raise InputError(
                f"{self._snapshot} is on the hub, where rows are only read: write to a copy, made "
                f"with `hf download {self._snapshot} --local-dir FOLDER`"
            )

    def _opened(self, name: str) -> "_Opened":
        return _Opened(self._paths[_place(name, len(self._paths))], self)

    def _position(self, opened: "_Opened", name: str) -> int:
        if name not in opened.names:
            raise self._unknown(name)
        return opened.names.index(name)

    def _unknown(self, name: str) -> InputError:
        place = self._snapshot or self.folder
        return InputError(f"unknown task {name!r} in {place}: {did_you_mean(name, self.names())}")

    def _flat(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        if tuple(values.shape) not in (self.shape, (self.width,)):
            raise InputError(
                f"a routing row has shape {list(self.shape)} (routers, heads, skills), "
                f"not {list(values.shape)}"
            )
        # As the table holds them: a double that is finite need not be so in single precision.
        row = values.detach().reshape(-1).cpu().to(dtype)
        if not values.is_floating_point() or not row.isfinite().all():
            raise InputError("a routing row must hold finite fractional numbers; check the values")
        return row


class _Opened:
    """The header of one shard; its rows stay on disk until they are asked for."""

    def __init__(self, path: Path, table: SavedRoutes) -> None:
        self.path = path
        if table._snapshot is not None and not path.is_file():
            table._snapshot.fetch(path.name)
        if not path.is_file():
            raise InputError(
                f"{path} does not exist, so the routing table is not whole; "
                "take an earlier checkpoint"
            )
        try:
            mapped: Any = safe_open(path, "pt")
            note = json.loads((mapped.metadata() or {}).get(NOTE, "{}"))
            keys = set(mapped.keys())
            shape = mapped.get_slice("rows").get_shape() if "rows" in keys else None
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{path} is not a whole safetensors file: {error}") from error
        names: Any = note.get("names") if isinstance(note, dict) else None
        is_list = isinstance(names, list) and all(isinstance(n, str) for n in names)
        if not is_list or keys != {"rows", "order"}:
            raise InputError(
                f"{path} is damaged: it does not hold rows, their order and names; "
                "take an earlier checkpoint"
            )
        self._file = mapped
        self.names: list[str] = names
        self._identity = note.get("id")
        if self._identity != table._identity:
            raise InputError(
                f"{path} and {DESCRIPTION} are of two saves, so one was interrupted; save the "
                "inventory again, or take an earlier checkpoint"
            )
        if shape != [len(self.names), table.width] or self.order.shape != (len(self.names),):
            raise InputError(
                f"{path} is damaged: it does not hold {table.width} numbers for each of its "
                f"{len(self.names)} tasks; take an earlier checkpoint"
            )

    @cached_property
    def order(self) -> Tensor:
        """`[R]`."""
        order: Tensor = self._file.get_tensor("order")
        return order

    def row(self, position: int) -> Tensor:
        """One row, `[N * H * K]`; nothing else is read."""
        return self._whole(self._file.get_slice("rows")[position : position + 1])[0]

    def some(self, positions: list[int]) -> Tensor:
        """Some rows, `[P, N * H * K]`; few are read one by one."""
        if 2 * len(positions) < len(self.names):
            rows = self._file.get_slice("rows")
            return self._whole(torch.cat([rows[i : i + 1] for i in positions]))
        return self._whole(self._file.get_tensor("rows")[positions])

    def load(self) -> _Shard:
        """All of it, to be changed and written back."""
        return _Shard(
            list(self.names), self.order, self._file.get_tensor("rows").clone(), self._identity
        )

    def _whole(self, rows: Tensor) -> Tensor:
        if not rows.is_floating_point() or not rows.isfinite().all():
            raise InputError(
                f"{self.path} is damaged: tensor 'rows' holds values that are not finite "
                "fractional numbers; take an earlier checkpoint"
            )
        return rows


def _is_table(table: object) -> bool:
    """Whether the description's entry on rows is as the library writes it."""
    if not isinstance(table, dict) or table.keys() != {"shards", "shape"}:
        return False
    shards, shape = table["shards"], table["shape"]
    return (
        isinstance(shape, list)
        and len(shape) == 3
        and all(type(n) is int and n > 0 for n in (*shape, shards))
        and shards & (shards - 1) == 0
    )
