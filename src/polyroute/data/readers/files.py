"""Files of rows: JSON, JSONL, CSV, TSV, Parquet, and what `save_to_disk` of `datasets` wrote.

A file is read row by row; only a JSON list is read whole. Nothing in a file is ever run.
"""

import codecs
import csv
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from polyroute.data.readers.task_table import file_key
from polyroute.data.records import cannot_read, read_objects
from polyroute.data.suite import SPLITS, quiet_datasets, split_of
from polyroute.errors import InputError, reason
from polyroute.host.files import read_json
from polyroute.host.json_text import json_type, parse_json, type_of_file
from polyroute.host.paths import check_file, check_link
from polyroute.host.texts import read_text, text_lines

__all__ = [
    "SUFFIXES",
    "Rows",
    "class_names",
    "is_saved",
    "load_saved",
    "read_rows",
    "rows_file_key",
    "saved_splits",
]

Rows = Iterator[tuple[str, dict[str, Any]]]
"""Rows by column, each with a description of where it is."""

BOM = codecs.BOM_UTF8
_BATCH = 1000
_LONGEST = 2**31 - 1
"""The most characters of a CSV cell, as many as systems allow; Python stops at 131,072."""


def read_rows(path: Path) -> Rows:
    """The rows of a file, or of a folder that holds one saved `datasets.Dataset`.

    Raises:
        InputError: the file cannot be read, is malformed, or holds no row.
    """
    read = _saved_rows if path.is_dir() else _READERS[path.suffix]
    is_empty = True
    for where, row in read(path):
        yield where, row
        is_empty = False
    if is_empty:
        raise InputError(f"{path} holds no row; remove the file or add rows")


def class_names(path: Path) -> dict[str, list[str]]:
    """The names of the classes, by column, that a Parquet file or a saved data set declares.

    Raises:
        InputError: the file cannot be read.
    """
    if path.is_dir():
        features = load_saved(path).features
    elif path.suffix == ".parquet":
        try:
            features = datasets.Features.from_arrow_schema(pq.read_schema(path))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise _bad_parquet(path, error) from error
    else:
        return {}
    return {
        column: list(feature.names)
        for column, feature in features.items()
        if isinstance(feature, datasets.ClassLabel)
    }


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote the folder: one data set, or a dictionary of splits."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def saved_splits(folder: Path) -> dict[str | None, Path]:
    """The saved data sets of a folder by split; the only one, without a split, is under None.

    Raises:
        InputError: a dictionary of splits has none that a suite may have, or one of them twice.
    """
    if (folder / "state.json").is_file():
        return {None: folder}
    found: dict[str | None, Path] = {}
    for each in sorted(folder.iterdir()):
        check_link(each)
        split = split_of(each.name) if is_saved(each) else None
        if split in found:
            raise InputError(
                f"{folder} has the splits {found[split].name!r} and {each.name!r}, which both "
                f"mean {split}; save it again with one of them"
            )
        if split:
            found[split] = each
    if not found:
        others = ", ".join(sorted(each.name for each in folder.iterdir() if each.is_dir()))
        raise InputError(
            f"{folder} has the splits {others or 'of no name'}; save it again with splits that "
            f"are called {', '.join(SPLITS)}"
        )
    return {split: found[split] for split in SPLITS if split in found}


def load_saved(folder: Path) -> datasets.Dataset:
    """The rows of one data set that `save_to_disk` wrote, memory-mapped.

    Raises:
        InputError: the folder cannot be read.
    """
    _check_names(folder)
    try:
        with quiet_datasets():
            return datasets.load_from_disk(str(folder))
    # The library raises these for files that are missing or damaged.
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise InputError(
            f"{folder} is not a readable data set ({reason(error)}); write it again with "
            "save_to_disk"
        ) from error


def _check_names(folder: Path) -> None:
    """Make sure that a saved data set consists of files of its own folder alone.

    Raises:
        InputError: its `state.json` cannot be read or names another file, or one is no file.
    """
    check_link(folder / "dataset_info.json")
    check_file(folder / "dataset_info.json")
    try:
        state = read_json(folder / "state.json")
    except InputError as error:
        raise InputError(
            f"{folder} is not a readable data set ({error}); write it again with save_to_disk"
        ) from error
    entries = state.get("_data_files") if isinstance(state, dict) else None
    for entry in entries if isinstance(entries, list) else ():
        file = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(file, str) or Path(file).name != file:
            raise InputError(
                f"{folder / 'state.json'} names the file {file!r}, which is not in its folder; "
                "write it again with save_to_disk"
            )
        check_link(folder / file)
        check_file(folder / file)


