"""Rules: how skills are chosen for a batch.

A rule turns what it looks at (the tasks of the batch, a condition, the input of each layer) into
what the layers apply. The routing table, `shared` and `private` are rules; others are written by
subclassing `RouteRule` in a file of one's own. A rule owns parameters where it learns, and is saved
and loaded with the inventory under its name.

Shape letters: U distinct tasks, B examples, N routers, H heads, K skills.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from polyroute.errors import InputError, did_you_mean
from polyroute.layer.factors import Factors
from polyroute.routes.tasks import Route

if TYPE_CHECKING:
    from polyroute.routes.mixer import Mixer

__all__ = ["Batch", "Choice", "Gates", "RouteRule", "rule_named"]

_named: dict[str, type["RouteRule"]] = {}


@dataclass(frozen=True)
class Choice:
    """How some rows of the table mix skills."""

    weights: Tensor | None
    """`[U, N, H, K]`; None takes the only skill of a row's set whole."""
    sets: Tensor | None = None
    """`[U]`, the set of skills of each row; None mixes over all skills there are."""


@dataclass(frozen=True)
class Batch:
    """What a rule may look at in one forward."""

    route: Route | None
    """The tasks, the condition and the segments; None where the caller opened no route."""
    mask: Tensor | None
    """The attention mask of the base model's call, whose zeros are padding; None without one."""
    is_training: bool
    dtype: torch.dtype
    """What the layers compute in."""
    record: bool
    """Whether the caller wants to see the gates; see `RouteRule.show`."""


class Gates(NamedTuple):
    """The gates that one site had in one forward."""

    site: int
    """Its place in the list of sites."""
    weights: Tensor
    """In any shape whose last axis is the skills."""
    mask: Tensor | None
    """The attention mask of the forward, whose zeros are padding."""


class RouteRule(nn.Module):
    """How skills are chosen; subclass it to write another rule.

        class Mine(RouteRule, name="mine"):
            def start(self, mixer): ...          # make parameters
            def factors(self, batch, mixer): ... # what each site applies

    A rule whose choice depends on the task alone defines `choose` instead of `factors` and sets
    `is_fixed`; then every task is one plain adapter, which can be merged and exported.

    Attributes:
        gates: while gates are recorded, those of every site and forward, in order.
    """

    name: ClassVar[str] = ""
    """Under which it is saved."""
    needs_tasks: ClassVar[bool] = True
    """Whether a forward without tasks is an error."""
    has_table: ClassVar[bool] = False
    """Whether each task has a row of logits in the routing table."""
    is_fixed: ClassVar[bool] = False
    """Whether a task is one plain adapter, whatever the input."""
    owns_skills: ClassVar[bool] = False
    """Whether each task has a skill of its own, which comes and goes with it."""

    def __init_subclass__(cls, name: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name:
            cls.name = name
            _named[name] = cls

    def __init__(self) -> None:
        super().__init__()
        self.gates: list[Gates] = []

    def start(self, mixer: "Mixer") -> None:
        """Make parameters, once the sizes of the inventory are known; nothing by default.

        Args:
            mixer: has the sites, the config, and the numbers of routers, heads and skills.
        """

    def reset_parameters(self) -> None:
        """Draw the rule's own parameters afresh, for the phase `random`.

        By default those of the modules in it; a rule with bare parameters says how itself.
        """
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset) and module is not self:
                reset()

    def settings(self) -> dict[str, Any]:
        """What `__init__` takes, as JSON values: saved, and given back when a model is loaded."""
        return {}

    def choose(self, rows: Sequence[int], mixer: "Mixer", *, training: bool) -> Choice:
        """How rows of the table mix the skills; for rules that depend on the task alone.

        Args:
            rows: numbers; `MU_ROW` stands for the average.
            mixer: what is mixed.
            training: whether noise acts.
        """
        raise NotImplementedError

    def factors(self, batch: Batch, mixer: "Mixer") -> Sequence[Factors]:
        """What each site applies in one forward; for rules that look at more than the task.

        Build the result with `mixer.mix` (weights that are known before the layers run) or
        `mixer.gated` (weights that are a function of a layer's input).
        """
        raise NotImplementedError

    def show(self, batch: Batch, site: int, weights: Tensor) -> Tensor:
        """Keep the gates of a site, where they are recorded; returns them.

        Args:
            batch: of the forward.
            site: its place in the list of sites.
            weights: the gates, in any shape whose last axis is the skills.
        """
        # Backward recomputes a checkpointed block, whose gates were seen in its forward.
        if batch.record and torch._C._current_graph_task_id() == -1:
            self.gates.append(Gates(site, weights, batch.mask))
        return weights

    def check_fixed(self, what: str) -> None:
        """Make sure that a task is one plain adapter.

        Args:
            what: what is to be done with it, such as `"merged"`.

        Raises:
            InputError: the rule looks at more than the task.
        """
        if not self.is_fixed:
            raise InputError(
                f"the rule {self.name!r} looks at the input, so no single adapter computes what "
                f"a task computes, and it cannot be {what}; phase 'mu' makes the average of the "
                "skills, which can"
            )

    @classmethod
    def restored(cls, settings: dict[str, Any]) -> Self:
        """A rule from what `settings` gave.

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
    if name not in _named:
        raise InputError(
            f"the rule {name!r} is not known here: import the module that defines it first; "
            f"{did_you_mean(name, _named)}"
        )
    return _named[name]
