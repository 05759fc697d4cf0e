"""Turning a row of any data set into records, as the columns of a YAML file say."""

import string
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import chain
from typing import Any

import datasets

from polyroute.data.readers.conversations import examples, turns_of
from polyroute.errors import InputError, did_you_mean
from polyroute.host.json_text import json_type

__all__ = ["COLUMN_KEYS", "records_of"]

_Row = Mapping[str, Any]
_Text = Callable[[_Row, str], str]
"""Makes a text of a row; the other argument is the beginning of error messages."""

COLUMN_KEYS = (
    "instruction", "input", "target", "labels", "choices", "answer", "references", "messages",
)  # fmt: skip


def records_of(
    columns: Mapping[str, Any], features: Mapping[str, Any], where: str
) -> Callable[[_Row, str], Iterable[dict[str, Any]]]:
    """Make the function that turns a row into its records without a split.

    Args:
        columns: the columns of the YAML file, by `COLUMN_KEYS`.
        features: the columns of the data, each with its type.
        where: the beginning of error messages. The function takes the one for its row.

    Raises:
        InputError: a column is missing in the data, or a text is malformed. The function raises it
            if a cell is not what its column is used for.
    """
    if "messages" not in columns:
        record = _record_of(columns, features, where)
        return lambda row, place: [record(row, place)]
    wanted = columns["messages"]
    names = wanted if isinstance(wanted, list) else [wanted]
    for name in names:
        if name not in features:
            raise _no_column("messages", name, features, where)
    usual = {"instruction": "", "choices": None}

    def records(row: _Row, place: str) -> Iterable[dict[str, Any]]:
        whats = [f"{place}: the column {name!r}" for name in names]
        parts = [turns_of(row[name], what) for name, what in zip(names, whats, strict=True)]
        turns, context = list(chain.from_iterable(parts)), sum(map(len, parts[:-1]))
        return ({**usual, **each} for each in examples(turns, whats[-1], given=context))

    return records


def _record_of(
    columns: Mapping[str, Any], features: Mapping[str, Any], where: str
) -> Callable[[_Row, str], dict[str, Any]]:
    for key in ("input", "target"):
        wanted = columns.get(key)
        if isinstance(wanted, str) and wanted not in features and "{" not in wanted:
            raise _no_column(key, wanted, features, where)
    text = partial(_text, columns=list(features), where=where)
    answer_text = partial(text, may_be_null=False)
    instruction, given = text(columns.get("instruction", "")), text(columns["input"])
    labels = columns.get("labels")
    if isinstance(labels, list):
        labels = dict(enumerate(labels))
    named = {_key(value): answer_text(label) for value, label in (labels or {}).items()}
    listed = columns.get("choices", list(labels.values()) if labels else None)
    choices = _list_of(listed, features, answer_text)
    references = _list_of(columns.get("references"), features, answer_text)
    target = columns.get("target")
    target_text = None if target is None else _target(target, features, named, answer_text(target))

    def record(row: _Row, place: str) -> dict[str, Any]:
        options = None if choices is None else choices(row, place)
        return {
            "instruction": instruction(row, place),
            "input": given(row, place),
            "target": (
                _chosen(row, columns["answer"], options, place)
                if target_text is None
                else target_text(row, place)
            ),
            "choices": options,
            "references": None if references is None else references(row, place),
        }

    return record


def _target(
    wanted: str, features: Mapping[str, Any], named: Mapping[str, _Text], text: _Text
) -> _Text:
    """The function that makes the target: a text, or the name of a class."""
    feature: Any = features.get(wanted)

    def name_of_class(row: _Row, place: str) -> str:
        number, most = row[wanted], feature.num_classes - 1
        if number is None or not 0 <= number <= most:
            raise InputError(
                f"{place}: the column {wanted!r} is {'null' if number is None else number}, which "
                f"names no class (0 to {most}); remove the rows without a label"
            )
        return str(feature.int2str(number))

    def label(row: _Row, place: str) -> str:
        value = row.get(wanted)
        # Labels may stand for numbers and for true and false, which are no texts.
        shown = _key(value) if isinstance(value, bool | int | float) else text(row, place)
        if shown not in named:
            raise InputError(f"{place}: 'labels' has no {shown!r}; {did_you_mean(shown, named)}")
        return named[shown](row, place)

    if named:
        return label
    return name_of_class if isinstance(feature, datasets.ClassLabel) else text


