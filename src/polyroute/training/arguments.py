"""The arguments of multi-task training, and which of them routing cannot follow."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from polyroute.errors import InputError, did_you_mean
from polyroute.settings import one_of
from polyroute.training.names import ON_NAN

__all__ = [
    "LOSS_ALONE",
    "MultiTaskTrainingArguments",
    "check_arguments",
    "check_best_metric",
    "check_hooks",
    "check_multi_task",
]

ROWWISE_OPTIMS = ("adamw_torch", "adamw_torch_fused")
LOSS_ALONE = "MultiTaskTrainer computes the loss alone: score answers with polyroute.evaluate"
HOOKS = {
    "compute_metrics": LOSS_ALONE,
    "preprocess_logits_for_metrics": LOSS_ALONE,
    "compute_loss_func": "the kind computes the loss: give it an objective, or use RoutedTrainer",
    "data_collator": "the kind makes the batches: use RoutedTrainer for a collator of your own",
    "optimizer_cls_and_kwargs": "args.optim names the optimizer: set it, or give optimizers",
}
"""Arguments of `Trainer` that multi-task training would not use, and what to do instead."""


@dataclass
class MultiTaskTrainingArguments(TrainingArguments):
    """Everything that transformers' `TrainingArguments` has, and what routing adds.

    `learning_rate` and `weight_decay` are those of the skills. `optim="adafactor"` is
    `polyroute.optimizers.LayerAdafactor`.
    """

    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the skills."})
    route_lr: float = field(default=0.1, metadata={"help": "Learning rate of the routing logits."})
    route_weight_decay: float = field(
        default=0.0, metadata={"help": "Weight decay of the routing logits."}
    )
    scale_parameter: bool = field(
        default=True,
        metadata={"help": "Adafactor takes steps in proportion to the size of what they change."},
    )
    phase: str = field(default="full", metadata={"help": "What trains; see set_phase."})
    temperature: float = field(
        default=1.0,
        metadata={"help": "1 draws tasks in proportion to their size, inf equally often."},
    )
    cap: int | None = field(
        default=None, metadata={"help": "Size above which a task counts no more in sampling."}
    )
    rowwise_routes: bool = field(
        default=False,
        metadata={"help": "Row-wise optimizer for the routing table; for thousands of tasks."},
    )
    on_nan: str = field(
        default="stop",
        metadata={"help": "What a step does that is not finite: stop training, or skip the step."},
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={"help": "Need not be True: every step uses all parameters that train."},
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: batches are made of whole rows."}
    )


def check_arguments(args: TrainingArguments) -> None:
    """Refuse arguments under which no routed model can train.

    Raises:
        InputError: the message names the argument and the value to set.
    """
    if args.remove_unused_columns:
        raise InputError("remove_unused_columns must stay False: batches are made of whole rows")
    if args.n_gpu > 1:
        raise InputError(
            f"one process cannot train on {args.n_gpu} GPUs: start one for each with torchrun or "
            "accelerate launch, or choose one with CUDA_VISIBLE_DEVICES"
        )


def check_multi_task(args: object) -> None:
    """Refuse arguments that would change nothing in multi-task training, or that it cannot follow.

    Raises:
        InputError: the message names the argument and the value to set.
    """
    if not isinstance(args, MultiTaskTrainingArguments):
        raise InputError(
            f"args must be MultiTaskTrainingArguments, not {type(args).__name__}, which has no "
            "route_lr"
        )
    check_arguments(args)
    if args.label_smoothing_factor:
        raise InputError(
            f"label_smoothing_factor={args.label_smoothing_factor} has no effect on the loss of a "
            "kind; leave it at 0"
        )
    for name, usual in (("train_sampling_strategy", "random"), ("group_by_length", False)):
        value = getattr(args, name, usual)
        if value != usual:
            raise InputError(
                f"{name}={value!r} has no effect: temperature and cap say how tasks are drawn; "
                f"leave it at {usual!r}"
            )
    one_of(*ON_NAN)("on_nan", args.on_nan)
    _check_optimizer(args)


def check_hooks(options: Mapping[str, Any]) -> None:
    """Refuse arguments of `Trainer` that multi-task training would not use.

    Raises:
        InputError: the message says what to do instead.
    """
    for name, instead in HOOKS.items():
        if options.get(name) is not None:
            raise InputError(f"{name} would not be used: {instead}")


def check_best_metric(args: TrainingArguments, eval_dataset: object) -> None:
    """Refuse a `metric_for_best_model` that evaluation during training does not give.

    Raises:
        InputError: the message names what there is.
    """
    metric = args.metric_for_best_model
    if metric is None or args.eval_strategy == "no":
        return
    sets = eval_dataset if isinstance(eval_dataset, Mapping) else ()
    losses = [f"eval_{name}_loss" for name in sets] or ["eval_loss"]
    if f"eval_{metric.removeprefix('eval_')}" not in losses:
        raise InputError(
            f"metric_for_best_model={metric!r} is not measured, because MultiTaskTrainer computes "
            f"the loss alone; {did_you_mean(metric, losses)}"
        )


def _check_optimizer(args: MultiTaskTrainingArguments) -> None:
    optim = str(OptimizerNames(args.optim).value)
    if not args.scale_parameter and args.optim != OptimizerNames.ADAFACTOR:
        raise InputError(
            f"scale_parameter is a setting of adafactor, which optim={optim!r} does not have; "
            "leave it at True"
        )
    if args.rowwise_routes and args.optim not in ROWWISE_OPTIMS:
        raise InputError(
            f"rowwise_routes is an AdamW, which optim={optim!r} is not; set optim to "
            f"{ROWWISE_OPTIMS[0]!r}"
        )
