"""What the documentation shows is run, and what it claims is checked."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
from base_models import llama

from polyroute.program.cli.app import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in llama():
        part.save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    ids = torch.randint(3, 40, (3, 6))
    names = {"batch": {"input_ids": ids, "labels": ids}}
    for block in blocks(README, "python"):
        code = block.replace('"smollm2", dtype="auto"', repr(str(tmp_path / "base")))
        exec(compile(code, "README.md", "exec"), names)
    assert (tmp_path / "out" / "mnli" / "adapter_model.safetensors").exists()


def commands() -> list[str]:
    return [
        line
        for block in blocks(README, "sh")
        for line in block.splitlines()
        if line.startswith("polyroute ")
    ]


@pytest.mark.parametrize("line", commands())
def test_the_commands_of_the_readme_exist_with_their_options(line: str) -> None:
    _, name, *arguments = shlex.split(line)
    group = typer.main.get_command(app)
    command = group.commands[name]  # type: ignore[attr-defined]
    context = command.make_context(name, arguments, resilient_parsing=False)
    assert context.params


def test_the_readme_names_every_target_of_two_commands() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", README, flags=re.MULTILINE):
        assert f"\n{target}:" in makefile
