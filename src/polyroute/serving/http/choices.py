"""From what a client asks to generations, and from their pieces to its choices."""

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastapi.responses import JSONResponse, Response

from polyroute.errors import InputError
from polyroute.serving.http.answering import DONE, Events, Pieces, event
from polyroute.serving.http.calls import Call
from polyroute.serving.http.errors import refusal_of
from polyroute.serving.http.observing import Seen
from polyroute.serving.http.schema import Sampled
from polyroute.serving.requests import Finish, Generation, Piece, Token

__all__ = ["Choice", "Form", "Prompt", "answered", "check_count", "finite"]

MOST_CHOICES = 128
"""Of one request: for each prompt as many as it asks for."""
COLDEST = 1e-5
"""Below this temperature logits divided by it can be too large for numbers; 0 is the same then."""
UNLIKELY = -9999.0
"""The log-probability that OpenAI tells of a token that cannot come; JSON has no infinity."""


@dataclass(frozen=True)
class Prompt:
    """A prompt in tokens, and how long its answer may be."""

    ids: Sequence[int]
    max_tokens: int


@dataclass
class Choice:
    """One whole answer."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: Finish | None = None

    def add(self, piece: Piece) -> None:
        """Add the next part."""
        self.text += piece.text
        self.tokens += piece.tokens
        self.finish = piece.finish


class Form(Protocol):
    """How an endpoint writes answers.

    Attributes:
        prefix: of the id of an answer.
        kind: what a whole answer calls itself.
        chunk_kind: what a part of one calls itself.
    """

    prefix: str
    kind: str
    chunk_kind: str

    def whole(self, index: int, choice: Choice) -> dict[str, Any]:
        """A whole answer."""

    def parts(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """What a stream says of a piece; may be nothing."""


async def answered(
    call: Call, asked: Sampled, prompts: Sequence[Prompt], form: Form, **options: Any
) -> Response:
    """The response to a request for completions or a chat.

    Args:
        call: the request.
        asked: its body.
        prompts: its prompts, each answered `asked.n` times.
        form: how answers are written.
        **options: `echo` and `top_logprobs` of the generations.

    Raises:
        Exception: whatever the service raises before the first piece of a stream, or ever.
    """
    task = call.known(asked.model)
    generations = [
        _generation(task, asked, prompt, number, options)
        for prompt in prompts
        for number in range(asked.n)
    ]
    prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
    head = {
        "id": f"{form.prefix}-{uuid.uuid4().hex}",
        "object": form.chunk_kind if asked.stream else form.kind,
        "created": int(time.time()),
        "model": asked.model,
    }
    answers = [call.service.answer(each) for each in generations]
    pieces = Pieces(answers, call.deadline, call.seen)
    is_streamed = False
    try:
        with call.about(asked.model):
            if asked.stream:
                await call.while_there(pieces.begin())
                call.seen.prompt_tokens = prompt_tokens
                is_streamed = True  # and the stream closes the pieces
                lines = _told(call, asked, _chunks(head, asked, pieces, form, call.seen))
                return Events(lines, pieces.aclose, call.deadline)
            choices = await call.while_there(_gathered(pieces, len(answers)))
            call.seen.prompt_tokens = prompt_tokens
    finally:
        if not is_streamed:
            await pieces.aclose()
    written = [form.whole(index, choice) for index, choice in enumerate(choices)]
    return JSONResponse({**head, "choices": written, "usage": _usage(call.seen)})


def finite(logprob: float) -> float:
    """A log-probability as JSON can have it."""
    return max(logprob, UNLIKELY)


def check_count(call: Call, prompts: int, n: int) -> None:
    """Make sure that a request does not ask for too many answers.

    Raises:
        InputError: it does.
    """
    most = min(MOST_CHOICES, call.service.most_requests)
    if prompts * n > most:
        raise InputError(
            f"{prompts} prompts with n = {n} ask for {prompts * n} answers, more than the "
            f"{most} that one request may have; send several requests"
        )


def _generation(
    task: str, asked: Sampled, prompt: Prompt, number: int, options: dict[str, Any]
) -> Generation:
    return Generation(
        task=task,
        prompt_ids=prompt.ids,
        max_tokens=prompt.max_tokens,
        temperature=asked.temperature if asked.temperature >= COLDEST else 0.0,
        top_p=asked.top_p,
        seed=None if asked.seed is None else asked.seed + number,
        stop=asked.stop,
        **options,
    )


async def _gathered(pieces: Pieces, count: int) -> list[Choice]:
    choices = [Choice() for _ in range(count)]
    async for index, piece in pieces:
        choices[index].add(piece)
    return choices


async def _chunks(
    head: dict[str, Any], asked: Sampled, pieces: Pieces, form: Form, seen: Seen
) -> AsyncGenerator[dict[str, Any], None]:
    usage = {"usage": None} if asked.tells_usage else {}
    async for index, piece in pieces:
        for choice in form.parts(index, piece):
            yield {**head, "choices": [choice], **usage}
    if asked.tells_usage:
        yield {**head, "choices": [], "usage": _usage(seen)}


async def _told(
    call: Call, asked: Sampled, chunks: AsyncGenerator[dict[str, Any], None]
) -> AsyncGenerator[str, None]:
    """Events of chunks, which end with an error if there is one."""
    try:
        with call.about(asked.model):
            async for chunk in chunks:
                yield event(chunk)
    except Exception as error:
        refusal = refusal_of(error, call.seen.request_id)
        call.seen.status = refusal.status
        yield event(refusal.document)
    else:
        yield DONE


def _usage(seen: Seen) -> dict[str, int]:
    return {
        "prompt_tokens": seen.prompt_tokens,
        "completion_tokens": seen.completion_tokens,
        "total_tokens": seen.prompt_tokens + seen.completion_tokens,
    }
