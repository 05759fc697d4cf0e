"""What happens at certain steps of multi-task training."""

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from polyroute.host.memory import Trim
from polyroute.model import RoutedModel

__all__ = ["Anneal", "NextEpoch", "TrimMemory"]


class NextEpoch(TrainerCallback):
    """Tells the trainer's sampler the epoch; accelerate does not, when processes resume a run."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer: Any = trainer

    def on_epoch_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Pass the epoch on."""
        self.trainer.sampler.set_epoch(int(state.epoch or 0))


class TrimMemory(TrainerCallback):
    """Gives freed memory back to the system now and then; for training on a CPU."""

    def __init__(self) -> None:
        self._trim = Trim()

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give memory back if it is time."""
        self._trim.if_due()


class Anneal(TrainerCallback):
    """Moves the routing to the uniform mixture over the last `anneal_steps` of the model."""

    def __init__(self, model: RoutedModel) -> None:
        self.model = model

    def on_step_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set how far the routing has moved at this step."""
        window = self.model.adapter_config.anneal_steps
        into = state.global_step - (state.max_steps - window)
        self.model.mixer.anneal_progress = min(max(into / window, 0.0), 1.0)

    def on_train_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Finish the move, unless training stopped early."""
        if state.global_step >= state.max_steps:
            self.model.mixer.anneal_progress = 1.0
