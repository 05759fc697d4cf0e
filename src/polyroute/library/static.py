"""Constant weights over skills: chosen by hand, or learned from a few examples.

    rule = pr.Static(model, granularity="coarsegrained")   # a weight for each LoRA, all 0
    optimizer = torch.optim.Adam(rule.parameters(), lr=0.05)
    with model.route(rule):
        loss = model(**batch).loss

This is one rule for several methods: LoraHub (Huang et al., 2023) learns a weight for each LoRA of
the model, LoRA Soups (Prabhakar et al., 2024) and AdaMerging (Yang et al., 2024) one for each LoRA
and layer, and AdapterSoup (Chronopoulou et al., 2023) weights some of them equally. Updates are
mixed in output space, because the factors of LoRAs that were made apart have no mean.

Shape letters: E skills, G groups of layers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polyroute.config import Granularity
from polyroute.errors import InputError
from polyroute.layer.factors import Factors
from polyroute.layer.granularity import routers_of
from polyroute.library.attaching import owners_of, places_of
from polyroute.model import RoutedModel
from polyroute.routes.index import index_on
from polyroute.routes.mixer import Mixer
from polyroute.routes.rule import Batch, RouteRule
from polyroute.routes.table import MU
from polyroute.settings import flag, number

__all__ = ["Static"]


class Static(RouteRule, name="static"):
    """Every token has the same weights, which may be negative; they are parameters.

    Args:
        model: whose skills are weighted.
        weights: those that the rule starts with: one number for all skills; or by the name of a
            task that has a skill of its own, 0 for the others.
        granularity: layers that share weights, as in `MHRConfig.granularity`.
        softmax: the parameters are logits, and weights are their softmax over the skills; these
            start uniform.
    """

    needs_tasks = False
    stands_alone = True

    def __init__(
        self,
        model: RoutedModel,
        weights: Mapping[str, float] | float = 0.0,
        *,
        granularity: Granularity | Callable[[str], str] = "coarsegrained",
        softmax: bool = False,
    ) -> None:
        super().__init__()
        self.softmax = flag()("softmax", softmax)
        self._owners = owners_of(model.mixer)
        groups, self._group_of_site = routers_of([s.name for s in model.sites], granularity)
        skills = model.inventory.num_skills
        start = torch.zeros(skills)
        if isinstance(weights, Mapping):
            if not model.rule.owns_skills:
                raise InputError("tasks have no skills of their own here: give one number for all")
            for name, weight in weights.items():
                if name == MU:
                    raise InputError("'mu' is the average of all LoRAs: give each 1 / E instead")
                start[model.routes.row(name)] = number()("weight", weight)
        else:
            start.fill_(number()("weights", weights) or 0.0)
        if self.softmax and start.any():
            raise InputError("weights of a softmax start uniform: leave them out")
        like = model.inventory.like
        start = start.to(like.device, torch.promote_types(like.dtype, torch.float32))
        self.weights = nn.Parameter(start.repeat(len(groups), 1))

    def settings(self) -> dict[str, Any]:
        """Nothing: a rule of constant weights is not saved with a model."""
        raise InputError("constant weights are not saved with a model: use model.route(rule)")

    def values(self) -> Tensor:
        """The weights of the skills in each group of layers, `[G, E]`."""
        return self.weights.softmax(-1) if self.softmax else self.weights

    def factors(self, batch: Batch, mixer: Mixer) -> Sequence[Factors]:
        """One plain LoRA for each site, the weighted sum of the skills' updates.

        Raises:
            InputError: the model has other layers or skills, or averages the factors of skills.
        """
        inventory = mixer.inventory
        if len(self._group_of_site) != len(inventory.sites):
            raise InputError("these weights belong to another model: make a new rule")
        places = places_of(self._owners, mixer)
        if inventory.combine != "output" or inventory.adapter == "ia3":
            raise InputError(
                "constant weights add the updates of LoRAs: attach a library, or train with "
                "combine='output'"
            )
        of_site = index_on(mixer.device, tuple(self._group_of_site))
        own = self.values().index_select(1, index_on(mixer.device, places))
        weights = own.index_select(0, of_site)[None, :, None]
        shown = weights.expand(-1, -1, inventory.heads, -1)
        sites = [index_on(mixer.device, stack.sites) for stack in inventory.stacks]
        with torch.autocast(mixer.device.type, enabled=False):
            return inventory.mix(mixer.exact(shown), sites, dtype=batch.dtype)
