"""Every way to compute a layer, against plain loops in float64 and beside PEFT in halves."""

import copy
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import batch, llama, relative_error, routed, stack
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from polyroute.layer.factors import LoRAFactors, WeightSpaceFactors
from polyroute.layer.few_vectors import Places, add_to_few
from polyroute.layer.kernels import apply_lora, plain_executors
from polyroute.routes.mixing import mix_skills as _mix
from polyroute.routes.weighted_sum import WeightedSum

EXECUTORS = ["fused", "plain", "tokens"]
TOLERANCE = 1e-6  # relative to the largest entry
SCALE = 1.5


def linear(d_in: int, d_out: int, *, bias: bool, conv: bool) -> nn.Module:
    if not conv:
        return nn.Linear(d_in, d_out, bias=bias).requires_grad_(False)
    base = Conv1D(d_out, d_in).requires_grad_(False)
    nn.init.normal_(base.bias)
    return base


def computed(
    executor: str, base: nn.Module, x: Tensor, a: Tensor, b: Tensor, w: Tensor, rows: list[int]
) -> Tensor:
    """One layer for examples with these tasks: skills `[H, K, r, d/H]`, weights `[U, H, K]`."""
    if executor == "tokens":
        weights = w[rows].view(len(rows), *[1] * (x.dim() - 2), *w.shape[1:])
        return WeightSpaceFactors(a=a, b=b * SCALE, gate=weights).apply(base, x, 0.0)
    mixed = [_mix(a[None], w[:, None], None)[0], _mix(b[None], w[:, None] * SCALE, None)[0]]
    one = len(w) == 1
    factors = LoRAFactors(*(m[0] if one else m.index_select(0, torch.tensor(rows)) for m in mixed))
    if executor == "fused":
        return factors.apply(base, x, 0.0)
    with plain_executors():
        return factors.apply(base, x, 0.0)


def expected(base: nn.Module, leaves: list[Tensor], rows: list[int]) -> Tensor:
    x, a, b, w = leaves
    weight = base.weight.t() if isinstance(base, Conv1D) else base.weight
    bias = None if base.bias is None else base.bias.double()
    examples = zip(x, rows, strict=True)
    return torch.stack(
        [reference.lora(v, weight.double(), bias, a.mT, b, w[u], SCALE) for v, u in examples]
    )


def widths(heads: int) -> st.SearchStrategy[int]:
    return st.integers(1, 3).map(lambda n: n * heads)


