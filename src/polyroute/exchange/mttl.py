"""Reading checkpoints of mttl, the code of the MHR paper (arXiv:2211.03831).

A checkpoint holds `hyper_parameters` and a `state_dict`, whose keys are the layer names of the
base model after a leading `model.`:

    <layer>.lora_a, .lora_b            [H, K, d_in/H, r], [H, K, r, d_out/H]; or a plain LoRA's
                                       [d_in, r], [r, d_out]
    <layer>.multi_lora_b               [d_out], an (IA)^3 scale
    <layer>.selector.module_logits     [T, H * K], for the first layer of each router

Without logits every task takes the average. The later `main` branch has `<layer>.experts.lora_a`
`[K, H, d_in/H, r]`, `.lora_b` `[K, r, H, d_out/H]`, and a last row of logits for unknown tasks.
Rows are in the order of the sorted task names; the names themselves are not in the file.
"""

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from polyroute.config import MHRConfig
from polyroute.errors import InputError
from polyroute.exchange.foreign import (
    NAMES,
    ForeignInventory,
    read_names,
    read_pickle,
    routed_model,
)
from polyroute.exchange.mttl_layers import chosen_layers, our_granularity
from polyroute.host.dtypes import are_finite_fractions
from polyroute.host.files import read_json, read_tensors
from polyroute.model import RoutedModel

__all__ = ["HYPER_PARAMETERS", "STATE", "Layout", "from_mttl"]

Layout = Literal["mttl", "mttl-main"]
HYPER_PARAMETERS = "hyper_parameters.json"
STATE = "state_dict.safetensors"
"""The files of a checkpoint that `polyroute.exchange.mttl_export` writes without a pickle."""

OLDER_NAMES = {
    "lora_modules": "modify_modules",
    "lora_layers": "modify_layers",
    "poly_selector": "router_selector",
    "poly_granularity": "router_granularity",
}
SETTINGS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("n_skills", "n_splits", "lora_rank", "n_tasks"), (int,)),
    **dict.fromkeys(("lora_alpha", "module_logits_dropout"), (int, float)),
    **dict.fromkeys(
        ("model_modifier", "router_selector", "router_granularity", "modify_modules",
         "modify_layers"), (str,),
    ),
    **dict.fromkeys(
        ("module_logits_l2_norm", "module_logits_relaxed_bernoulli",
         "module_logits_straight_through", "poly_average_correction", "poly_use_shared_skill"),
        (bool, int),
    ),
}  # fmt: skip
"""The types of the settings that are read."""
MODIFIERS = ("lora", "ia3", "skilled_lora")
MOST_TASKS = 1_000_000
"""Names are made for so many; a crafted file may ask for any number."""
KEY = re.compile(
    r"(?P<layer>.+?)(?P<main>\.experts)?\.(?P<part>lora_a|lora_b|multi_lora_b|selector\.module_logits)"
)
LOGITS = "selector.module_logits"
Layers = Mapping[str, Mapping[str, Tensor]]


def from_mttl(
    base_model: nn.Module,
    path: str | os.PathLike[str],
    *,
    tasks: Sequence[str] | None = None,
    layout: Layout | None = None,
    allow_pickle: bool = False,
) -> RoutedModel:
    """Attach the inventory of an mttl checkpoint to its base model.

    Poly and MHR checkpoints keep their routing, including the settings of the gates; if they have
    no logits, every task takes the average. A LoRA or (IA)^3 becomes a shared adapter.

    Args:
        base_model: the model that the checkpoint was trained on.
        path: a Lightning checkpoint, or a folder that `polyroute.exchange.mttl_export` wrote.
        tasks: the names of the routing rows, in their order; None for the names in the folder, or
            numbers if there are none.
        layout: `"mttl"` for the paper's code and older versions, or `"mttl-main"`; None to tell it
            from the keys.
        allow_pickle: read Lightning checkpoints, which are pickles. Only tensors and plain values
            are read from them, and no code in them is run.

    Raises:
        InputError: the checkpoint cannot be read, is not whole, uses a method that polyroute does
            not have, or does not fit the base model.
    """
    source, place = os.fspath(path), Path(path)
    state, hyper = _read(place, allow_pickle)
    if tasks is None and (place / NAMES).is_file():
        tasks = read_names(place / NAMES)
    layers, looks_main = _layers(state, source)
    _check_method(hyper, source)
    _check_layers(base_model, layers, hyper, source)
    is_main = looks_main if layout is None else layout == "mttl-main"
    return routed_model(base_model, _inventory(layers, hyper, source, is_main=is_main), tasks)


