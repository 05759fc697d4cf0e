"""A library becomes few skills and a row for each LoRA, as far as LoRAs share something."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import batch, llama, relative_error
from unlike_loras import write_unlike

import polyroute as pr
from polyroute.layer.factors import LoRAFactors

LAYERS = {f"model.layers.{i}.self_attn.{name}": (32, out)
          for i in (0, 1) for name, out in (("q_proj", 32), ("v_proj", 16))}  # fmt: skip


def random_delta(generator: torch.Generator, rank: int) -> pr.Delta:
    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    factors = {n: LoRAFactors(drawn(rank, i), drawn(rank, o)) for n, (i, o) in LAYERS.items()}
    return pr.Delta(factors, {})


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten LoRAs that are signed sums of three of rank 2."""
    folder, generator = tmp_path_factory.mktemp("planted"), torch.Generator().manual_seed(0)
    skills = [random_delta(generator, 2) for _ in range(3)]
    for number in range(10):
        weights = torch.randn(3, generator=generator).tolist()
        terms = [weight * skill for weight, skill in zip(weights, skills, strict=True)]
        (terms[0] + terms[1] + terms[2]).save_peft(folder / f"lora-{number}")
    return folder


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten LoRAs of rank 2 that have nothing in common."""
    folder, generator = tmp_path_factory.mktemp("apart"), torch.Generator().manual_seed(1)
    for number in range(10):
        random_delta(generator, 2).save_peft(folder / f"lora-{number}")
    return folder


def logits(model: Any, task: str) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**batch(llama()), tasks=task).logits
    return found


@pytest.mark.parametrize("granularity", ["coarsegrained", "blockwise", "finegrained"])
def test_shared_skills_are_found(planted: Path, granularity: Any, tmp_path: Path) -> None:
    library = pr.Library.from_peft(planted)
    found = pr.compile_library(llama(), library, num_skills=3, rank=2, granularity=granularity)
    assert max(found.errors.values()) < 0.02
    live = pr.attach(llama(), library)
    for name in library:
        assert relative_error(logits(found.model, name), logits(live, name)) < 0.02
    # Ten LoRAs of rank 6 became three skills of rank 2.
    assert found.model.counts()["inventory"] == live.counts()["inventory"] * 6 / 60
    found.model.save_pretrained(tmp_path)
    again = pr.from_pretrained(llama(), tmp_path)
    assert torch.equal(logits(again, "lora-3"), logits(found.model, "lora-3"))
    found.model.export_peft("lora-3", tmp_path / "one")
    gap = pr.Delta.from_peft(tmp_path / "one") - library["lora-3"]
    assert gap.norm() / library["lora-3"].norm() == pytest.approx(found.errors["lora-3"], abs=1e-3)


def test_errors_are_those_of_the_updates(apart: Path, tmp_path: Path) -> None:
    library = pr.Library.from_peft(apart)
    found = pr.compile_library(llama(), library, num_skills=4, most_error=1)
    for name in ("lora-0", "lora-7"):
        found.model.export_peft(name, tmp_path / name)
        gap = pr.Delta.from_peft(tmp_path / name) - library[name]
        assert found.errors[name] == pytest.approx(gap.norm() / library[name].norm(), abs=1e-3)
    more = pr.compile_library(llama(), library, num_skills=8, most_error=1)
    assert sum(more.errors.values()) < sum(found.errors.values())


def test_as_many_skills_as_loras_lose_nothing(apart: Path) -> None:
    library = pr.Library.from_peft(apart)
    for count in (10, 12):
        found = pr.compile_library(llama(), library, num_skills=count)
        assert max(found.errors.values()) < 1e-6


def test_loras_that_share_nothing_are_refused(apart: Path) -> None:
    base, library = llama(), pr.Library.from_peft(apart)
    with pytest.raises(pr.InputError, match="share too little: 2 skills of rank 2 miss 8"):
        pr.compile_library(base, library, num_skills=2)
    pr.attach(base, library)  # the base model is as it was before
    with pytest.raises(pr.InputError, match="num_skills must be a positive whole number"):
        pr.compile_library(llama(), library, num_skills=0)


def test_ragged_libraries_compile(tmp_path: Path) -> None:
    library = pr.Library.from_peft(write_unlike(tmp_path))
    found = pr.compile_library(llama(), library, num_skills=3)
    live = pr.attach(llama(), library)
    for name in library:
        assert found.errors[name] < 1e-6
        assert relative_error(logits(found.model, name), logits(live, name)) < 1e-5


def test_a_row_can_be_tuned(planted: Path) -> None:
    model = pr.compile_library(llama(), pr.Library.from_peft(planted), num_skills=3, rank=2).model
    wanted = logits(model, "lora-5")
    model.add_task("new", init=torch.zeros(model.routes.shape or ()))
    base = llama()(**batch(llama())).logits
    assert relative_error(logits(model, "new"), base) < 1e-6
    optimizer = model.optimizer("z", route_lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        (model(**batch(llama()), tasks="new").logits - wanted).square().mean().backward()
        optimizer.step()
    assert torch.allclose(model.routes["new"], model.routes["lora-5"], atol=0.05)
