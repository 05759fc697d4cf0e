"""The arguments of multi-task training, and which of them routing cannot follow."""

from dataclasses import dataclass, field

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from polyroute.errors import InputError

__all__ = ["MultiTaskTrainingArguments", "check_arguments", "check_multi_task"]

ROWWISE_OPTIMS = ("adamw_torch", "adamw_torch_fused")


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
    _check_optimizer(args)


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
    if args.rowwise_routes and args.world_size > 1:
        raise InputError(
            "rowwise_routes trains in one process on one device, and this run has several; "
            "leave it at False, or start one process"
        )