@settings(max_examples=60)
@given(st.data())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_every_executor_follows_the_equations_with_all_gradients(
    executor: str, dtype: torch.dtype, data: st.DataObject
) -> None:
    draw = data.draw
    heads, skills, rank = (draw(st.sampled_from(v)) for v in ([1, 2, 4], [1, 2, 5], [1, 3, 9, 17]))
    d_in, d_out = draw(widths(heads)), draw(widths(heads))
    tasks, size = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    rows = draw(st.lists(st.integers(0, tasks - 1), min_size=size, max_size=size))
    tokens = draw(st.sampled_from([(), (1,), (5,), (2, 3)]))
    torch.manual_seed(draw(st.integers(0, 9)))
    base = linear(d_in, d_out, bias=draw(st.booleans()), conv=draw(st.booleans())).to(dtype)
    shapes = [(size, *tokens, d_in), (heads, skills, rank, d_in // heads)]
    shapes += [(heads, skills, rank, d_out // heads), (tasks, heads, skills)]
    leaves = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]
    found = with_gradients(computed(executor, base, *leaves, rows), leaves)
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = with_gradients(expected(base, doubles, rows), doubles)
    sizes = truth
    if dtype == torch.float32:  # random sums may cancel: what they cancel is what is rounded
        doubles = [leaf.detach().abs().requires_grad_() for leaf in doubles]
        positive = copy.deepcopy(base)
        for parameter in positive.parameters():
            parameter.abs_()
        sizes = with_gradients(expected(positive, doubles, rows), doubles)
    for ours, theirs, size_of_sum in zip(found, truth, sizes, strict=True):
        error = (ours.double() - theirs).abs().max()
        assert error <= TOLERANCE * size_of_sum.abs().max()


def with_gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weighting = torch.linspace(0.5, 2, y.numel()).view(y.shape)
    return [y.detach(), *torch.autograd.grad((y * weighting).sum(), leaves)]


@given(st.sampled_from([1, 2, 4]), st.sampled_from([(), (3,), (2, 2)]))
def test_tokens_are_routed_one_by_one(heads: int, axes: tuple[int, ...]) -> None:
    base = nn.Linear(8, 4).double().requires_grad_(False)
    x, w = torch.randn(3, *axes, 8).double(), torch.randn(3, *axes, heads, 5).double()
    a, b = torch.randn(heads, 5, 2, 8 // heads).double(), torch.randn(heads, 5, 2, 4 // heads)
    actual = WeightSpaceFactors(a=a, b=b.double(), gate=w).apply(base, x, 0.0)
    vectors = zip(x.reshape(-1, 8), w.reshape(-1, heads, 5), strict=True)
    truth = [
        reference.lora(v, base.weight, base.bias, a.mT, b.double(), own, 1.0) for v, own in vectors
    ]
    assert relative_error(actual, torch.stack(truth).view(actual.shape)) < TOLERANCE


# ---------------------------------------------------------------- the override


def test_the_override_ends_with_its_scope_also_after_an_error() -> None:
    base, x = linear(4, 4, bias=True, conv=False), torch.randn(2, 3, 4, requires_grad=True)

    def is_fused(*lead: int) -> bool:
        y = apply_lora(base, x, torch.randn(*lead, 2, 4), torch.randn(*lead, 2, 4), 0.0)
        graph, names = [y.grad_fn], []
        while graph:
            node = graph.pop()
            names.append(node.name())
            graph += [parent for parent, _ in node.next_functions if parent is not None]
        return any("LinearLoRA" in name for name in names)

    def fail() -> None:
        with plain_executors():
            with plain_executors():
                assert not is_fused()
            assert not is_fused()
            assert not is_fused(2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert is_fused()
    assert is_fused(2)


@pytest.mark.parametrize("tasks", ["amber", ["amber", "birch", "amber", "dune"]])
def test_second_derivatives_exist_on_the_plain_path(tasks: str | list[str]) -> None:
    model = routed(stack(narrow=2, wide=4), num_heads=2, rank=1).double()
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    skills = model.inventory.lora_a["2x4"]
    with plain_executors():
        assert torch.autograd.gradgradcheck(lambda x, _: model(x, tasks=tasks), (x, skills))


# ---------------------------------------------------------------- mixing


@pytest.mark.parametrize("frozen", [None, "weights", "skills"])
def test_mixing_passes_gradcheck_twice(frozen: str | None) -> None:
    torch.manual_seed(0)
    w = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=frozen != "weights")
    skills = nn.Parameter(torch.randn(2, 2, 5, 2, 3).double(), requires_grad=frozen != "skills")
    assert torch.autograd.gradcheck(WeightedSum.apply, (w, skills))
    assert torch.autograd.gradgradcheck(WeightedSum.apply, (w, skills))


def mixing() -> tuple[Tensor, nn.Parameter]:
    torch.manual_seed(0)
    return torch.rand(4, 3, 5), nn.Parameter(torch.randn(2, 2, 5, 2, 3))


def gradient(w: Tensor, skills: nn.Parameter, factor: float = 1.0) -> Tensor:
    (found,) = torch.autograd.grad((factor * WeightedSum.apply(w, skills)).sum(), skills)
    return found


def test_memory_of_a_gradient_is_used_again_once_nobody_holds_it() -> None:
    w, skills = mixing()
    WeightedSum.apply(w, skills).sum().backward()
    assert skills.grad is not None
    address = skills.grad.data_ptr()
    skills.grad = None
    WeightedSum.apply(w, skills).sum().backward()
    assert skills.grad.data_ptr() == address


@pytest.mark.parametrize("hold", [lambda g: g, lambda g: g[1, :, 2], lambda g: g.numpy()])
def test_a_gradient_that_somebody_holds_is_never_overwritten(hold: Any) -> None:
    w, skills = mixing()
    held = hold(gradient(w, skills))
    before = copy.deepcopy(held)
    for _ in range(3):
        gradient(w, skills, factor=2.0)
    assert (held == before).all()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_accumulate(set_to_none: bool) -> None:
    w, skills = mixing()
    once = gradient(w, skills).clone()
    optimizer = torch.optim.SGD([skills], lr=0.0)
    for _ in range(2):
        mixed = WeightedSum.apply(w, skills)
        mixed.sum().backward(retain_graph=True)
        mixed.sum().backward()
        assert torch.equal(gradient(w, skills), once)  # leaves .grad alone
        (2 * WeightedSum.apply(w, skills)).sum().backward()
        assert skills.grad is not None
        torch.testing.assert_close(skills.grad, 4 * once)
        optimizer.zero_grad(set_to_none=set_to_none)


def test_skills_used_twice_in_one_graph_get_both_gradients() -> None:
    w, skills = mixing()
    once = gradient(w, skills).clone()
    (WeightedSum.apply(w, skills) + 2 * WeightedSum.apply(w, skills)).sum().backward()
    assert skills.grad is not None
    torch.testing.assert_close(skills.grad, 3 * once)


# ---------------------------------------------------------------- low precision, beside PEFT

HALVES = [(torch.bfloat16, False), (torch.float16, False), (torch.float32, True)]


@pytest.mark.parametrize(("dtype", "autocast"), HALVES, ids=["bf16", "fp16", "autocast"])
def test_low_precision_is_as_near_to_the_truth_as_that_of_peft(
    tmp_path: Path, dtype: torch.dtype, autocast: bool
) -> None:
    peft = pytest.importorskip("peft")
    ours = routed(llama(hidden_size=64), method="shared", rank=4, alpha=4.0)
    with torch.no_grad():  # an update of a tenth of the weights, as training makes it
        for skills in ours.inventory.lora_b.values():
            skills.mul_(0.1)
    ours.export_peft("amber", tmp_path)
    ours.base_model.to(dtype)
    load = peft.PeftModel.from_pretrained
    theirs = load(llama(hidden_size=64).to(dtype), tmp_path, is_trainable=True)
    exact = load(llama(hidden_size=64).to(dtype).double(), tmp_path, is_trainable=True).double()
    inputs, results = batch(llama()), {}
    calls = {"exact": (exact, {}), "theirs": (theirs, {})}
    calls |= {"one": (ours, {"tasks": "amber"}), "several": (ours, {"tasks": [0, 1, 2, 3]})}
    for name, (model, route) in calls.items():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and name != "exact"):
            output = model(**inputs, **route)
        output.loss.backward()
        results[name] = [output.logits.detach(), *skill_gradients(model)]
    peft_errors = errors(results["theirs"], results["exact"])
    for name in ("one", "several"):
        assert [t.dtype for t in results[name]] == [t.dtype for t in results["theirs"]]
        pairs = zip(errors(results[name], results["exact"]), peft_errors, strict=True)
        assert all(ours < 1.25 * theirs for ours, theirs in pairs)


def errors(found: list[Tensor], exact: list[Tensor]) -> tuple[float, float]:
    """Of the logits, and of the gradients on average; relative, in the 2-norm."""
    each = [float((f.double() - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True)]
    return each[0], sum(each[1:]) / len(each[1:])


def skill_gradients(model: Any) -> list[Tensor]:
    """Of A and B of every layer as PEFT stores them, its factor B unscaled."""
    if not hasattr(model, "inventory"):
        found = {n: p.grad for n, p in model.named_parameters() if "lora_" in n}
        return [found[n] for n in sorted(found)]
    by_name = {}
    for row, site in enumerate(model.sites):
        stack = next(s for s in model.inventory.stacks if row in s.sites)
        for kind in ("lora_a", "lora_b"):
            whole = getattr(model.inventory, kind)[stack.key].grad
            g = whole[stack.sites.index(row), 0, 0]
            name = f"base_model.model.{site.name}.lora_{kind[-1].upper()}.default.weight"
            by_name[name] = g if kind == "lora_a" else g.t()
    return [by_name[n] for n in sorted(by_name)]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.integers(0, 5))
@torch.no_grad()
def test_what_is_looked_up_is_the_factors_of_its_owner(owners: list[int], rank: int) -> None:
    torch.manual_seed(rank)
    y, x = torch.randn(len(owners), 6).double(), torch.randn(len(owners), 7).double()
    a, b = (torch.randn(5, rank, d).double() for d in (7, 6))
    expected = [y[i] + (x[i] @ a[k].mT) @ b[k] for i, k in enumerate(owners)]
    of_all = y + (x @ a[0].mT) @ b[0]
    owner = torch.tensor(owners)
    with torch.device("meta"):  # where others want new tensors says nothing of these
        found = add_to_few(y.clone(), x, a, b, Places.of(owner, rank))
        of_first = add_to_few(y.clone(), x, a[0], b[0])
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(of_first, of_all, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 4, 20])
@pytest.mark.parametrize(
    "shape", [(n,) for n in (1, 4, 5, 8, 9)] + [(3, n) for n in (1, 4, 5, 8, 9)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_an_update_of_vectors_in_halves_is_exact_but_for_rounding(
    dtype: torch.dtype, shape: tuple[int, ...], rank: int
) -> None:
    # The base layer computes 0, so only the update is seen.
    base = nn.Linear(64, 48, bias=False).requires_grad_(False).to(dtype)
    base.weight.zero_()
    torch.manual_seed(0)
    x = torch.randn(*shape, 64).to(dtype)
    a, b = (torch.randn(*shape[:-1], rank, d).to(dtype) for d in (64, 48))
    exact = (x.double() @ a.double().mT) @ b.double()
    y = apply_lora(base, x, a, b, 0.0)
    assert y.dtype == dtype
    # The product with a is rounded, the update, and its sum with the output of the base layer.
    assert relative_error(y.double(), exact) < 2 * torch.finfo(dtype).eps
