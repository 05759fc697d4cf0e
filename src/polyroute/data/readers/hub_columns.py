"""Turning a row of any data set into a record, as the columns of a YAML file say."""

import string
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import datasets

from polyroute.errors import InputError, did_you_mean

__all__ = ["COLUMN_KEYS", "record_of"]

_Text = Callable[[Mapping[str, Any]], str]

COLUMN_KEYS = ("instruction", "input", "target", "labels", "choices", "answer", "references")


def record_of(
    columns: Mapping[str, Any], features: Mapping[str, Any], where: str
) -> Callable[[Mapping[str, Any], str], dict[str, Any]]:
    """Make the function that turns a row into a record without its split.

    Args:
        columns: the columns of the YAML file, by `COLUMN_KEYS`.
        features: the columns of the data, each with its type.
        where: the beginning of error messages. The function takes the one for its row.

    Raises:
        InputError: a column is missing in the data, or a text is malformed. The function raises it
            if the answer of a row is not among the known ones.
    """
    text = partial(_text, columns=list(features), where=where)
    instruction, given = text(columns.get("instruction", "")), text(columns["input"])
    if _is_constant(columns["input"], features):
        raise InputError(
            f"{where}: the input {columns['input']!r} names no column; "
            f"{did_you_mean(str(columns['input']), features)}"
        )
    labels = columns.get("labels")
    if isinstance(labels, list):
        labels = dict(enumerate(labels))
    named = {str(value): text(label) for value, label in (labels or {}).items()}
    listed = columns.get("choices", list(labels.values()) if labels else None)
    choices = _list_of(listed, features, text)
    references = _list_of(columns.get("references"), features, text)
    target = columns.get("target")
    feature = None if target is None else features.get(target)
    target_text = None if target is None else text(target)

    def answer(row: Mapping[str, Any], options: Any, place: str) -> str:
        if target_text is None:
            return _chosen(row, columns["answer"], options, place)
        value = target_text(row)
        if named:
            if value not in named:
                raise InputError(
                    f"{place}: 'labels' has no {value!r}; {did_you_mean(value, named)}"
                )
            return named[value](row)
        if isinstance(feature, datasets.ClassLabel):
            return str(feature.int2str(int(value)))
        return value

    def record(row: Mapping[str, Any], place: str) -> dict[str, Any]:
        options = None if choices is None else choices(row)
        return {
            "instruction": instruction(row),
            "input": given(row),
            "target": answer(row, options, place),
            "choices": options,
            "references": None if references is None else references(row),
        }

    return record


def _chosen(row: Mapping[str, Any], column: str, options: Any, place: str) -> str:
    try:
        number = int(row[column])
        if number < 0:
            raise IndexError
        return str(options[number])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(
            f"{place}: 'answer' must name a column with the place of the answer among the choices, "
            f"from 0; {column!r} is {row.get(column)!r}"
        ) from error


def _is_constant(wanted: Any, features: Mapping[str, Any]) -> bool:
    return wanted not in features and "{" not in str(wanted)


def _list_of(
    wanted: Any, features: Mapping[str, Any], text: Callable[[Any], _Text]
) -> Callable[[Mapping[str, Any]], Any] | None:
    """The function that makes a list from a row: a list column, or a list of texts."""
    if wanted is None:
        return None
    if isinstance(wanted, list):
        texts = [text(entry) for entry in wanted]
        return lambda row: [entry(row) for entry in texts]
    text(f"{{{wanted}}}")  # refuses a missing column
    return lambda row: row[wanted]


def _text(wanted: Any, *, columns: list[str], where: str) -> _Text:
    """The function that makes a text from a row: a column, or a text with columns in braces."""
    if not isinstance(wanted, str):  # YAML reads a bare yes or 1 as something else
        raise InputError(f"{where}: {wanted!r} must be a text; put it in quotes")
    if wanted in columns:
        return lambda row: _shown(row[wanted])
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
    return lambda row: "".join(
        literal + ("" if column is None else _shown(row[column])) for literal, column, *_ in parts
    )


def _shown(value: Any) -> str:
    return "" if value is None else str(value)