def rows_file_key(path: Path) -> list[Any]:
    """A value that changes when a file or a saved data set does, for the key of a `TaskSource`.

    Raises:
        InputError: the file cannot be read.
    """
    if not path.is_dir():
        return file_key(path)
    return [file_key(each) for each in sorted(path.iterdir()) if each.is_file()]


def _saved_rows(folder: Path) -> Rows:
    batches = load_saved(folder).with_format("arrow").iter(batch_size=_BATCH)
    yield from _numbered(folder, (row for batch in batches for row in batch.to_pylist()))


def _numbered(path: Path, rows: Iterable[dict[str, Any]]) -> Rows:
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row


def _refuse_twins(path: Path, names: Iterable[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise InputError(f"{path} has two columns {name!r}; rename one of them")


def _check_separator(path: Path, names: list[str]) -> None:
    """Refuse a file whose cells are separated by something else than the name of the file says."""
    if names and names[0].lower().startswith("sep="):
        raise InputError(
            f"{path} begins with the line {names[0]!r}, which only Excel reads; remove it, so "
            "that the first one names the columns"
        )
    wanted, others = "commas", {";": "';'", "\t": "tabs", "|": "'|'"}
    if path.suffix == ".tsv":
        wanted, others = "tabs", {";": "';'", ",": "commas", "|": "'|'"}
    between = next((sign for sign in others if names and sign in names[0]), None)
    if len(names) == 1 and between:
        rename = {"\t": " or rename it to .tsv", ",": " or rename it to .csv"}.get(between, "")
        raise InputError(f"{path} is separated by {others[between]}: save it with {wanted}{rename}")


def _csv_rows(path: Path) -> Rows:
    begins = 1  # the line where a row begins: an open quote may run to the end of the file
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST))
    try:
        with closing(text_lines(path, "utf-8-sig")) as lines:
            delimiter = "\t" if path.suffix == ".tsv" else ","
            reader = csv.reader(lines, strict=True, delimiter=delimiter)
            names = next(reader, None)
            if names is None:
                raise InputError(f"{path} is empty; its first line must name the columns")
            _check_separator(path, names)
            _refuse_twins(path, names)
            begins = reader.line_num + 1
            for cells in reader:
                where, begins = f"{path}, line {begins}", reader.line_num + 1
                if len(cells) != len(names):
                    if not cells:  # an empty line
                        continue
                    between = "tab" if path.suffix == ".tsv" else "comma"
                    raise InputError(
                        f"{where}: the row has {len(cells)} cells but the first line "
                        f'{len(names)}; put "..." around a cell that holds a {between}'
                    )
                yield where, dict(zip(names, cells, strict=True))
    except OSError as error:
        raise cannot_read(path, error) from error
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from error
    except csv.Error as error:
        raise InputError(
            f"{path}, line {begins}: the row that begins here is not valid CSV ({error}); correct "
            "its quotes"
        ) from error


def _not_utf8(path: Path, error: UnicodeDecodeError) -> InputError:
    return InputError(f"{path} is not UTF-8 ({error.reason}); save it as UTF-8")


def _parquet_rows(path: Path) -> Rows:
    try:
        with pq.ParquetFile(path) as file:
            _refuse_twins(path, file.schema_arrow.names)
            batches = file.iter_batches(batch_size=_BATCH)
            yield from _numbered(path, (row for batch in batches for row in batch.to_pylist()))
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise _bad_parquet(path, error) from error


def _bad_parquet(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} is not a readable Parquet file ({reason(error)}); write it again")


def _json_rows(path: Path) -> Rows:
    """The rows of a JSON list; a file that does not begin with a bracket is read as JSONL."""
    try:
        check_file(path)
        with path.open("rb") as file:
            start = file.read(1 << 16).removeprefix(BOM).lstrip()[:1]
        text = read_text(path, "utf-8-sig") if start == b"[" else None
    except OSError as error:
        raise cannot_read(path, error) from error
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from error
    fix = "write a list of objects, one for each example"
    if text is None:
        try:
            yield from read_objects(path)
        except InputError:
            if whole := type_of_file(path):  # not rows, but one value, perhaps over several lines
                raise InputError(f"{path} holds {whole}, not a list of rows; {fix}") from None
            raise
        return
    for where, row in _numbered(path, parse_json(text, str(path), fix)):
        if not isinstance(row, dict):
            raise InputError(f"{where}: a row must be a JSON object, not {json_type(row)}")
        yield where, row


_READERS: Mapping[str, Callable[[Path], Rows]] = {
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
    ".jsonl": read_objects,
    ".json": _json_rows,
}
SUFFIXES = tuple(_READERS)
"""How the names of files of rows end."""
