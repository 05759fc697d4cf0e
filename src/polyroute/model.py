"""The routed model: a frozen base model, an inventory of skills, and a route for every task."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from polyroute.config import MHRConfig
from polyroute.counts import count_parameters, describe
from polyroute.errors import InputError, did_you_mean
from polyroute.layer.factors import Factors
from polyroute.layer.merging import check_mergeable, fold, restore
from polyroute.layer.open_route import BASE_ALONE, Mixture, RouteScope, Routing
from polyroute.layer.routed_layer import RoutedLayer
from polyroute.layer.sites import (
    Site,
    fused_layers,
    routers_of,
    sample_others,
    sample_weights,
)
from polyroute.routes.inventory import Inventory
from polyroute.routes.mixer import Mixer
from polyroute.routes.row_optimizer import RowAdamW
from polyroute.routes.table import MU, MU_ROW, Routes
from polyroute.routes.tasks import Route, Tasks, check_batch, find_route
from polyroute.saved.card import write_card
from polyroute.saved.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from polyroute.saved.hub import Repository, push
from polyroute.saved.peft_export import write_peft_adapter
from polyroute.settings import number

__all__ = ["Phase", "RoutedModel", "Tasks"]

Phase = Literal["full", "z", "mu", "mu-uncollapsed", "random"]
FUNCTION_SETTINGS = (
    "method", "adapter", "alpha", "rank", "gate", "normalization", "logit_dropout", "shared_skill",
)  # fmt: skip
"""Settings that decide what a table of given numbers computes."""


class RoutedModel(nn.Module):
    """A base model whose adapted layers use, for each example, its task's mixture of skills.

    Made by `polyroute.attach` or `polyroute.from_pretrained`. Attributes that are not its own
    (`config`, `device`, `get_encoder` ...) are those of the base model.

    Attributes:
        base_model: the frozen network, with its chosen layers wrapped.
        inventory: the skills.
        routes: the table of routing logits, by task.
        sites: the adapted layers.
        routers: names of the routers, in the order of the table's first axis.
        mixer: turns routes and skills into what the layers apply.
    """

    def __init__(
        self, base_model: nn.Module, config: MHRConfig, sites: Sequence[Site], tasks: Sequence[str]
    ) -> None:
        super().__init__()
        self.sites = tuple(sites)
        names = [site.name for site in sites]
        self.routers, by_site = routers_of(names, config.granularity)
        device = sites[0].device
        num_skills = len(tasks) if config.num_skills is None else config.num_skills
        shape = (len(self.routers), config.heads, num_skills) if config.has_router else None
        self.routes = Routes(tasks, shape, device, config)
        self.inventory = Inventory(sites, config, num_skills, device)
        self.mixer = Mixer(config, self.inventory, self.routes, self.sites, by_site)
        self.merged_task: str | None = None
        self._unmerged: dict[str, Tensor] = {}
        self._required_grad = [n for n, p in base_model.named_parameters() if p.requires_grad]
        base_model.requires_grad_(False)
        self.base_model = base_model
        self._routing = Routing(self._prepare)
        # A tuple, so that torch does not register them here: they belong to the base model's tree.
        self.routed_layers = tuple(
            RoutedLayer(site, i, self._routing, dropout=config.dropout)
            for i, site in enumerate(sites)
        )
        fused = fused_layers(base_model, sites)  # before they are wrapped
        for site, layer in zip(sites, self.routed_layers, strict=True):
            layer.train(site.layer.training)
            self._put(site, layer)
        # Not `self.train`, which would switch parts of the base model that are in another mode.
        for own in (self.inventory, self.routes, self.mixer):
            own.train(base_model.training)
        self.training = base_model.training
        self._hooks = (
            base_model.register_forward_pre_hook(self._before_forward),
            base_model.register_forward_hook(self._after_forward),
            *self._stop_fusion(fused),
        )
        self._has_checkpointing = False
        self._is_unloaded = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(super().__getattr__("base_model"), name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._routing = Routing(self._prepare)
        for layer in self.routed_layers:
            layer.routing = self._routing

    @property
    def adapter_config(self) -> MHRConfig:
        """What is attached; phase `mu` makes it a shared adapter."""
        return self.mixer.config

    def _stop_fusion(self, fused: Sequence[nn.Module]) -> list[Any]:
        # torch fuses no layer that has a hook; its encoder, which packs padded batches for the
        # fused layers alone, has a switch.
        self._packing = tuple(
            m
            for m in fused
            if isinstance(m, nn.TransformerEncoder) and getattr(m, "use_nested_tensor", False)
        )
        for encoder in self._packing:
            encoder.use_nested_tensor = False
        return [
            m.register_forward_pre_hook(_do_nothing)
            for m in fused
            if isinstance(m, nn.TransformerEncoderLayer)
        ]

    def _check_loaded(self) -> None:
        if self._is_unloaded:
            raise InputError(
                "this routed model was unloaded: use the base model, or attach an inventory again"
            )

    def _put(self, site: Site, module: nn.Module) -> None:
        for place in site.places:
            parent, _, child = place.rpartition(".")
            setattr(self.base_model.get_submodule(parent), child, module)

    # ---------------------------------------------------------------- routing

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks, in row order."""
        return self.routes.names

    def route(self, tasks: Tasks) -> AbstractContextManager[None]:
        """Route every forward inside the `with` block.

        Blocks nest, close after an error too, and hold for the thread that opens them.

        Args:
            tasks: one name or row number for a batch of any size; or one per example, as a list or
                an integer tensor; `"mu"` is the average of the inventory; None is the base model
                alone. A model may repeat each example's rows (beams, returned sequences, windows):
                what belongs to one example must stay consecutive.

        Raises:
            InputError: an unknown task, a negative number, an empty list, or an unloaded model.
        """
        self._check_loaded()
        route = find_route(tasks, self.routes)
        merged = self.merged_task
        if merged is not None and (route is None or set(route.rows) != {self.routes.row(merged)}):
            raise InputError(
                f"the model is merged with {merged!r}; call unmerge() to route anything else"
            )
        return RouteScope(self._routing, route)

    def forward(self, *args: Any, tasks: Tasks = None, **kwargs: Any) -> Any:
        """Run the base model.

        Args:
            *args: passed on.
            tasks: as in `route`; needed unless a `route` block is open.
            **kwargs: passed on.

        Returns:
            What the base model returns.

        Raises:
            InputError: no route is given, or the number of tasks does not fit the batch.
        """
        self._check_loaded()
        with self.route(tasks) if tasks is not None else nullcontext():
            route = self._routing.route
            if route is not None and route.per_example:
                check_batch(len(route.rows), args, kwargs)
            if self._is_compiled:
                self._start_forward()  # compiled code skips the hook that does it
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, tasks: Tasks = None, **kwargs: Any) -> Any:
        """Generate with the base model, beams and returned sequences included.

        Args:
            *args: passed on.
            tasks: as in `route`, one per prompt; needed unless a `route` block is open.
            **kwargs: passed on.
        """
        self._check_loaded()
        state = self._routing
        if tasks is not None:
            scope: AbstractContextManager[None] = self.route(tasks)
        elif state.is_open:  # a scope of its own, so that nothing mixed earlier is taken over
            scope = RouteScope(state, state.route)
        else:
            scope = nullcontext()
        base: Any = self.base_model
        with scope:
            return base.generate(*args, **kwargs)

    @property
    def _is_compiled(self) -> bool:
        base = self.base_model
        return (
            torch.compiler.is_compiling()
            or hasattr(base, "_orig_mod")
            or getattr(base, "_compiled_call_impl", None) is not None
        )

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the base model in place; mixing stays outside, so new tasks never recompile."""
        self.base_model.compile(*args, **kwargs)

    # ---------------------------------------------------------------- mixing

    def _before_forward(self, _: nn.Module, __: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling():
            self._start_forward()

    def _after_forward(self, _: nn.Module, __: tuple[Any, ...], ___: Any) -> None:
        # Nothing that was mixed outlives its forward: a part called next mixes anew.
        if not torch.compiler.is_compiling():
            self._routing.mixture = self._routing.prepared_by = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _start_forward(self) -> None:
        if self.merged_task is None:
            self._routing.mixture = self._routing.prepared_by = None
            self._prepare()

    def _prepare(self) -> Mixture:
        """The open route's mixture for one forward; the only place where factors are mixed."""
        state = self._routing
        if torch._C._current_graph_task_id() != -1:
            # Backward is recomputing a checkpointed block, and whichever route is open now (if any)
            # need not be that of its forward.
            raise InputError(
                "a checkpointed block is recomputed without its route: turn checkpointing on with "
                "model.gradient_checkpointing_enable() (non-reentrant), or pass "
                "context_fn=model.checkpoint_contexts to torch.utils.checkpoint"
            )
        if not state.is_open:
            if self.inventory.num_skills != 1 or self.adapter_config.method == "private":
                raise InputError(
                    "no task is routed: wrap the call in `with model.route(tasks):` or pass "
                    "tasks=[...], one name per example ('mu' for the average of the skills)"
                )
            route: Route | None = Route((MU_ROW,), per_example=False)
        else:
            route = state.route
        state.mixture = (
            BASE_ALONE if route is None else self.mixer.mixture(route, training=self.training)
        )
        return state.mixture

    def weights_of(self, task: str | int) -> Tensor:
        """The mixing weights of a task in evaluation, `[N, H, K]`.

        Raises:
            InputError: unknown task, or a method that does not mix.
        """
        weights = self.mixer.weights_of(self.routes.row(task))
        if weights is None:
            raise InputError(f"method {self.adapter_config.method!r} does not mix skills")
        return weights

    def factors_of(self, task: str | int) -> Sequence[Factors]:
        """What each site applies for one task, fp32."""
        return self.mixer.factors_of(self.routes.row(task))

    # ---------------------------------------------------------------- checkpointing of activations

    def checkpoint_contexts(
        self,
    ) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """The `context_fn` of `torch.utils.checkpoint` under which recomputation sees its route."""
        state = self._routing
        return nullcontext(), RouteScope(state, state.route, state.mixture, is_recomputing=True)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Turn on the base model's activation checkpointing, so that it keeps the routes.

        Args:
            activation_checkpointing_kwargs: options of `torch.utils.checkpoint.checkpoint`.
            **kwargs: passed on to the base model's method of this name (transformers 5) or of the
                older name, `gradient_checkpointing_enable`.

        Raises:
            InputError: reentrant checkpointing is asked for. It runs backward once per block, and
                all blocks share one mixing graph.
        """
        options = dict(activation_checkpointing_kwargs or {})
        if options.get("use_reentrant"):
            raise InputError(
                "reentrant checkpointing cannot be routed; leave use_reentrant at False"
            )
        options.update(use_reentrant=False, context_fn=self.checkpoint_contexts)
        base: Any = self.base_model
        self._has_checkpointing = True
        if hasattr(base, "activation_checkpointing_enable"):
            base.activation_checkpointing_enable(activation_checkpointing_kwargs=options, **kwargs)
        else:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options, **kwargs)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    # ---------------------------------------------------------------- tasks

    def add_task(self, name: str, init: str | Tensor = "uniform") -> int:
        """Append a task; every other task stays as it is.

        Make the optimizer afterwards, unless it is that of `optimizer` and the table trains by
        rows: the table is a new parameter.

        Args:
            name: a new name.
            init: `"uniform"` starts near the average of the skills, another task's name copies its
                row, a tensor `[N, H, K]` (or flat) is taken as the logits.

        Returns:
            The row number.

        Raises:
            InputError: the name exists or is reserved, the task to copy does not exist, or the
                tensor's shape is wrong.
        """
        return self.add_tasks([name], init)[0]

    def add_tasks(self, names: Sequence[str], init: str | Tensor = "uniform") -> list[int]:
        """Append tasks, all or none; the table is copied once, so add many together.

        Args:
            names: new names.
            init: as in `add_task`; a tensor may also be `[n, N, H, K]` (or `[n, N * H * K]`), one
                row for each name.

        Returns:
            The row numbers.

        Raises:
            InputError: as `add_task`, for any of the names.
        """
        if isinstance(names, str):
            raise InputError(f"names must be a list of tasks, not the single string {names!r}")
        values: Tensor | None = None
        source: int | None = None
        if isinstance(init, Tensor):
            values = init
            if self.routes.logits is None:
                raise InputError(
                    f"method {self.adapter_config.method!r} has no routing logits: "
                    "init must be 'uniform' or a task name"
                )
        elif init not in ("uniform", MU):
            source = self.routes.row(init)
            values = self.routes[init] if self.routes.logits is not None else None
        rows = self.routes.add(list(names), values)
        if self.adapter_config.method == "private":
            for _ in rows:
                self.inventory.add_skill(source)
        return rows

    def keep_tasks(self, names: Sequence[str]) -> None:
        """Drop every task but these; the skills stay (private adapters go with their task).

        Raises:
            InputError: an unknown or repeated name, or the model is merged.
        """
        self.check_unmerged()
        if isinstance(names, str):
            raise InputError(f"names must be a list of tasks, not the single string {names!r}")
        rows = self.routes.keep(tuple(names))
        if self.adapter_config.method == "private":
            self.inventory.keep_skills(rows)

    # ---------------------------------------------------------------- training

    def set_phase(self, phase: Phase) -> None:
        """Choose what trains; everything else is frozen.

        - `full`: skills and routing.
        - `z`: routing only.
        - `mu`: the skills are replaced by their average, one LoRA, which trains.
        - `mu-uncollapsed`: all skills train under the uniform mixture, as the published code does.
          The same function as `mu`; the global gradient norm is 1/sqrt(K) of it.
        - `random`: skills and routing start afresh (a control).

        `mu`, `mu-uncollapsed` and `random` discard what they replace.

        Raises:
            InputError: no such phase, nothing to train in it, or the model is merged.
        """
        self.check_phase(phase)
        if phase == "z" and not len(self.routes):
            raise InputError("phase 'z' trains the routes of tasks, and there are none: add a task")
        if phase == "mu":
            self._collapse()
        elif phase == "mu-uncollapsed":
            self.routes.drop_logits()
        elif phase == "random":
            self.inventory.reset_parameters()
            self.routes.reset_parameters()
        self.mixer.anneal_progress = 0.0
        self.routes.train_whole()
        self.inventory.requires_grad_(phase != "z")
        self.routes.requires_grad_(phase in ("full", "z", "random"))

    def check_phase(self, phase: Phase) -> None:
        """Make sure that a task could be trained in this phase.

        Raises:
            InputError: no such phase, nothing to train in it, or the model is merged.
        """
        if phase not in get_args(Phase):
            raise InputError(f"unknown phase {phase!r}: {did_you_mean(phase, get_args(Phase))}")
        self.check_unmerged()
        method = self.adapter_config.method
        if phase == "z" and self.routes.logits is None:
            raise InputError(
                f"phase 'z' trains routing, and method {method!r} has none here; use 'full' or 'mu'"
            )
        if phase == "mu-uncollapsed" and not self.adapter_config.has_router:
            raise InputError(
                f"phase 'mu-uncollapsed' averages routed skills, and method {method!r} does not "
                "route; use 'mu'"
            )
        if phase == "mu" and self.inventory.num_skills == 0:
            raise InputError("no private adapter is left to average: add a task first")

    def _collapse(self) -> None:
        self.inventory.average()
        self.routes.drop_logits()
        self.mixer.config = replace(self.adapter_config, method="shared", num_skills=1, num_heads=1)

    def param_groups(
        self,
        phase: Phase | None = None,
        *,
        lr: float = 1e-3,
        route_lr: float = 1e-1,
        weight_decay: float = 0.0,
        route_weight_decay: float = 0.0,
    ) -> list[dict[str, Any]]:
        """The parameter groups of a phase, for any torch optimizer.

        Every group states its learning rate and its weight decay, so nothing is inherited from an
        optimizer's defaults. Decay pulls logits toward the uniform mixture; the published SuperNI
        runs had 0.01 there.

        Args:
            phase: is set first, see `set_phase`; None keeps what is set.
            lr: of the skills.
            route_lr: of the routing logits.
            weight_decay: of the skills.
            route_weight_decay: of the routing logits.

        Returns:
            Up to two groups, named `skills` and `routes`.

        Raises:
            InputError: as `set_phase`, or a rate is not positive and finite, or a decay negative.
        """
        for name, value in (("lr", lr), ("route_lr", route_lr)):
            number(above=0)(name, _plain(value))
        for name, value in (
            ("weight_decay", weight_decay),
            ("route_weight_decay", route_weight_decay),
        ):
            number(least=0)(name, _plain(value))
        if phase is not None:
            self.set_phase(phase)
        self.routes.train_whole()
        groups = [
            ("skills", self.inventory, lr, weight_decay),
            ("routes", self.routes, route_lr, route_weight_decay),
        ]
        return [
            {"name": name, "params": trained, "lr": rate, "weight_decay": decay}
            for name, module, rate, decay in groups
            if (trained := [p for p in module.parameters() if p.requires_grad])
        ]

    def optimizer(
        self,
        phase: Phase | None = None,
        *,
        lr: float = 1e-3,
        route_lr: float = 1e-1,
        weight_decay: float = 0.0,
        route_weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> torch.optim.Optimizer:
        """AdamW whose step costs the rows of the batch, not the routing table: for many tasks.

        Rows outside the batch are touched by no gradient, no moment and no weight decay; every row
        has a clock of its own, which ticks when it is in the batch
        (`polyroute.routes.row_optimizer` says what that changes). Skills are trained as by
        `torch.optim.AdamW`, and in phases without routing the optimizer is that.

        The table is frozen and its rows train through `routes.touched`; the next `set_phase`,
        `param_groups` or `optimizer` undoes that. It works in one process: the rows of a batch
        would have to be exchanged between several.

        Args:
            phase: as in `param_groups`, with all that follows.
            lr: of the skills.
            route_lr: of the routing logits.
            weight_decay: of the skills.
            route_weight_decay: of the routing logits.
            betas: decay rates of the moments.
            eps: added to the root of the second moment.

        Raises:
            InputError: as `param_groups`.
        """
        groups = self.param_groups(
            phase,
            lr=lr,
            route_lr=route_lr,
            weight_decay=weight_decay,
            route_weight_decay=route_weight_decay,
        )
        routed = [group for group in groups if group["name"] == "routes"]
        if not routed:
            return torch.optim.AdamW(groups, betas=betas, eps=eps)
        routed[0]["params"] = [self.routes.train_by_rows()]
        return RowAdamW(groups, self.routes, betas=betas, eps=eps)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients.

        Those of a table trained by rows go even where others are set to zero: the next batch has
        other rows.
        """
        super().zero_grad(set_to_none)
        if self.routes.touched is not None:
            self.routes.touched.grad = None

    # ---------------------------------------------------------------- merging

    def merge(self, task: str) -> None:
        """Fold one task, or `"mu"`, into the base weights, in place: no overhead is left.

        The original weights are kept, so `unmerge` restores them bit for bit.

        Raises:
            InputError: merged already, unknown task, or a layer's weight cannot be changed
                (quantised, or tied to another layer).
        """
        self._check_loaded()
        self.check_unmerged()
        factors = self.factors_of(task)
        check_mergeable(self.base_model, self.sites)
        self._unmerged = fold(self.sites, factors)
        for layer in self.routed_layers:
            layer.is_merged = True
        self.merged_task = task

    def check_unmerged(self) -> None:
        """Make sure that the skills are not hidden behind a merged task.

        Raises:
            InputError: they are; the message names the task.
        """
        if self.merged_task is not None:
            raise InputError(f"the model is merged with {self.merged_task!r}; call unmerge() first")

    def unmerge(self) -> None:
        """Restore the base weights, bit for bit; nothing happens where nothing is merged.

        If the model was cast or moved since, they are restored in its present type and place.
        """
        self._check_loaded()
        restore(self.sites, self._unmerged)
        self._unmerged = {}
        for layer in self.routed_layers:
            layer.is_merged = False
        self.merged_task = None

    def unload(self) -> nn.Module:
        """Take the base model out again, as it was before `attach`; this object is then spent.

        A merged task stays merged: that is how to get a plain model of one task.
        """
        if self._is_unloaded:
            return self.base_model
        for hook in self._hooks:
            hook.remove()
        if self._has_checkpointing:  # its context_fn is ours
            base: Any = self.base_model
            for name in ("activation_checkpointing_disable", "gradient_checkpointing_disable"):
                if hasattr(base, name):
                    getattr(base, name)()
                    break
        for site in self.sites:
            self._put(site, site.layer)
        for name, parameter in self.base_model.named_parameters():
            parameter.requires_grad_(name in self._required_grad)
        for encoder in self._packing:
            encoder.use_nested_tensor = True
        self._is_unloaded = True
        return self.base_model

    # ---------------------------------------------------------------- files

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, is_main_process: bool = True
    ) -> None:
        """Write the inventory, the routes and what they are, without the base model.

        The routing table is written in parts of about 32 MB, whatever its size;
        `polyroute.SavedRoutes` reads and changes single rows of it.

        Args:
            folder: where.
            is_main_process: whether to write. Where the base model is sharded (FSDP2), all
                processes call this, since some of its weights are looked at, and one writes.

        Raises:
            InputError: the folder cannot be written, the model is merged, was unloaded or is on
                the meta device, or it has private adapters and no task left.
        """
        self._check_loaded()
        self.check_unmerged()
        self.mixer.check_memory()
        if self.inventory.num_skills == 0:
            raise InputError("no private adapter is left to save: add a task first")
        skills = {
            f"{site.name}.{kind}": tensor
            for i, site in enumerate(self.sites)
            for kind, tensor in self.inventory.site_tensors(i).items()
        }
        rows = self.routes.logits
        by_site = self.mixer.router_of_site
        description = {
            "config": self.adapter_config.to_dict(),
            "num_skills": self.inventory.num_skills,
            "anneal_progress": self.mixer.anneal_progress,
            "base": {
                "name": getattr(getattr(self.base_model, "config", None), "_name_or_path", None),
                "class": type(self.base_model).__name__,
                "sample": sample_others(self.base_model, self.sites),
            },
            "routers": self.routers,
            "sites": [
                {
                    "name": site.name,
                    "d_in": site.d_in,
                    "d_out": site.d_out,
                    "router": by_site[i],
                    "base_sample": sample_weights(site),
                    "base_dtype": str(site.dtype),
                }
                for i, site in enumerate(self.sites)
            ],
        }
        if is_main_process:
            write_checkpoint(folder, description, skills, self.tasks, rows, self.routes.shape)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        license: str | None = None,
    ) -> str:
        """Save to a repository on the hub, with a model card, in one commit.

        A run knows more than the model, so `polyroute push RUN` writes a fuller card.

        Args:
            repo_id: such as `user/inventory`; made if it is missing.
            private: make a new repository private.
            token: for the hub, instead of the one that is logged in.
            revision: the branch, made if it is missing; default main.
            commit_message: of the commit.
            license: of the inventory, as the hub names it, such as `apache-2.0`.

        Returns:
            The address of the commit.

        Raises:
            InputError: as `save_pretrained`; or the name is no hub id, or the hub refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push(
                folder,
                Repository(repo_id, revision, token),
                write_card(folder, name=repo_id, license=license),
                private=private,
                message=commit_message,
            )

    def load_adapter(self, folder: str | os.PathLike[str]) -> None:
        """Overwrite skills and routes, in place, by those of a checkpoint of this very model.

        Raises:
            InputError: the checkpoint has other tasks, layers or sizes.
        """
        self._check_loaded()
        self.check_unmerged()
        checkpoint, source = read_checkpoint(folder), os.fspath(folder)
        if checkpoint.tasks != self.tasks:
            raise InputError(f"{source} holds other tasks than this model")
        here, there = self.adapter_config.to_dict(), checkpoint.description["config"]
        for name in FUNCTION_SETTINGS:
            if here[name] != there.get(name):
                raise InputError(
                    f"{source} has {name}={there.get(name)!r} and this model "
                    f"{name}={here[name]!r}; "
                    "use polyroute.from_pretrained to load another inventory"
                )
        routers = [
            checkpoint.description["routers"][s["router"]] for s in checkpoint.description["sites"]
        ]
        if routers != [self.routers[i] for i in self.mixer.router_of_site]:
            raise InputError(f"{source} groups layers by router in another way than this model")
        self.load_tensors(checkpoint, source)

    @torch.no_grad()
    def load_tensors(self, checkpoint: Checkpoint, source: str) -> None:
        """Overwrite skills and routes, in place, by a checkpoint's, which must have their shapes.

        Raises:
            InputError: it has not (`source` says which checkpoint), or this model's skills have no
                memory. Nothing was changed.
        """
        if self.mixer.device.type == "meta":
            raise InputError(
                f"{source} cannot be loaded onto the meta device: load the base model's weights "
                "first, or give the routed model memory with to_empty(device=...)"
            )
        expected = {
            f"{site.name}.{kind}": tensor
            for i, site in enumerate(self.sites)
            for kind, tensor in self.inventory.site_tensors(i).items()
        }
        saved = checkpoint.skills
        if saved.keys() != expected.keys():
            name = sorted(saved.keys() ^ expected.keys())[0]
            raise InputError(f"{source} does not fit: tensor {name!r} is on one side only")
        for name, tensor in expected.items():
            if saved[name].shape != tensor.shape:
                raise InputError(
                    f"{source} does not fit: tensor {name!r} is {list(saved[name].shape)} there "
                    f"and {list(tensor.shape)} here"
                )
            if not saved[name].is_floating_point() or not saved[name].isfinite().all():
                raise InputError(
                    f"{source} is damaged: tensor {name!r} holds values that are not finite "
                    "fractional numbers; take an earlier checkpoint"
                )
        table, logits = checkpoint.saved_routes, self.routes.logits
        if table is not None:
            if logits is None or table.shape != self.routes.shape:
                raise InputError(
                    f"{source} does not fit: its routing rows have shape {list(table.shape)}, "
                    f"those of this model {list(self.routes.shape or ())}"
                )
            table.check(self.tasks)
            table.copy_into(logits, self.tasks)
        else:
            self.routes.drop_logits()
        for name, tensor in expected.items():
            tensor.copy_(saved[name])
        self.mixer.anneal_progress = float(checkpoint.description.get("anneal_progress", 0.0))

    def export_peft(self, task: str, folder: str | os.PathLike[str]) -> None:
        """Write one task, or `"mu"`, as an ordinary PEFT adapter that computes the same.

        Poly, MHR, shared and private LoRAs become a LoRA of the same rank; (IA)^3 becomes PEFT's.

        Raises:
            InputError: unknown task, or the folder cannot be written.
        """
        self._check_loaded()
        write_peft_adapter(folder, self.base_model, self.sites, self.factors_of(task))

    # ---------------------------------------------------------------- reports

    def counts(self) -> dict[str, int]:
        """Parameters by purpose; see `polyroute.counts.count_parameters`."""
        return count_parameters(self.base_model, self.sites, self.inventory, self.routes)

    def num_trainable(self) -> int:
        """How many parameters the current phase trains."""
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        if self.routes.touched is not None and self.routes.logits is not None:
            # It stands for the table, of which it holds the rows of the last batch.
            trained += self.routes.logits.numel() - self.routes.touched.numel()
        return trained

    def print_trainable_parameters(self) -> None:
        """Print what trains, of how much."""
        trained = self.num_trainable()
        total = sum(p.numel() for n, p in self.named_parameters() if n != "routes.touched")
        print(f"trainable: {trained:,} of {total:,} parameters ({100 * trained / total:.3f}%)")

    def describe(self) -> str:
        """Sites, routers and parameter counts, as text."""
        return describe(
            self.adapter_config, self.base_model, self.sites, self.inventory, self.routes
        )


def _do_nothing(*_: Any) -> None:
    """A hook; torch computes step by step in a layer that has one."""


def _plain(value: Any) -> Any:
    # Optimizers take a rate as a tensor too.
    return float(value) if isinstance(value, Tensor) else value
