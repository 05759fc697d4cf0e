"""What all engines that write text share: who is asked, what is taken, and how tokens are told."""

import asyncio
import itertools
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from polyroute.kinds.choose import ModelKind
from polyroute.model import RoutedModel
from polyroute.serving.answers import Event, Failed, Limits, pieces
from polyroute.serving.places import Held, Places
from polyroute.serving.requests import BusyError, Generation, Piece, StoppingError
from polyroute.serving.sampling import Draws

__all__ = ["Request", "TextEngine"]

_numbers = itertools.count()
"""Of the requests of this process."""


@dataclass(eq=False, kw_only=True)
class Request:
    """A request that waits or is computed."""

    generation: Generation
    draws: Draws
    held: Held
    id: str = field(default_factory=lambda: f"request {next(_numbers)}")
    events: "asyncio.Queue[Event]" = field(default_factory=asyncio.Queue)


R = TypeVar("R", bound=Request)


class TextEngine(ABC, Generic[R]):
    """Answers requests, as many at once as it can.

    Args:
        model: the routed model, used by this engine alone.
        kind: how its base model reads and answers.
        places: the routes of tasks.
        limits: of what it takes.

    Attributes:
        ends: the tokens that end an answer.
        requests: by id, those that wait or are computed.
    """

    request_class: type[R]

    def __init__(self, model: RoutedModel, kind: ModelKind, places: Places, limits: Limits) -> None:
        self.model, self.kind, self.places, self.limits = model, kind, places, limits
        self.tokenizer = kind.tokenizer
        self.ends = set(kind.search(model, max_new_tokens=1).eos_token_id)
        embeddings: Any = model.base_model.get_input_embeddings()  # type: ignore[operator]
        self._vocabulary = int(embeddings.weight.shape[0])
        self._loop: asyncio.AbstractEventLoop | None = None
        self.requests: dict[str, R] = {}
        self.is_stopping = False

    def start(self) -> None:
        """Begin to answer; called inside the event loop that asks."""
        self._loop = asyncio.get_running_loop()

    def stop(self) -> None:
        """End all answers, and wait until no forward runs."""
        self.is_stopping = True
        self._end()
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._tell_all)

    @property
    @abstractmethod
    def is_alive(self) -> bool:
        """Whether it answers."""

    @abstractmethod
    def load(self) -> dict[str, float]:
        """How many requests there are."""

    async def answer(self, generation: Generation) -> AsyncGenerator[Piece]:
        """Answer one request. Whoever leaves the loop early (`aclose`) cancels it.

        Raises:
            InputError: it does not fit, or its task does not exist (any more).
            BusyError: too many requests wait; before the first piece.
            StoppingError: the server shuts down.
            ServingError: the model failed.
        """
        request = self._admitted(generation)
        self.requests[request.id] = request
        try:
            self._begin(request)
            told = pieces(generation, request.events, self.tokenizer, self.ends)
            async with aclosing(told) as answer:
                async for piece in answer:
                    yield piece
        finally:
            self._leave(request)
            del self.requests[request.id]
            request.held.release()

    def tell(self, events: Sequence[tuple[Request, Event]]) -> None:
        """Hand events to the answers, all of a forward at once; from the thread of the model."""

        def put() -> None:
            for request, event in events:
                request.events.put_nowait(event)

        if self._loop is not None and events and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(put)

    def _tell_all(self) -> None:
        for request in self.requests.values():
            request.events.put_nowait(Failed(StoppingError()))

    # ---------------------------------------------------------------- for subclasses

    def _check(self, generation: Generation) -> None:
        """Make sure that a request can be answered.

        Raises:
            InputError: it does not fit.
        """
        self.limits.check(generation, self._vocabulary)

    @abstractmethod
    def _begin(self, request: R) -> None:
        """Take a request.

        Raises:
            StoppingError: the engine stopped since.
        """

    @abstractmethod
    def _leave(self, request: R) -> None:
        """Let go of a request that ended or was cancelled."""

    @abstractmethod
    def _end(self) -> None:
        """Compute no more, and wait until no forward runs."""

    def _admitted(self, generation: Generation) -> R:
        self._check(generation)
        if not self.is_alive:
            raise StoppingError
        if len(self.requests) >= self.limits.most_requests:
            raise BusyError
        held = self.places.hold(generation.task)
        return self.request_class(generation=generation, draws=Draws(generation.seed), held=held)
