"""Which layers of a base model get skills, and which of them share a router."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from polyroute.config import Granularity, MHRConfig
from polyroute.errors import InputError, did_you_mean

__all__ = [
    "SAMPLED",
    "Site",
    "find_endings",
    "find_sites",
    "fits_sample",
    "fused_layers",
    "named_sites",
    "router_of",
    "routers_of",
    "sample_others",
    "sample_weights",
    "weight_matrix",
]


SAMPLED = 8
"""Values of a weight that are saved to recognise it by."""
COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types of which a weight's numbers are its values; narrower ones (integers, float8) are packed."""


@dataclass(frozen=True)
class Site:
    """One adapted layer of the base model."""

    name: str
    """Full dotted name of the layer in the base model."""
    layer: nn.Module = field(repr=False, compare=False)
    """The base layer itself."""
    d_in: int
    d_out: int
    places: tuple[str, ...] = field(repr=False, compare=False)
    """Every name under which the layer is registered (more than one where modules are shared)."""

    @property
    def is_conv1d(self) -> bool:
        """Whether the weight is stored `[d_in, d_out]`, as in GPT-2."""
        return _is_conv1d(self.layer)

    @property
    def weight(self) -> Tensor | None:
        """Its weight, `[d_out, d_in]`; None where it is quantised, whatever that looks like."""
        weight = getattr(self.layer, "weight", None)
        return weight_matrix(self.layer) if _is_plain(weight) else None

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in: the type of its weight, or of its scales where that is packed."""
        return next(
            (t.dtype for t in _tensors(self.layer) if t.dtype in COMPUTE_DTYPES), torch.float32
        )

    @property
    def device(self) -> torch.device:
        """Where it computes; offloaded weights wait elsewhere, until accelerate's hook fetches."""
        hook = getattr(self.layer, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            if getattr(one, "execution_device", None) is not None:
                return torch.device(one.execution_device)
        tensor = next(_tensors(self.layer), None)
        return torch.device("cpu") if tensor is None else tensor.device

    @property
    def sees_token_subsets(self) -> bool:
        """Whether the layer is an expert that gets some tokens of the batch, in any order."""
        return ".experts." in f".{self.name}."


def weight_matrix(layer: nn.Module) -> Tensor:
    """The layer's weight as `[d_out, d_in]`, a view for layers that store the transpose."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.t() if _is_conv1d(layer) else weight


def _tensors(layer: nn.Module) -> Iterator[Tensor]:
    yield from layer.parameters()
    yield from layer.buffers()


def _is_plain(weight: object) -> bool:
    """Whether a weight's numbers are what the layer multiplies by."""
    # torchao's tensors say that they are float, whatever they hold. Sharded ones are subclasses
    # too; they have a `full_tensor`.
    return (
        isinstance(weight, Tensor)
        and weight.dtype in COMPUTE_DTYPES
        and (type(weight) in (Tensor, nn.Parameter) or hasattr(weight, "full_tensor"))
    )


def _is_conv1d(layer: nn.Module) -> bool:
    # transformers' Conv1D, told by its shape and name so that the core needs torch alone.
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def _widths(layer: nn.Module) -> tuple[int, int] | None:
    """`(d_in, d_out)` of a linear layer, quantised ones included; None for anything else."""
    if _is_conv1d(layer):
        d_in, d_out = weight_matrix(layer).shape[::-1]
        return int(d_in), int(d_out)
    if isinstance(layer, nn.Linear) or (
        hasattr(layer, "in_features")
        and hasattr(layer, "out_features")
        and not isinstance(layer, nn.Bilinear)
    ):
        return int(layer.in_features), int(layer.out_features)  # type: ignore[arg-type]
    return None


def _is_match(name: str, pattern: str | tuple[str, ...]) -> bool:
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == ending or name.endswith("." + ending) for ending in pattern)


def find_sites(model: nn.Module, config: MHRConfig) -> list[Site]:
    """The layers to adapt, in the order of the model's own tree.

    Args:
        model: any tree of torch modules.
        config: its `target_modules`, `exclude_modules` and `num_heads` are read.

    Raises:
        InputError: nothing matches, one of several name endings or an exclusion matches nothing, a
            target is not linear or cannot be adapted, or `num_heads` does not divide a width.
    """
    places, inside_attention = _places(model), _inside_attention(model)
    output = _output_embedding(model)
    target, exclude = config.target_modules, config.exclude_modules
    try:
        targeted = [
            (name, module)
            for name, module in model.named_modules()
            if name
            and (
                _widths(module) is not None
                and module is not output
                and id(module) not in inside_attention
                if target == "all-linear"
                else _is_match(name, target)
            )
        ]
        chosen = [
            (name, module)
            for name, module in targeted
            if exclude is None or not _is_match(name, exclude)
        ]
        _check_exclusions(exclude, [name for name, _ in targeted], model)
    except re.error as error:
        raise InputError(f"a target pattern is not a regular expression: {error}") from error
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
        sites.append(_site(name, module, widths, places, config))
    return sites


