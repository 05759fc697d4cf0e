"""The trainer of `polyroute train`: its arguments, and what it does at each step."""

import tempfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PrinterCallback, TrainerCallback

from polyroute.errors import InputError, reason
from polyroute.host.processes import count
from polyroute.host.progress import progress
from polyroute.kinds.choose import ModelKind
from polyroute.model import RoutedModel
from polyroute.program.options.train import TrainOptions
from polyroute.trainer import MultiTaskTrainer, MultiTaskTrainingArguments

__all__ = ["CheckFolder", "SaveWhenStopped", "make_trainer"]

OPTIMS = {"adamw": "adamw_torch_fused", "adafactor": "adafactor"}
SCHEDULERS = {"linear": "linear", "constant": "constant_with_warmup"}
"""What transformers calls the values of --optimizer and --schedule."""


def make_trainer(
    model: RoutedModel,
    kind: ModelKind,
    options: TrainOptions,
    rows: datasets.Dataset,
    validation: datasets.Dataset | None = None,
) -> MultiTaskTrainer:
    """The trainer, checked as far as that can be done before training; it makes no folder."""
    with tempfile.TemporaryDirectory() as elsewhere:  # a trainer makes its folder at once
        try:
            arguments = _arguments(options, Path(elsewhere))
            trainer = MultiTaskTrainer(model, kind, arguments, rows, validation)
            trainer._get_train_sampler()
        except InputError:
            raise
        except (ValueError, TypeError, RuntimeError, ImportError, OverflowError) as error:
            raise InputError(
                f"the training options cannot be used: {reason(error, whole=True)}"
            ) from error
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_ShowProgress())
    if validation is not None:
        trainer.add_callback(_ValidateAtTheEnd())
    return trainer


def _arguments(options: TrainOptions, folder: Path) -> MultiTaskTrainingArguments:
    steps, optimization = options.steps, options.optimization
    if options.batch_size % count():
        raise InputError(
            f"--batch-size {options.batch_size} cannot be shared by {count()} processes: make "
            "it a multiple"
        )
    checkpointing: dict[str, Any] = {_checkpointing(): True} if options.checkpointing else {}
    return MultiTaskTrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=options.batch_size // count(),
        gradient_accumulation_steps=options.accumulation,
        learning_rate=optimization.lr,
        route_lr=optimization.route_lr,
        weight_decay=optimization.weight_decay,
        route_weight_decay=optimization.route_weight_decay,
        optim=OPTIMS[optimization.optimizer],
        scale_parameter=optimization.scale_parameter,
        max_grad_norm=optimization.max_grad_norm,
        lr_scheduler_type=SCHEDULERS[optimization.schedule],
        rowwise_routes=options.rowwise,
        warmup_steps=round(optimization.warmup * steps),
        temperature=options.temperature,
        cap=options.cap,
        phase=options.phase,
        seed=options.seed,
        bf16=options.bf16,
        use_cpu=not torch.accelerator.is_available(),  # else bf16 is refused there
        logging_nan_inf_filter=options.on_nan == "skip",
        on_nan=options.on_nan,
        save_steps=options.save_steps,
        eval_strategy="no" if options.eval_steps is None else "steps",
        eval_steps=options.eval_steps,
        per_device_eval_batch_size=options.batch_size // count(),
        save_total_limit=2,
        logging_steps=max(1, min(50, steps // 20)),
        report_to=options.report_to,
        disable_tqdm=True,  # its bar prints what is logged to standard output
        dataloader_pin_memory=torch.cuda.is_available(),
        **checkpointing,
    )


def _checkpointing() -> str:
    """What this version of transformers calls the option; before 5.23 it had the older name."""
    names = {one.name for one in fields(MultiTaskTrainingArguments)}
    new, old = "activation_checkpointing", "gradient_checkpointing"
    return new if new in names else old


class _ValidateAtTheEnd(TrainerCallback):
    """Measures the validation loss after the last step, too."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True


class SaveWhenStopped(TrainerCallback):
    """Ends training with a checkpoint, after the step in which Ctrl-C was pressed."""

    def __init__(self, is_stopped: Callable[[], bool]) -> None:
        self.is_stopped = is_stopped

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save and end, if it was pressed."""
        if self.is_stopped():
            control.should_save = control.should_training_stop = True


class CheckFolder(TrainerCallback):
    """Makes sure, before each checkpoint and log, that the folder of the run is still its own.

    Args:
        check: raises where it is not.
    """

    def __init__(self, check: Callable[[], None]) -> None:
        self.check = check

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look, if something is about to be written."""
        if control.should_save or control.should_log:
            self.check()


class _ShowProgress(TrainerCallback):
    """Shows how far training is, with the last loss."""

    bar: Any = None
    validating: Any = None
    shown: dict[str, str]

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            steps = {"total": state.max_steps, "initial": state.global_step}
            self.bar = progress(what="training", unit="step", **steps)
            self.shown = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        names = {"loss": "loss", "eval_loss": "validation loss"}
        new = {name: f"{logs[key]:.4g}" for key, name in names.items() if key in (logs or {})}
        if self.bar is not None and new:
            self.shown |= new
            text = ", ".join(f"{name} {value}" for name, value in self.shown.items())
            self.bar.set_postfix_str(text, refresh=False)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any
    ) -> None:
        if self.bar is None:
            return
        if self.validating is None:
            self.validating = progress(what="validating", unit="batch", total=len(eval_dataloader))
        self.validating.update()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.validating is not None:
            self.validating.close()
            self.validating = None

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()
