"""The kind of sentence encoders."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it
from transformers import AutoModel, PreTrainedTokenizerBase

from polyroute.errors import InputError
from polyroute.kinds.base import MAX_INPUT, MAX_TARGET, UNBOUNDED, ModelKind
from polyroute.kinds.batches import (
    Ids,
    Row,
    choice_counts,
    choice_labels,
    entropies,
    evaluating,
    on_device_of,
    padded,
    tasks_of,
)
from polyroute.kinds.objectives import LM, Objective

__all__ = ["EncoderKind"]


class EncoderKind(ModelKind):
    """Sentence encoders, such as BERT: the answer is the choice that embeds nearest to the prompt.

    An embedding is the mean of the last hidden states over the attention mask, scaled to length 1.
    A batch holds two forwards: `inputs` with `tasks` `[B]`, and `choices` with `choice_tasks`
    `[U]`. Each pair of task and choice occurs once, so a label set is embedded once per batch.
    `choice_index` `[B, C]` holds the indices, among the U, of a row's choices, -1 if it has fewer
    than C; `labels` is `[B]`.
    """

    name = "encoder"
    supports_generation = False
    auto_class = AutoModel

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_input: int = MAX_INPUT,
        max_target: int = MAX_TARGET,
        max_positions: int | None = None,
        objective: str | Objective = "lm",
        scale: float = 20.0,
    ) -> None:
        """Set the lengths, in tokens, and the scale.

        Args:
            tokenizer: the base model's tokenizer; its `model_max_length` bounds the lengths too.
            max_input: the most tokens of a prompt, at least 2.
            max_target: the most tokens of a choice, at least 2.
            max_positions: the longest sequence that the model accepts; None for no limit.
            objective: must keep its default; see `loss`.
            scale: the factor on cosines, an inverse temperature.

        Raises:
            InputError: another objective is given, or a length is below 2.
        """
        longest = min(tokenizer.model_max_length, max_positions or UNBOUNDED)
        super().__init__(
            tokenizer,
            max_input=max_input,
            max_target=max_target,
            max_positions=longest,
            objective=objective,
        )
        if self.objective != LM:
            raise InputError(
                "an encoder base model always learns by comparing choices: leave out the objective "
                f"{objective!r}"
            )
        self.scale = scale

    def _target_ids(self, texts: list[str]) -> list[Ids]:
        return self._tokens(texts, special=True)

    def _cut_target(self, ids: Ids) -> Ids:
        return self._cut(ids, self.max_target)  # the frame of a text stays around it

    def _pairs(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The batch without its labels."""
        choice_counts(rows)
        places: dict[tuple[str, tuple[int, ...]], int] = {}
        index = [
            [places.setdefault((row["task"], tuple(ids)), len(places)) for ids in row["choice_ids"]]
            for row in rows
        ]
        return {
            "inputs": self.inputs([row["prompt_ids"] for row in rows]),
            "tasks": tasks_of(rows),
            "choices": self.inputs([list(ids) for _, ids in places]),
            "choice_tasks": [task for task, _ in places],
            "choice_index": padded(index, -1),
        }

    @property
    def needs_choices(self) -> bool:
        """Always true."""
        return True

    def collate(self, rows: Sequence[Row]) -> dict[str, Any]:
        """See `ModelKind.collate`.

        Raises:
            InputError: a row has no choices, or its target is not one of them.
        """
        return {**self._pairs(rows), "labels": choice_labels(rows)}

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Mean cross-entropy of the right choice among the choices of its row."""
        scores_BC = self._scores(model, batch)
        return F.cross_entropy(scores_BC, batch["labels"].to(scores_BC.device))

    def row_losses(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """See `ModelKind.row_losses`; the only term is the cross-entropy of the right choice."""
        scores_BC = self._scores(model, batch)
        labels_B = batch["labels"].to(scores_BC.device)
        return F.cross_entropy(scores_BC, labels_B, reduction="none")[:, None]

    def row_shape(self, row: Row) -> tuple[int, tuple[int, ...], Mapping[Any, int]]:
        """See `ModelKind.row_shape`; rows share choices, each embedded once per task and batch."""
        choices = {(row["task"], tuple(ids)): len(ids) for ids in row["choice_ids"]}
        return 1, (len(row["prompt_ids"]),), choices

    def row_counts(self, rows: Sequence[Row]) -> list[list[int]]:
        """One prediction for each row."""
        return [[1]] * len(rows)

    def scores(self, model: nn.Module, rows: Sequence[Row]) -> list[Tensor]:
        """See `ModelKind.scores`; both columns hold the scaled cosine."""
        counts = choice_counts(rows)
        with evaluating(model):
            scores_BC = self._scores(model, self._pairs(rows))
        return [
            row[:count].unsqueeze(1).repeat(1, 2)
            for row, count in zip(scores_BC, counts, strict=True)
        ]

    def entropies(self, model: nn.Module, rows: Sequence[Row]) -> Tensor:
        """See `ModelKind.entropies`; the scaled cosines stand for log-probabilities."""
        counts = choice_counts(rows)
        scores_BC = self._scores(model, self._pairs(rows))
        own = [scores[:count] for scores, count in zip(scores_BC, counts, strict=True)]
        return entropies(own)

    def _scores(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Scaled cosines `[B, C]`, -inf if a row has fewer choices."""
        input_BD = self.embedded(model, batch["inputs"], batch["tasks"])
        choice_UD = self.embedded(model, batch["choices"], batch["choice_tasks"])
        index_BC = batch["choice_index"].to(choice_UD.device)
        is_choice = index_BC >= 0
        # Each row is compared only with its own choices, and padded with its own first choice: if
        # one task's embeddings were not finite, products over all choices would spread NaN, as zero
        # times infinity, to all gradients.
        index_BC = torch.where(is_choice, index_BC, index_BC[:, :1])
        cosine_BC = torch.einsum("bd,bcd->bc", input_BD, choice_UD[index_BC])
        return (self.scale * cosine_BC).masked_fill(~is_choice, -torch.inf)

    def embedded(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        tasks: Sequence[str | int | None],
    ) -> Tensor:
        """The mean of each text's last hidden states, of length 1, `[B, D]`.

        Args:
            model: the routed model.
            inputs: `input_ids` and `attention_mask`, both `[B, L]`.
            tasks: of each text.
        """
        inputs = on_device_of(model, inputs)
        hidden_BLD = model(**inputs, tasks=tasks).last_hidden_state.float()
        mask_BL1 = inputs["attention_mask"].unsqueeze(-1)
        return F.normalize((hidden_BLD * mask_BL1).sum(1) / mask_BL1.sum(1), dim=-1)

    def generate(
        self,
        model: nn.Module,
        rows: Sequence[Row],
        *,
        max_new_tokens: int | None = None,
        num_beams: int = 1,
    ) -> list[str]:
        """Not available for encoders.

        Raises:
            InputError: always.
        """
        raise InputError("an encoder base model has no generation; use tasks with choices")
