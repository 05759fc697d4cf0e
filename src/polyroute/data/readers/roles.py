"""`roles.json`, which describes tasks of a folder: `{"category", "choices", "metric", "role"}`."""

import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from polyroute.data.records import cannot_read
from polyroute.data.suite import METRICS, RESERVED_TASK, ROLES, TaskInfo
from polyroute.errors import InputError, did_you_mean
from polyroute.host.json_text import json_type, parse_json
from polyroute.host.paths import check_link
from polyroute.host.texts import read_text
from polyroute.task_names import composed, described

__all__ = ["check_entry", "check_names", "read_roles"]

LONGEST = 200
"""Bytes of a part of a name. File systems allow 255, and polyroute adds to it."""
DEVICES = {"con", "prn", "aux", "nul", *(f"{n}{i}" for n in ("com", "lpt") for i in range(1, 10))}
"""What Windows takes for a device, with any ending."""
FILES_OF_RUNS = (
    "run.json", "results.json", "metrics.json", "alignment.json", "compare.json", "evaluate*.json",
    "polyroute.json",
)  # fmt: skip
"""What commands write to the folder of a run, or look for in it, beside the folders of tasks."""
RESULTS = re.compile(r"seed-\d+")
"""Names the folders in that of a task, in which its results are."""


def check_names(places: Iterable[tuple[str, str | Path]]) -> None:
    """Refuse names of tasks that another file system or another part of a run could confuse.

    Args:
        places: each task with the file that defines it.

    Raises:
        InputError: a name is reserved, it cannot name a folder of results, two names differ only in
            case or in white space around them, or one names a folder in the results of another.
    """
    seen: dict[str, tuple[str, str | Path]] = {}
    for task, path in places:
        if why := _fault_as_folder(task):
            raise InputError(f"{path} defines a task called {task[:LONGEST]!r}, {why}; rename it")
        _check_windows(task, path)
        key = composed(task.strip().casefold())
        if key == RESERVED_TASK:
            raise InputError(
                f"{path} defines a task called {task!r}, the name kept for the average of the "
                "inventory; rename it"
            )
        if key in seen:
            other, place = seen[key]
            raise InputError(
                f"the tasks {other!r} of {place} and {task!r} of {Path(path).name} differ only in "
                f"{_difference(other, task)}; rename one of them"
            )
        seen[key] = task, path
    _check_apart(seen)


def _fault_as_folder(task: str) -> str | None:
    """Why a run cannot keep the results of a task in a folder of its name; None if it can."""
    parts = task.split("/")
    hidden = next((one for one in task if not one.isprintable()), None)
    if hidden is not None:
        return f"with the character {described(hidden)}, which is not shown"
    if any(part.strip() in ("", ".", "..") or len(part.encode()) > LONGEST for part in parts):
        return (
            f"which cannot name a folder of results (at most {LONGEST} bytes between slashes, and "
            "something at each side of a slash)"
        )
    # What begins with a dot is what a run deletes at its end, or after a kill.
    if any(part.startswith(".") for part in parts):
        return "of which a part begins with a dot, as names of files that are not kept do"
    first = parts[0].casefold()
    if any(fnmatchcase(first, pattern) for pattern in FILES_OF_RUNS):
        return f"but {parts[0]!r} is a file that a run writes beside the folders of tasks"
    return None


def _check_apart(seen: Mapping[str, tuple[str, str | Path]]) -> None:
    """Make sure that no task lies in the results of another, which are in `seed-0` and so on."""
    for key, (task, path) in seen.items():
        parts = key.split("/")
        for i, part in enumerate(parts):
            other, _ = seen.get("/".join(parts[:i]), (None, None))
            if other is not None and RESULTS.fullmatch(part):
                raise InputError(
                    f"{path} defines a task called {task!r}, whose folder would lie in the results "
                    f"of the task {other!r}; rename one of them"
                )


def _difference(one: str, other: str) -> str:
    """How two names differ that could be confused."""
    if one.strip() == other.strip():
        return "white space around them"
    if composed(one.strip()) == composed(other.strip()):
        return "how their characters are composed (NFC and NFD of Unicode)"
    return "upper and lower case"


def _check_windows(task: str, path: str | Path) -> None:
    """Refuse, on Windows, what cannot name a folder there."""
    parts = task.split("/")
    is_device = any(part.split(".")[0].strip().casefold() in DEVICES for part in parts)
    is_odd = any(part[-1:] in (".", " ") or set(part) & set('<>:"|?*\\') for part in parts)
    if os.name == "nt" and (is_device or is_odd):
        raise InputError(
            f"{path} defines a task called {task!r}, which cannot name a folder on Windows; rename "
            "it"
        )


def read_roles(path: Path, tasks: Collection[str]) -> dict[str, TaskInfo]:
    """The tasks that `roles.json` describes; none if the file is missing.

    Raises:
        InputError: the file is malformed or names a task that is not among `tasks`.
    """
    check_link(path)
    try:
        text = read_text(path, "utf-8-sig")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise cannot_read(path, error) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error.reason}); save it as UTF-8") from error
    roles = parse_json(text, str(path), "correct or remove it")
    if not isinstance(roles, dict):
        raise InputError(f"{path} must hold one JSON object with a key per task")
    for task in roles:
        if task not in tasks:
            raise InputError(
                f"{path} names the task {task!r}, which has no file; remove the entry or add "
                f"{task}.jsonl ({did_you_mean(task, tasks)})"
            )
    return {task: check_entry(entry, f"{path}, task {task!r}") for task, entry in roles.items()}


def _shown(value: Any) -> str:
    try:
        return json.dumps(value)
    except TypeError:  # a date of YAML, which JSON does not have
        return repr(value)


def check_entry(entry: Any, where: str) -> TaskInfo:
    """Read the entry of one task.

    Raises:
        InputError: the entry is malformed; the message begins with `where`.
    """
    if not isinstance(entry, dict):
        raise InputError(f"{where}: the entry must be a JSON object, not {json_type(entry)}")
    for key, type_, wanted in (
        ("category", str, "a string"),
        ("choices", bool, "true or false"),
        ("metric", str, f"one of {', '.join(METRICS)}"),
        ("role", str, f"one of {', '.join(ROLES)}"),
    ):
        allowed = {"metric": METRICS, "role": ROLES}.get(key)
        value = entry.get(key)
        if not isinstance(value, type_) or (allowed is not None and value not in allowed):
            got = f", not {_shown(value)}" if key in entry else " and is missing"
            raise InputError(f"{where}: {key!r} must be {wanted}{got}")
    if entry["metric"] == "accuracy" and not entry["choices"]:
        raise InputError(
            f"{where}: the metric accuracy needs choices; set 'choices' to true or 'metric' to "
            f"one of {', '.join(m for m in METRICS if m != 'accuracy')}"
        )
    return TaskInfo(entry["category"], entry["metric"], entry["role"], entry["choices"])
