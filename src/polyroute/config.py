"""The settings of an inventory, as one frozen record that is saved with every checkpoint."""

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

__all__ = ["CUSTOM", "LAYER_SETTINGS", "Granularity", "MHRConfig"]

Method = Literal["mhr", "poly", "shared", "private"]
Adapter = Literal["lora", "ia3"]
Combine = Literal["weight", "output"]
Gate = Literal["sigmoid", "relaxed_bernoulli", "straight_through"]
Normalization = Literal["sum", "l2", "average_correction", "none"]
Init = Literal["mttl", "peft"]
Granularity = Literal["finegrained", "layerwise", "blockwise", "coderwise", "coarsegrained"]

Phase = Literal["full", "z", "mu", "mu-uncollapsed", "random"]
"""A phase of training, which decides what trains; see `RoutedModel.set_phase`."""

CUSTOM = "custom"
"""The saved granularity of an inventory whose granularity is a function."""

COUNTS: dict[str, tuple[int | None, int]] = {
    "mhr": (8, 8), "poly": (8, 1), "shared": (1, 1), "private": (None, 1),
}  # fmt: skip
"""The default numbers of skills and of heads of each method; None is one skill per task."""


def _granularity(name: str, value: Any) -> Any:
    return value if callable(value) else one_of(*get_args(Granularity))(name, value)


