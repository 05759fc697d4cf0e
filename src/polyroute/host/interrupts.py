"""Ctrl-C, SIGTERM and SIGHUP: work stops at a point from which it can be resumed."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = ["SIGNALS", "Terminated", "deferred", "resumable", "terminable"]

ASKING = (signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))
"""With the first a system or a scheduler asks a process to end, with the second a terminal that is
closed."""
SIGNALS = (signal.SIGINT, *ASKING)


class Terminated(KeyboardInterrupt):
    """One of the signals that ask a process to end.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def terminable() -> Iterator[None]:
    """Within the block, SIGTERM and SIGHUP raise `Terminated`, as Ctrl-C `KeyboardInterrupt`."""

    def terminate(number: int, _: Any) -> None:
        _let_go_of_the_terminal(number)
        raise Terminated(number)

    if (
        threading.current_thread() is not threading.main_thread()
    ):  # only the main thread gets signals
        yield
        return
    former = {
        number: signal.signal(number, terminate)
        for number in ASKING
        if signal.getsignal(number) is not signal.SIG_IGN  # as under nohup
    }
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler or signal.SIG_DFL)


@contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Within the block, these signals are deferred to its end; a second one acts at once.

    Yields:
        A function that says whether a signal is waiting; the block should then save and end.
    """
    waiting: list[int] = []
    former: dict[int, Any] = {}

    def wait(number: int, _: Any) -> None:
        waiting.append(number)
        restore()
        _let_go_of_the_terminal(number)
        with suppress(OSError, ValueError):  # whoever read it may be gone
            print(
                "polyroute: stopping after this step; interrupt again to stop at once",
                file=sys.stderr,
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


def _let_go_of_the_terminal(number: int) -> None:
    """Write nothing more to a terminal that was closed, as SIGHUP says: every write would fail."""
    if number in (signal.SIGINT, signal.SIGTERM):
        return
    with Path(os.devnull).open("wb") as nowhere:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                if os.isatty(stream.fileno()):
                    os.dup2(nowhere.fileno(), stream.fileno())


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """An interrupt within the block says that `--resume` continues the run in the folder."""
    try:
        yield
    except KeyboardInterrupt as stop:
        stop.args = (f"--resume goes on with the run in {folder}",)
        raise
