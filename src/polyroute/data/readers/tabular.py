"""Tables: files of one example, or one conversation, per row, in a shape that people have.

The path is a file, a folder of files, or what `save_to_disk` of `datasets` wrote. A file is named
`<task>.csv`, or `<task>.<split>.csv` if each split has its own file. Otherwise a column `split`
names the split of each row, as `split_of` reads it; without one, all rows are for training. A
column `task` divides the rows among tasks. `polyroute.data.readers.shapes` lists the other columns.
In a folder, an optional `roles.json` has the same form as in a folder of JSONL records.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt

from polyroute.data.readers.files import (
    SUFFIXES,
    Rows,
    class_names,
    is_saved,
    read_rows,
    rows_file_key,
    saved_splits,
)
from polyroute.data.readers.ignored import tell_ignored
from polyroute.data.readers.roles import read_roles
from polyroute.data.readers.shapes import OWN, FileRow, Shape, recognised
from polyroute.data.readers.task_table import TableSuite, TaskSource, written
from polyroute.data.records import alike, cannot_read, checked, read_objects
from polyroute.data.suite import split_of
from polyroute.errors import InputError
from polyroute.host.output import say
from polyroute.host.paths import check_file, check_link, expanded
from polyroute.host.texts import LONGEST_LINE

__all__ = ["TabularSuite", "is_table", "is_tabular"]

_MOST_CHOICES = 100
"""Of more labels than this, the model writes one instead of ranking all."""


class TabularSuite(TableSuite):
    """A suite kept as tables: a file, a folder of files, or a data set saved by `datasets`.

    Opening looks at the first row of each file, and names what is ignored in a folder. If the
    rows name their tasks, the file is read at once; otherwise, when its task is first used. Then a
    note says in which shape it was read.

    Args:
        path: the file or folder; `~` is expanded.
        cache_dir: where the tables are cached; None for the usual cache of `datasets`.

    Raises:
        InputError: the path cannot be read or holds no table, two files define the same split of a
            task, a task has the reserved name, or `roles.json` is malformed.
    """

    def __init__(self, path: str | Path, *, cache_dir: str | Path | None = None) -> None:
        place = expanded(path).resolve()
        in_folder = place.is_dir() and not is_saved(place)
        sources: dict[str, TaskSource] = {}
        for task, files in _task_files(place).items():
            for name, source in _Table(task, files, in_folder).sources(cache_dir).items():
                if name in sources:
                    raise InputError(
                        f"{sources[name].place} and {source.place} both give rows of the task "
                        f"{name!r}; rename the task in one of them, or put all its rows into one"
                    )
                sources[name] = source
        infos = read_roles(place / "roles.json", sources) if in_folder else {}
        described = {t: replace(source, info=infos.get(t)) for t, source in sources.items()}
        super().__init__(_name(place)[0] if place.is_file() else place.name, described, cache_dir)
        if in_folder:
            tell_ignored(place, _tables(place))


def is_table(path: Path) -> bool:
    """Whether the name of a file says that it holds rows."""
    return path.is_file() and path.suffix in SUFFIXES


def is_tabular(folder: Path) -> bool:
    """Whether a folder holds tables rather than JSONL records that name their own splits."""
    return is_saved(folder) or any(
        path.suffix != ".jsonl" or split_of(Path(path.stem).suffix[1:]) or _is_foreign(path)
        for path in _tables(folder)
    )


def _is_foreign(path: Path) -> bool:
    """Whether the first line of a JSONL file is not one of polyroute's own records.

    A record has a split, so in `test.jsonl` records are of a task with that name.
    """
    try:
        _, first = next(read_objects(path))
    except (InputError, StopIteration):
        return False
    if not OWN.needs & set(first):
        return bool(first)
    return split_of(path.stem) is not None and "split" not in first


def _tables(folder: Path) -> list[Path]:
    """The tables of a folder, sorted; hidden files are ignored."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise cannot_read(folder, error) from error
    found = [
        path
        for path in entries
        if not path.name.startswith(".")
        and (is_saved(path) or (is_table(path) and (path.suffix != ".json" or _has_rows(path))))
    ]
    for path in found:
        check_link(path)
    return found


