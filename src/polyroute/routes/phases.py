"""Phases of training: which parameters train, and their parameter groups for an optimizer."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from polyroute.config import Phase
from polyroute.errors import InputError
from polyroute.routes.averaging import averaged
from polyroute.routes.mixer import Mixer
from polyroute.routes.row_optimizer import RowAdamW
from polyroute.routes.table_rules import SharedRule
from polyroute.settings import named, number

__all__ = ["check_phase", "check_rates", "param_groups", "row_optimizer", "start_phase"]


def check_phase(mixer: Mixer, phase: Phase) -> None:
    """Make sure that a task could be trained in a phase.

    Raises:
        InputError: there is no such phase, or the model has nothing that it trains.
    """
    named(get_args(Phase))("phase", phase)
    method, rule = mixer.config.method, mixer.rule
    if phase == "z" and mixer.table.logits is None and not list(rule.parameters()):
        raise InputError(
            f"phase 'z' trains routing logits, and this model of method {method!r} has none here: "
            "use phase 'full' or 'mu'"
        )
    if phase == "mu-uncollapsed" and not (rule.has_table and rule.is_fixed):
        raise InputError(
            f"phase 'mu-uncollapsed' averages routed skills, and method {method!r} does not route "
            "any: use phase 'mu'"
        )
    if phase == "mu" and mixer.inventory.num_skills == 0:
        raise InputError("no private adapter is left to average: add a task first")


def start_phase(mixer: Mixer, phase: Phase) -> None:
    """Prepare the skills and the table for a phase, in place, and choose the parameters that train.

    `RoutedModel.set_phase` describes the phases.
    """
    if phase == "mu":
        _collapse(mixer)
    else:
        mixer.averaged = None
    if phase == "mu-uncollapsed":
        mixer.table.drop_logits()
    elif phase == "random":
        mixer.inventory.reset_parameters()
        mixer.table.reset_parameters()
        mixer.rule.reset_parameters()
    mixer.anneal_progress = 0.0
    mixer.table.train_whole()
    mixer.inventory.requires_grad_(phase != "z")
    for part in (mixer.table, mixer.rule):
        part.requires_grad_(phase in ("full", "z", "random"))


def _collapse(mixer: Mixer) -> None:
    """Replace the skills, in place, by their average, which every task then uses."""
    rank, scale = mixer.inventory.rank_of_average, mixer.config.scale
    mixer.averaged = averaged(mixer.inventory) or mixer.averaged  # it may be collapsed already
    mixer.inventory.average()
    mixer.table.drop_logits()
    config = replace(
        mixer.config, method="shared", num_skills=1, num_heads=1, combine="weight", rank=rank,
        alpha=scale * rank,
    )  # fmt: skip
    mixer.become(config, SharedRule())


def check_rates(rates: Mapping[str, Any]) -> None:
    """Make sure that learning rates and weight decays can be used.

    Args:
        rates: `lr`, `route_lr`, `weight_decay`, `route_weight_decay`.

    Raises:
        InputError: a rate is not positive and finite, or a decay is negative.
    """
    for name in ("lr", "route_lr"):
        number(above=0)(name, _plain(rates[name]))
    for name in ("weight_decay", "route_weight_decay"):
        number(least=0)(name, _plain(rates[name]))


def param_groups(
    mixer: Mixer, rates: Mapping[str, Any], modules: Iterable[nn.Module]
) -> list[dict[str, Any]]:
    """The parameter groups of everything that trains now; see `RoutedModel.param_groups`.

    Args:
        mixer: has the skills, the table and the rule.
        rates: as in `check_rates`.
        modules: whole modules of the base model that train, at the rate of the skills.
    """
    mixer.table.train_whole()
    groups = [
        ("skills", mixer.inventory, rates["lr"], rates["weight_decay"]),
        ("modules", nn.ModuleList(modules), rates["lr"], rates["weight_decay"]),
        # A rule's own parameters are not logits of tasks, so they learn at the rate of the skills.
        ("rule", mixer.rule, rates["lr"], rates["weight_decay"]),
        ("routes", mixer.table, rates["route_lr"], rates["route_weight_decay"]),
    ]
    found: list[dict[str, Any]] = [
        {"name": name, "params": parameters, "lr": rate, "weight_decay": decay}
        for name, module, rate, decay in groups
        if (parameters := [p for p in module.parameters() if p.requires_grad])
    ]
    if mixer.averaged is not None:
        found[0] |= mixer.averaged.group([name for name, _ in mixer.inventory.named_parameters()])
    return found


def row_optimizer(
    mixer: Mixer, groups: list[dict[str, Any]], **options: Any
) -> torch.optim.Optimizer:
    """AdamW over parameter groups; if the table trains, it trains by rows.

    Args:
        mixer: has the table.
        groups: made by `param_groups`; the group `routes`, if there is one, is changed in place.
        **options: options of the optimizer, `betas` and `eps`.
    """
    if not any(group["name"] == "routes" for group in groups):
        return torch.optim.AdamW(groups, **options)
    groups[-1]["params"] = [mixer.table.train_by_rows()]
    return RowAdamW(groups, mixer.table, **options)


def _plain(value: Any) -> Any:
    # Optimizers also take a tensor as a rate.
    return float(value) if isinstance(value, Tensor) else value
