"""Learning constant weights over a library from a few examples (LoraHub's objective)."""

from collections.abc import Sequence

import torch

from polyroute.config import Granularity
from polyroute.errors import InputError
from polyroute.kinds.batches import Row, evaluating
from polyroute.kinds.choose import ModelKind
from polyroute.library.static import Static
from polyroute.model import RoutedModel
from polyroute.settings import number, whole

__all__ = ["learn_weights"]


def learn_weights(  # noqa: PLR0913 (public: users know its keywords)
    model: RoutedModel,
    kind: ModelKind,
    rows: Sequence[Row],
    *,
    granularity: Granularity = "coarsegrained",
    steps: int = 40,
    batch_size: int = 8,
    lr: float = 0.1,
    penalty: float = 0.05,
    seed: int = 0,
) -> Static:
    """Learn a weight for each LoRA by gradient, starting at 0; the LoRAs stay as they are.

    The objective is the loss plus `penalty` times the mean size of the weights (LoraHub, Huang et
    al., 2023, which searches without gradients).

    Args:
        model: has the library.
        kind: how its base model learns.
        rows: encoded examples.
        granularity: layers that share weights: those of the whole model, of a block, or of one.
        steps: of Adam, with a rate that falls linearly to 0.
        batch_size: examples in a step.
        lr: the rate at the start.
        penalty: see above.
        seed: of the order of examples.

    Raises:
        InputError: there is no example, a number is out of range, or the model averages the factors
            of skills.
    """
    whole()("steps", steps)
    whole()("batch_size", batch_size)
    number(above=0)("lr", lr)
    number(least=0)("penalty", penalty)
    if not len(rows):
        raise InputError("give at least one example to learn weights from")
    model.check_unmerged()
    rule = Static(model, granularity=granularity)
    optimizer = torch.optim.Adam(rule.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-3, total_iters=steps)
    generator = torch.Generator().manual_seed(seed)
    frozen = [p for p in model.inventory.parameters() if p.requires_grad]
    model.inventory.requires_grad_(False)
    order: list[int] = []
    try:
        with torch.inference_mode(False), evaluating(model), torch.enable_grad():
            for _ in range(steps):
                while len(order) < min(batch_size, len(rows)):
                    order += torch.randperm(len(rows), generator=generator).tolist()
                places, order = order[:batch_size], order[batch_size:]
                batch = kind.collate([{**rows[i], "task": rule} for i in places])
                loss = kind.loss(model, batch) + penalty * rule.weights.abs().mean()
                (rule.weights.grad,) = torch.autograd.grad(loss, [rule.weights])
                optimizer.step()
                schedule.step()
    finally:
        for parameter in frozen:
            parameter.requires_grad_()
    return rule
