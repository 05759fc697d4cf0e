"""Batches: encoded rows as tensors.

Shape letters are those of `polyroute.kinds.base`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its name everywhere)
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from polyroute.errors import InputError

__all__ = [
    "FAILURES",
    "IGNORED",
    "Ids",
    "Row",
    "choice_counts",
    "choice_index",
    "choice_labels",
    "entropies",
    "evaluating",
    "flat_choices",
    "flat_tasks",
    "logits_of",
    "on_device_of",
    "padded",
    "rounded",
    "target_token_ids",
    "tasks_of",
    "token_ids",
    "unwrapped",
]

Ids = list[int]
Row = Mapping[str, Any]
"""One row from `ModelKind.encode`."""

IGNORED = -100  # losses of transformers ignore this label
FAILURES = (IndexError, RuntimeError, TypeError, ValueError)
"""What a model raises that cannot run on a batch of an unusual form."""


UNIT, LARGE = 64, 512
"""Batches of `LARGE` tokens or more have a multiple of `UNIT` tokens, or a few more.

Batches of ever new sizes leave ever new holes in the heap, in which glibc searches for every new
tensor. A step of SmolLM2 took 1.97 s at first and 2.86 s after 60 steps, and 2.01 and 1.75 s with
rounded sizes.
"""


def padded(
    sequences: Sequence[Sequence[int]],
    value: int,
    *,
    side: Literal["left", "right"] = "right",
    length: int = 0,
) -> Tensor:
    """Pad sequences to an integer tensor `[B, L]`; L is the length of the longest, or `length`."""
    tensors = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    found = pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)
    missing = length - found.shape[1]
    if missing <= 0:
        return found
    return F.pad(found, (missing, 0) if side == "left" else (0, missing), value=value)


def rounded(length: int, rows: int, limit: int | None = None) -> int:
    """A length at or above the given one, with which large batches have one of few sizes.

    Args:
        length: the length of the longest row.
        rows: the number of rows.
        limit: the longest that rows may be, if the given length is not longer.
    """
    if length * rows < LARGE:
        return length
    unit = -(-UNIT // rows)
    found = -(-length // unit) * unit
    return found if limit is None else max(length, min(found, limit))


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, special: bool) -> list[Ids]:
    """The token ids of texts, with the special tokens that the tokenizer adds or without."""
    # Not truncated here, because truncation would change the state of the tokenizer.
    ids: list[Ids] = tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def target_token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[Ids]:
    """The token ids of targets, with the special tokens that the tokenizer adds to targets.

    Those of translation models, such as mBART and NLLB, name the target's language.
    """
    ids: list[Ids] = tokenizer(text_target=texts, verbose=False)["input_ids"]
    return ids


def unwrapped(model: nn.Module) -> list[nn.Module]:
    """A model and what it wraps, from the outside to the transformers model."""
    found = [model]
    # A transformers model has a `base_model` too: itself without its head.
    while not isinstance(found[-1], PreTrainedModel):
        names = ("_orig_mod", "module", "base_model")
        inner = (getattr(found[-1], name, None) for name in names)
        inside = next((one for one in inner if isinstance(one, nn.Module)), None)
        if inside is None:
            break
        found.append(inside)
    return found


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


def entropies(scores: Sequence[Tensor]) -> Tensor:
    """The entropy, in nats, of a choice in proportion to the exponential of its score: `[B]`.

    Args:
        scores: those of each row's choices, which are finite.
    """
    by_row = [one.log_softmax(0) for one in scores]
    return torch.stack([-(log_probs.exp() * log_probs).sum() for log_probs in by_row])


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


def on_device_of(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with its tensors on the model's device."""
    device = next(model.parameters()).device
    return {key: v.to(device) if isinstance(v, Tensor) else v for key, v in batch.items()}


def logits_of(model: nn.Module, inputs: Mapping[str, Tensor], tasks: list[str]) -> Tensor:
    """The logits of a batch of one row, in evaluation mode: `[L, V]`."""
    with evaluating(model):
        found: Tensor = model(**on_device_of(model, inputs), tasks=tasks, use_cache=False).logits
    return found[0]


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
