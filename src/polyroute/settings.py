"""Settings: fields of frozen records that say, where they are declared, all that is known of them.

A field made by `setting` carries the check of its values, its help on the command line, and marks
such as `computes`. Lists of settings are derived from these marks and never written by hand, so a
new field arrives wherever it belongs.

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
    "whole",
]

MOST = 2**31 - 1
"""No whole number may be larger: torch and numpy cannot count further everywhere."""
LARGEST = 1e37
"""No number may be larger: AdamW multiplies a rate by up to ten, and fp32 ends at 3e38."""

Check = Callable[[str, Any], Any]
"""From the name of a setting and its value to the value that is kept; raises `InputError`."""


def setting(
    default: Any, check: Check | None = None, *, help: str = "", option: str = "", **marks: Any
) -> Any:
    """Declare a field of a record of settings.

    Args:
        default: what holds where nothing is given.
        check: what its values must be.
        help: one line for the command line.
        option: its name on the command line, where that is another than the field's.
        **marks: what lists of settings are derived from; see `marked`.
    """
    return field(
        default=default, metadata={"check": check, "help": help, "option": option, **marks}
    )


def check_settings(record: Any) -> None:
    """Check every field of a record, and keep the values as the checks return them.

    Raises:
        InputError: a value is not what the field allows; the message names the field.
    """
    for one in fields(record):
        check = one.metadata.get("check")
        if check is not None:
            object.__setattr__(record, one.name, check(one.name, getattr(record, one.name)))


def marked(record: Any, mark: str) -> tuple[str, ...]:
    """The names of the fields of a record, or of its class, that carry a mark."""
    return tuple(one.name for one in fields(record) if one.metadata.get(mark))


def option_of(one: "Field[Any]") -> str:
    """What a field is called on the command line, with underscores."""
    return str(one.metadata.get("option") or one.name)


# ------------------------------------------------------------------ checks


def whole(least: int = 1, *, most: int = MOST, optional: bool = False) -> Check:
    """A whole number from `least` to `most`; also None if it is optional."""

    def check(name: str, value: Any) -> int | None:
        if value is None and optional:
            return None
        if isinstance(value, bool) or not isinstance(value, Integral):
            kind = "a positive whole number" if least == 1 else "a whole number"
            raise InputError(f"{name} must be {kind}, not {value!r}")
        count = int(value)
        if count < least:
            wanted = {0: "must not be negative", 1: "must be a positive whole number"}
            raise InputError(
                f"{name} {wanted.get(least, f'must be at least {least}')}, not {value!r}"
            )
        if count > most:
            raise InputError(f"{name} must be at most {most}, not {value!r}")
        return count

    return check


def number(
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    optional: bool = False,
    infinite: bool = False,
) -> Check:
    """A finite number within bounds; also None if it is optional, and inf if `infinite`."""

    def check(name: str, value: Any) -> float | None:
        if value is None and optional:
            return None
        found = _float(name, value, infinite=infinite)
        if above is not None and not found > above:
            bound = "positive" if above == 0 else f"above {above:g}"
            raise InputError(f"{name} must be {bound}, not {value!r}")
        if least is not None and below is not None and not least <= found < below:
            raise InputError(f"{name} must be in [{least:g}, {below:g}), not {value!r}")
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
    except OverflowError:  # a whole number of hundreds of digits
        found = math.inf if str(value)[0] != "-" else -math.inf
    if math.isnan(found) or (math.isinf(found) and not (infinite and found > 0)):
        raise InputError(f"{name} must be a finite number, not {value!r}")
    if math.isfinite(found) and abs(found) > LARGEST:
        raise InputError(f"{name} must be at most {LARGEST:g}, not {found:g}")
    return found


def one_of(*values: str) -> Check:
    """One of a few names."""

    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in values:
            raise InputError(
                f"{name}={value!r} is not one of {', '.join(map(repr, values))}"
                + (f": {did_you_mean(value, values)}" if isinstance(value, str) else "")
            )
        return value

    check.values = values  # type: ignore[attr-defined]  # the command line completes to them
    return check


def named(values: Collection[str]) -> Check:
    """One of names that are known elsewhere; the message offers the nearest."""

    def check(name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise InputError(f"{name} must be a name, not {value!r}")
        if value not in values:
            raise InputError(f"unknown {name} {value!r}: {did_you_mean(value, values)}")
        return value

    return check


def flag() -> Check:
    """True or False."""

    def check(name: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise InputError(f"{name} must be True or False, not {value!r}")
        return value

    return check


def text(*, optional: bool = False) -> Check:
    """A text that is not empty; also None if it is optional."""

    def check(name: str, value: Any) -> str | None:
        if value is None and optional:
            return None
        if not isinstance(value, str) or not value:
            raise InputError(f"{name} must be a name, not {value!r}")
        return value

    return check


def names(*, optional: bool = False, pattern: bool = False) -> Check:
    """A list of name endings, kept as a tuple; also a regular expression if `pattern`."""

    def check(name: str, value: Any) -> str | tuple[str, ...] | None:
        if (value is None and optional) or (isinstance(value, str) and pattern):
            return value
        is_list = isinstance(value, list | tuple | set | frozenset)
        if not is_list or not all(isinstance(ending, str) and ending for ending in value):
            kinds = "a regular expression or a list" if pattern else "a list"
            raise InputError(
                f"{name} must be {kinds} of name endings such as ['q', 'v'], not {value!r}"
            )
        return tuple(value)

    return check
