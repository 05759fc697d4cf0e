"""Values as they are typed on the command line: lists, seeds, grids, and options of readers."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from polyroute.errors import InputError
from polyroute.host.json_text import parse_json
from polyroute.host.yaml_files import parse_yaml
from polyroute.settings import SEEDS

__all__ = ["grid", "names", "pattern", "reader", "replacements", "seeds", "weights"]

NAME = re.compile(r"(?:\\[\\,\s]|[^,\s])(?:\s*(?:\\[\\,\s]|[^,\s]))*")
"""A name in a list: all up to a comma, but for white space around it. What is escaped counts."""
ESCAPED = re.compile(r"\\([\\,\s])")


def names(text: str | None, option: str) -> list[str] | None:
    """`a, b` as a list of names; None stays None.

    A comma in a name has a backslash before it; so has a blank at its beginning or end, and a
    backslash before any of these three.

    Raises:
        InputError: there is no name in it.
    """
    if text is None:
        return None
    found = [ESCAPED.sub(r"\1", part) for part in NAME.findall(text)]
    if not found:
        raise InputError(f"{option} names nothing; give names separated by commas")
    return found


def pattern(text: str | None, option: str) -> str | list[str] | None:
    """Plain names, separated by commas, as a list; anything else is a regular expression."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    plain = all(part.replace("_", "").replace(".", "").isalnum() for part in parts)
    return parts if plain and text != "all-linear" else text


def seeds(text: str, option: str) -> list[int]:
    """`42,1024,0` as numbers.

    Raises:
        InputError: a part is no whole number, is out of range, or is there twice.
    """
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(
            f"{option} {text!r} must be whole numbers separated by commas, such as 42,1024,0"
        ) from error
    if len(set(found)) != len(found) or not all(0 <= seed < SEEDS for seed in found):
        raise InputError(f"{option} {text!r} must be different numbers from 0 to {SEEDS - 1}")
    return found


def grid(texts: Sequence[str] | None, option: str) -> dict[str, list[Any]]:
    """`lr=0.001,0.01` as the name of a setting and its values.

    Raises:
        InputError: a text has another form, or names a setting again.
    """
    found: dict[str, list[Any]] = {}
    for text in texts or ():
        name, equals, values = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not values.strip():
            raise InputError(f"{option} {text!r} must be a setting and values: route_lr=0.03,0.1")
        if name in found:
            raise InputError(f"{option} names {name!r} twice; give all of its values at once")
        found[name] = [_value(value.strip()) for value in values.split(",")]
    return found


def reader(texts: Sequence[str] | None, option: str) -> dict[str, Any] | None:
    """`seed=1024` as the name of an option of a suite's reader and its value.

    Raises:
        InputError: a text has another form, or a value that looks like JSON is not.
    """
    found: dict[str, Any] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"{option} {text!r} must be an option and its value: seed=1024")
        value = value.strip()
        where = f"the value of {option} {text!r}"
        is_json = value.startswith(("{", "["))
        parsed = parse_json(value, where, "correct it") if is_json else _value(value)
        found[name.strip().replace("-", "_")] = parsed
    return found or None  # so that runs from before readers had options can go on


def replacements(texts: Sequence[str] | None, option: str) -> dict[str, Any]:
    """`train.steps=3` as a place in a preset and its value, which is YAML.

    Raises:
        InputError: a text has another form, or its value is not YAML.
    """
    found: dict[str, Any] = {}
    for text in texts or ():
        place, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"{option} {text!r} must be a place and its value: train.steps=3")
        found[place.strip()] = parse_yaml(value, f"the value of {option} {text!r}")
    return found


def weights(texts: Sequence[str] | float, option: str) -> Mapping[str, float] | float:
    """`sql=1` as a name and its weight, or `0.5` as the weight of all.

    Raises:
        InputError: a text has another form, or names a LoRA again.
    """
    if isinstance(texts, int | float):
        return texts
    found: dict[str, float] = {}
    for text in texts:
        name, equals, value = text.rpartition("=")
        number = _value(value)
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise InputError(f"{option} {text!r} must be a name and a number: sql=0.5")
        if not equals and len(texts) == 1:
            return number
        if not equals or name in found:
            why = "is one number for all beside others" if not equals else f"names {name!r} twice"
            raise InputError(f"{option} {text!r} {why}; give each LoRA one weight")
        found[name] = number
    return found or 1.0


def _value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text
