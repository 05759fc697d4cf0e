from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import TASKS, batch, bert, gpt2, llama, relative_error, routed, stack, t5
from torch import nn

from polyroute import InputError

Build = Callable[[], nn.Module]
TOLERANCE = 1e-5
METHODS = [
    (method, adapter)
    for method in ("mhr", "poly", "shared", "private")
    for adapter in ("lora", "ia3")
]


@pytest.mark.parametrize("task", ["cedar", "mu"])
@pytest.mark.parametrize("adapter", ["lora", "ia3"])
@pytest.mark.parametrize("build", [t5, llama, gpt2, bert])
@torch.no_grad()
def test_a_merged_model_computes_the_task_and_unmerging_restores_every_bit(
    build: Build, adapter: Any, task: str
) -> None:
    model = routed(build(), num_heads=4, adapter=adapter, rank=2, alpha=3.0)
    inputs = batch(model.base_model)
    before = {k: v.clone() for k, v in model.base_model.state_dict().items()}
    expected = model(**inputs, tasks=task).logits
    model.merge(task)
    assert relative_error(model(**inputs).logits, expected) < TOLERANCE
    assert relative_error(model.base_model(**inputs).logits, expected) < TOLERANCE
    model.unmerge()
    assert all(torch.equal(v, before[k]) for k, v in model.base_model.state_dict().items())
    assert torch.equal(model(**inputs, tasks=task).logits, expected)


@pytest.mark.parametrize(("method", "adapter"), METHODS)
@torch.no_grad()
def test_every_method_merges(method: Any, adapter: Any) -> None:
    model, x = routed(stack(), method=method, adapter=adapter), torch.randn(5, 8)
    for task in (*TASKS, "mu"):
        expected = model(x, tasks=task)
        model.merge(task)
        assert relative_error(model(x), expected) < TOLERANCE
        model.unmerge()


@torch.no_grad()
def test_a_merged_model_refuses_other_tasks_and_takes_its_own() -> None:
    model, x = routed(stack()), torch.randn(2, 8)
    model.merge("amber")
    merged = model(x)
    for tasks in ("amber", 0, ["amber", "amber"]):
        assert torch.equal(model(x, tasks=tasks), merged)
    for tasks in ("birch", ["amber", "birch"], "mu", None):
        with pytest.raises(InputError, match=r"merged with 'amber'; call unmerge\(\)"):
            model.route(tasks)


def test_what_needs_the_original_weights_is_refused_while_merged(tmp_path: Any) -> None:
    model = routed(stack())
    model.merge("amber")
    for call in (
        lambda: model.merge("birch"),
        lambda: model.set_phase("full"),
        lambda: model.save_pretrained(tmp_path),
    ):
        with pytest.raises(InputError, match="merged with 'amber'"):
            call()
    model.unmerge()
    model.unmerge()
    model.save_pretrained(tmp_path)


@torch.no_grad()
def test_merging_an_unknown_task_changes_nothing() -> None:
    model = routed(stack())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(InputError, match="unknown task 'oak'"):
        model.merge("oak")
    assert model.merged_task is None
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_tied_weight_is_not_merged() -> None:
    base = stack()
    base.again.weight = base.up.weight
    model = routed(base)
    with pytest.raises(InputError, match="layer 'up' is tied to another layer"):
        model.merge("amber")
    assert model.merged_task is None


def test_a_quantised_weight_is_not_merged() -> None:
    base = stack()
    base.down.weight = nn.Parameter(torch.ones(8, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(InputError, match=r"layer 'down' is quantised .*as a LoRA"):
        routed(base).merge("amber")


@pytest.mark.parametrize("build", [t5, llama, gpt2, bert])
def test_unloading_gives_the_untouched_host(build: Build) -> None:
    base, inputs = build(), batch(build())
    frozen = next(iter(base.parameters())).requires_grad_(False)
    modules, keys = dict(base.named_modules()), list(base.state_dict())
    weights = {k: v.clone() for k, v in base.state_dict().items()}
    trainable = {n: p.requires_grad for n, p in base.named_parameters()}
    expected = base(**inputs).logits
    model = routed(base, num_heads=4)
    model(**inputs, tasks=list(TASKS))
    assert model.unload() is base
    assert dict(base.named_modules()) == modules
    assert list(base.state_dict()) == keys
    assert all(torch.equal(v, weights[k]) for k, v in base.state_dict().items())
    assert {n: p.requires_grad for n, p in base.named_parameters()} == trainable
    assert not frozen.requires_grad
    assert not base._forward_pre_hooks
    assert torch.equal(base(**inputs).logits, expected)
    routed(base, ("again",), num_heads=4)


@torch.no_grad()
def test_unloading_a_merged_model_gives_a_plain_model_of_one_task() -> None:
    model, x = routed(stack(), num_heads=4), torch.randn(5, 8)
    expected = model(x, tasks="dune")
    model.merge("dune")
    base = model.unload()
    assert type(base.up) is nn.Linear
    assert relative_error(base(x), expected) < TOLERANCE


@torch.no_grad()
def test_a_bf16_base_merges_to_within_its_own_rounding() -> None:
    model = routed(llama().bfloat16(), num_heads=4)
    inputs = batch(llama())
    exact = routed(llama(), num_heads=4)(**inputs, tasks="amber").logits
    routed_error = relative_error(model(**inputs, tasks="amber").logits, exact)
    model.merge("amber")
    assert model.base_model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert relative_error(model(**inputs).logits, exact) < 3 * routed_error


def test_unmerging_after_a_cast_restores_in_the_new_type() -> None:
    model, x = routed(stack(), adapter="ia3"), torch.randn(3, 8)
    expected = {k: v.bfloat16() for k, v in stack().state_dict().items()}
    model.merge("cedar")
    model.to(torch.bfloat16)
    model.unmerge()
    actual = model.base_model.state_dict()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
    assert model(x.bfloat16(), tasks="cedar").dtype == torch.bfloat16
