"""The kind of encoder-decoder models."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM
from transformers.modeling_outputs import BaseModelOutput

from polyroute.kinds.batches import (
    IGNORED,
    Ids,
    Row,
    flat_choices,
    flat_tasks,
    padded,
    tasks_of,
)
from polyroute.kinds.predictions import Predictions
from polyroute.kinds.text import TextKind

__all__ = ["Seq2SeqKind"]


class Seq2SeqKind(TextKind):
    """Encoder-decoder models, such as T5: the prompt is encoded, the target decoded.

    A batch has `input_ids`, `attention_mask` `[B, L]`, `labels` `[B, L']` and `tasks`. If choices
    are compared, each prompt is encoded once: `labels` are then `[N, L']`, with `choice_tasks` and
    `owners` `[N]`, the row of each choice.
    """

    name = "seq2seq"
    auto_class = AutoModelForSeq2SeqLM

    def _target_ids(self, texts: list[str]) -> list[Ids]:
        eos = self.tokenizer.eos_token_id
        ids = self._tokens(texts, special=True)
        return [one if one[-1:] == [eos] else [*one, eos] for one in ids]

    def _targets(self, rows: Sequence[Row]) -> dict[str, Any]:
        return {
            **self._inputs([row["prompt_ids"] for row in rows]),
            "labels": padded([row["target_ids"] for row in rows], IGNORED),
            "tasks": tasks_of(rows),
        }

    def _choices(self, rows: Sequence[Row]) -> dict[str, Any]:
        return {
            **self._inputs([row["prompt_ids"] for row in rows]),
            "labels": flat_choices(rows),
            "tasks": tasks_of(rows),
            "choice_tasks": flat_tasks(rows),
            "owners": torch.tensor([i for i, row in enumerate(rows) for _ in row["choice_ids"]]),
        }

    def _target_predictions(self, model: nn.Module, batch: dict[str, Any]) -> Predictions:
        return Predictions.of(model(**batch, use_cache=False).logits, batch["labels"])

    def _choice_predictions(self, model: nn.Module, batch: dict[str, Any]) -> Predictions:
        labels_NL, owners_N = batch.pop("labels"), batch.pop("owners")
        tasks = batch.pop("choice_tasks")
        # The first call computes the encoder states. It calls `model` itself, with one arbitrary
        # token as decoder input, so that the encoder is routed as in any other call and a routed
        # model only needs to accept `tasks`. The second call has one row and one task name for each
        # choice, so rows with different numbers of choices need no grouping or padding.
        one_token = batch["input_ids"][:, :1]
        encoded = model(**batch, decoder_input_ids=one_token, use_cache=False)
        states_NLD = encoded.encoder_last_hidden_state[owners_N]
        logits_NLV = model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states_NLD),
            attention_mask=batch["attention_mask"][owners_N],
            labels=labels_NL,
            tasks=tasks,
            use_cache=False,
        ).logits
        return Predictions.of(logits_NLV, labels_NL)

    def generate(
        self,
        model: nn.Module,
        rows: Sequence[Row],
        *,
        max_new_tokens: int | None = None,
        num_beams: int = 1,
    ) -> list[str]:
        """See `ModelKind.generate`."""
        new = self.max_target if max_new_tokens is None else max_new_tokens
        inputs = self._inputs([row["prompt_ids"] for row in rows])
        return self._texts(
            self._search(model, inputs, tasks_of(rows), max_new_tokens=new, num_beams=num_beams)
        )
