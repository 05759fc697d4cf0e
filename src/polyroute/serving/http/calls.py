"""One request: who asks what of which model, and how long it may take."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request

from polyroute.errors import InputError
from polyroute.serving.http.access import Names
from polyroute.serving.http.answering import Deadline, until_gone
from polyroute.serving.http.errors import OverdueError, UnknownModelError, log, shown
from polyroute.serving.http.observing import Seen
from polyroute.serving.http.service import Service
from polyroute.serving.requests import SHARED

__all__ = ["Call", "Called"]

T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """One request.

    Attributes:
        request: as Starlette has it.
        service: who is asked.
        names: what the client may see, and calls it.
        seen: what logs and metrics tell of it.
        deadline: when the answer has to be there.
        tokenizing: one thread, so that long prompts do not stop the answers of others.
    """

    request: Request
    service: Service
    names: Names
    seen: Seen
    deadline: Deadline
    tokenizing: Executor

    # ---------------------------------------------------------------- names

    def known(self, name: str) -> str:
        """The service's name for a model that exists.

        Raises:
            UnknownModelError: it does not, for this client.
        """
        inner = self.names.inner(name)
        if not self.service.has_task(inner):
            raise UnknownModelError(name)
        return inner

    def own(self, name: str) -> str:
        """The service's name for a task that may be changed, whether it exists or not.

        Raises:
            InputError: tasks of this run cannot be changed, or the name is one of all.
        """
        inner = self.names.inner(name)
        if not self.service.can_learn:
            raise InputError(
                "this server keeps no tasks of clients; whoever runs it can start it with "
                "--tasks-dir FOLDER"
            )
        if not name or inner in SHARED:
            raise InputError(f"the name {shown(name)} cannot be a task's; choose another one")
        return inner

    @contextmanager
    def about(self, name: str, *, exists: bool = True) -> Iterator[None]:
        """What the service says of a task in here is told with the client's name for it.

        Args:
            name: the client's.
            exists: whether the task was there; if it has gone since, that is what is wrong.
        """
        try:
            yield
        except InputError as error:
            if exists:
                self.known(name)
            raise InputError(self.names.told(str(error), name)) from error

    # -------------------------------------------------------------- waiting

    async def while_there(self, work: Awaitable[T]) -> T:
        """What the work returns, if the client waits for it and it is there in time.

        Raises:
            GoneError: the client left.
            OverdueError: it took too long.
        """
        return await until_gone(self.request.receive, work, self.deadline)

    async def in_time(self, work: Coroutine[Any, Any, T]) -> T:
        """What the work returns if that is there in time: for changes, which end once they began.

        Raises:
            OverdueError: it took too long; the work goes on.
        """
        working = asyncio.ensure_future(work)
        await asyncio.wait((working,), timeout=self.deadline.left)
        if not working.done():
            _going_on.add(working)
            working.add_done_callback(_over)
            raise OverdueError(self.deadline.seconds)
        return working.result()

    # -------------------------------------------------------------- prompts

    async def tokens(self, tokenize: Callable[[T], list[int]], of: T) -> list[int]:
        """Tokens of a prompt, from a method of the service.

        Raises:
            InputError: the service refuses the prompt.
            GoneError: the client left.
            OverdueError: too many others were before it.
        """
        loop = asyncio.get_running_loop()
        return await self.while_there(loop.run_in_executor(self.tokenizing, tokenize, of))

    def writes(self) -> None:
        """Make sure that the model writes text.

        Raises:
            InputError: it is an encoder.
        """
        if not self.service.writes:
            raise InputError(
                f"the base model of {self.service.name} is an encoder, which writes no text; ask "
                "/v1/embeddings"
            )

    def room(self, prompt: Sequence[int], wanted: int | None, usual: int) -> int:
        """How many tokens an answer may have.

        Args:
            prompt: its tokens.
            wanted: what the client asks for, if it does.
            usual: what it gets otherwise, if there is room for that.

        Raises:
            InputError: the prompt has no tokens, or too many.
        """
        most, least = self.service.max_length, 1 if wanted is None else wanted
        if not prompt:
            raise InputError("the prompt has no tokens; give it some text")
        if len(prompt) + least > most:
            raise InputError(
                f"the prompt has {len(prompt)} tokens and its answer may have {least}, more than "
                f"the {most} tokens that both may have together: shorten the prompt or lower "
                "max_tokens"
            )
        return min(usual, most - len(prompt)) if wanted is None else wanted


_going_on: set[asyncio.Future[Any]] = set()
"""Changes that nobody waits for any more; the event loop alone would forget them."""


def _over(change: asyncio.Future[Any]) -> None:
    _going_on.discard(change)
    if not change.cancelled() and (error := change.exception()):
        log.error(json.dumps({"error": type(error).__name__, "message": str(error)}))


async def _call(request: Request) -> Call:
    state = request.app.state
    return Call(
        request=request,
        service=state.service,
        names=request.state.names,
        seen=request.state.seen,
        deadline=Deadline(state.settings.timeout),
        tokenizing=state.tokenizing,
    )


Called = Annotated[Call, Depends(_call)]
"""A parameter of a route that FastAPI fills with the call."""
