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

from polyroute.errors import InputError, reason

__all__ = ["connect", "count", "count_here", "index", "is_first", "wait"]

LONGEST_WAIT = timedelta(days=7)
"""Processes may take very different times for their shares of the work."""
LONGEST_REASON = 200
"""Characters of what a library says."""
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
        timeout: how long each may wait for others, from now to its end.

    Raises:
        InputError: they cannot be connected.
    """
    if count() > 1:
        _patiently(lambda: _state(timeout), "the processes of this launch cannot be connected")
        _use_device(_state(timeout))


def wait() -> None:
    """Wait until all processes have called this; connects them if they are not connected yet.

    Raises:
        InputError: another process has ended.
    """
    if count() > 1:
        connect()
        ended = "another process of this launch has ended, and its own message says why"
        _patiently(_wait, ended)


def _wait() -> None:
    state = _state(LONGEST_WAIT)
    _use_device(state)
    state.wait_for_everyone()


def _state(timeout: timedelta) -> Any:
    import torch
    from accelerate import PartialState  # type: ignore[import-untyped]
    from accelerate.utils import parse_flag_from_env  # type: ignore[import-untyped]

    # Without an accelerator it connects nothing, unless it is told to use a CPU.
    is_cpu = not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    return PartialState(cpu=is_cpu, timeout=timeout)


def _use_device(state: Any) -> None:
    """Choose this process's accelerator for the running thread; each thread has its own choice."""
    import torch

    if state.device.type != "cpu" and state.device.index is not None:
        torch.accelerator.set_device_index(state.device.index)


def _patiently(work: Callable[[], object], sentence: str) -> None:
    """Do what waits for other processes, such that signals end it.

    Raises:
        InputError: it failed; the sentence says what that means.
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
        raise InputError(f"{sentence} ({reason(errors[0])[:LONGEST_REASON]})") from errors[0]
