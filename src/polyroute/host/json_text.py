"""JSON that others wrote: whatever Python reads in silence or refuses unclearly is one sentence."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from polyroute.errors import InputError
from polyroute.host.texts import read_text

__all__ = ["DIGITS", "json_type", "parse_json", "type_of_file"]


DIGITS = 300
"""Of a whole number, so that it is within the numbers that floats have."""


class _TwiceError(ValueError):
    """An object has a key twice; Python would keep the last value."""


def parse_json(text: str, where: str, fix: str, *, entry: str = "row") -> Any:
    """The value of a JSON text.

    Args:
        text: the text.
        where: the beginning of error messages.
        fix: what to do about a text that is not JSON.
        entry: what error messages call an entry of a list, if the text is one.

    Raises:
        InputError: the text is not JSON, an object has a key twice, or a number is too long.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_int=_whole)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not valid JSON ({error}); {fix}") from error
    except RecursionError as error:
        raise InputError(f"{where} is not valid JSON: it is too deep; {fix}") from error
    except _TwiceError as error:
        number = _entry_with_twins(text)
        place = where if number is None else f"{where}, {entry} {number}"
        raise InputError(
            f"{place}: an object has the key {error.args[0]!r} twice; remove one of them"
        ) from error
    except ValueError as error:
        raise InputError(
            f"{where}: a number has too many digits to be read; write it as text, in quotes"
        ) from error


def _whole(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"{len(digits)} digits")
    return int(digits)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _TwiceError(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return found


def _entry_with_twins(text: str) -> int | None:
    """The number of the first entry of a list in which an object has a key twice, if it is one."""

    def marked(pairs: list[tuple[str, Any]]) -> Any:
        # A set, which JSON cannot have, marks the object: its entry cannot be written again.
        return found if len(found := dict(pairs)) == len(pairs) else set()

    try:
        entries = json.loads(text, object_pairs_hook=marked)
    except ValueError:  # behind the object there is something else that is wrong
        return None
    for number, entry in enumerate(entries if isinstance(entries, list) else [], start=1):
        try:
            json.dumps(entry)
        except TypeError:
            return number
    return None


def type_of_file(path: Path) -> str | None:
    """The name of the type of the one value in a JSON file; None if the file is not valid JSON."""
    try:
        return json_type(parse_json(read_text(path, "utf-8-sig"), str(path), ""))
    except (OSError, ValueError):
        return None


def json_type(value: Any) -> str:
    """The name of a value's type in JSON."""
    if value is None:
        return "null"
    names = {str: "a string", bool: "a boolean", list: "a list", dict: "an object"}
    usual = "a number" if isinstance(value, int | float) else f"a {type(value).__name__}"
    return names.get(type(value), usual)
