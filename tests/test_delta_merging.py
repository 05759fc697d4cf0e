"""Merges of LoRAs are those of their dense updates, computed slowly in fp64."""

import math
from collections.abc import Mapping
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from test_delta import deltas, dense, flat, near
from torch import Tensor

import polyroute as pr
from polyroute.layer.factors import LoRAFactors
from polyroute.library import merging
from polyroute.library.delta import keeping

FULL = keeping(9, None)
"""The ranks of every update."""


def merge(method: str, deltas: Mapping[str, pr.Delta], **options: Any) -> pr.Delta:
    weights = options.pop("weights", dict.fromkeys(deltas, 1.0))
    terms = merging.Terms(deltas, weights)
    return merging.merged(terms, merging.WAYS[method](terms, **options), FULL)


def libraries(size: int = 3, *, whole: bool = False) -> st.SearchStrategy[dict[str, pr.Delta]]:
    names = [f"lora{i}" for i in range(size)]
    return st.fixed_dictionaries({name: deltas(whole=whole) for name in names})


def elected(matrices: Mapping[str, Mapping[str, Tensor]], keep: float) -> dict[str, Tensor]:
    """TIES as its paper writes it, on `[LoRA][layer]`."""
    trimmed = {}
    for name, layers in matrices.items():
        every = torch.cat([m.flatten() for m in layers.values()]).abs()
        least = every.sort(descending=True).values[math.ceil(keep * len(every)) - 1]
        trimmed[name] = {
            layer: torch.where(m.abs() >= least * (1 - 1e-6), m, 0) for layer, m in layers.items()
        }
    found = {}
    for layer in {layer for layers in matrices.values() for layer in layers}:
        stack = torch.stack([layers[layer] for layers in trimmed.values() if layer in layers])
        agrees = (stack.sign() == stack.sum(0).sign()) & (stack != 0)
        found[layer] = (stack * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    return found


def own_layers(delta: pr.Delta) -> dict[str, Tensor]:
    return {layer: dense(delta)[layer] for layer in delta.layers}


def assert_equal(found: pr.Delta, expected: Mapping[str, Tensor]) -> None:
    assert found.layers.keys() == expected.keys()
    for layer, update in expected.items():
        assert near(dense(found)[layer], update), layer


@given(libraries(), st.sampled_from([0.1, 0.5, 0.99, 1.0]), st.floats(-2, 2, width=16))
def test_ties_is_that_of_dense_updates(
    library: dict[str, pr.Delta], keep: float, weight: float
) -> None:
    weights = dict.fromkeys(library, 1.0) | {"lora1": weight or 1.0}
    found = merge("ties", library, keep=keep, weights=weights)
    matrices = {name: own_layers(weights[name] * delta) for name, delta in library.items()}
    assert_equal(found, elected(matrices, keep))


@given(libraries(), st.sampled_from([0.5, 1.0]))
def test_knots_is_ties_in_the_common_basis(library: dict[str, pr.Delta], keep: float) -> None:
    matrices: dict[str, dict[str, Tensor]] = {name: {} for name in library}
    bases = {}
    for layer in {layer for delta in library.values() for layer in delta.layers}:
        there = {n: dense(d)[layer] for n, d in library.items() if layer in d.layers}
        u, s, v = torch.linalg.svd(torch.cat(list(there.values()), 1), full_matrices=False)
        count = int((s > 1e-6 * s[0]).sum())  # shares of entries count those of real directions
        bases[layer] = u[:, :count]
        parts = (s[:count, None] * v[:count]).chunk(len(there), 1)
        for name, part in zip(there, parts, strict=True):
            matrices[name][layer] = part
    found = merge("knots", library, keep=keep)
    expected = {layer: bases[layer] @ m for layer, m in elected(matrices, keep).items()}
    assert_equal(found, expected)


@pytest.mark.parametrize("method", ["ties", "knots"])
@given(delta=deltas())
def test_copies_of_one_lora_are_that_one(method: str, delta: pr.Delta) -> None:
    library = {"a": delta, "b": delta, "c": delta}
    assert near(flat(merge(method, library, keep=1.0)), flat(delta))


@given(libraries())
def test_dare_is_the_sum_on_average(library: dict[str, pr.Delta]) -> None:
    total = sum(flat(delta) for delta in library.values())
    assert isinstance(total, Tensor)
    assert near(flat(merge("dare", library, drop=0.0)), total)
    draws = torch.stack([flat(merge("dare", library, drop=0.5, seed=s)) for s in range(60)])
    spread = sum(flat(d).square() for d in library.values())
    assert isinstance(spread, Tensor)
    # An entry has the variance of its LoRAs' squares; 6 deviations of the mean over 60 draws.
    assert ((draws.mean(0) - total).abs() <= 6 * (spread / 60).sqrt() + 1e-4).all()
    assert torch.equal(draws[0], flat(merge("dare", library, drop=0.5, seed=0)))


@pytest.mark.parametrize("method", ["ties", "dare", "knots", "wudi", "arithmetic"])
@given(library=libraries(whole=True))
def test_neither_order_nor_the_choice_of_factors_matters(
    method: str, library: dict[str, pr.Delta]
) -> None:
    options = {} if method in ("arithmetic", "wudi") else {"drop": 0.3}
    expected = flat(merge(method, library, **options))
    turned = {}
    for name, delta in reversed(library.items()):
        layers = {}
        for layer, own in delta.layers.items():
            rank = len(own.a)
            m = torch.linalg.qr(torch.randn(rank, rank).double()).Q * 2
            a, b = m @ own.a.double(), torch.linalg.inv(m).t() @ own.b.double()
            layers[layer] = LoRAFactors(a.float(), b.float())
        turned[name] = pr.Delta(layers, delta.base)
    found = flat(merge(method, turned, **options))
    # Rounding may move an entry across the threshold of what stays, so a few may differ.
    differ = ~torch.isclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert int(differ.sum()) <= (0 if method in ("arithmetic", "dare") else len(expected) // 4)


def interference(m: Tensor, updates: list[Tensor]) -> Tensor:
    zero = torch.zeros((), dtype=torch.float64)
    return sum(((m - d) @ d.t()).square().sum() / d.square().sum() for d in updates) + zero


@given(libraries(whole=True))
def test_wudi_interferes_least(library: dict[str, pr.Delta]) -> None:
    found = dense(merge("wudi", library, ridge=0.0))
    for layer, update in found.items():
        updates = [dense(delta)[layer] for delta in library.values()]
        m = update.requires_grad_()
        loss = interference(m, updates)
        (gradient,) = torch.autograd.grad(loss, m)
        size = sum(float(d.square().sum()) for d in updates)
        assert float(gradient.norm()) <= 1e-3 * math.sqrt(size)
        assert loss.item() <= float(interference(sum(updates, torch.zeros(())), updates)) + 1e-6


@given(libraries(whole=True), deltas())
def test_wudi_of_one_is_that_one_and_a_strong_ridge_gives_the_sum(
    library: dict[str, pr.Delta], one: pr.Delta
) -> None:
    assert near(flat(merge("wudi", {"one": one}, ridge=0.0)), flat(one))
    assert near(flat(merge("wudi", {"one": one})), flat(one))
    total = sum((flat(delta) for delta in library.values()), torch.zeros(()))
    assert torch.allclose(
        flat(merge("wudi", library, ridge=1e6)), total, rtol=1e-3, atol=1e-3 * float(total.norm())
    )


@pytest.mark.parametrize("method", ["ties", "dare", "knots", "wudi"])
def test_loras_that_add_nothing_merge_to_nothing(method: str) -> None:
    zero = {"up": LoRAFactors(torch.ones(2, 7), torch.zeros(2, 5))}
    library = {"a": pr.Delta(zero, {}), "b": pr.Delta(zero, {})}
    assert not flat(merge(method, library)).any()


@given(st.integers(0, 2**20), st.floats(0.01, 1))
def test_thresholds_are_exact(seed: int, keep: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    layers = {f"layer{i}": torch.randn(5, 7, generator=generator).mul(10.0**i) for i in range(3)}
    found = merging._thresholds(list(layers), lambda layer: iter([("one", layers[layer])]), keep)
    every = torch.cat([m.flatten() for m in layers.values()]).abs()
    assert found["one"] == float(every.sort(descending=True).values[math.ceil(keep * 105) - 1])
