"""The readers of suites there are, and which of them a suite needs."""

import os
from pathlib import Path
from typing import Any

from polyroute.errors import InputError
from polyroute.readers.hub import HubSuite
from polyroute.readers.jsonl import JsonlSuite
from polyroute.readers.p3 import HUB, P3Suite, is_p3
from polyroute.readers.superni import SuperNiSuite
from polyroute.readers.tabular import TabularSuite, is_tabular
from polyroute.suite import Suite

__all__ = ["open_suite"]


def open_suite(path: str | Path, *, cache_dir: str | Path | None = None, **options: Any) -> Suite:
    """Open a suite with the reader that fits what lies at its path.

    - a folder with one JSONL file of records per task: `JsonlSuite`
    - a folder with CSV or Parquet files, or JSONL files of one split each: `TabularSuite`
    - a YAML file that says which columns of which data sets make a task: `HubSuite`
    - a folder with `tasks/` and `splits/default/`: `SuperNiSuite`
    - `"bigscience/P3"`, or a folder with prompt templates or few-shot files of T0: `P3Suite`

    Args:
        path: the folder or file; `~` is expanded.
        cache_dir: where tables go; None for the usual cache of `datasets`.
        **options: of the reader, such as `seed`.

    Raises:
        InputError: there is no readable suite at the path, or its reader has no such option.
    """
    reader = _reader(path)
    try:
        suite: Suite = reader(path, cache_dir=cache_dir, **options)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise InputError(
            f"{reader.__name__}, which reads {path}, has not all of the options "
            f"{', '.join(sorted(options))}"
        ) from error
    return suite


def _reader(path: str | Path) -> Any:
    place = Path(path).expanduser()
    if place.suffix in (".yaml", ".yml"):
        return HubSuite
    # False, not an error, for a name that cannot be.
    if not os.path.isdir(place):  # noqa: PTH112
        return P3Suite if str(path) == HUB else JsonlSuite  # whose errors say what is wrong
    if (place / "tasks").is_dir() and (place / "splits" / "default").is_dir():
        return SuperNiSuite
    if is_p3(place):
        return P3Suite
    return TabularSuite if is_tabular(place) else JsonlSuite
