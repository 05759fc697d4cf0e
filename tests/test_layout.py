import ast
import importlib
import inspect
import sys
from itertools import dropwhile
from pathlib import Path

import pytest
from pages import layers

import polyroute

FOLDER = Path(polyroute.__file__).parent

CORE = sorted(set().union(*dropwhile(lambda line: "build" not in line, layers())))
"""The design page's layers up to `build`."""
ALLOWED = {"torch", "safetensors", "polyroute"} | set(sys.stdlib_module_names)
ON_THE_HUB = {"hub", "card"}
"""They may import huggingface_hub and yaml too, inside functions."""


def imported(module: str) -> list[str]:
    """Every dotted name that a module's source imports, wherever it does so."""
    tree = ast.parse((FOLDER / f"{module}.py").read_text(encoding="utf-8"))
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} uses a relative import"
            names.append(node.module or "")
    return names


@pytest.mark.parametrize("module", CORE)
def test_the_core_imports_torch_and_safetensors_alone(module: str) -> None:
    allowed = ALLOWED | ({"huggingface_hub", "yaml"} if module in ON_THE_HUB else set())
    for name in imported(module):
        assert name.split(".")[0] in allowed, f"{module} imports {name}"


@pytest.mark.parametrize("module", CORE)
def test_every_public_name_exists_and_is_described(module: str) -> None:
    loaded = importlib.import_module(f"polyroute.{module}")
    assert loaded.__doc__
    for name in loaded.__all__:
        value = getattr(loaded, name)
        if inspect.isclass(value) and value.__module__ == loaded.__name__:
            assert value.__doc__, f"{module}.{name}"
            methods = {n: m for n, m in vars(value).items() if not n.startswith("_")}
            for method, member in methods.items():
                if inspect.isfunction(member) or isinstance(member, property | classmethod):
                    documented = inspect.getdoc(getattr(value, method))
                    assert documented, f"{module}.{name}.{method}"
        elif inspect.isfunction(value):
            assert value.__doc__, f"{module}.{name}"


def test_every_public_function_of_the_core_is_in_all() -> None:
    for module in CORE:
        loaded = importlib.import_module(f"polyroute.{module}")
        for name, value in inspect.getmembers(loaded, inspect.isfunction):
            if value.__module__ == loaded.__name__ and not name.startswith("_"):
                assert name in loaded.__all__, f"{module}.{name}"


def test_the_version_is_a_string_of_three_numbers() -> None:
    assert [part.isdigit() for part in polyroute.__version__.split(".")] == [True] * 3


def test_an_unknown_attribute_of_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = polyroute.nonsense
