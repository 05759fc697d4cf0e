"""Wrapping the chosen layers of a base model in place, all or none, and undoing that."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from polyroute.errors import InputError, did_you_mean
from polyroute.layer.open_route import OpenRoutes
from polyroute.layer.routed_layer import RoutedLayer
from polyroute.layer.sites import Site, fused_layers, is_match, output_embedding

__all__ = ["Wrapping", "check_bare", "find_modules", "tensors_of"]

ADAPTER_LIBRARIES = ("peft", "adapters", "loralib")
"""Packages whose layers are adapters."""


class Wrapping:
    """A base model whose chosen layers are wrapped and whose parameters are frozen.

    Args:
        base_model: the model, which is changed in place; after an error it is as it was before.
        sites: the layers to wrap.
        open_routes: holds what the wrapped layers apply.
        dropout: probability with which the input of an adapter is dropped in training.
        trained: whole modules that stay trainable, by name.

    Attributes:
        base_model: as given.
        sites: as given.
        trained: as given.
        layers: the wrapped layers, by site.
    """

    def __init__(
        self,
        base_model: nn.Module,
        sites: Sequence[Site],
        open_routes: OpenRoutes,
        *,
        dropout: float,
        trained: dict[str, nn.Module],
    ) -> None:
        self.base_model = base_model
        self.sites = tuple(sites)
        self.trained = trained
        self.layers = tuple(
            RoutedLayer(site, i, open_routes, dropout=dropout) for i, site in enumerate(sites)
        )
        self._required_grad = [n for n, p in base_model.named_parameters() if p.requires_grad]
        self._before = {
            name: {n: t.detach().clone() for n, t in module.state_dict().items()}
            for name, module in trained.items()
        }
        fused = fused_layers(base_model, sites)  # to be found before the sites are wrapped
        self._hooks: list[Any] = []
        self._packing: list[nn.Module] = []
        self._has_checkpointing = False
        self._guarded: list[str] = []
        try:
            for site, layer in zip(sites, self.layers, strict=True):
                layer.train(site.layer.training)
                self.put(site, layer)
            self._stop_fusion(fused)
            self._freeze()
        except BaseException:
            self.undo(keep_trained=True)
            raise

    def put(self, site: Site, module: nn.Module, *, instead_of: nn.Module | None = None) -> None:
        """Put a module in every place of the base model that the layer of a site has.

        Args:
            site: the site.
            module: the module.
            instead_of: only where this one is now; None puts it everywhere.
        """
        for place in site.places:
            parent, _, child = place.rpartition(".")
            holder = self.base_model.get_submodule(parent)
            if instead_of is None or getattr(holder, child) is instead_of:
                setattr(holder, child, module)

    def guard(self, name: str, method: Callable[..., Any]) -> None:
        """Let a method of the base model, if it has it, go through another function."""
        if hasattr(self.base_model, name):
            vars(self.base_model)[name] = method
            self._guarded.append(name)

    def replaced(self) -> list[str]:
        """The names of adapted layers and trained modules that the base model has lost since."""
        here = dict(self.base_model.named_modules(remove_duplicate=False))
        ours = dict(zip((site.name for site in self.sites), self.layers, strict=True))
        return [name for name, m in {**ours, **self.trained}.items() if here.get(name) is not m]

    def _stop_fusion(self, fused: Sequence[nn.Module]) -> None:
        # torch fuses no layer that has a hook. Its encoder packs padded batches for fused layers
        # only, and has a switch for that.
        for module in fused:
            if isinstance(module, nn.TransformerEncoderLayer):
                self._hooks.append(module.register_forward_pre_hook(_do_nothing))
            elif getattr(module, "use_nested_tensor", False):
                self._packing.append(module)
                module.use_nested_tensor = False  # type: ignore[assignment]

    def start_checkpointing(self, options: dict[str, Any], contexts: Any, **kwargs: Any) -> None:
        """Turn on the base model's activation checkpointing.

        `RoutedModel.activation_checkpointing_enable` is the public method.

        Args:
            options: options of `torch.utils.checkpoint.checkpoint`.
            contexts: its `context_fn`, under which recomputation sees the route of its forward.
            **kwargs: arguments of the base model's own method.

        Raises:
            InputError: `options` ask for reentrant checkpointing.
        """
        if options.get("use_reentrant"):
            raise InputError(
                "reentrant checkpointing cannot be routed: leave use_reentrant at False"
            )
        options.update(use_reentrant=False, context_fn=contexts)
        base: Any = self.base_model
        self._has_checkpointing = True
        if hasattr(base, "activation_checkpointing_enable"):
            base.activation_checkpointing_enable(activation_checkpointing_kwargs=options, **kwargs)
        else:  # its name before transformers 5
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options, **kwargs)

    def undo(self, *, keep_trained: bool) -> None:
        """Undo the wrapping: the base model is as it was before.

        Args:
            keep_trained: whether the whole modules that trained keep their present values.
        """
        self._stop_checkpointing()
        for site, layer in zip(self.sites, self.layers, strict=True):
            self.put(site, site.layer, instead_of=layer)
        for name in self._guarded:
            vars(self.base_model).pop(name, None)
        for hook in self._hooks:
            hook.remove()
        for encoder in self._packing:
            encoder.use_nested_tensor = True  # type: ignore[assignment]
        for name, parameter in self.base_model.named_parameters():
            parameter.requires_grad_(name in self._required_grad)
        if not keep_trained:
            self._put_back_trained()

    def _stop_checkpointing(self) -> None:
        base: Any = self.base_model
        names = ("activation_checkpointing_disable", "gradient_checkpointing_disable")
        here = [name for name in names if hasattr(base, name)]
        if self._has_checkpointing and here:  # it would go on calling our context_fn
            getattr(base, here[0])()

    def _put_back_trained(self) -> None:
        for name, module in self.trained.items():
            before, now = self._before[name], module.state_dict()
            if all(now[n].shape == tensor.shape for n, tensor in before.items()):
                module.load_state_dict(before)  # otherwise the vocabulary was resized

    @contextmanager
    def bare_output(self) -> Iterator[None]:
        """Take the wrapper off the output embedding, if it has one, inside a `with` block.

        The block may change or replace the embedding; its skills keep adding to the outputs that
        it had before.
        """
        output = output_embedding(self.base_model)
        wrapped = next((layer for layer in self.layers if layer is output), None)
        if wrapped is not None:
            self.put(wrapped.site, wrapped.site.layer)
        try:
            yield
        finally:
            if wrapped is not None:
                wrapped.base_layer = output_embedding(self.base_model)
                # Nowhere else does a site change. All parts of the model share this object.
                object.__setattr__(wrapped.site, "layer", wrapped.base_layer)
                self.put(wrapped.site, wrapped)
            # A resized head or embedding is another module than the one that trained.
            self.trained = {name: self.base_model.get_submodule(name) for name in self.trained}
            self._freeze()

    def _freeze(self) -> None:
        self.base_model.requires_grad_(False)
        for module in self.trained.values():
            module.requires_grad_(True)


def tensors_of(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The parameters and buffers of modules that are given by name, by their full names."""
    return {
        f"{name}.{key}": tensor
        for name, module in modules.items()
        for key, tensor in module.state_dict().items()
    }


