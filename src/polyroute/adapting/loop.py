"""Training many slots at once: each exactly as alone, all in the same forward passes."""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyroute.adapting.memory import Budget, plan
from polyroute.adapting.row_batches import losses_of
from polyroute.adapting.slot import Slot
from polyroute.adapting.slot_training import SlotTraining
from polyroute.adapting.slots import NEAREST, Slots, check_phase, check_starts
from polyroute.adapting.starts import nearest_routes
from polyroute.errors import InputError
from polyroute.host.interrupts import deferred
from polyroute.host.memory import Trim
from polyroute.host.progress import progress
from polyroute.kinds.batches import Row
from polyroute.kinds.choose import ModelKind
from polyroute.model import RoutedModel

__all__ = ["SlotCalls", "train_slots"]

SECONDS_BETWEEN_SAVES = 60.0
TOKENS_APART = 4096
"""Most tokens in a forward of a slot that is trained alone."""


@dataclass(frozen=True)
class SlotCalls:
    """What is called with a slot while the model holds it; its route is `SlotTraining.route`."""

    finish: Callable[[SlotTraining], None]
    """Takes the slot as it ends."""
    score: Callable[[SlotTraining], float] | None = None
    """Scores the slot as it is, from 0 to 1; needed where `choose_by` is a score."""
    step: Callable[[SlotTraining], None] | None = None
    """Takes each slot after each of its steps."""


def train_slots(  # noqa: PLR0913 (what trains is apart from how much and where)
    model: RoutedModel,
    kind: ModelKind,
    slots: Sequence[Slot],
    calls: SlotCalls,
    *,
    memory: str | int | None = None,
    folder: Path | None = None,
    is_deterministic: bool = False,
) -> None:
    """Train slots side by side, as many at a time as memory allows; one that ends makes room.

    Each slot takes its own steps in its own order; rows of all slots are cut into batches of
    similar length, and a slot's gradient is that of the mean over its own rows.

    Args:
        model: a trained inventory; it is left as it was.
        kind: how its base model learns.
        slots: what to train, at least one and all of one phase.
        calls: what is called with the slots.
        memory: see `polyroute.adapting.memory.plan`.
        folder: where running slots are saved about once a minute, and on Ctrl-C or SIGTERM; a slot
            that is there already goes on from its file.
        is_deterministic: train one slot after the other, in batches that depend on its own rows
            alone, so that its result is the same to the bit whatever else is trained and however
            much memory is free.

    Raises:
        InputError: the phase has nothing to train, a slot chooses by a score and nothing scores,
            a start or an example cannot be used, not even one slot fits into memory, or a saved
            slot is damaged or was written with other settings.
    """
    (phase,) = {slot.settings.phase for slot in slots}
    check_phase(model, phase)
    if calls.score is None and any(slot.settings.choose_by != "loss" for slot in slots):
        raise InputError(
            "only an adaptation to tasks of a suite can choose by a score: leave out choose_by"
        )
    budget = plan(model, kind, phase, memory)
    digests = _check(model, kind, slots, folder)
    if is_deterministic:
        budget = Budget(TOKENS_APART, slots=1)
    starts = _starts(model, kind, slots, budget, folder, is_apart=is_deterministic)
    queue = deque(slots)
    total = sum(slot.settings.steps for slot in slots)
    with (
        torch.enable_grad(),
        Slots(model, phase, min(len(slots), budget.slots)) as places,
        progress(what="adapting", unit="step", total=total) as bar,
        # Without a folder there is nowhere to save to, so an interruption need not wait.
        nullcontext(bool) if folder is None else deferred() as is_stopped,
    ):
        running = _Running(places, kind, budget, calls, bar)
        num_ended, saved_at, trim = 0, time.monotonic(), Trim()
        while (queue or running.slots) and not is_stopped():
            while queue and running.free:
                slot = queue.popleft()
                running.begin(slot, digests[slot.name], starts.get(slot.name), folder)
            running.step()
            if model.mixer.device.type == "cpu":
                trim.if_due()
            num_ended += running.end(folder)
            bar.set_postfix_str(f"{num_ended} of {len(slots)} slots done", refresh=False)
            is_time = time.monotonic() - saved_at > SECONDS_BETWEEN_SAVES
            if folder is not None and (is_time or is_stopped()):
                for training in running.slots:
                    training.save(folder)
                saved_at = time.monotonic()


