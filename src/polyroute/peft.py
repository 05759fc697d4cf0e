"""Routed layers as a method of PEFT: `get_peft_model(base, MHRConfig(tasks=[...]))`.

Importing this module makes PEFT know the method `MHR`. Each adapted layer owns, for every adapter,
the skills and the routing table of that layer; what they compute is what `polyroute.attach`
computes. The tasks of a batch are given as `model(..., tasks=[...])`, or for any call inside
`with route(model, tasks):`, merging and converting included.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import PeftType, register_peft_method
from torch import Tensor, nn

from polyroute import config
from polyroute.errors import InputError
from polyroute.exchange.peft_mhr import ADAPTERS, SETTINGS
from polyroute.layer.factors import Factors
from polyroute.layer.merging import check_mergeable, fold, restore
from polyroute.layer.routed_layer import RoutedLayer, check_rows
from polyroute.layer.sites import Site, named_sites
from polyroute.routes.inventory import Inventory
from polyroute.routes.mixer import Mixer
from polyroute.routes.table import MU, MU_ROW, Routes
from polyroute.routes.tasks import Route, Tasks, check_batch, find_route

__all__ = ["MHRConfig", "MHRLinear", "MHRModel", "add_tasks", "route"]

METHOD = "mhr"

if METHOD.upper() not in PeftType.__members__:
    # PEFT registers only what its enumeration names, and offers no way to name more.
    _member = str.__new__(PeftType, METHOD.upper())
    _member._name_ = _member._value_ = METHOD.upper()
    setattr(PeftType, METHOD.upper(), _member)
    PeftType._member_map_[METHOD.upper()] = _member
    PeftType._value2member_map_[METHOD.upper()] = _member
    PeftType._member_names_.append(METHOD.upper())


@dataclass
class MHRConfig(PeftConfig):
    """Settings of an adapter: tasks, layers, and what `polyroute.MHRConfig` says of skills.

    Every layer has its own router (`granularity="finegrained"`).

    Raises:
        InputError: a value is out of range, or two values exclude each other.
    """

    tasks: list[str] = field(default_factory=list)
    """Unique names; the order is that of the rows of the routing tables."""
    target_modules: list[str] | str | None = "all-linear"
    """As in PEFT: `"all-linear"`, a list of name endings, or a regular expression."""
    exclude_modules: list[str] | str | None = None
    """Layers to leave out: a list of name endings, or a regular expression."""
    modules_to_save: list[str] | None = None
    """Parts of the base model that are trained and saved as they are, such as a new head."""
    method: config.Method = "mhr"
    adapter: config.Adapter = "lora"
    num_skills: int | None = None
    num_heads: int | None = None
    rank: int = 4
    alpha: float | None = None
    init: config.Init = "mttl"
    dropout: float = 0.0
    gate: config.Gate = "sigmoid"
    normalization: config.Normalization = "sum"
    logit_dropout: float = 0.0
    shared_skill: bool = False

    def __post_init__(self) -> None:
        """Fill in what depends on the method and check every value."""
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = PeftType(METHOD.upper())
        if not isinstance(self.tasks, list | tuple):
            raise InputError(f"tasks must be a list of names, not {self.tasks!r}")
        self.tasks = list(self.tasks)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        for name, value in self.settings().to_dict().items():
            if name in SETTINGS:
                setattr(self, name, value)
        Routes(self.tasks, None)  # refuses names that are repeated, empty or reserved
        if self.method == "private" and not self.tasks:
            raise InputError("method='private' has one skill per task: name at least one task")

    def settings(self) -> config.MHRConfig:
        """The settings of each layer."""
        return config.MHRConfig(**{name: getattr(self, name) for name in SETTINGS})


@dataclass(frozen=True)
class _Opened:
    """The tasks of an open route."""

    tasks: Tasks
    is_own: bool = False
    """Whether it was opened for the block that runs, as when backward recomputes it."""


class _Scopes(threading.local):
    """The routes that are open, in this thread; one object shared by all layers of a model."""

    def __init__(self) -> None:
        self.stack: list[_Opened | None] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Scopes":
        return _Scopes()

    def __reduce__(self) -> tuple[type["_Scopes"], tuple[()]]:
        return _Scopes, ()

    @property
    def now(self) -> _Opened | None:
        return self.stack[-1] if self.stack else None

    @contextmanager
    def opened(self, scope: _Opened | None) -> Iterator[None]:
        depth = len(self.stack)
        self.stack.append(scope)
        try:
            yield
        finally:
            del self.stack[depth:]


@contextmanager
def route(model: nn.Module, tasks: Tasks) -> Iterator[None]:
    """Route every forward inside the `with` block; also what is merged or converted there.

    Blocks nest, close after an error too, and hold for the thread that opens them.

    Args:
        model: a PEFT model, or a transformers model with an adapter of its own, of method MHR.
        tasks: one name or row number for a batch of any size; or one per example, as a list or an
            integer tensor; `"mu"` is the average of the skills; None is the base model alone.

    Raises:
        InputError: an unknown task, or a model without such an adapter.
    """
    layer = next((module for module in model.modules() if isinstance(module, MHRLinear)), None)
    if layer is None:
        raise InputError(f"{type(model).__name__} has no adapter of method MHR to route")
    with layer.scopes.opened(layer.check(tasks)):
        yield


class _LayerAdapter(nn.Module):
    """One adapter of one layer: its skills, its routing table, and what mixes them."""

    def __init__(self, site: Site, settings: config.MHRConfig, tasks: Sequence[str]) -> None:
        super().__init__()
        num_skills = len(tasks) if settings.num_skills is None else settings.num_skills
        shape = (1, settings.heads, num_skills) if settings.has_router else None
        self.skills = Inventory([site], settings, num_skills)
        self.routes = Routes(tasks, shape, config=settings)
        self.mixer = Mixer(settings, self.skills, self.routes, [site], [0])


class MHRLinear(nn.Module, BaseTunerLayer):
    """A base layer, and the skills that each of its adapters mixes for the tasks of the batch.

    By the "Linear" of this name PEFT finds the layer where it looks for all linear ones.
    """

    adapter_layer_names = (ADAPTERS,)

    def __init__(
        self, site: Site, scopes: _Scopes, adapter_name: str, peft_config: MHRConfig
    ) -> None:
        super().__init__()
        self.base_layer = site.layer
        self.site, self.scopes = site, scopes
        self.in_features, self.out_features = site.d_in, site.d_out
        self.mhr_adapters = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._merged_rows: dict[str, int] = {}
        self._unmerged: dict[str, Tensor] = {}
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, peft_config)

    def update_layer(self, adapter_name: str, peft_config: MHRConfig) -> None:
        """Make an adapter of this layer."""
        adapter = _LayerAdapter(self.site, peft_config.settings(), peft_config.tasks)
        self.mhr_adapters[adapter_name] = adapter
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)

    def _adapter(self, name: str) -> _LayerAdapter:
        adapter = self.mhr_adapters[name]
        assert isinstance(adapter, _LayerAdapter)
        return adapter

    def check(self, tasks: Tasks) -> _Opened:
        """What opens a route to these tasks.

        Raises:
            InputError: an active adapter has no such task.
        """
        if isinstance(tasks, Tensor) and not tasks.is_floating_point() and tasks.dim() < 2:
            tasks = tasks.tolist()  # wait for the device once, not in each layer
        for name in self.active_adapters:
            if name in self.mhr_adapters:
                find_route(tasks, self._adapter(name).routes)
        return _Opened(tasks)

    def _route(self, adapter: _LayerAdapter) -> Route | None:
        """The rows of an adapter's table that the open route names; None for the base alone."""
        scope = self.scopes.now
        if (scope is None or not scope.is_own) and torch._C._current_graph_task_id() != -1:
            # Whichever route is open now need not be that of the block's forward.
            raise InputError(
                "a checkpointed block is recomputed without its route: turn checkpointing on with "
                "gradient_checkpointing_enable(), or open the route inside the block"
            )
        if scope is not None:
            return find_route(scope.tasks, adapter.routes)
        if adapter.skills.num_skills != 1 or adapter.mixer.config.method == "private":
            raise InputError(
                "no task is routed: wrap the call in `with polyroute.peft.route(model, tasks):` or "
                "pass tasks=[...], one name per example ('mu' for the average of the skills)"
            )
        return Route((MU_ROW,), per_example=False)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the base layer and what each active adapter mixes for the open route.

        Raises:
            InputError: no route is open, its rows cannot be those of the input, or another task
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
                    layer = self._adapted(layer, self._adapter(name), x)
        return layer(x, *args, **kwargs)  # type: ignore[no-any-return]

    def _adapted(self, layer: Any, adapter: _LayerAdapter, x: Tensor) -> Any:
        """A layer, and on top of it an adapter; a function of the input."""
        opened = self._route(adapter)
        if opened is None:
            return layer
        mixture = adapter.mixer.mixture(opened, training=self.training)
        if mixture.num_examples is not None:
            check_rows(self.site, x, mixture.num_examples)
        dropout = adapter.mixer.config.dropout if self.training else 0.0
        return partial(mixture.factors[0].apply, layer, dropout=dropout)

    def _row(self, name: str) -> int:
        opened = self._route(self._adapter(name))
        if opened is None or len(set(opened.rows)) != 1:
            raise InputError(
                "one task is merged or converted at a time: do it inside "
                "`with polyroute.peft.route(model, task):`"
            )
        return opened.rows[0]

    def _factors(self, name: str) -> Factors:
        """What an adapter applies for the open route's only task, fp32."""
        return self._adapter(name).mixer.factors_of(self._row(name))[0]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the open route's only task adds to the base weight, in the base weight's layout."""
        weight = torch.zeros(self.out_features, self.in_features, device=self.weight.device)
        delta, _ = self._factors(adapter).fold(weight, None)
        return delta.t() if self.site.is_conv1d else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether an adapter adds to the base weight: (IA)^3 does not."""
        return self._adapter(adapter_name).mixer.config.adapter == "lora"

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold the open route's only task into the base weight, in place.

        Raises:
            InputError: not exactly one task is routed; or, with `safe_merge`, the merged weight is
                not finite.
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
        """Restore the base weight, bit for bit; nothing happens where nothing is merged."""
        restore([self.site], self._unmerged)
        self._unmerged, self._merged_rows, self.merged_adapters = {}, {}, []

    def _check_merged(self) -> None:
        if self.scopes.now is None:
            return
        for name, row in self._merged_rows.items():
            opened = self._route(self._adapter(name))
            if opened is None or set(opened.rows) != {row}:
                raise InputError(
                    "another task is merged into the weights: call unmerge_adapter() to route this"
                )


