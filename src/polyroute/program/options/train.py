"""Options of `polyroute train`."""

from dataclasses import dataclass
from pathlib import Path

from polyroute.config import MHRConfig, Phase
from polyroute.errors import InputError
from polyroute.program.options.flags import flags_of, group
from polyroute.program.options.shared import (
    OBJECTIVE,
    REQUIRED,
    PlannedOptions,
    Reading,
    Source,
)
from polyroute.settings import (
    SEEDS,
    check_settings,
    flag,
    named,
    number,
    one_of,
    setting,
    text,
    whole,
)
from polyroute.training.names import ON_NAN

__all__ = ["Optimization", "TrainOptions"]

TRAINING_PHASES = ("full", "mu")
CONTINUED_PHASES = ("z", "mu-uncollapsed")
"""These start from an inventory that has learned something."""
TRAINING_OPTIMIZERS = ("adamw", "adafactor")
SCHEDULES = ("linear", "constant")


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """How training moves what it trains; see `polyroute.optimizers`."""

    lr: float = setting(1e-3, number(above=0), help="Learning rate of the skills.")
    route_lr: float = setting(0.1, number(above=0), help="Learning rate of the routing.")
    weight_decay: float = setting(0.0, number(least=0), help="Weight decay of the skills.")
    route_weight_decay: float = setting(
        0.0, number(least=0),
        help="Weight decay of the routing, which pulls it to the uniform mixture.",
    )  # fmt: skip
    optimizer: str = setting(
        "adamw", named(TRAINING_OPTIMIZERS), values=TRAINING_OPTIMIZERS, help="adamw or adafactor."
    )
    scale_parameter: bool = setting(
        True, flag(), help="Adafactor takes steps in proportion to the size of what they change."
    )
    max_grad_norm: float = setting(
        1.0, number(above=0), help="All gradients together are clipped to this norm."
    )
    warmup: float = setting(0.06, number(least=0, below=1), help="Share of steps that warm up.")
    schedule: str = setting(
        "linear", named(SCHEDULES), values=SCHEDULES,
        help="Rates after the warm-up: linear (down to 0) or constant.",
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Check every value."""
        check_settings(self)
        if self.optimizer != "adafactor" and not self.scale_parameter:
            raise InputError("--no-scale-parameter is for adafactor; add --optimizer adafactor")


@dataclass(frozen=True, kw_only=True)
class TrainOptions(PlannedOptions):
    """Options of `polyroute train`."""

    source: Source = group(Source)
    out: Path = setting(REQUIRED, recorded=False, help="Folder of the run.")
    model: str | None = setting(
        None, text(optional=True), from_start=True,
        help="Base model: folder, hub id, file.gguf, user/repo:file.gguf, `demo`, `smollm2`, or "
        "`package:NAME` (inside NAME).",
    )  # fmt: skip
    start: Path | None = setting(
        None, help="Start from the inventory of this run, with its base model, suite and adapter."
    )
    reading: Reading = group(Reading, from_start=True)
    adapter: MHRConfig = group(MHRConfig, from_start=True, panel="Adapter and routing")
    group_tasks: int | None = setting(
        None, whole(0, optional=True), parse=lambda examples, _: examples or None,
        panel="Training",
        help="Start each skill with a group of tasks, by the gradients of so many examples of each "
        "(8 will do) [none].",
    )  # fmt: skip
    phase: Phase = setting(
        "full", values=(*TRAINING_PHASES, *CONTINUED_PHASES), panel="Training",
        help="full or mu; with --start also z or mu-uncollapsed.",
    )  # fmt: skip
    objective: str = setting("lm", **OBJECTIVE, panel="Training")
    steps: int = setting(1000, whole(), panel="Training", help="Optimizer steps.")
    batch_size: int = setting(
        32, whole(), panel="Training", help="Examples in a step on one device."
    )
    accumulation: int = setting(
        1, whole(), panel="Training", help="Micro-batches added up in a step."
    )
    optimization: Optimization = group(Optimization, panel="Training")
    rowwise: bool = setting(
        False, flag(), panel="Training",
        help="Step only the routes of the batch's tasks; for thousands of tasks.",
    )  # fmt: skip
    temperature: float = setting(
        1.0, number(above=0, infinite=True), panel="Training",
        help="Task sampling: 1 by size, inf equally often.",
    )  # fmt: skip
    cap: int | None = setting(
        None, whole(optional=True), panel="Training",
        help="Count a task with more examples as one with this many.",
    )  # fmt: skip
    seed: int = setting(
        0, whole(0, most=SEEDS - 1), panel="Training", help="Seed of initialisation and sampling."
    )
    bf16: bool = setting(False, flag(), panel="Training", help="Train under bfloat16 autocast.")
    checkpointing: bool = setting(
        False, flag(), panel="Training", help="Save memory: recompute activations."
    )
    on_nan: str = setting(
        "stop", one_of(*ON_NAN), panel="Training",
        help="What a step does whose loss or gradient is not finite: stop training, or skip it.",
    )  # fmt: skip
    save_steps: int = setting(500, whole(), panel="Run", help="Steps between checkpoints.")
    alignment_steps: int | None = setting(
        None, whole(0, optional=True), parse=lambda steps, _: steps or None, panel="Run",
        help="Steps between measurements of gradient alignment, such as 200 [none].",
    )  # fmt: skip
    eval_steps: int | None = setting(
        None, whole(0, optional=True), parse=lambda steps, _: steps or None, panel="Run",
        help="Steps between measurements of the validation loss, such as 100 [none].",
    )  # fmt: skip
    max_eval: int | None = setting(
        None, whole(optional=True), panel="Run",
        help="Most validation examples of each task [32].",
    )  # fmt: skip
    report_to: str = setting("none", text(), panel="Run", help="none, tensorboard, wandb ...")

    def __post_init__(self) -> None:
        """Check every value, and refuse options that exclude each other."""
        super().__post_init__()
        self._check_start()
        self._check_groups()
        if self.rowwise and self.optimization.optimizer != "adamw":
            name = self.optimization.optimizer
            raise InputError(f"--rowwise is an AdamW; leave it out with --optimizer {name}")
        if self.max_eval is not None and self.eval_steps is None:
            raise InputError("--max-eval is for the validation loss; add --eval-steps")
        if self.adapter.anneal_steps > self.steps:
            raise InputError(
                f"--anneal-steps {self.adapter.anneal_steps} is more than the {self.steps} of "
                "--steps"
            )

    def _check_start(self) -> None:
        """Check what depends on whether training goes on from another run."""
        allowed: tuple[str, ...] = TRAINING_PHASES
        more = "; others go on from a run, with --start"
        if self.start is not None:
            allowed, more = (*TRAINING_PHASES, *CONTINUED_PHASES), ""
        elif self.model is None:
            raise InputError("name a base model with --model, or a run to go on from with --start")
        if self.phase not in allowed:
            raise InputError(
                f"unknown phase {self.phase!r} of training; use {' or '.join(allowed)}{more}"
            )
        for each in flags_of(type(self)):
            place = self.given.places.get(each.name)  # what a recipe says is for fresh runs
            if self.start is not None and each.marks.get("from_start") and place is not None:
                raise InputError(f"{place} comes from the run that --start names; leave it out")

    def _check_groups(self) -> None:
        """Check that an inventory that is to start in groups of tasks can."""
        if self.group_tasks is None:
            return
        if self.start is not None:
            raise InputError("--group-tasks is for a fresh inventory: leave it out with --start")
        if self.phase != "full":
            raise InputError(f"phase {self.phase} trains no routes: leave --group-tasks out")
        adapter = self.adapter
        if not adapter.has_router or adapter.adapter != "lora":
            raise InputError("--group-tasks needs LoRA skills with routes: choose mhr or poly")
        if adapter.route_spread != MHRConfig.route_spread:
            raise InputError(
                "--group-tasks sets the routing logits that --route-spread draws: leave one out"
            )
