"""Suites: folders of tasks, read into memory-mapped tables and checked while they are read.

A suite is a folder with one `<task>.jsonl` per task, of which a line is one record as
`polyroute.records` describes it. An optional `roles.json` says of each task
`{"category", "choices", "metric", "role"}`.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import datasets  # type: ignore[import-untyped, unused-ignore]
import numpy as np
from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]

from polyroute.errors import InputError, did_you_mean
from polyroute.records import (
    COLUMNS,
    FEATURES,
    SPLITS,
    cannot_read,
    json_kind,
    prompt,
    read_records,
)

__all__ = [
    "METRICS",
    "RESERVED_TASK",
    "ROLES",
    "SPLITS",
    "JsonlSuite",
    "Metric",
    "Role",
    "Suite",
    "TaskInfo",
    "check_tasks",
    "held_out_tasks",
    "open_suite",
    "prompt",
    "quiet_datasets",
    "training_tasks",
    "validate",
]

Metric = Literal["accuracy", "exact_match", "strict_match", "rougeL"]
Role = Literal["train", "held-out"]

METRICS: tuple[str, ...] = get_args(Metric)
ROLES: tuple[str, ...] = get_args(Role)
RESERVED_TASK = "mu"  # stands for the average of the inventory wherever a task can be named

# Part of every cache key. Raise it when the checks or the columns change, or tables that an
# older version wrote go on being used.
_TABLE_VERSION = 1


@dataclass(frozen=True)
class TaskInfo:
    """What a suite says of a task as a whole.

    Attributes:
        category: a group of related tasks; empty where the suite names none.
        metric: how predictions are scored; "accuracy" ranks the choices of an example.
        role: whether the task is for training or held out; None where the suite does not say.
        has_choices: whether its examples list the answers to choose from.
    """

    category: str
    metric: Metric
    role: Role | None
    has_choices: bool


class Suite(Protocol):
    """Named tasks with their examples; what every reader of a suite offers."""

    @property
    def name(self) -> str:
        """What reports call the suite."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of all tasks, sorted."""

    def info(self, task: str) -> TaskInfo:
        """What the suite says of a task.

        Raises:
            InputError: the suite has no such task, or what it says of it is malformed.
        """

    def splits(self, task: str) -> tuple[str, ...]:
        """The splits that a task has, in the order of `SPLITS`; reads and checks all of its data.

        Raises:
            InputError: the suite has no such task, or its data is malformed.
        """

    def split(self, task: str, split: str) -> datasets.Dataset:
        """The examples of one split of a task, in the suite's order.

        Returns:
            At least one row; columns task, instruction, input, target (strings) and choices
            (list of strings, or None for free text).

        Raises:
            InputError: the suite has no such task or the task no such split, or its data is
                malformed.
        """


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


def open_suite(path: str | Path, *, cache_dir: str | Path | None = None) -> Suite:
    """Open a suite with the reader that fits; for now every suite is a folder of JSONL files.

    Args:
        path: the folder; `~` is expanded.
        cache_dir: where tables go; None for the usual cache of `datasets`.

    Raises:
        InputError: there is no readable suite at the path.
    """
    return JsonlSuite(path, cache_dir=cache_dir)


def training_tasks(suite: Suite) -> tuple[str, ...]:
    """The tasks to train on: all that the suite does not hold out, sorted."""
    return tuple(task for task in suite.tasks if suite.info(task).role != "held-out")


def held_out_tasks(suite: Suite) -> tuple[str, ...]:
    """The tasks that the suite keeps away from training, sorted."""
    return tuple(task for task in suite.tasks if suite.info(task).role == "held-out")


def check_tasks(suite: Suite, names: Iterable[str]) -> tuple[str, ...]:
    """Check that a selection of tasks can be used; it keeps its order.

    Raises:
        InputError: the selection is empty, names a task twice, or names one the suite lacks.
    """
    chosen = tuple(names)
    if not chosen:
        raise InputError(f"no task of the suite {suite.name!r} was chosen; name at least one")
    for position, name in enumerate(chosen):
        if name not in suite.tasks:
            raise InputError(
                f"the suite {suite.name!r} has no task {name!r}; {did_you_mean(name, suite.tasks)}"
            )
        if name in chosen[:position]:
            raise InputError(f"the task {name!r} is named twice; name each task once")
    return chosen


def validate(suite: Suite, tasks: Iterable[str], *, needs: Iterable[str] = ()) -> None:
    """Read and check all data of some tasks, so that a long run fails before any work is lost.

    Shows a progress bar when it takes more than a second. Once read, the data comes from a cache.

    Args:
        suite: the suite.
        tasks: names of its tasks.
        needs: the splits that every one of the tasks must have.

    Raises:
        InputError: the first thing found that is wrong.
    """
    wanted = tuple(needs)
    for task in tqdm(check_tasks(suite, tasks), "checking tasks", delay=1.0, leave=False):
        suite.splits(task)
        for split in wanted:
            suite.split(task, split)


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


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Keep the progress bars and warnings of `datasets` away, and put its settings back after."""
    verbosity = datasets.logging.get_verbosity()
    # HF_DATASETS_DISABLE_PROGRESS_BARS outranks us, and fighting it would only raise a warning.
    shown = (
        datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS is None
        and not datasets.are_progress_bars_disabled()
    )
    datasets.logging.set_verbosity_error()
    if shown:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if shown:
            datasets.enable_progress_bars()


def _split_codes(table: datasets.Dataset) -> Any:
    """The position in `SPLITS` of each record's split, without making a Python object of it."""
    return table.data.column("split").to_numpy()


def _cannot_cache(path: Path, error: OSError) -> InputError:
    return InputError(
        f"cannot cache the table of {path} ({error}); choose a writable folder with free space, "
        "for example with the environment variable HF_DATASETS_CACHE"
    )
