"""Slots: several adaptations of one inventory, side by side on one frozen base model.

A slot has its own copy of everything that trains: a row of logits and, in phases that train skills,
a set of skills. While slots are open, they stand in the routed model in place of its own tasks, so
the name of a slot can be used wherever a task is named.

Shape letters: n layers of a stack, N routers, H heads, K skills, r rank, D width of a head's block.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from polyroute.config import MHRConfig, Phase
from polyroute.errors import InputError
from polyroute.layer.granularity import routers_of
from polyroute.model import RoutedModel
from polyroute.routes.averaging import Averaged, averaged
from polyroute.routes.inventory import Inventory
from polyroute.routes.mixer import Mixer
from polyroute.routes.table import MU, RoutingTable
from polyroute.routes.table_rules import rule_of

__all__ = [
    "NEAREST",
    "Slots",
    "check_phase",
    "check_starts",
    "has_one_skill",
    "has_own_rule",
    "shape_of_row",
    "weights_library",
]

NEAREST = "nearest"
"""The start of a slot at the row that `polyroute.adapting.starts` finds for its examples."""


def has_one_skill(model: RoutedModel, phase: Phase) -> bool:
    """Whether a slot in this phase trains one plain adapter.

    It always does so if the model has no routing table, unless it weights the LoRAs of a library.
    """
    return phase == "mu" or not (model.rule.has_table or weights_library(model, phase))


def weights_library(model: RoutedModel, phase: Phase) -> bool:
    """Whether a slot in this phase trains a weight for each LoRA of a library."""
    return phase == "z" and model.rule.owns_skills and model.inventory.combine == "output"


def check_phase(model: RoutedModel, phase: Phase) -> None:
    """Make sure that slots have something to train in a phase.

    Raises:
        InputError: as `RoutedModel.set_phase`; but a library has weights for slots in phase z.
    """
    if weights_library(model, phase):
        model.check_unmerged()
    else:
        model.check_phase(phase)


def shape_of_row(model: RoutedModel, phase: Phase) -> tuple[int, int, int] | None:
    """The numbers of routers, heads and skills that a slot has logits for; None if it has none."""
    if weights_library(model, phase):
        return 1, 1, model.inventory.num_skills
    has_row = phase in ("full", "z", "random") and not has_one_skill(model, phase)
    return model.mixer.shape if has_row else None


def _plain_config(model: RoutedModel, phase: Phase) -> MHRConfig:
    """The settings of slots that train one plain adapter each."""
    config, inventory = model.adapter_config, model.inventory
    rank = inventory.rank_of_average if phase == "mu" else inventory.rank
    return replace(
        config, method="private", num_skills=None, num_heads=1, combine="weight", rank=rank,
        alpha=config.scale * rank,
    )  # fmt: skip


def _weighting_config(model: RoutedModel) -> MHRConfig:
    """The settings of slots that train a weight for each LoRA, for the whole model (LoraHub)."""
    return replace(
        model.adapter_config, method="poly", num_skills=model.inventory.num_skills, num_heads=1,
        combine="output", normalization="none", granularity="coarsegrained",
    )  # fmt: skip


def has_own_rule(model: RoutedModel) -> bool:
    """Whether skills are chosen by another rule than that of the model's method."""
    return model.rule.name != rule_of(model.adapter_config).name


def check_starts(model: RoutedModel, phase: Phase, inits: Collection[str]) -> None:
    """Make sure that slots can start from each of some starts.

    Args:
        model: the trained inventory.
        phase: the phase of the slots.
        inits: the starts, as in `Slots.start`, or `NEAREST`.

    Raises:
        InputError: as `Slots` and `Slots.start`; or the inventory has no rows of training tasks
            for `NEAREST`, or a task of that name.
    """
    with Slots(model, phase, 1) as slots:
        for init in dict.fromkeys(inits):
            if init != NEAREST:
                slots.start(0, seed=0, init=init)
    if NEAREST in inits and NEAREST in model.routes:
        raise InputError(
            f"init {NEAREST!r} could also mean the task of that name, which this inventory has: "
            "take another start"
        )
    if NEAREST in inits and (model.routes.logits is None or not len(model.routes)):
        raise InputError(
            f"init {NEAREST!r} starts from the rows of training tasks, and this inventory has "
            "none: use init 'uniform'"
        )


