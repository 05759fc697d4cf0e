"""Settings: fields of frozen records, each declared together with all that is known about it.

A field made by `setting` carries the check of its values, its help on the command line, and marks
such as `computes`. Lists of settings are derived from these marks and never written by hand, so a
new field appears in all lists that it belongs to.

    @dataclass(frozen=True, kw_only=True)
    class Example:
        rank: int = setting(4, whole(1), help="Rank of a skill.")

        def __post_init__(self) -> None:
            check_settings(self)
"""

import math
from collections.abc import Callable, Collection
from dataclasses import Field, field, fields
from numbers import Integral, Real
from typing import Any

from polyroute.errors import InputError, did_you_mean

__all__ = [
    "MOST",
    "SEEDS",
    "Check",
    "check_settings",
    "flag",
    "marked",
    "named",
    "names",
    "number",
    "one_of",
    "option_of",
    "setting",
    "text",
    "typed",
    "whole",
]

SEEDS = 2**32
"""Seeds are below this number; numpy takes no others."""
MOST = 2**31 - 1
"""The largest whole number allowed: parts of torch and numpy cannot count further."""
LARGEST = 1e37
"""The largest number allowed: AdamW multiplies a rate by up to ten, and fp32 ends at 3e38."""

Check = Callable[[str, Any], Any]
"""Takes the name of a setting and its value; returns the value to keep, or raises `InputError`."""


def setting(
    default: Any, check: Check | None = None, *, help: str = "", option: str = "", **marks: Any
) -> Any:
    """Declare a field of a record of settings.

    Args:
        default: the value if none is given.
        check: the check of its values; None allows every value.
        help: one line for the command line.
        option: its name on the command line, if that is not the field's name.
        **marks: marks from which lists of settings are derived; see `marked`.
    """
    return field(
        default=default, metadata={"check": check, "help": help, "option": option, **marks}
    )


def check_settings(record: Any) -> None:
    """Check every field of a frozen record, in place, and keep the values that the checks return.

    Raises:
        InputError: a field does not allow its value; the message names the field.
    """
    for declared in fields(record):
        check = declared.metadata.get("check")
        if check is not None:
            value = check(declared.name, getattr(record, declared.name))
            object.__setattr__(record, declared.name, value)


def marked(record: Any, mark: str) -> tuple[str, ...]:
    """The names of the fields of a record, or of its class, that carry a mark."""
    return tuple(declared.name for declared in fields(record) if declared.metadata.get(mark))


def option_of(declared: "Field[Any]") -> str:
    """The name of a field on the command line, with underscores."""
    return str(declared.metadata.get("option") or declared.name)


def typed(name: str) -> str:
    """The name of a flag, which has underscores, as a user types it: `--max-input`."""
    return f"--{name.replace('_', '-')}"


# ------------------------------------------------------------------ checks


def whole(least: int = 1, *, most: int = MOST, optional: bool = False) -> Check:
    """A check for a whole number from `least` to `most`, and None if the setting is optional."""

    def check(name: str, value: Any) -> int | None:
        if value is None and optional:
            return None
        if isinstance(value, bool) or not isinstance(value, Integral):
            wanted = "a positive whole number" if least == 1 else "a whole number"
            raise InputError(f"{name} must be {wanted}, not {value!r}")
        count = int(value)
        if count < least:
            bounds = {0: "must not be negative", 1: "must be a positive whole number"}
            bound = bounds.get(least, f"must be at least {least}")
            raise InputError(f"{name} {bound}, not {value!r}")
        if count > most:
            raise InputError(f"{name} must be at most {most}, not {value!r}")
        return count

    return check


def number(
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    optional: bool = False,
    infinite: bool = False,
) -> Check:
    """A check for a finite number within bounds, None if optional, and inf if `infinite`."""

    def check(name: str, value: Any) -> float | None:
        if value is None and optional:
            return None
        found = _float(name, value, infinite=infinite)
        if above is not None and not found > above:
            bound = "positive" if above == 0 else f"above {above:g}"
            raise InputError(f"{name} must be {bound}, not {value!r}")
        if least is not None and below is not None and not least <= found < below:
            raise InputError(f"{name} must be in [{least:g}, {below:g}), not {value!r}")
        if most is not None and found > most:
            raise InputError(f"{name} must be at most {most:g}, not {value!r}")
        if least is not None and found < least:
            bound = "must not be negative" if least == 0 else f"must be at least {least:g}"
            raise InputError(f"{name} {bound}, not {value!r}")
        return found

    return check


def _float(name: str, value: Any, *, infinite: bool) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputError(f"{name} must be a finite number, not {value!r}")
    try:
        found = float(value)
    except OverflowError:  # a whole number of hundreds of digits, which nobody wants to read
        value = found = math.inf if value == abs(value) else -math.inf
    if math.isnan(found) or (math.isinf(found) and not (infinite and found > 0)):
        raise InputError(f"{name} must be a finite number, not {value!r}")
    if math.isfinite(found) and abs(found) > LARGEST:
        raise InputError(f"{name} must be at most {LARGEST:g}, not {found:g}")
    return found


def one_of(*values: str) -> Check:
    """A check for one of a few names, which the message lists."""

    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in values:
            raise InputError(
                f"{name}={value!r} is not one of {', '.join(map(repr, values))}"
                + (f": {did_you_mean(value, values)}" if isinstance(value, str) else "")
            )
        return value

    check.values = values  # type: ignore[attr-defined]  # the command line offers to complete them
    return check


def named(values: Collection[str]) -> Check:
    """A check for one of many names; the message offers the nearest."""

    def check(name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise InputError(f"{name} must be a name, not {value!r}")
        if value not in values:
            raise InputError(f"unknown {name} {value!r}: {did_you_mean(value, values)}")
        return value

    return check


def flag() -> Check:
    """A check for True or False."""

    def check(name: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise InputError(f"{name} must be True or False, not {value!r}")
        return value

    return check


def text(*, optional: bool = False) -> Check:
    """A check for a text that is not empty, and None if the setting is optional."""

    def check(name: str, value: Any) -> str | None:
        if value is None and optional:
            return None
        if not isinstance(value, str) or not value:
            raise InputError(f"{name} must be a name, not {value!r}")
        return value

    return check


def names(*, optional: bool = False, pattern: bool = False) -> Check:
    """A check for a list of name endings, which is kept as a tuple.

    Args:
        optional: whether None is allowed too.
        pattern: whether a regular expression is allowed too.
    """

    def check(name: str, value: Any) -> str | tuple[str, ...] | None:
        if (value is None and optional) or (isinstance(value, str) and pattern):
            return value
        is_list = isinstance(value, list | tuple | set | frozenset)
        if not is_list or not all(isinstance(ending, str) and ending for ending in value):
            wanted = "a regular expression or a list" if pattern else "a list"
            raise InputError(
                f"{name} must be {wanted} of name endings such as ['q', 'v'], not {value!r}"
            )
        return tuple(value)

    return check
