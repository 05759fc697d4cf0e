"""A suite of data sets that `datasets` can load; a YAML file says what their columns mean.

    name: nli                          # optional
    tasks:
      rte:
        path: super_glue               # a data set on the hub; or csv, json, parquet and data_files
        name: rte                      # its configuration, if it has several
        split: {train: train, test: validation}
        columns:
          instruction: Does the first sentence say that the second is true?
          input: "{premise} {hypothesis}"
          target: label
          labels: ["yes", "no"]
        category: entailment
        role: held-out
        metric: accuracy

Each text of a record is given as the name of a column, or as a text with columns in braces; or
`messages` names a column of conversations, or a list of columns whose turns follow one another, of
which only the last has targets. Nothing in the file is ever run.
"""

import os
import re
from collections.abc import Iterator, Mapping
from functools import cache, partial
from glob import glob
from pathlib import Path
from typing import Any

import datasets

from polyroute.data.readers.files import is_saved, load_saved, rows_file_key, saved_splits
from polyroute.data.readers.hub_columns import COLUMN_KEYS, records_of
from polyroute.data.readers.roles import check_entry
from polyroute.data.readers.task_table import TableSuite, TaskSource, load, rows_key
from polyroute.data.records import checked
from polyroute.data.suite import SPLITS, TaskInfo, split_of
from polyroute.errors import InputError, did_you_mean
from polyroute.host.paths import expanded
from polyroute.host.yaml_files import read_yaml

__all__ = ["HubSuite"]

MOST_FILES = 100_000
"""Of a data set on this machine."""
_LOCAL = ("csv", "json", "parquet", "text")
_TASK_KEYS = (
    "path", "name", "revision", "data_files", "split", "columns", "category", "role", "metric",
)  # fmt: skip


class HubSuite(TableSuite):
    """Data sets of the hub, or local files, that a YAML file turns into tasks.

    Opening reads the YAML file; a data set is loaded when its task is first used.

    Args:
        path: the YAML file; `~` is expanded. Paths in it are relative to its folder.
        cache_dir: where the tables are cached; None for the usual cache of `datasets`.

    Raises:
        InputError: the file cannot be read or is malformed.
    """

    def __init__(self, path: str | Path, *, cache_dir: str | Path | None = None) -> None:
        file = expanded(path).resolve()
        content = _mapping(
            read_yaml(file, str(file)), ("name", "tasks"), str(file), needs=("tasks",)
        )
        tasks = content["tasks"]
        if not isinstance(tasks, dict) or not tasks:
            raise InputError(f"{file}: 'tasks' must map the name of each task to its description")
        for task in tasks:
            if not isinstance(task, str) or not task:
                raise InputError(f"{file}: the task name {task!r} must be a string; quote it")
        sources = {
            task: _source(task, entry, f"{file}, task {task!r}", file.parent, cache_dir)
            for task, entry in tasks.items()
        }
        super().__init__(str(content.get("name") or file.stem), sources, cache_dir)


def _source(
    task: str, entry: Any, where: str, folder: Path, cache_dir: str | Path | None
) -> TaskSource:
    entry = _mapping(entry, _TASK_KEYS, where, needs=("path", "columns"))
    columns = _columns(entry["columns"], f"{where}, columns")
    splits = _mapping(entry.get("split", {}), SPLITS, f"{where}, split")
    for split, theirs in splits.items():
        if not isinstance(theirs, str):
            raise InputError(f"{where}, split: {split!r} must be the name of a split of the data")
    for key in ("path", "name", "revision"):
        if not isinstance(entry.get(key, ""), str | None):
            raise InputError(f"{where}: {key!r} must be a text; put it in quotes")
    if "data_files" in entry and not _are_files(entry["data_files"]):
        raise InputError(
            f"{where}: 'data_files' must be the name of a file, a list of names, or either for "
            "each split"
        )
    rows = cache(partial(_loaded, entry, splits, where, folder, cache_dir))

    def records() -> Iterator[Mapping[str, Any]]:
        return checked(_records(rows(), columns, where), task, where)

    return TaskSource(
        place=where,
        records=records,
        # Each row holds the name of its task, so two tasks with the same rows are two tables.
        key=lambda: [
            task,
            columns,
            splits,
            {name: rows_key(part) for name, part in rows().items()},
            *_saved_key(folder / entry["path"]),
        ],
        info=_info(entry, columns, where),
    )


def _are_files(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value) and all(
            isinstance(split, str) and not isinstance(part, dict) and _are_files(part)
            for split, part in value.items()
        )
    names = value if isinstance(value, list) else [value]
    return bool(names) and all(isinstance(name, str) and name for name in names)


def _columns(entry: Any, where: str) -> dict[str, Any]:
    columns = _mapping(entry, COLUMN_KEYS, where)
    if "messages" in columns:
        if len(columns) > 1:
            raise InputError(f"{where}: 'messages' is the whole example; remove the other keys")
        names = columns["messages"]
        names = names if isinstance(names, list) and names else [names]
        if not all(isinstance(name, str) for name in names):
            raise InputError(
                f"{where}: 'messages' must be the name of a column, or a list of columns whose "
                "turns follow one another"
            )
        return columns
    _mapping(columns, COLUMN_KEYS, where, needs=("input",))
    if ("target" in columns) == ("answer" in columns):
        raise InputError(
            f"{where}: give either 'target', the text of the answer, or 'answer', its "
            "place among the choices from 0"
        )
    if "answer" in columns and "choices" not in columns:
        raise InputError(f"{where}: 'answer' is a place among 'choices'; add them")
    if not isinstance(columns.get("labels"), list | dict | None):
        raise InputError(f"{where}: 'labels' must be a list or a mapping of texts")
    return columns


