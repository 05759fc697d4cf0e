"""The readers of suites there are, and which of them a suite on disk needs."""

from pathlib import Path

from polyroute.jsonl import JsonlSuite
from polyroute.suite import Suite

__all__ = ["open_suite"]


def open_suite(path: str | Path, *, cache_dir: str | Path | None = None) -> Suite:
    """Open a suite with the reader that fits; for now every suite is a folder of JSONL files.

    Args:
        path: the folder; `~` is expanded.
        cache_dir: where tables go; None for the usual cache of `datasets`.

    Raises:
        InputError: there is no readable suite at the path.
    """
    return JsonlSuite(path, cache_dir=cache_dir)