class Slots(AbstractContextManager["Slots"]):
    """Some slots in one phase, which are open inside a `with` block.

    Args:
        model: the trained inventory; after the block it is as it was before.
        phase: the phase of every slot, as in `RoutedModel.set_phase`.
        size: the number of slots.

    Attributes:
        model: as given.
        phase: as given.
        names: the name of each slot, to be routed as a task's.
        routes: the routing table of the slots, with a row for each.
        inventory: their skills, a set for each slot; in phase `z` the skills of the model.
        averaged: in phase `mu`, by place, what is kept of the skills that became the slot.
        rule: the rule of the slots.
        mixer: the mixer of the slots.

    Raises:
        InputError: the phase has nothing to train in this model, tasks share what it trains, or
            the model is merged.
    """

    def __init__(self, model: RoutedModel, phase: Phase, size: int) -> None:
        check_phase(model, phase)
        if has_own_rule(model) and phase != "mu":
            raise InputError(
                f"the rule {model.rule.name!r} has parameters that all tasks share, so tasks "
                f"cannot be adapted side by side in phase {phase!r}: use phase 'mu', or train one "
                "task with set_phase"
            )
        if phase == "full" and model.inventory.num_skills == 0:
            raise InputError("no private adapter is left to start from: add a task first")
        self.model = model
        self.phase = phase
        self._is_weighting = weights_library(model, phase)
        self.names = tuple(f"slot {place}" for place in range(size))
        self._has_own_rule = has_own_rule(model)
        self._own: dict[str, Any] = {
            "inventory": model.inventory, "routes": model.routes, "rule": model.rule,
            "mixer": model.mixer,
        }  # fmt: skip
        is_plain = has_one_skill(model, phase)
        config = _plain_config(model, phase) if is_plain else model.adapter_config
        routers: Sequence[str] = model.mixer.routers
        by_site: Sequence[int] = model.mixer.router_of_site
        if self._is_weighting:
            config = _weighting_config(model)
            routers, by_site = routers_of([s.name for s in model.sites], config.granularity)
        shape = shape_of_row(model, phase)
        self.routes = RoutingTable(self.names, shape, model.inventory.like, config)
        self.inventory = model.inventory
        if phase != "z":
            count = size * (1 if is_plain else model.inventory.num_skills)
            device = model.mixer.device
            self.inventory = Inventory(model.sites, config, count, device, num_sets=size)
        self.averaged: dict[int, Averaged | None] = {}
        self.rule = rule_of(config)
        self.mixer = Mixer(config, self.inventory, self.routes, self.rule, routers, by_site)
        self.mixer.eval()

    def __enter__(self) -> "Slots":
        """Put the slots in place of the model's tasks."""
        self._required_grad = [p.requires_grad for p in self._own["inventory"].parameters()]
        self._training = [module for module in self.model.modules() if module.training]
        # Slots train without dropout: random numbers would depend on the other slots of a batch.
        self.model.eval()
        self.model.inventory, self.model.routes = self.inventory, self.routes
        self.model.rule, self.model.mixer = self.rule, self.mixer
        self.inventory.requires_grad_(self.phase != "z")
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the model's own tasks."""
        for name, module in self._own.items():
            setattr(self.model, name, module)
        parameters = self._own["inventory"].parameters()
        for parameter, required in zip(parameters, self._required_grad, strict=True):
            parameter.requires_grad_(required)
        for module in self._training:  # not `model.train()`: some parts may have been evaluating
            module.training = True

    @torch.no_grad()
    def start(self, place: int, *, seed: int, init: str | Tensor = "uniform") -> None:
        """Set one slot, in place, to the state of a new task at the start of the phase.

        Args:
            place: the number of the slot, counted from 0.
            seed: seed of the new logits and, in phase `random`, of the new skills.
            init: `"uniform"`; one of the model's tasks, whose row is copied; or logits `[N, H, K]`.
                If the slot has no logits, its one adapter starts as the mixture of this start. A
                slot that weights the LoRAs of a library starts with all weights at 0, or with 1 for
                the LoRA of the task.

        Raises:
            InputError: there is no such task to copy.
        """
        inventory, table = self._own["inventory"], self._own["routes"]
        source: int | None = None
        logits: Tensor | None = None
        if isinstance(init, Tensor):
            logits = init
        elif init not in ("uniform", MU) and self._has_own_rule:
            raise InputError(
                f"init {init!r} starts from a row of the routing table, which the rule "
                f"{self._own['rule'].name!r} reads in its own way: use init 'uniform'"
            )
        elif init not in ("uniform", MU):
            source = table.row(init)
            logits = None if table.logits is None else table[source]
            if self._is_weighting:
                logits = torch.eye(len(table))[source].expand(self.mixer.shape)
        if self.phase == "random":
            self.inventory.redraw_set(place, seed + 1)  # the logits are drawn with the seed itself
        elif self.phase != "z":
            is_private = self._own["rule"].owns_skills
            mixer = self._own["mixer"]
            mixture = None if logits is None else mixer.by_stack(mixer.weights_from(logits))
            self.inventory.fill_set(place, inventory, source if is_private else None, mixture)
            if self.phase == "mu":
                is_copy = is_private and source is not None
                self.averaged[place] = None if is_copy else averaged(inventory, mixture)
        if self.routes.logits is not None:
            if logits is not None:
                self.routes[place] = logits
            else:
                self.routes.redraw(place, seed)

    def parameters(self, place: int) -> dict[str, list[Tensor]]:
        """The tensors that one slot trains, by parameter group (`skills`, `routes`).

        They are leaves that share memory with the slot, so changes in place change the slot: for
        each stack and factor `[n, H, K, r, D]`, and the row `[N * H * K]`. `take_gradients` sets
        their `grad`.
        """
        groups: dict[str, list[Tensor]] = {}
        if self.phase != "z":
            groups["skills"] = [t.detach() for t in self.inventory.skills_of(place)]
        if self.routes.logits is not None:
            groups["routes"] = [self.routes.logits.detach()[place]]
        return groups

    def averages(self, place: int) -> Mapping[str, Any]:
        """What the group of skills of one slot says of skills that were averaged at its start."""
        kept = self.averaged.get(place)
        names = [
            f"{factor}.{stack.key}"
            for stack in self.inventory.stacks
            for factor in self.inventory.factor_names
        ]
        return {} if kept is None else kept.group(names)

    def take_gradients(self, place: int, parameters: dict[str, list[Tensor]]) -> None:
        """Set the `grad` of the leaves of `parameters`, in place, to views of their gradients."""
        if "skills" in parameters:
            gradients = self.inventory.skills_of(place, gradients=True)
            for leaf, part in zip(parameters["skills"], gradients, strict=True):
                leaf.grad = part
        if "routes" in parameters:
            assert self.routes.logits is not None
            gradient = self.routes.logits.grad
            parameters["routes"][0].grad = None if gradient is None else gradient[place]

    def zero_grad(self) -> None:
        """Drop the gradients of all slots; those of the model itself stay."""
        self.routes.zero_grad(set_to_none=True)
        if self.phase != "z":
            self.inventory.zero_grad(set_to_none=True)
