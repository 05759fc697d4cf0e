"""Rules: how skills are chosen for a batch.

A rule looks at the tasks of the batch, at a condition or at the input of each layer, and makes the
factors that the layers apply. The rules of the methods are in `polyroute.routes.table_rules`; a
subclass of `RouteRule` in your own file is another one. A rule may have parameters that it learns,
and it is saved and loaded with the inventory under its name.

Shape letters: U distinct tasks, B examples, N routers, H heads, K skills.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from polyroute.config import MHRConfig
from polyroute.errors import InputError, did_you_mean
from polyroute.layer.factors import Factors
from polyroute.layer.open_route import is_in_backward
from polyroute.routes.tasks import Route
from polyroute.settings import marked

if TYPE_CHECKING:
    from polyroute.routes.mixer import Mixer

__all__ = ["Batch", "Choice", "Gates", "RouteRule", "rule_named"]

_rules: dict[str, type["RouteRule"]] = {}
"""The classes of rules by name."""


@dataclass(frozen=True)
class Choice:
    """How some rows of the table mix skills."""

    weights: Tensor | None
    """`[U, N, H, K]`; None takes the only skill of a row's set whole."""
    sets: Tensor | None = None
    """`[U]`, the set of skills of each row; None mixes all skills."""


@dataclass(frozen=True)
class Batch:
    """What a rule may look at in one forward."""

    route: Route | None
    """The tasks, the condition and the segments; None if the caller opened no route."""
    mask: Tensor | None
    """The attention mask of the base model's call, whose zeros are padding; None without one."""
    is_training: bool
    dtype: torch.dtype
    """The type that the layers compute in."""
    gates: "list[Gates] | None"
    """Where gates are recorded, if the caller asked for it; see `RouteRule.show`."""


class Gates(NamedTuple):
    """The gates that one site had in one forward."""

    site: int
    """The place of the site in the list of sites."""
    weights: Tensor
    """The gates, in any shape whose last axis is the skills."""
    mask: Tensor | None
    """The attention mask of the forward, whose zeros are padding."""


class RouteRule(nn.Module):
    """Chooses skills for a batch; subclass it to write another rule.

        class Mine(RouteRule, name="mine"):
            def start(self, mixer): ...          # makes the rule's parameters
            def factors(self, batch, mixer): ... # returns the factors of each site

    A rule that depends on the task alone defines `choose` instead of `factors` and sets `is_fixed`.
    Every task is then one plain adapter, which can be merged and exported.
    """

    name: ClassVar[str] = ""
    """The name under which the rule is saved."""
    needs_tasks: ClassVar[bool] = True
    """Whether a forward without tasks is an error."""
    has_table: ClassVar[bool] = False
    """Whether each task has a row of logits in the routing table."""
    is_fixed: ClassVar[bool] = False
    """Whether a task is one plain adapter for every input."""
    owns_skills: ClassVar[bool] = False
    """Whether each task has a skill of its own, which is added and dropped with the task."""

    stands_alone: ClassVar[bool] = False
    """Whether it can route a model that has another rule: `model.route(rule)`."""

    def __init_subclass__(cls, name: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = name  # never that of a parent, under which another class would be loaded
        if name:
            _rules[name] = cls

    def __init__(self) -> None:
        super().__init__()
        self.is_started = False

    def start(self, mixer: "Mixer") -> None:
        """Make the rule's parameters, once the sizes of the inventory are known; none by default.

        Args:
            mixer: has the sites, the settings, and the numbers of routers, heads and skills.
        """

    def reset_parameters(self) -> None:
        """Draw the rule's own parameters again, for the phase `random`.

        By default the modules inside the rule do so. A rule that holds parameters directly has to
        override this method.
        """
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset) and module is not self:
                reset()

    def settings(self) -> dict[str, Any]:
        """The arguments of `__init__` as JSON values; a loaded rule is made from them."""
        return {}

    def same_for_all(self, mixer: "Mixer") -> bool:
        """Whether all tasks have one adapter now, so that it is mixed and applied only once."""
        return False

    def choose(self, rows: Sequence[int], mixer: "Mixer", *, training: bool) -> Choice:
        """How rows of the table mix the skills; for rules that depend on the task alone.

        Args:
            rows: numbers of rows; `MU_ROW` stands for the average.
            mixer: has the skills and the table.
            training: whether noise acts.
        """
        raise NotImplementedError

    def factors(self, batch: Batch, mixer: "Mixer") -> Sequence[Factors]:
        """The factors of each site in one forward; for rules that look at more than the task.

        Make them with `mixer.mix` (weights that are known before the layers run) or `mixer.gated`
        (weights that are a function of a layer's input).

        Args:
            batch: what the rule may look at.
            mixer: has the skills.
        """
        raise NotImplementedError

    def show(self, batch: Batch, site: int, weights: Tensor) -> Tensor:
        """Record the gates of a site if the caller asked for it; a rule calls this.

        Args:
            batch: the batch of the forward.
            site: the place of the site in the list of sites.
            weights: the gates, in any shape whose last axis is the skills.

        Returns:
            The gates as given.
        """
        # A recomputed layer has recorded its gates in its forward.
        if batch.gates is not None and not is_in_backward():
            batch.gates.append(Gates(site, weights, batch.mask))
        return weights

    def check_free(self, config: MHRConfig) -> None:
        """Make sure that the rule can be attached, and that no setting would be ignored.

        Raises:
            InputError: its class has no name, or settings that JSON cannot hold; it belongs to a
                model already; or a setting of the routing table differs from its default.
        """
        if _rules.get(self.name) is not type(self):
            raise InputError(
                "the rule has no name to be saved by: write "
                f"class {type(self).__name__}(RouteRule, name=...)"
            )
        if self.is_started:
            raise InputError("this rule belongs to another model: make a new one")
        try:
            json.dumps(self.settings())
        except (TypeError, ValueError) as error:
            raise InputError(
                f"the settings of the rule {self.name!r} must be JSON values: {error}"
            ) from error
        if config.method in ("shared", "private"):
            raise InputError(
                f"method={config.method!r} is a rule itself: leave method at its default beside "
                f"the rule {self.name!r}"
            )
        defaults = MHRConfig()
        for name in () if self.has_table else marked(MHRConfig, "of_table"):
            if getattr(config, name) != getattr(defaults, name):
                raise InputError(
                    f"{name}={getattr(config, name)!r} is a setting of the routing table, which "
                    f"the rule {self.name!r} does not have: leave it at its default"
                )

    def check_fixed(self, use: str) -> None:
        """Make sure that a task is one plain adapter.

        Args:
            use: the use of the adapter, such as `"merged"`, for the message.

        Raises:
            InputError: the rule looks at more than the task.
        """
        if not self.is_fixed:
            raise InputError(
                f"the rule {self.name!r} looks at more than the task, so no single adapter "
                f"computes a task, and it cannot be {use}: use 'mu', the average of the skills"
            )

    @classmethod
    def restored(cls, settings: dict[str, Any]) -> Self:
        """A rule made from the result of `settings`.

        Raises:
            InputError: the settings are not those of this rule.
        """
        try:
            return cls(**settings)
        except TypeError as error:
            raise InputError(f"the rule {cls.name!r} has other settings: {error}") from error


def rule_named(name: str) -> type[RouteRule]:
    """The class of a rule.

    Raises:
        InputError: no class of this name was defined.
    """
    if name not in _rules:
        raise InputError(
            f"the rule {name!r} is not known here: import the module that defines it first; "
            f"{did_you_mean(name, _rules)}"
        )
    return _rules[name]
