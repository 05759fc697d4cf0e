"""Training many slots at once: each exactly as alone, all in the same forward passes."""

import hashlib
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor, nn

from polyroute.adapting.memory import Budget, plan
from polyroute.adapting.row_batches import losses_of
from polyroute.adapting.settings import AdaptSettings
from polyroute.adapting.slots import NEAREST, Slots, check_starts
from polyroute.adapting.starts import nearest_routes
from polyroute.errors import InputError
from polyroute.host.files import read_metadata, read_tensors, write_tensors
from polyroute.host.interrupts import deferred
from polyroute.host.progress import progress
from polyroute.kinds.batches import Row
from polyroute.kinds.choose import ModelKind
from polyroute.kinds.objectives import Objective
from polyroute.model import Phase, RoutedModel
from polyroute.optimizers import make_optimizer

__all__ = ["Slot", "SlotTraining", "train_slots"]

SECONDS_BETWEEN_SAVES = 60.0
LONGEST_NAME = 120
CLEARLY = 1e-5
"""By which share a validation loss must be lower to be better; less is rounding, and would let the
best step depend on which other slots share the batches."""


@dataclass(frozen=True)
class Slot:
    """One adaptation: a task's examples, a seed, and settings."""

    task: str
    seed: int
    settings: AdaptSettings
    rows: Sequence[Row]
    """The encoded training examples."""
    validation_rows: Sequence[Row] = ()
    label: str = ""
    """What sets its settings apart from those of other slots; empty where they are alike."""
    indices: Sequence[int] = ()
    """Which of the task's examples `rows` are."""
    validation_indices: Sequence[int] = ()
    """And which `validation_rows` are."""

    @property
    def name(self) -> str:
        """What files of this slot are called."""
        parts = [quote(self.task, safe=""), f"seed-{self.seed}"]
        name = "-".join([*parts, quote(self.label, safe="=,")] if self.label else parts)
        if len(name) <= LONGEST_NAME:
            return name
        return f"{name[:LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"

    def file(self, folder: Path) -> Path:
        """Where the slot is saved while it trains."""
        return folder / f"{self.name}.safetensors"

    def saved_note(self, folder: Path, digest: str) -> dict[str, Any]:
        """What its file in a folder says beside tensors.

        Raises:
            InputError: the file is damaged, or that of another slot.
        """
        path = self.file(folder)
        try:
            note: dict[str, Any] = json.loads(read_metadata(path)["slot"])
            settings, of = note["settings"], note["digest"]
        except (KeyError, ValueError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{path} is damaged; delete it to start that slot from the beginning"
            ) from error
        if settings != self.settings.to_dict():
            raise InputError(
                f"{path} was written with other settings; name another folder, or delete it"
            )
        if of != digest:
            raise InputError(
                f"{path} was written for another objective, other examples or another inventory; "
                "name another folder, or delete it"
            )
        return note

    def digest(self, model: RoutedModel, objective: Objective) -> str:
        """Of what it learns, by what and from where, so that another is not taken for it."""
        columns = ("prompt_ids", "target_ids", "choice_ids", "label")
        rows = [[row[c] for c in columns] for row in (*self.rows, *self.validation_rows)]
        total = hashlib.sha256(json.dumps([repr(objective), len(self.rows), rows]).encode())
        logits = model.routes.logits
        for parameter in (*model.inventory.parameters(), *([] if logits is None else [logits])):
            # Enough of each to tell two inventories apart; all of a large one would take long.
            some = parameter.detach().reshape(-1)[:: max(1, parameter.numel() // 4096)]
            total.update(some.float().cpu().numpy().tobytes())
        return total.hexdigest()


class SlotTraining:
    """One slot in training, at its place.

    Attributes:
        losses: of each step, before it.
        best_step: the number of steps after which what chooses was best; the number of all steps
            where nothing chooses.
        best_loss: the lowest validation loss, or one minus the best score; None where nothing
            chooses.
        diverged_at: the step at which the loss or a weight was no longer finite; None if never.
        seconds: the slot's share of the time.
    """

    def __init__(
        self,
        slots: Slots,
        place: int,
        slot: Slot,
        digest: str = "",
        start: Tensor | None = None,
    ) -> None:
        self.slots, self.place, self.slot, self.digest = slots, place, slot, digest
        self.settings = slot.settings
        init = self.settings.init
        if init == NEAREST:
            init = "uniform"  # where none was looked for, `load` overwrites the slot
        slots.start(place, seed=slot.seed, init=init if start is None else start)
        self.parameters = slots.parameters(place)
        rates = {"skills": self.settings.lr, "routes": self.settings.route_lr or 0.0}
        decay = {"skills": self.settings.weight_decay, "routes": self.settings.route_weight_decay}
        groups: list[dict[str, Any]] = [
            {"name": name, "params": tensors, "lr": rates[name], "weight_decay": decay[name]}
            for name, tensors in self.parameters.items()
        ]
        self.optimizer = make_optimizer(
            self.settings.optimizer, groups, slots.model,
            scale_parameter=self.settings.scale_parameter,
        )  # fmt: skip
        self.rates = [float(group["lr"]) for group in groups]
        self.trained = [tensor for tensors in self.parameters.values() for tensor in tensors]
        self.order = _batches(len(slot.rows), self.settings, slot.seed)
        self.losses: list[float] = []
        self.best_step = 0
        self.best_loss: float | None = None
        self.best: list[Tensor] = []
        self.stale = 0
        self.diverged_at: int | None = None
        self.seconds = 0.0

    @property
    def route(self) -> str:
        """What to route as."""
        return self.slots.names[self.place]

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.losses)

    @property
    def is_over(self) -> bool:
        """Whether there is nothing more to train."""
        patience = self.settings.patience
        return (
            self.step >= self.settings.steps
            or self.diverged_at is not None
            or (patience is not None and self.stale >= patience)
        )

    @property
    def is_due(self) -> bool:
        """Whether it is time to look at the examples that choose the best step."""
        at_end = self.step == self.settings.steps
        has_any = bool(self.slot.validation_rows) or self.settings.looks_at_test
        is_time = at_end or self.step % self.settings.eval_steps == 0
        return has_any and is_time and self.diverged_at is None

    def next_rows(self) -> list[Row]:
        """The examples of the next step."""
        return [self.slot.rows[i] for i in next(self.order)]

    @torch.no_grad()
    def update(self, loss: float) -> None:
        """Take one step, from the gradients that are there."""
        self.losses.append(loss)
        if not math.isfinite(loss):
            self.diverged_at = self.step
            return
        self.slots.take_gradients(self.place, self.parameters)
        nn.utils.clip_grad_norm_(self.trained, self.settings.max_grad_norm)
        factor = _rate(self.step - 1, self.settings)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.step()
        for tensor in self.trained:
            tensor.grad = None

    def look(self, loss: float) -> None:
        """Note the validation loss, or one minus the score, and keep what is best."""
        best = self.best_loss
        if math.isfinite(loss) and (best is None or loss < best - CLEARLY * abs(best)):
            self.best_loss, self.best_step, self.stale = loss, self.step, 0
            self.best = [tensor.clone() for tensor in self.trained]
        else:
            self.stale += 1

    def finish(self) -> None:
        """Leave, in the slot, the best of its steps."""
        if self.best:  # also where it diverged afterwards
            for tensor, best in zip(self.trained, self.best, strict=True):
                tensor.copy_(best)
            self.diverged_at = None
        else:
            self.best_step = self.step
        if not all(bool(torch.isfinite(tensor).all()) for tensor in self.trained):
            self.diverged_at = self.diverged_at or self.step

    def save(self, folder: Path) -> None:
        """Write all that `load` needs to go on, in one file."""
        state = self.optimizer.state_dict()["state"]
        tensors = {f"parameter.{i}": tensor for i, tensor in enumerate(self.trained)}
        tensors |= {f"best.{i}": tensor for i, tensor in enumerate(self.best)}
        tensors |= {
            f"state.{i}.{key}": value
            for i, entries in state.items()
            for key, value in entries.items()
            if isinstance(value, Tensor)
        }
        note = {
            "settings": self.settings.to_dict(),
            "digest": self.digest,
            "losses": self.losses,
            "best_step": self.best_step,
            "best_loss": self.best_loss,
            "stale": self.stale,
            "seconds": self.seconds,
        }
        write_tensors(self.slot.file(folder), tensors, metadata={"slot": json.dumps(note)})

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Go on where `save` was last called, if it was.

        Raises:
            InputError: the file is damaged or of other settings.
        """
        path = self.slot.file(folder)
        if not path.exists():
            return
        note = self.slot.saved_note(folder, self.digest)
        try:
            saved = read_tensors(path)
            losses = note["losses"]
            if not isinstance(losses, list) or not 0 < len(losses) < self.settings.steps:
                raise ValueError("steps that were not taken")
            for i, tensor in enumerate(self.trained):
                if saved[f"parameter.{i}"].shape != tensor.shape:
                    raise ValueError("another shape")
                tensor.copy_(saved.pop(f"parameter.{i}"))
            self.best = [
                saved.pop(f"best.{i}").to(tensor)
                for i, tensor in enumerate(self.trained)
                if f"best.{i}" in saved
            ]
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in saved.items():
                _, number, name = key.split(".", 2)
                state.setdefault(int(number), {})[name] = value
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": state, "param_groups": groups})
            self.losses, self.best_step = [float(loss) for loss in losses], note["best_step"]
            self.best_loss, self.stale = note["best_loss"], note["stale"]
            self.seconds = note["seconds"]
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{path} is damaged; delete it to start that slot from the beginning"
            ) from error
        for _ in range(self.step):
            next(self.order)


def train_slots(
    model: RoutedModel,
    kind: ModelKind,
    phase: Phase,
    slots: Sequence[Slot],
    *,
    finish: Callable[[SlotTraining], None],
    memory: str | int | None = None,
    folder: Path | None = None,
    score: Callable[[SlotTraining], float] | None = None,
) -> None:
    """Train slots side by side, as many at a time as memory allows; one that ends makes room.

    Each slot takes its own steps in its own order; rows of all slots are cut into batches of
    similar length, and a slot's gradient is that of the mean over its own rows.

    Args:
        model: a trained inventory; afterwards as before.
        kind: how its base model learns.
        phase: of every slot.
        slots: what to train.
        finish: called for each slot as it ends, while the model still holds it: its route is
            `SlotTraining.route`.
        memory: see `polyroute.adapting.memory.plan`.
        folder: where running slots are saved about once a minute, and on Ctrl-C or SIGTERM, and
            taken up again.
        score: of a slot as it is, 0 to 1, where `choose_by` is a score.

    Raises:
        InputError: the phase has nothing to train, a slot chooses by a score and `score` is None,
            a start or an example cannot be used, not even one slot fits into memory, or a saved
            slot is damaged or of other settings.
    """
    model.check_phase(phase)
    if score is None and any(slot.settings.choose_by != "loss" for slot in slots):
        raise InputError(
            "only adaptation to tasks of a suite can choose by a score: leave choose_by"
        )
    budget = plan(model, kind, phase, memory)
    digests = _check(model, kind, phase, slots, folder)
    starts = _starts(model, kind, slots, budget, folder)
    queue = deque(slots)
    with torch.enable_grad(), Slots(model, phase, min(len(queue), budget.slots)) as places:
        free = deque(range(len(places.names)))
        running: list[SlotTraining] = []
        ended, saved_at = 0, time.monotonic()
        total = sum(slot.settings.steps for slot in slots)
        bar = progress(what="adapting", unit="step", total=total)
        # Without a folder there is nowhere to save to, and nothing to wait for.
        with bar, nullcontext(bool) if folder is None else deferred() as is_stopped:
            while (queue or running) and not is_stopped():
                while queue and free:
                    slot = queue.popleft()
                    training = SlotTraining(
                        places, free.popleft(), slot, digests[slot.name], starts.get(slot.name)
                    )
                    if folder is not None:
                        training.load(folder)
                        bar.update(training.step)
                    running.append(training)
                started = time.perf_counter()
                stepping = [training for training in running if not training.is_over]
                _take_step(model, kind, places, stepping, budget, score)
                bar.update(len(stepping))
                share = (time.perf_counter() - started) / max(1, len(stepping))
                for training in stepping:
                    training.seconds += share
                for training in [training for training in running if training.is_over]:
                    training.finish()
                    finish(training)
                    if folder is not None:
                        training.slot.file(folder).unlink(missing_ok=True)
                    running.remove(training)
                    free.append(training.place)
                    ended += 1
                    bar.update(training.settings.steps - training.step)
                bar.set_postfix_str(f"{ended} of {len(slots)} slots done", refresh=False)
                is_time = time.monotonic() - saved_at > SECONDS_BETWEEN_SAVES
                if folder is not None and (is_time or is_stopped()):
                    for training in running:
                        training.save(folder)
                    saved_at = time.monotonic()


def _check(
    model: RoutedModel, kind: ModelKind, phase: Phase, slots: Sequence[Slot], folder: Path | None
) -> dict[str, str]:
    """Find out, before any work is lost, whether every slot can begin; the digests, by name."""
    check_starts(model, phase, [slot.settings.init for slot in slots])
    for slot in slots:
        for rows in filter(None, (slot.rows, slot.validation_rows)):
            kind.collate(rows)
    digests = {
        slot.name: "" if folder is None else slot.digest(model, kind.objective) for slot in slots
    }
    for slot in slots:
        if folder is not None and slot.file(folder).exists():
            slot.saved_note(folder, digests[slot.name])
    return digests


def _starts(
    model: RoutedModel, kind: ModelKind, slots: Sequence[Slot], budget: Budget, folder: Path | None
) -> dict[str, Tensor]:
    """The routes, by slot, that are looked for; slots of equal examples share one."""
    fresh = [
        slot
        for slot in slots
        if slot.settings.init == NEAREST and (folder is None or not slot.file(folder).exists())
    ]
    if not fresh:
        return {}
    examples = {(slot.task, slot.seed, len(slot.rows)): slot.rows for slot in fresh}
    names = {key: str(number) for number, key in enumerate(examples)}
    found = nearest_routes(
        model, kind, {names[key]: rows for key, rows in examples.items()}, budget.tokens
    )
    return {slot.name: found[names[slot.task, slot.seed, len(slot.rows)]] for slot in fresh}


def _take_step(
    model: RoutedModel,
    kind: ModelKind,
    places: Slots,
    running: Sequence[SlotTraining],
    budget: Budget,
    score: Callable[[SlotTraining], float] | None,
) -> None:
    """One step of every slot, and a look at the validation examples where it is time."""
    batches = [(training, training.next_rows()) for training in running]
    routed = [(training.route, rows) for training, rows in batches]
    losses = losses_of(model, kind, routed, budget.tokens, backward=True)
    for training, loss in zip(running, losses, strict=True):
        training.update(loss)
    places.zero_grad()
    for training in running:
        if training.is_due and training.settings.choose_by != "loss":
            assert score is not None
            with torch.no_grad():
                training.look(1 - score(training))
    due = [t for t in running if t.is_due and t.settings.choose_by == "loss"]
    if due:
        looks = [(training.route, training.slot.validation_rows) for training in due]
        with torch.no_grad():
            found = losses_of(model, kind, looks, budget.tokens)
        for training, loss in zip(due, found, strict=True):
            training.look(loss)


def _rate(step: int, settings: AdaptSettings) -> float:
    """Factor of the learning rates at a step: up from above 0, then down to just above 0."""
    rising = max(1, round(settings.warmup * settings.steps))
    if step < rising:
        return (step + 1) / rising
    return max(0.0, (settings.steps - step) / max(1, settings.steps - rising + 1))


def _batches(num_rows: int, settings: AdaptSettings, seed: int) -> Iterator[list[int]]:
    """Row numbers of each step: shuffled passes over all rows, cut into equal batches."""
    rng = np.random.Generator(np.random.PCG64(seed))
    size = min(settings.batch_size, num_rows)
    queue: list[int] = []
    for _ in range(settings.steps):
        while len(queue) < size:
            queue.extend(rng.permutation(num_rows).tolist())
        yield queue[:size]
        del queue[:size]
