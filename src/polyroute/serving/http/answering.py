"""Waiting for answers, as long as the client waits too: several at once, whole or in pieces."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar, cast

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from polyroute.serving.http.errors import GONE, OVERDUE, GoneError, OverdueError
from polyroute.serving.http.observing import Seen
from polyroute.serving.requests import Piece

__all__ = ["DONE", "Deadline", "Events", "Pieces", "event", "until_gone"]

T = TypeVar("T")
WAITING = 16
"""How many pieces may wait for a client that reads slowly before its answers wait for it."""
GRACE = 5.0
"""Seconds behind the deadline in which a stream can tell that it ends."""
DONE = "data: [DONE]\n\n"


class Deadline:
    """When an answer has to be there.

    Args:
        seconds: from now.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.time = asyncio.get_running_loop().time() + seconds

    @property
    def left(self) -> float:
        """Seconds until then; negative afterwards."""
        return self.time - asyncio.get_running_loop().time()


async def until_gone(
    receive: Receive, work: Awaitable[T], deadline: Deadline, *, grace: float = 0.0
) -> T:
    """What the work returns, unless the client leaves before; then the work is cancelled.

    Args:
        receive: tells when the client leaves, once its request has been read.
        work: what to wait for.
        deadline: how long.
        grace: how many seconds longer.

    Raises:
        GoneError: the client left.
        OverdueError: it took longer.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        seconds = deadline.left + grace
        await asyncio.wait((working, leaving), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if leaving.done():
            leaving.result()  # raises if the client sent too much
            raise GoneError
        raise OverdueError(deadline.seconds)
    finally:
        await _cancelled(working, leaving)


class Pieces:
    """The pieces of several answers as they come, each with the number of its answer.

    It ends when all answers have; when one fails, it raises its error and cancels the others.

    Args:
        answers: async generators, which start now.
        deadline: when the last piece has to be there.
        seen: counts the tokens.
    """

    def __init__(
        self, answers: Sequence[AsyncIterator[Piece]], deadline: Deadline, seen: Seen
    ) -> None:
        self._queue: asyncio.Queue[tuple[int, Piece] | Exception | None] = asyncio.Queue(WAITING)
        self._tasks = [
            asyncio.create_task(self._read(number, answer)) for number, answer in enumerate(answers)
        ]
        self._left = len(answers)
        self._deadline, self._seen = deadline, seen
        self._first: tuple[int, Piece] | None = None

    async def begin(self) -> None:
        """Wait for the first piece, so that what is refused is refused before anything is sent.

        Raises:
            Exception: whatever the answers raise.
        """
        self._first = await anext(self)

    def __aiter__(self) -> "Pieces":
        return self

    async def __anext__(self) -> tuple[int, Piece]:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        while self._left:
            try:
                async with asyncio.timeout_at(self._deadline.time):
                    found = await self._queue.get()
            except TimeoutError:
                raise OverdueError(self._deadline.seconds) from None
            if isinstance(found, Exception):
                raise found
            if found is not None:
                if not found[1].is_prompt:
                    self._seen.add_tokens(len(found[1].tokens))
                return found
            self._left -= 1
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Cancel what has not ended."""
        await _cancelled(*self._tasks)

    async def _read(self, number: int, answer: AsyncIterator[Piece]) -> None:
        try:
            async with aclosing(cast(AsyncGenerator[Piece, None], answer)) as pieces:
                async for piece in pieces:
                    await self._queue.put((number, piece))
        except Exception as error:
            await self._queue.put(error)
        else:
            await self._queue.put(None)


class Events(Response):
    """Server-sent events, until the client leaves.

    Starlette's own streams do not close what they read from when the client leaves; Python does
    that later, and until then the model would go on.

    Args:
        lines: the events.
        close: called at the end, however it comes.
        deadline: when the stream has to end.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        lines: AsyncGenerator[str, None],
        close: Callable[[], Awaitable[None]],
        deadline: Deadline,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._lines, self._close, self._deadline = lines, close, deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await until_gone(receive, self._send(send), self._deadline, grace=GRACE)
        except GoneError:
            scope["state"]["seen"].status = GONE
        except OverdueError:  # the client does not read what it is sent
            scope["state"]["seen"].status = OVERDUE
        finally:
            await self._close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._lines) as lines:
            async for line in lines:
                await send({"type": "http.response.body", "body": line.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def event(document: dict[str, Any]) -> str:
    """A server-sent event of JSON."""
    return f"data: {json.dumps(document, allow_nan=False)}\n\n"


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancelled(*tasks: "asyncio.Future[Any]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
