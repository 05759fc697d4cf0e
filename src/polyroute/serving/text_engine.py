"""What all engines that write text share: who is asked, what is taken, and how tokens are told."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from polyroute.kinds.choose import ModelKind
from polyroute.model import RoutedModel
from polyroute.serving.answers import Event, Limits, pieces
from polyroute.serving.places import Held, Places
from polyroute.serving.requests import BusyError, Generation, Piece, StoppingError
from polyroute.serving.sampling import Draws

__all__ = ["Request", "TextEngine"]


@dataclass(eq=False, kw_only=True)
class Request:
    """A request that waits or is computed."""

    generation: Generation
    draws: Draws
    held: Held
    events: "asyncio.Queue[Event]" = field(default_factory=asyncio.Queue)


class TextEngine:
    """Answers requests.

    Args:
        model: the routed model, used by this engine alone.
        kind: how its base model reads and answers.
        places: the routes of tasks.
        limits: of what it takes.

    Attributes:
        ends: the tokens that end an answer.
    """

    def __init__(self, model: RoutedModel, kind: ModelKind, places: Places, limits: Limits) -> None:
        self.model, self.kind, self.places, self.limits = model, kind, places, limits
        self.tokenizer = kind.tokenizer
        self.ends = set(kind.search(model, max_new_tokens=1).eos_token_id)
        embeddings: Any = model.base_model.get_input_embeddings()  # type: ignore[operator]
        self._vocabulary = int(embeddings.weight.shape[0])
        self._loop: asyncio.AbstractEventLoop | None = None
        self.is_stopping = False

    def start(self) -> None:
        """Begin to answer; called inside the event loop that asks."""
        self._loop = asyncio.get_running_loop()

    @property
    def is_alive(self) -> bool:
        """Whether it answers."""
        raise NotImplementedError

    def _admitted(self, generation: Generation, count: int) -> dict[str, Any]:
        """What a new request is made of.

        Args:
            generation: what is asked.
            count: of the requests that are there.

        Raises:
            InputError: it does not fit, or its task does not exist.
            StoppingError: this engine answers no more.
            BusyError: too many are there.
        """
        self.limits.check(generation, self._vocabulary)
        if not self.is_alive:
            raise StoppingError
        if count >= self.limits.most_requests:
            raise BusyError
        held = self.places.hold(generation.task)
        return {"generation": generation, "draws": Draws(generation.seed), "held": held}

    def _pieces(self, request: Request) -> AsyncGenerator[Piece]:
        """The pieces of the answer to a request, from what is told of it."""
        return pieces(request.generation, request.events, self.tokenizer, self.ends)

    def tell(self, events: Sequence[tuple[Request, Event]]) -> None:
        """Hand events to the answers, all of a forward at once; from the thread of the model."""

        def put() -> None:
            for request, event in events:
                request.events.put_nowait(event)

        if self._loop is not None and events and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(put)
