"""Locks between processes, and between threads, that end with the process that holds them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["is_still_there", "locked"]


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[tuple[BinaryIO, bool]]:
    """Hold the lock of a file, which must exist, within the block.

    Args:
        path: the file.
        wait: until nobody else holds it.

    Yields:
        The open file, and whether there is a lock: not every file system has them.

    Raises:
        BlockingIOError: somebody else holds it, and `wait` is False.
    """
    with path.open("rb") as file:
        is_locked = False
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_locked = True
            except BlockingIOError:
                raise
            except OSError:  # a file system without locks
                pass
        yield file, is_locked


def is_still_there(path: Path, file: BinaryIO) -> bool:
    """Whether an open file still has its name: it was neither removed nor replaced."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except (FileNotFoundError, NotADirectoryError):
        return False