def _info(entry: Mapping[str, Any], columns: Mapping[str, Any], where: str) -> TaskInfo:
    has_choices = "choices" in columns or "labels" in columns
    usual = {"category": "", "metric": "accuracy" if has_choices else "exact_match"}
    described = {name: entry[name] for name in ("category", "metric", "role") if name in entry}
    # A role may be left out here; if it is given, it is checked as in `roles.json`.
    info = check_entry({**usual, "role": "train", **described, "choices": has_choices}, where)
    return info if "role" in entry else TaskInfo(info.category, info.metric, None, has_choices)


def _loaded(
    entry: Mapping[str, Any],
    splits: Mapping[str, str],
    where: str,
    folder: Path,
    cache_dir: str | Path | None,
) -> dict[str, datasets.Dataset]:
    """The rows of each split."""
    options: dict[str, Any] = {
        "revision": entry.get("revision"),
        "cache_dir": None if cache_dir is None else str(cache_dir),
    }
    if "data_files" in entry:
        options["data_files"] = _beside(folder, entry["data_files"])
        if entry["path"] == "csv" and str(entry["data_files"]).endswith(".tsv"):
            options["sep"] = "\t"
    elif entry["path"] in _LOCAL:
        raise InputError(f"{where}: the path {entry['path']!r} is a format; add 'data_files'")
    path, name = str(entry["path"]), entry.get("name")
    if path not in _LOCAL and (folder / path).is_dir():
        if is_saved(folder / path):
            return _saved(folder / path, splits, where)
        path = str(folder / path)
    options["files"] = _local_files(path, options.get("data_files"))
    if splits:
        found = {
            ours: load(where, path, name, split=theirs, **options)
            for ours, theirs in splits.items()
        }
    else:
        whole = load(where, path, name, **options)
        found = {split: whole[split] for split in SPLITS if split in whole}
        if not found:
            raise InputError(
                f"{where}: the data has the splits {', '.join(whole)}; say which of them to use, "
                f"such as split: {{train: {next(iter(whole))}}}"
            )
    return {split: part.flatten() for split, part in found.items()}


def _saved(folder: Path, splits: Mapping[str, str], where: str) -> dict[str, datasets.Dataset]:
    """The rows of each split of what `save_to_disk` wrote; all are for training if it has none."""
    found = {split or "train": path for split, path in saved_splits(folder).items()}
    for theirs in splits.values():
        if split_of(theirs) not in found:
            raise InputError(
                f"{where}, split: {folder} has no split {theirs!r}; {did_you_mean(theirs, found)}"
            )
    chosen = splits or {split: split for split in found}
    return {
        ours: load_saved(found[split_of(theirs) or theirs]).flatten()
        for ours, theirs in chosen.items()
    }


def _saved_key(place: Path) -> list[Any]:
    """What changes when `save_to_disk` writes other rows to the same files."""
    paths = saved_splits(place).values() if is_saved(place) else ()
    return [rows_file_key(path) for path in paths]


def _beside(folder: Path, files: Any) -> Any:
    """The file names, with relative ones resolved against the folder of the YAML file."""
    if isinstance(files, dict):
        return {split: _beside(folder, part) for split, part in files.items()}
    if isinstance(files, list):
        return [_beside(folder, part) for part in files]
    return files if "://" in str(files) else str(folder / expanded(str(files)))


def _local_files(path: str, data_files: Any) -> list[Path]:
    """The files on this machine that the rows come from."""
    found = [] if path in _LOCAL else _beneath(Path(path))
    for name in _names(data_files):
        if "**" in name:
            _beneath(Path(re.split(r"[*?[]", name)[0]).parent)  # which refuses a whole disk
        # Not Path.glob, which takes no absolute pattern.
        found += map(Path, sorted(glob(name, recursive=True)))  # noqa: PTH207
    return found


def _beneath(folder: Path) -> list[Path]:
    """The files in a folder and below, but hidden ones.

    Raises:
        InputError: there are too many.
    """
    found: list[Path] = []
    count = 0
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        count += len(folders) + len(names)
        if count > MOST_FILES:
            raise InputError(
                f"{folder} has more than {MOST_FILES:,} files below it; name a folder that holds "
                "the data alone"
            )
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(file for file in found if file.is_file())


def _names(files: Any) -> list[str]:
    """All names of files in what `_beside` made."""
    if isinstance(files, dict | list):
        parts = files.values() if isinstance(files, dict) else files
        return [name for part in parts for name in _names(part)]
    return [] if files is None else [files]


def _records(
    rows: Mapping[str, datasets.Dataset], columns: Mapping[str, Any], where: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    for split, part in rows.items():
        records = records_of(columns, part.features, where)
        for number, row in enumerate(part):
            place = f"{where}, row {number} of {split!r}"
            for record in records(row, place):
                yield place, {**record, "split": split}


def _mapping(
    value: Any, keys: tuple[str, ...], where: str, *, needs: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Check that a value is a mapping with known keys only and all needed keys."""
    if not isinstance(value, dict):
        raise InputError(f"{where}: write a mapping with the keys {', '.join(keys)}")
    for key in value:
        if key not in keys:
            raise InputError(f"{where}: there is no key {key!r}; {did_you_mean(str(key), keys)}")
    for key in needs:
        if value.get(key) in (None, ""):
            raise InputError(f"{where}: the key {key!r} is missing; add it")
    return value
