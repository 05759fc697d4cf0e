"""What kinds that write text share: learning by an objective over log-probabilities.

Shape letters are those of `polyroute.kinds.base`.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polyroute.kinds.base import ModelKind
from polyroute.kinds.batches import (
    Row,
    choice_counts,
    choice_index,
    choice_labels,
    evaluating,
    log_probs,
    on_device_of,
    token_loss,
)
from polyroute.kinds.objectives import LM, term_weights

__all__ = ["TextKind"]


class TextKind(ModelKind):
    """A kind that writes text.

    A batch holds the targets, as each kind documents. If the objective compares choices, its labels
    are those of all N choices; `choice_index` `[B, C]` holds the indices, among the N, of a row's
    choices, -1 if it has fewer than C, and `gold` `[B]` the index of the right one. Every objective
    except `lm` adds `term_weights` `[T]`.
    """

    supports_generation = True

    @property
    def needs_choices(self) -> bool:
        """Whether the objective compares choices."""
        return self.objective.uses_choices

    @abstractmethod
    def _targets(self, rows: Sequence[Row]) -> dict[str, Any]:
        """A batch for the targets of rows, on the CPU."""

    @abstractmethod
    def _choices(self, rows: Sequence[Row]) -> dict[str, Any]:
        """A batch for all choices of rows, ordered by row, then choice, on the CPU."""

    @abstractmethod
    def _target_logits(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Logits `[B, L, V]` and labels `[B, L]` of a batch from `_targets`."""

    @abstractmethod
    def _choice_logits(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Logits `[N, L, V]` and labels `[N, L]` of a batch from `_choices`."""

    def collate(self, rows: Sequence[Row]) -> dict[str, Any]:
        """See `ModelKind.collate`.

        Raises:
            InputError: the objective compares choices, and a row has none or its target is not one
                of them.
        """
        if self.needs_choices:
            chosen = {"choice_index": choice_index(rows), "gold": choice_labels(rows)}
            batch = {**self._choices(rows), **chosen}
        else:
            batch = self._targets(rows)
        if self.objective != LM:
            batch["term_weights"] = torch.tensor(term_weights(self.row_counts(rows)))
        return batch

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The objective on the batch; for `lm`, the base model's own loss."""
        if self.objective == LM:
            return token_loss(model, batch)
        sums_T = self.row_losses(model, batch).sum(0)
        weights_T: Tensor = batch["term_weights"].to(sums_T)
        return sums_T @ weights_T

    def row_losses(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """See `ModelKind.row_losses`; the terms are those of the objective."""
        batch = on_device_of(model, batch)
        batch.pop("term_weights", None)
        if not self.needs_choices:
            return self.objective.target_losses(*self._target_logits(model, batch))
        index_BC, gold_B = batch.pop("choice_index"), batch.pop("gold")
        return self.objective.choice_losses(*self._choice_logits(model, batch), index_BC, gold_B)

    def row_counts(self, rows: Sequence[Row]) -> list[list[int]]:
        """See `ModelKind.row_counts`; the objective says whether tokens or examples count."""
        return [self.objective.row_counts(row) for row in rows]

    def row_shape(self, row: Row) -> tuple[int, tuple[int, ...], Mapping[Any, int]]:
        """See `ModelKind.row_shape`; if choices are compared, each has a copy of the prompt."""
        if not self.needs_choices:
            return super().row_shape(row)
        choices = row["choice_ids"]
        return len(choices), (len(row["prompt_ids"]), max(map(len, choices))), {}

    def scores(self, model: nn.Module, rows: Sequence[Row]) -> list[Tensor]:
        """See `ModelKind.scores`."""
        counts = choice_counts(rows)
        batch = on_device_of(model, self._choices(rows))
        with evaluating(model):
            logits_NLV, labels_NL = self._choice_logits(model, batch)
        return list(torch.split(log_probs(logits_NLV, labels_NL), counts))
