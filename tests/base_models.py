"""Tiny base models with tokenizers, and examples for their kinds to encode."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    ByT5Tokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from polyroute.kinds.choose import ModelKind, kind_of

WORDS = "the a cat dog sat ran on mat yes no maybe is it big red one two three".split()  # noqa: SIM905


class Routed(nn.Module):
    """Takes and records `tasks` as a routed model does, and is otherwise the base model."""

    def __init__(self, base_model: PreTrainedModel) -> None:
        super().__init__()
        self.base_model = base_model
        self.seen: list[list[str]] = []

    def forward(self, *, tasks: list[str], **batch: Any) -> Any:
        rows = next(
            batch[key] for key in ("labels", "input_ids") if batch.get(key) is not None
        ).shape[0]
        assert len(tasks) == rows
        self.seen.append(tasks)
        return self.base_model(**batch)

    def generate(self, *, tasks: list[str], **inputs: Any) -> Tensor:
        assert len(tasks) == inputs["input_ids"].shape[0]
        self.seen.append(tasks)
        out: Tensor = self.base_model.generate(**inputs)
        return out


def word_tokenizer(*, frame: bool, bos: bool = False) -> PreTrainedTokenizerFast:
    """Words, with [CLS] ... [SEP] around them, or an end token that callers add, and no pad."""
    special = ["[UNK]", "[CLS]", "[SEP]", "</s>", "<s>"]
    vocab = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if frame or bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]" if frame else "<s> $A",
            special_tokens=[(token, vocab[token]) for token in special],
        )
    names = (
        {"cls_token": "[CLS]", "sep_token": "[SEP]"}
        if frame
        else {"eos_token": "</s>", "bos_token": "<s>"}
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **names)


def t5() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    config = T5Config(
        vocab_size=259, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    return T5ForConditionalGeneration(config), ByT5Tokenizer(extra_ids=0)


def llama(max_position_embeddings: int = 512) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    config = LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=max_position_embeddings,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config), ByT5Tokenizer(extra_ids=0)


def gpt2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = word_tokenizer(frame=False)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=64,
        bos_token_id=4, eos_token_id=3, tie_word_embeddings=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config), tokenizer


def bert() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = word_tokenizer(frame=True)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32,
    )  # fmt: skip
    return BertModel(config), tokenizer


Maker = Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]
every_model = pytest.mark.parametrize("make", [t5, llama, gpt2, bert])
text_model = pytest.mark.parametrize("make", [t5, llama, gpt2])


def made(make: Maker, **lengths: Any) -> tuple[Routed, ModelKind]:
    torch.manual_seed(0)
    model, tokenizer = make()
    for parameter in model.parameters():  # the usual small ones say the same to every prompt
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.7)
    return Routed(model.eval()), kind_of(model, tokenizer, **lengths)


def columns(*rows: tuple[str, str, str, str, list[str] | None]) -> dict[str, list[Any]]:
    names = ("task", "instruction", "input", "target", "choices")
    return {name: list(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)}


def as_rows(encoded: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [
        dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)
    ]


EXAMPLES = columns(
    ("where", "", "the cat sat on the red mat", "on the mat", ["on the mat", "no", "a big dog"]),
    ("truth", "is it true", "the dog ran", "yes", ["no", "yes"]),
    ("count", "a cat a dog", "", "two", ["one", "two", "three", "maybe two"]),
    ("truth", "is it true", "a", "no", ["no", "yes"]),
)
