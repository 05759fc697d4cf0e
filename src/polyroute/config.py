"""What is attached to a base model, as one frozen record that is saved with every checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from polyroute.errors import InputError, did_you_mean
from polyroute.settings import (
    check_settings,
    flag,
    names,
    number,
    one_of,
    setting,
    whole,
)

__all__ = ["LAYER_SETTINGS", "Granularity", "MHRConfig"]

Method = Literal["mhr", "poly", "shared", "private"]
Adapter = Literal["lora", "ia3"]
Combine = Literal["weight", "output"]
Gate = Literal["sigmoid", "relaxed_bernoulli", "straight_through"]
Normalization = Literal["sum", "l2", "average_correction"]
Init = Literal["mttl", "peft"]
Granularity = Literal["finegrained", "layerwise", "blockwise", "coderwise", "coarsegrained"]

Phase = Literal["full", "z", "mu", "mu-uncollapsed", "random"]
"""What trains; see `RoutedModel.set_phase`."""

COUNTS: dict[str, tuple[int | None, int]] = {
    "mhr": (8, 8), "poly": (8, 1), "shared": (1, 1), "private": (None, 1),
}  # fmt: skip
"""For each method the number of skills and of heads where none is given; None is one per task."""


def _granularity(name: str, value: Any) -> Any:
    return value if callable(value) else one_of(*get_args(Granularity))(name, value)


@dataclass(frozen=True, kw_only=True)
class MHRConfig:
    """Settings of an inventory of skills and of the routing over it.

    The defaults are those of the paper's T0 runs (Caccia et al., 2023): plain sigmoid gates,
    normalised to sum to one, no noise, one router per adapted layer.

    Raises:
        InputError: a value is out of range, or two values exclude each other.
    """

    # Marks: `computes` settings decide what given skills and rows compute; `whole_model` settings
    # look beyond one layer, so an adapter of PEFT, which is made layer by layer, lacks them.

    method: Method = setting(
        "mhr", one_of(*get_args(Method)), computes=True, help="mhr, poly, shared or private."
    )
    """`mhr`: heads are routed apart. `poly`: one head. `shared`: one skill for all tasks.
    `private`: one skill per task."""
    adapter: Adapter = setting(
        "lora", one_of(*get_args(Adapter)), computes=True, help="lora or ia3."
    )
    """`lora`: low-rank update. `ia3`: a learned scale of each output unit."""
    num_skills: int | None = setting(
        None, whole(optional=True), option="skills", help="Skills in the inventory [8]."
    )
    """Skills in the inventory; 8 for `mhr` and `poly`, 1 for `shared`, the number of tasks for
    `private`."""
    num_heads: int | None = setting(
        None, whole(optional=True), option="heads", help="Routing heads, for mhr [8]."
    )
    """Contiguous blocks of each layer that are routed apart; must divide every adapted width. 8 for
    `mhr`, otherwise 1."""
    rank: int = setting(4, whole(), computes=True, help="Rank of a skill.")
    """Rank of a skill, and of every mixture of skills in weight space."""
    alpha: float | None = setting(
        None, number(above=0, optional=True), computes=True, help="Scale is alpha / rank [rank]."
    )
    """The update is scaled by `alpha / rank`; default: `rank`, a scale of 1."""
    combine: Combine = setting(
        "weight", one_of(*get_args(Combine)), computes=True,
        help="Average the factors of skills (weight) or what they add (output).",
    )  # fmt: skip
    """`weight`: the factors of the skills are averaged, so a mixture has the rank of one skill.
    `output`: what the skills add to a layer's output is averaged, so a mixture of K skills has K
    times the rank. With one skill both are the same."""
    target_modules: str | tuple[str, ...] = setting(
        "all-linear", names(pattern=True), option="target", whole_model=True,
        help="all-linear, a regular expression, or endings: `q,v`.",
    )  # fmt: skip
    """`"all-linear"` (every linear layer but the output embedding; of a model that also sees
    images or hears audio, those of its language part), a regular expression that matches full layer
    names, or a list of name endings such as `["q", "v"]`."""
    exclude_modules: str | tuple[str, ...] | None = setting(
        None, names(pattern=True, optional=True), option="exclude", whole_model=True,
        help="Layers to leave out, as --target.",
    )  # fmt: skip
    """Layers to leave out, by regular expression or name endings."""
    modules_to_save: tuple[str, ...] | None = setting(
        None, names(optional=True), whole_model=True,
        help="Whole modules that train and are saved beside the skills: `classifier`.",
    )  # fmt: skip
    """Whole modules of the base model, by name endings such as `["classifier"]`, that train for all
    tasks alike and are saved beside the inventory: a new head, or norms."""
    granularity: Granularity | Callable[[str], str] = setting(
        "finegrained", _granularity, whole_model=True,
        help="finegrained, layerwise, blockwise, coderwise or coarsegrained.",
        values=get_args(Granularity),
    )  # fmt: skip
    """Which layers share a router: see `polyroute.layer.granularity.router_of`. A function maps a
    layer name to the name of its router."""
    init: Init = setting("mttl", one_of(*get_args(Init)), help="Initial A: mttl or peft.")
    """Bound of the uniform initial A: `mttl` is 1/sqrt(3 d_in), the paper's code; `peft` is
    1/sqrt(d_in / heads), which is sqrt(3 heads) times wider."""
    dropout: float = setting(0.0, number(least=0, below=1), help="Dropout of the adapter's input.")
    """Probability with which the adapter's input is dropped in training."""
    gate: Gate = setting(
        "sigmoid", one_of(*get_args(Gate)), computes=True,
        help="sigmoid, relaxed_bernoulli or straight_through.",
    )  # fmt: skip
    """How a routing logit becomes a gate. `relaxed_bernoulli` adds noise in training only, for each
    example where tasks are named per example, so the gates of training and evaluation differ on
    average (0.66 and 0.73 at logit 1)."""
    normalization: Normalization = setting(
        "sum", one_of(*get_args(Normalization)), computes=True,
        help="sum, l2 or average_correction.",
    )  # fmt: skip
    """`sum`: gates sum to one over the skills. `l2`: logits over their 2-norm, no gate; weights may
    be negative. `average_correction`: gates times sqrt(heads / skills), not normalised."""
    logit_dropout: float = setting(
        0.0, number(least=0, below=1), computes=True,
        help="Probability with which a gate is dropped in training.",
    )  # fmt: skip
    """Probability with which a gate is dropped in training."""
    shared_skill: bool = setting(
        False, flag(), computes=True, help="The last skill is always on, for every task."
    )
    """The last skill is always on, for every task."""
    anneal_steps: int = setting(
        0, whole(0), whole_model=True,
        help="Last steps, over which routing moves to the uniform mixture.",
    )  # fmt: skip
    """Over this many last training steps the routing moves to the uniform mixture."""

    def __post_init__(self) -> None:
        """Check every value, and fill in what depends on the method."""
        check_settings(self)
        if self.adapter == "ia3":
            self._check_ia3()
        self._fill_counts()
        if self.normalization == "l2" and (
            self.gate != "sigmoid" or self.logit_dropout or self.shared_skill
        ):
            raise InputError(
                "normalization='l2' uses the logits themselves: leave gate, logit_dropout and "
                "shared_skill at their defaults"
            )

    def _check_ia3(self) -> None:
        if self.dropout:
            raise InputError("adapter='ia3' has no input to drop: leave dropout at 0")
        if self.combine == "output":
            raise InputError(
                "adapter='ia3' multiplies outputs, which are combined in weight space: leave "
                "combine at 'weight'"
            )
        object.__setattr__(self, "rank", 1)  # a scale of each unit has neither rank nor alpha
        object.__setattr__(self, "alpha", 1.0)

    def _fill_counts(self) -> None:
        if self.method != "mhr" and self.num_heads not in (None, 1):
            raise InputError(
                f"method={self.method!r} has one head, not {self.num_heads}; "
                "use method='mhr' for several"
            )
        if self.method == "shared" and self.num_skills not in (None, 1):
            raise InputError(
                f"method='shared' has one skill, not {self.num_skills}; use 'poly' or 'mhr'"
            )
        if self.method == "private" and self.num_skills is not None:
            raise InputError("method='private' has one skill per task: leave num_skills out")
        if self.method in ("shared", "private") and self.combine == "output":
            raise InputError(
                f"method={self.method!r} takes one skill whole and combines none: leave combine at "
                "'weight'"
            )
        skills, heads = COUNTS[self.method]
        if self.num_skills is None:
            object.__setattr__(self, "num_skills", skills)
        if self.num_heads is None:
            object.__setattr__(self, "num_heads", heads)
        if self.alpha is None:
            object.__setattr__(self, "alpha", float(self.rank))

    @property
    def heads(self) -> int:
        """The number of heads, filled in."""
        assert self.num_heads is not None
        return self.num_heads

    @property
    def scale(self) -> float:
        """`alpha / rank`, by which the update is multiplied once."""
        assert self.alpha is not None
        return self.alpha / self.rank

    @property
    def has_router(self) -> bool:
        """Whether tasks choose among skills by learned logits."""
        return self.method in ("mhr", "poly")

    @property
    def noisy_in_training(self) -> bool:
        """Whether each example draws its own gates in training."""
        return self.has_router and (self.gate == "relaxed_bernoulli" or self.logit_dropout > 0)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values; a granularity function becomes `"custom"`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if callable(self.granularity):
            values["granularity"] = "custom"
        if self.method == "private":
            values.pop("num_skills")
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "MHRConfig":
        """The inverse of `to_dict`.

        Raises:
            InputError: a key does not exist.
        """
        known = {f.name for f in fields(cls)}
        for key in values:
            if key not in known:
                raise InputError(f"config key {key!r} does not exist: {did_you_mean(key, known)}")
        return cls(**values)


LAYER_SETTINGS = tuple(f.name for f in fields(MHRConfig) if not f.metadata.get("whole_model"))
"""The settings of one layer: those that an adapter of PEFT, made layer by layer, has too."""
