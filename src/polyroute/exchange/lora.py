"""Ordinary LoRA folders of PEFT, read as an inventory of one skill.

    base_model.model.<layer>.lora_A.weight    [r, d_in]
    base_model.model.<layer>.lora_B.weight    [d_out, r]

`polyroute.saved.peft_export` writes such folders. The scale is folded into B: `lora_alpha / r`, or
what rsLoRA and the patterns for single layers make of it. Layers of a smaller rank are padded with
zeros. Layers that store their weight transposed (GPT-2) have the same two matrices.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad

from polyroute.config import MHRConfig
from polyroute.errors import InputError
from polyroute.exchange.foreign import ForeignInventory, routed_model
from polyroute.exchange.peft_folder import check_whole, names_now, read_peft_folder
from polyroute.host.patterns import matches
from polyroute.layer.factors import LoRAFactors
from polyroute.model import RoutedModel
from polyroute.saved.peft_export import ROOT

__all__ = ["factors_of", "from_lora"]

KEY = re.compile(
    rf"{re.escape(ROOT)}(?P<layer>.+)\.lora_(?P<part>A|B)(?:\.(?P<adapter>[^.]+))?\.weight"
)
CHANGED_BASE = ("modules_to_save", "trainable_token_indices", "lora_bias")
"""Settings of adapters that also hold weights of the base model or biases."""
OTHER_FUNCTION = (
    "use_dora", "alora_invocation_tokens", "layer_replication", "use_qalora", "use_bdlora",
    "arrow_config", "kasa_config", "monteclora_config", "target_parameters", "megatron_config",
)  # fmt: skip
"""Settings with which an adapter does not compute base(x) + scale B A x."""
CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that also change the weights of the base model."""


def from_lora(
    base_model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    tasks: Sequence[str] | None = None,
    allow_pickle: bool = False,
) -> RoutedModel:
    """Attach a LoRA that PEFT or `RoutedModel.export_peft` wrote, as a shared adapter.

    Its rank is the largest of all layers. The padding of layers with a smaller rank stays zero in
    training.

    Args:
        base_model: the model that the LoRA was trained on.
        folder: a folder with `adapter_config.json` and `adapter_model.safetensors`.
        tasks: the names of the tasks that use it; by default the name of the folder.
        allow_pickle: read `adapter_model.bin` if there are no safetensors.

    Raises:
        InputError: the folder holds no LoRA, or the LoRA computes more than a low-rank update
            (DoRA, biases, trained weights of the base model), is not whole, or does not fit the
            base model.
    """
    path, source = Path(folder), os.fspath(folder)
    fields, tensors = read_peft_folder(base_model, path, "LORA", allow_pickle=allow_pickle)
    layers = factors_of(fields, tensors, source)
    rank = max(len(own.a) for own in layers.values())
    names = names_now(base_model, layers)
    skills: dict[str, Tensor] = {}
    for name, own in layers.items():
        lacking = rank - len(own.a)
        skills[f"{names[name]}.lora_a"] = pad(own.a.t(), (0, lacking))[None, None]
        skills[f"{names[name]}.lora_b"] = pad(own.b, (0, 0, 0, lacking))[None, None]
    dropout = fields.get("lora_dropout") or 0.0
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise InputError(f"{source}: lora_dropout={dropout!r} is not from 0 to below 1")
    config = MHRConfig(method="shared", rank=rank, dropout=dropout)
    found = ForeignInventory(source, config, skills, {})
    check_whole(base_model, found, fields)
    return routed_model(base_model, found, [path.resolve().name] if tasks is None else tasks)


@dataclass(frozen=True)
class StoredFactors(Mapping[str, LoRAFactors]):
    """The factors of each layer, which are scaled when they are asked for.

    Tensors of a safetensors file are mapped, so a layer takes memory only while it is used.
    """

    parts: Mapping[str, Mapping[str, Tensor]]
    """By layer, `A` `[r, d_in]` and `B` `[d_out, r]`."""
    scales: Mapping[str, float]
    """By layer, what B is multiplied by."""

    def __getitem__(self, layer: str) -> LoRAFactors:
        parts = self.parts[layer]
        return LoRAFactors(parts["A"].float(), (parts["B"].float() * self.scales[layer]).t())

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


