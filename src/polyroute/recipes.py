"""Recipes: published settings of training and adaptation, as files of options.

A recipe is a YAML file with the sections `train` and `adapt`, each with options of that command,
and `says`, where the values come from. Those that polyroute brings lie in the folder `recipes`.
"""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from polyroute.errors import InputError, did_you_mean

__all__ = ["SECTIONS", "read_recipe", "read_yaml", "recipe_names", "shipped"]

SECTIONS = ("train", "adapt")
"""The commands that a recipe has options for."""


def recipe_names() -> tuple[str, ...]:
    """The recipes that polyroute brings."""
    return shipped("recipes")


def shipped(folder: str) -> tuple[str, ...]:
    """The names of the YAML files in a folder of the package."""
    found = (files("polyroute") / folder).iterdir()
    return tuple(sorted(Path(entry.name).stem for entry in found))


def read_recipe(name: str) -> dict[str, Mapping[str, Any]]:
    """The options of each section; whether a command has them is for the command to say.

    Args:
        name: of a recipe that polyroute brings, or a file that ends in `.yaml`.

    Raises:
        InputError: there is no such recipe, or it has another form.
    """
    path: Any = Path(name).expanduser()
    if path.suffix != ".yaml":
        if name not in recipe_names():
            raise InputError(
                f"there is no recipe {name!r}; {did_you_mean(name, recipe_names())} "
                "(a file of your own must end in .yaml)"
            )
        path = files("polyroute") / "recipes" / f"{name}.yaml"
    content = read_yaml(path, f"the recipe {name}")
    for key in content:
        if key not in (*SECTIONS, "says"):
            raise InputError(
                f"the recipe {name} has a section {key!r}; "
                f"{did_you_mean(str(key), (*SECTIONS, 'says'))}"
            )
    for section in SECTIONS:
        if not isinstance(content.get(section, {}), dict):
            raise InputError(f"the section {section!r} of the recipe {name} must map options")
    return {section: content.get(section, {}) for section in SECTIONS}


def read_yaml(path: Any, what: str) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Args:
        path: of the file, also within the package.
        what: begins the sentence of an error.

    Raises:
        InputError: the file cannot be read or holds something else.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise InputError(f"{what} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{what} is not valid YAML: {reason}") from error
    if not isinstance(content, dict):
        raise InputError(f"{what} must hold `option: value` lines")
    return content
