"""Tiny models built from their configuration, with weights drawn from a seed."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from polyroute import MHRConfig, RoutedModel, attach

TASKS = ("amber", "birch", "cedar", "dune")
VOCABULARY = 40


def t5(seed: int = 0, layers: int = 2, d_model: int = 32) -> T5ForConditionalGeneration:
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=d_model,
        d_kv=8,
        d_ff=48,
        num_heads=4,
        num_layers=layers,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = T5ForConditionalGeneration(config).eval()
    # T5 v1.1 does not tie its output embedding; tied and untrained, it repeats its input.
    model.lm_head.weight = nn.Parameter(torch.randn(VOCABULARY, d_model))
    return model


def llama(seed: int = 0, layers: int = 2, hidden_size: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=32,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
        initializer_range=0.2,
    )
    return GPT2LMHeadModel(config).eval()


def bert(seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        num_labels=8,
        initializer_range=0.2,
    )
    return BertForSequenceClassification(config).eval()


class Stack(nn.Module):
    """Three linear layers of two shapes; the batch is the first axis."""

    def __init__(self, narrow: int = 8, wide: int = 16, *, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(narrow, wide, bias=bias)
        self.down = nn.Linear(wide, narrow, bias=bias)
        self.again = nn.Linear(narrow, wide, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.again(torch.tanh(self.down(torch.tanh(self.up(x)))))
        return y


def stack(seed: int = 0, **sizes: Any) -> Stack:
    torch.manual_seed(seed)
    return Stack(**sizes)


def routed(
    base: nn.Module, tasks: tuple[str, ...] = TASKS, *, seed: int = 1, **config: Any
) -> RoutedModel:
    """An inventory with trained-like values: no skill is zero and tasks differ strongly.

    Alpha is not the rank, so a scale that is forgotten, or applied twice, is seen everywhere.
    """
    config.setdefault("num_skills", None if config.get("method") in ("private", "shared") else 4)
    config.setdefault("alpha", 1.5 * config.get("rank", 4))
    model = attach(base, MHRConfig(**config), tasks)
    return shake(model, seed)


@torch.no_grad()
def shake(model: RoutedModel, seed: int = 1) -> RoutedModel:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.inventory.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + noise * 0.5 if name.startswith("ia3") else noise * 0.3)
    for parameter in model.routes.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 3)
    return model


def join_heads(skills: Tensor) -> Tensor:
    """`[n, H, K, r, D]` to `[n, 1, K, r, H D]`: the same skills, for one head."""
    n, _, k, r, _ = skills.shape
    return skills.permute(0, 2, 3, 1, 4).reshape(n, 1, k, r, -1)


@torch.no_grad()
def copy_joined(source: RoutedModel, target: RoutedModel) -> None:
    """Give a model with one head the skills of one with several."""
    for name, skills in source.inventory.named_parameters():
        target.inventory.get_parameter(name).copy_(join_heads(skills))


def batch(base: nn.Module, size: int = 4, length: int = 6, seed: int = 3) -> dict[str, Tensor]:
    """Token ids, and labels where the model is a language model; no padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (size, length), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "Bert" in type(base).__name__:
        return inputs
    labels = torch.randint(3, VOCABULARY, (size, length), generator=generator)
    return {**inputs, "labels": labels if "T5" in type(base).__name__ else ids}


def rows(inputs: dict[str, Tensor], *index: int) -> dict[str, Tensor]:
    """Some examples of a batch."""
    return {name: value[list(index)] for name, value in inputs.items()}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, over the largest expected value."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
