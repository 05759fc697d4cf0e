"""Batches whose examples are packed into rows, against the same batches with padding."""

from collections.abc import Callable
from typing import Any

import base_models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_shared_prompts import OTHERS, SHARING, gpt2, kind, llama, routed
from torch import Tensor, nn
from torch.testing import assert_close

import polyroute as pr
from polyroute.adapting.row_batches import losses_of
from polyroute.kinds import packing
from polyroute.kinds.batches import IGNORED, rounded
from polyroute.kinds.objectives import OBJECTIVES, Objective
from polyroute.kinds.packing import Packing, _filled, can_pack, packed_rows

Maker = Callable[..., nn.Module]
PACKING = {name: SHARING[name] for name in ("llama", "qwen", "gemma", "gpt2")}


def rows(count: int = 7) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(3)

    def ids(count: int) -> list[int]:
        return torch.randint(3, 64, (count,), generator=draw).tolist()

    lengths = (11, 2, 5, 1, 8, 3, 4)[:count]
    return [
        {"task": "abc"[i % 3], "prompt_ids": ids(length), "target_ids": [*ids(1 + i % 3), 1],
         "choice_ids": [], "label": -1}
        for i, length in enumerate(lengths)
    ]  # fmt: skip


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("objective", ["lm", "superni"])
@pytest.mark.parametrize("make", PACKING.values(), ids=PACKING)
def test_packed_batches_have_the_same_loss_and_gradients(
    make: Maker, objective: str, attention: str
) -> None:
    model, its = routed(make, attention).train(), kind(objective=objective)
    assert its.packing_of(model, "a") is not None
    plain, packed = its.collate(rows()), its.collate_packed(rows(), Packing())
    assert packed["input_ids"].numel() < 0.8 * plain["input_ids"].numel()
    losses = [its.loss(model, batch) for batch in (packed, plain)]
    assert_close(*losses, atol=1e-5, rtol=1e-5)
    found, expected = (torch.autograd.grad(loss, model.learned()) for loss in losses)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_the_losses_of_rows_keep_their_order() -> None:
    model, its = routed(llama), kind()
    batches = (its.collate_packed(rows(), Packing()), its.collate(rows()))
    found, expected = (its.row_losses(model, batch) for batch in batches)
    assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [20, 60, 1000])
def test_slots_that_are_packed_have_their_own_losses_and_gradients(tokens: int) -> None:
    model, its = routed(llama), kind()
    batches = [("a", rows(2)), ("b", rows(7)), ("c", rows(4)), ("a", rows(3))]
    found = {}
    for how in (None, Packing()):
        losses = losses_of(model, its, batches, tokens, backward=True, packing=how)
        found[how] = torch.tensor(losses), [p.grad for p in model.learned()]
        model.zero_grad()
    means = [
        its.loss(model, its.collate([{**row, "task": to} for row in of])) for to, of in batches
    ]
    assert_close(found[Packing()][0], torch.stack(means).detach(), atol=1e-5, rtol=1e-5)
    for one, other in zip(found[Packing()][1], found[None][1], strict=True):
        assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tokens", [40, 85, 100])