class MHRModel(BaseTuner):
    """The base model inside a PEFT model of method MHR."""

    prefix = METHOD + "_"
    tuner_layer_cls = MHRLinear
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (PEFT declares it so)

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        layers = [m for m in model.modules() if isinstance(m, MHRLinear | RoutedLayer)]
        if any(isinstance(layer, RoutedLayer) for layer in layers):
            raise InputError(
                f"{type(model).__name__} carries an inventory of polyroute.attach: call unload() "
                "on the routed model, or save it and convert it to an adapter of PEFT"
            )
        if layers:
            self._scopes, self._hooks = layers[0].scopes, getattr(self, "_hooks", ())
            return
        self._scopes = _Scopes()
        self._hooks = (
            model.register_forward_pre_hook(partial(_open, self._scopes), with_kwargs=True),
            model.register_forward_hook(partial(_close, self._scopes), always_call=True),
        )

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, MHRConfig)
        # Also of a further adapter, whose heads may be others: whether they divide the widths.
        site = named_sites(parent, [target_name], peft_config.settings())[0]
        if isinstance(target, MHRLinear):
            target.update_layer(adapter_name, peft_config)
            return
        if isinstance(target, BaseTunerLayer):
            raise InputError(
                f"layer {current_key!r} has an adapter of another method of PEFT: unload it first"
            )
        site = replace(site, name=current_key)
        layer = MHRLinear(site, self._scopes, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def generate(self, *args: Any, tasks: Tasks = None, **kwargs: Any) -> Any:
        """Generate with the base model; `tasks` as in `route`, one per prompt."""
        with nullcontext() if tasks is None else route(self, tasks):
            return self.model.generate(*args, **kwargs)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()  # type: ignore[no-untyped-call]
        sites = [module.site for module in self.model.modules() if isinstance(module, MHRLinear)]
        check_mergeable(self.model, sites)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for hook in self._hooks:
            hook.remove()
        return model

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f".{ADAPTERS}.{adapter_name}.", f".{ADAPTERS}.")


