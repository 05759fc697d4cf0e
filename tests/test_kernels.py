import copy
from collections.abc import Callable

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import TASKS, relative_error, routed, stack
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from polyroute import InputError, RoutedModel
from polyroute.layer.ia3 import apply_ia3
from polyroute.layer.kernels import LinearLoRA, LinearLoRAPerExample, apply_lora

TOLERANCE = 1e-6  # relative to the largest entry; gates are fp32 also in a float64 model

HEADS = st.sampled_from([1, 2, 4, 8])
AXES = st.sampled_from([(), (3,), (2, 3)])


def reference_stack(
    model: RoutedModel, x: Tensor, rows: list[int], skills: list[list[Tensor]], table: Tensor
) -> Tensor:
    """The three layers of `stack`, example by example."""
    scale, outputs = model.adapter_config.scale, []
    for example, row in zip(x, rows, strict=True):
        y = example
        for i, site in enumerate(model.sites):
            w = reference.weights(table[row, i])
            weight, bias = site.layer.weight, site.layer.bias
            if len(skills[i]) == 1:
                y = reference.ia3(y, weight, bias, skills[i][0], w)
            else:
                y = reference.lora(y, weight, bias, *skills[i], w, scale)
            y = torch.tanh(y) if i < 2 else y
        outputs.append(y)
    return torch.stack(outputs)


def leaves(model: RoutedModel) -> tuple[list[list[Tensor]], Tensor]:
    """Copies of the skills in the published layout and of the table, for autograd."""
    skills = [
        [t.detach().clone().requires_grad_() for t in model.inventory.site_tensors(i).values()]
        for i in range(len(model.sites))
    ]
    table = torch.stack([model.routes[i] for i in range(len(model.tasks))])
    return skills, table.requires_grad_()


def site_gradients(model: RoutedModel) -> list[list[Tensor]]:
    """The gradients of the skills, in the published layout, by the same path as the values."""
    grown = copy.deepcopy(model.inventory)
    for copied, parameter in zip(grown.parameters(), model.inventory.parameters(), strict=True):
        assert parameter.grad is not None
        copied.data = parameter.grad
    return [list(grown.site_tensors(i).values()) for i in range(len(model.sites))]


def assert_equations_hold(model: RoutedModel, x: Tensor, rows: list[int], one: bool) -> None:
    model.double()
    skills, table = leaves(model)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    actual = model(inputs[0], tasks=rows[0] if one else rows)
    expected = reference_stack(model, inputs[1], rows, skills, table)
    assert relative_error(actual, expected) < TOLERANCE
    weighting = torch.linspace(-1, 2, actual.numel(), dtype=x.dtype).view(actual.shape)
    (actual * weighting).sum().backward()
    (expected * weighting).sum().backward()
    pairs = [(inputs[0].grad, inputs[1].grad), (model.routes.logits.grad, table.grad.flatten(1))]
    for ours, theirs in zip(site_gradients(model), skills, strict=True):
        pairs += [(g, t.grad) for g, t in zip(ours, theirs, strict=True)]
    assert all(relative_error(ours, theirs) < TOLERANCE for ours, theirs in pairs)


@given(HEADS, st.integers(2, 4), st.integers(1, 4), AXES, st.integers(1, 5), st.data())
def test_a_batch_of_several_tasks_follows_the_equations_with_all_gradients(
    heads: int, skills: int, rank: int, axes: tuple[int, ...], size: int, data: st.DataObject
) -> None:
    rows = data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    model = routed(stack(), num_heads=heads, num_skills=skills, rank=rank, alpha=1.5)
    x = torch.randn(size, *axes, 8, dtype=torch.float64)
    assert_equations_hold(model, x, rows, one=False)


@given(HEADS, st.integers(2, 4), st.integers(1, 4), AXES, st.booleans())
def test_a_batch_of_one_task_follows_the_equations_with_all_gradients(
    heads: int, skills: int, rank: int, axes: tuple[int, ...], bias: bool
) -> None:
    model = routed(stack(bias=bias), num_heads=heads, num_skills=skills, rank=rank, alpha=1.5)
    x = torch.randn(3, *axes, 8, dtype=torch.float64)
    assert_equations_hold(model, x, [2, 2, 2], one=True)


