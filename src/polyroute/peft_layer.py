"""The layer of `polyroute.peft`: a base layer, and the skills of each of its adapters."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from polyroute.config import MHRConfig
from polyroute.errors import InputError
from polyroute.exchange.peft_mhr import ADAPTERS
from polyroute.layer.factors import PlainFactors
from polyroute.layer.merging import fold, restore
from polyroute.layer.open_route import OpenRoutes, is_in_backward
from polyroute.layer.routed_layer import check_input, check_part
from polyroute.layer.sites import Site
from polyroute.routes.inventory import Inventory
from polyroute.routes.mixer import Mixer
from polyroute.routes.table import MU_ROW, RoutingTable
from polyroute.routes.table_rules import rule_of
from polyroute.routes.tasks import Route, Tasks, find_route

__all__ = ["LayerAdapter", "MHRLinear", "Opened", "opened_now"]

AVERAGE = Route((MU_ROW,), per_example=False)
"""The route of the average of the skills."""


@dataclass(frozen=True)
class Opened:
    """The tasks of an open route; each layer finds their rows in the tables of its adapters."""

    tasks: Tasks
    """The tasks as the caller named them."""
    per_example: bool
    """Whether `tasks` names one task per example."""
    media_fit: bool = False
    """Whether every example is known to have as many images and sounds as every other."""
    is_own: bool = False
    """Whether the route was opened for the running layers alone, because backward recomputes them.
    """


def opened_now(open_routes: OpenRoutes) -> Opened | None:
    """The tasks that the running forward was given, or those of the block that the caller is in."""
    if open_routes.running:
        opened: Opened | None = open_routes.running[-1]
        return opened
    block = open_routes.now()
    return None if block is None else block.value


class LayerAdapter(nn.Module):
    """One adapter of one layer: its skills, its routing table, its rule and its mixer."""

    def __init__(self, site: Site, settings: MHRConfig, tasks: Sequence[str]) -> None:
        super().__init__()
        num_skills = settings.skills_for(len(tasks))
        self.rule = rule_of(settings)
        shape = (1, settings.heads, num_skills) if self.rule.has_table else None
        self.skills = Inventory([site], settings, num_skills)
        self.routes = RoutingTable(tasks, shape, next(self.skills.parameters()), settings)
        self.mixer = Mixer(settings, self.skills, self.routes, self.rule, [site.name], [0])


class MHRLinear(nn.Module, BaseTunerLayer):
    """A base layer, and the skills that each of its adapters mixes for the tasks of the batch.

    PEFT recognises the layer by the "Linear" in its name when it looks for all linear layers.

    Args:
        site: the base layer and what is known of it.
        open_routes: the open routes of the model.
        adapter_name: the name of the first adapter.
        peft_config: the settings of that adapter, a `polyroute.peft.MHRConfig`.
    """

    adapter_layer_names = (ADAPTERS,)

    def __init__(
        self, site: Site, open_routes: OpenRoutes, adapter_name: str, peft_config: Any
    ) -> None:
        super().__init__()
        self.base_layer = site.layer
        self.site, self.open_routes = site, open_routes
        self.in_features, self.out_features = site.d_in, site.d_out
        self.mhr_adapters = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._merged_rows: dict[str, int] = {}
        self._unmerged: dict[str, Tensor] = {}
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, peft_config)

    def update_layer(self, adapter_name: str, peft_config: Any) -> None:
        """Add an adapter to this layer."""
        adapter = LayerAdapter(self.site, peft_config.settings(), peft_config.tasks)
        self.mhr_adapters[adapter_name] = adapter
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)

    def adapter(self, name: str) -> LayerAdapter:
        """One adapter of this layer, by its name."""
        adapter = self.mhr_adapters[name]
        assert isinstance(adapter, LayerAdapter)
        return adapter

    def opened(self, tasks: Tasks) -> Opened:
        """The value of a block that routes tasks.

        Raises:
            InputError: an active adapter has no such task.
        """
        if isinstance(tasks, Tensor) and not tasks.is_floating_point() and tasks.dim() < 2:
            tasks = tasks.tolist()  # wait for the device here once, not in each layer
        per_example = False
        for name in self.active_adapters:
            if name in self.mhr_adapters:
                per_example = find_route(tasks, self.adapter(name).routes).per_example
        return Opened(tasks, per_example)

    def _route(self, adapter: LayerAdapter) -> Route | None:
        """The open route in the table of an adapter; None if none is open and none is needed."""
        opened = opened_now(self.open_routes)
        if (opened is None or not opened.is_own) and is_in_backward():
            # Backward recomputes this layer, and the open route need not be that of its forward.
            raise InputError(
                "a checkpointed block is recomputed without its route: turn checkpointing on with "
                "gradient_checkpointing_enable(), or open the route inside the block"
            )
        if opened is not None:
            return find_route(opened.tasks, adapter.routes)
        if adapter.rule.needs_tasks:
            raise InputError(
                "no task is routed: wrap the call in `with polyroute.peft.route(model, tasks):` or "
                "pass tasks=[...], one name per example ('mu' for the average of the skills)"
            )
        return None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the base layer, and the mixture of each active adapter for the open route.

        Raises:
            InputError: no route is open, the input cannot be that of its examples, or another task
                is merged.
        """
        layer: Any = self.base_layer
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
        elif self.merged:
            self._check_merged()
        else:
            for name in self.active_adapters:
                if name in self.mhr_adapters:
                    layer = self._adapted(layer, self.adapter(name), x)
        return layer(x, *args, **kwargs)  # type: ignore[no-any-return]

    def _adapted(self, layer: Any, adapter: LayerAdapter, x: Tensor) -> Any:
        """A layer with an adapter on top, as a function of the input."""
        route = self._route(adapter)
        mixture = adapter.mixer.mixture(route, training=self.training, mask=None)
        if not mixture.factors:
            return layer
        if mixture.num_examples is not None:
            opened = opened_now(self.open_routes)
            mixture = replace(mixture, media_fit=opened is not None and opened.media_fit)
            check_input(self.site, x, mixture)
            if not self.open_routes.running:
                check_part(x, mixture.num_examples)
        dropout = adapter.mixer.config.dropout if self.training else 0.0
        return partial(mixture.factors[0].apply, layer, dropout=dropout)

    def _row(self, name: str) -> int:
        """The row of the only task that the open route names, in the table of an adapter."""
        rows = (self._route(self.adapter(name)) or AVERAGE).rows
        if rows is None or len(set(rows)) != 1:
            raise InputError(
                "one task is merged or converted at a time: do it inside "
                "`with polyroute.peft.route(model, task):`"
            )
        return rows[0]

    def _factors(self, name: str) -> PlainFactors:
        """The factors of an adapter for the only task of the open route, in fp32 at least."""
        return self.adapter(name).mixer.factors_of(self._row(name))[0]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update of the base weight by the open route's only task, in the weight's layout."""
        weight = torch.zeros(self.out_features, self.in_features, device=self.weight.device)
        delta, _ = self._factors(adapter).fold(weight, None)
        return delta.t() if self.site.is_conv1d else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether an adapter adds to the base weight, which (IA)^3 does not."""
        return self.adapter(adapter_name).mixer.config.adapter == "lora"

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold the open route's only task into the base weight, in place.

        Raises:
            InputError: the open route does not name exactly one task, or `safe_merge` is set and
                the merged weight is not finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.mhr_adapters:
                continue
            row = self._row(name)
            before = fold([self.site], [self._factors(name)])
            if safe_merge and not self.weight.isfinite().all():
                restore([self.site], before)
                raise InputError(
                    f"adapter {name!r} is not merged: the weight of layer {self.site.name!r} "
                    "would not be finite"
                )
            self._unmerged = {**before, **self._unmerged}
            self._merged_rows[name] = row
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Restore the base weight, bit for bit; do nothing if no task is merged."""
        restore([self.site], self._unmerged)
        self._unmerged, self._merged_rows, self.merged_adapters = {}, {}, []

    def _check_merged(self) -> None:
        if opened_now(self.open_routes) is None:
            return
        for name, row in self._merged_rows.items():
            route = self._route(self.adapter(name))
            if route is None or set(route.rows or ()) != {row}:
                raise InputError(
                    "another task is merged into the weights: call unmerge_adapter() to route this "
                    "one"
                )
