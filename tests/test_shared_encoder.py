"""Choices of encoder-decoders: each prompt is encoded once, whatever the number of its choices."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from base_models import word_tokenizer
from torch import nn
from torch.testing import assert_close

import polyroute as pr
from polyroute.kinds.seq2seq import Seq2SeqKind

TASKS = ("a", "b", "c")
COMMON: dict[str, Any] = {
    "vocab_size": 64, "d_model": 32, "pad_token_id": 0, "eos_token_id": 1,
    "decoder_start_token_id": 0,
}  # fmt: skip


def t5(attention: str) -> nn.Module:
    config = transformers.T5Config(**COMMON, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return transformers.T5ForConditionalGeneration._from_config(
        config, attn_implementation=attention
    )


def bart(attention: str) -> nn.Module:
    sizes = {
        f"{part}_{name}": size
        for part in ("encoder", "decoder")
        for name, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
    }
    config = transformers.BartConfig(**COMMON, **sizes, bos_token_id=2)
    return transformers.BartForConditionalGeneration._from_config(
        config, attn_implementation=attention
    )


def rows() -> list[dict[str, Any]]:
    """Three prompts, one each of 5, 2 and 8 choices of several lengths."""
    draw = torch.Generator().manual_seed(1)

    def ids(count: int) -> list[int]:
        return [*torch.randint(3, 64, (count,), generator=draw).tolist(), 1]

    return [
        {"task": task, "prompt_ids": ids(length), "target_ids": ids(2), "label": 0,
         "choice_ids": [ids(1 + i % 3) for i in range(count)]}
        for task, length, count in zip(TASKS, (9, 4, 13), (5, 2, 8), strict=True)
    ]  # fmt: skip


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [t5, bart])
def test_a_prompt_is_encoded_once_and_its_choices_score_as_in_rows_of_their_own(
    make: Callable[[str], nn.Module], attention: str
) -> None:
    torch.manual_seed(0)
    model = pr.attach(
        make(attention).eval(), pr.MHRConfig(num_skills=3, num_heads=2, rank=2), TASKS
    )
    with torch.no_grad():
        for parameter in model.learned():
            parameter.add_(0.3 * torch.randn_like(parameter))
    assert model.base_model.config._attn_implementation == attention
    kind = Seq2SeqKind(word_tokenizer(frame=False))
    encoded: list[int] = []
    encoder = model.base_model.get_encoder()
    handle = encoder.register_forward_hook(
        lambda _, args, kwargs, out: encoded.append(len(out[0])), with_kwargs=True
    )
    together = kind.scores(model, rows())
    handle.remove()
    assert encoded == [3]
    for row, scores in zip(rows(), together, strict=True):
        alone = [kind.scores(model, [{**row, "choice_ids": [ids]}])[0] for ids in row["choice_ids"]]
        # Padding and batching round float32 differently.
        assert_close(scores, torch.cat(alone), atol=1e-4, rtol=1e-5)
