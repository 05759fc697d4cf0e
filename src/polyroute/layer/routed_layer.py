"""The routed layer: a frozen base layer plus what the open mixture holds for it."""

from typing import Any

import torch
from torch import Tensor, nn

from polyroute.errors import InputError
from polyroute.layer.open_route import Mixture, OpenRoutes
from polyroute.layer.sites import Site

__all__ = ["RoutedLayer", "check_rows"]


class RoutedLayer(nn.Module):
    """A frozen base layer plus the mixture of skills of each example's task.

        y_b = W x_b + c + alpha/r (x_b A_b) B_b          (LoRA)
        y_b = (W x_b + c) * l_b                          ((IA)^3)

    The base layer is registered once. Its parameters keep, in the state dict, the keys that they
    had before it was adapted.
    """

    def __init__(self, site: Site, index: int, routes: OpenRoutes, *, dropout: float) -> None:
        super().__init__()
        self.base_layer = site.layer
        self.site = site
        self.index = index
        self.routes = routes
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

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Hand a weight or bias that the model sets, as when it ties weights, to the base layer."""
        self.base_layer.register_parameter(name, param)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Parameter):
            setattr(self.base_layer, name, value)
        else:
            super().__setattr__(name, value)

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
        state = self.routes
        mixture = state.mixture
        if mixture is None or state.prepared_by is not None or self._is_astray(state):
            mixture = self._prepared()
        if not mixture.factors:
            return base(x, *args, **kwargs)  # type: ignore[no-any-return]
        if mixture.num_examples is not None:
            check_rows(self.site, x, mixture)
        dropout = self.dropout if self.training else 0.0
        return mixture.factors[self.index].apply(base, x, dropout, mixture.segments)

    @staticmethod
    def _is_astray(state: OpenRoutes) -> bool:
        # Backward recomputes a checkpointed block, and the open route need not be its own.
        return (
            not torch.compiler.is_compiling()
            and torch._C._current_graph_task_id() != -1
            and not state.is_recomputing
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _prepared(self) -> Mixture:
        # The model prepares before its forward. A part that is called on its own (the encoder, by
        # `generate`) prepares at its first layer; the next layers see that it did, for the block
        # that they are in. When the first one is reached again, it is another forward.
        state = self.routes
        own = state.prepared_by not in (None, self.index) and state.prepared_for is state.now()
        if own and state.mixture is not None and not self._is_astray(state):
            return state.mixture
        assert state.prepare is not None
        mixture = state.prepare()
        state.prepared_by, state.prepared_for = self.index, state.now()
        return mixture


def check_rows(site: Site, x: Tensor, mixture: Mixture) -> None:
    """Make sure that a layer's input can belong to a batch of differing examples.

    Raises:
        InputError: the layer sees tokens in any order, or images whose examples are not known, or
            its input has other rows than the batch.
    """
    count = mixture.num_examples
    assert count is not None
    if site.sees_token_subsets:
        raise InputError(
            f"layer {site.name!r} is an expert that sees some tokens of the batch, so a "
            "batch of several tasks cannot be routed there: use one task per batch, or leave "
            "the layer out with exclude_modules"
        )
    if site.sees_media and not mixture.media_fit:
        raise InputError(
            f"layer {site.name!r} sees images or sounds, and this batch of several tasks does not "
            "show which example each belongs to: give every example as many of the same size, use "
            "one task per batch, or leave the layer out with exclude_modules"
        )
    if mixture.segments is not None and not site.sees_media:
        total = sum(mixture.segments.lengths)
        if x.numel() // x.shape[-1] != total:
            raise InputError(
                f"layer {site.name!r} got an input of shape {list(x.shape)} for packed rows of "
                f"{total} tokens: leave the layer out with exclude_modules, or do not pack"
            )
        return
    # Only the first axis tells: other axes of an input without a batch (tables of relative
    # positions) may divide by chance.
    if x.shape[0] % count:
        raise InputError(
            f"layer {site.name!r} got an input of shape {list(x.shape)} for "
            f"{count} routed examples; give one task per example, a single task name "
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
