"""Tables of records on disk, one per task, and a suite made of such tasks.

A reader says where the records of each task come from. The table is written to the cache of
`datasets` when the task is first used, and memory-mapped from there.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from polyroute.data.readers.roles import check_names
from polyroute.data.records import FEATURES, cannot_read
from polyroute.data.suite import CHAT, COLUMNS, SPLITS, TaskInfo, check_tasks, quiet_datasets
from polyroute.errors import InputError, did_you_mean
from polyroute.host.paths import check_file

__all__ = [
    "TableSuite",
    "TaskSource",
    "TaskTable",
    "file_key",
    "load",
    "load_files",
    "rows_key",
    "written",
]

# Part of every cache key. Raise it when the checks or the columns change; otherwise tables of
# older versions stay in use.
_TABLE_VERSION = 6

_FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}


@dataclass(frozen=True)
class TaskSource:
    """Where the records of a task come from; nothing is read before the task is used."""

    place: str
    """The name of the source in error messages; usually a path."""
    records: Callable[[], Iterator[Mapping[str, Any]]]
    """Reads the records: in order, checked, with the fields of `FEATURES`."""
    key: Callable[[], Sequence[Any]]
    """What the records depend on, as JSON values. A cached table is used until they change."""
    info: TaskInfo | Callable[[], TaskInfo] | None = None
    """The description of the task, or a function that reads it; None to derive it from the first
    record."""
    when_read: Callable[[int], None] | None = None
    """Called with the number of records when the task is first used."""


class TaskTable:
    """All records of one task as a memory-mapped table, which is read and checked when created.

    Raises:
        InputError: the data is malformed, or the cache cannot be written.
    """

    def __init__(self, task: str, source: TaskSource, cache_dir: str | Path | None) -> None:
        self._task = task
        self._place = source.place
        self.rows = written(source, cache_dir)
        # Read as an array, without a Python object for each record.
        self._codes = self.rows.data.column("split").to_numpy()

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits of the task, in the order of `SPLITS`."""
        return tuple(SPLITS[code] for code in np.unique(self._codes))

    @property
    def has_choices(self) -> bool:
        """Whether the records list answers to choose from; either all do or none does."""
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
        # A range becomes a slice of the table, which is faster than a list of rows.
        chosen = self.rows.select(range(first, last + 1) if contiguous else places)
        several = ["references"] if self.rows[0]["references"] is not None else []
        # Examples of one conversation differ: its first has no history.
        table = self.rows.data
        chat = [name for name in CHAT if table.column(name).null_count < table.num_rows]
        return chosen.select_columns([*COLUMNS, *several, *chat])


