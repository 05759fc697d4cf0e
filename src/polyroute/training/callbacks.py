"""What happens at certain steps of multi-task training."""

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from polyroute.host.memory import give_back_memory
from polyroute.model import RoutedModel

__all__ = ["Anneal", "GiveBackMemory", "NextEpoch"]

STEPS_BETWEEN = 20
"""Steps between two times that memory is given back. Each costs about a hundredth of a step."""


class NextEpoch(TrainerCallback):
    """Tells the trainer's sampler the epoch; accelerate does not, when processes resume a run."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer: Any = trainer

    def on_epoch_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Pass the epoch on."""
        self.trainer.sampler.set_epoch(int(state.epoch or 0))


class GiveBackMemory(TrainerCallback):
    """Gives freed memory back to the system every so many steps; for training on a CPU.

    Batches of ever new shapes leave ever new holes in the heap. A training of SmolLM2 with 16
    examples in a step needs 2.5 GB, and without this its process had 5.8 GB after 200 steps.
    """

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give memory back if it is time."""
        if state.global_step % STEPS_BETWEEN == 0:
            give_back_memory()


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
