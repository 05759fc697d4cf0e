"""Config files and recipes: they become the defaults of a command's flags."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from polyroute.errors import InputError, did_you_mean
from polyroute.host.paths import expanded
from polyroute.host.yaml_files import read_yaml
from polyroute.program.recipes import read_recipe

__all__ = ["defaults_from", "places_of", "read_config", "use_recipe"]

CONFIG = "polyroute.config"
"""Under this name a context keeps which config file was read, and which flags are in it."""
TYPED_ALONE = ("config", "help", "trust_remote_code")
"""Flags that no file can give; with the last one a file could let the code beside it run."""


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the entries of a YAML file the defaults of the command's flags.

    Raises:
        InputError: the file cannot be read, or an entry is no flag.
    """
    if path is not None:
        values = read_yaml(expanded(path), f"the config {path}")
        defaults = defaults_from(context.command, values, f"config key {{!r}} in {path}")
        context.default_map = {**(context.default_map or {}), **defaults}
        context.meta[CONFIG] = (path, frozenset(defaults))
    return path


def use_recipe(context: typer.Context, name: str | None) -> str | None:
    """Make what a recipe says the defaults, where no config says otherwise.

    Raises:
        InputError: there is no such recipe, or an entry is no flag.
    """
    if name is not None:
        command = context.command
        values = read_recipe(name)[str(command.name)]
        where = f"{command.name} key {{!r}} of the recipe {name}"
        defaults = defaults_from(command, values, where)
        context.default_map = {**defaults, **(context.default_map or {})}
    return name


def places_of(context: typer.Context) -> dict[str, str]:
    """By flag, in words, where its value was given; flags left to a recipe are not in it."""
    path, configured = context.meta.get(CONFIG, (None, ()))
    places = {}
    for name in context.params:
        source = context.get_parameter_source(name)
        option = name.replace("_", "-")
        if source is not None and source.name == "COMMANDLINE":
            places[name] = f"--{option}"
        elif name in configured:
            places[name] = f"{option} in {path}"
    return places


def defaults_from(command: Any, values: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """What a file says of a command's flags, as defaults for click.

    Args:
        command: the command that has the flags.
        values: by flag, with hyphens or underscores.
        where: begins the sentence of an error; the key goes into its braces.

    Raises:
        InputError: a key is no flag, or its value cannot be that of the flag.
    """
    flags = {str(p.name): p for p in command.params if p.name not in TYPED_ALONE}
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in flags:
            raise InputError(f"{where.format(key)} does not exist: {did_you_mean(name, flags)}")
        if not _fits(flags[name], value):
            raise InputError(
                f"{where.format(key)} cannot be {value!r}; if it is meant as text, put it in quotes"
            )
        is_list = isinstance(value, list)
        if getattr(flags[name], "multiple", False):
            defaults[name] = list(map(str, value)) if is_list else [str(value)]
        else:
            defaults[name] = ",".join(map(str, value)) if is_list else value
    return defaults


def _fits(flag: Any, value: Any) -> bool:
    """Whether a value of YAML can be that of a flag, as far as its form says so."""
    is_flag = bool(getattr(flag, "is_flag", False))
    if isinstance(value, bool):
        return is_flag
    if value is None:
        return flag.default is None
    if is_flag and (isinstance(value, list) or value == ""):
        return False  # click takes what is empty for false
    parts = value if isinstance(value, list) else [value]
    return all(isinstance(one, str | int | float) and not isinstance(one, bool) for one in parts)
