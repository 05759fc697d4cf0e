"""The processes of one launch: `torchrun` and `accelerate launch` start several of a command.

The launcher says in the environment which of them a process is; nothing here needs them to be
connected, except `wait`.
"""

import os
from datetime import timedelta

__all__ = ["count", "count_here", "index", "is_first", "wait"]

LONGEST_WAIT = timedelta(days=7)
"""Shares of a work may take any time."""


def index() -> int:
    """Which of the processes this is, from 0."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """How many there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def count_here() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the one that writes the common files and prints."""
    return index() == 0


def wait() -> None:
    """Go on when all processes have come here; connects them where nothing has yet."""
    if count() > 1:
        import torch
        from accelerate import PartialState  # type: ignore[import-untyped]

        cpu = not torch.accelerator.is_available()  # else accelerate connects nothing there
        PartialState(cpu=cpu, timeout=LONGEST_WAIT).wait_for_everyone()
