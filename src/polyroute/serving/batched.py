"""Dynamic batches by `generate`: for base models that continuous batching does not take.

Requests that wait are answered together, each as its own task; those that come meanwhile are the
next batch.
"""

import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from polyroute.errors import InputError, reason
from polyroute.host.output import say
from polyroute.kinds.batches import padded
from polyroute.kinds.choose import ModelKind
from polyroute.model import RoutedModel
from polyroute.serving.answers import Event, Failed, Limits
from polyroute.serving.places import Places
from polyroute.serving.requests import Generation, ServingError
from polyroute.serving.sampling import NOT_FINITE, chosen_tokens
from polyroute.serving.text_engine import Request, TextEngine

__all__ = ["BatchedEngine"]

WAIT = 0.005
"""Seconds that the first request of a batch waits for others."""


@dataclass(eq=False, kw_only=True)
class _Waiting(Request):
    is_over: bool = False


class BatchedEngine(TextEngine[_Waiting]):
    """Answers requests with any model that has `generate`; see `TextEngine`."""

    request_class = _Waiting

    def __init__(self, model: RoutedModel, kind: ModelKind, places: Places, limits: Limits) -> None:
        super().__init__(model, kind, places, limits)
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._running = 0
        self._thread = threading.Thread(target=self._work, name="polyroute serve", daemon=True)

    def start(self) -> None:
        """Begin to answer; called inside the event loop that asks."""
        super().start()
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether it answers."""
        return self._thread.is_alive() and not self.is_stopping

    def load(self) -> dict[str, float]:
        """How many requests there are."""
        return {"running": self._running, "waiting": max(0, len(self.requests) - self._running)}

    def _check(self, generation: Generation) -> None:
        if generation.echo:
            raise InputError(
                "this server's model reads the prompt apart from the answer: leave out echo"
            )
        super()._check(generation)

    def _begin(self, request: _Waiting) -> None:
        self._queue.put(request)

    def _leave(self, request: _Waiting) -> None:
        request.is_over = True

    def _end(self) -> None:
        self._queue.put(None)
        self._thread.join()

    # ---------------------------------------------------------------- the thread of the model

    def _work(self) -> None:
        while (batch := self._next_batch()) is not None:
            self._running = len(batch)
            try:
                if batch:
                    _generate(self, batch)
            except Exception as error:  # the requests to come must not suffer
                say(f"serve: a batch failed ({reason(error)})")
                self.tell([(one, Failed(ServingError())) for one in batch])
            self._running = 0

    def _next_batch(self) -> list[_Waiting] | None:
        """The requests that wait; None at the end."""
        found = [self._queue.get()]
        while len(found) < self.limits.most_at_once and None not in found:
            try:
                found.append(self._queue.get(timeout=WAIT))
            except queue.Empty:
                break
        if self.is_stopping or None in found:
            return None
        return [one for one in found if one is not None and not one.is_over]


@torch.no_grad()
def _generate(engine: BatchedEngine, batch: Sequence[_Waiting]) -> None:
    """Answer a batch."""
    steps, model = _Steps(engine, batch), engine.model
    prompts = [list(one.generation.prompt_ids) for one in batch]
    side: Literal["left", "right"] = "right" if model.config.is_encoder_decoder else "left"
    longest = max(1, *(one.generation.max_tokens for one in batch))
    search = engine.kind.search(model, max_new_tokens=longest)
    pad = search.pad_token_id
    model.generate(
        input_ids=padded(prompts, pad, side=side).to(model.device),
        attention_mask=padded([[1] * len(ids) for ids in prompts], 0, side=side).to(model.device),
        tasks=[one.held.route for one in batch],
        generation_config=search,
        logits_processor=[steps.choose],
        stopping_criteria=[steps.are_over],
    )


class _Steps:
    """Chooses the tokens of a batch, and says which requests are over."""

    def __init__(self, engine: BatchedEngine, batch: Sequence[_Waiting]) -> None:
        self.engine, self.batch = engine, batch
        self.counts = [0] * len(batch)
        self.over = [False] * len(batch)

    def choose(self, _: Tensor, logits: Tensor) -> Tensor:
        """Logits whose largest is that of the chosen token, `[B, V]`."""
        known = [i for i, over in enumerate(self.over) if not over]
        chosen = chosen_tokens(
            logits[known].float(),
            [self.batch[i].generation for i in known],
            [self.batch[i].draws for i in known],
        )
        tokens = [min(self.engine.ends)] * len(self.batch)
        events: list[tuple[_Waiting, Event]] = []
        for i, token in zip(known, chosen, strict=True):
            if not token.is_finite:
                events.append((self.batch[i], Failed(ServingError(NOT_FINITE))))
                self.over[i] = True
                continue
            tokens[i] = token.id
            self.counts[i] += 1
            is_last = self.counts[i] >= self.batch[i].generation.max_tokens
            self.over[i] = is_last or token.id in self.engine.ends
            events.append((self.batch[i], token))
        self.engine.tell(events)
        forced = torch.zeros_like(logits)
        forced[torch.arange(len(tokens)), torch.tensor(tokens)] = 1.0
        return forced

    def are_over(self, ids: Tensor, _: Tensor, **__: Any) -> Tensor:
        """Whether each request is over, `[B]`."""
        is_over = [
            over or one.is_over or self.engine.is_stopping
            for over, one in zip(self.over, self.batch, strict=True)
        ]
        self.over = is_over
        return torch.tensor(is_over, device=ids.device)
