"""transformers' `Trainer` for a routed model: its checkpoints hold the inventory."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils.generic import find_labels

from polyroute.errors import InputError
from polyroute.host.files import remove, write_text
from polyroute.host.trainers import accepted
from polyroute.model import RoutedModel
from polyroute.saved.card import write_card
from polyroute.saved.hub import CARD
from polyroute.saved.manifest import write_manifest
from polyroute.training.arguments import check_arguments
from polyroute.training.callbacks import Anneal
from polyroute.training.divergence import Watch, check_finite
from polyroute.training.kept import KEPT
from polyroute.training.sharding import keep_whole
from polyroute.training.whole_run import WholeRun, samples_of_a_step

__all__ = ["RoutedTrainer", "check_routed"]


class RoutedTrainer(Trainer):
    """Trains a routed model as `Trainer` trains any other, and saves what `from_pretrained` opens.

    Checkpoints hold the inventory without the base model. Batches name their tasks themselves, in
    an entry `tasks`; `polyroute.MultiTaskTrainer` does that and more.

    Under FSDP2 the base model is sharded; skills and routing, all that trains, stay whole in every
    process, so checkpoints are the same files as without.

    Args:
        model: the routed model; what trains in it is as `RoutedModel.set_phase` left it.
        args: as for `Trainer`; `remove_unused_columns` must be False.
        **kwargs: passed on to `Trainer`.

    Raises:
        InputError: the model is not routed or is merged, or the arguments ask for what routing
            cannot do.
    """

    model: RoutedModel

    def __init__(self, model: RoutedModel, args: TrainingArguments, **kwargs: Any) -> None:
        check_routed(model)
        check_arguments(args)
        _check_smoothing(model.base_model, args)
        with accepted(model, loss_kwargs=_uses_loss_kwargs(model.base_model)):
            super().__init__(model=model, args=args, **kwargs)
        if args.label_names is None:
            self.label_names = find_labels(type(model.base_model))  # type: ignore[no-untyped-call]
        self._set_up_sharding()
        if model.adapter_config.anneal_steps:
            self.add_callback(Anneal(model))
        self.watch = Watch(model, getattr(args, "on_nan", "stop"))
        self.add_callback(self.watch)
        self.whole_run = WholeRun()
        self.add_callback(self.whole_run)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """As in `Trainer`; a loss that is not finite is noticed."""
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        self.watch.see(loss, inputs)
        self.whole_run.see(loss, fills=self.args.logging_nan_inf_filter)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in `Trainer`; at the end it speaks of the whole run, and of no skipped step."""
        step = self.state.global_step
        if {"loss", "learning_rate"} <= logs.keys():  # as `Trainer` itself logs a loss
            self._share_losses()
            logs["loss"] = self.whole_run.mean_since_log(step)
        elif "train_runtime" in logs and (self.whole_run.was_resumed or self.watch.skipped):
            self._share_losses()
            logs.update(self.whole_run.metrics(step, samples_of_a_step(self.args)))
        super().log(logs, *args, **kwargs)

    def _share_losses(self) -> None:
        self.whole_run.share(lambda loss: self.accelerator.reduce(loss, "mean"))

    def _set_up_sharding(self) -> None:
        if self.is_deepspeed_enabled:
            raise InputError(
                "DeepSpeed is not supported: to shard the base model, use FSDP2 (fsdp=True)"
            )
        if self.args.fsdp and not self.is_fsdp_enabled:  # accelerate would use DDP, and not say so
            raise InputError("FSDP shards over accelerators, and there are none: leave out fsdp")
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            if plugin.fsdp_version != 2:
                raise InputError(
                    f"FSDP version {plugin.fsdp_version} is not supported: use version 2"
                )
            plugin.ignored_modules = keep_whole(
                self.model, self.args.device, lambda: bool(self.accelerator.sync_gradients)
            )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; see `Trainer.train`.

        Raises:
            InputError: the model is merged, or an argument was set to what routing cannot do.
        """
        check_routed(self.model)
        self._check_arguments()
        output = super().train(*args, **kwargs)
        return output._replace(training_loss=output.metrics.get("train_loss", output.training_loss))

    def _check_arguments(self) -> None:
        check_arguments(self.args)

    # ------------------------------------------------------------------ files

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the inventory; under FSDP every process must call this.

        Args:
            output_dir: where; `args.output_dir` by default.
        """
        with self._as_unsharded():
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # A checkpoint with a number that is not finite could rotate out the last good one.
        self.watch.check()
        state = {} if self.optimizer is None else self.optimizer.state_dict()["state"]
        kept = [t for entry in state.values() for t in entry.values() if isinstance(t, Tensor)]
        check_finite([*self.model.learned(), *kept], self.state.global_step)
        self._share_losses()
        callbacks: dict[str, Any] = self.state.stateful_callbacks  # type: ignore[assignment]
        callbacks[KEPT] = {**self.whole_run.kept(), "skipped": self.watch.skipped}
        place = (
            Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        )
        if self.args.should_save:
            # `Trainer` opens files there, and would follow a link or wait for a pipe.
            remove(place)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
        except RuntimeError as error:
            if "inline_container" not in str(error):
                raise
            # torch's own writer says at which byte it noticed, and not that the disk is full.
            folder = self._get_output_dir(trial)
            raise InputError(
                f"a checkpoint cannot be written whole to {folder}: make space on that disk"
            ) from error
        self.accelerator.wait_for_everyone()  # each process writes the state of its random numbers
        if self.is_world_process_zero():
            write_manifest(place)

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
        # What trains is whole in every process, so the files under FSDP are those without it.
        sharded, self.is_fsdp_enabled = self.is_fsdp_enabled, False
        try:
            yield
        finally:
            self.is_fsdp_enabled = sharded

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.args.hub_strategy != HubStrategy.END:
            self._save()  # Trainer would copy files of the names that its own models have
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


def check_routed(model: object) -> None:
    """Make sure that a model is routed, and not merged with a task.

    Raises:
        InputError: it is not.
    """
    if not isinstance(model, RoutedModel):
        raise InputError(
            f"model must be routed, not a {type(model).__name__}: see polyroute.attach"
        )
    model.check_unmerged()


def _check_smoothing(base_model: nn.Module, args: TrainingArguments) -> None:
    # `Trainer` shifts the labels of models that it knows by the name of their class.
    is_decoder = type(base_model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    if args.label_smoothing_factor and is_decoder:
        raise InputError(
            f"label_smoothing_factor={args.label_smoothing_factor} would compare each token with "
            "itself instead of the next: leave it at 0, and smooth in a compute_loss_func"
        )


def _uses_loss_kwargs(base_model: nn.Module) -> bool:
    """Whether a forward takes `num_items_in_batch`, as `Trainer` finds out for its own models."""
    answer = getattr(base_model, "accepts_loss_kwargs", None)
    if answer is not None:
        return bool(answer)
    parameters = inspect.signature(base_model.forward).parameters.values()
    return any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters)
