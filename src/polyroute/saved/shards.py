"""The files of a routing table: safetensors shards that are read row by row and replaced whole.

    routes-00000-of-00004.safetensors ...
        rows [R, N * H * K], order [R] int64, and as metadata, in JSON: id, names, sha256

A hash of a task's name selects its shard, so finding a task takes the header of one file, and
reading it maps one row. `order` sorts the tasks: it holds the row number for tasks that were there
when the table was saved, and the time in nanoseconds for tasks that were added later. `id` equals
that of the description beside the shards, so files of two saves cannot be mixed unnoticed.
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from polyroute.errors import InputError
from polyroute.host.dtypes import are_finite_fractions
from polyroute.host.files import write_tensors
from polyroute.host.json_text import parse_json
from polyroute.host.paths import check_readable
from polyroute.saved.digests import SHA256, digest_of
from polyroute.saved.hub import DESCRIPTION

__all__ = ["NOTE", "OpenShard", "Shard", "shard_of", "shard_paths", "write_rows"]

NOTE = "polyroute"
"""The one entry of the metadata of tensor files."""
BYTES_PER_SHARD = 2**25
ROWS_PER_SHARD = 2**13
"""A header holds the names of its rows, so this limit keeps headers short."""


def shard_paths(folder: Path, count: int) -> list[Path]:
    """The paths of all shards of a table."""
    return [folder / f"routes-{i:05d}-of-{count:05d}.safetensors" for i in range(count)]


def shard_of(name: str, count: int) -> int:
    """Which of `count` shards holds a task; unlike `hash`, the same on every machine.

    Raises:
        InputError: it is no name.
    """
    if not isinstance(name, str):
        raise InputError(f"a task of a saved table is named by a text, not {name!r}")
    return zlib.crc32(name.encode("utf-8", "surrogatepass")) % count


def write_rows(folder: Path, names: Sequence[str], rows: Tensor, identity: str) -> list[Path]:
    """Write a table shard by shard, without a second copy of the whole table.

    Args:
        folder: the folder to write to.
        names: the names of the tasks.
        rows: the logits, `[T, N * H * K]`.
        identity: the id of the save.

    Returns:
        The paths of the shards; their number is a power of two.
    """
    count = 1
    while count * BYTES_PER_SHARD < rows.nbytes or count * ROWS_PER_SHARD < len(rows):
        count *= 2
    members: list[list[int]] = [[] for _ in range(count)]
    for row, name in enumerate(names):
        members[shard_of(name, count)].append(row)
    paths = shard_paths(folder, count)
    for path, chosen in zip(paths, members, strict=True):
        order = torch.tensor(chosen, dtype=torch.long)
        part = rows.detach().index_select(0, order.to(rows.device))
        Shard([names[row] for row in chosen], order, part, identity).write(path)
    return paths


@dataclass
class Shard:
    """One shard in memory."""

    names: list[str]
    order: Tensor
    """`[R]`."""
    rows: Tensor
    """`[R, N * H * K]`."""
    identity: str

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        tensors = {"rows": self.rows, "order": self.order}
        note = {"id": self.identity, "names": self.names}
        note |= {SHA256: digest_of(tensors, self.identity, self.names)}
        write_tensors(path, tensors, metadata={NOTE: json.dumps(note)})


class OpenShard:
    """The header of one shard; its rows stay on disk until they are read.

    Args:
        path: the file.
        identity: the id of the save that it must belong to.
        width: the numbers in a row, N * H * K.
        has_digest: whether it must have a digest, which older versions did not write.

    Raises:
        InputError: the file is missing or damaged, or belongs to another save.
    """

    def __init__(self, path: Path, identity: str, width: int, *, has_digest: bool) -> None:
        self.path = path
        if not path.is_file():
            raise InputError(
                f"{path} does not exist, so the routing table is not whole; "
                "take an earlier checkpoint"
            )
        check_readable(path)
        try:
            mapped: Any = safe_open(path, "pt")
            text = (mapped.metadata() or {}).get(NOTE, "{}")
            keys = set(mapped.keys())
            shape = mapped.get_slice("rows").get_shape() if "rows" in keys else None
            order_type = mapped.get_slice("order").get_dtype() if "order" in keys else None
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{path} is not a whole safetensors file: {error}") from error
        note = parse_json(text, f"the note in {path}", "take an earlier checkpoint")
        names: Any = note.get("names") if isinstance(note, dict) else None
        is_list = isinstance(names, list) and all(isinstance(n, str) for n in names)
        if not is_list or keys != {"rows", "order"} or order_type != "I64":
            raise InputError(
                f"{path} is damaged: it does not hold rows, their order and names; "
                "take an earlier checkpoint"
            )
        self._file = mapped
        self.names: list[str] = names
        self._identity = identity
        self._digest = note.get(SHA256)
        if has_digest and self._digest is None:
            raise InputError(f"{path} is damaged: it has no digest; take an earlier checkpoint")
        if note.get("id") != identity:
            raise InputError(
                f"{path} and {DESCRIPTION} are of two saves, so one was interrupted; save the "
                "inventory again, or take an earlier checkpoint"
            )
        if shape != [len(self.names), width] or self.order.shape != (len(self.names),):
            raise InputError(
                f"{path} is damaged: it does not hold {width} numbers for each of its "
                f"{len(self.names)} tasks; take an earlier checkpoint"
            )

    @cached_property
    def order(self) -> Tensor:
        """What the tasks of all shards are sorted by, `[R]`."""
        order: Tensor = self._file.get_tensor("order")
        return order

    def row(self, position: int) -> Tensor:
        """Read one row, `[N * H * K]`, and nothing else."""
        return self._checked(self._file.get_slice("rows")[position : position + 1])[0]

    def some(self, positions: list[int]) -> Tensor:
        """Read some rows, `[P, N * H * K]`: one by one where they are fewer than half."""
        if 2 * len(positions) < len(self.names):
            rows = self._file.get_slice("rows")
            return self._checked(torch.cat([rows[i : i + 1] for i in positions]))
        return self._checked(self._whole()[positions])

    def load(self) -> Shard:
        """Read the whole shard, to be changed and written back."""
        return Shard(list(self.names), self.order, self._whole().clone(), self._identity)

    def _whole(self) -> Tensor:
        """All rows, `[R, N * H * K]`, after comparing the file with its digest.

        Single rows are read without, because that would take the whole file.
        """
        rows: Tensor = self._file.get_tensor("rows")
        tensors = {"rows": rows, "order": self.order}
        # Older versions wrote no digest.
        if self._digest not in (None, digest_of(tensors, self._identity, self.names)):
            raise InputError(
                f"{self.path} is damaged: it does not hold what was saved; take an earlier "
                "checkpoint"
            )
        return rows

    def _checked(self, rows: Tensor) -> Tensor:
        if not are_finite_fractions(rows):
            raise InputError(
                f"{self.path} is damaged: tensor 'rows' holds values that are not finite "
                "fractional numbers; take an earlier checkpoint"
            )
        return rows
