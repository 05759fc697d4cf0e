"""The kind of encoder-decoder models."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM
from transformers.modeling_outputs import BaseModelOutput

from polyroute.batches import (
    IGNORED,
    Ids,
    Row,
    choice_counts,
    evaluating,
    flat_choices,
    flat_tasks,
    log_probs,
    on_device_of,
    padded,
    tasks_of,
    token_loss,
)
from polyroute.kind import ModelKind

__all__ = ["Seq2SeqKind"]


class Seq2SeqKind(ModelKind):
    """Encoder-decoder models, such as T5: the prompt is encoded, the target decoded.

    A batch is `input_ids`, `attention_mask` `[B, L]`, `labels` `[B, L']` and `tasks`.
    """

    name = "seq2seq"
    supports_generation = True
    auto_class = AutoModelForSeq2SeqLM

    def _prompt_ids(self, texts: list[str]) -> list[Ids]:
        return [self._ended(ids, self.max_input) for ids in self._tokens(texts, special=True)]

    def _target_ids(self, texts: list[str]) -> list[Ids]:
        return [self._ended(ids, self.max_target) for ids in self._tokens(texts, special=True)]

    def _ended(self, ids: Ids, length: int) -> Ids:
        eos = self.tokenizer.eos_token_id
        return self._cut(ids if ids[-1:] == [eos] else [*ids, eos], length)

    def collate(self, rows: Sequence[Row]) -> dict[str, Any]:
        """As `ModelKind.collate`."""
        return {
            **self._inputs([row["prompt_ids"] for row in rows]),
            "labels": padded([row["target_ids"] for row in rows], IGNORED),
            "tasks": tasks_of(rows),
        }

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Mean cross-entropy over the target tokens of the batch."""
        return token_loss(model, batch)

    def row_losses(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """As `ModelKind.row_losses`: over target tokens."""
        batch = on_device_of(model, batch)
        logits_BLV = model(**batch, use_cache=False).logits
        return -log_probs(logits_BLV, batch["labels"])[:, 0]

    def row_counts(self, rows: Sequence[Row]) -> list[int]:
        """The length of each target."""
        return [len(row["target_ids"]) for row in rows]

    def scores(self, model: nn.Module, rows: Sequence[Row]) -> list[Tensor]:
        """As `ModelKind.scores`; each prompt is encoded once, whatever its number of choices."""
        counts = choice_counts(rows)
        batch = on_device_of(model, {**self.collate(rows), "labels": flat_choices(rows)})
        labels_NL = batch.pop("labels")
        repeats = torch.tensor(counts, device=labels_NL.device)
        with evaluating(model):
            # The first call is there for its encoder states. It goes through `model` itself, with
            # a decoder input of one arbitrary token, because then the encoder is routed like in
            # any other call and the only thing asked of a routed model is that it takes `tasks`.
            # The second call has one row and one task name for each choice: ragged choices need
            # neither groups nor dummies.
            one_token = batch["input_ids"][:, :1]
            encoded = model(**batch, decoder_input_ids=one_token, use_cache=False)
            states_NLD = encoded.encoder_last_hidden_state.repeat_interleave(repeats, dim=0)
            logits_NLV = model(
                encoder_outputs=BaseModelOutput(last_hidden_state=states_NLD),
                attention_mask=batch["attention_mask"].repeat_interleave(repeats, dim=0),
                labels=labels_NL,
                tasks=flat_tasks(rows),
                use_cache=False,
            ).logits
        return list(torch.split(log_probs(logits_NLV, labels_NL), counts))

    def generate(
        self,
        model: nn.Module,
        rows: Sequence[Row],
        *,
        max_new_tokens: int | None = None,
        num_beams: int = 1,
    ) -> list[str]:
        """As `ModelKind.generate`."""
        new = self.max_target if max_new_tokens is None else max_new_tokens
        inputs = self._inputs([row["prompt_ids"] for row in rows])
        return self._texts(
            self._search(model, inputs, tasks_of(rows), max_new_tokens=new, num_beams=num_beams)
        )
