"""Ctrl-C and SIGTERM: work stops at a point from which it can be resumed."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Terminated", "deferred", "resumable", "terminable"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """SIGTERM, with which a system or a scheduler asks a process to end."""


@contextmanager
def terminable() -> Iterator[None]:
    """Within the block, SIGTERM raises `Terminated`, as Ctrl-C raises `KeyboardInterrupt`."""

    def terminate(*_: Any) -> None:
        raise Terminated

    if (
        threading.current_thread() is not threading.main_thread()
    ):  # only the main thread gets signals
        yield
        return
    former = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former or signal.SIG_DFL)


@contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Within the block, Ctrl-C and SIGTERM are deferred to its end; a second one acts at once.

    Yields:
        A function that says whether a signal is waiting; the block should then save and end.
    """
    waiting: list[int] = []
    former: dict[int, Any] = {}

    def wait(number: int, _: Any) -> None:
        waiting.append(number)
        restore()
        print(
            "polyroute: stopping after this step; interrupt again to stop at once", file=sys.stderr
        )

    def restore() -> None:
        for number, handler in former.items():
            signal.signal(number, handler)

    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            # A signal that is ignored, as under nohup, stays ignored. None means a handler that
            # Python did not set.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                former[number] = signal.signal(number, wait)
    try:
        yield lambda: bool(waiting)
    finally:
        restore()
    if waiting:
        signal.raise_signal(waiting[0])


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """An interrupt within the block says that `--resume` continues the run in the folder."""
    try:
        yield
    except KeyboardInterrupt as stop:
        stop.args = (f"--resume goes on with the run in {folder}",)
        raise