def _read(path: Path, allow_pickle: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    if path.is_dir():
        state: Any = read_tensors(path / STATE)
        hyper: Any = read_json(path / HYPER_PARAMETERS)
    else:
        value = read_pickle(path, allowed=allow_pickle)
        missing = {"hyper_parameters", "state_dict"} - value.keys()
        if missing:
            raise InputError(f"{path} lacks {sorted(missing)[0]!r}, so it is no mttl checkpoint")
        state, hyper = value["state_dict"], value["hyper_parameters"]
    if isinstance(hyper, argparse.Namespace):
        hyper = dict(vars(hyper))
    if not isinstance(hyper, dict) or not isinstance(state, dict):
        raise InputError(f"{path} is no mttl checkpoint: its settings or tensors have no names")
    settings: dict[str, Any] = {
        OLDER_NAMES.get(str(name), str(name)): value for name, value in hyper.items()
    }
    for name, value in settings.items():
        kind = SETTINGS.get(name)
        if kind and value is not None and not isinstance(value, kind):
            raise InputError(
                f"{path} is damaged: its setting {name!r} is a {type(value).__name__}, not "
                f"{' or '.join(one.__name__ for one in kind)}"
            )
    return state, settings


def _layers(state: Mapping[str, Any], source: str) -> tuple[Layers, bool]:
    """The tensors by layer and part, and whether the keys are those of the `main` branch."""
    layers: dict[str, dict[str, Tensor]] = {}
    is_main = False
    for key, tensor in state.items():
        name = str(key).removeprefix("expert_model.").removeprefix("model.")
        if name.endswith((".weight", ".bias")):  # belongs to the wrapped layer of the base model
            continue
        match = KEY.fullmatch(name)
        if match is None or not isinstance(tensor, Tensor):
            raise InputError(
                f"{source} holds {key!r}, which is no part of a LoRA, Poly, MHR or (IA)^3 of mttl"
            )
        is_whole = match["part"] != LOGITS or are_finite_fractions(tensor)
        if not tensor.numel() or not is_whole:
            raise InputError(
                f"{source} is damaged: {key!r} has no values, or some that are not finite fractions"
            )
        layers.setdefault(match["layer"], {})[match["part"]] = tensor
        is_main = is_main or match["main"] is not None
    if not layers:
        raise InputError(f"{source} holds no adapter: no key of it ends in .lora_a")
    return layers, is_main


def _check_method(hyper: Mapping[str, Any], source: str) -> None:
    modifier = hyper.get("model_modifier") or "poly"
    if modifier not in MODIFIERS and not str(modifier).startswith("poly"):
        raise InputError(f"{source} has model_modifier={modifier!r}, which polyroute does not have")
    selector = hyper.get("router_selector") or "poly"
    if selector not in ("poly", "poly_router", "average"):
        raise InputError(
            f"{source} has router_selector={selector!r}, which polyroute does not have"
        )


def _check_layers(
    base_model: nn.Module, layers: Layers, hyper: Mapping[str, Any], source: str
) -> None:
    """Make sure that every layer that the settings of the checkpoint choose has an adapter."""
    modules, own = hyper.get("modify_modules"), hyper.get("modify_layers")
    if not isinstance(modules, str) or not isinstance(own, str):
        return
    linear = [n for n, m in base_model.named_modules() if isinstance(m, nn.Linear)]
    missing = sorted(chosen_layers(linear, modules, own) - layers.keys())
    if missing:
        raise InputError(
            f"{source} has no adapter for layer {missing[0]!r}, which its settings choose: it is "
            "not whole, or belongs to another base model"
        )


def _inventory(
    layers: Layers, hyper: Mapping[str, Any], source: str, *, is_main: bool
) -> ForeignInventory:
    skills = _skills(layers, source, is_main=is_main)
    first = next((n for n in skills if not n.endswith(".lora_b")), None)
    if first is None:
        raise InputError(f"{source} holds no skills: no key of it ends in .lora_a")
    heads, num_skills, _, rank = skills[first].shape
    num_tasks = hyper.get("n_tasks")
    count = num_tasks if num_tasks and num_tasks > 0 else 1
    if count > MOST_TASKS:
        raise InputError(f"{source} is damaged: its n_tasks is {count:,}, which no model has")
    if first.endswith(".ia3"):
        config = MHRConfig(method="shared", adapter="ia3")
        return ForeignInventory(source, config, skills, {}, count)
    is_routed = layers[first.removesuffix(".lora_a")]["lora_a"].ndim == 4
    said = {"n_skills": num_skills, "n_splits": heads} if is_routed and not is_main else {}
    _check_sizes(hyper, {"lora_rank": rank, **said}, source)
    common: dict[str, Any] = {"rank": rank, "alpha": _alpha(hyper, source, is_main=is_main)}
    if not is_routed:
        return ForeignInventory(source, MHRConfig(method="shared", **common), skills, {}, count)
    tables = _tables(layers, heads, num_skills, source, is_main=is_main)
    routing = _main_router(tables) if is_main else _router(hyper, layers)
    config = MHRConfig(
        method="mhr" if heads > 1 else "poly",
        num_heads=heads,
        num_skills=num_skills,
        **common,
        **routing,
    )
    return ForeignInventory(source, config, skills, tables, count)


def _skills(layers: Layers, source: str, *, is_main: bool) -> dict[str, Tensor]:
    """The skills by layer and factor, in our layout."""
    return {
        f"{layer}.{'ia3' if part == 'multi_lora_b' else part}": _as_ours(
            tensor, part, f"{source}: {layer}", is_main
        )
        for layer, parts in layers.items()
        for part, tensor in parts.items()
        if part != LOGITS
    }


def _check_sizes(hyper: Mapping[str, Any], sizes: Mapping[str, int], source: str) -> None:
    for setting, size in sizes.items():
        if hyper.get(setting) not in (None, size):
            raise InputError(
                f"{source} has {setting}={hyper[setting]} but tensors for {size}; it is damaged, "
                "or of the other layout (--format mttl or mttl-main)"
            )


def _alpha(hyper: Mapping[str, Any], source: str, *, is_main: bool) -> float:
    """The alpha of a LoRA; older versions have no such setting and mean 1."""
    alpha = hyper.get("lora_alpha")
    if alpha is None and is_main:  # its default is not 1
        raise InputError(f"{source} lacks the setting lora_alpha, by which the update is scaled")
    return 1.0 if alpha is None else alpha


def _as_ours(tensor: Tensor, part: str, where: str, is_main: bool) -> Tensor:
    """`[H, K, ...]`."""
    if tensor.ndim != 1 if part == "multi_lora_b" else tensor.ndim not in (2, 4):
        raise InputError(f"{where}.{part} has shape {list(tensor.shape)}, which is of no layout")
    if tensor.ndim < 4:
        return tensor[None, None, None] if tensor.ndim == 1 else tensor[None, None]
    if not is_main:
        return tensor
    return tensor.permute(1, 0, 2, 3) if part == "lora_a" else tensor.permute(2, 0, 1, 3)


def _tables(
    layers: Layers, heads: int, num_skills: int, source: str, *, is_main: bool
) -> dict[str, Tensor]:
    """The routing logits `[T, H * K]` by layer; empty if all routes are the average."""
    tables = {layer: parts[LOGITS] for layer, parts in layers.items() if LOGITS in parts}
    width, constant = heads * num_skills, (heads, num_skills)
    # Older versions saved a constant for an average router.
    if all(t.shape == constant and not (t - 1 / num_skills).round(decimals=6).any()
           for t in tables.values()):  # fmt: skip
        return {}
    for layer, table in tables.items():
        if table.ndim != 2 or table.shape[1] != width:
            raise InputError(
                f"{source}: the routing logits of {layer!r} have shape {list(table.shape)}, where "
                f"{width} for each task are needed"
            )
    if is_main and all(len(t) > 1 and not t[-1].any() for t in tables.values()):
        return {
            layer: table[:-1] for layer, table in tables.items()
        }  # the last row is for unknown tasks
    return tables


def _main_router(tables: Mapping[str, Tensor]) -> dict[str, Any]:
    """The settings of routing in the `main` branch, whose gates are always plain sigmoids."""
    # Its granularity is a pattern of its own, so the number of tables has to tell.
    return {"granularity": "coarsegrained" if len(tables) == 1 else "finegrained"}


def _router(hyper: Mapping[str, Any], layers: Layers) -> dict[str, Any]:
    """The settings of routing in the paper's code and older versions."""
    granularity = our_granularity(list(layers), hyper.get("router_granularity") or "finegrained")
    if hyper.get("module_logits_l2_norm"):  # mttl ignores the other settings then
        return {"granularity": granularity, "normalization": "l2"}
    gate = "relaxed_bernoulli" if hyper.get("module_logits_relaxed_bernoulli") else "sigmoid"
    corrected = hyper.get("poly_average_correction")
    return {
        "granularity": granularity,
        "gate": "straight_through" if hyper.get("module_logits_straight_through") else gate,
        "normalization": "average_correction" if corrected else "sum",
        "shared_skill": bool(hyper.get("poly_use_shared_skill")),
        "logit_dropout": hyper.get("module_logits_dropout") or 0.0,
    }
