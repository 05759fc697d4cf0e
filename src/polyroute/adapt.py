"""Few-shot adaptation: from a trained inventory to a new task, with a handful of examples."""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn

from polyroute.errors import InputError
from polyroute.evaluate import score_rows
from polyroute.examples import encoded
from polyroute.kinds import ModelKind
from polyroute.model import Phase, RoutedModel
from polyroute.sampling import draw_few_shot
from polyroute.suite import Suite

__all__ = ["AdaptSettings", "Adapted", "adapt", "adapt_task", "begin_task", "check_new"]


@dataclass(frozen=True, kw_only=True)
class AdaptSettings:
    """How to adapt; the same for every task and seed.

    Raises:
        InputError: a number is out of range.
    """

    phase: Phase = "mu"
    shots: int = 32
    """Training examples of the new task."""
    steps: int = 100
    batch_size: int = 16
    lr: float = 3e-3
    """Of the skills."""
    route_lr: float = 0.1
    """Of the routing logits."""
    weight_decay: float = 0.0
    warmup: float = 0.06
    """Share of the steps in which the rates rise from 0; they then fall linearly to 0."""
    max_grad_norm: float = 1.0
    init: str = "uniform"
    """How the new task's route starts: `"uniform"`, or the name of a task to copy."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("shots", "steps", "batch_size", "lr", "route_lr", "max_grad_norm"):
            # Written so that NaN is refused too.
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be positive and finite, not {getattr(self, name)}")
        if not 0 <= self.weight_decay < math.inf:
            raise InputError(
                f"weight_decay must be finite and not negative, got {self.weight_decay}"
            )
        if not 0 <= self.warmup < 1:
            raise InputError(f"warmup must be in [0, 1), not {self.warmup}")
        if self.init != "uniform" and self.phase in ("mu", "mu-uncollapsed", "random"):
            raise InputError(
                f"phase {self.phase!r} does not use a route, so init {self.init!r} would be "
                "ignored; use phase 'full' or 'z', or init 'uniform'"
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Adapted:
    """What one adaptation did."""

    trained_parameters: int
    first_loss: float
    last_loss: float
    """Means over the first and the last tenth of the steps."""
    seconds: float


def check_new(model: RoutedModel, task: str) -> None:
    """Make sure that a task can be added.

    Raises:
        InputError: the inventory was trained on the task.
    """
    if task in model.routes:
        raise InputError(
            f"task {task!r} is among those that the inventory was trained on; "
            "`polyroute evaluate` scores it as it is"
        )


def begin_task(model: RoutedModel, task: str, settings: AdaptSettings, seed: int) -> None:
    """Reduce the model, in place, to one new task, and choose what trains.

    Raises:
        InputError: the inventory was trained on the task, or the phase has nothing to train.
    """
    check_new(model, task)
    torch.manual_seed(seed)
    model.add_task(task, settings.init)
    model.keep_tasks([task])
    model.set_phase(settings.phase)


def adapt(
    model: RoutedModel,
    kind: ModelKind,
    rows: datasets.Dataset,
    settings: AdaptSettings,
    *,
    seed: int,
) -> Adapted:
    """Train what the phase trains, in place, on a few rows.

    AdamW; linear warm-up and decay; the global gradient norm is clipped. The seed fixes the order
    of the examples and every random number of the training.

    Args:
        model: after `begin_task`.
        kind: how the base model learns.
        rows: the encoded few-shot examples.
        settings: how.
        seed: of the order.

    Raises:
        InputError: the loss or a trained number is no longer finite.
    """
    started = time.perf_counter()
    torch.manual_seed(seed)
    groups = model.param_groups(
        None, lr=settings.lr, route_lr=settings.route_lr, weight_decay=settings.weight_decay
    )
    trained = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _rate(step, settings.steps, settings.warmup)
    )
    model.train()
    losses = []
    examples = [rows[i] for i in range(len(rows))]
    for batch in _batches(len(rows), settings.batch_size, settings.steps, seed):
        loss = kind.loss(model, kind.collate([examples[i] for i in batch]))
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise InputError(
                f"training diverged: the loss is {losses[-1]} at step {len(losses)}; lower --lr"
            )
    if not all(bool(torch.isfinite(p).all()) for p in trained):
        raise InputError(
            f"training diverged: a weight is not finite at step {len(losses)}; lower --lr"
        )
    model.eval()
    tenth = max(1, len(losses) // 10)
    return Adapted(
        sum(p.numel() for p in trained),
        float(np.mean(losses[:tenth])),
        float(np.mean(losses[-tenth:])),
        time.perf_counter() - started,
    )


def adapt_task(
    model: RoutedModel,
    kind: ModelKind,
    suite: Suite,
    task: str,
    settings: AdaptSettings,
    *,
    seed: int,
    split: str = "test",
) -> dict[str, Any]:
    """Draw a few examples of a new task, adapt to them, in place, and score the result.

    The score is that of the last step: nothing is selected by it.

    Args:
        model: a trained inventory.
        kind: how its base model learns and answers.
        suite: where the task is.
        task: its name.
        settings: how to adapt.
        seed: of the draw, the initialisation and the order.
        split: to score on.

    Returns:
        The scores, what was trained, the losses, seconds of training, and `indices`, the rows of
        the training split that were drawn.
    """
    train = encoded(suite, task, "train", kind)
    indices = draw_few_shot(len(train), settings.shots, seed)
    begin_task(model, task, settings, seed)
    adapted = adapt(model, kind, train.select(indices), settings, seed=seed)
    metric = suite.info(task).metric
    rows, texts = encoded(suite, task, split, kind), suite.split(task, split)
    score, normalised = score_rows(model, kind, rows, texts["target"], metric, route=task)
    return {
        "task": task,
        "seed": seed,
        "phase": settings.phase,
        "shots": settings.shots,
        "split": split,
        "metric": metric,
        "score": score,
        "score_normalised": normalised,
        **asdict(adapted),
        "indices": indices,
    }


def _rate(step: int, steps: int, warmup: float) -> float:
    """Factor of the learning rates at a step: up from above 0, then down to just above 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return max(0.0, (steps - step) / max(1, steps - rising + 1))


def _batches(num_rows: int, batch_size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Row numbers of each step: shuffled passes over all rows, cut into equal batches."""
    rng = np.random.Generator(np.random.PCG64(seed))
    size = min(batch_size, num_rows)
    queue: list[int] = []
    for _ in range(steps):
        while len(queue) < size:
            queue.extend(rng.permutation(num_rows).tolist())
        yield queue[:size]
        del queue[:size]
