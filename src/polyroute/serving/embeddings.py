"""Embeddings of an encoder: texts that wait are embedded together, each as its own task."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from polyroute.errors import InputError
from polyroute.kinds.batches import token_ids
from polyroute.kinds.encoder import EncoderKind
from polyroute.model import RoutedModel
from polyroute.serving.answers import Limits
from polyroute.serving.learning import LONGEST_TOKEN
from polyroute.serving.places import Held, Places
from polyroute.serving.requests import BusyError, StoppingError

__all__ = ["EmbeddingEngine"]


@dataclass(eq=False)
class _Text:
    ids: list[int]
    held: Held
    found: "asyncio.Future[list[float]]"


class EmbeddingEngine:
    """Embeds texts.

    Args:
        model: the routed model, used by this engine alone.
        kind: how its base model reads.
        places: the routes of tasks.
        limits: of what it takes; `most_requests` counts texts.
    """

    def __init__(
        self, model: RoutedModel, kind: EncoderKind, places: Places, limits: Limits
    ) -> None:
        self.model, self.kind, self.places, self.limits = model, kind, places, limits
        self._waiting: list[_Text] = []
        self._has_texts = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="polyroute serve")
        self._task: asyncio.Task[None] | None = None
        self._running = 0

    def start(self) -> None:
        """Begin to embed; called inside the event loop that asks."""
        self._task = asyncio.get_running_loop().create_task(self._work())

    def stop(self) -> None:
        """Give up what waits, and wait until no forward runs."""
        if self._task is not None:
            self._task.cancel()
        for text in self._waiting:
            text.found.cancel()
        self._thread.shutdown()

    @property
    def is_alive(self) -> bool:
        """Whether it embeds."""
        return self._task is not None and not self._task.done()

    def load(self) -> dict[str, float]:
        """How many texts there are."""
        return {"running": self._running, "waiting": len(self._waiting)}

    async def embed(self, task: str, texts: Sequence[str]) -> tuple[list[list[float]], int]:
        """The vectors of texts, of length 1, and the number of their tokens.

        Raises:
            InputError: the task does not exist, or a text is too long.
            BusyError: too many texts wait.
            StoppingError: the server shuts down.
        """
        if not self.is_alive:
            raise StoppingError
        most = min(self.limits.most_tokens, self.kind.max_positions)
        for number, text in enumerate(texts):
            if len(text) > LONGEST_TOKEN * most:
                raise InputError(f"text {number} has {len(text)} characters: shorten it")
        ids = await asyncio.to_thread(token_ids, self.kind.tokenizer, list(texts), special=True)
        for number, own in enumerate(ids):
            if not own:
                raise InputError(f"text {number} has no tokens: give it some text")
            if len(own) > most:
                raise InputError(
                    f"text {number} has {len(own)} tokens, and the model reads {most}: shorten it"
                )
        if len(self._waiting) + len(ids) > max(self.limits.most_requests, len(ids)):
            raise BusyError
        held = self.places.hold(task)
        loop = asyncio.get_running_loop()
        wanted = [_Text(own, held, loop.create_future()) for own in ids]
        self._waiting += wanted
        self._has_texts.set()
        try:
            return [await one.found for one in wanted], sum(map(len, ids))
        finally:
            for one in wanted:
                one.found.cancel()
            held.release()

    async def _work(self) -> None:
        while True:
            await self._has_texts.wait()
            batch = [text for text in self._waiting if not text.found.done()]
            batch, self._waiting = (
                batch[: self.limits.most_at_once], batch[self.limits.most_at_once :],
            )  # fmt: skip
            if not self._waiting:
                self._has_texts.clear()
            if not batch:
                continue
            self._running = len(batch)
            loop = asyncio.get_running_loop()
            try:
                vectors = await loop.run_in_executor(self._thread, self._embed, batch)
                for text, vector in zip(batch, vectors, strict=True):
                    if not text.found.done():
                        text.found.set_result(vector)
            except Exception as error:  # the texts to come must not suffer
                for text in batch:
                    if not text.found.done():
                        text.found.set_exception(error)
            self._running = 0

    @torch.no_grad()
    def _embed(self, batch: Sequence[_Text]) -> list[list[float]]:
        inputs = self.kind.inputs([text.ids for text in batch])
        routes = [text.held.route for text in batch]
        vectors: list[list[float]] = self.kind.embedded(self.model, inputs, routes).tolist()
        return vectors
