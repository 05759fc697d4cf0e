"""From the tasks of a batch to what its layers apply: weights, mixed factors, and their cache."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from polyroute.config import MHRConfig
from polyroute.errors import InputError
from polyroute.layer.factors import Factors
from polyroute.layer.open_route import Mixture
from polyroute.layer.sites import Site
from polyroute.routes.inventory import Inventory
from polyroute.routes.table import MU_ROW, Routes, index_on
from polyroute.routes.tasks import Route
from polyroute.routes.weights import anneal, skill_weights, uniform_weights

__all__ = ["Mixer"]

CACHED_MIXTURES = 2


class Mixer(nn.Module):
    """Mixes, once per forward, the skills of all layers for the distinct tasks of the batch.

    Without gradients the mixture is kept until a parameter changes (in place, by a load, or by a
    move to another device) or the mode changes between training and evaluation.

    Attributes:
        anneal_progress: 0 routes as learned, 1 uniformly; a trainer sets it.
        router_of_site: each site's router.
    """

    def __init__(
        self,
        config: MHRConfig,
        inventory: Inventory,
        routes: Routes,
        sites: Sequence[Site],
        router_of_site: Sequence[int],
    ) -> None:
        super().__init__()
        self.config = config
        # A tuple, so that torch does not register here what the model owns.
        self._parts = (inventory, routes, tuple(sites))
        self._has_several_devices = len({site.device for site in sites}) > 1
        self.router_of_site = tuple(router_of_site)
        self.num_routers = max(router_of_site) + 1
        self.anneal_progress = 0.0
        self._cache: OrderedDict[Any, tuple[Any, Mixture]] = OrderedDict()

    @property
    def device(self) -> torch.device:
        """Where the skills are, and where they are mixed."""
        return next(self.inventory.parameters()).device

    @property
    def _routers(self) -> list[Tensor]:
        """For each stack `[n]`, the router of each of its layers."""
        # No buffers: what torch moves from the meta device has lost its values.
        router = self.router_of_site
        return [
            index_on(self.device, tuple(router[site] for site in stack.sites))
            for stack in self.inventory.stacks
        ]

    @property
    def inventory(self) -> Inventory:
        """The skills that are mixed."""
        return self._parts[0]

    @property
    def routes(self) -> Routes:
        """The table that says how."""
        return self._parts[1]

    @property
    def sites(self) -> tuple[Site, ...]:
        """The layers that it mixes for."""
        return self._parts[2]

    def train(self, mode: bool = True) -> Self:
        """Switch the mode; on a change, forget what was mixed, since `.data` leaves no trace."""
        if mode != self.training:
            self._cache.clear()
        return super().train(mode)

    def mixture(self, route: Route, *, training: bool) -> Mixture:
        """What the layers apply for a batch with these tasks.

        Args:
            route: the tasks.
            training: whether gates are noisy, where the configuration says so.

        Raises:
            InputError: the skills are on the meta device.
        """
        self.check_memory()
        dtype = self._compute_dtype()
        noisy = training and self.config.noisy_in_training and route.per_example
        learned = [*self.inventory.parameters(), *self.routes.parameters()]
        if torch.is_grad_enabled() and any(p.requires_grad for p in learned):
            return self._mix(route, dtype, training=training, per_example=noisy)
        if training and self.config.noisy_in_training:
            return self._mix(route, dtype, training=training, per_example=noisy)
        stamp = (
            [(id(p), p._version, p.data_ptr()) for p in learned],
            self.anneal_progress,
        )
        key = (route, dtype)
        cached = self._cache.get(key)
        if cached is not None and cached[0] == stamp:
            return cached[1]
        # Not in inference mode: what is kept may later meet autograd.
        with torch.inference_mode(False), torch.no_grad():
            mixture = self._mix(route, dtype)
        self._cache[key] = (stamp, mixture)
        while len(self._cache) > CACHED_MIXTURES:
            self._cache.popitem(last=False)
        return mixture

    def check_memory(self) -> None:
        """Make sure that the skills have values.

        Raises:
            InputError: they are on the meta device.
        """
        if self.device.type == "meta":
            raise InputError(
                "the skills are on the meta device, where they have no values: give the model "
                "memory with to_empty(device=...), load the base model's weights, then fill the "
                "skills with load_adapter(folder) or set_phase('random')"
            )

    def _compute_dtype(self) -> torch.dtype:
        if torch.is_autocast_enabled(self.device.type):
            return torch.get_autocast_dtype(self.device.type)
        return self.sites[0].dtype

    def _mix(
        self,
        route: Route,
        dtype: torch.dtype,
        *,
        training: bool = False,
        per_example: bool = False,
    ) -> Mixture:
        rows = route.rows
        # With noise every example has a mixture of its own, else every distinct task has.
        distinct = list(rows) if per_example else list(dict.fromkeys(rows))
        device = self.device
        gather = None
        if 1 < len(distinct) < len(rows):
            position = {row: i for i, row in enumerate(distinct)}
            gather = index_on(device, tuple(position[row] for row in rows))
        with torch.autocast(device.type, enabled=False):
            weights, sets = self._weights(distinct, training=training)
            factors = self.inventory.mix(
                weights, self._routers, sets=sets, gather=gather, dtype=dtype
            )
        if self._has_several_devices:
            factors = [f.to(s.device) for f, s in zip(factors, self.sites, strict=True)]
        return Mixture(factors, len(rows) if len(distinct) > 1 else None)

    def _weights(
        self, rows: Sequence[int], *, training: bool = False
    ) -> tuple[Tensor | None, Tensor | None]:
        """Mixing weights `[U, N, H, K]` of table rows, and the set `[U]` of skills of each.

        Without weights the set has one skill; without sets all skills are one set.
        """
        device = self.device
        if self.config.method == "shared":
            return None, torch.zeros(len(rows), dtype=torch.long, device=device)
        if self.config.method == "private":
            return self._private(rows)
        if self.inventory.num_sets > 1 and MU_ROW in rows:
            raise InputError(
                "slots have no common average: 'mu' cannot be routed while they are open"
            )
        num_skills = self.inventory.num_skills // self.inventory.num_sets
        sets = None if self.inventory.num_sets == 1 else index_on(device, tuple(rows))
        shape = (len(rows), self.num_routers, self.inventory.heads, num_skills)
        if self.routes.logits is None or all(row == MU_ROW for row in rows):
            return uniform_weights(torch.empty(shape, device=device)), sets
        logits = self.routes.gather(rows).view(shape)
        weights = skill_weights(logits.float(), self.config, training=training)
        if self.anneal_progress:
            weights = anneal(weights, self.anneal_progress)
        if MU_ROW in rows:
            is_mu = index_on(device, tuple(row == MU_ROW for row in rows)).bool()
            weights = torch.where(is_mu.view(-1, 1, 1, 1), uniform_weights(weights), weights)
        return weights, sets

    def _private(self, rows: Sequence[int]) -> tuple[Tensor | None, Tensor | None]:
        device = self.device
        if MU_ROW not in rows:
            return None, index_on(device, tuple(rows))
        num_skills = self.inventory.num_skills
        if num_skills == 0:
            raise InputError("no private adapter is left to average: add a task first")
        mean = torch.full((num_skills,), 1.0 / num_skills)
        own = torch.eye(num_skills)
        by_row = torch.stack([mean if row == MU_ROW else own[row] for row in rows]).to(device)
        return by_row[:, None, None].expand(-1, self.num_routers, 1, -1), None

    @torch.no_grad()
    def weights_of(self, row: int) -> Tensor | None:
        """The weights of one table row in evaluation, `[N, H, K]`; None where nothing is mixed."""
        weights, _ = self._weights([row])
        return None if weights is None else weights[0]

    def weights_from(self, logits: Tensor) -> Tensor:
        """The weights in evaluation that logits `[..., N, H, K]` stand for."""
        weights = skill_weights(logits.float(), self.config, training=False)
        return anneal(weights, self.anneal_progress) if self.anneal_progress else weights

    def by_stack(self, weights: Tensor) -> list[Tensor]:
        """Weights `[N, H, K]` of the routers as those of the layers: for each stack `[n, H, K]`."""
        return [weights.index_select(0, router) for router in self._routers]

    @torch.no_grad()
    def factors_of(self, row: int) -> Sequence[Factors]:
        """What each site applies for one table row in evaluation, fp32."""
        self.check_memory()
        return self._mix(Route((row,), per_example=False), torch.float32).factors
