"""Records: the lines of a task file, checked one by one while they are read.

Each line is one record:

    {"instruction": str, "input": str, "target": str, "choices": [str, ...] or null,
     "split": "train", "validation" or "test"}

A record may also have `references`, a list of all acceptable answers with the target among them,
and `task`, which must then be the name of the file. An example of a conversation may have `system`,
its system prompt, and `history`, its earlier turns as a list of `{"role": "user" or "assistant",
"content": str}` in which the two take turns, the user first. Any other key is ignored.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets

from polyroute.data.suite import COLUMNS, SPLITS, prompt
from polyroute.errors import InputError, did_you_mean
from polyroute.host.json_text import json_type, parse_json, type_of_file
from polyroute.host.texts import byte_lines

__all__ = [
    "FEATURES",
    "alike",
    "cannot_read",
    "check_record",
    "checked",
    "read_objects",
    "read_records",
]

_TEXT_FIELDS = ("instruction", "input", "target", "split")
_TURN = ("role", "content")
_SPEAKERS = ("user", "assistant")
FEATURES = datasets.Features(
    {
        **{name: datasets.Value("string") for name in COLUMNS if name != "choices"},
        "choices": datasets.List(datasets.Value("string")),
        "references": datasets.List(datasets.Value("string")),
        "split": datasets.ClassLabel(names=list(SPLITS)),
        "system": datasets.Value("string"),
        "history": datasets.List({name: datasets.Value("string") for name in _TURN}),
    }
)


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The checked records of a task file, in order, with the fields of `FEATURES`.

    Raises:
        InputError: the file cannot be read or is malformed.
    """
    return checked(read_objects(path), path.stem, str(path))


def checked(
    records: Iterable[tuple[str, Mapping[str, Any]]], task: str | None, place: str
) -> Iterator[dict[str, Any]]:
    """Check records one by one; yields them with the fields of `FEATURES`.

    Args:
        records: the records, each with a description of where it comes from.
        task: the name of their task; None if each record has the name of its own as `task`.
        place: a description of where all records come from.

    Raises:
        InputError: there is no record, or one of them is malformed or has other fields than the
            first of its task.
    """
    first: dict[str, dict[str, bool]] = {}
    for where, record in records:
        its_task = record["task"] if task is None else task
        check_record(record, its_task, where)
        lists = {name: record.get(name) is not None for name in ("choices", "references")}
        expected = first.setdefault(its_task, lists)
        for name, there in lists.items():
            if there != expected[name]:
                raise InputError(
                    f"{where}: the field {name!r} is {json_type(record.get(name))} but the first "
                    f"record differs; give {name} to every record of a task or to none"
                )
        yield {**{name: record.get(name) for name in FEATURES}, "task": its_task}
    if not first:
        raise InputError(f"{place} holds no record; remove the file or add one record per line")


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON objects of a JSONL file, each with a description of where it is.

    Raises:
        InputError: the file cannot be read, is not UTF-8, or a line is not a JSON object.
    """
    for where, line in _lines(path):
        try:
            record = _parse(line, where)
        except InputError:
            # Only the first line of a list begins with a bracket, unless each line is a list.
            if path.suffix == ".jsonl" and line.lstrip()[0] == "[" and _is_list(path):
                raise InputError(
                    f"{path} holds one JSON list, and a .jsonl file has an object on each line; "
                    f"rename it to {path.stem}.json"
                ) from None
            raise
        yield where, record


def _is_list(path: Path) -> bool:
    return type_of_file(path) == "a list"


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a file that are not blank, each with a description of where it is."""
    try:
        # Read as bytes, whose lines end only at "\n": JSON text may hold U+2028 and "\r".
        for number, line in enumerate(byte_lines(path), start=1):
            where = f"{path}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{where}: the text is not UTF-8 ({error.reason}); save the file as UTF-8"
                ) from error
            if text.strip():
                yield where, text
    except OSError as error:
        raise cannot_read(path, error) from error


def _parse(line: str, where: str) -> dict[str, Any]:
    record = parse_json(line, where, "write one JSON object per line")
    if not isinstance(record, dict):
        raise InputError(f"{where}: a record must be a JSON object, not {json_type(record)}")
    return record