def _site(
    name: str,
    module: nn.Module,
    widths: tuple[int, int],
    places: dict[int, tuple[str, ...]],
    config: MHRConfig,
) -> Site:
    if isinstance(getattr(module, "weight", None), nn.UninitializedParameter):
        raise InputError(
            f"layer {name!r} is a {type(module).__name__} without weights yet: run the base model "
            "on one batch first"
        )
    site = Site(name, module, *widths, places=places[id(module)])
    _check_heads(site, config)
    return site


def named_sites(model: nn.Module, names: Sequence[str], config: MHRConfig) -> list[Site]:
    """The sites of exactly these layers, in this order.

    Raises:
        InputError: no names or a repeated one, the model has no such linear layer, or `num_heads`
            does not divide a width.
    """
    if not names or len(set(names)) != len(names):
        raise InputError("sites must name at least one layer, and each layer once")
    modules = dict(model.named_modules(remove_duplicate=False))
    attention = _inside_attention(model)
    places = _places(model)
    sites = []
    for name in names:
        module = modules.get(name)
        widths = _widths(module) if module is not None and id(module) not in attention else None
        if module is None or widths is None:
            raise InputError(f"{type(model).__name__} has no linear layer {name!r} to adapt")
        sites.append(_site(name, module, widths, places, config))
    return sites


def _places(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """Every name of every module, by its identity."""
    places: dict[int, tuple[str, ...]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places[id(module)] = (*places.get(id(module), ()), name)
    return places


def _inside_attention(model: nn.Module) -> set[int]:
    """Modules that torch's fused attention reads past, so that a wrapper there would do nothing."""
    return {
        id(child)
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
        for child in module.modules()
    }


def fused_layers(model: nn.Module, sites: Sequence[Site]) -> list[nn.Module]:
    """Encoder layers and encoders of torch itself, with a site inside.

    In evaluation they may compute in one fused operator, which reads the weights of their linear
    layers and so goes past whatever wraps these.
    """
    layers = {id(site.layer) for site in sites}
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder)
        and any(id(child) in layers for child in module.modules())
    ]


def find_endings(model: nn.Module, sites: Sequence[Site]) -> list[str]:
    """The shortest target list that selects exactly these sites: name endings, or full names."""
    names = {site.name for site in sites}
    endings = sorted({name.rsplit(".", 1)[-1] for name in names})
    originals = {site.name: site.layer for site in sites}
    selected = {
        name
        for name, module in model.named_modules()
        if name
        and (name in originals or _widths(module) is not None)
        and _is_match(name, tuple(endings))
    }
    return endings if selected == names else sorted(names)


def _output_embedding(model: nn.Module) -> object:
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None


def _check_all_matched(
    target: str | tuple[str, ...], chosen: Sequence[str], model: nn.Module
) -> None:
    linear = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if n and _widths(m)}
    if not isinstance(target, str):
        for ending in target:
            if not any(_is_match(name, (ending,)) for name in chosen):
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
        if not any(_is_match(name, pattern) for name in known):
            shown = pattern if isinstance(pattern, str) else pattern[0]
            endings = {name.rsplit(".", 1)[-1] for name in linear}
            raise InputError(
                f"excluded module {shown!r} matches no layer of {type(model).__name__}; "
                f"{did_you_mean(shown, endings)}"
            )


def _check_heads(site: Site, config: MHRConfig) -> None:
    widths = [("output", site.d_out)]
    if config.adapter == "lora":
        widths.insert(0, ("input", site.d_in))
    for side, width in widths:
        if width % config.heads:
            raise InputError(
                f"num_heads={config.heads} does not divide the {side} width {width} of layer "
                f"{site.name!r}; choose a divisor, or leave the layer out with exclude_modules"
            )


