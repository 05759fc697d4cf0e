"""Writing adapters that differ in their numbers alone: all else is made once."""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from polyroute.host.files import BLOCK, write_in_place
from polyroute.saved.peft_export import ROOT, TENSORS

__all__ = ["Pattern"]

THREADS = 4
"""That write: a disk takes many files together in a fraction of the time of one after another."""


class Pattern:
    """An adapter for others that have its layers and ranks, and so all of its files but one.

    To write a safetensors file tensor by tensor takes longer than to mix its numbers. Its header,
    which says where each tensor lies, depends on names and shapes alone.

    Args:
        folder: holds the adapter as `PeftTarget.write` writes it, and what else is to be in every
            folder, such as its card.
    """

    def __init__(self, folder: Path) -> None:
        self._others = {
            path.name: path.read_bytes() for path in folder.iterdir() if path.name != TENSORS
        }
        file = bytearray((folder / TENSORS).read_bytes())
        self._size = len(file)
        begin = 8 + int.from_bytes(file[:8], "little")
        self._places: dict[str, slice] = {
            name: slice(*(begin + place for place in entry["data_offsets"]))
            for name, entry in json.loads(file[8:begin]).items()
            if name != "__metadata__"
        }
        self._file = torch.frombuffer(file + bytes(-len(file) % BLOCK), dtype=torch.uint8)
        self._free: list[Tensor] = []

    def filled(self, tensors: Mapping[str, Tensor], count: int) -> Tensor:
        """The files of some adapters in memory, one a row; for `write`.

        Args:
            tensors: those of `PeftTarget.tensors`; of one task without an axis.
            count: how many tasks they are of.
        """
        memory = self._free.pop() if self._free else None
        if memory is None or len(memory) < count:
            memory = self._new(count)
        for name, tensor in tensors.items():
            stacked = tensor if count > 1 else tensor.unsqueeze(0)
            place = memory[:count, self._places[ROOT + name]].view(tensor.dtype)
            place.view(stacked.shape).copy_(stacked)
        return memory

    def _new(self, count: int) -> Tensor:
        """Copies of the file, each at an address that a disk can read from."""
        size = len(self._file)
        memory = torch.empty(count * size + BLOCK, dtype=torch.uint8)
        skipped = -memory.data_ptr() % BLOCK
        return memory[skipped : skipped + count * size].view(count, size).copy_(self._file)

    def write(self, folders: Sequence[Path], memory: Tensor) -> None:
        """Write an adapter to each of some folders, which are made; also from another thread.

        The files are written in place, so the folders must be in one that
        `polyroute.host.files.whole_folders` yields.

        Args:
            folders: one for each task, in their order.
            memory: what `filled` returned, which must not be used any more.
        """
        with ThreadPoolExecutor(THREADS) as threads:
            for _ in threads.map(self._write, folders, memory):
                pass
        # Kept, because the system clears memory that is taken anew, which costs as much as to fill
        # it. What is not of the tasks, as whole modules that trained, stays in it.
        self._free.append(memory)

    def _write(self, folder: Path, file: Tensor) -> None:
        folder.mkdir()
        for name, content in self._others.items():
            write_in_place(folder / name, content)
        write_in_place(folder / TENSORS, file.numpy().data, self._size)
