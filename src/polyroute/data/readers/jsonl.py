"""Suites kept as JSONL: checked while they are read into memory-mapped tables.

Such a suite is a folder with one `<task>.jsonl` per task. Each line is one record, as
`polyroute.data.records` describes it. An optional `roles.json` describes tasks by
`{"category", "choices", "metric", "role"}`.
"""

from functools import partial
from pathlib import Path

from polyroute.data.readers.ignored import tell_ignored
from polyroute.data.readers.roles import read_roles
from polyroute.data.readers.task_table import TableSuite, TaskSource, file_key
from polyroute.data.records import cannot_read, read_records
from polyroute.errors import InputError
from polyroute.host.paths import check_link, expanded

__all__ = ["JsonlSuite"]


class JsonlSuite(TableSuite):
    """A suite kept as a folder of JSONL files.

    Opening lists the folder, names what is ignored there, and reads `roles.json`. A task that
    `roles.json` does not describe has no role and no category; its metric is accuracy if its first
    record has choices, and exact_match otherwise.

    Args:
        path: the folder; `~` is expanded.
        cache_dir: where the tables are cached; None for the usual cache of `datasets`.

    Raises:
        InputError: the folder cannot be listed or holds no `.jsonl` file, two files define the same
            task, a task has the reserved name, or `roles.json` is malformed.
    """

    def __init__(self, path: str | Path, *, cache_dir: str | Path | None = None) -> None:
        folder = expanded(path).resolve()
        files = _task_files(folder)
        infos = read_roles(folder / "roles.json", files)
        sources = {
            task: TaskSource(
                place=str(file),
                records=partial(read_records, file),
                key=partial(file_key, file),
                info=infos.get(task),
            )
            for task, file in files.items()
        }
        super().__init__(folder.name, sources, cache_dir)
        tell_ignored(folder, files.values())


def _task_files(folder: Path) -> dict[str, Path]:
    """The task files of a folder by task, sorted; hidden files are ignored."""
    try:
        entries = sorted(folder.iterdir())
    except FileNotFoundError:
        raise InputError(
            f"there is no suite at {folder}; give a file of examples, or a folder with a .jsonl "
            "file for each task"
        ) from None
    except NotADirectoryError:
        raise InputError(
            f"{folder} is a file of no known format; give a .json, .jsonl, .csv, .tsv or .parquet "
            "file, or the folder that holds the .jsonl files of the suite"
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
    for path in files.values():
        check_link(path)
    return dict(sorted(files.items()))
