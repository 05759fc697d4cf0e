"""Objectives: the losses that a text-generating base model can minimise.

A loss is a sum of terms. Each term of a batch is its sum over the rows, divided by the number of
tokens or examples that the rows count for it; so the rows may be computed in any grouping.

Shape letters are those of `polyroute.kinds.base`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from polyroute.errors import InputError, did_you_mean
from polyroute.kinds.batches import IGNORED, Row
from polyroute.kinds.predictions import Predictions
from polyroute.settings import check_settings, number, one_of, setting

__all__ = [
    "LM",
    "OBJECTIVES",
    "Objective",
    "Per",
    "objective_of",
    "term_weights",
    "unlikely_constant",
]

Per = Literal["token", "example"]

OFFSET = 0.01
"""Added to one minus the probability of a wrong token, so that its logarithm stays finite."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The terms of the loss of a batch, and their weights.

    Let n be the negative log-probability of a token, p its probability, y the right choice of a row
    and |c| the number of tokens of choice c, its end token included. The terms are

    - the target term: the mean of n over all tokens of the targets;
    - the multiple-choice term: the mean over rows of `-log softmax(-s)_y`, where
      `s_c = sum(n) / |c| ** length_norm`;
    - the unlikelihood term: the mean of `-log(1 - p + 0.01)` over all tokens of wrong choices.

    Raises:
        InputError: a value is out of range.
    """

    mc_weight: float = setting(0.0, number(least=0))
    """The weight of the multiple-choice term."""
    unlikely_weight: float = setting(0.0, number(least=0))
    """The weight of the unlikelihood term."""
    length_norm: float = setting(1.0, number(least=0))
    """The exponent of the length of a choice in the multiple-choice term."""
    label_smoothing: float = setting(0.0, number(least=0, below=1))
    """The share of the target term that is spread evenly over the whole vocabulary."""
    per: Per = setting("token", one_of(*get_args(Per)))
    """Whether the target term is divided by the tokens or by the examples of a batch."""

    def __post_init__(self) -> None:
        """Check the values."""
        check_settings(self)

    @property
    def uses_choices(self) -> bool:
        """Whether the choices of a row are compared, so that every row must have some."""
        return self.mc_weight > 0 or self.unlikely_weight > 0

    def row_counts(self, row: Row) -> list[int]:
        """The number of tokens or examples that a row counts for each of T terms."""
        if not self.uses_choices:
            return [1 if self.per == "example" else len(row["target_ids"])]
        lengths = [len(ids) for ids in row["choice_ids"]]
        right = lengths.pop(row["label"])
        return [1 if self.per == "example" else right, 1, sum(lengths)]

    def target_losses(self, targets: Predictions) -> Tensor:
        """The only term of an objective without choices, summed over each row: `[B, 1]`."""
        return targets.losses(self.label_smoothing).sum(1, keepdim=True)

    def choice_losses(self, choices: Predictions, index_BC: Tensor, gold_B: Tensor) -> Tensor:
        """The terms of an objective with choices, weighted and summed over each row: `[B, 3]`.

        Args:
            choices: the predictions of every choice of every row.
            index_BC: the indices, among the N, of a row's choices; -1 if it has fewer than C.
            gold_B: the index of the right choice.

        Returns:
            The target, multiple-choice and unlikelihood terms, before division by `row_counts`.
        """
        is_choice_BC = index_BC >= 0
        is_gold_BC = torch.arange(index_BC.shape[1], device=gold_B.device) == gold_B[:, None]
        index_BC = index_BC.clamp_min(0)  # -1 may become any index: it is masked below
        gold_N = index_BC[is_gold_BC]
        taken_NL = choices.labels != IGNORED
        loss_NL = choices.losses()
        loss_N = loss_NL.sum(1)
        target_B = loss_N[gold_N]
        if self.label_smoothing:
            target_B = self.target_losses(choices)[gold_N, 0]
        score_N = -loss_N / taken_NL.sum(1, dtype=loss_N.dtype) ** self.length_norm
        score_BC = score_N[index_BC].masked_fill(~is_choice_BC, -torch.inf)
        choice_B = F.cross_entropy(score_BC, gold_B, reduction="none")
        unlikely_NL = -torch.log1p(OFFSET - torch.exp(-loss_NL))
        unlikely_N = unlikely_NL.masked_fill(~taken_NL, 0.0).sum(1)
        is_wrong_BC = is_choice_BC & ~is_gold_BC
        unlikely_B = unlikely_N[index_BC].masked_fill(~is_wrong_BC, 0.0).sum(1)
        terms = [target_B, self.mc_weight * choice_B, self.unlikely_weight * unlikely_B]
        return torch.stack(terms, dim=1)


LM = Objective()
"""The mean cross-entropy over target tokens."""

OBJECTIVES = {
    "lm": LM,
    "t-few": Objective(mc_weight=1.0, unlikely_weight=1.0),
    "superni": Objective(label_smoothing=0.1, per="example"),
}
"""The objectives by name: plain cross-entropy, that of few-shot training in T-Few (arXiv
2205.05638), and that of training on Super-NaturalInstructions."""


def objective_of(name: str | Objective) -> Objective:
    """Look up an objective by its name; an objective is returned as it is.

    Raises:
        InputError: there is no such objective.
    """
    if isinstance(name, Objective):
        return name
    if not isinstance(name, str) or name not in OBJECTIVES:
        raise InputError(f"unknown objective {name!r}: {did_you_mean(str(name), OBJECTIVES)}")
    return OBJECTIVES[name]


def term_weights(counts: Sequence[Sequence[int]]) -> list[float]:
    """The factor on the sum of each of T terms over a batch.

    Args:
        counts: for every row, `Objective.row_counts`. A term that no row counts for is 0 anyway.
    """
    return [1 / max(1, sum(term)) for term in zip(*counts, strict=True)]


def unlikely_constant(rows: Sequence[Row]) -> float:
    """The constant by which T-Few's public code exceeds our unlikelihood term of a batch.

    There, every place of the padded choices that is not a token of a wrong choice counts
    `-log(1.01)`. That depends only on the padding and has no gradient, so our loss leaves it out;
    add it to compare values of the loss.
    """
    lengths = [[len(ids) for ids in row["choice_ids"]] for row in rows]
    flat = [length for row in lengths for length in row]
    right = sum(length[row["label"]] for row, length in zip(rows, lengths, strict=True))
    wrong = sum(flat) - right
    return -(len(flat) * max(flat) - wrong) * math.log(1 + OFFSET) / max(1, wrong)