def find_modules(
    model: nn.Module, endings: Sequence[str] | None, sites: Sequence[Site]
) -> dict[str, nn.Module]:
    """The whole modules that train beside the skills, by their full names.

    Args:
        model: the base model.
        endings: the endings of the names, as in `MHRConfig.modules_to_save`.
        sites: the adapted layers; none of them may lie inside such a module.

    Raises:
        InputError: an ending matches no module, or matches one that holds an adapted layer.
    """
    found: dict[str, nn.Module] = {}
    adapted = {id(site.layer): site.name for site in sites}
    for ending in endings or ():
        matches = {
            name: module for name, module in model.named_modules() if is_match(name, (ending,))
        }
        if not matches:
            endings_here = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules() if name}
            raise InputError(
                f"modules_to_save names {ending!r}, which matches no module of "
                f"{type(model).__name__}; {did_you_mean(ending, endings_here)}"
            )
        for name, module in matches.items():
            inside = [adapted[id(m)] for m in module.modules() if id(m) in adapted]
            if inside:
                raise InputError(
                    f"modules_to_save names {ending!r}, which holds the adapted layer "
                    f"{inside[0]!r}: leave the layer out with exclude_modules, or the module out "
                    "of modules_to_save"
                )
            if not any(name.startswith(outer + ".") for outer in found):
                found[name] = module
    return found


def check_bare(model: nn.Module) -> None:
    """Make sure that a base model carries no adapter yet.

    Raises:
        InputError: it carries one; the message names the layer and its class.
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
        library = _library_of(module)
        is_layer = hasattr(module, "lora_A") or hasattr(module, "adapter_layer_names")
        if library is not None or is_layer:
            what = f"layer {name!r}" if name else "the base model"
            raise InputError(
                f"{what} is a {type(module).__name__}"
                + (f" of {library}" if library else "")
                + ", an adapter already: merge it into the weights (merge_and_unload) or take it "
                "out (unload) first"
            )


def _library_of(module: nn.Module) -> str | None:
    """The adapter library that the class of a module comes from; None if there is none."""
    packages = (cls.__module__.partition(".")[0] for cls in type(module).__mro__)
    return next((package for package in packages if package in ADAPTER_LIBRARIES), None)


def _do_nothing(*_: Any) -> None:
    """A hook without effect; torch does not fuse a layer that has a hook."""
