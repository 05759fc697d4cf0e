"""The notebooks say what the pages say, and they run."""

import os
import runpy
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from pages import BLOCK, DOCS

import polyroute as pr

EXAMPLES = DOCS.parent / "examples"
SCRIPT = runpy.run_path(str(EXAMPLES / "notebooks.py"))


@pytest.mark.parametrize(("name", "page"), SCRIPT["PAGES"].items())
def test_the_notebook_is_what_the_script_makes_of_its_page(name: str, page: str) -> None:
    committed = (EXAMPLES / f"{name}.ipynb").read_text()
    made = nbformat.writes(SCRIPT["notebook_of"](page))
    assert committed.strip() == made.strip(), "run `python examples/notebooks.py`"


@pytest.mark.parametrize("name", SCRIPT["PAGES"])
def test_every_link_of_a_notebook_has_a_target(name: str) -> None:
    for cell in nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4).cells:
        for link in SCRIPT["LINK"].findall(cell.source) if cell.cell_type == "markdown" else ():
            assert (EXAMPLES / link.partition("#")[0]).exists(), link


def run(name: str, folder: Path) -> nbformat.NotebookNode:
    """Run a notebook in a folder, with `polyroute` as the command of this very package."""
    commands = folder / "bin"
    commands.mkdir()
    (commands / "polyroute").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m polyroute "$@"\n')
    (commands / "polyroute").chmod(0o755)
    source = str(Path(pr.__file__).parents[1])
    found = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    environment = {
        **os.environ,
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": found,
        "IPYTHONDIR": str(folder / "ipython"),
        "MPLBACKEND": "agg",
        "OMP_NUM_THREADS": "1",
    }
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    client = NotebookClient(notebook, timeout=1500, resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment)
    return notebook


def test_the_notebook_on_routes_runs(tmp_path: Path) -> None:
    tasks = ["first-initial", "first-upper", "last-initial", "last-upper", "longest-reverse"]
    base = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    model = pr.attach(base, pr.MHRConfig(num_skills=3, num_heads=2, rank=1), tasks)
    torch.nn.init.normal_(model.routes.logits)
    model.save_pretrained(tmp_path / "runs" / "words")
    notebook = run("routes", tmp_path)
    assert "same pick" in notebook.cells[-2].outputs[0].text
    assert (tmp_path / "routes.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_notebook_of_the_tutorial_runs(tmp_path: Path) -> None:
    run("tutorial", tmp_path)
    assert (tmp_path / "out" / "last-upper" / "adapter_model.safetensors").is_file()


def test_no_block_of_a_notebook_s_page_is_left_out() -> None:
    for name, page in SCRIPT["PAGES"].items():
        cells = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4).cells
        code = [cell for cell in cells if cell.cell_type == "code"]
        assert len(code) == len(BLOCK.findall((DOCS / page).read_text()))
