from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import TASKS, batch, llama, relative_error, routed, t5
from torch import Tensor, nn

from polyroute import RoutedModel

peft = pytest.importorskip("peft")

Build = Callable[[], nn.Module]
CASES = [(build, kind, heads) for build, kind in ((t5, "SEQ_2_SEQ_LM"), (llama, "CAUSAL_LM"))
         for heads in (1, 8)]  # fmt: skip
IDS = torch.tensor([2, 0, 3, 2])


def poly_model(build: Build, kind: str, heads: int) -> nn.Module:
    """PEFT's Poly, on every linear layer but the output; eval, so that routing is not sampled."""
    names = sorted({site.name.rsplit(".", 1)[-1] for site in routed(build()).sites})
    config = peft.PolyConfig(
        task_type=kind, poly_type="poly", r=3, n_tasks=4, n_skills=5, n_splits=heads,
        target_modules=names, init_weights=False,
    )  # fmt: skip
    torch.manual_seed(11)
    model: nn.Module = peft.get_peft_model(build(), config).eval()
    for name, parameter in model.named_parameters():
        if "module_logits" in name:
            parameter.data.normal_(std=2)
    return model


def tensors_of(model: nn.Module, site: str) -> tuple[Tensor, Tensor, Tensor]:
    """PEFT's A `[H, K, d_in/H, r]`, B `[H, K, r, d_out/H]` and logits `[T, H K]` of one layer."""
    layer: Any = model.get_submodule(f"base_model.model.{site}")
    router = layer.poly_router["default"].module_logits
    return layer.poly_lora_A["default"], layer.poly_lora_B["default"], router


@torch.no_grad()
def copied(theirs: nn.Module, build: Build, heads: int) -> RoutedModel:
    """Our model with PEFT's weights; PEFT scales by 1/r, which is alpha = 1."""
    model = routed(build(), num_heads=heads, num_skills=5, rank=3, alpha=1.0)
    table = []
    for i, site in enumerate(model.sites):
        a, b, logits = tensors_of(theirs, site.name)
        ours = model.inventory.site_tensors(i)
        ours["lora_a"].copy_(a)
        ours["lora_b"].copy_(b)
        table.append(logits.view(4, heads, 5))
    for row, task in enumerate(TASKS):
        model.routes[task] = torch.stack([logits[row] for logits in table])
    return model


@pytest.mark.parametrize(("build", "kind", "heads"), CASES)
@torch.no_grad()
def test_outputs_equal_those_of_peft(build: Build, kind: str, heads: int) -> None:
    theirs = poly_model(build, kind, heads)
    ours, inputs = copied(theirs, build, heads), batch(build())
    expected = theirs(**inputs, task_ids=IDS).logits
    assert relative_error(ours(**inputs, tasks=IDS).logits, expected) < 1e-5
    one = theirs(**inputs, task_ids=torch.full((4,), 1)).logits
    assert relative_error(ours(**inputs, tasks="birch").logits, one) < 1e-5
    assert relative_error(one, expected) > 1e-3


@pytest.mark.parametrize(("build", "kind", "heads"), CASES)
def test_gradients_equal_those_of_peft(build: Build, kind: str, heads: int) -> None:
    theirs = poly_model(build, kind, heads)
    ours, inputs = copied(theirs, build, heads), batch(build())
    theirs(**inputs, task_ids=IDS).loss.backward()
    ours(**inputs, tasks=IDS).loss.backward()
    table = ours.routes.logits.grad.view(4, len(ours.sites), heads, 5)
    for parameter in ours.inventory.parameters():
        parameter.data = parameter.grad
    for i, site in enumerate(ours.sites):
        a, b, logits = (t.grad for t in tensors_of(theirs, site.name))
        skills = ours.inventory.site_tensors(i)
        assert relative_error(skills["lora_a"], a) < 1e-4
        assert relative_error(skills["lora_b"], b) < 1e-4
        assert relative_error(table[:, i], logits.view(4, heads, 5)) < 1e-4


@pytest.mark.parametrize("heads", [1, 8])
def test_the_initial_bound_called_peft_is_that_of_peft(heads: int) -> None:
    bounds = []
    config = peft.PolyConfig(
        task_type="CAUSAL_LM", poly_type="poly", r=4, n_tasks=4, n_skills=16, n_splits=heads,
        target_modules=["up_proj"],
    )  # fmt: skip
    site = "model.layers.0.mlp.up_proj"
    theirs = tensors_of(peft.get_peft_model(llama(), config), site)[0]
    ours = routed(llama(), num_heads=heads, num_skills=16, init="peft", target_modules=["up_proj"])
    ours.inventory.reset_parameters()
    for a in (theirs, ours.inventory.site_tensors(0)["lora_a"]):
        bounds.append(float(a.detach().abs().max()))
    assert bounds[0] == pytest.approx(bounds[1], rel=0.02)
