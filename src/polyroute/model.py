"""The routed model: a frozen base model, an inventory of skills, and a row for every task."""

import os
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polyroute.config import Phase
from polyroute.counts import count_parameters, describe
from polyroute.errors import InputError
from polyroute.forward import RoutedForward
from polyroute.layer.merging import check_mergeable, fold, restore
from polyroute.routes.phases import (
    check_phase,
    check_rates,
    param_groups,
    row_optimizer,
    start_phase,
)  # fmt: skip
from polyroute.routes.tasks import Tasks
from polyroute.saved.card import write_card
from polyroute.saved.hub import Repository, push
from polyroute.saved.inventory import load_checkpoint, save_inventory
from polyroute.saved.peft_export import adapted_sites, peft_target

__all__ = ["Phase", "RoutedModel", "Tasks"]


class RoutedModel(RoutedForward):
    """A base model whose adapted layers apply, to each example, its task's mixture of skills.

    `polyroute.attach` and `polyroute.from_pretrained` make it. Attributes that are not its own
    (`config`, `device`, `get_encoder` ...) are those of the base model.

    Attributes:
        base_model: the frozen network, with its chosen layers wrapped.
        inventory: the skills.
        routes: the routing table, with a row of logits for each task.
        rule: chooses skills for a batch.
        sites: the adapted layers.
        routers: the names of the routers, in the order of the first axis of a row.
        mixer: mixes skills into the factors that the layers apply.
        merged_task: the task that is merged into the base weights, or None.
    """

    # ---------------------------------------------------------------- tasks

    def add_task(self, name: str, init: str | Tensor = "uniform") -> int:
        """Append a task; every other task stays as it is.

        The table becomes a new parameter, so make an optimizer afterwards. Only an optimizer that
        trains the table by rows (see `optimizer`) need not be made again.

        Args:
            name: a new name.
            init: `"uniform"` starts near the average of the skills, the name of another task
                copies its row, and a tensor `[N, H, K]` (or flat) gives the logits.

        Returns:
            The number of the new row.

        Raises:
            InputError: the name exists or is reserved, the task to copy does not exist, or the
                tensor has a wrong shape or values that are not finite.
        """
        return self.add_tasks([name], init)[0]

    def add_tasks(self, names: Sequence[str], init: str | Tensor = "uniform") -> list[int]:
        """Append tasks, all or none; adding many in one call copies the table only once.

        Args:
            names: new names.
            init: as in `add_task`; a tensor may also be `[n, N, H, K]` (or `[n, N * H * K]`), one
                row for each name.

        Returns:
            The numbers of the new rows.

        Raises:
            InputError: as `add_task`, for any of the names.
        """
        return self.mixer.add_tasks(names, init)

    def keep_tasks(self, names: Sequence[str]) -> None:
        """Drop all other tasks; the skills stay, except private ones, which go with their task.

        Raises:
            InputError: a name is unknown or repeated, or the model is merged.
        """
        self.check_unmerged()
        self.mixer.keep_tasks(names)

    # ---------------------------------------------------------------- training

    def set_phase(self, phase: Phase) -> None:
        """Choose the parameters that train, and freeze all others.

        - `full`: skills and routing train.
        - `z`: routing alone trains.
        - `mu`: the average of the skills, one LoRA, replaces them and trains.
        - `mu-uncollapsed`: all skills train under the uniform mixture, as in the published code.
          This computes the same as `mu`, with 1/sqrt(K) of its global gradient norm.
        - `random`: skills and routing are drawn again and train, as a control.

        `mu`, `mu-uncollapsed` and `random` discard what they replace. Modules of
        `MHRConfig.modules_to_save` train in every phase.

        Raises:
            InputError: there is no such phase, it has nothing to train, or the model is merged.
        """
        self.check_phase(phase)
        if phase == "z" and not len(self.routes) and not list(self.rule.parameters()):
            raise InputError("phase 'z' trains the rows of tasks, and there are none: add a task")
        start_phase(self.mixer, phase)
        self.rule = self.mixer.rule

    def check_phase(self, phase: Phase) -> None:
        """Make sure that a task could be trained in this phase.

        Raises:
            InputError: as `set_phase`.
        """
        self.check_unmerged()
        check_phase(self.mixer, phase)

    def learned(self) -> list[nn.Parameter]:
        """All parameters that can train: of the skills, the table, the rule, `modules_to_save`."""
        whole = (p for module in self.wrapping.trained.values() for p in module.parameters())
        return [*self.mixer.learned(), *whole]

    def param_groups(
        self,
        phase: Phase | None = None,
        *,
        lr: float = 1e-3,
        route_lr: float = 1e-1,
        weight_decay: float = 0.0,
        route_weight_decay: float = 0.0,
    ) -> list[dict[str, Any]]:
        """The parameter groups of a phase, for any torch optimizer.

        Every group states its learning rate and its weight decay, so it inherits neither from the
        defaults of an optimizer. Decay pulls logits toward the uniform mixture; the published
        SuperNI runs used 0.01 for them.

        Args:
            phase: the phase to set first, see `set_phase`; None keeps the present one.
            lr: learning rate of the skills, a rule's own parameters and `modules_to_save`.
            route_lr: learning rate of the routing logits.
            weight_decay: weight decay of the parameters that `lr` is for.
            route_weight_decay: weight decay of the routing logits.

        Returns:
            Up to four groups, named `skills`, `modules`, `rule` and `routes`.

        Raises:
            InputError: as `set_phase`; or a rate is not positive and finite, or a decay negative.
        """
        rates = {
            "lr": lr, "route_lr": route_lr, "weight_decay": weight_decay,
            "route_weight_decay": route_weight_decay,
        }  # fmt: skip
        if phase is not None:
            self.check_phase(phase)
        check_rates(rates)
        if phase is not None:
            self.set_phase(phase)
        return param_groups(self.mixer, rates, self.wrapping.trained.values())

    def optimizer(
        self,
        phase: Phase | None = None,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **rates: float,
    ) -> torch.optim.Optimizer:
        """AdamW for many tasks: the cost of a step depends on the batch, not on the whole table.

        Rows outside the batch stay as they are: no gradient, no moment and no weight decay changes
        them. `polyroute.routes.row_optimizer` describes how this differs from dense AdamW. Skills
        train as under `torch.optim.AdamW`, which is what a phase without routing gets.

        The table is frozen, and its rows train through `routes.touched` until the next `set_phase`,
        `param_groups` or `optimizer`. Several processes have to exchange the rows of their
        batches, as `MultiTaskTrainer` does (`polyroute.training.shared_rows`).

        Args:
            phase: as in `param_groups`.
            betas: decay rates of the moments.
            eps: added to the root of the second moment.
            **rates: `lr`, `route_lr`, `weight_decay`, `route_weight_decay` as in `param_groups`.

        Raises:
            InputError: as `param_groups`.
        """
        groups = self.param_groups(phase, **rates)
        return row_optimizer(self.mixer, groups, betas=betas, eps=eps)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients.

        A table that trains by rows drops them even with `set_to_none=False`, because the next batch
        has other rows.
        """
        super().zero_grad(set_to_none)
        if self.routes.touched is not None:
            self.routes.touched.grad = None

    # ---------------------------------------------------------------- merging

    def merge(self, task: str) -> None:
        """Fold one task, or `"mu"`, into the base weights, in place; it then costs no extra time.

        The original weights are kept, so `unmerge` restores them bit for bit.

        Raises:
            InputError: the model is merged already, the task is unknown, the rule looks at more
                than the task, or the weight of a layer cannot be changed (it is quantised, or tied
                to another layer).
        """
        self._check_loaded()
        self.check_unmerged()
        factors = self.mixer.factors_of(self.routes.row(task), "merged")
        check_mergeable(self.base_model, self.sites)
        self._unmerged = fold(self.sites, factors)
        self._set_merged(task)

    def check_unmerged(self) -> None:
        """Make sure that no task is merged into the base weights.

        Raises:
            InputError: a task is merged; the message names it.
        """
        if self.merged_task is not None:
            raise InputError(f"the model is merged with {self.merged_task!r}; call unmerge() first")

    def unmerge(self) -> None:
        """Restore the base weights, bit for bit; do nothing if no task is merged.

        If the model was cast or moved meanwhile, they get its present type and device.
        """
        self._check_loaded()
        restore(self.sites, self._unmerged)
        self._unmerged = {}
        self._set_merged(None)

    def _set_merged(self, task: str | None) -> None:
        self.merged_task = task
        for layer in self.wrapping.layers:
            layer.is_merged = task is not None

    def unload(self) -> nn.Module:
        """Return the base model as it was before `attach`; this object is unusable afterwards.

        If a task is merged, it stays merged, and whole modules that trained keep their values: this
        gives a plain model of one task.
        """
        if self._is_unloaded:
            return self.base_model
        for hook in self._hooks:
            hook.remove()
        self.wrapping.undo(keep_trained=self.merged_task is not None)
        self._is_unloaded = True
        return self.base_model

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Resize the base model's vocabulary, as its method of this name does.

        An adapted output embedding keeps its skills, and new tokens have no update. If the output
        embedding trains as a whole (`modules_to_save`), the new one does.

        Raises:
            InputError: the model is merged, or was unloaded.
        """
        self._check_loaded()
        return self.base_model.resize_token_embeddings(*args, **kwargs)  # type: ignore[operator]

    # ---------------------------------------------------------------- files

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        is_main_process: bool = True,
    ) -> None:
        """Write the skills, the routing table and their description, without the base model.

        The routing table is written in parts of about 32 MB; `polyroute.SavedRoutes` reads and
        changes single rows of it. A warning names parameters of the base model that trained or
        changed and are not saved.

        Args:
            folder: the folder to write to; made if missing.
            is_main_process: whether this process writes. If the base model is sharded (FSDP2),
                every process must call this method, because some weights are gathered.

        Raises:
            InputError: the folder cannot be written, the model is merged, unloaded or on the meta
                device, or it has private adapters and no task left.
        """
        self._check_loaded()
        self.check_unmerged()
        save_inventory(
            folder, self.mixer, self.wrapping, self._outside, is_main_process=is_main_process
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        license: str | None = None,
    ) -> str:
        """Save to a repository on the hub, with a model card, in one commit.

        A run knows more than the model, so `polyroute push RUN` writes a fuller card.

        Args:
            repo_id: the repository, such as `user/inventory`; made if missing.
            private: whether a new repository is private.
            token: a token for the hub; by default that of the login.
            revision: the branch, made if missing; default main.
            commit_message: the message of the commit.
            license: the licence of the inventory, as the hub names it, such as `apache-2.0`.

        Returns:
            The address of the commit.

        Raises:
            InputError: as `save_pretrained`; or `repo_id` is not a hub id, or the hub refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push(
                folder,
                Repository(repo_id, revision, token),
                write_card(folder, name=repo_id, license=license),
                private=private,
                message=commit_message,
            )

    def load_adapter(self, folder: str | os.PathLike[str]) -> None:
        """Overwrite skills and rows, in place, with those of a checkpoint of this same model.

        Raises:
            InputError: the checkpoint has other tasks, layers, settings or sizes.
        """
        self._check_loaded()
        self.check_unmerged()
        load_checkpoint(folder, self.mixer, self.wrapping)

    def export_peft(self, task: str, folder: str | os.PathLike[str]) -> None:
        """Write one task, or `"mu"`, as an ordinary PEFT adapter that computes the same.

        LoRA skills become a LoRA of the rank of their mixture, (IA)^3 skills an (IA)^3 of PEFT.

        Raises:
            InputError: the task is unknown, the rule looks at more than the task, or the folder
                cannot be written.
        """
        self._check_loaded()
        adapted = adapted_sites(self.sites, self.factors_of(task))
        target = peft_target(self.base_model, list(adapted), self.wrapping.trained)
        target.write(folder, list(adapted.values()))

    # ---------------------------------------------------------------- reports

    def counts(self) -> dict[str, int]:
        """The numbers of parameters by purpose; see `polyroute.counts.count_parameters`."""
        return count_parameters(self.base_model, self.inventory, self.routes)

    def num_trainable(self) -> int:
        """The number of parameters that the present phase trains."""
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        if self.routes.touched is not None and self.routes.logits is not None:
            # `touched` holds the rows of the last batches and stands for the whole table.
            trained += self.routes.logits.numel() - self.routes.touched.numel()
        return trained

    def print_trainable_parameters(self) -> None:
        """Print the numbers of trainable and of all parameters."""
        trained = self.num_trainable()
        total = sum(p.numel() for n, p in self.named_parameters() if n != "routes.touched")
        print(f"trainable: {trained:,} of {total:,} parameters ({100 * trained / total:.3f}%)")

    def describe(self) -> str:
        """Sites, routers and parameter counts, as text."""
        return describe(
            self.adapter_config, self.base_model, self.sites, self.inventory, self.routes
        )