@given(HEADS, st.integers(2, 4), AXES, st.integers(1, 4), st.data())
def test_ia3_follows_the_equations_with_all_gradients(
    heads: int, skills: int, axes: tuple[int, ...], size: int, data: st.DataObject
) -> None:
    rows = data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    model = routed(stack(), num_heads=heads, num_skills=skills, adapter="ia3")
    x = torch.randn(size, *axes, 8, dtype=torch.float64)
    assert_equations_hold(model, x, rows, one=len(set(rows)) == 1)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("rank", [1, 4])
def test_the_equations_hold_in_fp32_for_an_odd_batch(heads: int, rank: int) -> None:
    model, x = routed(stack(), num_heads=heads, rank=rank), torch.randn(5, 3, 8)
    rows = [0, 3, 1, 3, 2]
    actual = model(x, tasks=rows)
    skills, table = leaves(model.double())
    expected = reference_stack(model, x.double(), rows, skills, table)
    assert relative_error(actual, expected) < 1e-6


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("per_example", [True, False])
def test_both_executors_pass_gradcheck(per_example: bool, bias: bool) -> None:
    torch.manual_seed(0)
    lead = (3,) if per_example else ()
    x = torch.randn(*(lead or (3,)), *((4,) if per_example else ()), 5).double().requires_grad_()
    a = torch.randn(*lead, 2, 5).double().requires_grad_()
    b = torch.randn(*lead, 2, 6).double().requires_grad_()
    weight, c = torch.randn(6, 5).double(), torch.randn(6).double() if bias else None
    function = LinearLoRAPerExample if per_example else LinearLoRA
    assert torch.autograd.gradcheck(lambda *t: function.apply(t[0], weight, c, *t[1:]), (x, a, b))


@pytest.mark.parametrize("tasks", ["amber", ["amber", "birch", "amber", "dune"]])
def test_a_second_derivative_raises_instead_of_being_wrong(tasks: str | list[str]) -> None:
    model, x = routed(stack(), num_heads=4), torch.randn(4, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x, tasks=tasks).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def observed(base: nn.Module) -> nn.Module:
    """A layer whose hook must see every call, so that the plain path is taken."""
    base.register_forward_hook(lambda *_: None)
    return base


def quantised(base: nn.Module) -> nn.Module:
    """A layer that torch's own linear is not, as quantised layers are."""

    class Other(nn.Module):
        weight, bias = base.weight, base.bias

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = base(x)
            return y

    return Other()


@pytest.mark.parametrize("wrap", [observed, quantised])
@pytest.mark.parametrize("per_example", [True, False])
def test_the_plain_path_equals_the_one_that_owns_the_arithmetic(
    wrap: Callable[[nn.Module], nn.Module], per_example: bool
) -> None:
    torch.manual_seed(0)
    base, x = nn.Linear(5, 6).requires_grad_(False), torch.randn(3, 4, 5, requires_grad=True)
    lead = (3,) if per_example else ()
    factors = [torch.randn(*lead, 2, d, requires_grad=True) for d in (5, 6)]
    results = []
    for layer in (base, wrap(copy.deepcopy(base))):
        y = apply_lora(layer, x, *factors, 0.0)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *factors])])
    assert all(relative_error(*pair) < 1e-6 for pair in zip(*results, strict=True))


def test_hooks_of_a_base_layer_are_called() -> None:
    base, seen = stack(), []
    base.down.register_forward_hook(lambda *_: seen.append("down"))
    routed(base)(torch.randn(2, 8), tasks="amber")
    assert seen == ["down"]


def test_a_trainable_base_layer_gets_its_gradient() -> None:
    base, x = nn.Linear(5, 6), torch.randn(3, 5)
    a, b = torch.randn(2, 5), torch.randn(2, 6)
    apply_lora(base, x, a, b, 0.0).sum().backward()
    assert base.weight.grad is not None
    torch.testing.assert_close(base.weight.grad, x.sum(0).expand(6, 5))


