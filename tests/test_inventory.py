import math
from typing import Any

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import TASKS, copy_joined, relative_error, routed, stack
from torch import nn

from polyroute import MHRConfig, attach
from polyroute.layer.sites import find_sites
from polyroute.routes.inventory import Inventory

ALL = [
    (method, adapter)
    for method in ("mhr", "poly", "shared", "private")
    for adapter in ("lora", "ia3")
]


@pytest.mark.parametrize(("init", "heads"), [("mttl", 1), ("mttl", 8), ("peft", 1), ("peft", 8)])
def test_a_is_uniform_within_its_published_bound_and_b_is_zero(init: Any, heads: int) -> None:
    base = nn.Sequential(nn.Linear(64, 32))
    config = MHRConfig(init=init, num_heads=heads, num_skills=16)
    inventory = Inventory(find_sites(base, config), config, 16)
    bound = 1 / math.sqrt(3 * 64) if init == "mttl" else 1 / math.sqrt(64 / heads)
    a, b = inventory.lora_a["64x32"].detach(), inventory.lora_b["64x32"].detach()
    assert 0.995 * bound < float(a.abs().max()) <= bound
    assert float(a.std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert torch.equal(b, torch.zeros_like(b))


@given(
    st.sampled_from([1, 2, 4, 8]), st.integers(1, 5), st.integers(1, 4), st.sampled_from([1.0, 6.0])
)
def test_factors_are_the_blocks_mixed_head_by_head(
    heads: int, skills: int, rank: int, alpha: float
) -> None:
    model = routed(stack(), num_heads=heads, num_skills=skills, rank=rank, alpha=alpha)
    for site, factors in enumerate(model.factors_of("birch")):
        tensors = model.inventory.site_tensors(site)
        w = reference.weights(model.routes["birch"][site].double())
        mixed_a = reference.mix(tensors["lora_a"].double(), w, axis=0)
        mixed_b = reference.mix(tensors["lora_b"].double(), w, axis=1) * alpha / rank
        assert relative_error(factors.a, mixed_a.t()) < 1e-6
        assert relative_error(factors.b, mixed_b) < 1e-6


@pytest.mark.parametrize("heads", [1, 4, 8])
def test_ia3_factors_are_the_blocks_mixed_head_by_head(heads: int) -> None:
    model = routed(stack(), num_heads=heads, adapter="ia3")
    for site, factors in enumerate(model.factors_of("cedar")):
        skills = model.inventory.site_tensors(site)["ia3"].double()
        w = reference.weights(model.routes["cedar"][site].double())
        assert relative_error(factors.scale, reference.mix(skills, w, axis=1)) < 1e-6


def test_skills_are_named_and_shaped_as_in_the_published_layout() -> None:
    model = routed(stack(), num_heads=4, num_skills=3, rank=2)
    shapes = {name: tuple(t.shape) for name, t in model.inventory.site_tensors(1).items()}
    assert shapes == {"lora_a": (4, 3, 4, 2), "lora_b": (4, 3, 2, 2)}
    model = routed(stack(), num_heads=4, num_skills=3, adapter="ia3")
    assert {n: tuple(t.shape) for n, t in model.inventory.site_tensors(1).items()} == {
        "ia3": (4, 3, 1, 2)
    }


def test_layers_of_one_shape_keep_skills_of_their_own() -> None:
    model = routed(stack(), num_heads=2)
    assert [s.sites for s in model.inventory.stacks] == [(0, 2), (1,)]
    first, third = (model.inventory.site_tensors(i)["lora_a"] for i in (0, 2))
    assert torch.equal(third.transpose(-1, -2), model.inventory.lora_a["8x16"][1])
    assert not torch.equal(first, third)


def test_heads_do_not_raise_the_rank() -> None:
    model = routed(stack(narrow=16, wide=32), num_heads=8, rank=2)
    a, b = vars(model.factors_of("amber")[0]).values()
    assert int(torch.linalg.matrix_rank(b.t().double() @ a.double(), rtol=1e-5)) == 2


def test_equal_weights_over_heads_equal_poly_on_the_joined_blocks() -> None:
    mhr, poly = routed(stack(), num_heads=4), routed(stack(), method="poly")
    z = torch.randn(3, 1, 4)
    mhr.routes["amber"], poly.routes["amber"] = z.expand(3, 4, 4), z
    copy_joined(mhr, poly)
    x = torch.randn(5, 8)
    torch.testing.assert_close(mhr(x, tasks="amber"), poly(x, tasks="amber"))


def test_the_order_of_skills_does_not_matter() -> None:
    model, x = routed(stack(), num_heads=4), torch.randn(5, 8)
    expected = model(x, tasks="dune")
    order = [2, 0, 3, 1]
    with torch.no_grad():
        for parameter in model.inventory.parameters():
            parameter.copy_(parameter[:, :, order].clone())
    model.routes["dune"] = model.routes["dune"][..., order]
    torch.testing.assert_close(model(x, tasks="dune"), expected)


@pytest.mark.parametrize(("method", "adapter"), ALL)
def test_fresh_adapters_change_no_bit_of_the_base(method: Any, adapter: Any) -> None:
    base, x = stack(), torch.randn(5, 8)
    expected = base(x)
    model = attach(base, MHRConfig(method=method, adapter=adapter), TASKS)
    mixed = model(x, tasks=["amber", "birch", "amber", "dune", "cedar"])
    if adapter == "lora":
        assert torch.equal(model(x, tasks="birch"), expected)
        assert torch.equal(mixed, expected)
    # Weights sum to one up to rounding, and so does a mixture of ones.
    torch.testing.assert_close(model(x, tasks="birch"), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mixed, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("adapter", ["lora", "ia3"])
@pytest.mark.parametrize("heads", [1, 8])
def test_one_skill_is_one_shared_adapter_whatever_the_logits(adapter: Any, heads: int) -> None:
    one = routed(stack(), adapter=adapter, num_skills=1, num_heads=heads)
    shared = routed(stack(), adapter=adapter, method="shared")
    copy_joined(one, shared)
    x = torch.randn(5, 8)
    torch.testing.assert_close(one(x, tasks=[0, 1, 2, 3, 0]), shared(x))


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("adapter", ["lora", "ia3"])
def test_a_private_task_uses_exactly_its_own_skill(adapter: Any, rank: int) -> None:
    model = routed(stack(), method="private", adapter=adapter, rank=rank)
    for row, task in enumerate(TASKS):
        for site, factors in enumerate(model.factors_of(task)):
            tensors = model.inventory.site_tensors(site)
            own = [t[0, row] for t in tensors.values()]
            if adapter == "lora":
                own = [own[0].t(), own[1] * 1.5]  # alpha / rank
            assert all(torch.equal(f, o) for f, o in zip(vars(factors).values(), own, strict=True))


@pytest.mark.parametrize(("method", "adapter"), ALL)
def test_mu_is_the_plain_mean_of_the_skills(method: Any, adapter: Any) -> None:
    model = routed(stack(), method=method, adapter=adapter)
    for site, factors in enumerate(model.factors_of("mu")):
        tensors = list(model.inventory.site_tensors(site).values())
        w = reference.uniform(model.inventory.heads, model.inventory.num_skills)
        axes = [0, 1] if adapter == "lora" else [1]
        for factor, skills, axis in zip(vars(factors).values(), tensors, axes, strict=True):
            mixed = reference.mix(skills.double(), w, axis)
            scaled = mixed * model.adapter_config.scale  # of B alone; that of (IA)^3 is 1
            assert relative_error(factor, mixed.t() if axis == 0 else scaled) < 1e-6


def test_constant_logits_equal_mu_for_any_number_of_heads() -> None:
    for heads in (1, 2, 8):
        model, x = routed(stack(), num_heads=heads), torch.randn(5, 8)
        model.routes["amber"] = torch.full((3, heads, 4), -2.5)
        torch.testing.assert_close(model(x, tasks="amber"), model(x, tasks="mu"))


@pytest.mark.parametrize("adapter", ["lora", "ia3"])
@pytest.mark.parametrize("method", ["mhr", "poly", "private", "shared"])
def test_the_collapsed_average_computes_what_mu_computes(method: Any, adapter: Any) -> None:
    model, x = routed(stack(), method=method, adapter=adapter), torch.randn(5, 8)
    expected = model(x, tasks="mu")
    counts = model.counts()
    model.set_phase("mu")
    torch.testing.assert_close(model(x, tasks="mu"), expected)
    torch.testing.assert_close(model(x), expected)
    assert (
        model.num_trainable()
        == counts["one_adapter"]
        == counts["inventory"] // ({"shared": 1}.get(method, 4))
    )


def test_the_same_seed_gives_the_same_bits() -> None:
    models = []
    for _ in range(2):
        base = stack()
        torch.manual_seed(5)
        models.append(attach(base, MHRConfig(num_heads=4), TASKS))
    first, second = (m.state_dict() for m in models)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