class _Running:
    """The slots that train now, and the places that are free."""

    def __init__(
        self, places: Slots, kind: ModelKind, budget: Budget, calls: SlotCalls, bar: Any
    ) -> None:
        self.places, self.kind, self.budget = places, kind, budget
        self.calls, self.bar = calls, bar
        self.packing = kind.packing_of(places.model, places.names[0])
        self.free = deque(range(len(places.names)))
        self.slots: list[SlotTraining] = []

    def begin(self, slot: Slot, digest: str, start: Tensor | None, folder: Path | None) -> None:
        """Put a slot into a free place, as it was last saved if it was."""
        training = SlotTraining(self.places, self.free.popleft(), slot, digest, start)
        if folder is not None:
            training.load(folder)
            self.bar.update(training.step)
        self.slots.append(training)

    def step(self) -> None:
        """Take one step of every slot that is not over; they share the time that it took."""
        started = time.perf_counter()
        stepping = [training for training in self.slots if not training.is_over]
        _take_step(self, stepping)
        self.bar.update(len(stepping))
        share = (time.perf_counter() - started) / max(1, len(stepping))
        for training in stepping:
            training.seconds += share
            if self.calls.step is not None:
                self.calls.step(training)

    def losses(
        self, batches: Sequence[tuple[str, Sequence[Row]]], *, backward: bool = False
    ) -> list[float]:
        """The loss of each batch; none where there are no batches."""
        if not batches:
            return []
        return losses_of(
            self.places.model, self.kind, batches, self.budget.tokens, backward=backward,
            packing=self.packing,
        )  # fmt: skip

    def end(self, folder: Path | None) -> int:
        """Let go of the slots that are over; returns how many."""
        over = [training for training in self.slots if training.is_over]
        for training in over:
            training.finish()
        self._look_at_ends(over)
        for training in over:
            self.calls.finish(training)
            if folder is not None:
                training.slot.file(folder).unlink(missing_ok=True)
            self.slots.remove(training)
            self.free.append(training.place)
            self.bar.update(training.settings.steps - training.step)
        return len(over)

    @torch.no_grad()
    def _look_at_ends(self, over: Sequence[SlotTraining]) -> None:
        """Note which slots diverged in their last step, whose loss no later step has computed.

        Its numbers may be finite where what they multiply to is not, so one example is computed.
        """
        unseen = [each for each in over if each.diverged_at is None and not each.best]
        batches = [(each.route, [each.slot.rows[0]]) for each in unseen]
        for training, loss in zip(unseen, self.losses(batches), strict=True):
            if not math.isfinite(loss):
                training.diverged_at = training.step


def _check(
    model: RoutedModel, kind: ModelKind, slots: Sequence[Slot], folder: Path | None
) -> dict[str, str]:
    """Find out, before any work is lost, whether every slot can begin; the digests, by name."""
    check_starts(model, slots[0].settings.phase, [slot.settings.init for slot in slots])
    for slot in slots:
        for rows in filter(None, (slot.rows, slot.validation_rows)):
            kind.collate(rows)
    digests = {
        slot.name: "" if folder is None else slot.digest(model, kind.objective) for slot in slots
    }
    for slot in slots:
        if folder is not None and slot.file(folder).exists():
            slot.saved(folder, digests[slot.name])
    return digests


def _starts(
    model: RoutedModel,
    kind: ModelKind,
    slots: Sequence[Slot],
    budget: Budget,
    folder: Path | None,
    *,
    is_apart: bool,
) -> dict[str, Tensor]:
    """The nearest routes of the slots that start there; slots of equal examples share one."""
    fresh = [
        slot
        for slot in slots
        if slot.settings.init == NEAREST and (folder is None or not slot.file(folder).exists())
    ]
    if not fresh:
        return {}
    examples = {(slot.task, slot.seed, len(slot.rows)): slot.rows for slot in fresh}
    names = {key: str(number) for number, key in enumerate(examples)}
    named = {names[key]: rows for key, rows in examples.items()}
    groups = [{name: rows} for name, rows in named.items()] if is_apart else [named]
    found: dict[str, Tensor] = {}
    for group in groups:
        found |= nearest_routes(model, kind, group, budget.tokens)
    return {slot.name: found[names[slot.task, slot.seed, len(slot.rows)]] for slot in fresh}


def _take_step(running: _Running, stepping: Sequence[SlotTraining]) -> None:
    """Take one step of slots, and look at the validation examples where it is time."""
    batches = [(training.route, training.next_rows()) for training in stepping]
    losses = running.losses(batches, backward=True)
    for training, loss in zip(stepping, losses, strict=True):
        training.update(loss)
    running.places.zero_grad()
    due = [training for training in stepping if training.is_due]
    by_loss = [training for training in due if training.settings.choose_by == "loss"]
    with torch.no_grad():
        for training in due:
            if training.settings.choose_by != "loss":
                assert running.calls.score is not None
                training.look(1 - running.calls.score(training))
        looks = [(training.route, training.slot.validation_rows) for training in by_loss]
        losses = running.losses(looks)
    for training, loss in zip(by_loss, losses, strict=True):
        training.look(loss)