def _has_rows(path: Path) -> bool:
    """Whether a JSON file looks like a list of rows, or rows line by line, not like settings."""
    if path.name == "roles.json":
        return False
    try:
        check_file(path)
        with path.open("rb") as file:
            # A list may be one long line, of which the beginning is enough.
            lines = [file.readline(LONGEST_LINE) for _ in range(2)]
        starts = [line.lstrip(b"\xef\xbb\xbf \t")[:1] for line in lines]
    except OSError as error:
        raise cannot_read(path, error) from error
    return starts[:1] == [b"["] or starts == [b"{", b"{"]


def _name(path: Path) -> tuple[str, str | None]:
    """The task of a file, and its split if the name of the file says so.

    The task of `train.csv` has the name of its folder.
    """
    if path.is_dir():
        return path.name, None
    whole = split_of(path.stem)
    if whole and path.parent.name:
        return path.parent.name, whole
    task, _, last = path.stem.rpartition(".")
    split = split_of(last)
    return (task, split) if task and split else (path.stem, None)


def _task_files(place: Path) -> dict[str, dict[str | None, Path]]:
    """The files of each task by split; the only file of a task, with all splits, is under None."""
    if is_saved(place):
        return {place.name: saved_splits(place)}
    tasks: dict[str, dict[str | None, Path]] = {}
    for path in [place] if place.is_file() else _tables(place):
        task, split = _name(path)
        files = tasks.setdefault(task, {})
        for other in (files[taken] for taken in files if None in (taken, split) or taken == split):
            part = f" in the split {split!r}" if split and split in files else ""
            raise InputError(
                f"{other} and {path.name} both give rows of the task {task!r}{part}; keep one "
                f"file, or one for each split, such as {task}.train{path.suffix}"
            )
        files.update(saved_splits(path) if path.is_dir() else {split: path})
    if not tasks:
        raise InputError(
            f"{place} holds no .csv, .parquet or .jsonl file; a suite has some, or .tsv or .json "
            "files, or folders that save_to_disk wrote"
        )
    return tasks


