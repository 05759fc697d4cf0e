"""Trainers of other packages, and which of them may have a routed model.

transformers' own `Trainer` knows two classes of models that save themselves, and a routed model is
neither: it would write the state of base model and skills into one file that nothing can open, or
fail where layers share weights. So it is refused when it is made, before anything is trained.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from polyroute.errors import InputError

__all__ = ["accepted", "refuse_plain_trainer"]

ASKED = "accepts_loss_kwargs"
"""What transformers' Trainer, and nothing else, looks for on a model: it does so when it is made.
Models that do not define it lack it, so a routed model is asked through `__getattr__`."""


def refuse_plain_trainer(name: str) -> None:
    """Called with each attribute that a routed model would pass on to its base model.

    Raises:
        InputError: transformers' own Trainer asks.
    """
    if name == ASKED:
        raise InputError(
            "transformers' own Trainer would save this routed model without its inventory: use "
            "polyroute.MultiTaskTrainer, or polyroute.trainer.RoutedTrainer, which takes the same "
            "arguments as Trainer"
        )


@contextmanager
def accepted(model: Any, *, loss_kwargs: bool) -> Iterator[None]:
    """Within the block a trainer that saves the inventory may be made for a model.

    Args:
        model: the routed model.
        loss_kwargs: the answer to what the trainer asks: whether the model's forward uses
            `num_items_in_batch`.
    """
    setattr(model, ASKED, loss_kwargs)
    try:
        yield
    finally:
        delattr(model, ASKED)
