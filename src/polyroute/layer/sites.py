"""Sites: the layers of a base model that get skills."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from polyroute.config import MHRConfig
from polyroute.errors import InputError, did_you_mean
from polyroute.host.patterns import matches
from polyroute.layer.media import media_modules

__all__ = [
    "COMPUTE_DTYPES",
    "Site",
    "find_endings",
    "find_sites",
    "fused_layers",
    "is_match",
    "is_plain",
    "named_sites",
    "output_embedding",
    "weight_matrix",
]

COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types whose numbers are the weight's own values; narrower ones (integers, float8) are packed."""


@dataclass(frozen=True)
class Site:
    """One adapted layer of the base model."""

    name: str
    """The full dotted name of the layer in the base model."""
    layer: nn.Module = field(repr=False, compare=False)
    """The base layer itself."""
    d_in: int
    d_out: int
    """The number of outputs that skills add to: all, unless the layer was enlarged afterwards."""
    places: tuple[str, ...] = field(repr=False, compare=False)
    """Every name under which the layer is registered; shared modules have more than one."""
    sees_media: bool = False
    """Whether the layer sees the images or sounds of the batch, not the tokens of its examples."""

    @property
    def out_features(self) -> int:
        """The present width of the layer's output."""
        widths = _widths(self.layer)
        assert widths is not None
        return widths[1]

    @property
    def is_conv1d(self) -> bool:
        """Whether the weight is stored `[d_in, d_out]`, as in GPT-2."""
        return _is_conv1d(self.layer)

    @property
    def weight(self) -> Tensor | None:
        """The weight, `[d_out, d_in]`; None if it is quantised in any way."""
        weight = getattr(self.layer, "weight", None)
        return weight_matrix(self.layer) if is_plain(weight) else None

    @property
    def dtype(self) -> torch.dtype:
        """The type that the layer computes in: that of its weight, or of a packed weight's scales.

        fp32 if it has neither.
        """
        return next(
            (t.dtype for t in _tensors(self.layer) if t.dtype in COMPUTE_DTYPES), torch.float32
        )

    @property
    def device(self) -> torch.device:
        """The device that the layer computes on.

        An offloaded weight waits on another device until a hook of accelerate fetches it.
        """
        outer = getattr(self.layer, "_hf_hook", None)
        for hook in getattr(outer, "hooks", [outer]):
            if getattr(hook, "execution_device", None) is not None:
                return torch.device(hook.execution_device)
        tensor = next(_tensors(self.layer), None)
        return torch.device("cpu") if tensor is None else tensor.device

    @property
    def sees_token_subsets(self) -> bool:
        """Whether the layer is an expert that gets only some tokens of the batch, in any order."""
        return ".experts." in f".{self.name}."


