"""Fixtures and settings of all tests."""

import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tiny models gain nothing from more threads, and lose much on a busy machine. Commands that tests
# start inherit this.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
os.environ.pop("COLUMNS", None)  # tables are as wide as in a pipe, wherever the tests run

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings
from tiny_runs import train_arguments, write_base, write_suite

from polyroute.program.cli.app import main

if TYPE_CHECKING:
    from playwright.sync_api import Browser

settings.register_profile("polyroute", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("polyroute")
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


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three LoRAs that differ in ranks, scales and layers."""
    from unlike_loras import write_unlike

    return write_unlike(tmp_path_factory.mktemp("loras"))


@pytest.fixture(scope="module")
def chat_base(place: Path) -> Path:
    """A tiny decoder-only base model with a chat template."""
    from test_chat import CHATML, tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    tok = tokenizer(CHATML)
    config = LlamaConfig(
        vocab_size=len(tok), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(place / "chat")
    tok.save_pretrained(place / "chat")
    return place / "chat"


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """A headless Chromium, for tests with the mark `in_browser.needs_chromium`."""
    from in_browser import chromium

    with chromium() as opened:
        yield opened