def factors_of(fields: Mapping[str, Any], tensors: Mapping[str, Any], source: str) -> StoredFactors:
    """The factors of each layer in fp32, with its own rank, and its scale in B.

    Args:
        fields: `adapter_config.json`.
        tensors: what `adapter_model.safetensors` holds.
        source: the folder, for error messages.

    Raises:
        InputError: the LoRA computes more than a low-rank update, or is not whole.
    """
    _check_plain(fields, source)
    layers = _layers(tensors, source)
    scales = {
        layer: _scale(layer, fields, _checked_rank(layer, parts, fields, source), source)
        for layer, parts in layers.items()
    }
    return StoredFactors(layers, scales)


def _layers(tensors: Mapping[str, Any], source: str) -> dict[str, dict[str, Tensor]]:
    """The two matrices of each layer; an adapter's name in the keys, as in memory, is left out."""
    layers: dict[str, dict[str, Tensor]] = {}
    adapters: set[str] = set()
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None or not isinstance(tensor, Tensor) or tensor.dim() != 2:
            raise InputError(
                f"{source} holds {key!r}, which is no part of a LoRA of linear layers; embeddings "
                "and trained weights of the base model cannot be imported"
            )
        adapters.add(match["adapter"] or "")
        layers.setdefault(match["layer"], {})[match["part"]] = tensor
    if not layers:
        raise InputError(f"{source} holds no adapter: no key of it ends in .lora_A.weight")
    if len(adapters) > 1:
        raise InputError(
            f"{source} holds several adapters ({', '.join(sorted(adapters - {''}))}): save each in "
            "a folder of its own"
        )
    return layers


def _check_plain(fields: Mapping[str, Any], source: str) -> None:
    for name in ("use_rslora", "fan_in_fan_out"):
        if not isinstance(fields.get(name), bool | None):
            raise InputError(f"{source} is damaged: its {name} is not true or false")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(fields.get(name), Mapping | None):
            raise InputError(f"{source} is damaged: its {name} does not name layers")
    init = fields.get("init_lora_weights")
    refused = [name for name in (*CHANGED_BASE, *OTHER_FUNCTION) if fields.get(name)]
    if fields.get("bias", "none") != "none":
        refused.append("bias")
    if isinstance(init, str) and init.lower().startswith(CHANGING_INITS):
        refused.append("init_lora_weights")
    if refused:
        name = refused[0]
        raise InputError(
            f"{source} is no plain LoRA: its {name} is {fields[name]!r}; fold it into the base "
            "model with PEFT's merge_and_unload() instead"
        )


def _of_layer(patterns: Mapping[str, Any] | None, layer: str, default: Any, source: str) -> Any:
    """A layer's entry of `rank_pattern` or `alpha_pattern`: the first that matches its ending."""
    for pattern, value in (patterns or {}).items():
        try:
            if matches(rf"(.*\.)?({pattern})", layer):
                return value
        except InputError as error:
            raise InputError(
                f"{source} is damaged: the pattern {pattern!r} is no regular expression of a "
                f"layer ({error})"
            ) from error
    return default


def _checked_rank(
    layer: str, parts: Mapping[str, Tensor], fields: Mapping[str, Any], source: str
) -> int:
    if parts.keys() != {"A", "B"}:
        lacking = "lora_A" if "B" in parts else "lora_B"
        raise InputError(f"{source} lacks {lacking} of layer {layer!r}; it is not whole")
    rank = _of_layer(fields.get("rank_pattern"), layer, fields.get("r"), source)
    shapes = parts["A"].shape[0], parts["B"].shape[1]
    if type(rank) is not int or shapes != (rank, rank) or not all(shapes):
        raise InputError(
            f"{source} is damaged: layer {layer!r} should have rank {rank!r}, and its matrices "
            f"have {shapes[0]} and {shapes[1]}"
        )
    if not parts["A"].shape[1] or not parts["B"].shape[0]:
        raise InputError(f"{source} is damaged: layer {layer!r} has a width of 0")
    return int(rank)


def _scale(layer: str, fields: Mapping[str, Any], rank: int, source: str) -> float:
    alpha = _of_layer(fields.get("alpha_pattern"), layer, fields.get("lora_alpha"), source)
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise InputError(f"{source}: lora_alpha={alpha!r} is not a number")
    return float(alpha / math.sqrt(rank) if fields.get("use_rslora") else alpha / rank)
