"""Divergence: training that comes to no numbers is noticed before it spoils what was saved."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from polyroute.errors import InputError, first_few
from polyroute.model import RoutedModel
from polyroute.training.kept import kept_by

__all__ = ["Watch", "check_finite"]

SKIPPED = 10
"""So many steps one after the other are skipped before training stops."""
NAMED = 5
UNREAD = 100
"""Steps after which the device is asked even if nothing is logged or saved."""


class Watch(TrainerCallback):
    """Looks at the loss and the gradients of every step.

    With `on_nan="stop"` a number on the device keeps the first step that had one that is not
    finite. It is read, which waits for the device, where the log or a checkpoint is written, and
    every hundred steps. With `"skip"` both are read at every step, and a step with a loss or a
    gradient that is not finite changes nothing. A gradient scaler (fp16) skips steps itself, as a
    part of its search for a scale, so that they are left to it.

    Args:
        model: what trains.
        on_nan: see above.

    Attributes:
        skipped: the number of steps that were skipped, those before a resumption included.
    """

    def __init__(self, model: RoutedModel, on_nan: str) -> None:
        self.model, self.on_nan = model, on_nan
        self.skipped = 0
        self._forget()

    def _forget(self) -> None:
        self._in_a_row = 0
        self._first: Tensor | None = None
        self._steps: dict[int, tuple[set[str], str]] = {}
        """The tasks and the rates of each step that was not checked yet."""
        self._tasks: set[str] = set()
        self._loss: Tensor | None = None

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin anew, after an earlier training of the same trainer."""
        self._forget()
        kept = kept_by(state.stateful_callbacks) if state.global_step else {}
        self.skipped = kept.get("skipped", 0)

    def see(self, loss: Tensor, inputs: Mapping[str, Any]) -> None:
        """Look at the loss of a batch, which counts for the step that follows."""
        tasks = inputs.get("tasks")
        self._tasks |= {str(task) for task in (tasks if isinstance(tasks, list) else ())}
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the gradients of a step."""
        step, loss = state.global_step + 1, self._loss
        self._steps[step] = self._tasks, _rates(kwargs.get("optimizer"))
        self._tasks, self._loss = set(), None
        gradients = [p.grad for p in self.model.learned() if p.grad is not None]
        if not gradients or args.fp16:
            return
        is_bad = ~_norm(gradients).isfinite()
        if loss is not None:
            is_bad = is_bad | ~loss.isfinite().to(is_bad.device)
        if self.on_nan == "skip":
            self._skip(step, is_bad=bool(is_bad))
            return
        first = torch.where(is_bad, step, 0)
        known = self._first
        self._first = first if known is None else torch.where(known > 0, known, first)
        if len(self._steps) >= UNREAD:
            self.check()

    def _skip(self, step: int, *, is_bad: bool) -> None:
        self._in_a_row = self._in_a_row + 1 if is_bad else 0
        self.skipped += is_bad
        if self._in_a_row >= SKIPPED:
            raise self._error(step, f"the last {SKIPPED} steps were skipped, and ")
        if is_bad:
            for parameter in self.model.learned():
                parameter.grad = None
        self._steps = {}

    def check(self) -> None:
        """Make sure that all steps so far had finite numbers.

        Raises:
            InputError: one had not; the message names it, its tasks and its rates.
        """
        first = 0 if self._first is None else int(self._first)
        if first:
            raise self._error(first, "")
        self._first = None
        self._steps = {}

    def _error(self, step: int, before: str) -> InputError:
        tasks, rates = self._steps.get(step, (set(), "no rate"))
        of_tasks = f" on {first_few(sorted(tasks), NAMED)}" if tasks else ""
        return InputError(
            f"training diverged: {before}the loss or the gradient of step {step}{of_tasks} is not "
            f"finite, with {rates}; lower them (--lr, --route-lr) and start again (--overwrite), "
            "or skip such steps (--on-nan skip)"
        )

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the steps since the last log."""
        self.check()

    def on_train_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the last steps."""
        self.check()


def check_finite(tensors: Iterable[Tensor], step: int) -> None:
    """Make sure that nothing is written that is not finite.

    Raises:
        InputError: a number is not.
    """
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise InputError(
            f"training diverged: a weight is not finite at step {step}; lower the learning rates "
            "(--lr, --route-lr) and start again (--overwrite)"
        )


def _norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all gradients, on the device of the first."""
    device = gradients[0].device
    norms = [torch.linalg.vector_norm(g.float()).to(device) for g in gradients]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def _rates(optimizer: Any) -> str:
    """The rates of an optimizer's groups, in words."""
    groups = getattr(optimizer, "param_groups", ())
    named = {group.get("name", "the rate"): float(group["lr"]) for group in groups}
    return ", ".join(f"{name} at {rate:.3g}" for name, rate in named.items()) or "no rate"
