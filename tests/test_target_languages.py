"""Models with languages: targets are tokenised as targets, and answers begin as they do."""

from typing import Any

import pytest
import torch
from base_models import Routed
from datasets.fingerprint import Hasher
from torch.testing import assert_close
from transformers import (
    M2M100Config,
    M2M100ForConditionalGeneration,
    MBart50Tokenizer,
    MBartConfig,
    MBartForConditionalGeneration,
    MBartTokenizer,
    NllbTokenizer,
)

from polyroute.kinds.choose import kind_of

WORDS = ["the", "cat", "dog", "sat", "le", "chat", "chien", "assis"]
PIECES = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
PIECES += [(f"▁{word}", -1.0) for word in WORDS]
MODEL = {
    "vocab_size": 300, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16, "max_position_embeddings": 64, "dropout": 0.0,
    "attention_dropout": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "init_std": 0.1,
}  # fmt: skip
PAIRS = {"the cat": "le chat", "the dog": "le chien", "the cat sat": "le chat assis"}


def made(name: str) -> tuple[Any, Any, str]:
    """A model, its tokenizer, and the code of the target language."""
    torch.manual_seed(0)
    if name == "nllb":
        texts = ["<s>", "<pad>", "</s>", "<unk>", *sorted(set("▁" + "".join(WORDS)))]
        vocab = {text: number for number, text in enumerate(texts)}
        tokenizer = NllbTokenizer(vocab=vocab, merges=[], src_lang="eng_Latn", tgt_lang="fra_Latn")
        model = M2M100ForConditionalGeneration(M2M100Config(**MODEL))
        return model, tokenizer, "fra_Latn"
    kind: Any = {"mbart": MBartTokenizer, "mbart50": MBart50Tokenizer}[name]
    tokenizer = kind(vocab=PIECES, src_lang="en_XX", tgt_lang="fr_XX")
    return MBartForConditionalGeneration(MBartConfig(**MODEL)), tokenizer, "fr_XX"


def examples() -> dict[str, list[Any]]:
    count = len(PAIRS)
    return {
        "task": ["fr"] * count, "instruction": [""] * count, "input": list(PAIRS),
        "target": list(PAIRS.values()), "choices": [["le chat", "chien"]] * count,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["mbart", "mbart50", "nllb"])
def test_targets_and_choices_are_tokenised_as_targets_and_prompts_as_sources(name: str) -> None:
    model, tokenizer, code = made(name)
    kind = kind_of(model, tokenizer)
    columns = kind.encode(examples())
    assert columns["target_ids"] == tokenizer(text_target=list(PAIRS.values()))["input_ids"]
    assert columns["choice_ids"][0] == tokenizer(text_target=["le chat", "chien"])["input_ids"]
    assert columns["prompt_ids"] == tokenizer(list(PAIRS))["input_ids"]
    number = tokenizer.convert_tokens_to_ids(code)
    assert all(number in ids for ids in columns["target_ids"])
    assert all(number not in ids for ids in columns["prompt_ids"])


@pytest.mark.parametrize("name", ["mbart", "mbart50", "nllb"])
def test_encoding_leaves_the_kind_as_it_is_for_the_cache(name: str) -> None:
    model, tokenizer, _ = made(name)
    kind = kind_of(model, tokenizer)
    before = Hasher.hash(kind)
    kind.encode(examples())
    assert Hasher.hash(kind) == before


@pytest.mark.parametrize("name", ["mbart", "mbart50", "nllb"])
def test_answers_begin_with_the_target_language_as_in_training(name: str) -> None:
    base, tokenizer, code = made(name)
    kind = kind_of(base, tokenizer)
    number = tokenizer.convert_tokens_to_ids(code)
    model = Routed(base)
    columns = kind.encode(examples())
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    batch = kind.collate(rows)

    seen: list[torch.Tensor] = []
    decoder = base.get_decoder()
    hook = decoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((*args, kwargs.get("input_ids"))[0]), with_kwargs=True
    )
    optimizer = torch.optim.AdamW(base.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        kind.loss(model, batch).backward()
        optimizer.step()
    trained_with = seen[0]
    seen.clear()
    model.eval()
    answers = kind.generate(model, rows, max_new_tokens=16)
    hook.remove()
    assert answers == list(PAIRS.values())
    first = 0 if name == "mbart" else 1  # there the code itself starts the decoder
    assert trained_with[:, first].tolist() == [number] * len(rows)
    fed = torch.cat(seen, 1)
    assert_close(fed[:, : first + 1], trained_with[:, : first + 1])


def test_a_target_that_is_cut_keeps_the_code_behind_its_end() -> None:
    model, tokenizer, code = made("mbart")
    kind = kind_of(model, tokenizer, max_target=3)
    ids = kind.encode(examples())["target_ids"][2]
    assert ids == [*tokenizer(text_target="le chat assis")["input_ids"][:2],
                   tokenizer.convert_tokens_to_ids(code)]  # fmt: skip


def test_a_prompt_that_is_cut_keeps_its_end_and_its_language() -> None:
    model, tokenizer, _ = made("mbart")
    ids = kind_of(model, tokenizer, max_input=3).encode(examples())["prompt_ids"][2]
    whole = tokenizer("the cat sat")["input_ids"]
    assert ids == [whole[0], *whole[-2:]]


def test_a_tokenizer_without_a_target_language_is_warned_of() -> None:
    model, _, _ = made("mbart50")
    with pytest.warns(UserWarning, match=r"no target language.*en_XX: set tokenizer\.tgt_lang"):
        kind_of(model, MBart50Tokenizer(vocab=PIECES, src_lang="en_XX"))
