"""The routed model: a frozen base model, an inventory of skills, and a route for every task."""

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
from polyroute.routes.phases import check_phase, param_groups, row_optimizer, start_phase
from polyroute.routes.tasks import Tasks
from polyroute.saved.card import write_card
from polyroute.saved.hub import Repository, push
from polyroute.saved.inventory import load_checkpoint, save_inventory
from polyroute.saved.peft_export import peft_target

__all__ = ["Phase", "RoutedModel", "Tasks"]


class RoutedModel(RoutedForward):
    """A base model whose adapted layers use, for each example, its task's mixture of skills.

    Made by `polyroute.attach` or `polyroute.from_pretrained`. Attributes that are not its own
    (`config`, `device`, `get_encoder` ...) are those of the base model.

    Attributes:
        base_model: the frozen network, with its chosen layers wrapped.
        inventory: the skills.
        routes: the table of routing logits, by task.
        rule: how skills are chosen.
        sites: the adapted layers.
        routers: names of the routers, in the order of the table's first axis.
        mixer: turns routes and skills into what the layers apply.
    """

    # ---------------------------------------------------------------- tasks

    def add_task(self, name: str, init: str | Tensor = "uniform") -> int:
        """Append a task; every other task stays as it is.

        Make the optimizer afterwards, unless it is that of `optimizer` and the table trains by
        rows: the table is a new parameter.

        Args:
            name: a new name.
            init: `"uniform"` starts near the average of the skills, another task's name copies its
                row, a tensor `[N, H, K]` (or flat) is taken as the logits.

        Returns:
            The row number.

        Raises:
            InputError: the name exists or is reserved, the task to copy does not exist, or the
                tensor's shape is wrong.
        """
        return self.add_tasks([name], init)[0]

    def add_tasks(self, names: Sequence[str], init: str | Tensor = "uniform") -> list[int]:
        """Append tasks, all or none; the table is copied once, so add many together.

        Args:
            names: new names.
            init: as in `add_task`; a tensor may also be `[n, N, H, K]` (or `[n, N * H * K]`), one
                row for each name.

        Returns:
            The row numbers.

        Raises:
            InputError: as `add_task`, for any of the names.
        """
        return self.mixer.add_tasks(names, init)

    def keep_tasks(self, names: Sequence[str]) -> None:
        """Drop every task but these; the skills stay (private adapters go with their task).

        Raises:
            InputError: an unknown or repeated name, or the model is merged.
        """
        self.check_unmerged()
        self.mixer.keep_tasks(names)

    # ---------------------------------------------------------------- training

    def set_phase(self, phase: Phase) -> None:
        """Choose what trains; everything else is frozen.

        - `full`: skills and routing.
        - `z`: routing only.
        - `mu`: the skills are replaced by their average, one LoRA, which trains.
        - `mu-uncollapsed`: all skills train under the uniform mixture, as the published code does.
          The same function as `mu`; the global gradient norm is 1/sqrt(K) of it.
        - `random`: skills and routing start afresh (a control).

        `mu`, `mu-uncollapsed` and `random` discard what they replace. Modules of
        `MHRConfig.modules_to_save` train in every phase.

        Raises:
            InputError: no such phase, nothing to train in it, or the model is merged.
        """
        self.check_phase(phase)
        if phase == "z" and not len(self.routes) and not list(self.rule.parameters()):
            raise InputError("phase 'z' trains the routes of tasks, and there are none: add a task")
        start_phase(self.mixer, phase)
        self.rule = self.mixer.rule

    def check_phase(self, phase: Phase) -> None:
        """Make sure that a task could be trained in this phase.

        Raises:
            InputError: no such phase, nothing to train in it, or the model is merged.
        """
        self.check_unmerged()
        check_phase(self.mixer, phase)

    def learned(self) -> list[nn.Parameter]:
        """Everything that can train: skills, routes, the rule, and `modules_to_save`."""
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

        Every group states its learning rate and its weight decay, so nothing is inherited from an
        optimizer's defaults. Decay pulls logits toward the uniform mixture; the published SuperNI
        runs had 0.01 there.

        Args:
            phase: is set first, see `set_phase`; None keeps what is set.
            lr: of the skills, a rule's own parameters and `modules_to_save`.
            route_lr: of the routing logits.
            weight_decay: of what `lr` is for.
            route_weight_decay: of the routing logits.

        Returns:
            Up to four groups, named `skills`, `modules`, `rule` and `routes`.

        Raises:
            InputError: as `set_phase`, or a rate is not positive and finite, or a decay negative.
        """
        rates = {
            "lr": lr,
            "route_lr": route_lr,
            "weight_decay": weight_decay,
            "route_weight_decay": route_weight_decay,
        }
        if phase is not None:
            self.check_phase(phase)
        param_groups(self.mixer, rates)  # which checks the rates
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
        """AdamW whose step costs the rows of the batch, not the routing table: for many tasks.

        Rows outside the batch are touched by no gradient, no moment and no weight decay; every row
        has a clock of its own, which ticks when it is in the batch
        (`polyroute.routes.row_optimizer` says what that changes). Skills are trained as by
        `torch.optim.AdamW`, and in phases without routing the optimizer is that.

        The table is frozen and its rows train through `routes.touched`; the next `set_phase`,
        `param_groups` or `optimizer` undoes that. It works in one process: the rows of a batch
        would have to be exchanged between several.

        Args:
            phase: as in `param_groups`, with all that follows.
            betas: decay rates of the moments.
            eps: added to the root of the second moment.
            **rates: `lr`, `route_lr`, `weight_decay`, `route_weight_decay` of `param_groups`.

        Raises:
            InputError: as `param_groups`.
        """
        groups = self.param_groups(phase, **rates)
        return row_optimizer(self.mixer, groups, betas=betas, eps=eps)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients.

        Those of a table trained by rows go even where others are set to zero: the next batch has
        other rows.
        """
        super().zero_grad(set_to_none)
        if self.routes.touched is not None:
            self.routes.touched.grad = None

    # ---------------------------------------------------------------- merging

    def merge(self, task: str) -> None:
        """Fold one task, or `"mu"`, into the base weights, in place: no overhead is left.

        The original weights are kept, so `unmerge` restores them bit for bit.

        Raises:
            InputError: merged already, unknown task, a rule that looks at the input, or a layer's
                weight that cannot be changed (quantised, or tied to another layer).
        """
        self._check_loaded()
        self.check_unmerged()
        factors = self.mixer.factors_of(self.routes.row(task), "merged")
        check_mergeable(self.base_model, self.sites)
        self._unmerged = fold(self.sites, factors)
        self._set_merged(task)

    def check_unmerged(self) -> None:
        """Make sure that the skills are not hidden behind a merged task.

        Raises:
            InputError: they are; the message names the task.
        """
        if self.merged_task is not None:
            raise InputError(f"the model is merged with {self.merged_task!r}; call unmerge() first")

    def unmerge(self) -> None:
        """Restore the base weights, bit for bit; nothing happens where nothing is merged.

        If the model was cast or moved since, they are restored in its present type and place.
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
        """Take the base model out again, as it was before `attach`; this object is then spent.

        A merged task stays merged, and with it the whole modules that trained stay as they are:
        that is how to get a plain model of one task.
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

        An adapted output embedding keeps its skills: new tokens have no update.
        """
        self._check_loaded()
        self.check_unmerged()
        self.mixer.forget()
        with self.wrapping.bare_output():
            return self.base_model.resize_token_embeddings(*args, **kwargs)  # type: ignore[operator]

    # ---------------------------------------------------------------- files

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        is_main_process: bool = True,
    ) -> None:
        """Write the inventory, the routes and what they are, without the base model.

        The routing table is written in parts of about 32 MB, whatever its size;
        `polyroute.SavedRoutes` reads and changes single rows of it. Parameters of the base model
        that trained or changed, and are not saved with the inventory, are named in a warning.

        Args:
            folder: where.
            is_main_process: whether to write. Where the base model is sharded (FSDP2), all
                processes call this, since some of its weights are looked at, and one writes.

        Raises:
            InputError: the folder cannot be written, the model is merged, was unloaded or is on
                the meta device, or it has private adapters and no task left.
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
            repo_id: such as `user/inventory`; made if it is missing.
            private: make a new repository private.
            token: for the hub, instead of the one that is logged in.
            revision: the branch, made if it is missing; default main.
            commit_message: of the commit.
            license: of the inventory, as the hub names it, such as `apache-2.0`.

        Returns:
            The address of the commit.

        Raises:
            InputError: as `save_pretrained`; or the name is no hub id, or the hub refuses.
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
        """Overwrite skills and routes, in place, by those of a checkpoint of this very model.

        Raises:
            InputError: the checkpoint has other tasks, layers, settings or sizes.
        """
        self._check_loaded()
        self.check_unmerged()
        load_checkpoint(folder, self.mixer, self.wrapping)

    def export_peft(self, task: str, folder: str | os.PathLike[str]) -> None:
        """Write one task, or `"mu"`, as an ordinary PEFT adapter that computes the same.

        Poly, MHR, shared and private LoRAs become a LoRA of the rank of the mixture; (IA)^3 becomes
        PEFT's.

        Raises:
            InputError: unknown task, a rule that looks at the input, or the folder cannot be
                written.
        """
        self._check_loaded()
        target = peft_target(self.base_model, self.sites, self.wrapping.trained)
        target.write(folder, self.factors_of(task))

    # ---------------------------------------------------------------- reports

    def counts(self) -> dict[str, int]:
        """Parameters by purpose; see `polyroute.counts.count_parameters`."""
        return count_parameters(self.base_model, self.sites, self.inventory, self.routes)

    def num_trainable(self) -> int:
        """How many parameters the current phase trains."""
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        if self.routes.touched is not None and self.routes.logits is not None:
            # It stands for the table, of which it holds the rows of the last batch.
            trained += self.routes.logits.numel() - self.routes.touched.numel()
        return trained

    def print_trainable_parameters(self) -> None:
        """Print what trains, of how much."""
        trained = self.num_trainable()
        total = sum(p.numel() for n, p in self.named_parameters() if n != "routes.touched")
        print(f"trainable: {trained:,} of {total:,} parameters ({100 * trained / total:.3f}%)")

    def describe(self) -> str:
        """Sites, routers and parameter counts, as text."""
        return describe(
            self.adapter_config, self.base_model, self.sites, self.inventory, self.routes
        )