class TableSuite:
    """A suite whose tasks are tables; a reader is a subclass that supplies their sources.

    A task is read once, and checked record by record, when its data is first used. An open suite
    keeps the tables that it has read, even if a file changes afterwards.

    Args:
        name: the name of the suite in reports.
        sources: where the records of each task come from, by name of the task.
        cache_dir: where the tables are cached; None for the usual cache of `datasets`.

    Raises:
        InputError: the name of a task cannot be used; see `roles.check_names`.
    """

    def __init__(
        self, name: str, sources: Mapping[str, TaskSource], cache_dir: str | Path | None
    ) -> None:
        check_names((task, source.place) for task, source in sources.items())
        self.name = name
        self.tasks = tuple(sorted(sources))
        self._sources = sources
        self._cache_dir = cache_dir
        self._infos: dict[str, TaskInfo] = {}
        self._tables: dict[str, TaskTable] = {}

    def info(self, task: str) -> TaskInfo:
        """What the suite says about a task.

        Raises:
            InputError: the suite has no such task, or its description is malformed.
        """
        check_tasks(self, [task])
        if task not in self._infos:
            source = self._sources[task]
            info = source.info() if callable(source.info) else source.info
            self._infos[task] = info or _derived(next(source.records()))
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
            InputError: the suite has no such task, the task has no such split, or its data is
                malformed.
        """
        return self._table(task).split(split)

    def _table(self, task: str) -> TaskTable:
        check_tasks(self, [task])
        if task not in self._tables:
            source = self._sources[task]
            table = TaskTable(task, source, self._cache_dir)
            if source.when_read:
                source.when_read(len(table.rows))
            has_choices = table.has_choices
            if source.info and self.info(task).has_choices != has_choices:
                raise InputError(
                    f"the records of the task {task!r} have {'' if has_choices else 'no '}choices "
                    f"but roles.json says otherwise; set its 'choices' to "
                    f"{json.dumps(has_choices)} there"
                )
            self._tables[task] = table
        return self._tables[task]


def _derived(record: Mapping[str, Any]) -> TaskInfo:
    """The description of a task, as far as its first record tells."""
    has_choices = record["choices"] is not None
    return TaskInfo("", "accuracy" if has_choices else "exact_match", None, has_choices)


def file_key(path: Path) -> list[Any]:
    """A value that changes when the content of a file does, for the key of a `TaskSource`.

    The size and the time of a file say too little: archives and copies keep both.

    Raises:
        InputError: the file cannot be read.
    """
    check_file(path)
    try:
        with path.open("rb") as file:
            return [str(path), hashlib.file_digest(file, "blake2b").hexdigest()]
    except OSError as error:
        raise cannot_read(path, error) from error


def load(
    what: str, path: str, name: str | None = None, *, files: Sequence[Path] = (), **options: Any
) -> Any:
    """Load rows with `datasets.load_dataset`, quietly.

    Args:
        what: the beginning of error messages.
        path: a data set on the hub, or a format such as `"parquet"`.
        name: a configuration of the data set.
        files: the local files of the rows, which are prepared again when their content changes.
        **options: options of `datasets.load_dataset`: `split`, `data_files`, `revision`,
            `cache_dir`.

    Raises:
        InputError: the rows cannot be loaded.
    """
    if files:
        options["cache_dir"] = _cache_of(files, options.get("cache_dir"))
    try:
        with quiet_datasets():
            return datasets.load_dataset(path, name, **options)
    # The library raises these for data that is missing, damaged or out of reach.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split()) or type(cause).__name__
        place = f"{path}, {name}" if name else path
        raise InputError(
            f"{what}: {place} cannot be loaded ({reason}); check the name and the files, and "
            "that the hub can be reached"
        ) from error


def _cache_of(files: Sequence[Path], cache_dir: str | None) -> str:
    """The part of the cache for what is in local files now; `datasets` looks at their times."""
    key = json.dumps([file_key(path) for path in files])
    root = Path(cache_dir or datasets.config.HF_DATASETS_CACHE)
    return str(root / "local" / hashlib.sha256(key.encode()).hexdigest()[:32])


def load_files(place: Path, split: str, cache_dir: str | Path | None) -> datasets.Dataset | None:
    """Load one split of a local copy of a data set.

    Args:
        place: a folder with files such as `train-00000-of-00001.parquet`, `train/0000.parquet` or
            `train.jsonl`; or, if all rows are for training, a file without its ending.
        split: the prefix of the file names.
        cache_dir: where the prepared rows are cached; None for the usual cache of `datasets`.

    Returns:
        The rows; None if there are no such files.

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
        files=paths,
        data_files=[str(path) for path in paths],
        split="train",
        cache_dir=None if cache_dir is None else str(cache_dir),
    )


def rows_key(rows: datasets.Dataset) -> list[Any]:
    """A value that changes when the rows of a loaded data set do, for the key of a `TaskSource`."""
    # `datasets` names the folder of a prepared data set by a hash of its sources.
    return [rows.num_rows, *(str(file["filename"]) for file in rows.cache_files)]


def written(source: TaskSource, cache_dir: str | Path | None) -> datasets.Dataset:
    """The table of all records of a source, which is written on first use.

    Raises:
        InputError: the data is malformed, or the cache cannot be written.
    """
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
