"""Batches: encoded rows as tensors, and the losses of a model on them.

Shape letters are those of `polyroute.kinds.base`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it
from torch.nn.utils.rnn import pad_sequence

from polyroute.errors import InputError

__all__ = [
    "IGNORED",
    "Ids",
    "Row",
    "choice_counts",
    "choice_index",
    "choice_labels",
    "evaluating",
    "flat_choices",
    "flat_tasks",
    "log_probs",
    "on_device_of",
    "padded",
    "tasks_of",
    "token_loss",
    "token_losses",
]

Ids = list[int]
Row = Mapping[str, Any]
"""One row from `ModelKind.encode`."""

IGNORED = -100  # losses of transformers ignore this label


def padded(
    sequences: Sequence[Sequence[int]], value: int, *, side: Literal["left", "right"] = "right"
) -> Tensor:
    """Pad sequences to an integer tensor `[B, L]`; L is the length of the longest."""
    tensors = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


def tasks_of(rows: Sequence[Row]) -> list[str]:
    """The task of each of the B rows."""
    return [row["task"] for row in rows]


def choice_counts(rows: Sequence[Row]) -> list[int]:
    """The number of choices of each row, at least 1.

    Raises:
        InputError: a row has no choices.
    """
    for row in rows:
        if not row["choice_ids"]:
            raise InputError(
                f"task {row['task']!r} has a row without choices: use a text-generating base with "
                "objective 'lm', or tasks with choices"
            )
    return [len(row["choice_ids"]) for row in rows]


def choice_index(rows: Sequence[Row]) -> Tensor:
    """The indices, among all N, of each row's choices: `[B, C]`, -1 if a row has fewer than C.

    Raises:
        InputError: a row has no choices.
    """
    places = iter(range(sum(choice_counts(rows))))
    return padded([[next(places) for _ in row["choice_ids"]] for row in rows], -1)


def choice_labels(rows: Sequence[Row]) -> Tensor:
    """The index of the right choice of each row: `[B]`.

    Raises:
        InputError: a target is not one of the choices.
    """
    for row in rows:
        if row["label"] < 0:
            raise InputError(
                f"a target of task {row['task']!r} is not one of its choices: add it to them"
            )
    return torch.tensor([row["label"] for row in rows])


def flat_choices(rows: Sequence[Row]) -> Tensor:
    """Labels of all choices, `[N, L]`, ordered by row, then choice."""
    return padded([choice for row in rows for choice in row["choice_ids"]], IGNORED)


def flat_tasks(rows: Sequence[Row]) -> list[str]:
    """The task of each of the N choices."""
    return [row["task"] for row in rows for _ in row["choice_ids"]]


def token_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The model's own loss: the mean over the labelled tokens of the batch."""
    loss: Tensor = model(**on_device_of(model, batch), use_cache=False).loss
    return loss


def token_losses(logits_NLV: Tensor, labels_NL: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of every label, 0 for ignored labels: `[N, L]`, at least float32."""
    taken_NL = labels_NL != IGNORED
    dtype = torch.promote_types(logits_NLV.dtype, torch.float32)
    loss_NL = torch.zeros(labels_NL.shape, dtype=dtype, device=labels_NL.device)
    # Only labelled places are computed in float32, which saves memory; there is no sum by index,
    # which keeps it deterministic.
    loss_NL[taken_NL] = F.cross_entropy(
        logits_NLV[taken_NL].to(dtype),
        labels_NL[taken_NL],
        label_smoothing=label_smoothing,
        reduction="none",
    )
    return loss_NL


def log_probs(logits_NLV: Tensor, labels_NL: Tensor) -> Tensor:
    """Log-probability of each row's labels, and the same per token: `[N, 2]`, float32."""
    sum_N = -token_losses(logits_NLV, labels_NL).float().sum(1)
    return torch.stack([sum_N, sum_N / (labels_NL != IGNORED).sum(1)], dim=1)


def on_device_of(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with its tensors on the model's device."""
    device = next(model.parameters()).device
    return {key: v.to(device) if isinstance(v, Tensor) else v for key, v in batch.items()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block, the model is in evaluation mode and computes no gradients."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:  # one by one: frozen parts may have been in evaluation mode
            module.training = True
