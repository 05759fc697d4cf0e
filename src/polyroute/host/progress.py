"""Progress on standard error: a bar on a terminal, a line now and then in a log."""

import sys
from typing import Any, TextIO

from tqdm.auto import tqdm
from tqdm.std import tqdm as TextBar  # noqa: N812 - a class

__all__ = ["progress"]

SECONDS_BETWEEN_LINES = 30.0
LINE = "{desc}: {n_fmt} of {total_fmt} {unit}s, {rate_fmt}, {remaining} left{postfix}"
hidden = False
"""Whether to show none."""


def progress(over: Any = None, what: str = "", *, unit: str = "task", **options: Any) -> Any:
    """A bar or, where standard error is no terminal, one whole line about every 30 seconds.

    Nothing is shown of what takes less than a second (in a log: 30 seconds), and nothing is left of
    a bar when it is done.

    Args:
        over: what to go over; None where `update` counts.
        what: is going on.
        unit: what is counted.
        **options: of `tqdm.tqdm`, such as `total`.
    """
    options |= {"desc": what, "unit": unit, "leave": False, "disable": hidden}
    if "ipykernel" in sys.modules or sys.stderr.isatty():
        return tqdm(over, delay=1.0, **options)
    return _Lines(over, **options)


class _Lines(TextBar):  # type: ignore[type-arg]  # which its stubs have, and it has not
    """Writes lines, not bars: no carriage returns, nothing that moves the cursor."""

    monitor_interval = 0  # no thread that prints more often

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
