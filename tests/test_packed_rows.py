"""A row may hold several examples of different tasks: each token gets its own example's factors."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from models import TASKS, batch, gpt2, llama, relative_error, routed, t5
from torch import Tensor, nn

from polyroute import InputError, RoutedModel
from polyroute.layer import kernels
from polyroute.layer.kernels import plain_executors

LENGTHS = (4, 1, 7)
NAMES = ["cedar", "amber", "dune"]
SETTINGS = [
    {"num_heads": 4, "rank": 2, "alpha": 5.0},
    {"method": "poly", "rank": 3, "alpha": 2.0, "combine": "output"},
    {"method": "private", "rank": 2, "alpha": 5.0},
    {"adapter": "ia3", "num_heads": 2},
]


def examples() -> list[Tensor]:
    torch.manual_seed(7)
    return [torch.randint(3, 40, (1, length)) for length in LENGTHS]


def packed(apart: list[Tensor]) -> dict[str, Tensor]:
    """One row, whose examples attend to themselves alone."""
    lengths = [one.shape[1] for one in apart]
    positions = torch.cat([torch.arange(n) for n in lengths])
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (owner[:, None] == owner[None]) & torch.ones(len(owner), len(owner)).tril().bool()
    return {
        "input_ids": torch.cat(apart, 1),
        "position_ids": positions[None],
        "attention_mask": torch.where(mask, 0.0, torch.finfo(torch.float32).min)[
            None, None
        ].double(),
    }


def with_gradients(model: RoutedModel, outputs: list[Tensor]) -> list[Tensor]:
    loss = sum((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum() for y in outputs)
    learned = [p for p in model.learned() if p.requires_grad]
    return [*outputs, *torch.autograd.grad(loss, learned)]


@pytest.mark.parametrize("executor", ["joined", "looped"])
@pytest.mark.parametrize("is_plain", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_outputs_and_gradients_are_those_of_the_unpacked_batch(
    make: Any,
    settings: dict[str, Any],
    executor: str,
    is_plain: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    share = 1e9 if executor == "joined" else 0.0
    monkeypatch.setattr(kernels, "JOINED", {torch.float64: share})
    model = routed(make(), **settings).double()
    apart = examples()
    expected = with_gradients(
        model, [model(input_ids=x, tasks=t).logits for x, t in zip(apart, NAMES, strict=True)]
    )
    for given in ({"segments": [list(LENGTHS)]}, {}):
        inputs = packed(apart)
        with plain_executors() if is_plain else nullcontext():
            logits = model(**inputs, tasks=NAMES, **given).logits
        found = with_gradients(model, list(logits.split(LENGTHS, dim=1)))
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("adapter", ["lora", "ia3"])
@pytest.mark.parametrize("has_gradients", [True, False])
@pytest.mark.parametrize("lengths", [
    (5, 5, 5, 5), (1, 1, 1, 1), (1, 1, 1, 4, 3), (2, 1, 1, 3, 1), (1, 3, 3, 1), (1, 2) * 8,
], ids=str)  # fmt: skip
def test_single_tokens_and_longer_examples_are_what_they_are_alone(
    lengths: tuple[int, ...], has_gradients: bool, adapter: str
) -> None:
    model = routed(llama(), adapter=adapter).double()
    torch.manual_seed(0)
    apart = [torch.randint(3, 40, (1, length)) for length in lengths]
    tasks = [NAMES[i * 5 % len(NAMES)] for i in range(len(lengths))]
    with torch.set_grad_enabled(has_gradients):
        pairs = zip(apart, tasks, strict=True)
        expected = torch.cat([model(input_ids=ids, tasks=task).logits for ids, task in pairs], 1)
        found = model(**packed(apart), tasks=tasks, segments=[list(lengths)]).logits
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("examples_", "rank", "dtype", "joins"), [
    (10, 4, torch.float32, True), (16, 16, torch.float32, False), (16, 4, torch.bfloat16, True),
    (64, 16, torch.bfloat16, False),
])  # fmt: skip
def test_many_ranks_are_not_multiplied_for_every_token(
    examples_: int, rank: int, dtype: torch.dtype, joins: bool
) -> None:
    x = torch.zeros(1, 576, dtype=dtype)
    a, b = torch.zeros(examples_, rank, 576), torch.zeros(examples_, rank, 1536)
    assert kernels._joins(x, a, b) == joins


def test_several_rows_are_packed_each_in_its_own_way() -> None:
    model = routed(llama(), num_heads=4, alpha=9.0)
    apart = examples()
    rows = [packed(apart[:2]), packed(apart[2:])]
    width = 7
    ids = torch.full((2, width), 5)
    mask = torch.full((2, 1, width, width), torch.finfo(torch.float32).min)
    positions = torch.zeros(2, width, dtype=torch.long)
    for i, row in enumerate(rows):
        n = row["input_ids"].shape[1]
        ids[i, :n], positions[i, :n] = row["input_ids"][0], row["position_ids"][0]
        mask[i, :, :n, :n] = row["attention_mask"][0].float()
    mask[0, 0, 5:, 5:] = 0.0  # padding
    with model.route(NAMES, segments=[[4, 1], [7]]):
        logits = model(input_ids=ids, position_ids=positions, attention_mask=mask).logits
    found = [logits[0, :4], logits[0, 4:5], logits[1]]
    for one, x, task in zip(found, apart, NAMES, strict=True):
        assert relative_error(one, model(input_ids=x, tasks=task).logits[0]) < 1e-5


def test_activation_checkpointing_keeps_the_segments() -> None:
    plain, saving = (routed(llama(), num_heads=4).train() for _ in range(2))
    saving.gradient_checkpointing_enable()
    inputs = packed(examples())
    found = []
    inputs["attention_mask"] = inputs["attention_mask"].float()
    for model in (plain, saving):
        logits = model(**inputs, tasks=NAMES).logits
        found.append(with_gradients(model, [logits]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("tasks", "segments", "sentence"),
    [
        (NAMES, [[4, 1]], "3 tasks were given for 2 examples in 1 packed rows"),
        (NAMES[:2], [[4, 1, 7]], "2 tasks were given for 3 examples in 1 packed rows"),
        (NAMES, [[4, 1], [7]], "a list of lengths for each of the 1 rows"),
        (NAMES, [[4, 1, 8]], r"segments \[4, 1, 8\] are longer than their row of 12 tokens"),
        (NAMES, [[4, 0, 8]], "a list of lengths for each of the 1 rows"),
        ([*NAMES, "birch"], None, "4 tasks were given for 3 examples in 1 packed rows"),
        (NAMES[:2], None, "2 tasks were given for 3 examples in 1 packed rows"),
    ],
)
def test_segments_that_do_not_fit_are_refused(
    tasks: list[str], segments: Any, sentence: str
) -> None:
    model = routed(llama(), num_heads=4)
    with pytest.raises(InputError, match=sentence):
        model(**packed(examples()), tasks=tasks, segments=segments)


def test_positions_that_do_not_begin_at_zero_are_refused() -> None:
    model, inputs = routed(llama(), num_heads=4), packed(examples())
    inputs["position_ids"] = inputs["position_ids"] + 1
    with pytest.raises(InputError, match="must begin at 0"):
        model(**inputs, tasks=NAMES)


def test_layers_that_see_other_tokens_refuse_packed_rows() -> None:
    model = routed(t5(), num_heads=4)
    ids = torch.cat(examples(), 1)
    with pytest.raises(InputError, match="for packed rows of 12 tokens"):
        model(input_ids=ids, decoder_input_ids=ids[:, :5], tasks=NAMES, segments=[list(LENGTHS)])


def test_a_batch_without_tokens_cannot_be_packed() -> None:
    model = routed(nn.Sequential(nn.Linear(4, 4)), num_heads=2)
    with pytest.raises(InputError, match="segments need a batch of tokens"):
        model(torch.randn(6, 4), tasks=NAMES, segments=[[2, 2, 2]])


def test_ordinary_batches_with_positions_are_not_taken_for_packed_ones() -> None:
    model = routed(llama(), num_heads=4)
    inputs = {k: v for k, v in batch(model.base_model).items() if k != "labels"}
    expected = model(**inputs, tasks=list(TASKS)).logits
    positions = torch.arange(6).expand(4, 6)
    assert torch.equal(model(**inputs, position_ids=positions, tasks=list(TASKS)).logits, expected)
