"""Writing a report: the page, and the folder of files beside it."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyroute.errors import InputError
from polyroute.host.files import check_place, make_folder, write_text
from polyroute.host.paths import expanded
from polyroute.report_page.contents import collect
from polyroute.report_page.files import write_files
from polyroute.report_page.page import GENERATOR, render

__all__ = ["write_report"]


def write_report(
    folders: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    data: str | None = None,
    reader: Mapping[str, Any] | None = None,
) -> Path:
    """Write the results of runs as one HTML page, with figures and numbers in a folder beside it.

    Args:
        folders: folders of `polyroute train`, `import`, `adapt` or `demo`. The others are compared
            with a run of method `shared` or, if there is none, with the first run.
        out: the page; its name with `-files` at the end is the name of the folder.
        data: a suite with the categories of tasks; by default the suites of the runs.
        reader: options of its reader.

    Returns:
        The folder of files.

    Raises:
        InputError: a folder holds no run, or the page cannot be written.
    """
    path = expanded(out)
    if path.is_dir():
        raise InputError(f"{path} is a folder; name an HTML file as --out")
    beside = path.with_name(f"{path.stem}-files")
    _check_place(path, beside)
    report = collect(folders, data, reader)
    page = render(report, beside.name)
    make_folder(path.parent)
    make_folder(beside)
    write_files(report, beside)
    write_text(path, page)
    return beside


def _check_place(path: Path, beside: Path) -> None:
    """Check, before anything is read, that a report can be written and replaces only a report."""
    check_place(path.parent)
    if path.exists():
        with path.open("rb") as file:
            start = file.read(1000)
        if GENERATOR.encode() not in start:
            raise InputError(
                f"{path} exists and is no report of polyroute; name another --out file"
            )
    elif beside.exists() and (not beside.is_dir() or any(beside.iterdir())):
        raise InputError(
            f"{beside}, the folder for the figures, exists and belongs to no report; "
            "name another --out file"
        )
