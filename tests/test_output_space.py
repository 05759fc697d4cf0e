"""Executors in output space, for skills of any ranks, against loops in float64."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TASKS, Stack, batch, llama, relative_error, routed, stack
from torch import Tensor, nn

from polyroute import InputError, MHRConfig
from polyroute.layer.factors import OutputSpaceFactors, Segments
from polyroute.layer.gated import apply_output_space, apply_sorted, sorting_pays

TOLERANCE = 1e-6


def by_loops(
    base: nn.Linear, x: Tensor, a: Tensor, b: Tensor, w_NHK: Tensor, ranks: list[int]
) -> Tensor:
    """y[h] = base(x)[h] + sum_k w[h, k] (x a_k^T) b_k[h], token by token."""
    found = []
    for vector, w in zip(x.reshape(-1, x.shape[-1]), w_NHK, strict=True):
        heads, start = len(w), 0
        blocks = list((base.weight @ vector + base.bias).chunk(heads))
        for k, rank in enumerate(ranks):
            z = a[start : start + rank] @ vector
            added = (z @ b[start : start + rank]).chunk(heads)
            for h in range(heads):
                blocks[h] = blocks[h] + w[h, k] * added[h]
            start += rank
        found.append(torch.cat(blocks))
    return torch.stack(found).view(*x.shape[:-1], -1)


def with_gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weighting = torch.linspace(0.5, 2, y.numel(), dtype=y.dtype).view(y.shape)
    loss = (y * weighting).sum()
    return [y.detach(), *torch.autograd.grad(loss, leaves, retain_graph=True)]


@settings(max_examples=60)
@given(st.data())
@pytest.mark.parametrize("spread", ["all", "examples", "tokens", "function", "packed"])
def test_every_spread_of_weights_follows_the_equation(spread: str, data: st.DataObject) -> None:
    draw = data.draw
    ranks = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any))
    heads = draw(st.sampled_from([1, 2, 3]))
    d_in, d_out = draw(st.integers(1, 5)), heads * draw(st.integers(1, 3))
    size, times = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    torch.manual_seed(draw(st.integers(0, 9)))
    base = nn.Linear(d_in, d_out).double().requires_grad_(False)
    tokens = size * times
    x = torch.randn(size, times, d_in, dtype=torch.float64)
    a = torch.randn(sum(ranks), d_in, dtype=torch.float64)
    b = torch.randn(sum(ranks), d_out, dtype=torch.float64)
    shape = {"all": (), "examples": (size,), "packed": (size,)}.get(spread, (size, times))
    w = torch.randn(*shape, heads, len(ranks), dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, a, b, w)]
    segments = None
    if spread == "packed":
        cut = [1] * size
        cut[-1] += tokens - size
        segments = Segments(tuple(cut))
        of_tokens = torch.cat([w[i].expand(n, -1, -1) for i, n in enumerate(cut)])
    elif spread == "examples":
        of_tokens = w.repeat_interleave(times, 0)
    else:
        of_tokens = w.expand(size, times, heads, len(ranks)).reshape(tokens, heads, -1)
    gate: Any = (lambda h: w + 0 * h.sum()) if spread == "function" else w
    per_example = spread in ("examples", "packed")
    factors = OutputSpaceFactors(a=a, b=b, gate=gate, ranks=tuple(ranks), per_example=per_example)
    found = with_gradients(factors.apply(base, x, 0.0, segments), leaves)
    truth = with_gradients(by_loops(base, x, a, b, of_tokens, ranks), leaves)
    for ours, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@settings(max_examples=60)
@given(st.data())
def test_sorted_by_skill_it_is_the_same_in_output_and_gradients(data: st.DataObject) -> None:
    draw = data.draw
    ranks = draw(st.lists(st.integers(0, 3), min_size=1, max_size=6).filter(any))
    top_k = draw(st.integers(1, len(ranks)))
    torch.manual_seed(draw(st.integers(0, 9)))
    base = nn.Linear(4, 6).double().requires_grad_(False)
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    a = torch.randn(sum(ranks), 4, dtype=torch.float64, requires_grad=True)
    b = torch.randn(sum(ranks), 6, dtype=torch.float64, requires_grad=True)
    scores = torch.randn(10, len(ranks), dtype=torch.float64, requires_grad=True)
    kept = scores.topk(top_k, -1)
    w = torch.zeros_like(scores).scatter(-1, kept.indices, kept.values)
    by_rank = w.repeat_interleave(torch.tensor(ranks), -1).unsqueeze(1)
    pairs = list(zip(a.split(ranks), b.split(ranks), strict=True))
    together = apply_output_space(base, x, a, b, by_rank, 0.0)
    apart = apply_sorted(base, x, pairs, w, top_k, 0.0)
    leaves = [x, a, b, scores]
    for one, other in zip(
        with_gradients(together, leaves), with_gradients(apart, leaves), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_sorting_is_chosen_by_shape_alone() -> None:
    assert not sorting_pays(ranks=256, d_in=576, num_skills=32, top_k=3)
    assert sorting_pays(ranks=712, d_in=576, num_skills=89, top_k=3)
    assert not sorting_pays(ranks=712, d_in=576, num_skills=89, top_k=None)
    assert not sorting_pays(ranks=712, d_in=576, num_skills=4, top_k=3)


def test_many_skills_take_the_sorted_executor_and_few_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used: list[str] = []
    for name in ("apply_sorted", "apply_output_space"):
        function = {"apply_sorted": apply_sorted, "apply_output_space": apply_output_space}[name]

        def seen(*args: Any, name: str = name, function: Any = function) -> Tensor:
            used.append(name)
            return function(*args)

        monkeypatch.setattr(f"polyroute.layer.factors.{name}", seen)
    base, x = nn.Linear(4, 4), torch.randn(3, 4)
    for skills in (2, 8):
        w = torch.zeros(3, 1, skills)
        w[:, 0, 1] = 1.0
        a, b = torch.randn(skills, 4), torch.randn(skills, 4)
        y = OutputSpaceFactors(a=a, b=b, gate=w, ranks=(1,) * skills, top_k=1).apply(base, x, 0.0)
        torch.testing.assert_close(y, base(x) + x @ a[1:2].t() @ b[1:2])
    assert used == ["apply_output_space", "apply_sorted"]


# ---------------------------------------------------------------- the table, in output space


def in_output_space(base: nn.Module, **config: Any) -> Any:
    return routed(base, combine="output", alpha=3.0, **config)


def expected(base: Stack, model: Any, x: Tensor, task: str) -> Tensor:
    """The three layers, each plus the weighted sum of what its skills add, in float64."""
    weights = model.weights_of(task).detach().double()
    h = x.double()
    for i, layer in enumerate((base.up, base.down, base.again)):
        tensors = {n: t.detach().double() for n, t in model.inventory.site_tensors(i).items()}
        w = weights[model.mixer.router_of_site[i]]
        blocks = h.view(len(h), w.shape[0], -1)
        y = h @ layer.weight.double().t() + layer.bias.double()
        added = []
        for head in range(w.shape[0]):
            block = 0
            for k in range(w.shape[1]):
                z = sum(blocks[:, g] @ tensors["lora_a"][g, k] for g in range(w.shape[0]))
                block = block + w[head, k] * (z @ tensors["lora_b"][head, k])
            added.append(block)
        y = y + model.adapter_config.scale * torch.cat(added, 1)
        h = y if i == 2 else torch.tanh(y)
    return h


@pytest.mark.parametrize(
    "settings", [{"method": "poly"}, {"num_heads": 4}, {"num_heads": 2, "rank": 3}]
)
def test_a_task_adds_the_weighted_sum_of_what_its_skills_add(settings: dict[str, Any]) -> None:
    base, plain = stack(), stack()
    model = in_output_space(base, **settings)
    x = torch.randn(4, 8)
    mixed = model(x, tasks=list(TASKS))
    for i, task in enumerate(TASKS):
        truth = expected(plain, model, x[i : i + 1], task)
        assert relative_error(model(x[i : i + 1], tasks=task), truth) < 2e-6
        assert relative_error(mixed[i : i + 1], truth) < 2e-6


def test_with_one_skill_both_spaces_are_the_same() -> None:
    x = torch.randn(3, 8)
    one, other = (
        routed(stack(), method="poly", num_skills=1, alpha=9.0, combine=combine)
        for combine in ("weight", "output")
    )
    assert torch.allclose(one(x, tasks="amber"), other(x, tasks="amber"), atol=1e-6)


def test_a_task_is_one_plain_adapter_of_the_rank_of_all_skills(tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    model = in_output_space(llama(), num_heads=2)
    inputs = batch(model.base_model)
    routed_logits = model(**inputs, tasks="birch").logits
    model.export_peft("birch", tmp_path / "birch")
    exported = peft.PeftModel.from_pretrained(llama(), tmp_path / "birch")
    assert exported.peft_config["default"].r == 4 * 4
    assert relative_error(exported(**inputs).logits, routed_logits) < 1e-5
    model.merge("birch")
    assert relative_error(model(**inputs).logits, routed_logits) < 1e-5


@pytest.mark.parametrize("settings", [{"method": "poly"}, {"num_heads": 4}])
def test_the_average_keeps_its_function_when_it_becomes_one_adapter(
    settings: dict[str, Any],
) -> None:
    model, x = in_output_space(stack(), **settings), torch.randn(3, 8)
    average = model(x, tasks="mu")
    model.set_phase("mu")
    assert relative_error(model(x, tasks="cedar"), average) < 2e-6
    assert model.adapter_config.scale == pytest.approx(3.0 / 4)
    assert model.adapter_config.rank == 16


def test_the_space_is_saved_and_another_is_refused(tmp_path: Any) -> None:
    from polyroute import from_pretrained

    model, x = in_output_space(stack(), num_heads=2), torch.randn(3, 8)
    model.save_pretrained(tmp_path)
    again = from_pretrained(stack(), tmp_path)
    assert again.adapter_config.combine == "output"
    assert torch.equal(model(x, tasks="amber"), again(x, tasks="amber"))
    with pytest.raises(InputError, match="has combine='output' and this model combine='weight'"):
        routed(stack(), num_heads=2, alpha=3.0).load_adapter(tmp_path)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"combine": "sum"}, "combine='sum' is not one of 'weight', 'output'"),
        ({"combine": "output", "adapter": "ia3"}, "leave combine at 'weight'"),
        ({"combine": "output", "method": "shared"}, "combines none: leave combine at 'weight'"),
        ({"combine": "output", "method": "private"}, "combines none: leave combine at 'weight'"),
    ],
)
def test_spaces_that_mean_nothing_are_refused(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        MHRConfig(**config)


def test_training_in_output_space_reaches_skills_and_rows() -> None:
    model = in_output_space(llama(), num_heads=2).train()
    inputs = batch(model.base_model)
    optimizer = torch.optim.AdamW(model.param_groups("full", lr=1e-2))
    losses = []
    for _ in range(10):
        loss = model(**inputs, tasks=list(TASKS)).loss
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in model.learned())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