register_peft_method(name=METHOD, config_cls=MHRConfig, model_cls=MHRModel)


def _open(
    scopes: _Scopes, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before the base model's forward: open the route it was given, or stay in the open one."""
    tasks = kwargs.pop("tasks", None)
    scopes.stack.append(scopes.now)  # `_close` takes it away, also where the following raises
    if model.training and torch.is_grad_enabled():
        _keep_routes(model, scopes)
    if tasks is not None:
        layer = next(module for module in model.modules() if isinstance(module, MHRLinear))
        scopes.stack[-1] = scope = layer.check(tasks)
        if not isinstance(scope.tasks, str | int | None):
            check_batch(len(scope.tasks), args, kwargs)
    return args, kwargs


def _close(scopes: _Scopes, *_: Any) -> None:
    scopes.stack.pop()


def _keep_routes(model: nn.Module, scopes: _Scopes) -> None:
    """Let blocks that backward recomputes, reentrantly or not, see the route of their forward."""
    for module in model.modules():
        run = vars(module).get("_gradient_checkpointing_func")
        if run is not None and getattr(run, "func", None) is not _checkpointed:
            vars(module)["_gradient_checkpointing_func"] = partial(_checkpointed, scopes, run)


def _checkpointed(scopes: _Scopes, run: Any, block: Any, *args: Any, **kwargs: Any) -> Any:
    scope = scopes.now
    own = None if scope is None else replace(scope, is_own=True)

    def routed(*args: Any, **kwargs: Any) -> Any:
        with scopes.opened(own):
            return block(*args, **kwargs)

    return run(routed, *args, **kwargs)


def add_tasks(
    model: nn.Module,
    names: Sequence[str],
    init: str = "uniform",
    *,
    adapter_name: str = "default",
) -> None:
    """Append tasks to an adapter; every other task stays as it is.

    Make the optimizer afterwards: the routing tables are new parameters.

    Args:
        model: as in `route`.
        names: new names.
        init: `"uniform"` starts near the average of the skills, another task's name copies its
            routes.
        adapter_name: the adapter.

    Raises:
        InputError: a name exists or is reserved, or there is no such task to copy, or adapter.
    """
    if isinstance(names, str):
        raise InputError(f"names must be a list of tasks, not the single string {names!r}")
    settings = getattr(model, "peft_config", {}).get(adapter_name)
    if not isinstance(settings, MHRConfig):
        raise InputError(f"{type(model).__name__} has no adapter {adapter_name!r} of method MHR")
    for layer in model.modules():
        if isinstance(layer, MHRLinear) and adapter_name in layer.mhr_adapters:
            adapter = layer._adapter(adapter_name)
            routes = adapter.routes
            copied = None if init in ("uniform", MU) else routes.row(init)
            is_routed = copied is not None and routes.logits is not None
            routes.add(names, routes[init] if is_routed else None)
            if settings.method == "private":
                for _ in names:
                    adapter.skills.add_skill(copied)
    settings.tasks = [*settings.tasks, *names]
