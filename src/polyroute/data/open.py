"""The readers of suites there are, and which of them a suite needs."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from polyroute.data.readers.hub import HubSuite
from polyroute.data.readers.jsonl import JsonlSuite
from polyroute.data.readers.p3 import HUB, P3Suite, is_p3
from polyroute.data.readers.superni import SuperNiSuite
from polyroute.data.readers.tabular import TabularSuite, is_tabular
from polyroute.data.suite import Suite
from polyroute.errors import InputError

__all__ = ["open_suite"]

PLAIN = {
    bool: "true or false",
    int: "a whole number",
    Mapping: "names with their values",
    Sequence: "a list",
}
"""Types of readers' options that can be checked, in words."""


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
    hints = get_type_hints(reader.__init__)
    for name, value in options.items():
        if name not in hints:
            raise InputError(f"{reader.__name__}, which reads {path}, has no option {name!r}")
        kinds = set(get_args(hints[name])) or {hints[name]}
        _check_option(name, value, {get_origin(kind) or kind for kind in kinds})
    suite: Suite = reader(path, cache_dir=cache_dir, **options)
    return suite


def _check_option(name: str, value: Any, kinds: set[Any]) -> None:
    """Compare a value with the types that a reader's option takes, where that is one plain type."""
    for kind, words in PLAIN.items():
        if value is not None and kinds <= {kind, NoneType}:
            is_text = isinstance(value, str)
            is_bool = isinstance(value, bool) and kind is not bool
            if not isinstance(value, kind) or is_text or is_bool:
                raise InputError(f"the reader's option {name} must be {words}, not {value!r}")


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
