"""The result of an adaptation: what one slot became, apart from the model that it trained in."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import Tensor

from polyroute.adapting.settings import AdaptSettings
from polyroute.adapting.slot_training import SlotTraining
from polyroute.layer.factors import PlainFactors
from polyroute.model import RoutedModel
from polyroute.saved.peft_card import write_peft_card
from polyroute.saved.peft_export import PeftTarget
from polyroute.saved.prompting import Prompting

__all__ = ["Adapted", "adapted"]


@dataclass(frozen=True)
class Adapted:
    """One slot at its end."""

    task: str
    seed: int
    settings: AdaptSettings
    indices: Sequence[int]
    """Which of the examples it was trained on."""
    trained_parameters: int
    steps: int
    """Steps taken."""
    best_step: int
    """The number of steps after which the result was taken."""
    first_loss: float
    """Mean loss over the first tenth of the steps."""
    last_loss: float
    """Mean loss over the last tenth of the steps."""
    validation_loss: float | None
    """Validation loss of the result; None where no such loss chose it."""
    diverged_at: int | None
    """The step at which the loss or a number was no longer finite: the result is worthless."""
    seconds: float
    """The slot's share of the wall-clock time of training."""
    route: Tensor | None = field(repr=False)
    """Its routing logits `[N, H, K]`; None where the phase has none."""
    factors: Sequence[PlainFactors] = field(repr=False)
    """What each site applies: the one plain adapter that the slot is."""
    _target: PeftTarget = field(repr=False)
    _prompting: Prompting = field(repr=False)

    def export_peft(self, folder: str | os.PathLike[str]) -> None:
        """Write it as an ordinary PEFT adapter, with a card that says how to prompt it.

        Raises:
            InputError: the folder cannot be written.
        """
        self._target.write(folder, self.factors)
        write_peft_card(folder, self._prompting)


def adapted(
    model: RoutedModel, training: SlotTraining, target: PeftTarget, prompting: Prompting
) -> Adapted:
    """The result of a slot, copied to the CPU while the model holds the slot.

    Args:
        model: holds the slot.
        training: the slot, finished.
        target: of the model.
        prompting: how its base model is prompted.
    """
    return Adapted(
        task=training.slot.task,
        seed=training.slot.seed,
        settings=training.settings,
        route=None if model.routes.logits is None else model.routes[training.route].cpu(),
        factors=[_copied(factors) for factors in model.factors_of(training.route)],
        _target=target,
        _prompting=prompting,
        **training.outcome(),
    )


def _copied(factors: Any) -> PlainFactors:
    tensors = {f.name: getattr(factors, f.name).detach().cpu().clone() for f in fields(factors)}
    copy: PlainFactors = replace(factors, **tensors)
    return copy