def check_record(record: Mapping[str, Any], task: str, where: str) -> None:
    """Make sure that a record has every field, and that each has its type.

    Raises:
        InputError: a field is missing or wrong; the message begins with `where`.
    """
    for name in (*_TEXT_FIELDS, "choices"):
        if name not in record:
            raise InputError(f"{where}: the field {name!r} is missing; add it")
    for name in _TEXT_FIELDS:
        _check_text(record[name], f"{where}: the field {name!r}")
    if record["split"] not in SPLITS:
        raise InputError(
            f"{where}: the field 'split' is {record['split']!r} but must be one of "
            f"{', '.join(SPLITS)}"
        )
    if record.get("task") is not None:
        _check_text(record["task"], f"{where}: the field 'task'")
    if record.get("task", task) != task:
        raise InputError(
            f"{where}: the field 'task' is {json.dumps(record['task'])} but the file is for "
            f"{task!r}; move the record or rename the file"
        )
    if not prompt(record["instruction"], record["input"]):
        raise InputError(f"{where}: 'instruction' and 'input' are both empty; fill one of them")
    if record["choices"] is not None:
        _check_choices(record["choices"], record["target"], where)
    _check_additions(record, where)


def _check_additions(record: Mapping[str, Any], where: str) -> None:
    """Check the fields that most records lack."""
    if record.get("references") is not None:
        _check_list(record["references"], "references", where)
        _check_among(record["target"], record["references"], "references", where)
    if record.get("system") is not None:
        _check_text(record["system"], f"{where}: the field 'system'")
    if record.get("history") is not None:
        _check_history(record["history"], f"{where}: the field 'history'")


def _check_history(turns: Any, what: str) -> None:
    if not isinstance(turns, list):
        raise InputError(f"{what} must be a list of turns or null, not {json_type(turns)}")
    ends = "begin with the user's turn and end with the assistant's, before the input"
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or set(turn) != set(_TURN):
            raise InputError(f"{what}: turn {number} must be an object of a role and a content")
        for name in _TURN:
            _check_text(turn[name], f"{what}: the {name} of turn {number}")
        if turn["role"] not in _SPEAKERS:
            raise InputError(
                f"{what}: the role of turn {number} is {turn['role']!r} but must be one of "
                f"{', '.join(_SPEAKERS)}"
            )
        if turn["role"] != _SPEAKERS[1 - number % 2]:
            raise InputError(
                f"{what}: turn {number} is the {turn['role']}'s, and so is the one before it; let "
                f"user and assistant take turns, {ends}"
                if number > 1
                else f"{what}: turn 1 is the assistant's; {ends}"
            )
    if len(turns) % 2:
        raise InputError(f"{what}: the last turn is the user's, as the input is; {ends}")


def _check_choices(choices: Any, target: str, where: str) -> None:
    _check_list(choices, "choices", where)
    if len(choices) < 2:
        raise InputError(
            f"{where}: the field 'choices' has fewer than 2 entries; list every answer that can "
            "be chosen, or null for free text"
        )
    if len(set(choices)) < len(choices):
        raise InputError(f"{where}: the field 'choices' lists an entry twice; list each once")
    if twins := alike(choices):
        raise InputError(
            f"{where}: the field 'choices' lists {twins[0]!r} and {twins[1]!r}, which differ only "
            "in white space around them; list one of them"
        )
    if not all(choice.strip() for choice in choices):
        raise InputError(f"{where}: the field 'choices' lists an empty entry; name it or remove it")
    _check_among(target, choices, "choices", where)


def _check_list(values: Any, name: str, where: str) -> None:
    if not isinstance(values, list):
        raise InputError(
            f"{where}: the field {name!r} must be a list of strings or null, not "
            f"{json_type(values)}"
        )
    for value in values:
        _check_text(value, f"{where}: each entry of the field {name!r}")


def _check_among(target: str, values: list[str], name: str, where: str) -> None:
    if target not in values:
        raise InputError(
            f"{where}: the target {target!r} is not among the {name}; "
            f"{did_you_mean(target, values)}"
        )


def _check_text(value: Any, what: str) -> None:
    if not isinstance(value, str):
        raise InputError(f"{what} must be a string, not {json_type(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can escape half of a surrogate pair
        raise InputError(
            f"{what} has half a surrogate pair (\\ud800 to \\udfff); correct it"
        ) from None


def alike(names: Iterable[str]) -> tuple[str, str] | None:
    """The first two different names, if any, that differ only in white space around them."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.strip(), name)
        if other != name:
            return other, name
    return None


def cannot_read(path: Path, error: OSError) -> InputError:
    """The error to raise when the system cannot read a file or folder."""
    return InputError(
        f"cannot read {path} ({error.strerror}); check that it exists and that you may read it"
    )
