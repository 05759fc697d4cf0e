"""The arithmetic of LoRAs is that of their dense updates, and PEFT computes the same with them."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from models import batch, gpt2, llama, relative_error
from safetensors.torch import load_file, save_file
from test_lora_import import KEY, PATTERNS, written
from torch import Tensor

import polyroute as pr
from polyroute.layer.factors import LoRAFactors

peft = pytest.importorskip("peft")

SIZES = {"up": (7, 5), "down": (4, 9)}
"""Widths in and out of two layers."""
SOURCE = {"base_model_name_or_path": "base", "task_type": None, "fan_in_fan_out": False}


@st.composite
def deltas(draw: st.DrawFn, *, whole: bool = False) -> pr.Delta:
    """Random updates of one or both layers, of any ranks, up to more than the layers have."""
    names = draw(st.sets(st.sampled_from(sorted(SIZES)), min_size=len(SIZES) if whole else 1))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    layers = {}
    for name in sorted(names):
        rank = draw(st.integers(1, 6))
        layers[name] = LoRAFactors(
            *(torch.randn(rank, width, generator=generator) for width in SIZES[name])
        )
    return pr.Delta(layers, SOURCE)


def dense(delta: pr.Delta) -> dict[str, Tensor]:
    """The update of every layer in fp64; zero where there is none."""
    zero = {name: torch.zeros(out, width).double() for name, (width, out) in SIZES.items()}
    return zero | {n: own.b.double().t() @ own.a.double() for n, own in delta.layers.items()}


def flat(delta: pr.Delta) -> Tensor:
    return torch.cat([update.flatten() for update in dense(delta).values()])


def flat_layers(delta: pr.Delta) -> Tensor:
    """The update of any layers, in the order of their names."""
    every = [delta.layers[name] for name in sorted(delta.layers)]
    return torch.cat([(own.b.double().t() @ own.a.double()).flatten() for own in every])


def near(one: Tensor, other: Tensor) -> bool:
    return bool(torch.allclose(one, other, rtol=1e-4, atol=1e-5))


numbers = st.floats(-3, 3, width=32)


@given(deltas(), deltas(), numbers, numbers)
def test_sums_and_products_are_the_dense_ones(
    one: pr.Delta, other: pr.Delta, x: float, y: float
) -> None:
    assert near(flat(x * one + other * y), x * flat(one) + y * flat(other))
    assert near(flat(one - other), flat(one) - flat(other))
    assert torch.equal(flat(-one), -flat(one))
    assert near(flat(one + other), flat(other + one))


@given(deltas(), deltas())
def test_norms_and_cosines_are_the_dense_ones(one: pr.Delta, other: pr.Delta) -> None:
    a, b = flat(one), flat(other)
    assert one.norm() == pytest.approx(float(a.norm()), rel=1e-9)
    assert one.inner(other) == pytest.approx(float(a @ b), rel=1e-9, abs=1e-9)
    cosine = float(torch.cosine_similarity(a, b, dim=0))
    assert one.cosine(other) == pytest.approx(cosine, rel=1e-9, abs=1e-9)
    assert one.cosine(2 * one) == pytest.approx(1)


@given(deltas(), st.integers(1, 6))
def test_recompress_is_the_best_update_of_a_rank(delta: pr.Delta, rank: int) -> None:
    small = delta.recompress(rank=rank)
    lost = 0.0
    for name, update in dense(delta).items():
        values = torch.linalg.svdvals(update)
        lost += float(values[rank:].square().sum())
        if name in small.layers:
            assert small.ranks[name] <= min(rank, delta.ranks[name])
    assert small.error == pytest.approx(math.sqrt(lost), rel=1e-6, abs=1e-6)
    assert float((flat(delta) - flat(small)).norm()) == pytest.approx(math.sqrt(lost), abs=1e-4)


@given(deltas(), st.floats(0.01, 1))
def test_recompress_keeps_the_energy_and_no_more(delta: pr.Delta, energy: float) -> None:
    small = delta.recompress(energy=energy)
    for name, own in small.layers.items():
        values = torch.linalg.svdvals(dense(delta)[name]).square()
        kept = len(own.a)
        assert values[:kept].sum() >= (energy - 1e-6) * values.sum()
        assert kept == 1 or values[: kept - 1].sum() < (energy + 1e-6) * values.sum()


@given(deltas(), deltas())
def test_a_sum_is_recompressed_to_what_it_is(one: pr.Delta, other: pr.Delta) -> None:
    both = one + one + other - other
    small = both.recompress(energy=1)
    assert near(flat(small), 2 * flat(one))
    full = {name: min(SIZES[name]) for name in SIZES}
    for name, rank in small.ranks.items():
        assert rank <= max(1, min(one.ranks.get(name, 0), full[name]))
    assert small.error <= 1e-4 * both.norm() + 1e-5


@given(deltas(whole=True), deltas(whole=True), st.integers(0, 2**20))
def test_nothing_depends_on_how_an_update_is_factored(
    one: pr.Delta, other: pr.Delta, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, own in one.layers.items():
        rotation, _ = torch.linalg.qr(torch.randn(len(own.a), len(own.a), generator=generator))
        change = rotation * torch.linspace(0.5, 2, len(own.a))
        layers[name] = LoRAFactors(change @ own.a, torch.linalg.inv(change).t() @ own.b)
    same = pr.Delta(layers, SOURCE)
    assert same.norm() == pytest.approx(one.norm(), rel=1e-4)
    assert same.inner(other) == pytest.approx(one.inner(other), rel=1e-3, abs=1e-3)
    assert same.recompress(rank=1).error == pytest.approx(
        one.recompress(rank=1).error, rel=1e-3, abs=1e-3
    )
    assert near(flat(same.recompress(rank=6)), flat(one))


def test_what_recompress_lost_stays_known() -> None:
    torch.manual_seed(0)
    layers = {"up": LoRAFactors(torch.randn(4, 7), torch.randn(4, 5))}
    delta = pr.Delta(layers, SOURCE)
    once = delta.recompress(rank=3)
    assert 0 < once.error < once.recompress(rank=2).error
    both = 2 * once - once
    assert both.error == pytest.approx(3 * once.error)
    assert float((flat(both) - flat(delta)).norm()) <= both.error


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, PATTERNS, {**PATTERNS, "use_rslora": True}],
    ids=["plain", "rslora", "patterns", "both"],
)
def test_a_lora_of_peft_is_itself_after_reading_and_writing(
    tmp_path: Path, settings: Mapping[str, Any]
) -> None:
    theirs = written(tmp_path / "one", **settings)
    pr.Delta.from_peft(tmp_path / "one").save_peft(tmp_path / "two")
    ours = peft.PeftModel.from_pretrained(llama(), tmp_path / "two").eval()
    inputs = batch(llama())
    with torch.no_grad():
        assert relative_error(ours(**inputs).logits, theirs(**inputs).logits) < 1e-5


def test_a_weighted_sum_of_mixed_ranks_is_what_peft_computes_with_it(tmp_path: Path) -> None:
    written(tmp_path / "one", r=2, use_rslora=True)
    written(tmp_path / "two", r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"])
    both = [pr.Delta.from_peft(tmp_path / name) for name in ("one", "two")]
    (both[0] - 0.5 * both[1]).save_peft(tmp_path / "sum")
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "sum").merge_and_unload()
    base = llama().state_dict()
    for name, weight in loaded.state_dict().items():
        layer = name.removesuffix(".weight")
        update = torch.zeros_like(weight).double()
        for delta, factor in zip(both, (1, -0.5), strict=True):
            if layer in delta.layers:
                own = delta.layers[layer]
                update += factor * own.b.double().t() @ own.a.double()
        assert torch.allclose(weight.double(), base[name].double() + update, atol=1e-5), name
    config = json.loads((tmp_path / "sum" / "adapter_config.json").read_text())
    assert config["r"] == 5
    assert set(config["rank_pattern"].values()) == {2}


def test_a_transposed_base_model_says_so(tmp_path: Path) -> None:
    settings = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    theirs = written(tmp_path / "one", gpt2, **settings)
    (0.5 * pr.Delta.from_peft(tmp_path / "one")).save_peft(tmp_path / "half")
    ours = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "half").eval()
    whole = theirs.merge_and_unload().state_dict()
    for name, weight in ours.merge_and_unload().state_dict().items():
        half = (gpt2().state_dict()[name] + whole[name]) / 2
        assert torch.allclose(weight, half, atol=1e-6), name


def test_what_cannot_be_computed_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    one = pr.Delta({"up": LoRAFactors(torch.randn(2, 7), torch.randn(2, 5))}, SOURCE)
    wide = pr.Delta({"up": LoRAFactors(torch.randn(2, 8), torch.randn(2, 5))}, SOURCE)
    for compute in (lambda: one + wide, lambda: one.inner(wide)):
        with pytest.raises(pr.InputError, match="width of 7 in one LoRA and of 8 in another"):
            compute()
    with pytest.raises(pr.InputError, match="must be a finite number"):
        _ = math.nan * one
    with pytest.raises(TypeError):
        _ = one * "2"  # type: ignore[operator]
    with pytest.raises(pr.InputError, match="has no cosine"):
        one.cosine(0.0 * one)
    for settings in ({}, {"rank": 1, "energy": 0.5}):
        with pytest.raises(pr.InputError, match="either rank or energy"):
            one.recompress(**settings)
    for rank in (0, True, 1.5):
        with pytest.raises(pr.InputError, match="rank must be a positive whole number"):
            one.recompress(rank=rank)  # type: ignore[arg-type]
    for energy in (0.0, 1.5, math.nan, True):
        with pytest.raises(pr.InputError, match="energy must be"):
            one.recompress(energy=energy)
    other = pr.Delta(one.layers, {**SOURCE, "base_model_name_or_path": "another"})
    with pytest.warns(UserWarning, match="their sum names none"):
        both = one + other
    assert both.base["base_model_name_or_path"] is None
    with pytest.raises(pr.InputError, match="fan_in_fan_out"):
        _ = one + pr.Delta(one.layers, {**SOURCE, "fan_in_fan_out": True})
    with pytest.raises(pr.InputError, match="is no PEFT checkpoint"):
        pr.Delta.from_peft(tmp_path)


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    written(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors[f"{KEY}.lora_A.weight"][0, 0] = math.nan
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(pr.InputError, match=r"q_proj' is not finite"):
        pr.Delta.from_peft(tmp_path)


def test_a_copy_of_the_output_layer_is_left_out_with_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="embedding"):  # PEFT says that it saves the layer
        written(tmp_path, target_modules=["q_proj", "lm_head"])
    assert "base_model.model.lm_head.base_layer.weight" in load_file(
        tmp_path / "adapter_model.safetensors"
    )
    with pytest.warns(UserWarning, match=r"lm_head\.base_layer\.weight', which is taken for a"):
        delta = pr.Delta.from_peft(tmp_path)
    assert "lm_head" in delta.layers


def test_factors_are_read_when_they_are_used(tmp_path: Path) -> None:
    written(tmp_path, use_rslora=True)
    delta = pr.Delta.from_peft(tmp_path)
    layer = next(iter(delta.layers))
    stored = load_file(tmp_path / "adapter_model.safetensors")
    expected = stored[f"base_model.model.{layer}.lora_B.weight"] * (4 / math.sqrt(3))
    assert torch.equal(delta.layers[layer].b, expected.t())
    assert delta.layers[layer] is not delta.layers[layer]


def test_the_card_says_how_exact_an_update_is(tmp_path: Path) -> None:
    written(tmp_path / "lora")
    delta = pr.Delta.from_peft(tmp_path / "lora")
    (2 * delta).save_peft(tmp_path / "twice")
    assert "computed exactly from" in (tmp_path / "twice" / "README.md").read_text()
    small = delta.recompress(rank=1)
    small.save_peft(tmp_path / "small")
    share = (delta - small).norm() / delta.norm()
    assert small.error == pytest.approx((delta - small).norm(), rel=1e-4)
    card = (tmp_path / "small" / "README.md").read_text()
    assert f"at most {small.error:.3g} from the exact one, which is {share:.1%}" in card


def test_sums_and_quotients_are_written_as_usual(tmp_path: Path) -> None:
    written(tmp_path)
    delta = pr.Delta.from_peft(tmp_path)
    assert near(flat_layers(sum([delta, delta]) / 4), flat_layers(0.5 * delta))  # type: ignore[arg-type, operator]
    for act in (lambda: delta + 1, lambda: delta - "x", lambda: delta / 0, lambda: delta * True):
        with pytest.raises(TypeError):
            act()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("weight", [1e39, 10**400, float("inf"), -1e38])
def test_weights_that_overflow_are_refused(tmp_path: Path, weight: float) -> None:
    written(tmp_path / "lora")
    delta = pr.Delta.from_peft(tmp_path / "lora")
    with pytest.raises(pr.InputError, match="the weight of a LoRA must be"):
        weight * delta
    with pytest.raises(pr.InputError, match=r"the (weight|divisor) of a LoRA must be"):
        _ = delta / (weight if weight > 1e38 else 1e-320)
    large = 1e30 * (1e30 * delta)
    with pytest.raises(pr.InputError, match=r"is not written to .* not finite: use smaller"):
        large.save_peft(tmp_path / "large")
    assert not (tmp_path / "large").exists()


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("", "a path is empty"),
        (None, "a path must be a text"),
        ("x" * 300, "has a name of 300 bytes in it"),
        ("a\0b", "remove the zero byte"),
        ("\ud800", "a character that cannot be written"),
    ],
)
def test_a_folder_that_cannot_be_is_refused(tmp_path: Path, folder: Any, message: str) -> None:
    written(tmp_path)
    delta = pr.Delta.from_peft(tmp_path)
    for use in (delta.save_peft, pr.Delta.from_peft, pr.SavedRoutes, pr.open_suite):
        with pytest.raises(pr.InputError, match=message):
            use(folder)
