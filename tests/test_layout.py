"""Rooms of the package import downwards only, and public names of the core are described."""

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
LAYERS = layers()
BELOW = {
    room: {room, *set().union(*LAYERS[i + 1 :])} for i, line in enumerate(LAYERS) for room in line
}
CORE_ROOMS = set().union(*dropwhile(lambda line: "build" not in line, LAYERS)) - {"optimizers"}
OUTSIDE = {"torch", "safetensors", "polyroute"} | set(sys.stdlib_module_names)
EXCEPTIONS = {
    "saved/hub.py": {"huggingface_hub"},
    "saved/card.py": {"huggingface_hub"},
    "saved/peft_card.py": {"huggingface_hub"},
}
"""What the core may import besides, inside functions."""


def room_of(path: Path) -> str:
    parts = path.relative_to(FOLDER).parts
    return parts[0].removesuffix(".py")


FILES = [p for p in sorted(FOLDER.rglob("*.py")) if p.parent != FOLDER or p.name[0] != "_"]
CORE_HOST = ("files", "json_text", "paths", "texts")
"""What the core reads and writes files with."""
CORE = [
    path
    for path in FILES
    if room_of(path) in CORE_ROOMS - {"host"}
    or (room_of(path) == "host" and path.stem in CORE_HOST)
]


def imported(path: Path) -> list[str]:
    """Every dotted name that a file imports, wherever it does so."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            module = node.module or ""
            names += (
                [f"{module}.{a.name}" for a in node.names] if module == "polyroute" else [module]
            )
    return names


def test_the_list_names_every_room() -> None:
    assert {room_of(path) for path in FILES} == set(BELOW)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_a_file_imports_from_its_own_room_and_those_below(path: Path) -> None:
    for name in imported(path):
        if name.startswith("polyroute.") and name != "polyroute.__version__":
            assert name.split(".")[1] in BELOW[room_of(path)], f"{path.name} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_no_file_is_over_400_lines_and_no_function_over_80(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 80, node.name


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(FOLDER)))
def test_the_core_imports_torch_and_safetensors_alone(path: Path) -> None:
    allowed = OUTSIDE | EXCEPTIONS.get(str(path.relative_to(FOLDER)), set())
    for name in imported(path):
        assert name.split(".")[0] in allowed, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(FOLDER)))
def test_every_public_name_of_the_core_is_listed_and_described(path: Path) -> None:
    if path.name == "__init__.py":
        return
    name = ".".join(path.relative_to(FOLDER).with_suffix("").parts)
    loaded = importlib.import_module(f"polyroute.{name}")
    assert loaded.__doc__
    for public in loaded.__all__:
        value = getattr(loaded, public)
        if getattr(value, "__module__", None) != loaded.__name__:
            continue
        assert inspect.getdoc(value), f"{name}.{public}"
        if inspect.isclass(value):
            for method, member in vars(value).items():
                is_public = not method.startswith("_") and isinstance(
                    member, property | classmethod | staticmethod | type(room_of)
                )
                if is_public:
                    assert inspect.getdoc(getattr(value, method)), f"{name}.{public}.{method}"
    for function, value in inspect.getmembers(loaded, inspect.isfunction):
        if value.__module__ == loaded.__name__ and not function.startswith("_"):
            assert function in loaded.__all__, f"{name}.{function}"


def test_the_version_is_a_string_of_three_numbers() -> None:
    assert [part.isdigit() for part in polyroute.__version__.split(".")] == [True] * 3


def test_an_unknown_attribute_of_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = polyroute.nonsense


def test_public_names_are_no_modules() -> None:
    # A module that is imported becomes an attribute of the package, and would hide a function.
    for name in polyroute.PLACES:
        getattr(polyroute, name)
    found = {name: getattr(polyroute, name) for name in polyroute.PLACES}
    assert not [name for name, value in found.items() if inspect.ismodule(value)]
