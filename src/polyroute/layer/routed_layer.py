"""The routed layer: a frozen base layer plus what the open mixture holds for it."""

from typing import Any

import torch
from torch import Tensor, nn

from polyroute.errors import InputError
from polyroute.layer.open_route import Mixture, Routing
from polyroute.layer.sites import Site

__all__ = ["RoutedLayer", "check_rows"]


class RoutedLayer(nn.Module):
    """A frozen base layer plus the mixture of skills of each example's task.

        y_b = W x_b + c + alpha/r (x_b A_b) B_b          (LoRA)
        y_b = (W x_b + c) * l_b                          ((IA)^3)

    The base layer is registered once. Its parameters keep, in the state dict, the keys that they
    had before it was adapted.
    """

    def __init__(self, site: Site, index: int, routing: Routing, *, dropout: float) -> None:
        super().__init__()
        self.base_layer = site.layer
        self.site = site
        self.index = index
        self.routing = routing
        self.dropout = dropout
        self.is_merged = False
        self.register_state_dict_post_hook(_drop_prefix)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_add_prefix)  # type: ignore[no-untyped-call]

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, for models that look at its dtype or device."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias  # type: ignore[return-value]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # `in_features`, `nf` and whatever else the model may read
            return getattr(super().__getattr__("base_layer"), name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the base layer and the open route's mixture.

        Raises:
            InputError: no route is open, or the rows cannot belong to the route's examples.
        """
        base = self._modules["base_layer"]  # self.base_layer, past two slow look-ups
        assert base is not None
        if self.is_merged:
            return base(x, *args, **kwargs)  # type: ignore[no-any-return]
        state = self.routing
        mixture = state.mixture
        if mixture is None or state.prepared_by == self.index or self._is_astray(state):
            mixture = self._prepare()
        if not mixture.factors:
            return base(x, *args, **kwargs)  # type: ignore[no-any-return]
        if mixture.num_examples is not None:
            check_rows(self.site, x, mixture.num_examples)
        return mixture.factors[self.index].apply(base, x, self.dropout if self.training else 0.0)

    @staticmethod
    def _is_astray(state: Routing) -> bool:
        # Backward recomputes a checkpointed block, and the open route need not be its own.
        return (
            not torch.compiler.is_compiling()
            and torch._C._current_graph_task_id() != -1
            and not state.is_recomputing
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _prepare(self) -> Mixture:
        # The model prepares before its forward; a part called on its own (the encoder, by
        # `generate`) does it here, at the first layer.
        assert self.routing.prepare is not None
        mixture = self.routing.prepare()
        self.routing.prepared_by = self.index
        return mixture


def check_rows(site: Site, x: Tensor, num_examples: int) -> None:
    """Make sure that a layer's input can belong to a batch of differing examples.

    Raises:
        InputError: the layer sees tokens in any order, or `num_examples` does not divide the rows.
    """
    if site.sees_token_subsets:
        raise InputError(
            f"layer {site.name!r} is an expert that sees some tokens of the batch, so a "
            "batch of several tasks cannot be routed there: use one task per batch, or leave "
            "the layer out with exclude_modules"
        )
    # Only the first axis tells: other axes of an input without a batch (tables of relative
    # positions) may divide by chance.
    if x.shape[0] % num_examples:
        raise InputError(
            f"layer {site.name!r} got an input of shape {list(x.shape)} for "
            f"{num_examples} routed examples; give one task per example, a single task name "
            "for the whole batch, or leave the layer out with exclude_modules if its input "
            "has no batch"
        )


def _drop_prefix(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for key in [k for k in state if k.startswith(prefix + "base_layer.")]:
        state[prefix + key[len(prefix) + len("base_layer.") :]] = state.pop(key)


def _add_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in [k for k in state if k.startswith(prefix)]:
        rest = key[len(prefix) :]
        if not rest.startswith("base_layer."):
            state[prefix + "base_layer." + rest] = state.pop(key)
