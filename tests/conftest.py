"""Fixtures and settings of all tests."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("COLUMNS", None)  # tables are as wide as in a pipe, wherever the tests run

from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tiny_runs import train_arguments, write_base, write_suite

from polyroute.program.cli.app import main

settings.register_profile("polyroute", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("polyroute")
# Tiny models gain nothing from more threads, and lose much on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny suite, `suite`, and a tiny base model, `base`."""
    folder = tmp_path_factory.mktemp("program")
    write_suite(folder / "suite")
    write_base(folder / "base")
    return folder


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    """A finished run of `polyroute train` on them."""
    main(train_arguments(place, "run"))
    return place / "run"
