"""Routed layers as a method of PEFT: `get_peft_model(base, MHRConfig(tasks=[...]))`.

Importing this module registers the method `MHR` with PEFT. Each adapted layer owns the skills and
the routing table of every adapter for that layer, and computes what `polyroute.attach` computes. A
call names the tasks of its batch with `model(..., tasks=[...])`, or stands inside
`with route(model, tasks):`, which also holds for merging and converting.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, make_dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

try:
    from peft.config import PeftConfig
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils import PeftType, register_peft_method
except ImportError as error:
    raise ImportError("polyroute.peft needs PEFT: pip install polyroute[peft]") from error

from polyroute import config
from polyroute.config import LAYER_SETTINGS
from polyroute.errors import InputError
from polyroute.exchange.peft_mhr import ADAPTERS
from polyroute.layer.media import media_fit_examples, media_modules
from polyroute.layer.merging import check_mergeable
from polyroute.layer.open_route import OpenRoutes
from polyroute.layer.routed_layer import RoutedLayer
from polyroute.layer.sites import find_sites, named_sites
from polyroute.peft_layer import MHRLinear, Opened, opened_now
from polyroute.routes.table import RoutingTable
from polyroute.routes.tasks import Tasks, check_batch, named_inputs
from polyroute.task_names import check_name

__all__ = ["MHRConfig", "MHRLinear", "MHRModel", "add_tasks", "route"]

METHOD = "mhr"
"""The name of the method in PEFT."""

if METHOD.upper() not in PeftType.__members__:
    # PEFT registers only members of its enumeration, and has no function that adds a member.
    _member = str.__new__(PeftType, METHOD.upper())
    _member._name_ = _member._value_ = METHOD.upper()
    setattr(PeftType, METHOD.upper(), _member)
    PeftType._member_map_[METHOD.upper()] = _member
    PeftType._value2member_map_[METHOD.upper()] = _member
    PeftType._member_names_.append(METHOD.upper())


_LayerSettings: Any = make_dataclass(
    "_LayerSettings",
    [(f.name, f.type, f.default) for f in fields(config.MHRConfig) if f.name in LAYER_SETTINGS],
    bases=(PeftConfig,),
)
"""The settings of every adapter of PEFT, and those settings of `polyroute.MHRConfig` that concern a
single layer."""


@dataclass
class MHRConfig(_LayerSettings):  # type: ignore[misc]
    """Settings of an adapter: its tasks, its layers, and the skills as in `polyroute.MHRConfig`.

    Every layer has its own router (`granularity="finegrained"`).

    Raises:
        InputError: a value is out of range, or two values exclude each other.
    """

    tasks: list[str] = field(default_factory=list)
    """Unique names, in the order of the rows of the routing tables."""
    target_modules: list[str] | str | None = "all-linear"
    """As in PEFT: `"all-linear"`, a list of name endings, or a regular expression."""
    exclude_modules: list[str] | str | None = None
    """The layers to leave out: a list of name endings, or a regular expression."""
    modules_to_save: list[str] | None = None
    """Whole modules of the base model that train and are saved, such as a new head."""

    def __post_init__(self) -> None:
        """Check every value, and fill in defaults that depend on the method."""
        super().__post_init__()
        self.peft_type = PeftType(METHOD.upper())
        if not isinstance(self.tasks, list | tuple):
            raise InputError(f"tasks must be a list of names, not {self.tasks!r}")
        self.tasks = list(self.tasks)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        for name, value in self.settings().to_dict().items():
            if name in LAYER_SETTINGS:
                setattr(self, name, value)
        for task in self.tasks:
            check_name(task)
        RoutingTable(self.tasks, None)  # raises if a name is repeated or reserved
        if self.method == "private" and not self.tasks:
            raise InputError("method='private' has one skill per task: name at least one task")

    def settings(self) -> config.MHRConfig:
        """The settings of each layer."""
        return config.MHRConfig(**{name: getattr(self, name) for name in LAYER_SETTINGS})


@contextmanager
def route(model: nn.Module, tasks: Tasks) -> Iterator[None]:
    """Route every forward, merge and conversion inside the `with` block.

    Blocks nest, and they close after an error too. A block holds for the code inside it: threads,
    coroutines and generators that take turns each have their own.

    Args:
        model: a PEFT model with an adapter of method MHR, or a transformers model that loaded one.
        tasks: one name or row number for a batch of any size; or one per example, as a list or an
            integer tensor; `"mu"` is the average of the skills; None is the base model alone.

    Raises:
        InputError: a task is unknown, or the model has no adapter of method MHR.
    """
    layer = _first_layer(model)
    if layer is None:
        raise InputError(
            f"{type(model).__name__} has no adapter of method MHR to route: make one with "
            "get_peft_model(model, MHRConfig(tasks=[...]))"
        )
    with layer.open_routes.open(layer.opened(tasks)):
        yield


def _first_layer(model: nn.Module) -> MHRLinear | None:
    return next((module for module in model.modules() if isinstance(module, MHRLinear)), None)


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
        self._media = media_modules(model)
        assert isinstance(peft_config, MHRConfig)
        if self._media and peft_config.target_modules == "all-linear":
            peft_config.target_modules = _language_layers(model, peft_config)
        if layers:
            self._open_routes, self._hooks = layers[0].open_routes, getattr(self, "_hooks", ())
            return
        self._open_routes = OpenRoutes()
        if hasattr(model, "generate"):
            vars(model)["generate"] = partial(
                _generate, self._open_routes, bool(self._media), model
            )
        self._hooks = (
            model.register_forward_pre_hook(
                partial(_before_forward, self._open_routes, bool(self._media)), with_kwargs=True
            ),
            model.register_forward_hook(
                partial(_after_forward, self._open_routes), always_call=True
            ),
        )

    def _create_and_replace(  # noqa: PLR0913 (the signature is PEFT's)
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
        # This checks for every adapter whether its number of heads divides the widths.
        site = named_sites(parent, [target_name], peft_config.settings())[0]
        if isinstance(target, MHRLinear):
            target.update_layer(adapter_name, peft_config)
            return
        if isinstance(target, BaseTunerLayer):
            raise InputError(
                f"layer {current_key!r} has an adapter of another method of PEFT: unload it first"
            )
        site = replace(site, name=current_key, sees_media=id(target) in self._media)
        layer = MHRLinear(site, self._open_routes, adapter_name, peft_config)
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
        vars(self.model).pop("generate", None)
        return model

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f".{ADAPTERS}.{adapter_name}.", f".{ADAPTERS}.")


register_peft_method(name=METHOD, config_cls=MHRConfig, model_cls=MHRModel)


@contextmanager
def _running(open_routes: OpenRoutes, opened: Opened | None) -> Iterator[None]:
    open_routes.running.append(opened)
    try:
        yield
    finally:
        open_routes.running.pop()


def _before_forward(
    open_routes: OpenRoutes,
    has_media: bool,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Open the route that the base model's forward was given, or stay in the open one."""
    tasks = kwargs.pop("tasks", None)
    is_generating = bool(open_routes.running)  # `generate` repeats each example for its beams
    opened = opened_now(open_routes)
    open_routes.running.append(opened)  # `_after_forward` removes it, even after an error below
    if model.training and torch.is_grad_enabled():
        _keep_routes(model, open_routes)
    if tasks is not None:
        layer = _first_layer(model)
        assert layer is not None
        open_routes.running[-1] = opened = layer.opened(tasks)
    if opened is not None and opened.per_example:
        inputs = named_inputs(model.forward, args, kwargs)
        if tasks is not None or not is_generating:
            _check_batch(opened, model, inputs, has_media=has_media)
        if has_media:
            open_routes.running[-1] = _with_media(opened, model, inputs)
    return args, kwargs


