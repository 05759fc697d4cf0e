"""One slot in training: its optimizer, its schedule, its best step, and its file."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polyroute.adapting.settings import AdaptSettings
from polyroute.adapting.slot import ANEW, Slot, write_slot
from polyroute.adapting.slots import NEAREST, Slots
from polyroute.errors import InputError
from polyroute.kinds.batches import Row
from polyroute.optimizers import make_optimizer

__all__ = ["SlotTraining"]

CLEARLY = 1e-5
"""Share by which a validation loss must be lower to count as better. A smaller difference is
rounding, and would let the best step depend on which other slots share the batches."""


class SlotTraining:
    """One slot in training, at its place among the slots that are open.

    Args:
        slots: the slots that are open.
        place: which of them this one takes.
        slot: the adaptation.
        digest: see `Slot.digest`; written into the slot's file.
        start: the logits `[N, H, K]` to start from, instead of what the settings say.

    Attributes:
        losses: the loss of each step, before it.
        best_step: the number of steps after which the loss or score that chooses was best; the
            number of all steps where nothing chooses.
        best_loss: the lowest validation loss, or one minus the best score; None where nothing
            chooses.
        diverged_at: the step at which the loss or a weight was no longer finite; None if never.
        seconds: the slot's share of the time.
    """

    def __init__(
        self, slots: Slots, place: int, slot: Slot, digest: str = "", start: Tensor | None = None
    ) -> None:
        self.slots, self.place, self.slot, self.digest = slots, place, slot, digest
        self.settings = slot.settings
        init = self.settings.init
        if init == NEAREST:
            init = "uniform"  # no start was looked for, because `load` overwrites the slot
        slots.start(place, seed=slot.seed, init=init if start is None else start)
        self.parameters = slots.parameters(place)
        self.trained = [tensor for tensors in self.parameters.values() for tensor in tensors]
        self.optimizer = self._make_optimizer()
        self.rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.order = _batches(len(slot.rows), self.settings, slot.seed)
        self.losses: list[float] = []
        self.best_step = 0
        self.best_loss: float | None = None
        self.best: list[Tensor] = []
        self.stale = 0
        self.diverged_at: int | None = None
        self.seconds = 0.0

    def _make_optimizer(self) -> torch.optim.Optimizer:
        settings = self.settings
        rates = {"skills": settings.lr, "routes": settings.route_lr}
        decay = {"skills": settings.weight_decay, "routes": settings.route_weight_decay}
        groups: list[dict[str, Any]] = [
            {"name": name, "params": tensors, "lr": rates[name], "weight_decay": decay[name]}
            for name, tensors in self.parameters.items()
        ]
        groups[0] |= self.slots.averages(self.place)  # of skills, which come first
        return make_optimizer(
            settings.optimizer, groups, self.slots.model, scale_parameter=settings.scale_parameter
        )

    @property
    def route(self) -> str:
        """The name to route as."""
        return self.slots.names[self.place]

    @property
    def step(self) -> int:
        """The number of steps taken."""
        return len(self.losses)

    @property
    def is_over(self) -> bool:
        """Whether there is nothing more to train."""
        patience = self.settings.patience
        return (
            self.step >= self.settings.steps
            or self.diverged_at is not None
            or (patience is not None and self.stale >= patience)
        )

    @property
    def is_due(self) -> bool:
        """Whether it is time to look at the examples that choose the best step."""
        at_end = self.step == self.settings.steps
        has_any = bool(self.slot.validation_rows) or self.settings.looks_at_test
        is_time = at_end or self.step % self.settings.eval_steps == 0
        return has_any and is_time and self.diverged_at is None

    def next_rows(self) -> list[Row]:
        """The examples of the next step."""
        return [self.slot.rows[i] for i in next(self.order)]

    @torch.no_grad()
    def update(self, loss: float) -> None:
        """Take one step, from the gradients that are there."""
        self.losses.append(loss)
        if not math.isfinite(loss):
            self.diverged_at = self.step
            return
        self.slots.take_gradients(self.place, self.parameters)
        nn.utils.clip_grad_norm_(self.trained, self.settings.max_grad_norm)
        factor = _rate(self.step - 1, self.settings)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.step()
        for tensor in self.trained:
            tensor.grad = None

    def look(self, loss: float) -> None:
        """Note the validation loss, or one minus the score, and keep the best parameters."""
        best = self.best_loss
        if math.isfinite(loss) and (best is None or loss < best - CLEARLY * abs(best)):
            self.best_loss, self.best_step, self.stale = loss, self.step, 0
            self.best = [tensor.clone() for tensor in self.trained]
        else:
            self.stale += 1

    def finish(self) -> None:
        """Leave the slot as it was after its best step."""
        if self.best:  # also where it diverged afterwards
            for tensor, best in zip(self.trained, self.best, strict=True):
                tensor.copy_(best)
            self.diverged_at = None
        else:
            self.best_step = self.step
        if not all(bool(torch.isfinite(tensor).all()) for tensor in self.trained):
            self.diverged_at = self.diverged_at or self.step

    def outcome(self) -> dict[str, Any]:
        """The numbers of a finished slot, by the names that `Adapted` gives them."""
        losses = self.losses
        tenth = max(1, len(losses) // 10)
        return {
            "trained_parameters": sum(tensor.numel() for tensor in self.trained),
            "steps": self.step,
            "best_step": self.best_step,
            "first_loss": sum(losses[:tenth]) / tenth,
            "last_loss": sum(losses[-tenth:]) / tenth,
            "validation_loss": self.best_loss if self.settings.choose_by == "loss" else None,
            "diverged_at": self.diverged_at,
            "seconds": self.seconds,
            "indices": self.slot.indices,
        }

    # ------------------------------------------------------------------ its file

    def save(self, folder: Path) -> None:
        """Write all that `load` needs to go on, in one file."""
        state = self.optimizer.state_dict()["state"]
        tensors = {f"parameter.{i}": tensor for i, tensor in enumerate(self.trained)}
        tensors |= {f"best.{i}": tensor for i, tensor in enumerate(self.best)}
        tensors |= {
            f"state.{i}.{key}": value
            for i, entries in state.items()
            for key, value in entries.items()
            if isinstance(value, Tensor)
        }
        note = {
            "settings": self.settings.to_dict(),
            "digest": self.digest,
            "losses": self.losses,
            "best_step": self.best_step,
            "best_loss": self.best_loss,
            "stale": self.stale,
            "seconds": self.seconds,
        }
        write_slot(self.slot.file(folder), note, tensors)

    def load(self, folder: Path) -> None:
        """Go on where `save` was last called, if it was.

        Raises:
            InputError: the file is damaged or was written with other settings.
        """
        path = self.slot.file(folder)
        if not path.exists():
            return
        note, tensors = self.slot.saved(folder, self.digest)
        try:
            self._take(note, tensors)
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path} is damaged; {ANEW}") from error
        for _ in range(self.step):
            next(self.order)

    @torch.no_grad()
    def _take(self, note: Mapping[str, Any], saved: dict[str, Tensor]) -> None:
        """Take over what `save` wrote; the order of examples is left to the caller."""
        losses = note["losses"]
        if not isinstance(losses, list) or not 0 < len(losses) < self.settings.steps:
            raise ValueError("steps that were not taken")
        for i, tensor in enumerate(self.trained):
            if saved[f"parameter.{i}"].shape != tensor.shape:
                raise ValueError("another shape")
            tensor.copy_(saved.pop(f"parameter.{i}"))
        self.best = [
            saved.pop(f"best.{i}").to(tensor)
            for i, tensor in enumerate(self.trained)
            if f"best.{i}" in saved
        ]
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in saved.items():
            _, number, name = key.split(".", 2)
            state.setdefault(int(number), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.losses, self.best_step = [float(loss) for loss in losses], note["best_step"]
        self.best_loss, self.stale = note["best_loss"], note["stale"]
        self.seconds = note["seconds"]


def _rate(step: int, settings: AdaptSettings) -> float:
    """Factor of the learning rates at a step: up from above 0, then down to just above 0."""
    rising = max(1, round(settings.warmup * settings.steps))
    if step < rising:
        return (step + 1) / rising
    return max(0.0, (settings.steps - step) / max(1, settings.steps - rising + 1))


def _batches(num_rows: int, settings: AdaptSettings, seed: int) -> Iterator[list[int]]:
    """Row numbers of each step: shuffled passes over all rows, cut into equal batches."""
    rng = np.random.Generator(np.random.PCG64(seed))
    size = min(settings.batch_size, num_rows)
    queue: list[int] = []
    for _ in range(settings.steps):
        while len(queue) < size:
            queue.extend(rng.permutation(num_rows).tolist())
        yield queue[:size]
        del queue[:size]
