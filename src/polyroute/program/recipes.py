"""Recipes: published settings of training and adaptation, as files of options.

A recipe is a YAML file with the sections `train` and `adapt`, each with options of that command,
and `says`, where the values come from. Those that polyroute brings lie in the folder `recipes`.
"""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from polyroute.errors import InputError, did_you_mean
from polyroute.host.paths import expanded
from polyroute.host.yaml_files import read_yaml

__all__ = ["SECTIONS", "read_recipe", "recipe_names", "shipped"]

SECTIONS = ("train", "adapt")
"""The commands that a recipe has options for."""


def recipe_names() -> tuple[str, ...]:
    """The recipes that polyroute brings."""
    return shipped("recipes")


def shipped(folder: str) -> tuple[str, ...]:
    """The names of the YAML files in a folder of the package."""
    found = (files("polyroute.program") / folder).iterdir()
    return tuple(sorted(Path(entry.name).stem for entry in found))


def read_recipe(name: str) -> dict[str, Mapping[str, Any]]:
    """The options of each section; the command checks whether it has them.

    Args:
        name: the name of a recipe that polyroute brings, or a file that ends in `.yaml`.

    Raises:
        InputError: there is no such recipe, or it has another form.
    """
    path: Any = expanded(name)
    if path.suffix != ".yaml":
        if name not in recipe_names():
            raise InputError(
                f"there is no recipe {name!r}; {did_you_mean(name, recipe_names())} "
                "(a file of your own must end in .yaml)"
            )
        path = files("polyroute.program") / "recipes" / f"{name}.yaml"
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
