"""Opening a suite: the content of its path selects the reader."""

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from polyroute.data.readers.hub import HubSuite
from polyroute.data.readers.jsonl import JsonlSuite
from polyroute.data.readers.p3 import P3Suite, is_p3
from polyroute.data.readers.p3_settings import P3Settings
from polyroute.data.readers.p3_training import P3
from polyroute.data.readers.superni import SuperNiSettings, SuperNiSuite
from polyroute.data.readers.tabular import TabularSuite, is_table, is_tabular
from polyroute.data.suite import Suite
from polyroute.errors import InputError
from polyroute.host.paths import expanded

__all__ = ["STARTER", "open_suite"]

STARTER = "starter"
"""The name of the suite of real tasks that comes with polyroute."""


def open_suite(path: str | Path, *, cache_dir: str | Path | None = None, **options: Any) -> Suite:
    """Open a suite with the reader that its path calls for.

    - `"starter"`: the suite of real tasks that comes with polyroute, a folder as follows
    - a folder with one JSONL file of records per task: `JsonlSuite`
    - a JSON, JSONL, CSV, TSV or Parquet file, a folder with several such files, or a folder that
      `save_to_disk` of `datasets` wrote: `TabularSuite`
    - a YAML file that says which columns of which data sets make a task: `HubSuite`
    - a folder with `tasks/` and `splits/default/`: `SuperNiSuite`
    - `"bigscience/P3"`, or a folder with prompt templates or few-shot files of T0: `P3Suite`

    Args:
        path: the folder or file; `~` is expanded.
        cache_dir: where tables are cached; None for the usual cache of `datasets`.
        **options: settings of the reader, such as `seed`; see `SuperNiSettings` and `P3Settings`.

    Raises:
        InputError: there is no readable suite at the path, or its reader has no such option or
            does not allow the value.
    """
    path = Path(__file__).parent / "starter" if str(path) == STARTER else path
    reader, settings = _reader(path)
    known = [field.name for field in fields(settings)] if settings else []
    for name in options:
        if name not in known:
            raise InputError(f"{reader.__name__}, which reads {path}, has no option {name!r}")
    try:
        chosen = [settings(**options)] if settings else []
    except InputError as error:
        raise InputError(f"the reader's option {error}") from None
    suite: Suite = reader(path, *chosen, cache_dir=cache_dir)
    return suite


def _reader(path: str | Path) -> tuple[Any, Any]:
    """The class of the suite, and that of its settings, if it has any."""
    place = expanded(path)
    if place.suffix in (".yaml", ".yml"):
        return HubSuite, None
    if os.path.isfile(place) and is_table(place):  # noqa: PTH113 - as below
        return TabularSuite, None
    # Unlike Path.is_dir, this is False for a name that no file system allows.
    if not os.path.isdir(place):  # noqa: PTH112
        if str(path) == P3:
            return P3Suite, P3Settings
        return JsonlSuite, None  # its errors say what is wrong with the path
    if (place / "tasks").is_dir() and (place / "splits" / "default").is_dir():
        return SuperNiSuite, SuperNiSettings
    if is_p3(place):
        return P3Suite, P3Settings
    return (TabularSuite if is_tabular(place) else JsonlSuite), None
