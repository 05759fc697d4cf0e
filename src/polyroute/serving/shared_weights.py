"""A second model on the same weights."""

import copy
from itertools import chain
from typing import Any, TypeVar

from torch import nn

__all__ = ["shared_weights"]

Model = TypeVar("Model", bound=nn.Module)


def shared_weights(model: Model) -> Model:
    """A copy of a model whose parameters and buffers are those of the model itself.

    Its modules and its config are its own, so wrapping or configuring one changes nothing of the
    other.
    """
    tensors = chain(model.parameters(), model.buffers())
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    return copy.deepcopy(model, memo)
