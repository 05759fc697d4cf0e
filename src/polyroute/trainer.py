"""Multi-task training on the transformers `Trainer`."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import datasets
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput
from transformers.training_args import OptimizerNames

from polyroute.data.sampling import TaskSampler
from polyroute.errors import InputError
from polyroute.kinds.choose import ModelKind
from polyroute.model import Phase, RoutedModel
from polyroute.optimizers import LayerAdafactor
from polyroute.study.examples import task_sizes
from polyroute.study.routing_state import routing_state
from polyroute.training.arguments import (
    LOSS_ALONE,
    MultiTaskTrainingArguments,
    check_best_metric,
    check_hooks,
    check_multi_task,
)
from polyroute.training.callbacks import NextEpoch, TrimMemory
from polyroute.training.routed_trainer import RoutedTrainer, check_routed
from polyroute.training.row_weights import (
    collate,
    losses_and_counts,
    rows_in_batch,
    share_of_loss,
    weigh,
)
from polyroute.training.shared_rows import (
    check_rows_can_be_shared,
    leave_rows_to_us,
    share_rows,
)

__all__ = ["MultiTaskTrainer", "MultiTaskTrainingArguments", "RoutedTrainer"]


class MultiTaskTrainer(RoutedTrainer):
    """Trains a routed model on a mixture of tasks.

    Adds to `RoutedTrainer`: each batch is routed by its rows' tasks, skills and routing logits have
    learning rates of their own, and tasks are sampled by temperature.

    The loss of a step is that of all of its rows as one batch, however many processes and
    micro-batches share them.

    Args:
        model: the routed model; `args.phase` is set on it.
        kind: how the base model reads and learns.
        args: `MultiTaskTrainingArguments`.
        train_dataset: encoded rows, task after task (`polyroute.study.examples.encoded_mixture`).
        eval_dataset: the same, for the evaluation loss; or several by name.
        **kwargs: passed on to `Trainer`; those that would have no effect are refused.

    Raises:
        InputError: a row's task has no route in the model, the model is not routed, is merged or
            has no tasks, or the arguments ask for what routing cannot do.
    """

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
        check_routed(model)
        check_multi_task(args)
        check_hooks(kwargs)
        self._check_best_metric(args, eval_dataset)
        if not model.tasks:
            raise InputError("the model has no tasks: add those of the rows with model.add_tasks")
        _check_rows(model, "train_dataset", train_dataset)
        if isinstance(eval_dataset, Mapping):
            for name, rows in eval_dataset.items():
                _check_rows(model, f"eval_dataset[{name!r}]", rows)
        else:
            _check_rows(model, "eval_dataset", eval_dataset)
        self.kind = kind
        phase: Phase = args.phase  # type: ignore[assignment]
        model.set_phase(phase)
        if args.rowwise_routes and args.world_size > 1:
            check_rows_can_be_shared(model)
        # Compiled code would be compiled again for every shape of packed rows.
        packing = (
            None
            if args.torch_compile
            else kind.packing_of(model, model.tasks[0], in_training_mode=True)
        )
        super().__init__(
            model,
            args,
            data_collator=partial(collate, kind, packing=packing),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **kwargs,
        )
        # Whatever the base model could do: `get_batch_samples` weighs the rows of a step.
        self.model_accepts_loss_kwargs = False
        self.add_callback(NextEpoch(self))
        if args.device.type == "cpu":
            self.add_callback(TrimMemory())

    def _check_arguments(self) -> None:
        check_multi_task(self.args)
        self._check_best_metric(self.args, self.eval_dataset)

    def _check_best_metric(self, args: MultiTaskTrainingArguments, eval_dataset: object) -> None:
        if type(self).evaluate is Trainer.evaluate:  # a subclass may measure more
            check_best_metric(args, eval_dataset)

    def predict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not available.

        Raises:
            InputError: always.
        """
        raise InputError(f"there is no predict: {LOSS_ALONE}")

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

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """This process's micro-batches of a step; if the step has more than one, they are weighed.

        A step has one micro-batch for each process and each turn of accumulation.
        """
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        processes = self.accelerator.num_processes
        if batches and len(batches) * processes > 1:
            weigh(
                batches,
                num_new=self._num_new(rows_in_batch(batches[-1])),
                processes=processes,
                add_up=lambda totals: self.accelerator.reduce(totals.to(device)),
            )
        return batches, items

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in `Trainer`; processes share the gradients of the rows that they have touched."""
        loss = super().training_step(*args, **kwargs)
        if self._shares_rows() and self.accelerator.sync_gradients:
            share_rows(self.model.routes)
        return loss

    def _num_new(self, size: int) -> int | None:
        """How many rows of a micro-batch are new, where the rest fills up the epoch."""
        processes, state = int(self.accelerator.num_processes), self.accelerator.gradient_state
        if processes == 1 or not state.end_of_dataloader or self.args.dataloader_drop_last:
            return None
        rest = len(self.sampler) % (size * processes) or size * processes
        return max(0, rest - size * int(self.accelerator.process_index))

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
        if self._shares_rows():
            leave_rows_to_us(self.model)
        return self.optimizer

    def _shares_rows(self) -> bool:
        """Whether several processes train a table by rows, whoever made the optimizer."""
        return self.args.world_size > 1 and self.model.routes.touched is not None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with how far apart routes and skills are beside each training loss.

        They are the entries `route_entropy` and `skill_cosine`; see
        `polyroute.study.routing_state.routing_state`.
        """
        if "loss" in logs:
            logs = {**logs, **routing_state(self.model)}
        super().log(logs, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The kind's loss of a batch, which routes itself by its `tasks`.

        Where the batch is a part of a step, this is its share of the loss of the whole step.
        """
        loss = share_of_loss(self.kind, model, inputs)
        return (loss, {}) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The loss alone; answers are scored by `polyroute.evaluate`."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            if type(self).compute_loss is not MultiTaskTrainer.compute_loss:
                return self.compute_loss(model, inputs).detach(), None, None
            found = losses_and_counts(self.kind, model, inputs)
        losses_BT, counts_BT = self.accelerator.gather_for_metrics(found)
        sums_T = losses_BT.cpu().double().sum(0)  # not every device has float64
        self._evaluated.append((sums_T, counts_BT.cpu().sum(0)))
        return _mean_loss(self._evaluated[-1:]), None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in `Trainer`, but the loss is that of all rows as one batch.

        The mean over batches that `Trainer` takes would depend on how rows share them.
        """
        self._evaluated: list[tuple[Tensor, Tensor]] = []
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        if self._evaluated and output.metrics is not None:
            output.metrics[f"{metric_key_prefix}_loss"] = float(_mean_loss(self._evaluated))
        return output


def _mean_loss(evaluated: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The loss of the rows of several batches, from the sums of its terms and what they count."""
    sums_T, counts_T = (torch.stack(found).sum(0) for found in zip(*evaluated, strict=True))
    return (sums_T / counts_T.clamp(min=1)).sum()


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