@dataclass(frozen=True)
class _Table:
    """The files of one task, or of the tasks that their rows name."""

    task: str
    files: Mapping[str | None, Path]
    in_folder: bool
    """Whether the table is one of those in a folder, so that many may be read."""

    def sources(self, cache_dir: str | Path | None) -> dict[str, TaskSource]:
        """Where the records of each task come from."""
        place = ", ".join(map(str, self.files.values()))
        whole = TaskSource(place, self._records, self._key, when_read=self._tell)
        if not self._names_tasks:
            return {self.task: whole}
        rows = written(whole, cache_dir)
        # In Arrow, so that a column of a large file never becomes a list of Python objects.
        codes = rows.data.column("task").combine_chunks().dictionary_encode()
        names = codes.dictionary.to_pylist()
        self._tell(len(rows), f" of {len(names)} task{'s'[: len(names) > 1]}")
        of_task = codes.indices.to_numpy()
        return {
            name: TaskSource(
                place,
                partial(_selected, rows, np.flatnonzero(of_task == code)),
                partial(self._key, name),
            )
            for code, name in enumerate(names)
        }

    @cached_property
    def _first(self) -> tuple[FileRow, Shape]:
        """The first row of all, and its shape."""
        path = next(iter(self.files.values()))
        where, cells = next(read_rows(path))
        row = FileRow(cells, where, path, class_names(path))
        return row, recognised(row)

    @cached_property
    def _names_tasks(self) -> bool:
        """Whether the rows name their tasks; a file that cannot be read is refused on first use."""
        try:
            return "task" in self._first[0].cells
        except InputError:
            return False

    def _tell(self, examples: int, of_tasks: str = "") -> None:
        shape = self._first[1]
        if shape is OWN and self.in_folder and not of_tasks:
            return  # nothing was guessed, and a folder may hold hundreds of such files
        paths = list(self.files.values())
        names = [paths[0].parent] if paths[0].is_dir() and None not in self.files else paths
        name = ", ".join(path.name for path in names)
        unit = "example" if examples == 1 else "examples"
        say(f"reading {name} as {shape.name}: {examples:,} {unit}{of_tasks}")

    def _key(self, *more: str) -> list[Any]:
        return [self.task, *more, *self._file_keys]

    @cached_property
    def _file_keys(self) -> list[Any]:
        # Once, because a file may hold hundreds of tasks, all of which come from one reading.
        return [[split, *rows_file_key(path)] for split, path in self.files.items()]

    def _records(self) -> Iterator[dict[str, Any]]:
        return checked(self._chosen(), None if self._names_tasks else self.task, self.task)

    def _chosen(self) -> Rows:
        """The records, with the labels of their task to choose from if they have labels."""
        if not self._first[1].is_classes:
            yield from self._rows()
            return
        labels: dict[str, dict[str, str]] = {}
        """The labels of each task, each with a description of where it is first."""
        for where, record in self._rows():
            labels.setdefault(record["task"], {}).setdefault(record["target"], where)
        for found in labels.values():
            if twins := alike(found):
                raise InputError(
                    f"{found[twins[1]]}: the label {twins[1]!r} and the label {twins[0]!r} of "
                    "earlier rows differ only in white space around them; write both alike"
                )
        listed = {
            task: sorted(found) if 2 <= len(found) <= _MOST_CHOICES else None
            for task, found in labels.items()
        }
        for where, record in self._rows():
            yield where, {**record, "choices": listed[record["task"]]}

    def _rows(self) -> Rows:
        """The records, as they stand in the files one after the other."""
        shape = self._first[1]
        for split, path in self.files.items():
            names = class_names(path)
            known: set[frozenset[str]] = set()  # the columns of rows so far
            for where, cells in read_rows(path):
                row = FileRow(cells, where, path, names)
                if (columns := frozenset(cells)) not in known:
                    self._check_shape(row, is_first=not known)
                    known.add(columns)
                usual = {**self._of_row(row, split), "instruction": "", "choices": None}
                system = row.optional("system") or None
                for record in shape.records(row):
                    shape.check_prompt(row, record)
                    yield where, {**usual, **record, "system": record.get("system") or system}

    def _check_shape(self, row: FileRow, *, is_first: bool) -> None:
        """Make sure that a row has the shape of the first row of all.

        Raises:
            InputError: it has not, or it is the first of its file and has none.
        """
        first, shape = self._first
        if is_first and recognised(row) is not shape:
            raise InputError(
                f"{row.path} has other columns than {first.path}; give the rows of {self.task!r} "
                "the same columns in every file"
            )
        others = set(row.cells) - set(first.cells)
        # A column that is missing is named by whoever reads it.
        if is_first or not (others and shape.needs <= set(row.cells)):
            return
        foreign = others & shape.unless
        try:
            is_same = not foreign and recognised(row) is shape
        except InputError:
            is_same = False
        if not is_same:
            named = ", ".join(map(repr, sorted(foreign or others)))
            raise InputError(
                f"{row.where}: the row has {named}, which the first row lacks, and with that it is "
                f"not {shape.name}; give every row the same columns"
            )

    def _of_row(self, row: FileRow, split: str | None) -> dict[str, Any]:
        """The task and the split of a row."""
        own = None if row.cells.get("split") == "" else row.cells.get("split")
        own = split_of(own) or own if isinstance(own, str) else own
        if split and own is not None and own != split:
            raise InputError(
                f"{row.where}: the column 'split' is {own!r} but the file is for {split!r}; move "
                "the row or remove the column"
            )
        if "task" in row.cells and not self._names_tasks:
            raise InputError(
                f"{row.where}: the row has a column 'task' but the first has none; give it to "
                "every row or to none"
            )
        task = row.text("task") if self._names_tasks else self.task
        return {"task": task, "split": split or ("train" if own is None else own)}


def _selected(rows: datasets.Dataset, places: npt.NDArray[np.int64]) -> Iterator[dict[str, Any]]:
    for batch in rows.select(places).with_format("arrow").iter(batch_size=1000):
        yield from batch.to_pylist()
