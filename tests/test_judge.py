"""The judge of a library: it says no to what is of no use, and yes to what is."""

from pathlib import Path

import numpy as np
import pytest
import torch
from commands_run import Capture, document, read, refused
from models import batch, llama, relative_error
from test_library_commands import loras_of

import polyroute as pr
from polyroute.judging import BASE, FRESH, RANDOM, USES, Judgement
from polyroute.layer.factors import LoRAFactors
from polyroute.library.controls import Given, random_skills
from polyroute.program.cli.app import main
from polyroute.routes.ragged import RaggedInventory


def judgement(generator: np.random.Generator, rates: dict[str, float], units: int) -> Judgement:
    """Scores of contenders that answer each example alike, at these rates and otherwise at .5."""
    difficulty = generator.random(units)
    names = [BASE, FRESH, *USES, *(f"{RANDOM}{use} {i}" for use in USES for i in (1, 2, 3))]
    scores = {}
    for name in names:
        answers = generator.random(units) * 0.5 + difficulty * 0.5
        scores[name] = (answers < rates.get(name, 0.5)).astype(float)
    return Judgement(scores, "example")


def test_controls_are_those_of_the_use_alone() -> None:
    found = judgement(np.random.default_rng(0), {}, 5)
    for use in USES:
        assert found.controls_of(use) == [BASE, FRESH, *(f"{RANDOM}{use} {i}" for i in (1, 2, 3))]


@pytest.mark.parametrize("units", [1, 5, 20, 60])
def test_what_is_no_better_than_random_is_seldom_said_to_help(units: int) -> None:
    generator = np.random.default_rng(0)
    said = [judgement(generator, {}, units).helping for _ in range(100)]
    assert sum(map(bool, said)) <= 0.05 * len(said)
    # Nor where only a fresh LoRA can keep up.
    bad = dict.fromkeys([BASE, *(f"{RANDOM}{use} {i}" for use in USES for i in (1, 2, 3))], 0.0)
    said = [judgement(generator, bad, units).helping for _ in range(100)]
    assert sum(map(bool, said)) <= 0.05 * len(said)


def test_one_unlucky_control_is_not_enough() -> None:
    # The others still have to be beaten.
    generator = np.random.default_rng(0)
    worse = {f"{RANDOM}arrow {i}": 0.1 for i in (1, 2, 3)} | {BASE: 0.1}
    said = [judgement(generator, worse, 60).helping for _ in range(200)]
    assert sum(map(bool, said)) <= 0.05 * len(said)


def test_what_is_better_than_every_control_helps() -> None:
    found = judgement(np.random.default_rng(0), {"weights": 0.8, "arrow": 0.2}, 100)
    assert found.helping == ["weights"]
    assert found.verdict.startswith("yes, this library helps: weights scores +0.")
    none = judgement(np.random.default_rng(0), {FRESH: 0.8}, 100)
    assert none.helping == []
    assert none.verdict.startswith("no, nothing shows that this library helps: its best use, ")


def norms(model: pr.RoutedModel) -> torch.Tensor:
    """Of every LoRA in every layer."""
    inventory = model.inventory
    assert isinstance(inventory, RaggedInventory)
    skills = [
        inventory.skill(site, skill)
        for site in range(len(model.sites))
        for skill in range(inventory.num_skills)
    ]
    return torch.stack([(own.b.t() @ own.a).norm().detach() for own in skills])


@pytest.fixture
def model(place: Path) -> pr.RoutedModel:
    from transformers import T5ForConditionalGeneration

    base = T5ForConditionalGeneration.from_pretrained(place / "base")
    return pr.attach(base, pr.Library.from_peft(loras_of(place))).eval()


def test_random_libraries_have_the_norms_and_ranks_of_the_library(model: pr.RoutedModel) -> None:
    before = [p.clone() for p in model.inventory.parameters()]
    own = norms(model)
    drawn = []
    for seed in (0, 1, 0):
        with random_skills(model, seed):
            assert torch.allclose(norms(model), own, rtol=1e-4)
            drawn.append(torch.cat([p.flatten() for p in model.inventory.parameters()]).clone())
    assert torch.equal(drawn[0], drawn[2])
    assert abs(float(torch.cosine_similarity(drawn[0], drawn[1], dim=0))) < 0.2
    for kept, parameter in zip(before, model.inventory.parameters(), strict=True):
        assert torch.equal(kept, parameter)


@torch.no_grad()
def test_given_factors_are_applied() -> None:
    model = pr.attach(llama(), pr.MHRConfig(method="private"), ["a", "b"]).eval()
    for parameter in model.inventory.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.1)
    for task in ("a", "b"):
        with model.route(Given(model.factors_of(task))):
            found = model(**batch(llama())).logits
        assert relative_error(found, model(**batch(llama()), tasks=task).logits) < 1e-6
    with model.route(Given()):
        assert torch.equal(model(**batch(llama())).logits, llama()(**batch(llama())).logits)
    assert isinstance(model.factors_of("a")[0], LoRAFactors)


def test_compare_says_whether_a_library_helps(place: Path, capsys: Capture) -> None:
    run = place / "judged"
    main(["import", str(loras_of(place)), "--model", str(place / "base"), "--format", "library",
          "--out", str(run), "--max-target", "4"])  # fmt: skip
    given = ["compare", str(run), "--data", str(place / "suite"), "--shots", "4", "--steps", "2",
             "--randoms", "2", "--max-test", "6", "--seeds", "0,1"]  # fmt: skip
    one = document([*given, "--tasks", "pick", "--oracle"], capsys)
    assert (one["unit"], one["helps"], one["helping"]) == ("example", False, [])
    names = [contender["name"] for contender in one["contenders"]]
    assert names[:3] == ["base", "fresh LoRA", "average"]
    assert names[-1] == "oracle single"
    assert len([name for name in names if name.startswith("random, ")]) == 2 * len(USES)
    assert read(run / "compare.json")["verdict"] == one["verdict"]
    assert set(one["chosen"]["pick"]) <= {"copy", "upper"}
    both = document([*given, "--out", str(place / "both.json")], capsys)
    assert both["unit"] == "example"  # two tasks are too few
    assert both["tasks"] == ["first", "pick"]
    assert document([*given, "--tasks", "pick", "--oracle"], capsys) == one
    for wrong, sentence in (
        (["--tasks", "pikc"], "did you mean"),
        (["--shots", "4000"], "cannot draw 4000 shots from"),
        (["--seeds", "a"], "must be whole numbers"),
    ):
        assert sentence in refused([*given, *wrong], capsys)


def test_a_run_without_a_library_is_refused(place: Path, run: Path, capsys: Capture) -> None:
    given = ["compare", str(run), "--data", str(place / "suite"), "--shots", "4"]
    assert "LoRAs of a library" in refused(given, capsys)