def test_packed_forwards_of_slots_stay_within_the_tokens_and_lose_no_example(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, its, sizes, examples = routed(llama), kind(), [], 0
    losses = its.row_losses

    def noted(model: Any, batch: Any) -> Tensor:
        nonlocal examples
        sizes.append(batch["input_ids"].numel())
        examples += len(batch["tasks"])
        return losses(model, batch)

    monkeypatch.setattr(its, "row_losses", noted)
    # 29, 26 and 25 tokens are 80 in all, but 87 with padding, which does not pay to save.
    alike = [
        {**row, "prompt_ids": [5] * length}
        for row, length in zip(rows(3), (27, 23, 21), strict=True)
    ]
    batches = [("a", rows(3)), ("b", alike), ("c", rows()), ("b", alike)]
    losses_of(model, its, batches, tokens, packing=Packing())
    assert max(sizes) <= tokens
    assert examples == 3 + 3 + 7 + 3


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_a_model_is_tried_before_it_gets_packed_rows(make: Maker) -> None:
    model = routed(make)
    plain, packed = kind().collate(rows()), kind().collate_packed(rows(), Packing())
    if kind().packing_of(model, "a") is not None:
        assert_close(kind().loss(model, packed), kind().loss(model, plain), atol=1e-5, rtol=1e-5)


def test_a_model_whose_examples_see_each_other_is_noticed() -> None:
    model = routed(llama)
    inner = model.base_model.model
    plain = inner.forward

    def leaking(*args: Any, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
        return plain(*args, position_ids=None, **kwargs)

    inner.forward = leaking
    assert not can_pack(model, "a")


@pytest.mark.parametrize(
    ("dtype", "factor", "packs"),
    [(torch.bfloat16, 1.1, True), (torch.bfloat16, 2.0, False), (torch.float32, 1.1, False)],
)
def test_rounding_in_halves_is_not_taken_for_another_result(
    dtype: torch.dtype, factor: float, packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With a model of many layers in bfloat16, rounding changes a logit by a tenth.
    real = packing.logits_of

    def rounded(model: Any, inputs: Any, tasks: list[str]) -> Tensor:
        return real(model, inputs, tasks) * (factor if len(tasks) == 1 else 1.0)

    monkeypatch.setattr(packing, "logits_of", rounded)
    assert can_pack(routed(llama).to(dtype), "a") == packs


def test_what_compares_choices_is_not_packed() -> None:
    assert kind(objective="t-few").packing_of(routed(llama), "a") is None
    smoothed = kind(objective=Objective(label_smoothing=0.1))
    assert smoothed.packing_of(routed(llama), "a") is not None
    assert "superni" in OBJECTIVES


def test_padding_stays_within_the_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "MULTIPLES", (1,))
    prompts, targets = [[5] * 9, [6], [7], [8]], [[4, 1]] * 4
    batch = packed_rows(prompts, targets, list("abca"), Packing(), pad=0, limit=10)
    assert batch is not None
    assert batch["input_ids"].shape == (2, 10)
    assert batch["position_ids"].tolist() == [list(range(10)), [0, 1, 0, 1, 0, 1, 2, 3, 4, 5]]
    model = routed(gpt2)
    ids, positions = batch["input_ids"], batch["position_ids"]
    model(input_ids=ids, position_ids=positions, tasks=batch["tasks"])


def test_a_batch_without_much_padding_is_left_as_it_is() -> None:
    assert (
        packed_rows([[5] * 9, [6] * 8], [[1], [1]], ["a", "b"], Packing(), pad=0, limit=99) is None
    )
    alone = [row for row in rows() if len(row["prompt_ids"]) == 11]
    batch = kind().collate_packed(alone, Packing())
    assert "places" not in batch


def test_rows_are_made_longer_where_that_saves_tokens() -> None:
    prompts = [[5] * 70] + [[6] * 42] * 9  # too few tokens to be rounded
    batch = packed_rows(prompts, [[1]] * 10, ["a"] * 10, Packing(), pad=0, limit=999)
    assert batch is not None
    rows, tokens = batch["input_ids"].shape
    assert rows * tokens < 1.15 * 458


@given(st.integers(1, 3000), st.integers(1, 128), st.integers(1, 3000))
def test_large_batches_have_few_sizes_and_lose_little(length: int, rows: int, limit: int) -> None:
    found = rounded(length, rows)
    assert length <= found
    assert found * rows < length * rows * 1.25 + 1
    assert rounded(length, rows, limit) == max(length, min(found, limit))
    if length * rows >= 512:
        assert found % -(-64 // rows) == 0
    else:
        assert found == length


def test_a_batch_is_not_filled_up_beyond_the_positions_of_the_model() -> None:
    its = kind(max_positions=32)
    [one, *_] = [row for row in rows() if len(row["prompt_ids"]) == 11]
    one = {**one, "prompt_ids": one["prompt_ids"] + one["prompt_ids"]}
    length = len(one["prompt_ids"]) + len(one["target_ids"])
    batch = its.collate([one] * 31)
    assert length <= batch["input_ids"].shape[1] <= 32
    assert batch["labels"].shape == batch["input_ids"].shape


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20))
def test_every_example_is_packed_once_and_fits(lengths: list[int]) -> None:
    filled = _filled(lengths, max(lengths))
    assert sorted(one for row in filled for one in row) == list(range(len(lengths)))
    assert all(sum(lengths[one] for one in row) <= max(lengths) for row in filled)
    assert len(filled) <= len(lengths)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=8))
def test_places_predict_the_labels(sizes: list[tuple[int, int]]) -> None:
    prompts = [[100 + i] * size for i, (size, _) in enumerate(sizes)]
    targets = [[200 + 10 * i + j for j in range(size)] for i, (_, size) in enumerate(sizes)]
    names = [str(i) for i in range(len(sizes))]
    batch = packed_rows(prompts, targets, names, Packing(), pad=0, limit=99)
    if batch is None:
        return
    flat, places = batch["input_ids"].flatten(), batch["places"]
    before = flat[places].tolist()  # what predicts a token is the one before it
    assert before == [
        token
        for prompt, target in zip(prompts, targets, strict=True)
        for token in (prompt[-1], *target[:-1])
    ]
    assert (batch["labels"] != IGNORED).sum() == len(places)
    starts = flat[(batch["position_ids"] == 0).flatten()]
    assert [str(int(one) - 100) for one in starts] == batch["tasks"]


def test_training_packs_and_ends_where_padding_ends(tmp_path: Any) -> None:
    import datasets

    ends = []
    for packs in (True, False):
        model, its = routed(llama), kind()
        table = datasets.Dataset.from_list(sorted(rows(), key=lambda row: row["task"]))
        arguments = pr.MultiTaskTrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True,
            disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False, seed=1,
        )  # fmt: skip
        if not packs:
            its.packing_of = lambda *_, **__: None  # type: ignore[method-assign]
        trainer = pr.MultiTaskTrainer(model, its, arguments, table)
        batch = trainer.data_collator([dict(row) for row in rows()])
        assert ("places" in batch) == packs
        trainer.train()
        ends.append([parameter.detach().clone() for parameter in model.learned()])
    for one, other in zip(*ends, strict=True):
        assert_close(one, other, atol=1e-5, rtol=1e-4)


class WithExpert(nn.Module):
    """A block whose last layer is named as an expert, which may see some tokens alone."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.up_proj, self.act_fn, self.experts = mlp.up_proj, mlp.act_fn, mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.experts(self.act_fn(self.up_proj(x)))
        return out


def test_slots_of_a_model_with_experts_have_forwards_of_their_own() -> None:
    base, tokenizer = base_models.llama()
    for layer in base.model.layers:
        layer.mlp = WithExpert(layer.mlp)
    kind = pr.kind_of(base, tokenizer)
    model = pr.attach(base, pr.MHRConfig(num_skills=2, num_heads=2, rank=1), ["a"])
    assert any(site.sees_token_subsets for site in model.sites)
    assert can_pack(model, "a")
    examples = {task: [{"input": "a", "target": "b"}] * 2 for task in ("x", "y")}
    assert len(pr.adapt_many(model, examples, kind=kind, phase="mu", seeds=[0], steps=1)) == 2
