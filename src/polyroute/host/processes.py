"""The processes of one launch: `torchrun` and `accelerate launch` start a command several times.

The launcher numbers the processes in the environment. Only `wait` needs them to be connected.
"""

import os
from datetime import timedelta

__all__ = ["count", "count_here", "index", "is_first", "wait"]

LONGEST_WAIT = timedelta(days=7)
"""Processes may take very different times for their shares of the work."""


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


def wait() -> None:
    """Wait until all processes have called this; connects them if they are not connected yet."""
    if count() > 1:
        import torch
        from accelerate import PartialState  # type: ignore[import-untyped]

        cpu = (
            not torch.accelerator.is_available()
        )  # without it accelerate connects nothing on a CPU
        PartialState(cpu=cpu, timeout=LONGEST_WAIT).wait_for_everyone()
