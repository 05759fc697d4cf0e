"""The memory of the machine: how much there is, and what a process holds of it."""

import ctypes
import gc
import time
from contextlib import suppress
from pathlib import Path

import psutil

__all__ = ["Trim", "available", "bound", "give_back_memory", "total"]

GROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    (
        "/sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)
"""In both versions of Linux's groups: the folder of a container's files, those with its limit and
what it uses, and the entry of `memory.stat` with what of that is files that can be read again."""
SECONDS_BETWEEN = 20.0
"""Seconds between two trims, which take up to .3 s each."""


def total() -> int:
    """The memory of the machine or of the container, in bytes."""
    limits = [limit for limit, _ in _groups()]
    return min([int(psutil.virtual_memory().total), *limits])


def available() -> int:
    """The memory that could be taken now, in bytes."""
    left = [max(0, limit - used) for limit, used in _groups()]
    return min([int(psutil.virtual_memory().available), *left])


def _groups() -> list[tuple[int, int]]:
    """The limit of the container and what it uses, where there is one."""
    found = []
    for folder, *names, cached in GROUPS:
        with suppress(OSError, ValueError, KeyError):  # "max" where there is no limit
            limit, used = (int((Path(folder) / n).read_text(encoding="ascii")) for n in names)
            lines = (Path(folder) / "memory.stat").read_text(encoding="ascii").splitlines()
            found.append((limit, used - int(dict(line.split() for line in lines)[cached])))
    return found


def bound() -> None:
    """Let what is larger than the machine fail, on Linux, in place of being killed.

    Linux grants memory that it does not have, and ends a process without a word once it is used.
    The limit is that of what this process and its children may write: the memory and the swap of
    the machine, and what is mapped now without being in memory, as weights are that were just
    loaded. A lower limit stays.
    """
    with suppress(ImportError, OSError, ValueError, AttributeError):
        import resource

        used = psutil.Process().memory_info()
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        own = total() + int(psutil.swap_memory().total) + max(0, used.data - used.rss)
        lowest = min(one for one in (soft, hard, own) if one != resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_DATA, (lowest, hard))


def give_back_memory() -> None:
    """Give freed memory back to the system, as far as the C library can.

    After a training of SmolLM2 glibc keeps 2 GB, in pieces between those of what is still alive,
    and the next command of the same process would come on top.
    """
    gc.collect()
    with suppress(AttributeError, OSError):  # it is glibc's alone
        ctypes.CDLL(None).malloc_trim(0)


class Trim:
    """Gives memory back now and then, in a training on a CPU.

    Batches of ever new sizes leave ever new holes in the heap. A training of SmolLM2 with 16
    examples in a step needs 2.5 GB, and without this its process had 5.8 GB after 200 steps.
    """

    def __init__(self) -> None:
        self._last = time.monotonic()

    def if_due(self) -> None:
        """Give memory back if the last time was 20 seconds ago."""
        if time.monotonic() - self._last > SECONDS_BETWEEN:
            give_back_memory()
            self._last = time.monotonic()
