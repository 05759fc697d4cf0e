"""Flags: the fields of a command's options as a user knows them, and back to the options."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from polyroute.host.paths import expanded
from polyroute.program import texts
from polyroute.settings import option_of, typed

__all__ = ["Flag", "flags_of", "group", "made"]

Record = TypeVar("Record")


@dataclass(frozen=True)
class Flag:
    """A field as a user knows it: on the command line, in YAML files, in `run.json`."""

    name: str
    """With underscores."""
    types: tuple[Any, ...]
    """What the field may be, besides None."""
    marks: Mapping[str, Any]
    """Marks of the field and of the groups that it is in; `check` and `help` are among them."""
    default: Any
    """`MISSING` where it must be given."""

    @property
    def option(self) -> str:
        """What a user types, with hyphens."""
        return typed(self.name)

    @property
    def typed_default(self) -> Any:
        """The default as a user would type it."""
        return ",".join(map(str, self.default)) if isinstance(self.default, tuple) else self.default

    def read(self, typed: Any) -> Any:
        """The value of what was typed, checked.

        Raises:
            InputError: it cannot be used; the message names the flag.
        """
        value = self._parse()(typed, self.option)
        check = self.marks["check"]
        return value if check is None or value is None else check(self.option, value)

    def _parse(self) -> Callable[[Any, str], Any]:
        if "parse" in self.marks:
            parse: Callable[[Any, str], Any] = self.marks["parse"]
            return parse
        if any(get_origin(kind) is tuple for kind in self.types):
            return texts.pattern if str in self.types else texts.names
        if self.marks.get("typed") == list[Path]:
            return lambda value, _: [expanded(one) for one in value]
        if Path in self.types and str not in self.types:  # older versions of typer leave it a text
            return lambda value, _: expanded(value) if isinstance(value, str | Path) else value
        return lambda value, _: value

    def recorded(self, value: Any) -> Any:
        """A value as JSON."""
        if isinstance(value, Path) or (isinstance(value, float) and math.isinf(value)):
            return str(value)
        return list(value) if isinstance(value, tuple) else value


def group(record: Any, *, defaults: Mapping[str, Any] | None = None, **marks: Any) -> Any:
    """Declare a field that is a record of settings, each of which is a flag of the command.

    Args:
        record: the class.
        defaults: by field, the defaults of flags that differ from those of the class.
        **marks: marks of all of its fields.
    """
    known = record.__dataclass_fields__.values()
    is_open = any(one.default is MISSING and one.default_factory is MISSING for one in known)
    return field(
        default_factory=MISSING if is_open else record,
        metadata={"group": record, "defaults": defaults or {}, **marks},
    )


def flags_of(record: Any) -> list[Flag]:
    """The flags of a class of options: its fields, and those of the groups in it.

    Those that a class inherits, which several commands share, come last.
    """
    return list(_flags(record, {}, {}))


def _flags(record: Any, defaults: Mapping[str, Any], marks: Mapping[str, Any]) -> Iterator[Flag]:
    hints = get_type_hints(record)
    for one in sorted(fields(record), key=lambda one: one.name not in record.__annotations__):
        own = {**marks, **one.metadata}
        if "group" in one.metadata:
            passed = {k: v for k, v in own.items() if k not in ("group", "defaults")}
            yield from _flags(one.metadata["group"], one.metadata["defaults"], passed)
        elif "check" in one.metadata:
            default = defaults.get(one.name, one.default)
            yield Flag(option_of(one), _types(hints[one.name]), own, default)


def _types(hint: Any) -> tuple[Any, ...]:
    is_union = get_origin(hint) in (Union, UnionType)
    return tuple(k for k in (get_args(hint) if is_union else (hint,)) if k is not NoneType)


def made(record: type[Record], values: Mapping[str, Any], **more: Any) -> Record:
    """A record from the values of its flags.

    Args:
        record: the class.
        values: by flag.
        **more: fields that are no flags.

    Raises:
        InputError: values exclude each other.
    """
    found = dict(more)
    for one in fields(record):  # type: ignore[arg-type]
        if "group" in one.metadata:
            found[one.name] = made(one.metadata["group"], values)
        elif "check" in one.metadata:
            found[one.name] = values[option_of(one)]
    return record(**found)
