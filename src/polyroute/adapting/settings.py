"""The settings of one adaptation; the command line makes its options from them.

Nothing here loads torch, so that `polyroute adapt --help` is quick.
"""

from dataclasses import asdict, dataclass
from typing import Any, get_args

from polyroute.config import Phase
from polyroute.errors import InputError
from polyroute.settings import check_settings, flag, named, number, setting, text, whole

__all__ = ["AdaptSettings"]

CHOOSE_BY = ("loss", "score", "score_normalised", "test_score", "test_score_normalised")
OPTIMIZERS = ("adamw", "adafactor", "sgd")


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
    shots: int | None = setting(
        None, whole(optional=True), help="Training examples of each new task."
    )
    """Training examples of the new task; None for all there are."""
    steps: int = setting(100, whole(), help="Optimizer steps of each.")
    batch_size: int = setting(16, whole(), help="Examples in a step.")
    optimizer: str = setting(
        "adamw", named(OPTIMIZERS), values=OPTIMIZERS, help="adamw, adafactor or sgd."
    )
    """`adamw`, `adafactor` or `sgd`; see `polyroute.optimizers`."""
    scale_parameter: bool = setting(
        True, flag(), help="For adafactor: steps in proportion to the size of what they change."
    )
    """For `adafactor`: steps in proportion to the size of what they change."""
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
        help="Weight decay of the routing: it pulls towards the uniform mixture.",
    )  # fmt: skip
    """Weight decay of the routing logits: it pulls them towards the uniform mixture."""
    warmup: float = setting(
        0.06, number(least=0, below=1), help="Share of the steps in which rates rise."
    )
    """Share of the steps in which the rates rise from 0; they then fall linearly to 0."""
    max_grad_norm: float = setting(
        1.0, number(above=0), help="Norm to which all gradients together are clipped."
    )
    """Norm to which the gradients of all that the slot trains are clipped together."""
    init: str = setting(
        "uniform", text(), help="Start: `uniform`, `nearest` (the best training tasks), or a task."
    )
    """Where the new task starts: `"uniform"`, the average of the skills; `"nearest"`, the mixture
    of the training tasks that answer its examples best; or the name of one task. Phase `mu` then
    tunes that mixture as one adapter."""
    validation_shots: int = setting(
        0, whole(0), help="More examples of each task, whose loss chooses the best step."
    )
    """More examples, drawn after the training ones, whose loss chooses the best step; 0 takes the
    last step, whatever its loss."""
    eval_steps: int = setting(10, whole(), help="Steps between looks at them.")
    """Steps between two looks at the examples that choose the best step."""
    patience: int | None = setting(
        None, whole(optional=True), help="Looks without a better loss before stopping early."
    )
    """Looks without a better loss after which the slot stops early; None never stops early."""
    choose_by: str = setting(
        "loss", named(CHOOSE_BY),
        help="What chooses: their loss or score; or test_score, as published T0 runs do.",
    )  # fmt: skip
    """What chooses the best step: the `loss` or the `score` of the validation examples, or
    `test_score`, the score on the very split that the result is scored on, as some published runs
    did; such results look better than they are. `score_normalised` and `test_score_normalised` rank
    choices by log-probability per token. All but `loss` need a suite."""

    def __post_init__(self) -> None:
        """Check every value, and fill in the rate of the routing."""
        from polyroute.optimizers import check_optimizer

        check_settings(self)
        if self.route_lr is None:
            object.__setattr__(self, "route_lr", 1.0 if self.phase == "z" else 0.1)
        check_optimizer(self.optimizer, scale_parameter=self.scale_parameter)
        if self.choose_by in ("score", "score_normalised") and not self.validation_shots:
            raise InputError(
                f"choose_by {self.choose_by!r} looks at validation examples: set validation_shots"
            )
        if self.patience is not None and not self.validation_shots and not self.looks_at_test:
            raise InputError(
                "patience stops by the loss of validation examples: set validation_shots too"
            )
        if self.init != "uniform" and self.phase in ("mu-uncollapsed", "random"):
            raise InputError(
                f"phase {self.phase!r} does not use a route, so init {self.init!r} would be "
                "ignored; use phase 'full', 'z' or 'mu', or init 'uniform'"
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
