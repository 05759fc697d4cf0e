"""What is attached to a base model, as one frozen record that is saved with every checkpoint."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, Literal, get_args

from polyroute.errors import InputError, did_you_mean

__all__ = ["Granularity", "MHRConfig", "check_number"]

Method = Literal["mhr", "poly", "shared", "private"]
Adapter = Literal["lora", "ia3"]
Gate = Literal["sigmoid", "relaxed_bernoulli", "straight_through"]
Normalization = Literal["sum", "l2", "average_correction"]
Init = Literal["mttl", "peft"]
Granularity = Literal["finegrained", "layerwise", "blockwise", "coderwise", "coarsegrained"]


@dataclass(frozen=True, kw_only=True)
class MHRConfig:
    """Settings of an inventory of skills and of the routing over it.

    The defaults are those of the paper's T0 runs (Caccia et al., 2023): plain sigmoid gates,
    normalised to sum to one, no noise, one router per adapted layer.

    Raises:
        InputError: a value is out of range, or two values exclude each other.
    """

    method: Method = "mhr"
    """`mhr`: heads are routed apart. `poly`: one head. `shared`: one skill for all tasks.
    `private`: one skill per task."""
    adapter: Adapter = "lora"
    """`lora`: low-rank update. `ia3`: a learned scale of each output unit."""
    num_skills: int | None = None
    """Skills in the inventory; 8 for `mhr` and `poly`, 1 for `shared`, the number of tasks for
    `private`."""
    num_heads: int | None = None
    """Contiguous blocks of each layer that are routed apart; must divide every adapted width. 8 for
    `mhr`, otherwise 1."""
    rank: int = 4
    """Rank of a skill, and therefore of every mixture of skills."""
    alpha: float | None = None
    """The update is scaled by `alpha / rank`; default: `rank`, a scale of 1."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """`"all-linear"` (every linear layer but the output embedding), a regular expression that
    matches full layer names, or a list of name endings such as `["q", "v"]`."""
    exclude_modules: str | tuple[str, ...] | None = None
    """Layers to leave out, by regular expression or name endings."""
    granularity: Granularity | Callable[[str], str] = "finegrained"
    """Which layers share a router: see `polyroute.layer.sites.router_of`. A function maps a layer
    name to the name of its router."""
    init: Init = "mttl"
    """Bound of the uniform initial A: `mttl` is 1/sqrt(3 d_in), the paper's code; `peft` is
    1/sqrt(d_in / heads), which is sqrt(3 heads) times wider."""
    dropout: float = 0.0
    """Probability with which the adapter's input is dropped in training."""
    gate: Gate = "sigmoid"
    """How a routing logit becomes a gate. `relaxed_bernoulli` adds noise in training only, for each
    example where tasks are named per example, so the gates of training and evaluation differ on
    average (0.66 and 0.73 at logit 1)."""
    normalization: Normalization = "sum"
    """`sum`: gates sum to one over the skills. `l2`: logits over their 2-norm, no gate; weights may
    be negative. `average_correction`: gates times sqrt(heads / skills), not normalised."""
    logit_dropout: float = 0.0
    """Probability with which a gate is dropped in training."""
    shared_skill: bool = False
    """The last skill is always on, for every task."""
    anneal_steps: int = 0
    """Over this many last training steps the routing moves to the uniform mixture."""

    def __post_init__(self) -> None:
        """Fill in what depends on the method and check every value."""
        self._check_modules()
        for name, kind in (
            ("method", Method),
            ("adapter", Adapter),
            ("gate", Gate),
            ("normalization", Normalization),
            ("init", Init),
        ):
            _one_of(name, getattr(self, name), get_args(kind))
        if not callable(self.granularity):
            _one_of("granularity", self.granularity, get_args(Granularity))
        for name in ("num_skills", "num_heads", "rank", "anneal_steps"):
            value = getattr(self, name)
            lowest = 0 if name == "anneal_steps" else 1
            if value is None and name in ("num_skills", "num_heads"):
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise InputError(f"{name} must be a positive whole number, not {value!r}")
            if value < lowest:
                at_least = (
                    "must not be negative" if lowest == 0 else "must be a positive whole number"
                )
                raise InputError(f"{name} {at_least}, not {value!r}")
        for name in ("alpha", "dropout", "logit_dropout"):
            if getattr(self, name) is not None or name != "alpha":
                check_number(name, getattr(self, name))
        if not isinstance(self.shared_skill, bool):
            raise InputError(f"shared_skill must be True or False, not {self.shared_skill!r}")
        if self.adapter == "ia3":
            if self.dropout:
                raise InputError("adapter='ia3' has no input to drop: leave dropout at 0")
            object.__setattr__(self, "rank", 1)  # a scale of each unit: neither rank nor alpha
            object.__setattr__(self, "alpha", 1.0)
        self._fill_counts()
        if not self.scale > 0:
            raise InputError(f"alpha must be positive, not {self.alpha!r}")
        for name in ("dropout", "logit_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be in [0, 1), not {getattr(self, name)!r}")
        if self.normalization == "l2" and (
            self.gate != "sigmoid" or self.logit_dropout or self.shared_skill
        ):
            raise InputError(
                "normalization='l2' uses the logits themselves: leave gate, logit_dropout and "
                "shared_skill at their defaults"
            )

    def _check_modules(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value: Any = getattr(self, name)
            if isinstance(value, str) or (value is None and name == "exclude_modules"):
                continue
            is_list = isinstance(value, list | tuple | set | frozenset)
            if not is_list or not all(isinstance(ending, str) and ending for ending in value):
                raise InputError(
                    f"{name} must be a regular expression or a list of name endings such as "
                    f"['q', 'v'], not {value!r}"
                )
            object.__setattr__(self, name, tuple(value))

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
        skills = {"shared": 1, "private": None}.get(self.method, 8)
        if self.num_skills is None:
            object.__setattr__(self, "num_skills", skills)
        if self.num_heads is None:
            object.__setattr__(self, "num_heads", 8 if self.method == "mhr" else 1)
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


def check_number(name: str, value: object) -> float:
    """Make sure that a setting is an ordinary number.

    Raises:
        InputError: it is of another type, NaN or infinite.
    """
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise InputError(f"{name} must be a finite number, not {value!r}")
    return float(value)


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")
