"""Parameters: what typer has to know of a flag."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Annotated, Any

import typer

from polyroute.program.cli.defaults import read_config, use_recipe
from polyroute.program.options.flags import Flag

__all__ = ["parameter_of"]

FROM_FILES = {"config": read_config, "recipe": use_recipe}
"""Flags whose file says what the others are by default, so they are read first."""
TYPED = (bool, int, float, str, Path)
"""What can be typed; anything else is typed as text."""


def parameter_of(flag: Flag) -> inspect.Parameter:
    """The parameter of a function from which typer makes a flag."""
    about: dict[str, Any] = {"help": flag.marks["help"], "rich_help_panel": flag.marks.get("panel")}
    values = flag.marks.get("values") or getattr(flag.marks["check"], "values", ())
    if values:
        about["autocompletion"] = _completion(values)
    if flag.name in FROM_FILES:
        about |= {"is_eager": True, "callback": FROM_FILES[flag.name]}
    declared: Any = (
        typer.Argument(**about)
        if flag.marks.get("argument")
        else typer.Option(_names(flag), **about)
    )
    return inspect.Parameter(
        flag.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if flag.default is MISSING else flag.typed_default,
        annotation=Annotated[_typed(flag), declared],
    )


def _names(flag: Flag) -> str:
    """`--flag`; for one that is on by default also the flag that turns it off."""
    is_on = flag.types == (bool,) and flag.default is True
    return f"{flag.option}/--no-{flag.option[2:]}" if is_on else flag.option


def _typed(flag: Flag) -> Any:
    typed = flag.marks.get("typed") or next((kind for kind in TYPED if kind in flag.types), str)
    return typed | None if flag.default is None else typed


def _completion(
    values: Sequence[str] | Callable[[], Sequence[str]],
) -> Callable[[str], list[str]]:
    """A function that completes to one of these values."""

    def complete(incomplete: str) -> list[str]:
        known = values() if callable(values) else values
        return [name for name in known if name.startswith(incomplete)]

    return complete