def routers_of(
    names: Sequence[str], granularity: Granularity | Callable[[str], str]
) -> tuple[list[str], list[int]]:
    """Group layers by router.

    Args:
        names: full layer names.
        granularity: a named rule (see `router_of`) or a function from layer name to router name.

    Returns:
        The router names in order of first use, and for every layer the index of its router.

    Raises:
        InputError: the rule does not apply to a layer name.
    """
    keys = [
        granularity(name) if callable(granularity) else router_of(name, granularity)
        for name in names
    ]
    routers = list(dict.fromkeys(keys))
    index = {key: i for i, key in enumerate(routers)}
    return routers, [index[key] for key in keys]


def router_of(name: str, granularity: Granularity) -> str:
    """The router of a layer under one of the named rules.

    - `finegrained`: each layer has its own.
    - `blockwise`: layers of one transformer block share one. The block is the name up to its first
      number (`encoder.block.0`, `model.layers.12`, `transformer.h.3`).
    - `layerwise`: layers of one part of a block share one: the block and the next name component,
      with its number where it has one (`encoder.block.0.layer.1`, `model.layers.12.self_attn`).
    - `coderwise`: the encoder has one and the decoder has one.
    - `coarsegrained`: one for the whole model.

    Raises:
        InputError: the name has no block or no coder in it.
    """
    if granularity == "finegrained":
        return name
    if granularity == "coarsegrained":
        return "model"
    parts = name.split(".")
    if granularity == "coderwise":
        for part in parts:
            if part in ("encoder", "decoder"):
                return part
        raise InputError(
            f"granularity='coderwise' needs an encoder or decoder in the name of layer {name!r}; "
            "use 'coarsegrained', or give a function"
        )
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if number is None:
        raise InputError(
            f"granularity={granularity!r} needs a numbered block in the name of layer {name!r}; "
            "leave the layer out with exclude_modules, or give a function"
        )
    end = number + 1
    if granularity == "layerwise":
        end += 1
        if end < len(parts) and parts[end].isdigit():
            end += 1
    return ".".join(parts[:end])


def sample_weights(site: Site) -> list[float] | None:
    """A few weights of the base layer, by which it is recognised; None where there are none."""
    return _sample(site.weight)


def sample_others(model: nn.Module, sites: Sequence[Site]) -> list[dict[str, Any]]:
    """A few values of the first, a middle and the last parameter that no site holds.

    They tell whether the rest of the base model, such as its embedding, is the one it was.
    """
    adapted = {id(p) for site in sites for p in site.layer.parameters()}
    others = [(n, p) for n, p in model.named_parameters() if id(p) not in adapted]
    chosen = sorted({0, len(others) // 2, len(others) - 1}) if others else []
    return [
        {"name": others[i][0], "dtype": str(others[i][1].dtype), "values": _sample(others[i][1])}
        for i in chosen
    ]


def _sample(weight: Tensor | None) -> list[float] | None:
    if weight is None or not _is_plain(weight) or weight.is_meta or not weight.numel():
        return None
    if hasattr(weight, "full_tensor"):  # sharded: all processes come by here
        weight = weight.full_tensor()
    flat = weight.detach().flatten()
    # Always on the CPU, since devices round differently; clamped, since linspace counts in fp32,
    # which rounds up the last place of a large matrix.
    places = torch.linspace(0, len(flat) - 1, SAMPLED, device="cpu", dtype=torch.float32)
    index = places.long().clamp_(max=len(flat) - 1).to(flat.device)
    return [round(v, 6) for v in flat[index].float().tolist()]


def fits_sample(weight: Tensor | None, sample: Sequence[float] | None, dtype: str | None) -> bool:
    """Whether a weight of the base model is the one that the sample was taken from.

    Args:
        weight: as it is here, `[d_out, d_in]` where it is a layer's; None, and a quantised or
            offloaded one, fits everything, as nothing can be compared.
        sample: what was saved; None, where nothing was, fits everything.
        dtype: the type that it had there; None where that is not known. Where it is another than
            here, the coarser of both may have rounded each value.
    """
    here = _sample(weight)
    if weight is None or sample is None or here is None:
        return True
    there = torch.tensor(sample)
    eps = {str(known): torch.finfo(known).eps for known in COMPUTE_DTYPES}
    coarser = max(torch.finfo(weight.dtype).eps, eps.get(str(dtype), eps["torch.bfloat16"]))
    tolerance = 1e-4 if dtype == str(weight.dtype) else max(1e-4, 2 * coarser)
    gap = (there - torch.tensor(here)).abs().max()
    return bool(gap <= tolerance * there.abs().max() + 1e-6)