@pytest.mark.parametrize("per_example", [True, False])
def test_conv1d_weights_are_taken_as_stored(per_example: bool) -> None:
    torch.manual_seed(0)
    conv, x = Conv1D(6, 5).requires_grad_(False), torch.randn(3, 4, 5)
    linear = nn.Linear(5, 6).requires_grad_(False)
    linear.weight.data, linear.bias.data = conv.weight.t(), torch.randn(6)
    conv.bias.data = linear.bias.data
    lead = (3,) if per_example else ()
    a, b = torch.randn(*lead, 2, 5), torch.randn(*lead, 2, 6)
    assert relative_error(apply_lora(conv, x, a, b, 0.0), apply_lora(linear, x, a, b, 0.0)) < 1e-6


@pytest.mark.parametrize("adapter", ["lora", "ia3"])
def test_windows_of_an_example_are_routed_as_the_example(adapter: str) -> None:
    class Windowed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = stack()

        def forward(self, x: Tensor) -> Tensor:
            return self.stack(x.reshape(-1, 5, 8))

    model, x = routed(Windowed(), num_heads=4, adapter=adapter), torch.randn(2, 15, 8)
    with model.route(["amber", "dune"]):
        actual = model(x)
    with model.route([0, 0, 0, 3, 3, 3]):
        torch.testing.assert_close(actual, model.base_model(x.reshape(6, 5, 8)))
        with pytest.raises(InputError, match="6 tasks were given for a batch of 2 examples"):
            model(x)


@pytest.mark.parametrize("adapter", ["lora", "ia3"])
def test_rows_that_cannot_be_divided_among_the_examples_are_refused(adapter: str) -> None:
    model = routed(stack(), adapter=adapter)
    with model.route(["amber", "birch"]), pytest.raises(InputError, match="tasks were given"):
        model(torch.randn(3, 8))
    part = "2 tasks were given for a part of the model that runs on 3 examples"
    with model.route(["amber", "birch"]), pytest.raises(InputError, match=part):
        model.base_model.up(torch.randn(3, 3, 8))


def test_adapter_dropout_acts_in_training_only_and_on_the_update_only() -> None:
    model, x = routed(stack(), method="shared", dropout=0.5), torch.ones(64, 8)
    plain = routed(stack(), method="shared")
    model.eval()
    assert torch.equal(model(x), plain(x))
    layer, base = model.train().routed_layers[0], model.sites[0].layer
    with model.route("amber"):
        update = layer(x) - base(x)
        assert not torch.equal(update[0], update[1])
        many = torch.stack([layer(x) - base(x) for _ in range(100)])
    model.eval()
    with model.route("amber"):
        full = layer(x[:1]) - base(x[:1])
    assert relative_error(many.mean((0, 1)), full[0]) < 0.05


@pytest.mark.parametrize("tasks", ["amber", ["amber", "birch", "cedar", "dune"]])
def test_dropout_at_zero_probability_changes_no_bit(tasks: str | list[str]) -> None:
    x = torch.randn(4, 8)
    model = routed(stack(), num_heads=4)
    assert torch.equal(model.train()(x, tasks=tasks), model.eval()(x, tasks=tasks))


def test_the_update_is_linear_in_its_input() -> None:
    model = routed(stack(), num_heads=4).double()
    layer, base = model.routed_layers[0], model.sites[0].layer
    x, y = torch.randn(2, 3, 8, dtype=torch.float64)
    with model.route(list(TASKS[:3])):
        both, left, right = (layer(v) - base(v) for v in (2 * x - y, x, y))
    torch.testing.assert_close(both, 2 * left - right)


def test_the_frozen_base_output_is_never_written_into() -> None:
    base = nn.Linear(4, 4).requires_grad_(False)
    kept: list[Tensor] = []
    base.register_forward_hook(lambda _, __, y: kept.append(y))
    y = apply_lora(base, torch.randn(3, 4), torch.randn(2, 4), torch.randn(2, 4), 0.0)
    before = kept[0].clone()
    y += 1
    apply_ia3(base, torch.randn(3, 4), torch.randn(1, 4))
    assert torch.equal(kept[0], before)
