"""The routed layer: a frozen base layer, and the factors that the open route's mixture gives it."""

from typing import Any

import torch
from torch import Tensor, nn

from polyroute.errors import InputError
from polyroute.layer.open_route import Mixture, OpenRoutes, is_in_backward
from polyroute.layer.sites import Site

__all__ = ["RoutedLayer", "check_input", "check_part"]


OF_BASE = ("weight", "bias", "in_features", "out_features")
"""Attributes that belong to the base layer, also where the model sets them."""


class RoutedLayer(nn.Module):
    """A frozen base layer plus the mixture of skills of each example's task.

        y_b = W x_b + c + alpha/r (x_b A_b) B_b          (LoRA)
        y_b = (W x_b + c) * l_b                          ((IA)^3)

    In the state dict the parameters of the base layer keep the keys that they had before it was
    adapted.

    Args:
        site: the base layer and what is known of it.
        index: the place of the site in the list of sites.
        open_routes: holds the mixture of the running forward.
        dropout: probability with which the adapter's input is dropped in training.
    """

    def __init__(self, site: Site, index: int, open_routes: OpenRoutes, *, dropout: float) -> None:
        super().__init__()
        self.base_layer = site.layer
        self.site = site
        self.index = index
        self.open_routes = open_routes
        self.dropout = dropout
        self.is_merged = False
        self.register_state_dict_post_hook(_drop_prefix)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_add_prefix)  # type: ignore[no-untyped-call]

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, for models that read its dtype or device."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias  # type: ignore[return-value]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Pass a weight or bias that the model sets (when it ties weights) to the base layer."""
        self.base_layer.register_parameter(name, param)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Parameter) or name in OF_BASE:
            setattr(self.base_layer, name, value)
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # `in_features`, `nf` and other attributes that a model may read
            return getattr(super().__getattr__("base_layer"), name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the base layer and its factors in the open route's mixture.

        Raises:
            InputError: no route is open, or the input cannot be that of the route's examples.
        """
        base = self._modules["base_layer"]  # `self.base_layer` without two slow look-ups
        assert base is not None
        if self.is_merged:
            return base(x, *args, **kwargs)  # type: ignore[no-any-return]
        open_routes = self.open_routes
        mixture = open_routes.mixture
        if mixture is None or open_routes.prepared_by is not None or self._lacks_its_route():
            mixture = self._prepared(x)
        if not mixture.factors:
            return base(x, *args, **kwargs)  # type: ignore[no-any-return]
        if mixture.num_examples is not None:
            check_input(self.site, x, mixture)
        dropout = self.dropout if self.training else 0.0
        return mixture.factors[self.index].apply(base, x, dropout, mixture.segments)

    def _lacks_its_route(self) -> bool:
        # Backward recomputes this layer, and the route that is open now need not be its own.
        return (
            not torch.compiler.is_compiling()
            and is_in_backward()
            and not self.open_routes.is_recomputing
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _prepared(self, x: Tensor) -> Mixture:
        # The model prepares the mixture before its forward. If a part of it is called on its own
        # (the encoder, by `generate`), the first layer of the part prepares, and the layers after
        # it use the same mixture as long as the same block is open. When the first layer is called
        # again, another forward has begun.
        opened, block = self.open_routes, self.open_routes.now()
        by_another = opened.prepared_by not in (None, self.index) and opened.prepared_for is block
        if by_another and opened.mixture is not None and not self._lacks_its_route():
            return opened.mixture
        if opened.prepare is None:
            raise InputError("a copy of a part has no routes: copy the whole routed model")
        mixture = opened.prepare()
        opened.prepared_by, opened.prepared_for = self.index, block
        if opened.generating is None:
            check_part(x, mixture.num_examples)
        return mixture


def check_part(x: Tensor, num_examples: int | None) -> None:
    """Make sure that a part of a model that is called on its own has an example for each task.

    Only a generation repeats examples, and only the whole model gets packed rows.

    Raises:
        InputError: the first axis of the part's input has another length.
    """
    if num_examples is not None and x.dim() > 2 and len(x) != num_examples:
        raise InputError(
            f"{num_examples} tasks were given for a part of the model that runs on {len(x)} "
            "examples; give one per example, or a single name for all"
        )


def check_input(site: Site, x: Tensor, mixture: Mixture) -> None:
    """Make sure that a layer's input can be that of a batch whose examples differ.

    Args:
        site: the layer.
        x: its input, `[..., d_in]`.
        mixture: what it applies, with `num_examples` set.

    Raises:
        InputError: the layer sees tokens in any order, or images that cannot be assigned to
            examples, or the first axis of its input does not hold the examples of the batch.
    """
    count = mixture.num_examples
    assert count is not None
    if site.sees_token_subsets:
        raise InputError(
            f"layer {site.name!r} is an expert that sees only some tokens of the batch, so it "
            "cannot route a batch of several tasks: use one task per batch, or leave the layer "
            "out with exclude_modules"
        )
    if site.sees_media and not mixture.media_fit:
        raise InputError(
            f"layer {site.name!r} sees images or sounds, and this batch of several tasks does not "
            "show which example each belongs to: give every example the same number of them in "
            "the same size, use one task per batch, or leave the layer out with exclude_modules"
        )
    if mixture.segments is not None and not site.sees_media:
        total = sum(mixture.segments.lengths)
        if x.numel() // x.shape[-1] != total:
            raise InputError(
                f"layer {site.name!r} got an input of shape {list(x.shape)} for packed rows of "
                f"{total} tokens: leave the layer out with exclude_modules, or do not pack rows"
            )
        return
    # Look at the first axis alone: in an input without a batch (such as a table of relative
    # positions) the number of examples may divide another axis by chance.
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
