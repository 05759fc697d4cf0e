"""Predictions: the logits of a model where a label is, and the losses that they give.

The output head is the widest layer of a language model, and most tokens of a batch carry no label.
So the head runs on the places that predict a label, and on no others: SmolLM2's vocabulary of
49,152 would otherwise take more memory than all of its layers.

Shape letters: B rows, N rows or choices, L tokens, V vocabulary, n labelled tokens.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from polyroute.kinds.batches import IGNORED, unwrapped

__all__ = ["Predictions", "has_own_terms", "predict"]


@dataclass(frozen=True)
class Predictions:
    """What a model predicts for every label of a batch."""

    logits: Tensor
    """`[n, V]`, for the labels row by row."""
    labels: Tensor
    """`[N, L]`; -100 is no label."""

    @classmethod
    def of(cls, logits_NLV: Tensor, labels_NL: Tensor) -> "Predictions":
        """The predictions among logits of all places."""
        return cls(logits_NLV[labels_NL != IGNORED], labels_NL)

    def losses(self, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropy of every label, 0 where there is none: `[N, L]`, at least float32."""
        taken_NL = self.labels != IGNORED
        dtype = torch.promote_types(self.logits.dtype, torch.float32)
        loss_NL = torch.zeros(self.labels.shape, dtype=dtype, device=self.labels.device)
        # There is no sum by index, which keeps it deterministic.
        loss_NL[taken_NL] = F.cross_entropy(
            self.logits.to(dtype),
            self.labels[taken_NL],
            label_smoothing=label_smoothing,
            reduction="none",
        )
        return loss_NL

    def mean_loss(self) -> Tensor:
        """The mean cross-entropy over all labels, a scalar, at least float32."""
        dtype = torch.promote_types(self.logits.dtype, torch.float32)
        return F.cross_entropy(self.logits.to(dtype), self.labels[self.labels != IGNORED])

    def log_probs(self) -> Tensor:
        """Log-probability of each row's labels, and the same per token: `[N, 2]`, float32."""
        sum_N = -self.losses().float().sum(1)
        return torch.stack([sum_N, sum_N / (self.labels != IGNORED).sum(1)], dim=1)


def predict(
    model: nn.Module, inputs: Mapping[str, Any], places_n: Tensor, labels_NL: Tensor
) -> Predictions:
    """Run a model, and its output head only where it predicts a label.

    Args:
        model: a transformers model with a language-model head, or a wrapper around one.
        inputs: the arguments of its forward, without labels; `input_ids` is `[B, L]`.
        places_n: for each label, row by row, the place among the B L tokens that predicts it.
        labels_NL: the labels, -100 for none.
    """
    chosen: list[Tensor] = []
    with _head_at(model, places_n, inputs["input_ids"].shape, chosen):
        logits: Tensor = model(**inputs, use_cache=False).logits
    if not chosen:  # the head cannot be called apart
        logits = logits.flatten(0, 1).index_select(0, places_n)
    return Predictions(logits.reshape(-1, logits.shape[-1]), labels_NL)


def has_own_terms(model: nn.Module) -> bool:
    """Whether the model's own loss has terms besides cross-entropy, such as one for its experts."""
    config = getattr(unwrapped(model)[-1], "config", None)
    return bool(getattr(config, "output_router_logits", False))


@contextmanager
def _head_at(
    model: nn.Module, places_n: Tensor, shape: torch.Size, chosen: list[Tensor]
) -> Iterator[None]:
    """Within the block, the model's head sees only some tokens; `chosen` then holds them."""

    def choose(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = args[0]
        if hidden.shape[:2] != shape:
            return None
        chosen.append(hidden.flatten(0, 1).index_select(0, places_n).unsqueeze(0))
        return (chosen[-1], *args[1:])

    head = _plain_head(model)
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()


def _plain_head(model: nn.Module) -> nn.Module | None:
    """The output head, if it treats every token alike and nothing compiled it."""
    layers = unwrapped(model)
    if torch.compiler.is_compiling() or any(
        hasattr(one, "_orig_mod") or getattr(one, "_compiled_call_impl", None) is not None
        for one in layers
    ):
        return None
    getter = getattr(layers[-1], "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    # An adapted head needs all tokens of an example, because examples may differ in their task.
    return head if isinstance(head, nn.Linear) else None
