"""The gradient of a task for the one adapter that its mixture is.

Shape letters: r rank, H heads, D width of a head's block.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from polyroute.kinds.batches import Row, evaluating
from polyroute.kinds.choose import ModelKind
from polyroute.model import RoutedModel

__all__ = ["differentiating", "gradients"]


@contextmanager
def differentiating(model: RoutedModel) -> Iterator[None]:
    """Evaluation mode in which the mixture has gradients, even where the skills are frozen."""
    frozen = [p for p in model.inventory.parameters() if not p.requires_grad]
    model.inventory.requires_grad_()
    try:
        with evaluating(model), torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def gradients(
    model: RoutedModel, kind: ModelKind, rows: Sequence[Row], route: str, batch_size: int
) -> list[list[Tensor]]:
    """The gradients of the mean loss of rows for the mixed factors.

    Args:
        model: the routed model, within `differentiating`.
        kind: how its base model learns.
        rows: encoded examples.
        route: the task, or `"mu"`, that all are routed as.
        batch_size: examples in a forward.

    Returns:
        For each site a gradient `[r, H D]` of each factor, such as A and B.
    """
    scales = [model.inventory.scale if f == "lora_b" else 1.0 for f in model.inventory.factor_names]
    total: Sequence[Tensor] = []
    for start in range(0, len(rows), batch_size):
        places = range(start, min(start + batch_size, len(rows)))
        batch = kind.collate([{**rows[i], "task": route} for i in places])
        with _mixed_factors(model) as forwards:
            loss = kind.loss(model, batch)
        factors = [factor for forward in forwards for factor in forward]
        found = torch.autograd.grad(
            loss * (len(places) / len(rows)),
            factors, allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        # A loss of several forwards, such as an encoder's, has a mixture for each.
        for i in range(0, len(found), len(forwards[0])):
            of_forward = found[i : i + len(forwards[0])]
            total = [a + b for a, b in zip(total, of_forward, strict=True)] if total else of_forward
    # The B that layers apply includes the scale; the B of the definition does not.
    count = len(scales)
    return [
        [gradient * scale for gradient, scale in zip(total[i : i + count], scales, strict=True)]
        for i in range(0, len(total), count)
    ]


@contextmanager
def _mixed_factors(model: RoutedModel) -> Iterator[list[list[Tensor]]]:
    """For each forward in the block, the factors of all sites, as the layers applied them."""
    forwards: list[list[Tensor]] = []

    def keep(_: nn.Module, __: Any, ___: Any) -> None:
        mixture = model.open_routes.mixture
        if mixture is not None:
            forwards.append([t for of_site in mixture.factors for t in vars(of_site).values()])

    # It must run before the model's own hook, which lets go of the mixture.
    hook = model.base_model.register_forward_hook(keep, prepend=True)
    try:
        yield forwards
    finally:
        hook.remove()
