"""The tutorial and the how-to pages are run, and so is what CONTRIBUTING shows."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from models import routed, t5
from pages import BLOCK, DOCS, run_page

import polyroute
from polyroute.program.cli.app import main

TUTORIAL = DOCS / "tutorial.md"
CONTRIBUTING = DOCS.parent / "CONTRIBUTING.md"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tutorial's suite, and its run after a single step."""
    folder = tmp_path_factory.mktemp("words")
    _, _, suite = BLOCK.findall(TUTORIAL.read_text())[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(compile(suite, TUTORIAL.name, "exec"), {})
        train = "train --model demo --data words --skills 6 --heads 4 --rank 1 --steps 1"
        main(f"{train} --max-input 64 --max-target 16 --out runs/words".split())
    return folder


def test_the_tutorial_runs_from_its_first_line_to_its_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "short.md"
    page.write_text(re.sub(r"(steps[= ]|max-test )\d+", r"\g<1>2", TUTORIAL.read_text()))
    names = run_page(page)
    assert [result.settings.steps for result in names["results"]] == [2] * 4
    for file in ("runs/words/evaluate-test.json", "out/last-upper/adapter_model.safetensors"):
        assert (tmp_path / file).is_file()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_model_of_the_tutorial_has_learned_the_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page(TUTORIAL)
    assert names["results"][1].last_loss < names["results"][1].first_loss
    scores = (tmp_path / "runs" / "words" / "evaluate-test.json").read_text()
    mean = float(re.findall(r'"score": ([\d.]+)', scores)[-1])
    assert mean > 0.5, scores  # 0.15 for the most frequent answers; about 0.85 as a rule
    assert (tmp_path / "out" / "last-upper" / "adapter_model.safetensors").is_file()


NOT_RUN = {"routes", "elsewhere"}  # a notebook; prose about scripts that have tests
LEFT = {
    "adapt16": "runs/more/polyroute.json",
    "choose": "report.html",
    "csv": "runs/again/metrics.json",
    "serve": "out/loras/mu/adapter_model.safetensors",
    "users": "runs/users/polyroute.json",
}
"""A file that the last lines of a page leave behind."""


def test_the_page_of_libraries_runs(
    words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(words, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    names = run_page(DOCS / "library.md")
    assert set(names["compiled"].errors) == {"first-upper", "last-reverse", "last-initial"}
    for folder in ("merged/small", "merged/both", "frozen"):
        assert (tmp_path / folder / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("page", sorted({p.stem for p in (DOCS / "howto").glob("*.md")} - NOT_RUN))
def test_the_how_to_page_runs(
    page: str, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(words, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    names = run_page(DOCS / "howto" / f"{page}.md")
    if page == "new_route":
        assert names["row"].dim() == 3
    else:
        assert (tmp_path / LEFT[page]).is_file()


def test_the_normaliser_of_the_how_to_page_works_once_its_lines_are_in_place(
    tmp_path: Path,
) -> None:
    shutil.copytree(Path(polyroute.__file__).parent, tmp_path / "src" / "polyroute")
    blocks = BLOCK.findall((DOCS / "howto" / "new_route.md").read_text())
    patches = [text for language, _, text in blocks if language == "diff"]
    assert len(patches) == 2
    for patch in patches:
        apply(patch, tmp_path)
    code = """
import torch, polyroute as pr
base = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
model = pr.attach(base, pr.MHRConfig(num_skills=4, num_heads=2, normalization="sparsemax"), ["a"])
w = model.weights_of("a")
assert torch.allclose(w, torch.full_like(w, 0.25), atol=0.01), w  # logits start near zero
model.add_task("b", init=torch.tensor([2.0, 1.5, 0.0, -1.0]).expand(w.shape).clone())
assert torch.allclose(model.weights_of("b")[0, 0], torch.tensor([0.75, 0.25, 0.0, 0.0]))
for p in model.inventory.parameters(): torch.nn.init.normal_(p)
model.set_phase("z")
model(torch.randn(2, 8), tasks=["a", "b"]).square().sum().backward()
assert model.routes.logits.grad.abs().sum() > 0
model.save_pretrained("saved")
assert pr.from_pretrained(model.unload(), "saved").adapter_config.normalization == "sparsemax"
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def apply(patch: str, folder: Path) -> None:
    """Apply a patch without line numbers: the lines of each part must be in the file, once."""
    head, _, body = patch.partition("+++ b/")
    name, _, body = body.partition("\n")
    assert head.startswith("--- a/")
    path = folder / name
    text = path.read_text()
    for part in body.split("@@\n"):
        lines = part.splitlines(keepends=True)
        old, new = (
            "".join(line[1:] if line.strip() else line for line in lines if line[:1] in keep)
            for keep in (" -\n", " +\n")
        )
        assert text.count(old) == 1, f"{name} does not have, once:\n{old}"
        text = text.replace(old, new)
    path.write_text(text)


def contributed(title: str) -> str:
    return next(text for _, name, text in BLOCK.findall(CONTRIBUTING.read_text()) if title in name)


def test_the_reader_that_contributing_shows_reads(tmp_path: Path) -> None:
    names: dict[str, object] = {}
    exec(compile(contributed("tsv.py"), "tsv.py", "exec"), names)
    (tmp_path / "rivers.tsv").write_text("Nile\tlong\ttrain\nCherwell\tshort\ttest\n")
    suite = names["TsvSuite"](tmp_path, cache_dir=tmp_path / "cache")  # type: ignore[operator]
    assert suite.tasks == ("rivers",)
    assert suite.splits("rivers") == ("train", "test")
    assert suite.split("rivers", "test")["target"] == ["short"]
    (tmp_path / "lakes.tsv").write_text("Baikal\tdeep\n")
    broken = names["TsvSuite"](tmp_path, cache_dir=tmp_path / "cache")  # type: ignore[operator]
    with pytest.raises(polyroute.InputError, match=r"lakes.tsv, line 1: give input, target"):
        broken.splits("lakes")


def test_the_format_that_contributing_shows_computes_the_task(tmp_path: Path) -> None:
    names: dict[str, object] = {}
    exec(compile(contributed("numpy_lora.py"), "numpy_lora.py", "exec"), names)
    model = routed(t5())
    names["write_numpy"](model, "birch", tmp_path / "birch.npz")  # type: ignore[operator]
    arrays = np.load(tmp_path / "birch.npz")
    site = model.sites[0]
    x = torch.randn(3, site.d_in)
    with model.route("birch"), torch.no_grad():
        expected = model.base_model.get_submodule(site.name)(x)
    a, b = (torch.from_numpy(arrays[f"{site.name}.{part}"]) for part in "AB")
    torch.testing.assert_close(site.layer(x) + x @ a @ b, expected, rtol=1e-4, atol=1e-4)


def test_the_merged_route_that_contributing_shows_is_the_mean_of_the_mixtures() -> None:
    names: dict[str, object] = {}
    block = next(
        text for _, _, text in BLOCK.findall(CONTRIBUTING.read_text()) if "def merged" in text
    )
    exec(compile(block, "CONTRIBUTING.md", "exec"), names)
    model = routed(t5())
    row = names["merged_route"](model, {"amber": 3.0, "birch": 1.0})  # type: ignore[operator]
    model.add_task("both", init=row)
    expected = 0.75 * model.weights_of("amber") + 0.25 * model.weights_of("birch")
    torch.testing.assert_close(model.weights_of("both"), expected, rtol=1e-4, atol=1e-4)