def weight_matrix(layer: nn.Module) -> Tensor:
    """The layer's weight as `[d_out, d_in]`; a view if the layer stores the transpose."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.t() if _is_conv1d(layer) else weight


def _tensors(layer: nn.Module) -> Iterator[Tensor]:
    yield from layer.parameters()
    yield from layer.buffers()


def is_plain(weight: object) -> bool:
    """Whether the numbers of a weight are those that the layer multiplies by."""
    # The quantised tensors of torchao claim a float dtype, so other subclasses of Tensor are
    # refused. Sharded tensors are subclasses too; they have a `full_tensor`.
    return (
        isinstance(weight, Tensor)
        and weight.dtype in COMPUTE_DTYPES
        and (type(weight) in (Tensor, nn.Parameter) or hasattr(weight, "full_tensor"))
    )


def _is_conv1d(layer: nn.Module) -> bool:
    # The Conv1D of transformers, recognised by its name so that the core needs torch alone.
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def _widths(layer: nn.Module) -> tuple[int, int] | None:
    """`(d_in, d_out)` of a linear layer, quantised ones included; None for anything else."""
    if isinstance(layer, nn.Linear):  # first, because every forward asks for it
        return layer.in_features, layer.out_features
    if _is_conv1d(layer):
        d_in, d_out = weight_matrix(layer).shape[::-1]
        return int(d_in), int(d_out)
    if (
        hasattr(layer, "in_features")
        and hasattr(layer, "out_features")
        and not isinstance(layer, nn.Bilinear)
    ):
        return int(layer.in_features), int(layer.out_features)  # type: ignore[arg-type]
    return None


def is_match(name: str, pattern: str | tuple[str, ...]) -> bool:
    """Whether a name matches a regular expression whole, or has one of several endings."""
    if isinstance(pattern, str):
        return matches(pattern, name)
    return any(name == ending or name.endswith("." + ending) for ending in pattern)


def find_sites(model: nn.Module, config: MHRConfig) -> list[Site]:
    """The layers to adapt, in the order of the model's own tree.

    Args:
        model: any tree of torch modules.
        config: its `target_modules`, `exclude_modules` and `num_heads` are read.

    Raises:
        InputError: a target or an exclusion matches no layer, a target is not linear or cannot be
            adapted, or `num_heads` does not divide a width.
    """
    places, inside_attention = _places(model), _inside_attention(model)
    output, sees_media = output_embedding(model), media_modules(model)
    target, exclude = config.target_modules, config.exclude_modules
    try:
        targeted = [
            (name, module)
            for name, module in model.named_modules()
            if name
            and (
                _widths(module) is not None
                and module is not output
                and id(module) not in inside_attention | sees_media
                if target == "all-linear"
                else is_match(name, target)
            )
        ]
        chosen = [
            (name, module)
            for name, module in targeted
            if exclude is None or not is_match(name, exclude)
        ]
        _check_exclusions(exclude, [name for name, _ in targeted], model)
    except InputError as error:
        raise InputError(f"target_modules or exclude_modules cannot be used: {error}") from error
    _check_all_matched(target, [name for name, _ in chosen], model)
    sites = []
    for name, module in chosen:
        widths = _widths(module)
        if widths is None or id(module) in inside_attention:
            raise InputError(
                f"layer {name!r} is a {type(module).__name__}"
                + (" inside nn.MultiheadAttention" if widths else "")
                + ", which cannot be adapted; name linear layers in target_modules"
            )
        site = Site(name, module, *widths, places[id(module)], id(module) in sees_media)
        _check_site(site, config)
        sites.append(site)
    return sites


def _check_site(site: Site, config: MHRConfig) -> None:
    """Make sure that a layer has weights, and that the heads divide its widths."""
    if isinstance(getattr(site.layer, "weight", None), nn.UninitializedParameter):
        raise InputError(
            f"layer {site.name!r} is a {type(site.layer).__name__} without weights yet: run the "
            "base model on one batch first"
        )
    widths = [("output", site.d_out)]
    if config.adapter == "lora":
        widths.insert(0, ("input", site.d_in))
    for side, width in widths:
        if width % config.heads:
            raise InputError(
                f"num_heads={config.heads} does not divide the {side} width {width} of layer "
                f"{site.name!r}; choose a divisor, or leave the layer out with exclude_modules"
            )


def named_sites(
    model: nn.Module,
    names: Sequence[str],
    config: MHRConfig,
    adapted: Mapping[str, int] | None = None,
) -> list[Site]:
    """The sites of exactly these layers, in this order.

    Args:
        model: any tree of torch modules.
        names: full names of layers.
        config: its `num_heads` is read.
        adapted: the number of adapted outputs of each layer that was resized after it was adapted.

    Raises:
        InputError: there are no names or a name is repeated, the model has no such linear layer,
            or `num_heads` does not divide a width.
    """
    if not names or len(set(names)) != len(names):
        raise InputError("sites must name at least one layer, and each layer once")
    modules = dict(model.named_modules(remove_duplicate=False))
    inside_attention, sees_media = _inside_attention(model), media_modules(model)
    places = _places(model)
    sites = []
    for name in names:
        module = modules.get(name)
        widths = None if module is None else _widths(module)
        if module is None or widths is None or id(module) in inside_attention:
            raise InputError(f"{type(model).__name__} has no linear layer {name!r} to adapt")
        d_out = (adapted or {}).get(name, widths[1])
        site = Site(name, module, widths[0], d_out, places[id(module)], id(module) in sees_media)
        _check_site(site, config)
        sites.append(site)
    return sites


def _places(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """Every name of every module, by its identity."""
    places: dict[int, tuple[str, ...]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places[id(module)] = (*places.get(id(module), ()), name)
    return places


def _inside_attention(model: nn.Module) -> set[int]:
    """The identities of modules whose weights fused attention reads, passing over any wrapper."""
    return {
        id(child)
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
        for child in module.modules()
    }


def fused_layers(model: nn.Module, sites: Sequence[Site]) -> list[nn.Module]:
    """The encoders and encoder layers of torch itself that have a site inside.

    In evaluation they may compute with one fused operator, which reads the weights of their linear
    layers directly and so passes over the wrappers.
    """
    layers = {id(site.layer) for site in sites}
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder)
        and any(id(child) in layers for child in module.modules())
    ]


def find_endings(model: nn.Module, sites: Sequence[Site]) -> list[str]:
    """The shortest list of targets that selects exactly these sites: name endings or full names."""
    names = {site.name for site in sites}
    endings = sorted({name.rsplit(".", 1)[-1] for name in names})
    originals = {site.name: site.layer for site in sites}
    selected = {
        name
        for name, module in model.named_modules()
        if name
        and (name in originals or _widths(module) is not None)
        and is_match(name, tuple(endings))
    }
    return endings if selected == names else sorted(names)


def output_embedding(model: nn.Module) -> Any:
    """The output embedding of a transformers model; None if the model has none."""
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None


def _check_all_matched(
    target: str | tuple[str, ...], chosen: Sequence[str], model: nn.Module
) -> None:
    linear = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if n and _widths(m)}
    if not isinstance(target, str):
        for ending in target:
            if not any(is_match(name, (ending,)) for name in chosen):
                raise InputError(
                    f"target module {ending!r} matches no layer of {type(model).__name__}; "
                    f"{did_you_mean(ending, linear)}"
                )
    if not chosen:
        raise InputError(
            f"target_modules={target!r} matches no layer of {type(model).__name__}; "
            f"linear layers there end in {', '.join(map(repr, sorted(linear))) or 'nothing'}"
        )


def _check_exclusions(
    exclude: str | tuple[str, ...] | None, targeted: Sequence[str], model: nn.Module
) -> None:
    if exclude is None:
        return
    linear = [n for n, m in model.named_modules() if n and _widths(m)]
    known = {*linear, *targeted}
    for pattern in [exclude] if isinstance(exclude, str) else [(ending,) for ending in exclude]:
        if not any(is_match(name, pattern) for name in known):
            shown = pattern if isinstance(pattern, str) else pattern[0]
            endings = {name.rsplit(".", 1)[-1] for name in linear}
            raise InputError(
                f"excluded module {shown!r} matches no layer of {type(model).__name__}; "
                f"{did_you_mean(shown, endings)}"
            )
