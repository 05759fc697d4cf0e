"""Shapes of rows that people have, recognised by their columns and turned into records.

`SHAPES` is the whole list. A row of polyroute's own shape has `input` and `target`; these columns
decide, whatever the other columns are.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from polyroute.data.readers.conversations import examples, turns_of
from polyroute.errors import InputError, did_you_mean
from polyroute.host.json_text import json_type, parse_json

__all__ = ["OWN", "SHAPES", "FileRow", "Shape", "recognised", "yaml_for"]

_FORMATS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".json": "json", ".jsonl": "json"}
_DELIMITED = (".csv", ".tsv")
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?")
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")
_PREFERENCE = frozenset({"chosen", "rejected"})
_ONE_FIT = (
    "instruction and output (Alpaca); prompt and completion; messages; conversations (ShareGPT); "
    "text and label; question and answer"
)


@dataclass(frozen=True)
class FileRow:
    """A row of a file, whose cells are read as texts."""

    cells: Mapping[str, Any]
    where: str
    """The beginning of error messages: the file, and the row or line."""
    path: Path
    names: Mapping[str, list[str]]
    """The names of the classes, of each column whose numbers have names."""

    def what(self, column: str) -> str:
        """The beginning of an error message about a cell."""
        return f"{self.where}: the column {column!r}"

    def named(self, column: str) -> Any:
        """The value of a cell, or the name of the class that its number stands for.

        Raises:
            InputError: the number has no name.
        """
        value, names = self.cells.get(column), self.names.get(column)
        if names is None or value is None or isinstance(value, str):
            return value
        if not 0 <= value < len(names):
            raise InputError(
                f"{self.what(column)} is {value}, which names no class (0 to {len(names) - 1}); "
                "remove the rows without a label"
            )
        return names[value]

    def text(self, column: str) -> str:
        """The text of a cell.

        Raises:
            InputError: the cell is missing or null, or holds anything but text.
        """
        value = self.named(column)
        if isinstance(value, str):
            return value
        if value is None:
            how = "is null; write a text" if column in self.cells else "is missing; add it"
            raise InputError(f"{self.what(column)} {how} or remove the row")
        fix = {
            bool: "name the two values with `labels` in a YAML file: "
            + yaml_for(self.path, _labels(column, {False: "no", True: "yes"})),
            list: "write one text; lists are for 'choices' and 'references'",
            dict: "write the part that you mean in a column of its own",
        }.get(type(value), "write it as text, in quotes")
        raise InputError(f"{self.what(column)} is {json_type(value)}, not text; {fix}")

    def optional(self, column: str) -> str:
        """The text of a cell, which is empty if the cell is missing or null."""
        return "" if self.cells.get(column) is None else self.text(column)

    def label(self, column: str) -> str:
        """The name of the class of a row.

        Raises:
            InputError: the class is a number without a name, or is no text at all.
        """
        value = self.named(column)
        # Whatever stands in a CSV file is text, and numbers of classes look like this there.
        is_number = (
            self.path.suffix in _DELIMITED
            and isinstance(value, str)
            and _NUMBER.fullmatch(value.strip())
        )
        if is_number or (isinstance(value, int | float) and not isinstance(value, bool)):
            lines = yaml_for(self.path, _labels(column, ["name of 0", "name of 1"]))
            raise InputError(
                f"{self.what(column)} is the number {value}, which has no name; name the classes "
                f"in a YAML file and give that file instead: {lines}"
            )
        text = self.text(column)
        if not text.strip():
            raise InputError(f"{self.what(column)} is empty; write a label or remove the row")
        return text


def _labels(column: str, labels: Any) -> dict[str, Any]:
    return {"input": "text", "target": column, "labels": labels}


@dataclass(frozen=True)
class Shape:
    """A form that rows have."""

    name: str
    """What users call it."""
    needs: frozenset[str]
    """The columns that a row of this shape has."""
    records: Callable[[FileRow], Iterable[dict[str, Any]]]
    """Makes records of a row: the fields of `FEATURES` but task and split; some may be left out."""
    columns: Mapping[str, str]
    """What a YAML file would say about these columns; nothing if none can say it."""
    unless: frozenset[str] = frozenset()
    """Columns that mean that a row has another shape."""
    is_classes: bool = False
    """Whether the targets are names of classes, from which the model is to choose."""

    def fits(self, columns: Iterable[str]) -> bool:
        """Whether a row with these columns has this shape."""
        there = set(columns)
        return self.needs <= there and not self.unless & there

    def check_prompt(self, row: FileRow, record: Mapping[str, Any]) -> None:
        """Make sure that a record of a row asks something.

        Raises:
            InputError: it does not; the message names the columns of the row.
        """
        if record.get("instruction") or record.get("input") != "":
            return
        asking = [name for key, name in self.columns.items() if key != "target"]
        names = [name for name in asking if name in row.cells]
        if len(names) > 1:
            shown = f"the columns {' and '.join(map(repr, names))} are both empty; fill one of them"
        elif isinstance(row.cells[names[0]], list):
            shown = f"in the column {names[0]!r}, a turn of the user is empty; fill it"
        else:
            shown = f"the column {names[0]!r} is empty; fill it"
        raise InputError(f"{row.where}: {shown} or remove the row")


def _own(row: FileRow) -> Iterable[dict[str, Any]]:
    yield {
        **{name: row.named(name) for name in ("input", "target") if name in row.cells},
        "instruction": row.optional("instruction"),
        **{
            name: _listed(row.cells.get(name), row.what(name)) for name in ("choices", "references")
        },
        "history": _turns(row.cells.get("history"), row.what("history")),
    }


def _listed(value: Any, what: str) -> Any:
    """The list in a cell, given as JSON or with `|` between its entries."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if not text.startswith("["):
        return [part.strip() for part in text.split("|")] if text else None
    return _parsed(text, what, '["yes", "no"] or as yes|no')


def _turns(value: Any, what: str) -> Any:
    """The turns in a cell, given as JSON where a cell is a text."""
    if not isinstance(value, str) or not value.strip():
        return None if value == [] or isinstance(value, str) else value
    if not value.strip().startswith("["):
        return value  # the check of the record says what it must be
    return _parsed(value, what, '[{"role": "user", "content": "..."}, ...]') or None


def _parsed(text: str, what: str, example: str) -> Any:
    fix = f"what begins with a bracket is read as a JSON list: write it as {example}"
    return parse_json(text, what, fix, entry="entry")


def _alpaca(row: FileRow) -> Iterable[dict[str, Any]]:
    if row.cells.get("history"):
        raise InputError(
            f"{row.what('history')} holds earlier turns, which Alpaca has no form for; write the "
            "whole conversation as 'messages'"
        )
    yield {
        "instruction": row.text("instruction"),
        "input": row.optional("input"),
        "target": row.text("output"),
    }


def _completion(row: FileRow) -> Iterable[dict[str, Any]]:
    prompt, completion = row.cells.get("prompt"), row.cells.get("completion")
    if isinstance(row.cells.get("label"), bool):
        raise InputError(
            f"{row.what('label')} says whether the completion is wanted, and training takes every "
            "completion as a target; remove the rows with false, and the column"
        )
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        return [{"input": row.text("prompt"), "target": row.text("completion")}]
    _check_texts_alone(row)
    context = turns_of(prompt, row.what("prompt"))
    answer = turns_of(completion, row.what("completion"))
    what = f"{row.where}: the conversation of the columns 'prompt' and 'completion'"
    return examples([*context, *answer], what, given=len(context))


def _conversation(column: str) -> Callable[[FileRow], Iterable[dict[str, Any]]]:
    def records(row: FileRow) -> Iterable[dict[str, Any]]:
        _check_texts_alone(row)
        return examples(turns_of(row.cells.get(column), row.what(column)), row.what(column))

    return records


def _check_texts_alone(row: FileRow) -> None:
    """Make sure that a conversation says all in its turns."""
    for column in (*_MEDIA, "tools"):
        if row.cells.get(column):
            fix = "write them into the system prompt" if column == "tools" else "describe them"
            raise InputError(
                f"{row.what(column)} belongs to the conversation, and only texts are read; {fix}, "
                "or remove the column"
            )


def _classes(column: str) -> Callable[[FileRow], Iterable[dict[str, Any]]]:
    return lambda row: [{"input": row.text("text"), "target": row.label(column)}]


def _question(row: FileRow) -> Iterable[dict[str, Any]]:
    yield {"input": row.text("question"), "target": row.text("answer")}


OWN = Shape(
    "input and target",
    frozenset({"input", "target"}),
    _own,
    {"instruction": "instruction", "input": "input", "target": "target"},
)
SHAPES = (
    OWN,
    Shape(
        "Alpaca",
        frozenset({"instruction", "output"}),
        _alpaca,
        {"instruction": "instruction", "input": "input", "target": "output"},
    ),
    Shape(
        "prompt and completion",
        frozenset({"prompt", "completion"}),
        _completion,
        {"input": "prompt", "target": "completion"},
    ),
    Shape(
        "messages",
        frozenset({"messages"}),
        _conversation("messages"),
        {"messages": "messages"},
    ),
    Shape(
        "ShareGPT",
        frozenset({"conversations"}),
        _conversation("conversations"),
        {"messages": "conversations"},
    ),
    Shape(
        "text and label",
        frozenset({"text", "label"}),
        _classes("label"),
        {"input": "text", "target": "label"},
        unless=frozenset({"label_text"}),
        is_classes=True,
    ),
    Shape(
        "text and label",
        frozenset({"text", "label_text"}),
        _classes("label_text"),
        {"input": "text", "target": "label_text"},
        is_classes=True,
    ),
    Shape(
        "question and answer",
        frozenset({"question", "answer"}),
        _question,
        {"input": "question", "target": "answer"},
        unless=frozenset({"context", "choices", "options"}),
    ),
)


def recognised(row: FileRow) -> Shape:
    """The shape of a row, usually the first of its file.

    Raises:
        InputError: no shape fits, or several do.
    """
    columns = list(row.cells)
    if OWN.fits(columns):
        return OWN
    if set(columns) >= _PREFERENCE:
        raise _preference(row)
    found = [shape for shape in SHAPES if shape.fits(columns)]
    if len(found) == 1:
        return found[0]
    if found:
        ways = " or ".join(json.dumps(shape.columns) for shape in found[1:])
        raise InputError(
            f"{row.path} could be read as {' or as '.join(shape.name for shape in found)}; "
            f"decide with a YAML file and give that file instead: "
            f"{yaml_for(row.path, found[0].columns)}, or with its columns as {ways}"
        )
    if OWN.needs & set(columns):
        if row.path.suffix in (".json", ".jsonl"):
            return OWN  # the check of the record names the line that lacks a field
        missing = next(name for name in ("input", "target") if name not in columns)
        raise InputError(
            f"{row.path} has no column {missing!r}; add it, or rename a column "
            f"({did_you_mean(missing, columns)})"
        )
    raise _unknown(row, columns)


def _preference(row: FileRow) -> InputError:
    """The error for pairs of a better and a worse answer, with the YAML that takes the better."""
    chosen, asked = row.cells["chosen"], row.cells.get("prompt")
    given = [name for name in ("instruction", "input") if name in row.cells]
    question = next((name for name in ("prompt", "question") if name in row.cells), None)
    meaning: dict[str, Any] = {"input": question or "COLUMN", "target": "chosen"}
    if isinstance(chosen, list):
        meaning = {"messages": ["prompt", "chosen"] if isinstance(asked, list) else "chosen"}
    elif given and question is None:
        meaning = {**{name: name for name in given}, "input": given[-1], "target": "chosen"}
        if given == ["instruction"]:
            meaning = {"input": "instruction", "target": "chosen"}
    return InputError(
        f"{row.path} has the columns 'chosen' and 'rejected', and preferences are not learned; to "
        "train on the chosen answers alone, say so in a YAML file and give that file instead: "
        f"{yaml_for(row.path, meaning)}"
    )


def _unknown(row: FileRow, columns: list[str]) -> InputError:
    """The error for columns that no shape has, with the YAML that says what they mean."""
    if "answers" in columns:
        return InputError(
            f"{row.what('answers')} is {json_type(row.cells['answers'])}, as in SQuAD, and an "
            "example has one target; write one answer of each row as 'target', all of them as the "
            "list 'references', and the context and the question as 'input'"
        )
    options = next((name for name in ("choices", "options") if name in columns), None)
    asked = "{context} {question}" if "context" in columns else "question"
    meaning = {"input": "COLUMN", "target": "COLUMN"}
    if {"question", "answer"} <= set(columns):
        chosen = {"choices": options} if options else {}
        meaning = {"input": asked, "target": "answer", **chosen}
    shown = ", ".join(map(repr, columns[:12])) or "of no name"
    return InputError(
        f"{row.path} has the columns {shown}, which fit no known shape; name them input and "
        f"target, or as one of these: {_ONE_FIT}; or say what they mean in a YAML file and give "
        f"that file instead: {yaml_for(row.path, meaning)}"
    )


def yaml_for(path: Path, columns: Mapping[str, Any]) -> str:
    """The YAML, on one line, that says what the columns of a file beside it mean."""
    source: dict[str, Any] = {"path": path.name}
    if path.suffix in _FORMATS:
        source = {"path": _FORMATS[path.suffix], "data_files": path.name}
    elif (path.parent / "dataset_dict.json").is_file():
        source = {"path": path.parent.name}
    content = {"tasks": {path.name.split(".")[0]: {**source, "columns": dict(columns)}}}
    shown = yaml.safe_dump(content, default_flow_style=True, sort_keys=False, width=10_000)
    return str(shown).strip()
