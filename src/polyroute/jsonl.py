"""Suites kept as JSONL: checked while they are read into memory-mapped tables.

Such a suite is a folder with one `<task>.jsonl` per task, of which a line is one record as
`polyroute.records` describes it. An optional `roles.json` says of each task
`{"category", "choices", "metric", "role"}`.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from polyroute.errors import InputError, did_you_mean
from polyroute.records import FEATURES, cannot_read, json_kind, read_records
from polyroute.suite import (
    COLUMNS,
    METRICS,
    RESERVED_TASK,
    ROLES,
    SPLITS,
    Metric,
    TaskInfo,
    check_tasks,
    quiet_datasets,
)

__all__ = ["JsonlSuite"]

# Part of every cache key. Raise it when the checks or the columns change, or tables that an
# older version wrote go on being used.
_TABLE_VERSION = 1


class JsonlSuite:
    """A suite kept as a folder of JSONL files.

    Opening lists the folder and reads `roles.json`. A task file is read once, checked line by
    line, when its data is first asked for; what stays is an Arrow table in the cache of
    `datasets`, memory-mapped and used again until the file's path, size or time of change
    differs. An open suite keeps to the tables it has, even if a file changes meanwhile.

    Args:
        path: the folder; `~` is expanded.
        cache_dir: where the tables go; None for the usual cache of `datasets`.

    Raises:
        InputError: the folder cannot be listed or holds no `.jsonl` file, two files give the same
            task, a task has the reserved name, or `roles.json` is malformed.
    """

    def __init__(self, path: str | Path, *, cache_dir: str | Path | None = None) -> None:
        folder = Path(path).expanduser().resolve()
        self.name = folder.name
        self._files = _task_files(folder)
        self.tasks = tuple(self._files)
        self._roles = _read_roles(folder / "roles.json", self.tasks)
        self._cache_dir = cache_dir
        self._infos: dict[str, TaskInfo] = {}
        self._tables: dict[str, datasets.Dataset] = {}

    def info(self, task: str) -> TaskInfo:
        """What `roles.json` says of a task, or else what its first record shows.

        A task that `roles.json` leaves out has no role and no category; its metric is accuracy
        if the first record has choices and exact_match if not.

        Raises:
            InputError: the suite has no such task, or its first record is malformed.
        """
        check_tasks(self, [task])
        if task in self._roles:
            return self._roles[task]
        if task not in self._infos:
            has_choices = next(read_records(self._files[task]))["choices"] is not None
            metric: Metric = "accuracy" if has_choices else "exact_match"
            self._infos[task] = TaskInfo("", metric, None, has_choices)
        return self._infos[task]

    def splits(self, task: str) -> tuple[str, ...]:
        """The splits that a task has, in the order of `SPLITS`; reads and checks its whole file.

        Raises:
            InputError: the suite has no such task, or its file is malformed.
        """
        present = np.unique(_split_codes(self._table(task)))
        return tuple(SPLITS[code] for code in present)

    def split(self, task: str, split: str) -> datasets.Dataset:
        """The examples of one split of a task, in the order of the file.

        Returns:
            At least one row; columns task, instruction, input, target (strings) and choices
            (list of strings, or None for free text). The rows stay on disk.

        Raises:
            InputError: the suite has no such task or the task no such split, or its file is
                malformed.
        """
        if split not in SPLITS:
            raise InputError(f"there is no split {split!r}; {did_you_mean(split, SPLITS)}")
        table = self._table(task)
        rows = np.flatnonzero(_split_codes(table) == SPLITS.index(split))
        if len(rows) == 0:
            raise InputError(
                f"the task {task!r} has no {split!r} split; add such records to "
                f"{self._files[task]} or use one of its splits: {', '.join(self.splits(task))}"
            )
        first, last = int(rows[0]), int(rows[-1])
        contiguous = last - first + 1 == len(rows)
        # A range becomes a slice of the table; a list of rows has to be looked up at each access.
        chosen = table.select(range(first, last + 1) if contiguous else rows)
        return chosen.select_columns(list(COLUMNS))

    def _table(self, task: str) -> datasets.Dataset:
        check_tasks(self, [task])
        if task not in self._tables:
            table = _arrow_table(self._files[task], self._cache_dir)
            _check_against_roles(task, table, self._roles)
            self._tables[task] = table
        return self._tables[task]


def _task_files(folder: Path) -> dict[str, Path]:
    """The task files of a folder by task, sorted; hidden files do not count."""
    try:
        entries = sorted(folder.iterdir())
    except FileNotFoundError:
        raise InputError(
            f"there is no suite at {folder}; give a folder with one .jsonl file per task"
        ) from None
    except NotADirectoryError:
        raise InputError(
            f"{folder} is a file; give the folder that holds the .jsonl files of the suite"
        ) from None
    except OSError as error:
        raise cannot_read(folder, error) from error
    files = {
        path.stem: path
        for path in entries
        if path.suffix == ".jsonl" and not path.name.startswith(".")
    }
    if not files:
        raise InputError(f"{folder} holds no .jsonl file; a suite has one per task")
    _check_names(files)
    return dict(sorted(files.items()))


def _check_names(files: Mapping[str, Path]) -> None:
    """Refuse names that another file system, or another part of a run, could confuse."""
    seen: dict[str, Path] = {}
    for task, path in files.items():
        key = task.casefold()
        if key == RESERVED_TASK:
            raise InputError(
                f"{path} gives a task called {task!r}, the name kept for the average of the "
                "inventory; rename the file"
            )
        if key in seen:
            raise InputError(
                f"{seen[key]} and {path.name} give the same task but for upper and lower case; "
                "rename one of them"
            )
        seen[key] = path


def _read_roles(path: Path, tasks: tuple[str, ...]) -> dict[str, TaskInfo]:
    """The tasks that `roles.json` describes; none where the file is missing."""
    try:
        roles = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise cannot_read(path, error) from error
    except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON
        raise InputError(f"{path} is not valid JSON ({error}); correct or remove it") from error
    if not isinstance(roles, dict):
        raise InputError(f"{path} must hold one JSON object with a key per task")
    for task in roles:
        if task not in tasks:
            raise InputError(
                f"{path} names the task {task!r}, which has no file; remove the entry or add "
                f"{task}.jsonl ({did_you_mean(task, tasks)})"
            )
    return {task: _role_entry(entry, f"{path}, task {task!r}") for task, entry in roles.items()}


def _role_entry(entry: Any, where: str) -> TaskInfo:
    if not isinstance(entry, dict):
        raise InputError(f"{where}: the entry must be a JSON object, not {json_kind(entry)}")
    for key, kind, wanted in (
        ("category", str, "a string"),
        ("choices", bool, "true or false"),
        ("metric", str, f"one of {', '.join(METRICS)}"),
        ("role", str, f"one of {', '.join(ROLES)}"),
    ):
        allowed = {"metric": METRICS, "role": ROLES}.get(key)
        value = entry.get(key)
        if not isinstance(value, kind) or (allowed is not None and value not in allowed):
            got = f", not {json.dumps(value)}" if key in entry else " and is missing"
            raise InputError(f"{where}: {key!r} must be {wanted}{got}")
    if entry["metric"] == "accuracy" and not entry["choices"]:
        raise InputError(
            f"{where}: the metric accuracy needs choices; set 'choices' to true or 'metric' to "
            "exact_match, strict_match or rougeL"
        )
    return TaskInfo(entry["category"], entry["metric"], entry["role"], entry["choices"])


def _check_against_roles(task: str, table: datasets.Dataset, roles: Mapping[str, TaskInfo]) -> None:
    """Refuse a task whose records have choices where `roles.json` says none, or none where some."""
    has_choices = table[0]["choices"] is not None
    if task in roles and roles[task].has_choices != has_choices:
        raise InputError(
            f"the records of the task {task!r} have {'' if has_choices else 'no '}choices but "
            f"roles.json says otherwise; set its 'choices' to {json.dumps(has_choices)} there"
        )


def _arrow_table(path: Path, cache_dir: str | Path | None) -> datasets.Dataset:
    """All records of a task file as a memory-mapped table, written on first use."""
    fingerprint = _fingerprint(path)
    try:
        with quiet_datasets():
            return datasets.Dataset.from_generator(
                read_records,
                features=FEATURES,
                gen_kwargs={"path": path},
                cache_dir=None if cache_dir is None else str(cache_dir),
                split=datasets.NamedSplit("records"),
                fingerprint=fingerprint,
            )
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__
        if isinstance(cause, InputError):
            raise cause from None
        if isinstance(cause, OSError):
            raise _cannot_cache(path, cause) from error
        raise
    except OSError as error:
        raise _cannot_cache(path, error) from error


def _fingerprint(path: Path) -> str:
    try:
        stat = path.stat()
    except OSError as error:
        raise cannot_read(path, error) from error
    key = json.dumps([_TABLE_VERSION, str(path), stat.st_size, stat.st_mtime_ns])
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def _split_codes(table: datasets.Dataset) -> Any:
    """The position in `SPLITS` of each record's split, without making a Python object of it."""
    return table.data.column("split").to_numpy()


def _cannot_cache(path: Path, error: OSError) -> InputError:
    return InputError(
        f"cannot cache the table of {path} ({error}); choose a writable folder with free space, "
        "for example with the environment variable HF_DATASETS_CACHE"
    )
