"""Multi-task training on the transformers `Trainer`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor, distributed, nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import HubStrategy
from transformers.training_args import OptimizerNames

from polyroute.data.sampling import TaskSampler
from polyroute.errors import InputError
from polyroute.host.files import write_text
from polyroute.kinds.batches import Row
from polyroute.kinds.choose import ModelKind
from polyroute.kinds.objectives import term_weights
from polyroute.model import Phase, RoutedModel
from polyroute.optimizers import LayerAdafactor
from polyroute.saved.card import write_card
from polyroute.saved.hub import CARD
from polyroute.study.examples import task_sizes

__all__ = ["MultiTaskTrainer", "MultiTaskTrainingArguments"]

ROWWISE_OPTIMS = ("adamw_torch", "adamw_torch_fused")
COUNTS, WEIGHTS = "row_counts", "step_weights"
"""What the trainer adds to a batch: what each row counts `[B, T]` for each term of the loss, and
what each row's terms are multiplied with."""


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
        metadata={"help": "Of adafactor: steps in proportion to the size of what they change."},
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
        default=False, metadata={"help": "Every step uses all that trains, so there are none."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: batches are made of whole rows."}
    )


class MultiTaskTrainer(Trainer):
    """Trains a routed model on a mixture of tasks.

    Adds to `Trainer`: each batch is routed by its rows' tasks, skills and routing logits have
    learning rates of their own, tasks are sampled by temperature, and checkpoints hold the
    inventory without the base model.

    The loss of a step is that of all of its rows as one batch, however many processes and
    micro-batches share them.

    Under FSDP2 the base model is sharded; skills and routing, all that trains, stay whole in every
    process, so checkpoints are the same files as without.

    Args:
        model: the routed model; `args.phase` is set on it.
        kind: how the base model reads and learns.
        args: `MultiTaskTrainingArguments`.
        train_dataset: encoded rows, task after task (`polyroute.study.examples.encoded_mixture`).
        eval_dataset: the same, for the evaluation loss; or several by name.
        **kwargs: passed on to `Trainer`.

    Raises:
        InputError: a row's task has no route in the model, the model is not routed or is merged, or
            the arguments ask for what routing cannot do.
    """

    model: RoutedModel
    args: MultiTaskTrainingArguments

    def __init__(
        self,
        model: RoutedModel,
        kind: ModelKind,
        args: MultiTaskTrainingArguments,
        train_dataset: datasets.Dataset | None = None,
        eval_dataset: datasets.Dataset | dict[str, datasets.Dataset] | None = None,
        **kwargs: Any,
    ) -> None:
        _check(model, args)
        _check_rows(model, "train_dataset", train_dataset)
        if isinstance(eval_dataset, Mapping):
            for name, rows in eval_dataset.items():
                _check_rows(model, f"eval_dataset[{name!r}]", rows)
        else:
            _check_rows(model, "eval_dataset", eval_dataset)
        self.kind = kind
        phase: Phase = args.phase  # type: ignore[assignment]
        model.set_phase(phase)
        super().__init__(
            model=model,
            args=args,
            data_collator=partial(_collate, kind),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **kwargs,
        )
        # Whatever the base model could do: `get_batch_samples` weighs the rows of a step.
        self.model_accepts_loss_kwargs = False
        if self.is_deepspeed_enabled:
            raise InputError(
                "DeepSpeed is not supported: to shard the base model, use FSDP2 (fsdp=True)"
            )
        if args.fsdp and not self.is_fsdp_enabled:  # accelerate would say nothing, and use DDP
            raise InputError("FSDP shards over accelerators, and here is none: leave it out")
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            if plugin.fsdp_version != 2:
                raise InputError(
                    f"FSDP version {plugin.fsdp_version} is not supported: use version 2"
                )
            plugin.ignored_modules = self._replicate()
        self.add_callback(_NextEpoch(self))
        if model.adapter_config.anneal_steps:
            self.add_callback(_Anneal(model))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; see `Trainer.train`.

        Raises:
            InputError: the model is merged.
        """
        _check(self.model, self.args)
        return super().train(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> TaskSampler:
        rows = self.train_dataset if train_dataset is None else train_dataset
        sampler = TaskSampler(
            task_sizes(rows),
            temperature=self.args.temperature,
            cap=self.args.cap,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
        )
        self.sampler = sampler
        return sampler

    def _replicate(self) -> list[nn.Module]:
        """Keep whole, and equal in every process, what FSDP is to leave alone; these modules.

        That is all that trains, and weights that several layers share.
        """
        model = self.model
        owners: dict[Tensor, list[nn.Module]] = {}
        for module in model.base_model.modules():
            for parameter in module.parameters(recurse=False):
                owners.setdefault(parameter, []).append(module)
        shared = [module for tied in owners.values() if len(tied) > 1 for module in tied]
        whole: list[nn.Module] = [model.inventory, model.routes, *shared]
        for module in whole:
            module.to(self.args.device)

        def average(parameter: Tensor) -> None:
            if self.accelerator.sync_gradients:
                assert parameter.grad is not None
                distributed.all_reduce(parameter.grad)
                parameter.grad /= distributed.get_world_size()

        for parameter in model.parameters():
            if parameter.requires_grad:
                distributed.broadcast(parameter.detach(), src=0)
                parameter.register_post_accumulate_grad_hook(average)  # type: ignore[no-untyped-call]
        return whole

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """This process's micro-batches of a step; where there are several, anywhere, with weights.

        Trainer divides each loss by the number of micro-batches, and averages over processes.
        """
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        processes = self.accelerator.num_processes
        if not batches or len(batches) * processes == 1:
            return batches, items
        counts_BT = [batch[COUNTS] for batch in batches]
        size, ends = len(counts_BT[-1]), self.accelerator.gradient_state.end_of_dataloader
        if processes > 1 and ends and not self.args.dataloader_drop_last:
            # The last rows of an epoch are filled up with its first, which must not count twice.
            rest = len(self.sampler) % (size * processes) or size * processes
            counts_BT[-1][max(0, rest - size * self.accelerator.process_index) :] = 0
        totals_T: Tensor = self.accelerator.reduce(torch.cat(counts_BT).sum(0).to(device))
        weights_T = torch.tensor(term_weights([totals_T.tolist()])) * len(batches) * processes
        for batch, counts in zip(batches, counts_BT, strict=True):
            batch[WEIGHTS] = counts.any(1, keepdim=True) * weights_T.to(counts.device)
        return batches, items

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that `args.optim` names, over the model's own parameter groups.

        With `args.rowwise_routes` it is `RoutedModel.optimizer`; `adafactor` is `LayerAdafactor`.
        """
        if self.optimizer is None:
            args = self.args
            rates: dict[str, float] = {
                "lr": args.learning_rate,
                "route_lr": args.route_lr,
                "weight_decay": args.weight_decay,
                "route_weight_decay": args.route_weight_decay,
            }
            if args.rowwise_routes:
                self.optimizer = self.model.optimizer(
                    None, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon, **rates
                )
            elif args.optim == OptimizerNames.ADAFACTOR:
                groups = self.model.param_groups(None, **rates)
                self.optimizer = LayerAdafactor(
                    groups, self.model, scale_parameter=args.scale_parameter
                )
            else:
                optimizer_class, options = self.get_optimizer_cls_and_kwargs(args)
                self.optimizer = optimizer_class(self.model.param_groups(None, **rates), **options)
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The kind's loss of a batch, which routes itself by its `tasks`.

        Where the batch is a part of a step's, its share of the loss of all.
        """
        batch = {key: value for key, value in inputs.items() if key not in (COUNTS, WEIGHTS)}
        if WEIGHTS in inputs:
            loss = (self.kind.row_losses(model, batch) * inputs[WEIGHTS]).sum()
        else:
            loss = self.kind.loss(model, batch)
        return (loss, {}) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The loss alone; answers are scored by `polyroute.study.evaluate`."""
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the inventory; under FSDP every process must call this.

        Args:
            output_dir: where; `args.output_dir` by default.
        """
        with self._as_unsharded():
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self.model.save_pretrained(
            output_dir or str(self.args.output_dir), is_main_process=self.args.should_save
        )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._as_unsharded():
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with self._as_unsharded():
            super()._load_optimizer_and_scheduler(checkpoint)

    @contextmanager
    def _as_unsharded(self) -> Iterator[None]:
        # What trains is whole in every process, so FSDP has the same files as no FSDP.
        sharded, self.is_fsdp_enabled = self.is_fsdp_enabled, False
        try:
            yield
        finally:
            self.is_fsdp_enabled = sharded

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.args.hub_strategy != HubStrategy.END:
            self._save()  # Trainer would copy the files that its own models have
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(
        self, *args: Any, model_name: str | None = None, license: str | None = None, **kwargs: Any
    ) -> None:
        """Write the model card to `args.output_dir`; see `polyroute.saved.card.write_card`."""
        if self.is_world_process_zero():
            folder = Path(str(self.args.output_dir))
            name = self.hub_model_id or model_name
            write_text(folder / CARD, write_card(folder, name=name, license=license))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.model.load_adapter(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is None or not Path(best).is_dir():
            raise InputError(f"the best checkpoint {best!r} is gone")
        self.model.load_adapter(best)


def _collate(kind: ModelKind, rows: Sequence[Row]) -> dict[str, Any]:
    return {**kind.collate(rows), COUNTS: torch.tensor(kind.row_counts(rows))}


def _check(model: object, args: object) -> None:
    """Refuse what would train nothing, or something else than was asked for."""
    if not isinstance(model, RoutedModel):
        raise InputError(
            f"model must be routed, not a {type(model).__name__}: see polyroute.attach"
        )
    if not isinstance(args, MultiTaskTrainingArguments):
        raise InputError(
            f"args must be MultiTaskTrainingArguments, not {type(args).__name__}, which has no "
            "route_lr"
        )
    if args.remove_unused_columns:
        raise InputError("remove_unused_columns must stay False: batches are made of whole rows")
    if args.label_smoothing_factor:
        raise InputError(
            f"label_smoothing_factor={args.label_smoothing_factor} has no effect on the loss of a "
            "kind; leave it at 0"
        )
    if not args.scale_parameter and args.optim != OptimizerNames.ADAFACTOR:
        raise InputError(
            "scale_parameter is a setting of adafactor, which "
            f"optim={str(OptimizerNames(args.optim).value)!r} does not have; leave it at True"
        )
    if args.rowwise_routes and args.optim not in ROWWISE_OPTIMS:
        raise InputError(
            f"rowwise_routes is an AdamW, which optim={str(OptimizerNames(args.optim).value)!r} is "
            f"not; set optim to {ROWWISE_OPTIMS[0]!r}"
        )
    if args.n_gpu > 1:
        raise InputError(
            f"one process cannot train on {args.n_gpu} GPUs: start one for each with torchrun or "
            "accelerate launch, or choose one with CUDA_VISIBLE_DEVICES"
        )
    if args.rowwise_routes and args.world_size > 1:
        raise InputError(
            "rowwise_routes trains in one process on one device, and this run has several; "
            "leave it at False, or start one process"
        )
    model.check_unmerged()


def _check_rows(model: RoutedModel, name: str, rows: object) -> None:
    if rows is None:
        return
    if not isinstance(rows, datasets.Dataset) or "task" not in rows.column_names:
        raise InputError(
            f"{name} must be a datasets.Dataset of encoded rows, as encoded_mixture makes, not a "
            f"{type(rows).__name__}"
            + (" without the column 'task'" if isinstance(rows, datasets.Dataset) else "")
        )
    for task in rows.unique("task"):
        model.routes.row(task)


class _NextEpoch(TrainerCallback):
    """Tells the sampler the epoch: accelerate does not, of a run of several that is resumed."""

    def __init__(self, trainer: MultiTaskTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.sampler.set_epoch(int(state.epoch or 0))


class _Anneal(TrainerCallback):
    """Moves the routing to the uniform mixture over the last steps."""

    def __init__(self, model: RoutedModel) -> None:
        self.model = model

    def on_step_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        window = self.model.adapter_config.anneal_steps
        into = state.global_step - (state.max_steps - window)
        self.model.mixer.anneal_progress = min(max(into / window, 0.0), 1.0)

    def on_train_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= state.max_steps:
            self.model.mixer.anneal_progress = 1.0
