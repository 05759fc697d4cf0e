"""A task as an ordinary PEFT adapter: what a mixture of skills computes is one plain LoRA."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from polyroute.factors import Factors, LoRAFactors
from polyroute.files import make_folder, write_json, write_tensors
from polyroute.targets import Site, find_endings

__all__ = ["base_name", "task_type", "write_peft_adapter"]


def write_peft_adapter(
    folder: str | os.PathLike[str],
    base_model: nn.Module,
    sites: Sequence[Site],
    factors: Sequence[Factors],
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`.

    The update's scale is folded into B and `lora_alpha` set to the rank, so that every loader,
    whatever it makes of alpha, applies it once.

    Args:
        folder: where to; made if missing.
        base_model: for its name, its kind and to find the shortest list of target modules.
        sites: the adapted layers.
        factors: of one task, by site.
    """
    path = make_folder(folder)
    tensors: dict[str, Tensor] = {}
    for site, factor in zip(sites, factors, strict=True):
        for ending, tensor in factor.peft_tensors().items():
            tensors[f"base_model.model.{site.name}.{ending}"] = tensor
    first = factors[0]
    kind = _lora_fields(first.a.shape[0]) if isinstance(first, LoRAFactors) else _ia3_fields()
    config: dict[str, Any] = {
        **kind,
        "task_type": task_type(base_model),
        "base_model_name_or_path": base_name(base_model),
        "target_modules": find_endings(base_model, sites),
        "fan_in_fan_out": any(site.is_conv1d for site in sites),
        "inference_mode": True,
    }
    write_tensors(path / "adapter_model.safetensors", tensors)
    write_json(path / "adapter_config.json", config)


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


def task_type(base_model: nn.Module) -> str | None:
    """What PEFT calls the kind of the base model; None where it has no name for it."""
    config = getattr(base_model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    name = type(base_model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    return None


def base_name(base_model: nn.Module) -> str | None:
    """Where transformers loaded the base model from; None if it did not."""
    name = getattr(getattr(base_model, "config", None), "_name_or_path", None)
    return str(name) if name else None
