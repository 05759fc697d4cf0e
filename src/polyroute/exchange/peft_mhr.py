"""Adapters of `polyroute.peft`, the method MHR of PEFT, written and read without PEFT.

A folder with `adapter_config.json` and `adapter_model.safetensors`:

    base_model.model.<layer>.mhr_adapters.skills.lora_a.<d_in>x<d_out>    [1, H, K, r, d_in/H]
    base_model.model.<layer>.mhr_adapters.skills.lora_b.<d_in>x<d_out>    [1, H, K, r, d_out/H]
    base_model.model.<layer>.mhr_adapters.routes.logits                   [T, H * K]

with `ia3` `[1, H, K, 1, d_out/H]` in place of both for (IA)^3. Every layer has its own router.
"""

import os
import re
from collections.abc import Sequence

from torch import Tensor, nn

from polyroute.config import LAYER_SETTINGS, MHRConfig
from polyroute.errors import InputError
from polyroute.exchange.foreign import ForeignInventory, check_plain, routed_model
from polyroute.exchange.peft_folder import check_whole, read_peft_folder
from polyroute.model import RoutedModel
from polyroute.saved.peft_export import CONFIG, ROOT, write_peft_folder

__all__ = ["ADAPTERS", "from_peft_mhr", "write_peft_mhr"]

ADAPTERS = "mhr_adapters"
KEY = re.compile(
    rf"{re.escape(ROOT)}(?P<layer>.+)\.{ADAPTERS}\."
    r"(?:skills\.(?P<factor>lora_a|lora_b|ia3)\.\d+x\d+|routes\.logits)"
)


def write_peft_mhr(model: RoutedModel, folder: str | os.PathLike[str]) -> None:
    """Write all skills and rows as an adapter for `PeftModel.from_pretrained`.

    A program that loads the adapter has to import `polyroute.peft` first.

    Args:
        model: a model with one router for each layer.
        folder: the folder to write to; made if missing.

    Raises:
        InputError: layers share routers, the rows were dropped or moved toward the average, the
            model is merged, or the folder cannot be written.
    """
    check_plain(model, "PEFT's MHR")
    config, logits = model.adapter_config, model.routes.logits
    for holds, reason in (
        (
            not model.rule.has_table or len(model.routers) == len(model.sites),
            "layers of this inventory share routers, and in PEFT every layer has its own",
        ),
        (
            not model.rule.has_table or logits is not None,
            "its routing logits were dropped by phase 'mu-uncollapsed'; use phase 'mu' instead",
        ),
        (
            not model.mixer.anneal_progress,
            "its routing was moved toward the average by anneal_steps",
        ),
    ):
        if not holds:
            raise InputError(f"no MHR adapter of PEFT can be written: {reason}")
    tensors: dict[str, Tensor] = {}
    for i, site in enumerate(model.sites):
        prefix = f"{site.name}.{ADAPTERS}."
        for factor, skills in model.inventory.site_tensors(i).items():
            stacked = (skills.mT if factor == "lora_a" else skills).unsqueeze(0)
            tensors[f"{prefix}skills.{factor}.{site.d_in}x{site.d_out}"] = stacked
        if logits is not None:
            by_router = logits.detach().view(len(model.tasks), len(model.routers), -1)
            tensors[f"{prefix}routes.logits"] = by_router[:, model.mixer.router_of_site[i]]
    values = config.to_dict()
    fields = {
        "peft_type": "MHR",
        "tasks": list(model.tasks),
        **{name: values[name] for name in LAYER_SETTINGS if name in values},
    }
    write_peft_folder(folder, model.base_model, model.sites, fields, tensors)


def from_peft_mhr(
    base_model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    tasks: Sequence[str] | None = None,
    allow_pickle: bool = False,
) -> RoutedModel:
    """Attach the inventory of an MHR adapter of PEFT to its base model.

    Args:
        base_model: the base model that the adapter was trained on.
        folder: the folder that PEFT's `save_pretrained` or `write_peft_mhr` wrote.
        tasks: other names for the tasks, in the same order.
        allow_pickle: whether to read `adapter_model.bin` if there are no safetensors.

    Raises:
        InputError: the folder holds no such adapter, it is not whole, or it does not fit the base
            model.
    """
    source = os.fspath(folder)
    fields, tensors = read_peft_folder(base_model, folder, "MHR", allow_pickle=allow_pickle)
    names = fields.get("tasks")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{source} has no list of task names in {CONFIG}; it is damaged")
    values = {name: fields[name] for name in LAYER_SETTINGS if name in fields}
    try:
        config = MHRConfig(**values)
    except InputError as error:
        raise InputError(f"{source} has settings that cannot be used: {error}") from error
    skills: dict[str, Tensor] = {}
    logits: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None or not isinstance(tensor, Tensor):
            raise InputError(
                f"{source} holds {key!r}, which is no part of an MHR adapter: modules_to_save and "
                "other trained weights of the base model cannot be imported"
            )
        if match["factor"] is None:
            logits[match["layer"]] = tensor
        else:
            published = tensor.squeeze(0)
            if published.dim() != 4:
                raise InputError(
                    f"{source} is damaged: {key!r} has {tensor.dim()} dimensions, not 5"
                )
            skills[f"{match['layer']}.{match['factor']}"] = (
                published.mT if match["factor"] == "lora_a" else published
            )
    if not skills or bool(logits) != config.has_router:
        raise InputError(f"{source} lacks skills or routing logits: it is not whole")
    found = ForeignInventory(source, config, skills, logits, num_tasks=len(names))
    check_whole(base_model, found, fields)
    return routed_model(base_model, found, names if tasks is None else tasks)
