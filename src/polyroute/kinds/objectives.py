"""Objectives: what a text-generating base model learns to make small.

A loss is a sum of terms. Each term of a batch is its sum over the rows, divided by the sum of what
the rows count for it (tokens, or examples); so rows may be computed apart, in any company.

Shape letters are those of `polyroute.kinds.base`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from polyroute.errors import InputError, did_you_mean
from polyroute.kinds.batches import IGNORED, Row, token_losses

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
"""Added to the probability that a wrong token is not said, so that its logarithm stays finite."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What the loss of a batch is made of.

    With n the negative log-probability of a token, p its probability, y the right choice of a row
    and |c| the tokens of choice c, its end token included, the terms are

    - of targets: the mean of n over all tokens of the targets;
    - multiple-choice: the mean over rows of `-log softmax(-s)_y`, where `s_c = sum(n) / |c| **
      length_norm`;
    - unlikelihood: the mean of `-log(1 - p + 0.01)` over all tokens of the wrong choices.

    Raises:
        InputError: a value is out of range.
    """

    mc_weight: float = 0.0
    """Of the multiple-choice term."""
    unlikely_weight: float = 0.0
    """Of the unlikelihood term."""
    length_norm: float = 1.0
    """Exponent of the length of a choice, in the multiple-choice term."""
    label_smoothing: float = 0.0
    """Share of the term of targets that is spread evenly over the whole vocabulary."""
    per: Per = "token"
    """What the term of targets is divided by: the `token`s or the `example`s of a batch."""

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("mc_weight", "unlikely_weight", "length_norm", "label_smoothing"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise InputError(f"{name} must be a number, not {value!r}")
            number = float(value)
            if not 0 <= number < math.inf:
                raise InputError(f"{name} must be finite and not negative, not {number}")
            object.__setattr__(self, name, number)
        if self.label_smoothing >= 1:
            raise InputError(f"label_smoothing must be below 1, not {self.label_smoothing}")
        if self.per not in get_args(Per):
            raise InputError(f"per must be 'token' or 'example', not {self.per!r}")

    @property
    def uses_choices(self) -> bool:
        """Whether it compares the choices of a row, so that every row must have some."""
        return self.mc_weight > 0 or self.unlikely_weight > 0

    def row_counts(self, row: Row) -> list[int]:
        """What a row counts for each of T terms."""
        if not self.uses_choices:
            return [1 if self.per == "example" else len(row["target_ids"])]
        lengths = [len(ids) for ids in row["choice_ids"]]
        right = lengths.pop(row["label"])
        return [1 if self.per == "example" else right, 1, sum(lengths)]

    def target_losses(self, logits_BLV: Tensor, labels_BL: Tensor) -> Tensor:
        """The one term of an objective without choices, summed over each row: `[B, 1]`."""
        return token_losses(logits_BLV, labels_BL, self.label_smoothing).sum(1, keepdim=True)

    def choice_losses(
        self, logits_NLV: Tensor, labels_NL: Tensor, index_BC: Tensor, gold_B: Tensor
    ) -> Tensor:
        """The terms of an objective with choices, weighted and summed over each row: `[B, 3]`.

        Args:
            logits_NLV: of every choice of every row.
            labels_NL: the tokens of the choices; -100 is none.
            index_BC: which of N a row's choices are, -1 where it has fewer than C.
            gold_B: which of C is right.

        Returns:
            Of targets, multiple-choice, unlikelihood: the terms of the class, before division by
            what `row_counts` counts.
        """
        is_choice_BC = index_BC >= 0
        is_gold_BC = torch.arange(index_BC.shape[1], device=gold_B.device) == gold_B[:, None]
        index_BC = index_BC.clamp_min(0)  # any will do where there is no choice: it is masked below
        gold_N = index_BC[is_gold_BC]
        taken_NL = labels_NL != IGNORED
        loss_NL = token_losses(logits_NLV, labels_NL)
        loss_N = loss_NL.sum(1)
        target_B = loss_N[gold_N]
        if self.label_smoothing:
            target_B = self.target_losses(logits_NLV[gold_N], labels_NL[gold_N])[:, 0]
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
"""Mean cross-entropy over target tokens."""

OBJECTIVES = {
    "lm": LM,
    "t-few": Objective(mc_weight=1.0, unlikely_weight=1.0),
    "superni": Objective(label_smoothing=0.1, per="example"),
}
"""The objectives that have names: plain cross-entropy, that of few-shot training in T-Few
(arXiv 2205.05638), and that of training on Super-NaturalInstructions."""


def objective_of(name: str | Objective) -> Objective:
    """An objective by its name.

    Raises:
        InputError: there is no such objective.
    """
    if isinstance(name, Objective):
        return name
    if not isinstance(name, str) or name not in OBJECTIVES:
        raise InputError(f"unknown objective {name!r}: {did_you_mean(str(name), OBJECTIVES)}")
    return OBJECTIVES[name]


def term_weights(counts: Sequence[Sequence[int]]) -> list[float]:
    """What the sum of each of T terms over a batch is multiplied with.

    Args:
        counts: of every row, as `Objective.row_counts`. A term that no row counts for is 0 anyway.
    """
    return [1 / max(1, sum(term)) for term in zip(*counts, strict=True)]


def unlikely_constant(rows: Sequence[Row]) -> float:
    """What the public code of T-Few adds to the unlikelihood term of a batch.

    It depends on the padding alone and has no gradient, so our loss leaves it out; add it to
    compare values of the loss. Every place of the padded choices that is no token of a wrong one
    counts `-log(1.01)` there.
    """
    lengths = [[len(ids) for ids in row["choice_ids"]] for row in rows]
    flat = [length for row in lengths for length in row]
    right = sum(length[row["label"]] for row, length in zip(rows, lengths, strict=True))
    wrong = sum(flat) - right
    return -(len(flat) * max(flat) - wrong) * math.log(1 + OFFSET) / max(1, wrong)
