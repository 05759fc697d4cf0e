"""The kind of encoder-decoder models."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from polyroute.kinds.batches import (
    IGNORED,
    Ids,
    Row,
    flat_choices,
    flat_tasks,
    padded,
    target_token_ids,
    tasks_of,
    unwrapped,
)
from polyroute.kinds.predictions import Predictions
from polyroute.kinds.text import TextKind

__all__ = ["Seq2SeqKind"]


class Seq2SeqKind(TextKind):
    """Encoder-decoder models, such as T5: the prompt is encoded, the target decoded.

    A batch has `input_ids`, `attention_mask` `[B, L]`, `labels` `[B, L']` and `tasks`. If choices
    are compared, each prompt is encoded once: `labels` are then `[N, L']`, with `choice_tasks` and
    `owners` `[N]`, the row of each choice.

    Targets are tokenised as targets: a translation model's begin with the code of the target
    language, or have it behind the end token, and an answer begins with that code too.
    """

    name = "seq2seq"
    auto_class = AutoModelForSeq2SeqLM

    def __init__(self, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> None:
        """Set the lengths, in tokens, and the objective; see `ModelKind`.

        Args:
            tokenizer: the model's tokenizer; if it has languages, that of targets is `tgt_lang`.
            **settings: see `ModelKind`.

        Raises:
            InputError: see `ModelKind`.
        """
        super().__init__(tokenizer, **settings)
        if getattr(tokenizer, "tgt_lang", "") is None:
            warnings.warn(
                "the tokenizer names no target language, so targets get the code of the source "
                f"language, {getattr(tokenizer, 'src_lang', None)}: set tokenizer.tgt_lang and "
                "save the tokenizer beside the model",
                stacklevel=2,
            )
        self._empty = self._target_ids([""])[0]

    def _target_ids(self, texts: list[str]) -> list[Ids]:
        return [self._ended(ids) for ids in target_token_ids(self.tokenizer, texts)]

    def text_ids(self, texts: list[str]) -> list[Ids]:
        """See `ModelKind.text_ids`; the end token is there, whatever the tokenizer adds."""
        return [self._ended(ids) for ids in super().text_ids(texts)]

    def _ended(self, ids: Ids) -> Ids:
        """Ids with an end token; mBART of 25 languages has the code of one behind it."""
        eos = self.tokenizer.eos_token_id
        if ids[-1:] == [eos] or (ids[-2:-1] == [eos] and ids[-1] in self.tokenizer.all_special_ids):
            return ids
        return [*ids, eos]

    @property
    def _codes(self) -> tuple[Ids, Ids]:
        """What the tokenizer puts before a target, and behind its end token."""
        end = self._empty.index(self.tokenizer.eos_token_id)
        return self._empty[:end], self._empty[end + 1 :]

    def _cut_target(self, ids: Ids) -> Ids:
        behind = self._codes[1]  # the model begins its answer with it
        if len(ids) <= self.max_target or not behind:
            return super()._cut_target(ids)
        return ids[: self.max_target - len(behind)] + behind

    def _starts(self, model: nn.Module) -> dict[str, int]:
        before, behind = self._codes
        found = {"forced_bos_token_id": before[0]} if len(before) == 1 else {}
        shifted = getattr(unwrapped(model)[-1], "prepare_decoder_input_ids_from_labels", None)
        if (before or behind) and shifted is not None:  # what the decoder begins with in training
            found["decoder_start_token_id"] = int(shifted(torch.tensor([self._empty]))[0, 0])
        return found

    def _targets(self, rows: Sequence[Row]) -> dict[str, Any]:
        return {
            **self.inputs([row["prompt_ids"] for row in rows]),
            "labels": padded([row["target_ids"] for row in rows], IGNORED),
            "tasks": tasks_of(rows),
        }

    def _choices(self, rows: Sequence[Row]) -> dict[str, Any]:
        return {
            **self.inputs([row["prompt_ids"] for row in rows]),
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
        inputs = self.inputs([row["prompt_ids"] for row in rows])
        return self._texts(
            self._search(model, inputs, tasks_of(rows), max_new_tokens=new, num_beams=num_beams)
        )
