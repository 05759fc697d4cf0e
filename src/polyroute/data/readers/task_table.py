"""Tables of records on disk: what a reader makes of one task, and a suite made of such tasks.

A reader says of each task where its records come from; the table is written when the task is
first asked for, stays in the cache of `datasets`, and is memory-mapped from there.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from polyroute.data.records import FEATURES, cannot_read
from polyroute.data.suite import COLUMNS, SPLITS, TaskInfo, check_tasks, quiet_datasets
from polyroute.errors import InputError, did_you_mean

__all__ = ["TableSuite", "TaskSource", "TaskTable", "file_key", "load", "load_files", "rows_key"]

# Part of every cache key. Raise it when the checks or the columns change, or tables that an
# older version wrote go on being used.
_TABLE_VERSION = 2

_FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}


@dataclass(frozen=True)
class TaskSource:
    """Where a task comes from; nothing is read before it is asked for."""

    place: str
    """What errors call it: usually a path."""
    records: Callable[[], Iterator[Mapping[str, Any]]]
    """Its records in order, checked, with the fields of `FEATURES`."""
    key: Callable[[], Sequence[Any]]
    """What the records depend on, as JSON values; a table is used again while they are the same."""
    info: TaskInfo | Callable[[], TaskInfo] | None = None
    """What describes the task, or reads it; None where its first record is all there is."""


class TaskTable:
    """All records of one task as a memory-mapped table, read and checked when made.

    Raises:
        InputError: the data is malformed, or the cache cannot be written.
    """

    def __init__(self, task: str, source: TaskSource, cache_dir: str | Path | None) -> None:
        self._task = task
        self._place = source.place
        self.rows = _written(source, cache_dir)
        # Without making a Python object of each record's split.
        self._codes = self.rows.data.column("split").to_numpy()

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits it has, in the order of `SPLITS`."""
        return tuple(SPLITS[code] for code in np.unique(self._codes))

    @property
    def has_choices(self) -> bool:
        """Whether its records list answers to choose from; all do or none does."""
        return self.rows[0]["choices"] is not None

    def split(self, split: str) -> datasets.Dataset:
        """The examples of one split, in order, with the columns that `Suite.split` promises.

        Raises:
            InputError: there is no such split.
        """
        if split not in SPLITS:
            raise InputError(f"there is no split {split!r}; {did_you_mean(split, SPLITS)}")
        places = np.flatnonzero(self._codes == SPLITS.index(split))
        if len(places) == 0:
            raise InputError(
                f"the task {self._task!r} has no {split!r} split; add such records to "
                f"{self._place} or use one of its splits: {', '.join(self.splits)}"
            )
        first, last = int(places[0]), int(places[-1])
        contiguous = last - first + 1 == len(places)
        # A range becomes a slice of the table; a list of rows has to be looked up at each access.
        chosen = self.rows.select(range(first, last + 1) if contiguous else places)
        several = ["references"] if self.rows[0]["references"] is not None else []
        return chosen.select_columns([*COLUMNS, *several])


class TableSuite:
    """A suite whose tasks are tables; what a reader adds is where they come from.

    A task is read once, checked record by record, when its data is first asked for. An open suite
    keeps to the tables it has, even if a file changes meanwhile.

    Args:
        name: what reports call it.
        sources: where each task comes from, by name.
        cache_dir: where the tables go; None for the usual cache of `datasets`.
    """

    def __init__(
        self, name: str, sources: Mapping[str, TaskSource], cache_dir: str | Path | None
    ) -> None:
        self.name = name
        self.tasks = tuple(sorted(sources))
        self._sources = sources
        self._cache_dir = cache_dir
        self._infos: dict[str, TaskInfo] = {}
        self._tables: dict[str, TaskTable] = {}

    def info(self, task: str) -> TaskInfo:
        """What the suite says of a task.

        Raises:
            InputError: the suite has no such task, or what it says of it is malformed.
        """
        check_tasks(self, [task])
        if task not in self._infos:
            source = self._sources[task]
            info = source.info() if callable(source.info) else source.info
            self._infos[task] = info or _shown(next(source.records()))
        return self._infos[task]

    def splits(self, task: str) -> tuple[str, ...]:
        """The splits that a task has, in the order of `SPLITS`; reads and checks all of its data.

        Raises:
            InputError: the suite has no such task, or its data is malformed.
        """
        return self._table(task).splits

    def split(self, task: str, split: str) -> datasets.Dataset:
        """The examples of one split of a task; see `Suite.split`.

        Raises:
            InputError: the suite has no such task or the task no such split, or its data is
                malformed.
        """
        return self._table(task).split(split)

    def _table(self, task: str) -> TaskTable:
        check_tasks(self, [task])
        if task not in self._tables:
            source = self._sources[task]
            table = TaskTable(task, source, self._cache_dir)
            has_choices = table.has_choices
            if source.info and self.info(task).has_choices != has_choices:
                raise InputError(
                    f"the records of the task {task!r} have {'' if has_choices else 'no '}choices "
                    f"but roles.json says otherwise; set its 'choices' to "
                    f"{json.dumps(has_choices)} there"
                )
            self._tables[task] = table
        return self._tables[task]


