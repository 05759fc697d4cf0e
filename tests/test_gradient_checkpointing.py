from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import batch, llama, relative_error, routed, stack, t5
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from polyroute import InputError, RoutedModel

Build = Callable[[], nn.Module]
MIXED = ["birch", "amber", "dune", "birch"]
TOLERANCE = 2e-6


def gradients(model: RoutedModel) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected) > 1
    assert all(relative_error(a, b) < TOLERANCE for a, b in zip(actual, expected, strict=True))


def pair(build: Build, **config: Any) -> tuple[RoutedModel, RoutedModel, dict[str, Tensor]]:
    """A plain model, the same with checkpointing, both in training mode, and a batch."""
    plain, checked = (routed(build(), num_heads=4, **config) for _ in range(2))
    checked.gradient_checkpointing_enable()
    return plain.train(), checked.train(), batch(plain.base_model)


@pytest.mark.parametrize("tasks", ["cedar", MIXED])
@pytest.mark.parametrize("build", [t5, llama])
def test_the_route_may_close_before_backward(build: Build, tasks: Any) -> None:
    plain, checked, inputs = pair(build)
    for model in (plain, checked):
        with model.route(tasks):
            loss = model(**inputs).loss
        loss.backward()
    assert_same(gradients(checked), gradients(plain))


@pytest.mark.parametrize("build", [t5, llama])
def test_blocks_are_really_recomputed(build: Build) -> None:
    counts = []
    for model in pair(build)[:2]:
        calls: list[int] = []
        model.sites[0].layer.register_forward_hook(lambda *_, c=calls: c.append(1))
        model(**batch(model.base_model), tasks=MIXED).loss.backward()
        counts.append(len(calls))
    assert counts == [1, 2]


@pytest.mark.parametrize("build", [t5, llama])
def test_two_forwards_of_different_tasks_may_precede_one_backward(build: Build) -> None:
    plain, checked, inputs = pair(build)
    for model in (plain, checked):
        first = model(**inputs, tasks="cedar").loss
        second = model(**inputs, tasks=MIXED).loss
        (first + 2 * second).backward()
    assert_same(gradients(checked), gradients(plain))


def test_backward_may_run_inside_another_route() -> None:
    plain, checked, inputs = pair(llama)
    for model in (plain, checked):
        loss = model(**inputs, tasks="cedar").loss
        with model.route("amber"):
            model(**inputs)
            loss.backward()
    assert_same(gradients(checked), gradients(plain))


def test_noisy_gates_are_recomputed_with_the_noise_of_the_forward() -> None:
    plain, checked, inputs = pair(llama, gate="relaxed_bernoulli")
    for model in (plain, checked):
        torch.manual_seed(4)
        model(**inputs, tasks=MIXED).loss.backward()
    assert_same(gradients(checked), gradients(plain))


def test_reentrant_checkpointing_is_refused() -> None:
    with pytest.raises(InputError, match="reentrant checkpointing cannot be routed"):
        routed(llama()).gradient_checkpointing_enable({"use_reentrant": True})


class Checkpointed(nn.Module):
    """A model that checkpoints its only block by torch's own function."""

    def __init__(self) -> None:
        super().__init__()
        self.block = stack()
        self.options: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.block, x, use_reentrant=False, **self.options)
        return y


def test_a_bare_checkpoint_in_a_closed_route_says_what_to_do() -> None:
    model, x = routed(Checkpointed()), torch.randn(2, 8, requires_grad=True)
    loss = model(x, tasks=["amber", "dune"]).square().sum()
    with pytest.raises(InputError, match=r"context_fn=model\.checkpoint_contexts"):
        loss.backward()


def test_a_bare_checkpoint_never_takes_the_route_that_is_open_at_backward() -> None:
    model, x = routed(Checkpointed()), torch.randn(2, 8, requires_grad=True)
    loss = model(x, tasks="amber").square().sum()
    with model.route("dune"):
        model(x)
        with pytest.raises(InputError, match=r"context_fn=model\.checkpoint_contexts"):
            loss.backward()


def test_a_part_that_is_recomputed_never_takes_what_another_part_was_given() -> None:
    model, x = routed(stack()), torch.randn(2, 8, requires_grad=True)
    parts = model.base_model
    with model.route("amber"):
        loss = checkpoint(parts.down, parts.up(x), use_reentrant=False).square().sum()
    with model.route("dune"):
        parts.up(x)
        with pytest.raises(InputError, match=r"context_fn=model\.checkpoint_contexts"):
            loss.backward()


@pytest.mark.parametrize("tasks", ["cedar", ["amber", "dune"]])
def test_a_bare_checkpoint_with_the_models_contexts_is_exact(tasks: Any) -> None:
    plain, checked = routed(Checkpointed()), routed(Checkpointed())
    checked.base_model.options = {"context_fn": checked.checkpoint_contexts}
    x = torch.randn(2, 8)
    plain(x, tasks=tasks)
    with plain.route(tasks):
        plain.base_model.block(x).square().sum().backward()
    checked(x, tasks=tasks).square().sum().backward()
    assert_same(gradients(checked), gradients(plain))


def test_generation_still_works_with_checkpointing_on() -> None:
    plain, checked, inputs = pair(llama)
    options = {"max_new_tokens": 4, "do_sample": False, "tasks": MIXED}
    ids = inputs["input_ids"]
    expected = plain.eval().generate(ids, **options)
    assert torch.equal(checked.eval().generate(ids, **options), expected)
