"""The settings of an adaptation, and grids that try several values of them.

The flags of `polyroute adapt` are made from them, so nothing here loads torch.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, get_args

from polyroute.config import Phase
from polyroute.errors import InputError, did_you_mean
from polyroute.settings import check_settings, flag, named, number, setting, text, whole

__all__ = ["AdaptSettings", "check_names", "variants"]

CHOOSE_BY = ("loss", "score", "score_normalised", "test_score", "test_score_normalised")
OPTIMIZERS = ("adamw", "adafactor", "sgd")
WITHOUT_ROUTE = ("mu-uncollapsed", "random")
"""Phases whose result does not depend on where a route starts."""


@dataclass(frozen=True, kw_only=True)
class AdaptSettings:
    """How to adapt one slot.

    Raises:
        InputError: a value is out of range, or two values exclude each other.
    """

    phase: Phase = setting(
        "mu", named(get_args(Phase)), values=get_args(Phase),
        help="full, z, mu, mu-uncollapsed or random.",
    )  # fmt: skip
    """What trains; see `RoutedModel.set_phase`."""
    shots: int | None = setting(
        None, whole(optional=True), help="Training examples of each new task."
    )
    """Training examples of the new task; None takes all there are."""
    stratify: bool = setting(
        False, flag(), help="Draw shots with as many examples of each answer as there can be."
    )
    """Whether the shots are drawn so that every answer is there as often as can be, in tasks whose
    examples all have the same choices; otherwise they are drawn whatever their answers, as in
    published protocols."""
    steps: int = setting(100, whole(), help="Optimizer steps of each.")
    """Optimizer steps."""
    batch_size: int = setting(16, whole(), help="Examples in a step.")
    """Examples in a step; all of them where there are fewer."""
    optimizer: str = setting(
        "adamw", named(OPTIMIZERS), values=OPTIMIZERS, help="adamw, adafactor or sgd."
    )
    """`adamw`, `adafactor` or `sgd`; see `polyroute.optimizers`."""
    scale_parameter: bool = setting(
        True, flag(), help="Adafactor takes steps in proportion to the size of what they change."
    )
    """Whether `adafactor` takes steps in proportion to the size of what they change."""
    lr: float = setting(1e-3, number(above=0), help="Learning rate of the skills.")
    """Learning rate of the skills."""
    route_lr: float | None = setting(
        None, number(above=0, optional=True),
        help="Learning rate of the routing [1 in phase z, else 0.1].",
    )  # fmt: skip
    """Learning rate of the routing logits; by default 1 in phase `z`, where nothing else trains,
    and 0.1 elsewhere."""
    weight_decay: float = setting(0.0, number(least=0), help="Weight decay of the skills.")
    """Weight decay of the skills."""
    route_weight_decay: float = setting(
        0.0, number(least=0),
        help="Weight decay of the routing, which pulls it to the uniform mixture.",
    )  # fmt: skip
    """Weight decay of the routing logits, which pulls them to the uniform mixture."""
    warmup: float = setting(
        0.06, number(least=0, below=1), help="Share of the steps in which rates rise."
    )
    """Share of the steps in which the rates rise from 0; they then fall linearly to 0."""
    max_grad_norm: float = setting(
        1.0, number(above=0), help="All gradients together are clipped to this norm."
    )
    """Largest norm of the gradient of everything that the slot trains, taken together."""
    init: str = setting(
        "uniform", text(), help="Start: `uniform`, `nearest` (the best training tasks), or a task."
    )
    """Where the new task starts: `"uniform"`, the average of the skills; `"nearest"`, the mixture
    of the training tasks that answer its examples best; or the name of one task. Phase `mu` then
    tunes that mixture as one adapter."""
    validation_shots: int = setting(
        0, whole(0), help="More examples of each task, whose loss chooses the best step."
    )
    """More examples, drawn after the training ones, whose loss chooses the best step; with 0 the
    result is taken after the last step, whatever its loss."""
    eval_steps: int = setting(10, whole(), help="Steps between looks at the validation examples.")
    """Steps between two looks at the examples that choose the best step."""
    patience: int | None = setting(
        None, whole(optional=True), help="Looks without a better loss before stopping early."
    )
    """Looks without a better loss after which the slot stops early; None never stops early."""
    choose_by: str = setting(
        "loss", named(CHOOSE_BY), values=CHOOSE_BY,
        help="What chooses the best step: loss, score or, as in published T0 runs, test_score.",
    )  # fmt: skip
    """What chooses the best step: the `loss` or the `score` of the validation examples, or
    `test_score`, the score on the very split that the result is scored on, as some published runs
    did; such results look better than they are. `score_normalised` and `test_score_normalised` rank
    choices by log-probability per token. Only `loss` works without a suite."""

    def __post_init__(self) -> None:
        """Check the values, and fill in the learning rate of the routes."""
        from polyroute.optimizers import check_optimizer

        check_settings(self)
        if self.route_lr is None:
            object.__setattr__(self, "route_lr", 1.0 if self.phase == "z" else 0.1)
        check_optimizer(self.optimizer, scale_parameter=self.scale_parameter)
        if self.stratify and self.shots is None:
            raise InputError("stratify chooses among the examples of a task: set shots too")
        self._check_choice()
        if self.init != "uniform" and self.phase in WITHOUT_ROUTE:
            raise InputError(
                f"phase {self.phase!r} does not use a route, so init {self.init!r} would be "
                "ignored; use phase 'full', 'z' or 'mu', or init 'uniform'"
            )

    def _check_choice(self) -> None:
        """Make sure that there is something to choose the best step by."""
        if self.validation_shots or self.looks_at_test:
            return
        if self.choose_by != "loss":
            raise InputError(
                f"choose_by {self.choose_by!r} looks at validation examples: set validation_shots"
            )
        if self.patience is not None:
            raise InputError(
                "patience stops by the loss of validation examples: set validation_shots too"
            )

    @property
    def looks_at_test(self) -> bool:
        """Whether the split that the result is scored on chooses the best step."""
        return self.choose_by.startswith("test_")

    @property
    def optimization(self) -> str:
        """The optimizer and all that it was given, in one line."""
        from polyroute.optimizers import summary

        return summary({**asdict(self), "schedule": "linear"})

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return asdict(self)


def variants(
    settings: AdaptSettings, grid: Mapping[str, Sequence[Any]] | None = None
) -> dict[str, AdaptSettings]:
    """Settings for each combination of a grid's values, by a label such as `lr=0.001,steps=50`.

    Raises:
        InputError: the grid names no setting, repeats or lacks values, or varies the phase.
    """
    grid = grid or {}
    check_names(grid, settings)
    if "phase" in grid:
        raise InputError("the phase cannot vary within a run: adapt once for each phase")
    for name, values in grid.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise InputError(f"the grid of {name!r} must be a list of values, not {values!r}")
        if len(set(map(str, values))) < len(values):
            raise InputError(f"the grid of {name!r} repeats a value: {list(values)}")
    found: dict[str, AdaptSettings] = {}
    for values in itertools.product(*grid.values()):
        variant = replace(settings, **dict(zip(grid, values, strict=True)))
        # The label is sorted and made of checked values, so 1 and 1.0 are one setting whatever the
        # order of the grid.
        found[",".join(f"{name}={getattr(variant, name)}" for name in sorted(grid))] = variant
    return found


def check_names(
    given: Mapping[str, Any], settings: AdaptSettings | type[AdaptSettings] = AdaptSettings
) -> None:
    """Make sure that every name is a setting of an adaptation.

    Raises:
        InputError: one is not; the message offers the nearest.
    """
    names = [field.name for field in fields(settings)]
    for name in given:
        if name not in names:
            raise InputError(f"there is no setting {name!r}: {did_you_mean(name, names)}")
