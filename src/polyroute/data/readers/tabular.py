"""A folder of tables: CSV, Parquet or JSONL files with one example per row.

A file is named `<task>.csv`, or `<task>.<split>.csv` if each split has its own file. Otherwise a
column `split` names the split of each row; without one, all rows are for training. The columns are
`input` and `target`, and optionally `instruction`, `choices` and `references`; others are ignored.
An optional `roles.json` has the same form as in a folder of JSONL records.
"""

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, starmap
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from polyroute.data.readers.roles import check_names, read_roles
from polyroute.data.readers.task_table import TableSuite, TaskSource, file_key
from polyroute.data.records import cannot_read, checked, read_objects
from polyroute.data.suite import SPLITS
from polyroute.errors import InputError, did_you_mean

__all__ = ["TabularSuite", "is_tabular"]

_Rows = Iterator[tuple[str, dict[str, Any]]]


class TabularSuite(TableSuite):
    """A suite kept as a folder of CSV, Parquet or JSONL tables.

    Args:
        path: the folder; `~` is expanded.
        cache_dir: where the tables are cached; None for the usual cache of `datasets`.

    Raises:
        InputError: the folder cannot be listed or holds no table, two files define the same split
            of a task, a task has the reserved name, or `roles.json` is malformed.
    """

    def __init__(self, path: str | Path, *, cache_dir: str | Path | None = None) -> None:
        folder = Path(path).expanduser().resolve()
        tasks = _task_files(folder)
        check_names([(task, next(iter(files.values()))) for task, files in tasks.items()])
        infos = read_roles(folder / "roles.json", tasks)
        sources = {
            task: TaskSource(
                place=", ".join(map(str, files.values())),
                records=partial(_records, task, files),
                key=partial(_key, files),
                info=infos.get(task),
            )
            for task, files in tasks.items()
        }
        super().__init__(folder.name, sources, cache_dir)


def is_tabular(folder: Path) -> bool:
    """Whether a folder holds tables rather than JSONL records that name their own splits."""
    return any(
        path.suffix in (".csv", ".parquet") or (path.suffix == ".jsonl" and _name(path)[1])
        for path in _tables(folder)
    )


def _tables(folder: Path) -> list[Path]:
    """The tables of a folder, sorted; hidden files are ignored."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise cannot_read(folder, error) from error
    return [p for p in entries if p.suffix in _READERS and not p.name.startswith(".")]


def _name(path: Path) -> tuple[str, str | None]:
    """The task of a file, and its split if the name of the file says so."""
    task, _, split = path.stem.rpartition(".")
    return (task, split) if task and split in SPLITS else (path.stem, None)


def _task_files(folder: Path) -> dict[str, dict[str | None, Path]]:
    """The files of each task by split; the only file of a task, with all splits, is under None."""
    tasks: dict[str, dict[str | None, Path]] = {}
    for path in _tables(folder):
        task, split = _name(path)
        files = tasks.setdefault(task, {})
        for other in (files[taken] for taken in files if None in (taken, split) or taken == split):
            raise InputError(
                f"{other} and {path.name} both give rows of the task {task!r}; keep one file, or "
                f"one for each split, such as {task}.train{path.suffix}"
            )
        files[split] = path
    if not tasks:
        raise InputError(f"{folder} holds no .csv, .parquet or .jsonl file; a suite has some")
    return tasks


def _key(files: Mapping[str | None, Path]) -> list[Any]:
    return [[split, *file_key(path)] for split, path in files.items()]


def _records(task: str, files: Mapping[str | None, Path]) -> Iterator[dict[str, Any]]:
    return checked(chain.from_iterable(starmap(_rows, files.items())), task, task)


def _rows(split: str | None, path: Path) -> _Rows:
    is_empty = True
    for where, row in _READERS[path.suffix](path):
        yield where, _record(row, split, where)
        is_empty = False
    if is_empty:
        raise InputError(f"{path} holds no row; remove the file or add rows")


def _record(row: Mapping[str, Any], split: str | None, where: str) -> dict[str, Any]:
    """Make a record of a row: fill in what may be left out, and read lists from text."""
    own = row.get("split") or None
    if split and own and own != split:
        raise InputError(
            f"{where}: the column 'split' is {own!r} but the file is for {split!r}; move the row "
            "or remove the column"
        )
    record = {
        "instruction": row.get("instruction") or "",
        "split": split or own or "train",
        "choices": _listed(row.get("choices"), f"{where}: the column 'choices'"),
        "references": _listed(row.get("references"), f"{where}: the column 'references'"),
    }
    return {**{name: row[name] for name in ("input", "target") if name in row}, **record}


def _listed(value: Any, what: str) -> Any:
    """The list in a cell, given as JSON or with `|` between its entries."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if not text.startswith("["):
        return [part.strip() for part in text.split("|")] if text else None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{what} begins like a JSON list but is not valid ({error}); write it as "
            '["yes", "no"] or as yes|no'
        ) from error


def _check_columns(path: Path, names: Sequence[str]) -> None:
    for name in ("input", "target"):
        if name not in names:
            raise InputError(
                f"{path} has no column {name!r}; add it, or rename a column "
                f"({did_you_mean(name, names)})"
            )
    for name in names:
        if list(names).count(name) > 1:
            raise InputError(f"{path} has two columns {name!r}; rename one of them")


def _csv_rows(path: Path) -> _Rows:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            names = next(reader, None)
            if names is None:
                raise InputError(f"{path} is empty; its first line must name the columns")
            _check_columns(path, names)
            for cells in reader:
                where = f"{path}, line {reader.line_num}"
                if len(cells) != len(names):
                    if not cells:  # an empty line
                        continue
                    raise InputError(
                        f"{where}: the row has {len(cells)} cells but the first line "
                        f'{len(names)}; put "..." around a cell that holds a comma'
                    )
                yield where, dict(zip(names, cells, strict=True))
    except OSError as error:
        raise cannot_read(path, error) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error.reason}); save it as UTF-8") from error
    except csv.Error as error:
        raise InputError(
            f"{path}, line {reader.line_num}: not valid CSV ({error}); correct the quotes, or "
            "keep long texts as JSONL or Parquet"
        ) from error


def _parquet_rows(path: Path) -> _Rows:
    try:
        with pq.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{path} is not a readable Parquet file ({reason}); write it again"
        ) from error


def _jsonl_rows(path: Path) -> _Rows:
    return read_objects(path)


_READERS: Mapping[str, Callable[[Path], _Rows]] = {
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
    ".jsonl": _jsonl_rows,
}