def _shown(record: Mapping[str, Any]) -> TaskInfo:
    """What the first record shows of a task."""
    has_choices = record["choices"] is not None
    return TaskInfo("", "accuracy" if has_choices else "exact_match", None, has_choices)


def file_key(path: Path) -> list[Any]:
    """What changes when a file does: for the key of a `TaskSource`.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise cannot_read(path, error) from error
    return [str(path), stat.st_size, stat.st_mtime_ns]


def load(what: str, path: str, name: str | None = None, **options: Any) -> Any:
    """Load rows with `datasets.load_dataset`, quietly.

    Args:
        what: begins the sentence of an error.
        path: a data set of the hub, or a format such as `"parquet"`.
        name: a configuration of the data set.
        **options: of `datasets.load_dataset`: `split`, `data_files`, `revision`, `cache_dir`.

    Raises:
        InputError: it cannot be loaded.
    """
    try:
        with quiet_datasets():
            return datasets.load_dataset(path, name, **options)
    # Everything that the library raises for data that is absent, damaged or not reachable.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split()) or type(cause).__name__
        place = f"{path}, {name}" if name else path
        raise InputError(
            f"{what}: {place} cannot be loaded ({reason}); check the name and the files, and "
            "that the hub can be reached"
        ) from error


def load_files(place: Path, split: str, cache_dir: str | Path | None) -> datasets.Dataset | None:
    """Load one split of a local copy of a data set.

    Args:
        place: a folder with files such as `train-00000-of-00001.parquet`, `train/0000.parquet` or
            `train.jsonl`; or, for training rows alone, a file without its ending.
        split: the beginning of their names.
        cache_dir: where the prepared rows go; None for the usual cache of `datasets`.

    Returns:
        The rows; None where there are no such files.

    Raises:
        InputError: the files cannot be loaded.
    """
    found = [path for form in ("-*", ".*", "/*") for path in sorted(place.glob(split + form))]
    if split == "train":
        found += [path for path in sorted(place.parent.glob(f"{place.name}.*")) if path.is_file()]
    paths = [path for path in found if path.suffix in _FORMATS]
    if not paths:
        return None
    return load(
        str(paths[0]),
        _FORMATS[paths[0].suffix],
        data_files=[str(path) for path in paths],
        split="train",
        cache_dir=None if cache_dir is None else str(cache_dir),
    )


def rows_key(rows: datasets.Dataset) -> list[Any]:
    """What changes when the rows of a loaded data set do: for the key of a `TaskSource`."""
    # The folder of a prepared data set is named by a hash of what it was made from.
    return [rows.num_rows, *(str(file["filename"]) for file in rows.cache_files)]


def _written(source: TaskSource, cache_dir: str | Path | None) -> datasets.Dataset:
    """The table of a task, written on first use."""
    key = json.dumps([_TABLE_VERSION, *source.key()])
    try:
        with quiet_datasets():
            return datasets.Dataset.from_generator(
                source.records,
                features=FEATURES,
                cache_dir=None if cache_dir is None else str(cache_dir),
                split=datasets.NamedSplit("records"),
                fingerprint=hashlib.sha256(key.encode()).hexdigest()[:32],
            )
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__
        if isinstance(cause, InputError):
            raise cause from None
        if isinstance(cause, OSError):
            raise _cannot_cache(source.place, cause) from error
        raise
    except OSError as error:
        raise _cannot_cache(source.place, error) from error


def _cannot_cache(place: str, error: OSError) -> InputError:
    return InputError(
        f"cannot cache the table of {place} ({error}); choose a writable folder with free space, "
        "for example with the environment variable HF_DATASETS_CACHE"
    )