@dataclass(frozen=True, kw_only=True)
class MHRConfig:
    """Settings of an inventory of skills and of its routing.

    The defaults are those of the paper's T0 runs (Caccia et al., 2023): plain sigmoid gates,
    normalised to sum to one, no noise, one router per adapted layer.

    Raises:
        InputError: a value is out of range, or two values exclude each other.
    """

    # Three marks: settings marked `computes` decide what given skills and rows compute. Settings
    # marked `whole_model` look beyond one layer; an adapter of PEFT lacks them, because PEFT makes
    # it layer by layer. Settings marked `of_table` have no effect on a rule without a table.

    method: Method = setting(
        "mhr", one_of(*get_args(Method)), computes=True, help="mhr, poly, shared or private."
    )
    """`mhr`: several heads, each routed separately. `poly`: one head. `shared`: one skill for all
    tasks. `private`: one skill per task."""
    adapter: Adapter = setting(
        "lora", one_of(*get_args(Adapter)), computes=True, help="lora or ia3."
    )
    """`lora`: a low-rank update. `ia3`: a learned scale of each output unit."""
    num_skills: int | None = setting(
        None, whole(optional=True), option="skills", help="Skills in the inventory [8]."
    )
    """The number of skills in the inventory. Default: 8 for `mhr` and `poly`, 1 for `shared`, and
    the number of tasks for `private`."""
    num_heads: int | None = setting(
        None, whole(optional=True), option="heads", help="Routing heads, for mhr [8]."
    )
    """The number of contiguous blocks of each layer that are routed separately; it must divide
    every adapted width. Default: 8 for `mhr`, otherwise 1."""
    rank: int = setting(4, whole(), computes=True, help="Rank of a skill.")
    """The rank of a skill, and of every mixture of skills in weight space."""
    alpha: float | None = setting(
        None, number(above=0, optional=True), computes=True, help="Scale is alpha / rank [rank]."
    )
    """The update is scaled by `alpha / rank`. Default: `rank`, which makes the scale 1."""
    combine: Combine = setting(
        "weight", one_of(*get_args(Combine)), computes=True,
        help="Average the factors of skills (weight) or what they add (output).",
    )  # fmt: skip
    """`weight`: the factors of the skills are averaged, so a mixture has the rank of one skill.
    `output`: the skills' updates of a layer's output are averaged, so a mixture of K skills has K
    times the rank. With one skill both compute the same."""
    target_modules: str | tuple[str, ...] = setting(
        "all-linear", names(pattern=True), option="target", whole_model=True,
        help="all-linear, a regular expression, or endings: `q,v`.",
    )  # fmt: skip
    """The layers to adapt: a list of name endings such as `["q", "v"]`, a regular expression that
    matches full layer names, or `"all-linear"`. The last means every linear layer except the output
    embedding, and in a model that also takes images or audio only those of its language part."""
    exclude_modules: str | tuple[str, ...] | None = setting(
        None, names(pattern=True, optional=True), option="exclude", whole_model=True,
        help="Layers to leave out, as --target.",
    )  # fmt: skip
    """The layers to leave out: a regular expression or a list of name endings."""
    modules_to_save: tuple[str, ...] | None = setting(
        None, names(optional=True), whole_model=True,
        help="Whole modules that train and are saved beside the skills: `classifier`.",
    )  # fmt: skip
    """Whole modules of the base model, such as a new head or norms, that train together for all
    tasks and are saved beside the skills. They are given by name endings: `["classifier"]`."""
    granularity: Granularity | Callable[[str], str] = setting(
        "finegrained", _granularity, whole_model=True,
        help="finegrained, layerwise, blockwise, coderwise or coarsegrained.",
        values=get_args(Granularity),
    )  # fmt: skip
    """Which layers share a router; see `polyroute.layer.granularity.router_of`. A function maps the
    name of a layer to the name of its router."""
    init: Init = setting("mttl", one_of(*get_args(Init)), help="Initial A: mttl or peft.")
    """The bound of the uniform initial A. `mttl`, as in the paper's code: 1/sqrt(3 d_in). `peft`:
    1/sqrt(d_in / heads), which is sqrt(3 heads) times larger."""
    route_spread: float = setting(
        0.001, number(above=0), of_table=True,
        help="Tasks start with routing logits within this bound.",
    )  # fmt: skip
    """The initial logits of the tasks that the inventory is made with are uniform within this
    bound. The published 0.001 makes every mixture uniform, so that all skills get the same
    gradient and stay alike for long. Tasks that are added later start uniform."""
    dropout: float = setting(0.0, number(least=0, below=1), help="Dropout of the adapter's input.")
    """The probability with which the adapter's input is dropped in training."""
    gate: Gate = setting(
        "sigmoid", one_of(*get_args(Gate)), computes=True, of_table=True,
        help="sigmoid, relaxed_bernoulli or straight_through.",
    )  # fmt: skip
    """How a routing logit becomes a gate. `relaxed_bernoulli` adds noise in training only, drawn
    for each example if tasks are named per example. The mean gate of training therefore differs
    from the gate of evaluation (0.66 and 0.73 at logit 1)."""
    normalization: Normalization = setting(
        "sum", one_of(*get_args(Normalization)), computes=True, of_table=True,
        help="sum, l2, average_correction or none.",
    )  # fmt: skip
    """How gates become weights. `sum`: they are divided by their sum over the skills. `l2`: the
    weights are the logits divided by their 2-norm, without a gate, and may be negative.
    `average_correction`: gates are multiplied by sqrt(heads / skills). `none`: the weights are the
    logits themselves, which may be negative."""
    logit_dropout: float = setting(
        0.0, number(least=0, below=1), computes=True, of_table=True,
        help="Probability with which a gate is dropped in training.",
    )  # fmt: skip
    """The probability with which a gate is dropped in training."""
    shared_skill: bool = setting(
        False,
        flag(),
        computes=True,
        of_table=True,
        help="The last skill is always on, for every task.",
    )
    """Whether the gate of the last skill is 1 for every task."""
    anneal_steps: int = setting(
        0, whole(0), whole_model=True, of_table=True,
        help="Number of last steps in which routing moves to the uniform mixture.",
    )  # fmt: skip
    """The number of last training steps over which routing moves to the uniform mixture."""

    def __post_init__(self) -> None:
        """Check every value, and fill in defaults that depend on the method."""
        check_settings(self)
        if self.adapter == "ia3":
            self._check_ia3()
        self._fill_counts()
        if self.normalization in ("l2", "none") and (
            self.gate != "sigmoid" or self.logit_dropout or self.shared_skill
        ):
            raise InputError(
                f"normalization={self.normalization!r} uses the logits themselves: leave gate, "
                "logit_dropout and shared_skill at their defaults"
            )

    def _check_ia3(self) -> None:
        if self.dropout:
            raise InputError("adapter='ia3' has no input of its own to drop: leave dropout at 0")
        if self.combine == "output":
            raise InputError(
                "adapter='ia3' combines skills in weight space only: leave combine at 'weight'"
            )
        object.__setattr__(self, "rank", 1)  # (IA)^3 has neither a rank nor an alpha
        object.__setattr__(self, "alpha", 1.0)

    def _fill_counts(self) -> None:
        if self.method != "mhr" and self.num_heads not in (None, 1):
            raise InputError(
                f"method={self.method!r} has one head, not {self.num_heads}: "
                "use method='mhr' for several"
            )
        if self.method == "shared" and self.num_skills not in (None, 1):
            raise InputError(
                f"method='shared' has one skill, not {self.num_skills}: use method='poly' or 'mhr'"
            )
        if self.method == "private" and self.num_skills is not None:
            raise InputError("method='private' has one skill per task: leave num_skills out")
        if self.method in ("shared", "private") and self.combine == "output":
            raise InputError(
                f"method={self.method!r} takes one skill whole and combines none: leave combine "
                "at 'weight'"
            )
        skills, heads = COUNTS[self.method]
        if self.num_skills is None:
            object.__setattr__(self, "num_skills", skills)
        if self.num_heads is None:
            object.__setattr__(self, "num_heads", heads)
        if self.alpha is None:
            object.__setattr__(self, "alpha", float(self.rank))

    def skills_for(self, num_tasks: int) -> int:
        """The number of skills in an inventory with this many tasks."""
        return num_tasks if self.num_skills is None else self.num_skills

    @property
    def heads(self) -> int:
        """The number of heads, the default of the method included."""
        assert self.num_heads is not None
        return self.num_heads

    @property
    def scale(self) -> float:
        """The factor `alpha / rank` that multiplies the update once."""
        assert self.alpha is not None
        return self.alpha / self.rank

    @property
    def has_router(self) -> bool:
        """Whether the skills of a task are chosen by learned logits."""
        return self.method in ("mhr", "poly")

    @property
    def noisy_in_training(self) -> bool:
        """Whether each example draws its own gates in training."""
        return self.has_router and (self.gate == "relaxed_bernoulli" or self.logit_dropout > 0)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values; a granularity function becomes `"custom"`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if callable(self.granularity):
            values["granularity"] = CUSTOM
        if self.method == "private":
            values.pop("num_skills")
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "MHRConfig":
        """The inverse of `to_dict`.

        Raises:
            InputError: there is no setting of a key's name, or as the constructor.
        """
        known = {f.name for f in fields(cls)}
        for key in values:
            if key not in known:
                raise InputError(f"config key {key!r} does not exist: {did_you_mean(key, known)}")
        return cls(**values)


LAYER_SETTINGS = tuple(f.name for f in fields(MHRConfig) if not f.metadata.get("whole_model"))
"""The settings of a single layer, which an adapter of PEFT has too."""
