"""What kinds that write text share: learning by an objective over log-probabilities.

Shape letters are those of `polyroute.kinds.base`.
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from polyroute.kinds.base import ModelKind
from polyroute.kinds.batches import (
    Ids,
    Row,
    choice_counts,
    choice_index,
    choice_labels,
    entropies,
    evaluating,
    on_device_of,
)
from polyroute.kinds.objectives import LM, term_weights
from polyroute.kinds.predictions import Predictions

__all__ = ["TextKind"]

TOKENS_AT_ONCE = 16_384
"""The most tokens of a forward that scores choices, padding included; bounds its activations."""
LABELS_AT_ONCE = 2_048
"""The most tokens of choices that are scored at once: over a vocabulary of 50,000, their logits and
the softmax of these take 1 GB."""
LABELS_TOGETHER = 512
"""The most tokens of choices of one row that are scored in the same sequence."""


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
    def _target_predictions(self, model: nn.Module, batch: dict[str, Any]) -> Predictions:
        """The predictions of a batch from `_targets`."""

    @abstractmethod
    def _choice_predictions(self, model: nn.Module, batch: dict[str, Any]) -> Predictions:
        """The predictions of a batch from `_choices`."""

    def _mean_loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The mean loss over all labels of a batch from `_targets`."""
        loss: Tensor = model(**on_device_of(model, batch), use_cache=False).loss
        return loss

    def _scored(self, model: nn.Module, rows: Sequence[Row]) -> Predictions:
        """The predictions of all choices of rows, ordered by row, then choice."""
        return self._choice_predictions(model, on_device_of(model, self._choices(rows)))

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
        return {**batch, **self._term_weights(rows)}

    def _term_weights(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """The column of a batch that only `lm` does without."""
        if self.objective == LM:
            return {}
        return {"term_weights": torch.tensor(term_weights(self.row_counts(rows)))}

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The objective on the batch; for `lm`, the mean cross-entropy over its labels."""
        if self.objective == LM:
            return self._mean_loss(model, batch)
        sums_T = self.row_losses(model, batch).sum(0)
        weights_T: Tensor = batch["term_weights"].to(sums_T)
        return sums_T @ weights_T

    def row_losses(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """See `ModelKind.row_losses`; the terms are those of the objective."""
        batch = on_device_of(model, batch)
        batch.pop("term_weights", None)
        if not self.needs_choices:
            return self.objective.target_losses(self._target_predictions(model, batch))
        index_BC, gold_B = batch.pop("choice_index"), batch.pop("gold")
        choices = self._choice_predictions(model, batch)
        return self.objective.choice_losses(choices, index_BC, gold_B)

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
        """See `ModelKind.scores`; long rows and rows with many choices are computed in parts."""
        counts = choice_counts(rows)
        with evaluating(model):
            found = [
                self._scored(model, part).log_probs() for part in _parts(chain(*map(_split, rows)))
            ]
        return list(torch.split(torch.cat(found), counts))

    def entropies(self, model: nn.Module, rows: Sequence[Row]) -> Tensor:
        """See `ModelKind.entropies`."""
        counts = choice_counts(rows)
        batch = on_device_of(model, self._choices(rows))
        log_prob_N = self._choice_predictions(model, batch).log_probs()[:, 0]
        return entropies(torch.split(log_prob_N, counts))


def _split(row: Row) -> Iterator[Row]:
    """A row as rows with some of its choices each."""
    group: list[Ids] = []
    for ids in row["choice_ids"]:
        if group and sum(map(len, group)) + len(ids) > LABELS_TOGETHER:
            yield {**row, "choice_ids": group}
            group = []
        group.append(ids)
    yield {**row, "choice_ids": group}


def _parts(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows in groups that fit into memory."""
    part: list[Row] = []
    longest = labels = choices = 0
    for row in rows:
        own = row["choice_ids"]
        length = max(longest, len(row["prompt_ids"]) + max(map(len, own)))
        count, total = choices + len(own), labels + sum(map(len, own))
        if part and (length * count > TOKENS_AT_ONCE or total > LABELS_AT_ONCE):
            yield part
            part, length = [], len(row["prompt_ids"]) + max(map(len, own))
            count, total = len(own), sum(map(len, own))
        part.append(row)
        longest, choices, labels = length, count, total
    yield part
