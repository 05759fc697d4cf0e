"""The mixer: from the route of a forward to the mixture that its layers apply."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from polyroute.config import MHRConfig
from polyroute.errors import InputError
from polyroute.layer.factors import Factors, PlainFactors, Segments
from polyroute.layer.gated import Gate
from polyroute.layer.open_route import BASE_ALONE, Mixture
from polyroute.layer.sites import Site
from polyroute.routes.averaging import Averaged
from polyroute.routes.index import index_on
from polyroute.routes.inventory import Inventory
from polyroute.routes.kept_rows import KeptRows
from polyroute.routes.rule import Batch, Gates, RouteRule
from polyroute.routes.table import MU, MU_ROW, RoutingTable
from polyroute.routes.tasks import BASE_ROW, Route, check_list, with_rows
from polyroute.routes.weights import anneal, skill_weights

__all__ = ["Mixer"]

CACHED_MIXTURES = 2
"""The number of mixtures that are kept."""


class Mixer(nn.Module):
    """Makes, once per forward, the mixture that all layers apply for the tasks of the batch.

    If the rule depends on the task alone, the skills are mixed for the distinct tasks of the batch.
    A mixture without gradients is kept until a parameter changes (in place, by a load, or by a move
    to another device) or the mode changes between training and evaluation.

    Args:
        config: the settings of the adapter.
        inventory: the skills.
        table: the tasks and, if they are routed by learned logits, their rows.
        rule: chooses skills for a batch.
        routers: the names of the routers, in the order of the first axis of a row.
        router_of_site: the number of each site's router.

    Attributes:
        config: as given; phase `mu` replaces it.
        routers: as given.
        router_of_site: as given.
        anneal_progress: 0 mixes as learned, 1 uniformly; a trainer sets it.
        gates: those that rules had, while they are recorded; else None.
    """

    def __init__(
        self,
        config: MHRConfig,
        inventory: Inventory,
        table: RoutingTable,
        rule: RouteRule,
        routers: Sequence[str],
        router_of_site: Sequence[int],
    ) -> None:
        super().__init__()
        self.config = config
        # In a tuple, because torch would register them here as well as in the model.
        self._parts = (inventory, table, rule)
        self._has_several_devices = len({site.device for site in inventory.sites}) > 1
        self.router_of_site = tuple(router_of_site)
        self._router_of_layer = [
            tuple(router_of_site[site] for site in stack.sites) for stack in inventory.stacks
        ]
        self.routers = tuple(routers)
        self.anneal_progress = 0.0
        self.averaged: Averaged | None = None
        self.gates: list[Gates] | None = None
        self._cache: OrderedDict[Any, tuple[Any, Mixture]] = OrderedDict()
        self._kept = KeptRows()

    @property
    def inventory(self) -> Inventory:
        """The skills that are mixed."""
        return self._parts[0]

    @property
    def table(self) -> RoutingTable:
        """The tasks and, if they are routed by learned logits, their rows."""
        return self._parts[1]

    @property
    def rule(self) -> RouteRule:
        """The rule, which chooses skills for a batch."""
        return self._parts[2]

    @property
    def sites(self) -> tuple[Site, ...]:
        """The adapted layers."""
        return self.inventory.sites

    @property
    def shape(self) -> tuple[int, int, int]:
        """The numbers of routers, of heads and of skills in one set: `(N, H, K)`."""
        inventory = self.inventory
        return len(self.routers), inventory.heads, inventory.num_skills // inventory.num_sets

    @property
    def device(self) -> torch.device:
        """The device that holds the skills and mixes them."""
        return self.inventory.like.device

    def learned(self) -> list[nn.Parameter]:
        """All parameters that can train: of the skills, the rule, the table or its touched rows."""
        return [*self.inventory.parameters(), *self.table.parameters(), *self.rule.parameters()]

    def become(self, config: MHRConfig, rule: RouteRule) -> None:
        """Replace the settings and the rule, in place, after the inventory was changed."""
        self.config = config
        self._parts = (self.inventory, self.table, rule)

    def forget(self) -> None:
        """Drop what is kept of former forwards."""
        self._cache.clear()
        self._kept = KeptRows()

    def train(self, mode: bool = True) -> Self:
        """Switch the mode; a change drops the kept mixtures.

        This catches changes through `.data`, which parameters do not record.
        """
        if mode != self.training:
            self.forget()
        return super().train(mode)

    # ---------------------------------------------------------------- tasks

    def add_tasks(self, names: Sequence[str], init: str | Tensor) -> list[int]:
        """Append tasks; see `RoutedModel.add_tasks`."""
        check_list(names, "names must be a list of tasks")
        values: Tensor | None = None
        source: int | None = None
        if not isinstance(init, str | int | None):
            values = init
            if self.table.logits is None:
                raise InputError(
                    f"tasks of method {self.config.method!r} have no routing logits: init must be "
                    "'uniform' or a task name"
                )
        elif init not in ("uniform", MU):
            source = self.table.row(init)
            values = self.table[init] if self.table.logits is not None else None
        rows = self.table.add(list(names), values)
        if self.rule.owns_skills:
            for _ in rows:
                self.inventory.add_skill(source)
        return rows

    def keep_tasks(self, names: Sequence[str]) -> None:
        """Drop all other tasks; see `RoutedModel.keep_tasks`."""
        check_list(names, "names must be a list of tasks")
        rows = self.table.keep(tuple(names))
        if self.rule.owns_skills:
            self.inventory.keep_skills(rows)

    # ---------------------------------------------------------------- one forward

    def mixture(self, route: Route | None, *, training: bool, mask: Tensor | None) -> Mixture:
        """What the layers apply in one forward.

        Args:
            route: what the open block routes; None if no block is open.
            training: whether gates are noisy, provided the settings ask for noise.
            mask: the attention mask of the base model's call; None without one.

        Raises:
            InputError: the skills are on the meta device, or the rule needs tasks and `route` is
                None.
        """
        if route is None:
            if self.rule.needs_tasks:
                raise InputError(
                    "no task is routed: wrap the call in `with model.route(tasks):` or pass "
                    "tasks=[...], one name per example ('mu' for the average of the skills)"
                )
            if self.rule.is_fixed:
                route = Route((MU_ROW,), per_example=False)
        elif route.rows is None or set(route.rows) == {BASE_ROW}:
            return BASE_ALONE
        self.inventory.check_memory()
        dtype = self._compute_dtype()
        rule = self.rule if route is None or route.rule is None else route.rule
        if rule is self.rule and route is not None:
            if rule.is_fixed or set(route.rows or ()) == {MU_ROW}:
                return self._fixed(route, dtype, training=training)
            for row, shown in ((MU_ROW, "'mu'"), (BASE_ROW, "None")):
                if row in (route.rows or ()):
                    raise InputError(
                        f"{shown} cannot share a batch with other tasks under the rule "
                        f"{rule.name!r}, which looks at the input: route it in a batch of its own"
                    )
        return self._chosen_by(rule, Batch(route, mask, training, dtype, self.gates))

    def _chosen_by(self, rule: RouteRule, batch: Batch) -> Mixture:
        """The mixture of a rule that looks at more than the task."""
        segments = None if batch.route is None else batch.route.segments
        factors = rule.factors(batch, self)
        counts = {n for one in factors if (n := one.num_examples) is not None}
        if len(counts) > 1:
            raise InputError(
                f"the rule {rule.name!r} gave factors for {sorted(counts)} examples: give all "
                "sites factors for the same examples"
            )
        return self._mixture_of(factors, next(iter(counts), None), segments)

    def _fixed(self, route: Route, dtype: torch.dtype, *, training: bool) -> Mixture:
        """The mixture of rows of the table, which is kept unless something trains."""
        is_noisy = training and self.config.noisy_in_training
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.learned())
        if trains or is_noisy:
            per_example = is_noisy and route.per_example
            return self._mix_route(route, dtype, training=training, per_example=per_example)
        if self._kept.fits(route, self):
            with torch.autocast(self.device.type, enabled=False):
                found = self._kept.factors(route, self, dtype)
            return self._mixture_of(found, len(route.rows or ()), route.segments)
        stamp = (
            [(id(p), p._version, p.data_ptr()) for p in self.learned()],
            self.anneal_progress,
        )
        key = (route, dtype)
        cached = self._cache.get(key)
        if cached is not None and cached[0] == stamp:
            return cached[1]
        # Not in inference mode, because autograd may use a kept mixture later.
        with torch.inference_mode(False), torch.no_grad():
            mixture = self._mix_route(route, dtype)
        self._cache[key] = (stamp, mixture)
        while len(self._cache) > CACHED_MIXTURES:
            self._cache.popitem(last=False)
        return mixture

    def _compute_dtype(self) -> torch.dtype:
        dtype = self.sites[0].dtype
        if dtype == torch.float64 or not torch.is_autocast_enabled(self.device.type):
            return dtype  # autocast leaves float64 as it is
        return torch.get_autocast_dtype(self.device.type)

    def _mix_route(
        self,
        route: Route,
        dtype: torch.dtype,
        *,
        training: bool = False,
        per_example: bool = False,
    ) -> Mixture:
        rows = route.rows
        assert rows is not None
        if self.rule.same_for_all(self) and BASE_ROW not in rows:
            rows = rows[:1]
        # With noise each example has a mixture of its own; otherwise each distinct task has one.
        distinct = list(rows) if per_example else list(dict.fromkeys(rows))
        gather = None
        if 1 < len(distinct) < len(rows):
            position = {row: i for i, row in enumerate(distinct)}
            gather = index_on(self.device, tuple(position[row] for row in rows))
        with torch.autocast(self.device.type, enabled=False):
            factors = self.mix_rows(distinct, dtype, training=training, gather=gather)
        return self._mixture_of(factors, factors[0].num_examples, route.segments)

    def mix_rows(
        self,
        rows: Sequence[int],
        dtype: torch.dtype,
        *,
        training: bool = False,
        gather: Tensor | None = None,
    ) -> Sequence[PlainFactors]:
        """The factors of each site for rows of the table, as of `Inventory.mix`."""
        if self.rule.is_fixed:
            choice = self.rule.choose(with_rows(rows), self, training=training)
            weights, sets = choice.weights, choice.sets
        else:  # `rows` hold the average alone, which does not depend on the rule
            weights, sets = self.uniform(len(rows)), None
        mixed = self.inventory.mix(weights, self._routers, sets=sets, gather=gather, dtype=dtype)
        if BASE_ROW not in rows:
            return mixed
        is_base = index_on(self.device, tuple(row == BASE_ROW for row in rows)).bool()
        is_base = is_base if gather is None else is_base[gather]
        return [own.without(is_base.to(own.device)) for own in mixed]

    def _mixture_of(
        self, factors: Sequence[Factors], count: int | None, segments: Segments | None
    ) -> Mixture:
        if self._has_several_devices:
            factors = [f.to(site.device) for f, site in zip(factors, self.sites, strict=True)]
        return Mixture(factors, count, segments if count else None)

    # ---------------------------------------------------------------- for rules

    def mix(self, weights: Tensor, batch: Batch) -> Sequence[Factors]:
        """The factors of each site, for weights that are known before the layers run.

        Args:
            weights: `[B, N, H, K]`, one mixture for each example, or `[1, N, H, K]` for all.
            batch: the batch of the forward.
        """
        with torch.autocast(self.device.type, enabled=False):
            exact = self.exact(weights)
            return self.inventory.mix(exact, self._routers, dtype=batch.dtype)

    def gated(
        self,
        site: int,
        gate: Gate,
        batch: Batch,
        *,
        per_example: bool = False,
        top_k: int | None = None,
    ) -> Factors:
        """The factors of one site, for weights that are a function of its input.

        The arguments are those of `polyroute.routes.inventory.Inventory.gated`, with the batch of
        the forward in place of a type.
        """
        return self.inventory.gated(
            site, gate, per_example=per_example, top_k=top_k, dtype=batch.dtype
        )

    def uniform(self, count: int) -> Tensor:
        """The weights of the average of the skills, `[count, N, H, K]`."""
        return self.inventory.like.new_full((count, *self.shape), 1.0 / self.shape[-1])

    def exact(self, numbers: Tensor) -> Tensor:
        """Numbers in the type that weights are computed in: fp32, or fp64 if the skills are."""
        return numbers.to(torch.promote_types(self._exact_dtype, numbers.dtype))

    @property
    def _exact_dtype(self) -> torch.dtype:
        skills = torch.promote_types(self.inventory.like.dtype, torch.float32)
        return torch.promote_types(skills, self.sites[0].dtype)

    @property
    def _routers(self) -> list[Tensor]:
        """For each stack `[n]`, the router of each of its layers."""
        # Not kept as buffers, because a buffer loses its values on the way from the meta device.
        device = self.device
        return [index_on(device, routers) for routers in self._router_of_layer]

    # ---------------------------------------------------------------- one task

    @torch.no_grad()
    def weights_of(self, row: int) -> Tensor | None:
        """The weights of one row of the table in evaluation, `[N, H, K]`.

        Args:
            row: its number, or `MU_ROW`.

        Returns:
            The weights; None if the rule takes a skill whole.

        Raises:
            InputError: the rule looks at more than the task.
        """
        if row == MU_ROW and not self.rule.is_fixed:
            return self.uniform(1)[0]
        self.rule.check_fixed("shown as weights")
        weights = self.rule.choose([row], self, training=False).weights
        return None if weights is None else weights[0]

    def weights_from(self, logits: Tensor, *, training: bool = False) -> Tensor:
        """The weights that logits `[..., N, H, K]` give, annealed by `anneal_progress`.

        Args:
            logits: as in the rows of the table.
            training: whether gates are noisy, provided the settings ask for noise.
        """
        weights = skill_weights(self.exact(logits), self.config, training=training)
        return anneal(weights, self.anneal_progress) if self.anneal_progress else weights

    def by_stack(self, weights: Tensor) -> list[Tensor]:
        """The weights `[N, H, K]` of routers as weights `[n, H, K]` of the layers of each stack."""
        return [weights.index_select(0, router) for router in self._routers]

    @torch.no_grad()
    def factors_of(
        self, rows: int | Sequence[int], use: str = "exported"
    ) -> Sequence[PlainFactors]:
        """The factors of each site for one row of the table in evaluation, in fp32 at least.

        Args:
            rows: its number, or `MU_ROW`; of several the tensors begin with an axis for them.
            use: the use of the adapter, such as `"merged"`, for the message.

        Raises:
            InputError: the rule looks at more than the task, so there is no such adapter.
        """
        self.inventory.check_memory()
        chosen = [rows] if isinstance(rows, int) else rows
        if set(chosen) != {MU_ROW}:
            self.rule.check_fixed(use)
        return self.mix_rows(chosen, self._exact_dtype)
