"""Adapters in PEFT's files; a task as one: what a mixture of skills computes is a plain LoRA."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from polyroute.host.files import make_folder, write_json, write_tensors
from polyroute.layer.factors import LoRAFactors, PlainFactors
from polyroute.layer.sites import Site, find_endings

__all__ = [
    "CONFIG",
    "ROOT",
    "TENSORS",
    "PeftTarget",
    "peft_target",
    "write_peft_folder",
]

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
ROOT = "base_model.model."
"""What every key begins with, before the name of the layer in the base model."""


@dataclass(frozen=True)
class PeftTarget:
    """What PEFT's files say of a base model and its adapted layers; made by `peft_target`.

    It holds names alone, so a result that keeps one keeps no model alive.
    """

    config: Mapping[str, Any]
    """The entries of `adapter_config.json` that do not depend on the adapter."""
    sites: tuple[str, ...]
    """Names of the adapted layers in the base model."""
    fan_in_fan_out: bool
    """Whether a layer stores its weight `[d_in, d_out]`, as in GPT-2."""
    modules: Mapping[str, Tensor]
    """Tensors of whole modules that were trained beside the skills, by their full names."""

    def write(self, folder: str | os.PathLike[str], factors: Sequence[PlainFactors]) -> None:
        """Write one task for PEFT, or whatever else reads its adapters.

        The update's scale is folded into B and `lora_alpha` set to the rank, so that every loader,
        whatever it makes of alpha, applies it once.

        Args:
            folder: where to; made if missing.
            factors: of one task, by site.

        Raises:
            InputError: the folder cannot be written.
        """
        first = factors[0]
        method = _lora_fields(first.a.shape[0]) if isinstance(first, LoRAFactors) else _ia3_fields()
        tensors = {
            f"{site}.{ending}": tensor
            for site, factor in zip(self.sites, factors, strict=True)
            for ending, tensor in factor.peft_tensors().items()
        }
        tensors.update(self.modules)
        self.write_tensors(folder, {**method, "fan_in_fan_out": self.fan_in_fan_out}, tensors)

    def write_tensors(
        self,
        folder: str | os.PathLike[str],
        fields: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
    ) -> None:
        """Write an adapter of any method; see `write_peft_folder`."""
        path = make_folder(folder)
        write_tensors(path / TENSORS, {ROOT + name: tensor for name, tensor in tensors.items()})
        write_json(path / CONFIG, {**fields, **self.config})


def peft_target(
    base_model: nn.Module,
    sites: Sequence[Site],
    trained: Mapping[str, nn.Module] | None = None,
) -> PeftTarget:
    """What PEFT's files say of a base model and its adapted layers.

    Args:
        base_model: for its name and family, and to find the shortest list of target modules.
        sites: the adapted layers.
        trained: whole modules that were trained beside the skills, by name.
    """
    config: dict[str, Any] = {
        "task_type": _task_type(base_model),
        "base_model_name_or_path": _base_name(base_model),
        "target_modules": find_endings(base_model, sites),
        "inference_mode": True,
    }
    if trained:
        config["modules_to_save"] = sorted(trained)
    modules = {
        f"{name}.{key}": tensor
        for name, module in (trained or {}).items()
        for key, tensor in module.state_dict().items()
    }
    names = tuple(site.name for site in sites)
    return PeftTarget(config, names, any(site.is_conv1d for site in sites), modules)


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
        base_model: as for `peft_target`.
        sites: the adapted layers.
        fields: settings of the method, `peft_type` among them.
        tensors: by the name of the layer in the base model and the ending of the method.
    """
    peft_target(base_model, sites).write_tensors(folder, fields, tensors)


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
