"""Tiny runs to serve, of every kind of base model, and what they answer one request at a time."""

from pathlib import Path
from typing import Any

import torch
from models import shake
from test_chat import CHATML, tokenizer
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import polyroute as pr
from polyroute.kinds.choose import ModelKind, kind_of
from polyroute.model import RoutedModel
from polyroute.saved.runs import record
from polyroute.serving.answers import Limits
from polyroute.serving.service import ModelService, ServedRun, make_service

NAMES = [f"task {number}" for number in range(50)]
LIMITS = Limits(most_requests=64, most_at_once=8, most_tokens=96, most_batch_tokens=48)


def base_and_kind(sort: str) -> tuple[Any, ModelKind]:
    """A base model of random weights, and its kind."""
    tok = tokenizer(CHATML)
    ends = {"eos_token_id": tok.eos_token_id, "pad_token_id": tok.pad_token_id}
    torch.manual_seed(0)
    base: Any
    if sort == "causal":
        base = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tok), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, **ends,
            )
        )  # fmt: skip
    elif sort == "seq2seq":
        base = T5ForConditionalGeneration(
            T5Config(
                vocab_size=len(tok), d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4,
                decoder_start_token_id=0, tie_word_embeddings=False, **ends,
            )
        )  # fmt: skip
    else:
        base = BertModel(
            BertConfig(
                vocab_size=len(tok), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                num_attention_heads=4, max_position_embeddings=128,
            )
        )  # fmt: skip
    with torch.no_grad():  # so that answers differ by prompt, and end at different lengths
        for parameter in base.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    prompt = {"prompt": "chat"} if sort == "causal" else {}
    return base.eval(), kind_of(base, tok, max_input=64, max_target=32, **prompt)  # type: ignore[arg-type]


def write_run(folder: Path, sort: str = "causal", **settings: Any) -> RoutedModel:
    """A run whose 50 tasks differ, with its base model beside it.

    Returns its model, which answers one request at a time.
    """
    base, kind = base_and_kind(sort)
    base.save_pretrained(folder.parent / "base")
    kind.tokenizer.save_pretrained(folder.parent / "base")
    chosen = {"num_skills": 4, "num_heads": 4, "rank": 2, **settings}
    model = shake(pr.attach(base, pr.MHRConfig(**chosen), NAMES)).eval()
    with torch.no_grad():
        for parameter in model.inventory.parameters():
            parameter.mul_(2.0)
        if model.routes.logits is not None:
            model.routes.logits.mul_(3.0)
    model.save_pretrained(folder)
    described = {
        "model": str(folder.parent / "base"), "max_input": 64, "max_target": 32,
        "dtype": "float32", "prompt": "auto", "system": None,
    }  # fmt: skip
    record(folder, "train", described, resume=False)
    return model


def service_of(
    folder: Path, sort: str = "causal", *, tasks_dir: Path | None = None, limits: Limits = LIMITS
) -> ModelService:
    """The service of such a run."""
    base, kind = base_and_kind(sort)
    return make_service(
        ServedRun(name=folder.name, run=folder, tasks_dir=tasks_dir, limits=limits), base, kind
    )


@torch.no_grad()
def alone(
    model: RoutedModel, kind: ModelKind, ids: list[int], route: str | None, count: int
) -> list[int]:
    """The greedy answer of a single request, without its end token."""
    search = kind.search(model, max_new_tokens=count)
    prompt = torch.tensor([ids])
    with model.route(route):
        out = model.base_model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=search
        )
    new = out[0].tolist() if model.config.is_encoder_decoder else out[0, len(ids) :].tolist()
    if model.config.is_encoder_decoder:
        new = new[1:]
    ends = set(search.eos_token_id)
    return new[: next((i for i, token in enumerate(new) if token in ends), len(new))]
