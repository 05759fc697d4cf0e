"""Progress on standard error: a bar on a terminal, an occasional line in a log."""

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TextIO

from tqdm.auto import tqdm
from tqdm.std import tqdm as TextBar  # noqa: N812 - a class

__all__ = ["aside", "progress"]

SECONDS_BETWEEN_LINES = 30.0
LINE = "{desc}: {n_fmt} of {total_fmt} {unit}s, {rate_fmt}, {remaining} left{postfix}"
hidden = False
"""Whether progress is hidden."""


def progress(over: Any = None, what: str = "", *, unit: str = "task", **options: Any) -> Any:
    """A progress bar; if standard error is no terminal, one line about every 30 seconds.

    Nothing is shown for work that takes less than a second (in a log: 30 seconds), and a bar
    disappears when the work is done.

    Args:
        over: the items to iterate over; None if the caller calls `update`.
        what: a description of the work.
        unit: the name of one item.
        **options: options of `tqdm.tqdm`, such as `total`.
    """
    options |= {"desc": what, "unit": unit, "leave": False, "disable": hidden}
    if "ipykernel" in sys.modules or sys.stderr.isatty():
        return tqdm(over, delay=1.0, **options)
    return _Lines(over, **options)


def aside() -> AbstractContextManager[None]:
    """Within the block, bars leave the terminal to what is printed there."""
    return TextBar.external_write_mode() if sys.stderr.isatty() else nullcontext()


class _Lines(TextBar):  # type: ignore[type-arg]  # generic in the stubs only
    """Writes whole lines, without carriage returns or other control characters."""

    monitor_interval = 0  # starts no thread, which would print more often

    def __init__(self, over: Any = None, **options: Any) -> None:
        seconds = SECONDS_BETWEEN_LINES
        super().__init__(
            over, mininterval=seconds, delay=seconds, miniters=1, smoothing=0, bar_format=LINE,
            **options,
        )  # fmt: skip

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if msg is None:
            file: TextIO = self.fp
            file.write(f"{self}\n")
            file.flush()
