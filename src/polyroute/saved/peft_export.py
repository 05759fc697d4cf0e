"""Writing adapters in PEFT's files, such as a task, whose mixture of skills is a plain LoRA."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from polyroute.errors import InputError
from polyroute.host.files import make_folder, write_json, write_tensors
from polyroute.layer.factors import LoRAFactors, PlainFactors
from polyroute.layer.sites import Site, find_endings
from polyroute.layer.wrapping import tensors_of

__all__ = [
    "CONFIG",
    "ROOT",
    "TENSORS",
    "PeftTarget",
    "adapted_sites",
    "peft_target",
    "write_peft_folder",
]

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
ROOT = "base_model.model."
"""The beginning of every key, before the name of the layer in the base model."""


@dataclass(frozen=True)
class PeftTarget:
    """What PEFT's files say about a base model and its adapted layers; see `peft_target`.

    It does not refer to the base model, so an adapted task that keeps one keeps no model alive.
    """

    config: Mapping[str, Any]
    """The entries of `adapter_config.json` that do not depend on the adapter."""
    sites: tuple[str, ...]
    """The names of the adapted layers in the base model."""
    fan_in_fan_out: bool
    """Whether a layer stores its weight `[d_in, d_out]`, as in GPT-2."""
    modules: Mapping[str, Tensor]
    """The tensors of whole modules that trained beside the skills, by their full names."""

    def write(self, folder: str | os.PathLike[str], factors: Sequence[PlainFactors]) -> None:
        """Write one task for PEFT, or for any program that reads its adapters.

        B includes the scale of the update, and `lora_alpha` is the rank, so every program that
        reads the adapter applies the scale exactly once. Sites may have different ranks.

        Args:
            folder: the folder to write to; made if missing.
            factors: the factors of one task, by site.

        Raises:
            InputError: the folder cannot be written.
        """
        ranks = {
            site: len(own.a)
            for site, own in zip(self.sites, factors, strict=True)
            if isinstance(own, LoRAFactors)
        }
        method = _lora_fields(ranks) if ranks else _ia3_fields()
        fields = {**method, "fan_in_fan_out": self.fan_in_fan_out}
        self.write_tensors(folder, fields, {**self.tensors(factors), **self.modules})

    def tensors(self, factors: Sequence[PlainFactors]) -> dict[str, Tensor]:
        """The tensors of factors by the names of their layers and the method's endings.

        Those of several tasks begin with an axis for the tasks.
        """
        return {
            f"{site}.{ending}": tensor
            for site, factor in zip(self.sites, factors, strict=True)
            for ending, tensor in factor.peft_tensors().items()
        }

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


def adapted_sites(
    sites: Sequence[Site], factors: Sequence[PlainFactors]
) -> dict[Site, PlainFactors]:
    """The layers that factors change; a LoRA of a library may lack some of the others' layers."""
    pairs = zip(sites, factors, strict=True)
    return {s: own for s, own in pairs if not (isinstance(own, LoRAFactors) and not len(own.a))}


def peft_target(
    base_model: nn.Module,
    sites: Sequence[Site],
    trained: Mapping[str, nn.Module] | None = None,
) -> PeftTarget:
    """Gather what PEFT's files say about a base model and its adapted layers.

    Args:
        base_model: the base model, which gives its name, its type of task and the shortest list of
            target modules.
        sites: the adapted layers.
        trained: whole modules that trained beside the skills, by name.
    """
    config: dict[str, Any] = {
        "task_type": _task_type(base_model),
        "base_model_name_or_path": _base_name(base_model),
        "target_modules": find_endings(base_model, sites),
        "inference_mode": True,
    }
    if trained:
        _check_untied(base_model, trained)
        config["modules_to_save"] = sorted(trained)
    names = tuple(site.name for site in sites)
    is_transposed = any(site.is_conv1d for site in sites)
    return PeftTarget(config, names, is_transposed, tensors_of(trained or {}))


def _check_untied(base_model: nn.Module, trained: Mapping[str, nn.Module]) -> None:
    """Make sure that no trained weight is also another module's: PEFT would keep two of it.

    Raises:
        InputError: one is.
    """
    inside = {id(module) for one in trained.values() for module in one.modules()}
    owned = {id(p) for one in trained.values() for p in one.parameters()}
    for name, module in base_model.named_modules():
        is_tied = any(id(p) in owned for p in module.parameters(recurse=False))
        if is_tied and id(module) not in inside:
            raise InputError(
                f"{sorted(trained)} cannot be exported to PEFT: a weight that was trained is tied "
                f"to that of {name!r}, and PEFT would untie them; save with save_pretrained instead"
            )


def write_peft_folder(
    folder: str | os.PathLike[str],
    base_model: nn.Module,
    sites: Sequence[Site],
    fields: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    """Write an adapter of any method as PEFT's `save_pretrained` does.

    Args:
        folder: the folder to write to; made if missing.
        base_model: as in `peft_target`.
        sites: the adapted layers.
        fields: the settings of the method, with `peft_type`.
        tensors: tensors by the name of their layer in the base model and the method's ending.

    Raises:
        InputError: the folder cannot be written.
    """
    peft_target(base_model, sites).write_tensors(folder, fields, tensors)


def _lora_fields(ranks: Mapping[str, int]) -> Mapping[str, Any]:
    rank = max(ranks.values())
    # PEFT takes a key for a regular expression that ends a layer's name.
    others = {rf"^{re.escape(site)}": own for site, own in ranks.items() if own != rank}
    patterns = {"rank_pattern": others, "alpha_pattern": others} if others else {}
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        **patterns,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
    }


def _ia3_fields() -> Mapping[str, Any]:
    return {"peft_type": "IA3", "feedforward_modules": []}


def _task_type(base_model: nn.Module) -> str | None:
    """The name that PEFT gives to the base model's type of task; None if it has no such name."""
    config = getattr(base_model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    name = type(base_model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    return None


def _base_name(base_model: nn.Module) -> str | None:
    """The folder or hub id that transformers loaded the base model from; None if it did not."""
    name = getattr(getattr(base_model, "config", None), "_name_or_path", None)
    return str(name) if name else None
