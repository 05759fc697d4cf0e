"""Divergence: training that comes to no numbers is noticed before it spoils what was saved."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from polyroute.errors import InputError, first_few
from polyroute.model import RoutedModel

__all__ = ["Watch", "check_finite"]

SKIPPED = 10
"""So many steps one after the other are skipped before training stops."""
NAMED = 5


class Watch(TrainerCallback):
    """Looks at the loss and the gradients of every step.

    With `on_nan="stop"` a number on the device keeps the first step that had one that is not
    finite. It is read, which waits for the device, only where the log or a checkpoint is written.
    With `"skip"` it is read at every step, and a step whose gradients are not finite changes
    nothing.

    Args:
        model: what trains.
        on_nan: see above.

    Attributes:
        skipped: the number of steps that were skipped.
    """

    def __init__(self, model: RoutedModel, on_nan: str) -> None:
        self.model, self.on_nan = model, on_nan
        self.skipped = self._in_a_row = 0
        self._first: Tensor | None = None
        self._steps: dict[int, tuple[set[str], float]] = {}
        """The tasks and the rate of each step that was not checked yet."""
        self._tasks: set[str] = set()
        self._loss: Tensor | None = None

    def see(self, loss: Tensor, inputs: Mapping[str, Any]) -> None:
        """Look at the loss of a batch, which counts for the step that follows."""
        tasks = inputs.get("tasks")
        self._tasks |= {str(task) for task in (tasks if isinstance(tasks, list) else ())}
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the gradients of a step."""
        step = state.global_step + 1
        gradients = [p.grad for p in self.model.learned() if p.grad is not None]
        if not gradients:
            return
        is_bad = ~_norm(gradients).isfinite()
        self._steps[step] = self._tasks, _rate(kwargs.get("optimizer"))
        self._tasks = set()
        if self.on_nan == "skip":
            self._skip(step, bool(is_bad))
        else:
            if self._loss is not None:
                is_bad = is_bad | ~self._loss.isfinite().to(is_bad.device)
            first = torch.where(is_bad, step, 0)
            known = self._first
            self._first = first if known is None else torch.where(known > 0, known, first)
        self._loss = None

    def _skip(self, step: int, is_bad: bool) -> None:
        self._in_a_row = self._in_a_row + 1 if is_bad else 0
        self.skipped += is_bad
        if self._in_a_row >= SKIPPED:
            raise self._error(step, f"the last {SKIPPED} steps were skipped, and")
        if is_bad:
            for parameter in self.model.learned():
                parameter.grad = None
        self._steps = {}

    def check(self) -> None:
        """Make sure that all steps so far had finite numbers.

        Raises:
            InputError: one had not; the message names it, its tasks and its rate.
        """
        first = 0 if self._first is None else int(self._first)
        if first:
            raise self._error(first, "")
        self._first = None
        self._steps = {}

    def _error(self, step: int, before: str) -> InputError:
        tasks, rate = self._steps.get(step, (set(), 0.0))
        of_tasks = f" on {first_few(sorted(tasks), NAMED)}" if tasks else ""
        return InputError(
            f"training diverged: {before and before + ' '}the loss or the gradient of step {step}"
            f"{of_tasks} is not finite, at the learning rate {rate:g}; lower the rate (--lr) and "
            "start again (--overwrite), or skip such steps (--on-nan skip)"
        )

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the steps since the last log."""
        self.check()


def check_finite(tensors: Iterable[Tensor], step: int) -> None:
    """Make sure that nothing is written that is not finite.

    Raises:
        InputError: a number is not.
    """
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise InputError(
            f"training diverged: a weight is not finite at step {step}; lower the learning rate "
            "(--lr) and start again (--overwrite)"
        )


def _norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all gradients, on the device of the first."""
    device = gradients[0].device
    norms = [torch.linalg.vector_norm(g.float()).to(device) for g in gradients]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def _rate(optimizer: Any) -> float:
    """The largest rate of an optimizer's groups."""
    groups = getattr(optimizer, "param_groups", ())
    return max((float(group["lr"]) for group in groups), default=0.0)
