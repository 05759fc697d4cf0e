"""Adapters in PEFT's files; a task as one: what a mixture of skills computes is a plain LoRA."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from polyroute.host.files import make_folder, write_json, write_tensors
from polyroute.layer.factors import LoRAFactors, PlainFactors
from polyroute.layer.sites import Site, find_endings

__all__ = ["CONFIG", "ROOT", "TENSORS", "write_peft_adapter", "write_peft_folder"]

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
ROOT = "base_model.model."
"""What every key begins with, before the name of the layer in the base model."""


def write_peft_adapter(
    folder: str | os.PathLike[str],
    base_model: nn.Module,
    sites: Sequence[Site],
    factors: Sequence[PlainFactors],
    trained: Mapping[str, nn.Module] | None = None,
) -> None:
    """Write one task for PEFT, or whatever else reads its adapters.

    The update's scale is folded into B and `lora_alpha` set to the rank, so that every loader,
    whatever it makes of alpha, applies it once.

    Args:
        folder: where to; made if missing.
        base_model: as for `write_peft_folder`.
        sites: the adapted layers.
        factors: of one task, by site.
        trained: whole modules that were trained beside the skills, by name.
    """
    first = factors[0]
    method = _lora_fields(first.a.shape[0]) if isinstance(first, LoRAFactors) else _ia3_fields()
    fields = {**method, "fan_in_fan_out": any(site.is_conv1d for site in sites)}
    tensors = {
        f"{site.name}.{ending}": tensor
        for site, factor in zip(sites, factors, strict=True)
        for ending, tensor in factor.peft_tensors().items()
    }
    for name, module in (trained or {}).items():
        tensors |= {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}
    if trained:
        fields["modules_to_save"] = sorted(trained)
    write_peft_folder(folder, base_model, sites, fields, tensors)


def write_peft_folder(
    folder: str | os.PathLike[str],
    base_model: nn.Module,
    sites: Sequence[Site],
    fields: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    """Write an adapter as PEFT's `save_pretrained` does, whatever its method.

    Args:
        folder: where to; made if missing.
        base_model: for its name and family, and to find the shortest list of target modules.
        sites: the adapted layers.
        fields: settings of the method, `peft_type` among them.
        tensors: by the name of the layer in the base model and the ending of the method.
    """
    path = make_folder(folder)
    config = {
        **fields,
        "task_type": _task_type(base_model),
        "base_model_name_or_path": _base_name(base_model),
        "target_modules": find_endings(base_model, sites),
        "inference_mode": True,
    }
    write_tensors(path / TENSORS, {ROOT + name: tensor for name, tensor in tensors.items()})
    write_json(path / CONFIG, config)


def _lora_fields(rank: int) -> Mapping[str, Any]:
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
    }


def _ia3_fields() -> Mapping[str, Any]:
    return {"peft_type": "IA3", "feedforward_modules": []}


def _task_type(base_model: nn.Module) -> str | None:
    """What PEFT calls the kind of the base model; None where it has no name for it."""
    config = getattr(base_model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    name = type(base_model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    return None


def _base_name(base_model: nn.Module) -> str | None:
    """Where transformers loaded the base model from; None if it did not."""
    name = getattr(getattr(base_model, "config", None), "_name_or_path", None)
    return str(name) if name else None
