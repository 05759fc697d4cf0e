"""A route becomes one LoRA, exactly where it is constant, else as near as a rank allows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import batch, llama, relative_error
from torch import Tensor

import polyroute as pr
from polyroute.library.freezing import OF_TEXTS, OF_WEIGHTS, _regression, _Sums

peft = pytest.importorskip("peft")


@pytest.fixture
def model(loras: Path) -> pr.RoutedModel:
    return pr.attach(llama(), pr.Library.from_peft(loras)).eval()


def texts(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 30, (4, 12), generator=generator)} for _ in range(count)]


@torch.no_grad()
def logits(model: Any, rule: Any = None, **inputs: Tensor) -> Tensor:
    more = {} if rule is None else {"tasks": rule}
    found: Tensor = model(**inputs, **more).logits
    return found


def frozen_in_peft(frozen: Any, folder: Path) -> Any:
    frozen.save_peft(folder)
    return peft.PeftModel.from_pretrained(llama(), folder).eval()


def test_constant_weights_are_frozen_exactly(model: pr.RoutedModel, tmp_path: Path) -> None:
    rule = pr.Static(model, {"rs": 0.7, "plain": -0.4})
    frozen = pr.freeze(model, rule, [], rank=16)
    assert frozen.error == pytest.approx(0, abs=1e-6)
    theirs = frozen_in_peft(frozen, tmp_path)
    assert (
        relative_error(logits(theirs, **batch(llama())), logits(model, rule, **batch(llama())))
        < 1e-5
    )
    assert OF_WEIGHTS in (tmp_path / "README.md").read_text()
    small = pr.freeze(model, rule, [], rank=1)
    assert 0.1 < small.error < 1
    exact = pr.freeze(model, rule, [], rank=16).delta
    assert small.delta.error == pytest.approx((exact - small.delta).norm(), rel=1e-3)


def test_one_lora_for_all_tokens_is_found_again(loras: Path, tmp_path: Path) -> None:
    one = pr.attach(llama(), pr.Library.from_peft(loras), ["rs"]).eval()
    frozen = pr.freeze(one, pr.SpectR(top_k=1), texts(40), rank=5, ridge=0)
    assert frozen.error < 1e-3
    # Directions that no text shows are free, so the functions are compared, not the factors.
    theirs = frozen_in_peft(frozen, tmp_path)
    for own in texts(3, seed=9):
        assert relative_error(logits(theirs, **own), logits(one, "rs", **own)) < 1e-3


def test_a_route_of_tokens_is_approximated(model: pr.RoutedModel, tmp_path: Path) -> None:
    rule = pr.Arrow(top_k=1)
    frozen = pr.freeze(model, rule, texts(40), rank=12)
    assert 0.01 < frozen.error < 1
    base = llama()
    theirs = frozen_in_peft(frozen, tmp_path)
    inputs = texts(3, seed=9)
    live = torch.cat([logits(model, rule, **own) for own in inputs])
    plain = torch.cat([logits(base, **own) for own in inputs])
    found = torch.cat([logits(theirs, **own) for own in inputs])
    assert (found - live).norm() < 0.75 * (plain - live).norm()
    # Folding the mean weights is what one could do without the texts.
    mean = torch.cat([logits(model, "mu", **own) for own in inputs])
    assert (found - live).norm() < (mean - live).norm()
    more = pr.freeze(model, rule, texts(40), rank=3)
    assert more.error > frozen.error
    card = (tmp_path / "README.md").read_text()
    assert f"frozen from the route arrow by polyroute; {OF_TEXTS} {frozen.error:.3f} of" in card
    layer = model.sites[0].name
    assert f"- `{layer}`: {frozen.errors[layer]:.3f}" in card


def test_the_regression_is_the_best_of_its_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 7, generator=generator), torch.randn(60, 5, generator=generator)
    sums = _Sums(7, 5)
    for start in range(0, 60, 20):
        sums.add(x[start : start + 20], y[start : start + 20])
    for rank in (1, 3, 5):
        own = _regression(sums, rank, 0.0)
        found = own.a.t() @ own.b
        whole = torch.linalg.lstsq(x, y).solution
        _, _, v = torch.linalg.svd(x @ whole, full_matrices=False)
        expected = whole @ v[:rank].t() @ v[:rank]
        assert torch.allclose(found, expected, atol=1e-4)
        left = (x @ found - y).norm() / y.norm()
        assert sums.lost(own) == pytest.approx(float(left), rel=1e-4)


def test_padding_and_live_outputs_are_as_without_watching(model: pr.RoutedModel) -> None:
    padded = []
    for own in texts(10):
        ids = own["input_ids"]
        mask = torch.ones_like(ids)
        mask[:2, 8:] = 0
        padded.append({"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask})
    other = [{**own, "input_ids": own["input_ids"].masked_fill(own["attention_mask"] == 0, 2)}
             for own in padded]  # fmt: skip
    one, two = (pr.freeze(model, pr.Arrow(), given, rank=4) for given in (padded, other))
    assert one.errors == pytest.approx(two.errors, rel=1e-3)
    seen: list[Tensor] = []

    def run(model: pr.RoutedModel, given: dict[str, Tensor], rule: pr.RouteRule) -> None:
        seen.append(model(**given, tasks=rule).logits)

    pr.freeze(model, pr.Arrow(), texts(6), rank=4, run=run)
    for own, found in zip(texts(6), seen, strict=True):
        assert relative_error(found, logits(model, pr.Arrow(), **own)) < 1e-5


def test_too_little_is_refused(model: pr.RoutedModel) -> None:
    with pytest.raises(pr.InputError, match="at least 5 texts, of which one measures the error"):
        pr.freeze(model, pr.Arrow(), texts(4))
    with pytest.raises(pr.InputError, match="rank must be a positive"):
        pr.freeze(model, pr.Arrow(), texts(9), rank=0)
    with pytest.raises(pr.InputError, match="a route in which tokens choose is frozen"):
        pr.freeze(model, model.rule, texts(9))


def test_all_forwards_of_a_text_are_left_out_together(model: pr.RoutedModel) -> None:
    """Texts that are left out differ from the others, however often the model runs on each."""
    same, other = texts(1)[0], texts(1, seed=5)[0]
    given = [same] * 4 + [other]

    def often(model: pr.RoutedModel, text: dict[str, Tensor], rule: pr.RouteRule) -> None:
        for _ in range(3):
            model(**text, tasks=rule)

    once = pr.freeze(model, pr.Arrow(), given, rank=4)
    thrice = pr.freeze(model, pr.Arrow(), given, rank=4, run=often)
    assert thrice.errors == pytest.approx(once.errors, rel=1e-3)
    seen = pr.freeze(model, pr.Arrow(), [same] * 5, rank=4)
    assert seen.error < 0.8 * once.error
    with pytest.raises(pr.InputError, match="there are 2"):
        pr.freeze(model, pr.Arrow(), given[:2], rank=4, run=often)
