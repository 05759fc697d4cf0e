"""Choices behind one shared prompt, and output heads that see labelled tokens alone."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.testing import assert_close

import polyroute as pr
from polyroute.kinds import causal, text
from polyroute.kinds.batches import IGNORED, evaluating
from polyroute.kinds.causal import CausalKind
from polyroute.kinds.shared_prompts import longest_shared, shared_rows

COMMON: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


def llama(**more: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON, **SMALL, **more))


def qwen(**more: Any) -> nn.Module:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**COMMON, **SMALL, **more))


def gemma(**more: Any) -> nn.Module:  # caps its logits after the head
    config = transformers.Gemma2Config(
        **COMMON, **SMALL, head_dim=8, sliding_window=64, query_pre_attn_scalar=8,
        final_logit_softcapping=2.0, **more,
    )  # fmt: skip
    return transformers.Gemma2ForCausalLM(config)


def gpt2(**more: Any) -> nn.Module:
    dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    config = transformers.GPT2Config(**COMMON, n_embd=32, n_layer=2, n_head=4, **dropout, **more)
    return transformers.GPT2LMHeadModel(config)


def bloom(**more: Any) -> nn.Module:  # has no positions
    config = transformers.BloomConfig(**COMMON, hidden_size=32, n_layer=2, n_head=4, **more)
    return transformers.BloomForCausalLM(config)


def mistral(**more: Any) -> nn.Module:  # sees a window of tokens
    config = transformers.MistralConfig(**COMMON, **SMALL, sliding_window=6, **more)
    return transformers.MistralForCausalLM(config)


EAGER_ALONE = (gemma, bloom)
SHARING = {"llama": llama, "qwen": qwen, "gemma": gemma, "gpt2": gpt2}
OTHERS = {"bloom": bloom, "mistral": mistral}
Maker = Callable[..., nn.Module]


class Tokenizer:
    """What a kind asks of a tokenizer, for rows that are encoded already."""

    eos_token_id, pad_token_id, bos_token_id = 1, 0, 2
    all_special_ids = (0, 1, 2)
    model_max_length = 128


def routed(make: Maker, attention: str = "sdpa", **config: Any) -> pr.RoutedModel:
    torch.manual_seed(0)
    attention = "eager" if make in EAGER_ALONE else attention
    base = make(attn_implementation=attention).eval()
    settings = {"num_skills": 3, "num_heads": 2, "rank": 2, "alpha": 3.0, **config}
    model = pr.attach(base, pr.MHRConfig(**settings), ["a", "b", "c"])
    with torch.no_grad():
        for parameter in model.learned():
            parameter.normal_(0, 0.5)
    return model.eval()


def rows(seed: int = 0) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(3, 64, (count,), generator=draw).tolist()

    found = []
    for task, length, sizes in (("a", 9, (2, 1, 4)), ("b", 4, (3, 3)), ("a", 1, (1, 5, 2, 2))):
        choices = [[*ids(size), 1] for size in sizes]
        found.append(
            {"task": task, "prompt_ids": ids(length), "choice_ids": choices, "label": 0,
             "target_ids": choices[0]}
        )  # fmt: skip
    return found


def kind(**options: Any) -> CausalKind:
    return CausalKind(Tokenizer(), **options)  # type: ignore[arg-type]


def one_by_one(model: pr.RoutedModel, asked: list[dict[str, Any]]) -> list[Tensor]:
    """Log-probabilities of choices, each in a forward of its own, by the model's own logits."""
    found = []
    for row in asked:
        scores = []
        for ids in row["choice_ids"]:
            tokens = torch.tensor([row["prompt_ids"] + ids])
            with torch.no_grad():
                logits = model(input_ids=tokens, tasks=[row["task"]]).logits[0].double()
            logs = logits.log_softmax(-1)[len(row["prompt_ids"]) - 1 : -1]
            total = logs.gather(1, torch.tensor(ids)[:, None]).sum()
            scores.append([total, total / len(ids)])
        found.append(torch.tensor(scores).float())
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", SHARING.values(), ids=SHARING)
def test_shared_prompts_score_as_separate_rows(make: Maker, attention: str) -> None:
    model, asked = routed(make, attention), rows()
    assert longest_shared(model, "a") >= 20
    for found, expected in zip(kind().scores(model, asked), one_by_one(model, asked), strict=True):
        assert_close(found, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_what_cannot_share_scores_row_by_row(make: Maker) -> None:
    model, asked = routed(make), rows()
    assert longest_shared(model, "a") < 20
    for found, expected in zip(kind().scores(model, asked), one_by_one(model, asked), strict=True):
        assert_close(found, expected, atol=1e-4, rtol=1e-5)


def test_a_window_is_shared_within(monkeypatch: pytest.MonkeyPatch) -> None:
    model = routed(mistral)
    assert longest_shared(model, "a") == 6


def test_a_model_whose_choices_see_each_other_is_noticed() -> None:
    model = routed(llama)
    inner = model.base_model.model
    plain = inner.forward

    def leaking(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        return plain(*args, attention_mask=None, **kwargs)  # causal, but it sees other choices

    inner.forward = leaking
    assert longest_shared(model, "a") < 20


def test_a_model_that_counts_positions_itself_is_noticed() -> None:
    model = routed(llama)
    inner = model.base_model.model
    plain = inner.forward

    def counting(*args: Any, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
        return plain(*args, position_ids=None, **kwargs)

    inner.forward = counting
    assert longest_shared(model, "a") < 20


def test_an_adapted_head_scores_as_separate_rows() -> None:
    model = routed(llama, target_modules=["q_proj", "lm_head"])
    asked = rows()
    for found, expected in zip(kind().scores(model, asked), one_by_one(model, asked), strict=True):
        assert_close(found, expected, atol=1e-4, rtol=1e-5)


def test_parts_that_fit_into_memory_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = routed(llama), rows()
    whole = kind().scores(model, asked)
    for name, limit in (("TOKENS_AT_ONCE", 8), ("LABELS_AT_ONCE", 4), ("LABELS_TOGETHER", 5)):
        monkeypatch.setattr(text, name, limit)
        for found, expected in zip(kind().scores(model, asked), whole, strict=True):
            assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_no_part_exceeds_its_bounds() -> None:
    asked = [{**rows(seed)[0], "prompt_ids": [5] * 40} for seed in range(9)]
    parts = list(text._parts(asked))
    assert [row for part in parts for row in part] == asked


@pytest.mark.parametrize("make", [*SHARING.values(), *OTHERS.values()], ids=[*SHARING, *OTHERS])
def test_the_loss_and_its_gradients_are_those_of_all_logits(make: Maker) -> None:
    model = routed(make).train()
    batch = kind().collate(rows())
    loss = kind().loss(model, batch)
    found = torch.autograd.grad(loss, model.learned())
    whole = model(**batch, use_cache=False)
    expected = torch.autograd.grad(whole.loss, model.learned())
    assert_close(loss, whole.loss)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_the_head_sees_labelled_tokens_alone() -> None:
    model = routed(llama)
    seen: list[torch.Size] = []
    head = model.base_model.get_output_embeddings()
    head.register_forward_hook(lambda _, args, out: seen.append(out.shape))
    batch = kind().collate(rows())
    kind().loss(model, batch)
    assert seen == [(1, int((batch["labels"] != IGNORED).sum()), 64)]
    with torch.no_grad():  # the head is as before
        assert (
            model(input_ids=batch["input_ids"], tasks="a").logits.shape[:2] == batch["labels"].shape
        )


def test_experts_keep_their_own_loss() -> None:
    config = transformers.MixtralConfig(
        **COMMON, **SMALL, num_local_experts=2, output_router_logits=True
    )
    base = transformers.MixtralForCausalLM(config)
    model = pr.attach(base, pr.MHRConfig(num_skills=2, rank=2), ["a", "b"])
    batch = kind().collate([row for row in rows() if row["task"] == "a"])
    own = model(**{**batch, "tasks": "a"}, use_cache=False).loss
    assert_close(kind().loss(model, batch), own)


def test_masks_let_each_choice_see_the_prompt_and_itself() -> None:
    shared = shared_rows([[5, 6]], [[[7, 8, 1], [9, 1]]], pad=0, limit=99)
    assert shared["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert shared["position_ids"].tolist() == [[0, 1, 2, 3, 2]]
    assert shared["places"].tolist() == [1, 2, 3, 1, 4]
    assert shared["labels"].tolist() == [[7, 8, 1], [9, 1, IGNORED]]
    assert shared["attention_mask"][0, 0].int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1],
    ]  # fmt: skip


def test_trying_a_model_leaves_its_mode() -> None:
    model = copy.deepcopy(routed(llama)).train()
    longest_shared(model, "a")
    assert model.training
    with evaluating(model):
        assert not model.training
    assert causal.IGNORED == IGNORED