def _after_forward(open_routes: OpenRoutes, *_: Any) -> None:
    open_routes.running.pop()


def _generate(
    open_routes: OpenRoutes,
    has_media: bool,
    model: Any,
    *args: Any,
    tasks: Tasks = None,
    **kwargs: Any,
) -> Any:
    """The base model's own `generate`, with a check that there are as many prompts as tasks."""
    layer = _first_layer(model)
    opened = opened_now(open_routes) if tasks is None or layer is None else layer.opened(tasks)
    if opened is not None and opened.per_example:
        inputs = named_inputs(type(model).generate, (model, *args), kwargs)
        inputs.pop("self", None)
        _check_batch(opened, model, inputs, has_media=has_media)
        if has_media:
            opened = _with_media(opened, model, inputs)
    with _running(open_routes, opened) if opened is not None else nullcontext():
        return type(model).generate(model, *args, **kwargs)


def _check_batch(
    opened: Opened, model: nn.Module, inputs: Mapping[str, Any], *, has_media: bool
) -> None:
    main = getattr(model, "main_input_name", "")
    check_batch(_count(opened), inputs, main=main, has_media=has_media)


def _with_media(opened: Opened, model: nn.Module, inputs: Mapping[str, Any]) -> Opened:
    """A route that knows whether the images of a batch show whose they are."""
    if not any(isinstance(m, MHRLinear) and m.site.sees_media for m in model.modules()):
        return opened
    return replace(opened, media_fit=media_fit_examples(model, inputs, _count(opened)))


def _count(opened: Opened) -> int:
    tasks: Any = opened.tasks
    return len(tasks) if hasattr(tasks, "__len__") else len(list(tasks))


def _language_layers(model: nn.Module, peft_config: MHRConfig) -> Any:
    """The layers of a multimodal model that `all-linear` adapts."""
    adapted = {name for name, m in model.named_modules() if isinstance(m, MHRLinear)}
    return adapted or {site.name for site in find_sites(model, peft_config.settings())}


def _keep_routes(model: nn.Module, open_routes: OpenRoutes) -> None:
    """Make layers that backward recomputes, reentrantly or not, see the route of their forward."""
    for module in model.modules():
        run = vars(module).get("_gradient_checkpointing_func")
        if run is not None and getattr(run, "func", None) is not _checkpointed:
            vars(module)["_gradient_checkpointing_func"] = partial(_checkpointed, open_routes, run)


def _checkpointed(open_routes: OpenRoutes, run: Any, block: Any, *args: Any, **kwargs: Any) -> Any:
    opened = opened_now(open_routes)
    own = None if opened is None else replace(opened, is_own=True)

    def routed(*args: Any, **kwargs: Any) -> Any:
        with _running(open_routes, own):
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

    The routing tables become new parameters, so make the optimizer afterwards.

    Args:
        model: as in `route`.
        names: new names.
        init: `"uniform"` starts near the average of the skills, and the name of another task
            copies its rows.
        adapter_name: the adapter.

    Raises:
        InputError: a name exists or is reserved, or the task to copy or the adapter does not exist.
    """
    settings = getattr(model, "peft_config", {}).get(adapter_name)
    if not isinstance(settings, MHRConfig):
        raise InputError(f"{type(model).__name__} has no adapter {adapter_name!r} of method MHR")
    for layer in model.modules():
        if isinstance(layer, MHRLinear) and adapter_name in layer.mhr_adapters:
            layer.adapter(adapter_name).mixer.add_tasks(names, init)
    settings.tasks = [*settings.tasks, *names]
