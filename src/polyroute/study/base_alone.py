"""The untouched base model, scored in the way that routed models are."""

from typing import Any

from torch import nn

__all__ = ["BaseAlone"]


class BaseAlone(nn.Module):
    """A base model without an inventory; it takes the tasks of a batch and ignores them."""

    def __init__(self, base_model: nn.Module) -> None:
        super().__init__()
        self.base_model = base_model
        self.config = base_model.config

    def forward(self, *args: Any, tasks: Any = None, **kwargs: Any) -> Any:
        """Run the base model; `tasks` change nothing."""
        return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, tasks: Any = None, **kwargs: Any) -> Any:
        """Generate with the base model; `tasks` change nothing."""
        return self.base_model.generate(*args, **kwargs)  # type: ignore[operator]
