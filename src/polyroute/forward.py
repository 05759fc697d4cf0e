"""Running a routed model: from the tasks of a call to the mixture that its layers apply."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from polyroute.config import MHRConfig
from polyroute.errors import InputError
from polyroute.guards import add_digest, check_digest, is_compiled, routed_generate, routed_resize
from polyroute.host.trainers import refuse_plain_trainer
from polyroute.layer.factors import PlainFactors
from polyroute.layer.fingerprint import sample_all
from polyroute.layer.granularity import routers_of
from polyroute.layer.media import media_fit_examples, media_modules
from polyroute.layer.open_route import Block, Mixture, OpenRoutes, Recomputation, is_in_backward
from polyroute.layer.sites import Site
from polyroute.layer.wrapping import Wrapping, find_modules
from polyroute.routes.mixer import Mixer
from polyroute.routes.ragged import make_inventory
from polyroute.routes.rule import Gates, RouteRule
from polyroute.routes.stacks import skills_like
from polyroute.routes.table import RoutingTable
from polyroute.routes.table_rules import rule_of
from polyroute.routes.tasks import (
    Route,
    Tasks,
    check_batch,
    find_route,
    keeping_apart,
    named_inputs,
    route_of_call,
)  # fmt: skip

__all__ = ["RoutedForward"]


class RoutedForward(nn.Module):
    """The part of `polyroute.model.RoutedModel` that runs the base model.

    `RoutedModel` describes the attributes.

    Args:
        base_model: the network, whose chosen layers are wrapped in place.
        config: the settings of the adapter.
        sites: the layers to adapt.
        tasks: the names of the tasks, in row order.
        rule: chooses skills; by default the rule of `config.method`.
        ranks: for skills of any ranks, those of `polyroute.routes.ragged.RaggedInventory`.
    """

    open_routes: OpenRoutes

    def __init__(
        self,
        base_model: nn.Module,
        config: MHRConfig,
        sites: Sequence[Site],
        tasks: Sequence[str],
        rule: RouteRule | None = None,
        *,
        ranks: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        self.sites = tuple(sites)
        routers, by_site = routers_of([site.name for site in sites], config.granularity)
        if rule is not None:
            rule.check_free(config)
        self.rule = rule_of(config) if rule is None else rule
        num_skills = config.skills_for(len(tasks))
        shape = (len(routers), config.heads, num_skills) if self.rule.has_table else None
        trained = find_modules(base_model, config.modules_to_save, sites)
        # Everything that can fail comes before the base model is changed.
        # Rows are drawn before skills, so that a seed gives what it gave in earlier versions.
        self.routes = RoutingTable(tasks, shape, skills_like(sites), config)
        self.inventory = make_inventory(sites, config, num_skills, ranks)
        self.mixer = Mixer(config, self.inventory, self.routes, self.rule, routers, by_site)
        self.rule.start(self.mixer)
        self.rule.is_started = True
        self.rule.to(sites[0].device, skills_like(sites).dtype)
        self.merged_task: str | None = None
        self._unmerged: dict[str, Tensor] = {}
        self._outside = sample_all(base_model, list(trained.values()))
        self._has_media = bool(media_modules(base_model))
        self._is_unloaded = False
        self.open_routes = OpenRoutes(self._prepare)
        self.wrapping = Wrapping(
            base_model, sites, self.open_routes, dropout=config.dropout, trained=trained
        )
        self.wrapping.guard("generate", partial(routed_generate, self))
        self.wrapping.guard("resize_token_embeddings", partial(routed_resize, self))
        self.base_model = base_model
        # Not `self.train`, which would also switch parts of the base model that differ in mode.
        for part in (self.inventory, self.routes, self.rule, self.mixer):
            part.train(base_model.training)
        self.training = base_model.training
        self.register_state_dict_post_hook(add_digest)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(check_digest)  # type: ignore[no-untyped-call]
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
            layer.open_routes = self.open_routes

    @property
    def adapter_config(self) -> MHRConfig:
        """The settings of the adapter; phase `mu` makes its method `shared`."""
        return self.mixer.config

    @property
    def routers(self) -> list[str]:
        """The names of the routers, in the order of the first axis of a row."""
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

        Blocks nest, and they close after an error too. A block holds for the code inside it:
        threads, coroutines and generators that take turns each have their own.

        Args:
            tasks: one name or row number for a batch of any size; or one per example, as a list or
                an integer tensor; `"mu"` is the average of the inventory; None is the base model
                alone; a rule that stands alone, such as `polyroute.Arrow()`, chooses for every
                token. A model may repeat each example (for beams, returned sequences or windows)
                if the repetitions of one example stay consecutive.
            condition: what the model's rule looks at, if it looks at a condition.
            segments: for a batch whose rows hold several examples one after another, the lengths
                of the examples of each row, in tokens; `tasks` then names one task per example. By
                default an example begins wherever the `position_ids` of a forward are 0.

        Raises:
            InputError: a task is unknown, a number is negative, a list is empty, another task is
                merged, or the model was unloaded.
        """
        self._check_loaded()
        route = find_route(tasks, self.routes)
        merged = self.merged_task
        rows = set(route.rows or ())
        if merged is not None and (route.rule or rows != {self.routes.row(merged)}):
            raise InputError(
                f"the model is merged with {merged!r}; call unmerge() to route anything else"
            )
        return self.open_routes.open(replace(route, condition=condition, lengths=segments))

    def _block_of_call(
        self, tasks: Tasks, condition: Any, segments: Any
    ) -> AbstractContextManager[None]:
        """The block that the arguments of a call open; one without effect if there are none."""
        if tasks is not None:
            return self.route(tasks, condition=condition, segments=segments)
        if condition is None and segments is None:
            return nullcontext()
        if self.rule.needs_tasks:
            raise InputError("condition and segments go with tasks: name the tasks of the batch")
        # The rule looks at the condition alone.
        route = Route((), per_example=False, condition=condition, lengths=segments)
        return self.open_routes.open(route)

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
            *args: passed on to the base model.
            tasks: as in `route`; needed unless a `route` block is open, or the rule needs none.
            condition: as in `route`.
            segments: as in `route`.
            **kwargs: passed on to the base model.

        Returns:
            The result of the base model.

        Raises:
            InputError: no route is given, or the number of tasks does not fit the batch.
        """
        self._check_loaded()
        with self._block_of_call(tasks, condition, segments):
            if is_compiled(
                self.base_model
            ):  # compiled code skips the hook that prepares the mixture
                kwargs |= self._start_forward(args, kwargs)
            return self.base_model(*args, **kwargs)

    def generate(
        self, *args: Any, tasks: Tasks = None, condition: Any = None, **kwargs: Any
    ) -> Any:
        """Generate with the base model, beams and returned sequences included.

        Args:
            *args: passed on to the base model.
            tasks: as in `route`, one per prompt; needed unless a `route` block is open, or the
                rule needs none.
            condition: as in `route`, one per prompt.
            **kwargs: passed on to the base model.

        Returns:
            The result of the base model's `generate`.

        Raises:
            InputError: no route is given, or the number of tasks is not that of the prompts.
        """
        self._check_loaded()
        with self._block_of_call(tasks, condition, None):
            return self.base_model.generate(*args, **kwargs)  # type: ignore[operator]

    def check_tasks(self, inputs: Mapping[str, Any]) -> Route | None:
        """Make sure that the open route has as many tasks as a call has examples.

        Args:
            inputs: the arguments of the call by name.

        Returns:
            The route of the call; None where no route is open.

        Raises:
            InputError: it has more or fewer.
        """
        route = self._route_of(inputs)
        if route is not None and route.per_example and route.segments is None:
            main = getattr(self.base_model, "main_input_name", "")
            count = len(route.rows or ())
            check_batch(count, inputs, main=main, has_media=self._has_media)
        return route

    def _route_of(self, inputs: Mapping[str, Any]) -> Route | None:
        block = self.open_routes.now()
        return None if block is None else route_of_call(block.value, inputs)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the base model in place.

        Skills are mixed outside the compiled code, so new tasks cause no recompilation.
        """
        self.base_model.compile(*args, **kwargs)

    @contextmanager
    def record_gates(self) -> Iterator[list[Gates]]:
        """Record the gates of a rule that looks at the input, for every forward inside the block.

        The block gets the list that the gates are added to. They are part of the graph, so a loss
        can be computed from them, such as one that balances the use of the skills.
        """
        gates: list[Gates] = []
        self.mixer.gates = gates
        try:
            yield gates
        finally:
            self.mixer.gates = None

    # ---------------------------------------------------------------- mixing

    def _before_forward(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if torch.compiler.is_compiling():
            return args, kwargs
        return args, {**kwargs, **self._start_forward(args, kwargs)}

    def _after_forward(self, _: nn.Module, __: tuple[Any, ...], ___: Any) -> None:
        # The mixture ends with its forward: a part that is called next mixes again.
        if not torch.compiler.is_compiling():
            self.open_routes.forget()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _start_forward(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Check the tasks of a forward and mix for it; what it needs besides its arguments."""
        inputs = named_inputs(self.base_model.forward, args, kwargs)
        is_own = self.open_routes.generating is None  # a generation repeats examples for beams
        route = self.check_tasks(inputs) if is_own else self._route_of(inputs)
        if self.merged_task is not None:
            return {}
        self.open_routes.forget()
        self._mix(route, inputs)
        return keeping_apart(route, inputs, self.base_model.forward) if route and is_own else {}

    def _prepare(self) -> Mixture:
        """Mix for a part of the model that is called on its own."""
        inputs = self.open_routes.generating or {}
        return self._mix(self._route_of(inputs), inputs)

    def _mix(self, route: Route | None, inputs: Mapping[str, Any]) -> Mixture:
        """Mix the skills of a route for one forward; factors are mixed nowhere else."""
        if is_in_backward():
            # Backward recomputes a checkpointed block, and the route that is open now, if any, need
            # not be that of its forward.
            raise InputError(
                "a checkpointed block is recomputed without its route: turn checkpointing on with "
                "model.gradient_checkpointing_enable() (non-reentrant), or pass "
                "context_fn=model.checkpoint_contexts to torch.utils.checkpoint"
            )
        mask = inputs.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        mixture = self.mixer.mixture(route, training=self.training, mask=mask)
        if mixture.num_examples and self._has_media:
            fit = any(site.sees_media for site in self.sites) and media_fit_examples(
                self.base_model, inputs, mixture.num_examples
            )
            mixture = replace(mixture, media_fit=fit)
        self.open_routes.mixture = mixture
        return mixture

    def weights_of(self, task: str | int) -> Tensor:
        """The weights by which a task mixes skills in evaluation, `[N, H, K]`.

        Raises:
            InputError: the task is unknown, the method does not mix skills, or the rule looks at
                more than the task.
        """
        weights = self.mixer.weights_of(self.routes.row(task))
        if weights is None:
            raise InputError(f"method {self.adapter_config.method!r} does not mix skills")
        return weights

    def factors_of(self, task: str | int) -> Sequence[PlainFactors]:
        """The factors that each site applies for one task, in fp32 at least.

        Raises:
            InputError: the task is unknown, or the rule looks at more than the task.
        """
        return self.mixer.factors_of(self.routes.row(task))

    # ---------------------------------------------------------------- activation checkpointing

    def checkpoint_contexts(
        self,
    ) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """The `context_fn` of `torch.utils.checkpoint` that lets recomputation see its route."""
        return nullcontext(), Recomputation(self.open_routes)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Turn on the base model's activation checkpointing; recomputed layers keep their route.

        Args:
            activation_checkpointing_kwargs: options of `torch.utils.checkpoint.checkpoint`.
            **kwargs: passed on to the base model's method of this name (transformers 5) or of the
                older name, `gradient_checkpointing_enable`.

        Raises:
            InputError: the options ask for reentrant checkpointing, which cannot work: it runs
                backward once per block, and all blocks share one graph of mixing.
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
