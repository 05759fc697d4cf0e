"""Slots: several adaptations of one inventory, side by side on one frozen base model.

A slot has everything that trains for itself: a row of logits, and its own set of skills where the
phase trains skills. For as long as slots are open the routed model holds them in place of its own
tasks, so whatever takes a task's name takes a slot's.
"""

from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from polyroute.errors import InputError
from polyroute.model import Phase, RoutedModel
from polyroute.routes.inventory import Inventory
from polyroute.routes.mixer import Mixer
from polyroute.routes.table import MU, RoutingTable
from polyroute.routes.table_rules import rule_of

__all__ = ["NEAREST", "Slots", "check_starts", "has_one_skill"]

NEAREST = "nearest"
"""As the start of a slot: the route that `polyroute.adapting.starts` finds for its examples."""


def has_one_skill(model: RoutedModel, phase: Phase) -> bool:
    """Whether what a slot trains of the skills is one plain adapter, taken whole.

    The methods without routing have nothing else.
    """
    return phase == "mu" or not model.rule.has_table


def check_starts(model: RoutedModel, phase: Phase, inits: Collection[str]) -> None:
    """Make sure that slots can start, from each of these.

    Raises:
        InputError: as `Slots` and `Slots.start`, or there are no routes to look for the nearest in.
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
            f"init {NEAREST!r} starts from the routes of training tasks, and this inventory has "
            "none: use init 'uniform'"
        )


class Slots(AbstractContextManager["Slots"]):
    """A number of slots in one phase; a context manager that puts them into the model.

    Args:
        model: a trained inventory; when the block ends it is as it was.
        phase: as in `RoutedModel.set_phase`, for every slot.
        size: how many slots there are.

    Attributes:
        names: what to route as, one for each slot.

    Raises:
        InputError: the phase has nothing to train in this model, or the model is merged.
    """

    def __init__(self, model: RoutedModel, phase: Phase, size: int) -> None:
        model.check_phase(phase)
        if model.rule.name != rule_of(model.adapter_config).name and phase != "mu":
            raise InputError(
                f"the rule {model.rule.name!r} has parameters that all tasks share, so tasks "
                f"cannot be adapted side by side in phase {phase!r}: use phase 'mu', or train one "
                "task with set_phase"
            )
        if phase == "full" and model.inventory.num_skills == 0:
            raise InputError("no private adapter is left to start from: add a task first")
        self.model = model
        self.phase = phase
        self.names = tuple(f"slot {place}" for place in range(size))
        self._own: dict[str, Any] = {
            "inventory": model.inventory, "routes": model.routes, "rule": model.rule,
            "mixer": model.mixer,
        }  # fmt: skip
        config, shape = model.adapter_config, model.routes.shape
        is_plain = has_one_skill(model, phase)
        if is_plain:
            rank = model.inventory.rank_of_average if phase == "mu" else model.inventory.rank
            config = replace(
                config, method="private", num_skills=None, num_heads=1, combine="weight",
                rank=rank, alpha=config.scale * rank,
            )  # fmt: skip
        has_logits = phase in ("full", "z", "random") and not is_plain
        device = model.mixer.device
        like = next(model.inventory.parameters())
        self.routes = RoutingTable(self.names, shape if has_logits else None, like, config)
        self.inventory = model.inventory
        if phase != "z":
            each = 1 if is_plain else model.inventory.num_skills
            self.inventory = Inventory(model.sites, config, size * each, device, num_sets=size)
        self.rule = rule_of(config)
        routers, by_site = model.mixer.routers, model.mixer.router_of_site
        self.mixer = Mixer(config, self.inventory, self.routes, self.rule, routers, by_site)
        self.mixer.eval()

    def __enter__(self) -> "Slots":
        """Put the slots in place of the model's tasks."""
        self._required_grad = [p.requires_grad for p in self._own["inventory"].parameters()]
        self._training = [module for module in self.model.modules() if module.training]
        # Nothing is drawn at random while slots train: dropout would depend on their company.
        self.model.eval()
        self.model.inventory, self.model.routes = self.inventory, self.routes
        self.model.rule, self.model.mixer = self.rule, self.mixer
        self.inventory.requires_grad_(self.phase != "z")
        return self

    def __exit__(self, *_: object) -> None:
        """Put the model's own tasks back."""
        for name, module in self._own.items():
            setattr(self.model, name, module)
        parameters = self._own["inventory"].parameters()
        for parameter, required in zip(parameters, self._required_grad, strict=True):
            parameter.requires_grad_(required)
        for module in self._training:  # one by one: a frozen part may have been in evaluation mode
            module.training = True

    @torch.no_grad()
    def start(self, place: int, *, seed: int, init: str | Tensor = "uniform") -> None:
        """Make one slot as a new task is at the start of its phase.

        Args:
            place: the slot, counted from 0.
            seed: of what is drawn: fresh logits, and fresh skills in phase `random`.
            init: `"uniform"`; one of the model's tasks, whose row is copied; or logits `[N, H, K]`.
                Where the phase has no routes, the one adapter starts as their mixture.

        Raises:
            InputError: there is no such task to copy.
        """
        inventory, routes = self._own["inventory"], self._own["routes"]
        source: int | None = None
        logits: Tensor | None = None
        if isinstance(init, Tensor):
            logits = init
        elif init not in ("uniform", MU):
            source = routes.row(init)
            logits = None if routes.logits is None else routes[source]
        if self.phase == "random":
            self.inventory.redraw_set(place, seed + 1)  # not the numbers that the logits get
        elif self.phase != "z":
            is_private = self._own["rule"].owns_skills
            mixer = self._own["mixer"]
            mixture = None if logits is None else mixer.by_stack(mixer.weights_from(logits))
            self.inventory.fill_set(place, inventory, source if is_private else None, mixture)
        if self.routes.logits is not None:
            if logits is not None:
                self.routes[place] = logits
            else:
                self.routes.redraw(place, seed)

    def parameters(self, place: int) -> dict[str, list[Tensor]]:
        """What one slot trains, by parameter group (`skills`, `routes`).

        The tensors are leaves that share their memory with the model, `[n, H, K, r, D]` for each
        stack and factor, and `[N * H * K]`: changed in place, they change the slot.
        `take_gradients` fills their `grad`.
        """
        groups: dict[str, list[Tensor]] = {}
        if self.phase != "z":
            groups["skills"] = [t.detach() for t in self.inventory.skills_of(place)]
        if self.routes.logits is not None:
            groups["routes"] = [self.routes.logits.detach()[place]]
        return groups

    def take_gradients(self, place: int, parameters: dict[str, list[Tensor]]) -> None:
        """Give the leaves of `parameters` their part of the gradients; views again."""
        if "skills" in parameters:
            gradients = self.inventory.skills_of(place, gradients=True)
            for leaf, part in zip(parameters["skills"], gradients, strict=True):
                leaf.grad = part
        if "routes" in parameters:
            assert self.routes.logits is not None
            gradient = self.routes.logits.grad
            parameters["routes"][0].grad = None if gradient is None else gradient[place]

    def zero_grad(self) -> None:
        """Forget the gradients of all slots; the model's own stay."""
        self.routes.zero_grad(set_to_none=True)
        if self.phase != "z":
            self.inventory.zero_grad(set_to_none=True)
