"""Running a routed model: from the tasks of a call to what its layers apply."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from polyroute.config import MHRConfig
from polyroute.errors import InputError
from polyroute.host.trainers import refuse_plain_trainer
from polyroute.layer.factors import PlainFactors
from polyroute.layer.fingerprint import sample_others
from polyroute.layer.granularity import routers_of
from polyroute.layer.media import media_fit_examples
from polyroute.layer.open_route import Block, Mixture, OpenRoutes, Recomputation
from polyroute.layer.sites import Site
from polyroute.layer.wrapping import Wrapping, find_modules
from polyroute.routes.inventory import Inventory, skills_like
from polyroute.routes.mixer import Mixer
from polyroute.routes.rule import Gates, RouteRule
from polyroute.routes.table import RoutingTable
from polyroute.routes.table_rules import rule_of
from polyroute.routes.tasks import (
    Route,
    Tasks,
    check_batch,
    find_route,
    named_inputs,
    packed,
)

__all__ = ["RoutedForward"]


class RoutedForward(nn.Module):
    """The part of `polyroute.model.RoutedModel` that runs the base model.

    Attributes that are not its own (`config`, `device`, `get_encoder` ...) are the base model's.

    Attributes:
        base_model: the frozen network, with its chosen layers wrapped.
        inventory: the skills.
        routes: the table of routing logits, by task.
        rule: how skills are chosen.
        sites: the adapted layers.
        routers: names of the routers, in the order of the table's first axis.
        mixer: turns routes and skills into what the layers apply.
    """

    open_routes: OpenRoutes

    def __init__(
        self,
        base_model: nn.Module,
        config: MHRConfig,
        sites: Sequence[Site],
        tasks: Sequence[str],
        rule: RouteRule | None = None,
    ) -> None:
        super().__init__()
        self.sites = tuple(sites)
        routers, by_site = routers_of([site.name for site in sites], config.granularity)
        self.rule = rule_of(config) if rule is None else rule
        num_skills = len(tasks) if config.num_skills is None else config.num_skills
        shape = (len(routers), config.heads, num_skills) if self.rule.has_table else None
        trained = find_modules(base_model, config.modules_to_save, sites)
        # What can fail comes before the base model is touched.
        # Rows are drawn before skills, so that a seed gives what it gave in earlier versions.
        self.routes = RoutingTable(tasks, shape, skills_like(sites), config)
        self.inventory = Inventory(sites, config, num_skills, sites[0].device)
        self.mixer = Mixer(config, self.inventory, self.routes, self.rule, routers, by_site)
        self.rule.start(self.mixer)
        self.rule.to(sites[0].device)
        self.merged_task: str | None = None
        self._unmerged: dict[str, Tensor] = {}
        self._outside = sample_others(base_model, sites, list(trained.values()))
        self._is_unloaded = False
        self.open_routes = OpenRoutes(self._prepare)
        self.wrapping = Wrapping(
            base_model, sites, self.open_routes, dropout=config.dropout, trained=trained
        )
        self.base_model = base_model
        # Not `self.train`, which would switch parts of the base model that are in another mode.
        for own in (self.inventory, self.routes, self.rule, self.mixer):
            own.train(base_model.training)
        self.training = base_model.training
        self.register_state_dict_post_hook(_name_tasks)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_check_tasks)  # type: ignore[no-untyped-call]
        self._hooks = (
            base_model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            base_model.register_forward_hook(self._after_forward),
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            refuse_plain_trainer(name)
            return getattr(super().__getattr__("base_model"), name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.open_routes = OpenRoutes(self._prepare)
        for layer in self.wrapping.layers:
            layer.routes = self.open_routes

    @property
    def adapter_config(self) -> MHRConfig:
        """What is attached; phase `mu` makes it a shared adapter."""
        return self.mixer.config

    @property
    def routers(self) -> list[str]:
        """Names of the routers, in the order of the table's first axis."""
        return list(self.mixer.routers)

    @property
    def routed_layers(self) -> tuple[nn.Module, ...]:
        """The wrapped layers, by site."""
        return self.wrapping.layers

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks, in row order."""
        return self.routes.names

    # ---------------------------------------------------------------- routing

    def route(
        self,
        tasks: Tasks,
        *,
        condition: Any = None,
        segments: Sequence[Sequence[int]] | None = None,
    ) -> Block:
        """Route every forward inside the `with` block.

        Blocks nest, close after an error too, and hold for the code inside them: threads,
        coroutines and generators that take turns each have their own.

        Args:
            tasks: one name or row number for a batch of any size; or one per example, as a list or
                an integer tensor; `"mu"` is the average of the inventory; None is the base model
                alone. A model may repeat each example's rows (beams, returned sequences, windows):
                what belongs to one example must stay consecutive.
            condition: whatever the model's rule looks at.
            segments: for rows that hold several examples one after another, the lengths of these,
                in tokens, for each row; `tasks` then names one for each example. Without them
                examples begin where `position_ids` of a forward are 0.

        Raises:
            InputError: an unknown task, a negative number, an empty list, or an unloaded model.
        """
        self._check_loaded()
        route = find_route(tasks, self.routes)
        merged = self.merged_task
        if merged is not None and set(route.rows or ()) != {self.routes.row(merged)}:
            raise InputError(
                f"the model is merged with {merged!r}; call unmerge() to route anything else"
            )
        return self.open_routes.open((replace(route, condition=condition), segments))

    def _entered(self, tasks: Tasks, condition: Any, segments: Any) -> AbstractContextManager[None]:
        """The block of one call: what it was given, or the one that it is in."""
        if tasks is None and condition is None and segments is None:
            return nullcontext()
        if tasks is None and self.rule.needs_tasks:
            raise InputError("condition and segments go with tasks: name the tasks of the batch")
        if tasks is None:  # a rule that looks at the condition alone
            return self.open_routes.open((Route((), False, condition), segments))
        return self.route(tasks, condition=condition, segments=segments)

    def forward(
        self,
        *args: Any,
        tasks: Tasks = None,
        condition: Any = None,
        segments: Sequence[Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the base model.

        Args:
            *args: passed on.
            tasks: as in `route`; needed unless a `route` block is open, or the rule needs none.
            condition: as in `route`.
            segments: as in `route`.
            **kwargs: passed on.

        Returns:
            What the base model returns.

        Raises:
            InputError: no route is given, or the number of tasks does not fit the batch.
        """
        self._check_loaded()
        with self._entered(tasks, condition, segments):
            if self._is_compiled:  # compiled code skips the hook that prepares
                self._start_forward(args, kwargs)
            elif (block := self.open_routes.now()) is not None:
                self._check_rows(block, self.base_model.forward, args, kwargs)
            return self.base_model(*args, **kwargs)

    def generate(
        self, *args: Any, tasks: Tasks = None, condition: Any = None, **kwargs: Any
    ) -> Any:
        """Generate with the base model, beams and returned sequences included.

        Args:
            *args: passed on.
            tasks: as in `route`, one per prompt; needed unless a `route` block is open, or the
                rule needs none.
            condition: as in `route`, one per prompt.
            **kwargs: passed on.

        Raises:
            InputError: no route is given, or the number of tasks is not that of the prompts.
        """
        self._check_loaded()
        base: Any = self.base_model
        with self._entered(tasks, condition, None):
            block, state = self.open_routes.now(), self.open_routes
            if block is not None:
                self._check_rows(block, base.generate, args, kwargs)
                rows = block.value[0].rows or (0,)
                state.media_fit = self._media_fit(
                    named_inputs(base.generate, args, kwargs), len(rows)
                )
            state.forget()  # nothing that was mixed earlier is taken over
            try:
                return base.generate(*args, **kwargs)
            finally:
                state.media_fit = False

    def _media_fit(self, inputs: Mapping[str, Any], num_examples: int) -> bool:
        """Whether the images of a batch show whose they are, where an adapted layer sees them."""
        sees = any(site.sees_media for site in self.sites)
        return sees and media_fit_examples(self.base_model, inputs, num_examples)

    def _check_rows(
        self, block: Block, call: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        """Make sure that the open route has as many tasks as the call has examples."""
        inputs = named_inputs(call, args, kwargs)
        route = packed(block.value[0], block.value[1], inputs)
        if route.per_example and route.segments is None:
            check_batch(len(route.rows or ()), self.base_model, inputs)

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

    @contextmanager
    def record_gates(self) -> Iterator[list[Gates]]:
        """See the gates of a rule that looks at the input, for every forward inside the block.

        They are part of the graph, so a loss may be made of them, such as one that balances how
        much the skills are used.
        """
        self.rule.gates, self.mixer.is_recording = [], True
        try:
            yield self.rule.gates
        finally:
            self.rule.gates, self.mixer.is_recording = [], False

    # ---------------------------------------------------------------- mixing

    def _before_forward(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            self._start_forward(args, kwargs)

    def _after_forward(self, _: nn.Module, __: tuple[Any, ...], ___: Any) -> None:
        # Nothing that was mixed outlives its forward: a part called next mixes anew.
        if not torch.compiler.is_compiling():
            self.open_routes.forget()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _start_forward(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if self.merged_task is None:
            self.open_routes.forget()
            self._prepare(named_inputs(self.base_model.forward, args, kwargs))

    def _prepare(self, inputs: Mapping[str, Any] | None = None) -> Mixture:
        """The open route's mixture for one forward; the only place where factors are mixed."""
        state = self.open_routes
        if torch._C._current_graph_task_id() != -1:
            # Backward is recomputing a checkpointed block, and whichever route is open now (if any)
            # need not be that of its forward.
            raise InputError(
                "a checkpointed block is recomputed without its route: turn checkpointing on with "
                "model.gradient_checkpointing_enable() (non-reentrant), or pass "
                "context_fn=model.checkpoint_contexts to torch.utils.checkpoint"
            )
        block = state.now()
        given = inputs or {}
        route = None if block is None else packed(block.value[0], block.value[1], given)
        mask = given.get("attention_mask")
        mixture = self.mixer.mixture(
            route, training=self.training, mask=mask if isinstance(mask, Tensor) else None
        )
        if mixture.num_examples and inputs is not None:
            mixture = replace(mixture, media_fit=self._media_fit(given, mixture.num_examples))
        elif state.media_fit:
            mixture = replace(mixture, media_fit=True)
        state.mixture = mixture
        return mixture

    def weights_of(self, task: str | int) -> Tensor:
        """The mixing weights of a task in evaluation, `[N, H, K]`.

        Raises:
            InputError: unknown task, or a method that does not mix.
        """
        weights = self.mixer.weights_of(self.routes.row(task))
        if weights is None:
            raise InputError(f"method {self.adapter_config.method!r} does not mix skills")
        return weights

    def factors_of(self, task: str | int) -> Sequence[PlainFactors]:
        """What each site applies for one task, in fp32 at least.

        Raises:
            InputError: unknown task, or a rule that looks at the input.
        """
        return self.mixer.factors_of(self.routes.row(task))

    # ---------------------------------------------------------------- checkpointing of activations

    def checkpoint_contexts(
        self,
    ) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """The `context_fn` of `torch.utils.checkpoint` under which recomputation sees its route."""
        return nullcontext(), Recomputation(self.open_routes)

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
        self.wrapping.start_checkpointing(options, self.checkpoint_contexts, **kwargs)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def _check_loaded(self) -> None:
        if self._is_unloaded:
            raise InputError(
                "this routed model was unloaded: use the base model, or attach an inventory again"
            )


TASKS = "routes.tasks"
"""Under this name a state dict says which tasks its rows are of."""


def _name_tasks(model: RoutedForward, state: dict[str, Any], prefix: str, _: Any) -> None:
    state[prefix + TASKS] = model.routes.digest()


def _check_tasks(model: RoutedForward, state: dict[str, Any], prefix: str, *_: Any) -> None:
    tasks = state.pop(prefix + TASKS, None)
    if tasks is not None and not torch.equal(tasks.cpu(), model.routes.digest()):
        raise InputError(
            "this state dict holds other tasks than this model, or the same in another order"
        )
