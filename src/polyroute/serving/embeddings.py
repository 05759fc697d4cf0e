"""Embeddings of an encoder: texts that wait are embedded together, each as its own task."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from polyroute.errors import InputError, reason
from polyroute.host.output import say
from polyroute.kinds.encoder import EncoderKind
from polyroute.model import RoutedModel
from polyroute.serving.answers import Limits
from polyroute.serving.places import Held, Places
from polyroute.serving.requests import (
    BusyError,
    ServingError,
    StoppingError,
    check_characters,
)

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
        self._running: list[_Text] = []
        self._has_texts = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="polyroute serve")
        self._task: asyncio.Task[None] | None = None
        self._is_stopping = False

    def start(self) -> None:
        """Begin to embed; called inside the event loop that asks."""
        self._task = asyncio.get_running_loop().create_task(self._work())

    def stop(self) -> None:
        """Give up all texts, and wait until no forward runs; called from any thread."""
        self._is_stopping = True
        if self._task is not None:
            self._task.get_loop().call_soon_threadsafe(self._task.cancel)
        self._thread.shutdown()

    @property
    def is_alive(self) -> bool:
        """Whether it embeds."""
        return self._task is not None and not self._task.done() and not self._is_stopping

    def load(self) -> dict[str, float]:
        """How many texts there are."""
        return {"running": len(self._running), "waiting": len(self._waiting)}

    async def embed(self, task: str, texts: Sequence[str]) -> tuple[list[list[float]], int]:
        """The vectors of texts, of length 1, and the number of their tokens.

        Raises:
            InputError: the task does not exist, or a text is too long.
            BusyError: too many texts wait.
            StoppingError: the server shuts down.
            ServingError: the model failed.
        """
        most = self.limits.most_tokens
        for number, text in enumerate(texts):
            check_characters(f"text {number}", len(text), most)
        ids = await asyncio.to_thread(self.kind.text_ids, list(texts))
        for number, own in enumerate(ids):
            if not own:
                raise InputError(f"text {number} has no tokens: give it some text")
            if len(own) > most:
                raise InputError(
                    f"text {number} has {len(own)} tokens, and {most} are the most: shorten it"
                )
        if not self.is_alive:
            raise StoppingError
        if len(self._waiting) + len(ids) > max(self.limits.most_requests, len(ids)):
            raise BusyError
        held = self.places.hold(task)
        loop = asyncio.get_running_loop()
        wanted = [_Text(own, held, loop.create_future()) for own in ids]
        self._waiting += wanted
        self._has_texts.set()
        try:
            return await asyncio.gather(*(one.found for one in wanted)), sum(map(len, ids))
        finally:
            for one in wanted:
                one.found.cancel()
            held.release()

    async def _work(self) -> None:
        try:
            while True:
                await self._has_texts.wait()
                await self._embed_batch()
        finally:
            _fail([*self._running, *self._waiting], StoppingError())

    async def _embed_batch(self) -> None:
        """Embed the first texts that wait. There may be none: whoever asked may have left."""
        waiting = [text for text in self._waiting if not text.found.done()]
        most = self.limits.most_at_once
        self._running, self._waiting = waiting[:most], waiting[most:]
        if not self._waiting:
            self._has_texts.clear()
        if not self._running:
            return
        loop = asyncio.get_running_loop()
        try:
            vectors = await loop.run_in_executor(self._thread, self._embed, self._running)
            for text, vector in zip(self._running, vectors, strict=True):
                if not text.found.done():
                    text.found.set_result(vector)
        except Exception as error:  # the texts to come must not suffer
            say(f"serve: a batch failed ({reason(error)})")
            _fail(self._running, ServingError())
        self._running = []

    @torch.no_grad()
    def _embed(self, batch: Sequence[_Text]) -> list[list[float]]:
        inputs = self.kind.inputs([text.ids for text in batch])
        routes = [text.held.route for text in batch]
        vectors: list[list[float]] = self.kind.embedded(self.model, inputs, routes).tolist()
        return vectors


def _fail(texts: Sequence[_Text], error: Exception) -> None:
    """Answer texts with an error."""
    for text in texts:
        if not text.found.done():
            text.found.set_exception(error)
