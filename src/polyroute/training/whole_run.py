"""The loss and the time of a whole run: a run that was resumed says what an unbroken one says."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from polyroute.training.kept import kept_by

__all__ = ["WholeRun", "samples_of_a_step"]


class WholeRun(TrainerCallback):
    """Adds up the losses and the time of a run; checkpoints keep both.

    `Trainer` forgets them when it resumes: the next loss that it logs would be that of the steps
    since the checkpoint, and the mean loss and the times at the end those of the last piece.

    The sum since the last log stays on the device, and is kept as it is, so that all logged losses
    of a resumed run are those of an unbroken one, to the bit.
    """

    def __init__(self) -> None:
        self.go_on({}, 0)

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin anew, or go on from the checkpoint that training resumes from."""
        step = state.global_step
        self.go_on(kept_by(state.stateful_callbacks) if step else {}, step, args.device)

    def go_on(self, kept: Mapping[str, Any], step: int, device: torch.device | None = None) -> None:
        """Count on from a checkpoint.

        Args:
            kept: what `kept` gave; empty if an older version wrote the checkpoint, so that only
                later steps are known.
            step: that of the checkpoint, or 0.
            device: where losses are.
        """
        self._first: int = kept.get("first", step)
        """The step before the first known one."""
        self._total: float = kept.get("total", 0.0)
        """The sum of the losses of all known steps up to the last log."""
        self._without: int = kept.get("without", 0)
        """How many of these steps had no loss that is finite, and are not in the sum."""
        self._logged: int = kept.get("logged", step)
        """The step of the last log."""
        since = kept.get("since")
        self._since = None if since is None else torch.tensor(since, device=device)
        """The sum since then."""
        self._batches: int = kept.get("batches", 0)
        """How many batches there were since then."""
        finite = kept.get("finite", self._batches)
        self._finite = None if since is None else torch.tensor(float(finite), device=device)
        """How many of them are in the sum."""
        self._before: float = kept.get("seconds", 0.0)
        """Seconds of the earlier pieces."""
        self._started = time.monotonic()

    def kept(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "first": self._first,
            "total": self._total,
            "logged": self._logged,
            "since": None if self._since is None else float(self._since),
            "batches": self._batches,
            "finite": 0 if self._finite is None else float(self._finite),
            "without": self._without,
            "seconds": self._seconds(),
        }

    def _seconds(self) -> float:
        return self._before + time.monotonic() - self._started

    def see(self, loss: Tensor, *, fills: bool) -> None:
        """Add the loss of a batch, as its share of the step.

        Args:
            loss: one number.
            fills: whether the mean of the others stands for a loss that is not finite.
        """
        loss = loss.detach().float()
        counts = loss.isfinite() if fills else torch.ones_like(loss, dtype=torch.bool)
        loss = torch.where(counts, loss, 0.0)
        self._since = loss if self._since is None else self._since + loss
        self._finite = counts.float() if self._finite is None else self._finite + counts
        self._batches += 1

    def share(self, mean: Callable[[Tensor], Tensor]) -> None:
        """Make what was added since the last log that of all processes; each must call this."""
        if self._since is not None and self._finite is not None:
            self._since, self._finite = mean(self._since), mean(self._finite)

    def _sum(self) -> float:
        """That of the losses since the last log; NaN where none was finite."""
        if self._since is None or self._finite is None:
            return 0.0
        finite = float(self._finite)
        # Batches that are left out count as the mean of the others.
        return float(self._since) * (self._batches / finite) if finite else math.nan

    def mean_since_log(self, step: int) -> float:
        """The mean loss of the steps since the last log, which is now; NaN if none was finite."""
        total, steps, self._logged = self._sum(), step - self._logged, step
        if math.isfinite(total):
            self._total += total
        elif self._batches:
            self._without += steps
        self._since, self._finite, self._batches = None, None, 0
        return total / max(1, steps)

    @property
    def was_resumed(self) -> bool:
        """Whether there were earlier pieces."""
        return self._before > 0

    def metrics(self, step: int, samples: int) -> dict[str, float]:
        """The mean loss and the speed of all known steps, by the names of `Trainer`.

        Args:
            step: the last one.
            samples: rows of a step.
        """
        last, seconds, steps = self._sum(), max(self._seconds(), 1e-9), step - self._first
        without = self._without + (0 if math.isfinite(last) else step - self._logged)
        total = self._total + (last if math.isfinite(last) else 0.0)
        return {
            "train_runtime": round(seconds, 4),
            "train_samples_per_second": round(steps * samples / seconds, 3),
            "train_steps_per_second": round(steps / seconds, 3),
            "train_loss": total / (steps - without) if steps > without else math.nan,
        }


def samples_of_a_step(args: Any) -> int:
    """How many rows all processes read for a step, by the arguments of a trainer."""
    rows: int = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return rows
