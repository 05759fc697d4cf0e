"""Wrapping the chosen layers of a base model in place, all or none, and taking them out again."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from polyroute.errors import InputError
from polyroute.layer.open_route import OpenRoutes
from polyroute.layer.routed_layer import RoutedLayer
from polyroute.layer.sites import Site, fused_layers

__all__ = ["Wrapping", "check_bare", "find_modules"]

ADAPTER_LIBRARIES = ("peft", "adapters", "loralib")
"""Packages whose layers are adapters already."""


class Wrapping:
    """A base model whose chosen layers are wrapped; its parameters are frozen.

    Args:
        base_model: it is changed in place; on an error it is left as it was.
        sites: the layers.
        routes: what the wrapped layers apply.
        dropout: of their adapters' inputs.
        trained: whole modules that stay trainable.

    Attributes:
        layers: the wrapped layers, by site.
        trained: the modules that stay trainable, by name.
    """

    def __init__(
        self,
        base_model: nn.Module,
        sites: Sequence[Site],
        routes: OpenRoutes,
        *,
        dropout: float,
        trained: dict[str, nn.Module],
    ) -> None:
        self.base_model = base_model
        self.sites = tuple(sites)
        self.trained = trained
        self.layers = tuple(
            RoutedLayer(site, i, routes, dropout=dropout) for i, site in enumerate(sites)
        )
        self._required_grad = [n for n, p in base_model.named_parameters() if p.requires_grad]
        self._before = {
            name: {n: t.detach().clone() for n, t in module.state_dict().items()}
            for name, module in trained.items()
        }
        fused = fused_layers(base_model, sites)  # before they are wrapped
        self._hooks: list[Any] = []
        self._packing: list[nn.Module] = []
        self._has_checkpointing = False
        try:
            for site, layer in zip(sites, self.layers, strict=True):
                layer.train(site.layer.training)
                self.put(site, layer)
            self._stop_fusion(fused)
            self._freeze()
        except BaseException:
            self.undo(keep_trained=True)
            raise

    def put(self, site: Site, module: nn.Module) -> None:
        """Put a module wherever the base model has the layer of a site."""
        for place in site.places:
            parent, _, child = place.rpartition(".")
            setattr(self.base_model.get_submodule(parent), child, module)

    def _stop_fusion(self, fused: Sequence[nn.Module]) -> None:
        # torch fuses no layer that has a hook; its encoder, which packs padded batches for the
        # fused layers alone, has a switch.
        for module in fused:
            if isinstance(module, nn.TransformerEncoderLayer):
                self._hooks.append(module.register_forward_pre_hook(_do_nothing))
            elif getattr(module, "use_nested_tensor", False):
                self._packing.append(module)
                module.use_nested_tensor = False  # type: ignore[assignment]

    def start_checkpointing(self, options: dict[str, Any], contexts: Any, **kwargs: Any) -> None:
        """Turn on the base model's activation checkpointing; see `RoutedModel`.

        Args:
            options: of `torch.utils.checkpoint.checkpoint`.
            contexts: its `context_fn`, under which recomputation sees the route of its forward.
            **kwargs: of the base model's own method.

        Raises:
            InputError: reentrant checkpointing is asked for.
        """
        if options.get("use_reentrant"):
            raise InputError(
                "reentrant checkpointing cannot be routed; leave use_reentrant at False"
            )
        options.update(use_reentrant=False, context_fn=contexts)
        base: Any = self.base_model
        self._has_checkpointing = True
        if hasattr(base, "activation_checkpointing_enable"):
            base.activation_checkpointing_enable(activation_checkpointing_kwargs=options, **kwargs)
        else:  # its name before transformers 5
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options, **kwargs)

    def undo(self, *, keep_trained: bool) -> None:
        """Put everything back as it was.

        Args:
            keep_trained: leave the whole modules that were trained as they are now.
        """
        if self._has_checkpointing:  # its context_fn is ours
            base: Any = self.base_model
            for name in ("activation_checkpointing_disable", "gradient_checkpointing_disable"):
                if hasattr(base, name):
                    getattr(base, name)()
                    break
        for site in self.sites:
            self.put(site, site.layer)
        for hook in self._hooks:
            hook.remove()
        for encoder in self._packing:
            encoder.use_nested_tensor = True  # type: ignore[assignment]
        for name, parameter in self.base_model.named_parameters():
            parameter.requires_grad_(name in self._required_grad)
        if not keep_trained:
            for name, module in self.trained.items():
                module.load_state_dict(self._before[name])

    @contextmanager
    def bare_output(self) -> Iterator[None]:
        """For a block: the output embedding as it was before it was wrapped, if it was.

        The block may change or replace it; skills keep adding to the outputs that it had.
        """
        getter = getattr(self.base_model, "get_output_embeddings", None)
        output = getter() if callable(getter) else None
        wrapped = next((layer for layer in self.layers if layer is output), None)
        if wrapped is not None:
            self.put(wrapped.site, wrapped.site.layer)
        try:
            yield
        finally:
            if wrapped is not None and callable(getter):
                wrapped.base_layer = getter()
                # The one place where a site changes: everybody holds this object.
                object.__setattr__(wrapped.site, "layer", wrapped.base_layer)
                self.put(wrapped.site, wrapped)
            self._freeze()

    def _freeze(self) -> None:
        self.base_model.requires_grad_(False)
        for module in self.trained.values():
            module.requires_grad_(True)

    def trained_tensors(self) -> dict[str, Tensor]:
        """The parameters and buffers of the whole modules that train, by their full names."""
        return {
            f"{name}.{key}": tensor
            for name, module in self.trained.items()
            for key, tensor in module.state_dict().items()
        }


def find_modules(
    model: nn.Module, endings: Sequence[str] | None, sites: Sequence[Site]
) -> dict[str, nn.Module]:
    """The modules of `modules_to_save`, by their full names.

    Args:
        model: the base model.
        endings: of their names.
        sites: the adapted layers, which can be no part of them.

    Raises:
        InputError: an ending matches nothing, or a module that holds an adapted layer.
    """
    found: dict[str, nn.Module] = {}
    adapted = {id(site.layer): site.name for site in sites}
    for ending in endings or ():
        matches = {
            name: module
            for name, module in model.named_modules()
            if name == ending or name.endswith("." + ending)
        }
        if not matches:
            raise InputError(
                f"modules_to_save names {ending!r}, which matches no module of "
                f"{type(model).__name__}"
            )
        for name, module in matches.items():
            inside = [adapted[id(m)] for m in module.modules() if id(m) in adapted]
            if inside:
                raise InputError(
                    f"modules_to_save names {ending!r}, and layer {inside[0]!r} in it is adapted: "
                    "leave one of the two out, with exclude_modules for the layer"
                )
            if not any(name.startswith(outer + ".") for outer in found):
                found[name] = module
    return found


def check_bare(model: nn.Module) -> None:
    """Make sure that a base model carries no adapter yet.

    Raises:
        InputError: it does; the message names the layer and what it is.
    """
    for name, module in model.named_modules():
        if isinstance(module, RoutedLayer):
            raise InputError(
                f"layer {name!r} carries an inventory already; call unload() on the routed model"
            )
        if "mhr_adapters" in module._modules:  # of `polyroute.peft`, which needs PEFT
            raise InputError(
                f"layer {name!r} carries an adapter of polyroute.peft: call unload() on the PEFT "
                "model, or save the adapter and convert it to an inventory"
            )
    for name, module in model.named_modules():
        library = next(
            (c.__module__.partition(".")[0] for c in type(module).__mro__
             if c.__module__.partition(".")[0] in ADAPTER_LIBRARIES), None,
        )  # fmt: skip
        is_layer = hasattr(module, "lora_A") or hasattr(module, "adapter_layer_names")
        if library is not None or is_layer:
            what = f"layer {name!r}" if name else "the base model"
            raise InputError(
                f"{what} is a {type(module).__name__}"
                + (f" of {library}" if library else "")
                + ", an adapter already: merge it into the weights (merge_and_unload) or take it "
                "out (unload) first"
            )


def _do_nothing(*_: Any) -> None:
    """A hook; torch computes step by step in a layer that has one."""
