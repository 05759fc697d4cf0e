"""Training examples that share the beginning of their prompts, against rows of their own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_shared_prompts import OTHERS, SHARING, kind, llama, mistral, routed
from torch import Tensor, nn
from torch.testing import assert_close

import polyroute as pr
from polyroute.adapting.row_batches import losses_of
from polyroute.kinds.packing import Packing, packed_rows

Maker = Callable[..., nn.Module]
ALL = Packing(shared=10_000)
Prompts = list[tuple[str, list[int]]]


def rows(prompts: Prompts) -> list[dict[str, Any]]:
    return [
        {"task": task, "prompt_ids": prompt, "target_ids": [*range(20, 21 + i % 3), 1],
         "choice_ids": [], "label": -1}
        for i, (task, prompt) in enumerate(prompts)
    ]  # fmt: skip


def alike(task: str, common: int, own: int, count: int) -> Prompts:
    """Prompts of a task that begin alike."""
    draw = torch.Generator().manual_seed(common + ord(task))

    def ids(size: int) -> list[int]:
        return torch.randint(3, 64, (size,), generator=draw).tolist()

    beginning = ids(common)
    return [(task, [*beginning, 3 + i, *ids(own - 1)]) for i in range(count)]


CASES: dict[str, Prompts] = {
    "one task": alike("a", 20, 4, 6),
    "three tasks": [*alike("a", 20, 2, 3), *alike("b", 9, 3, 2), *alike("c", 14, 1, 4)],
    "taking turns": [alike(task, 12, 2, 3)[i] for i in range(3) for task in "abc"],
    "two instructions": [*alike("a", 18, 2, 3), *[(t, [4, *p]) for t, p in alike("a", 17, 3, 3)]],
    "a whole prompt is the beginning": [("a", [*range(5, 5 + size)]) for size in (9, 10, 12, 30)],
    "identical": [("a", [*range(5, 20)])] * 4,
    "identical in two tasks": [(task, [*range(5, 20)]) for task in "abab"],
}  # fmt: skip


def shares(batch: dict[str, Any]) -> bool:
    return "attention_mask" in batch and batch["attention_mask"].dim() == 4


def check_equal(model: pr.RoutedModel, its: Any, examples: list[dict[str, Any]]) -> Any:
    """The packed batch of examples, whose losses and gradients are those of the padded one."""
    plain, packed = its.collate(examples), its.collate_packed(examples, ALL)
    weights = torch.linspace(0.5, 2, len(examples), dtype=torch.float64)
    results = []
    for batch in (packed, plain):
        losses = its.row_losses(model, batch)[:, 0]
        gradients = torch.autograd.grad(losses @ weights, model.learned(), allow_unused=True)
        results.append([losses, *(g for g in gradients if g is not None)])
    # Norms and the softmax of eager attention are float32.
    tolerance = 1e-6 if model.base_model.config._attn_implementation == "sdpa" else 1e-5
    for found, expected in zip(*results, strict=True):
        assert_close(found, expected, atol=tolerance, rtol=1e-5)
    assert any(bool(g.any()) for g in results[0][1:])
    return packed


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("objective", ["lm", "superni"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_losses_and_gradients_are_those_of_rows_of_their_own(
    case: Prompts, objective: str, attention: str
) -> None:
    model, its = routed(llama, attention).double().train(), kind(objective=objective)
    examples = rows(case)
    packed = check_equal(model, its, examples)
    assert shares(packed)
    tokens = sum(len(row["prompt_ids"]) + len(row["target_ids"]) for row in examples)
    assert packed["input_ids"].numel() < 0.7 * tokens


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", SHARING.values(), ids=SHARING)
def test_every_model_that_shares_computes_the_same(make: Maker, attention: str) -> None:
    model, its = routed(make, attention).double(), kind()
    packing = its.packing_of(model, "a")
    assert packing is not None
    assert packing.shared > 50
    assert shares(check_equal(model, its, rows(CASES["three tasks"])))


@pytest.mark.parametrize(
    "config",
    [{"adapter": "ia3"}, {"combine": "output"}, {"method": "private", "num_skills": None,
     "num_heads": 1}, {"target_modules": ["q_proj", "lm_head"]}],
    ids=str,
)  # fmt: skip
def test_every_adapter_computes_the_same(config: dict[str, Any]) -> None:
    if config.get("adapter") == "ia3":
        config = {**config, "rank": 1, "alpha": 1.0}
    model, its = routed(llama, **config).double(), kind()
    assert shares(check_equal(model, its, rows(CASES["three tasks"])))


@pytest.mark.parametrize(
    "prompts",
    [
        [("a", [5] * 20)],
        [("a", [5])] * 3,
        [("a", [number, *[5] * 20]) for number in range(10, 14)],
        [(task, [5] * 20) for task in "abc"],
    ],
    ids=["one example", "one token", "nothing in common", "several tasks"],
)
def test_examples_with_nothing_to_share_are_left_alone(prompts: Prompts) -> None:
    assert not shares(kind().collate_packed(rows(prompts), ALL))


def test_sharing_keeps_to_the_length_that_the_model_has() -> None:
    model, its = routed(mistral).double(), kind()
    packing = its.packing_of(model, "a")
    for one in (Packing(), *([packing] if packing is not None else [])):
        assert not shares(its.collate_packed(rows(CASES["one task"]), one))
    prompts = [prompt for _, prompt in CASES["one task"]]
    args = prompts, [[7, 1]] * 6, ["a"] * 6
    for most in (30, 45, 60):
        batch = packed_rows(*args, Packing(most), pad=0, limit=99)
        assert batch is not None
        assert batch["input_ids"].shape[1] <= most


@given(
    st.lists(
        st.tuples(
            st.sampled_from("ab"),
            st.lists(st.integers(5, 6), min_size=1, max_size=9),
            st.lists(st.integers(7, 8), min_size=1, max_size=3),
        ),
        min_size=1,
        max_size=9,
    )
)
def test_what_predicts_a_token_sees_all_that_comes_before_it(
    examples: list[tuple[str, list[int], list[int]]],
) -> None:
    tasks, prompts, targets = ([example[i] for example in examples] for i in range(3))
    batch = packed_rows(prompts, targets, tasks, ALL, pad=0, limit=99)
    if batch is None or not shares(batch):
        return
    ids, places = batch["input_ids"], iter(batch["places"].tolist())
    starts = (batch["position_ids"] == 0).flatten().cumsum(0) - 1
    seen = set()
    for task, prompt, target in examples:
        for number in range(len(target)):
            place = next(places)
            row, token = divmod(place, ids.shape[1])
            mask = batch["attention_mask"][row, 0, token]
            assert ids[row][mask].tolist() == [*prompt, *target[:number]]
            assert batch["position_ids"][row][mask].tolist() == list(range(int(mask.sum())))
            assert batch["tasks"][starts[place]] == task
            seen.add(place)
    assert len(seen) == sum(map(len, targets))  # so gradients of logits need no sum
    assert len(batch["tasks"]) == int(starts[-1]) + 1


@pytest.mark.parametrize("tokens", [30, 60, 150, 1000])
def test_slots_share_within_the_tokens_and_have_their_own_losses(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, its = routed(llama).double(), kind()
    sizes, losses = [], its.row_losses

    def noted(model: Any, batch: Any) -> Tensor:
        sizes.append(batch["input_ids"].numel())
        return losses(model, batch)

    monkeypatch.setattr(its, "row_losses", noted)
    batches = [
        ("a", rows(alike("x", 20, 4, 8))), ("b", rows(alike("y", 9, 3, 5))),
        ("c", rows(CASES["two instructions"])), ("a", rows(alike("z", 14, 1, 1))),
    ]  # fmt: skip
    found, taken = {}, {}
    for how in (None, Packing(), ALL):
        got = losses_of(model, its, batches, tokens, backward=True, packing=how)
        found[how] = [torch.tensor(got), *(p.grad for p in model.learned())]
        model.zero_grad()
        taken[how] = list(sizes)
        sizes.clear()
    assert max(taken[ALL]) <= tokens
    assert len(taken[ALL]) <= len(taken[Packing()])
    assert sum(taken[ALL]) < 0.75 * sum(taken[Packing()]) or tokens == 30
    for one, other in zip(found[ALL], found[None], strict=True):
        assert_close(one, other, atol=1e-7, rtol=1e-6)


class OwnRule(pr.RouteRule, name="own"):
    def factors(self, batch: Any, mixer: Any) -> Any:
        return mixer.mix(mixer.uniform(len(batch.route.rows)), batch)


def test_rules_that_may_look_at_a_whole_row_do_not_share() -> None:
    config = pr.MHRConfig(num_skills=3, num_heads=2, rank=2)
    model = pr.attach(llama(attn_implementation="sdpa"), config, ["a", "b"], rule=OwnRule())
    assert kind().packing_of(model, "a") == Packing()


def test_what_is_random_is_not_shared() -> None:
    its = kind()
    active = [
        routed(llama, dropout=0.1),
        routed(lambda **more: llama(attention_dropout=0.1, **more)),
        routed(llama, logit_dropout=0.1),
        routed(llama, gate="relaxed_bernoulli"),
    ]
    for model in active:
        state = torch.get_rng_state()
        assert its.packing_of(model, "a", in_training_mode=True) == Packing()
        assert torch.equal(state, torch.get_rng_state())
        assert not model.training
        evaluated = its.packing_of(model, "a")  # as adaptation trains
        assert evaluated is not None
        assert evaluated.shared
    quiet = its.packing_of(routed(llama), "a", in_training_mode=True)
    assert quiet is not None
    assert quiet.shared


def test_training_shares_and_ends_where_padding_ends(tmp_path: Any) -> None:
    import datasets

    ends = []
    examples = rows(CASES["three tasks"])
    for packs in (True, False):
        model, its = routed(llama), kind()
        arguments = pr.MultiTaskTrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=6, report_to=[], use_cpu=True,
            disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False, seed=1,
        )  # fmt: skip
        if not packs:
            its.packing_of = lambda *_, **__: None  # type: ignore[method-assign]
        trainer = pr.MultiTaskTrainer(model, its, arguments, datasets.Dataset.from_list(examples))
        batch = trainer.data_collator(examples)
        assert shares(batch) == packs
        trainer.train()
        ends.append([parameter.detach().clone() for parameter in model.learned()])
    for one, other in zip(*ends, strict=True):
        assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_what_cannot_share_adapts_as_before(make: Maker) -> None:
    model, its = routed(make), kind()
    packing = its.packing_of(model, "a")
    batches = [("a", rows(CASES["one task"]))]
    found = losses_of(model, its, batches, 1000, packing=packing)
    assert_close(found, losses_of(model, its, batches, 1000), atol=1e-5, rtol=1e-5)