def _key(value: Any) -> str:
    """A value as `labels` names it; numbers of classes are often kept as 1.0, and 1 is meant."""
    is_whole = isinstance(value, float) and value.is_integer()
    return str(int(value) if is_whole else value)


def _no_column(key: str, wanted: Any, features: Mapping[str, Any], where: str) -> InputError:
    return InputError(
        f"{where}: the {key} {wanted!r} names no column; {did_you_mean(str(wanted), features)}"
    )


def _chosen(row: _Row, column: str, options: Any, place: str) -> str:
    try:
        given = row[column]
        number = int(given)
        is_whole = isinstance(given, str) or (number == given and not isinstance(given, bool))
        if number < 0 or not is_whole:
            raise IndexError
        return str(options[number])
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise InputError(
            f"{place}: 'answer' must name a column with the place of the answer among the choices, "
            f"from 0; {column!r} is {row.get(column)!r}"
        ) from error


def _list_of(
    wanted: Any, features: Mapping[str, Any], text: Callable[[Any], _Text]
) -> Callable[[_Row, str], Any] | None:
    """The function that makes a list from a row: a list column, or a list of texts."""
    if wanted is None:
        return None
    if isinstance(wanted, list):
        texts = [text(entry) for entry in wanted]
        return lambda row, place: [entry(row, place) for entry in texts]
    text(f"{{{wanted}}}")  # refuses a missing column
    return lambda row, place: row[wanted]


def _text(wanted: Any, *, columns: list[str], where: str, may_be_null: bool = True) -> _Text:
    """The function that makes a text from a row: a column, or a text with columns in braces."""
    if not isinstance(wanted, str):  # YAML reads a bare yes or 1 as something else
        raise InputError(f"{where}: {wanted!r} must be a text; put it in quotes")
    if wanted in columns:
        return lambda row, place: _shown(row, wanted, place, may_be_null)
    # Only names of columns may stand between braces, so that nothing else of a row is reachable.
    try:
        parts = list(string.Formatter().parse(wanted))
    except ValueError as error:
        raise InputError(f"{where}: in {wanted!r}: {error}; write {{{{ for a brace") from error
    for _, column, form, conversion in parts:
        if form or conversion:
            raise InputError(f"{where}: {wanted!r}: put only the name of a column between braces")
        if column is not None and column not in columns:
            raise InputError(
                f"{where}: {wanted!r} needs the column {column!r}, which the data does not have; "
                f"{did_you_mean(column, columns)}"
            )

    def filled(row: _Row, place: str) -> str:
        return "".join(
            literal + ("" if name is None else _shown(row, name, place, may_be_null, True))
            for literal, name, *_ in parts
        )

    return filled


def _shown(row: _Row, column: str, place: str, may_be_null: bool, in_braces: bool = False) -> str:
    """The text of a cell; a number is one only where braces ask for it."""
    value = row[column]
    if isinstance(value, str):
        return value
    what = f"{place}: the column {column!r} is"
    if value is None:
        if may_be_null:
            return ""
        raise InputError(f"{what} null, but an answer needs a text; remove the row")
    if isinstance(value, bool):
        raise InputError(
            f"{what} a boolean, not text; if it is the target, add "
            'labels: {false: "no", true: "yes"}; otherwise write it as text'
        )
    if not isinstance(value, int | float):
        raise InputError(
            f"{what} {json_type(value)}, not text; write the part that you mean in a column of its "
            "own"
        )
    if not in_braces:
        raise InputError(
            f'{what} a number, not text; write "{{{column}}}" to use numbers as text, or, if it is '
            "the target, name its values with labels"
        )
    return str(value)
