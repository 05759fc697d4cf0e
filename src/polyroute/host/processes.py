"""The processes of one launch: `torchrun` and `accelerate launch` start a command several times.

The launcher numbers the processes in the environment. Only `connect` and `wait` need them to be
connected. What waits for others does so in a thread, because the main thread alone notices signals:
if one process refuses its input, the launcher asks the others to end, and they do.
"""

import os
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from polyroute.errors import InputError

__all__ = ["connect", "count", "count_here", "index", "is_first", "wait"]

LONGEST_WAIT = timedelta(days=7)
"""Processes may take very different times for their shares of the work."""
LOOK = 0.1
"""Seconds between looks whether others have come."""


def index() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """The number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def count_here() -> int:
    """The number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that prints and writes the common files."""
    return index() == 0


def connect(timeout: timedelta = LONGEST_WAIT) -> None:
    """Connect all processes, if they are not connected yet.

    Args:
        timeout: how long a process may wait for others from now on.

    Raises:
        InputError: another process has ended.
    """
    if count() > 1:
        _patiently(lambda: _state(timeout))
        _state(timeout).set_device()  # each thread has a device of its own


def wait() -> None:
    """Wait until all processes have called this; connects them if they are not connected yet.

    Raises:
        InputError: another process has ended.
    """
    if count() > 1:
        connect()
        _patiently(_wait)


def _wait() -> None:
    state = _state(LONGEST_WAIT)
    state.set_device()
    state.wait_for_everyone()


def _state(timeout: timedelta) -> Any:
    import torch
    from accelerate import PartialState  # type: ignore[import-untyped]

    # Without an accelerator it connects nothing, unless it is told to use a CPU.
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timeout)


def _patiently(work: Callable[[], object]) -> None:
    """Do what waits for other processes, such that signals end it.

    Raises:
        InputError: it failed, as when another process has ended.
    """
    errors: list[Exception] = []

    def run() -> None:
        try:
            work()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(LOOK)
    if errors:
        raise InputError(
            "another process of this launch has ended: its own message says why"
        ) from errors[0]
