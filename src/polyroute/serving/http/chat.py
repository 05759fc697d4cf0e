"""POST /v1/chat/completions: the next message of a conversation."""

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from polyroute.errors import InputError
from polyroute.serving.http.bodies import JsonRoute
from polyroute.serving.http.calls import Called
from polyroute.serving.http.choices import Choice, Prompt, answered, check_count, finite
from polyroute.serving.http.schema import ChatAsked, Message
from polyroute.serving.requests import Piece, Token

__all__ = ["router"]

HALF = "\ufffd"
"""What a part of a character reads as; its bytes are not known."""
router = APIRouter(route_class=JsonRoute)


@router.post("/v1/chat/completions")
async def chat(call: Called, asked: ChatAsked) -> Response:
    """Answer a conversation."""
    call.writes()
    call.known(asked.model)
    check_count(call, 1, asked.n)
    if not call.service.has_chat:
        raise InputError(
            f"the base model of {call.service.name} has no chat template; ask /v1/completions"
        )
    messages = [_message(message) for message in asked.messages]
    ids = await call.tokens(call.service.chat_ids, messages)
    prompt = Prompt(ids, call.room(ids, asked.most, call.service.max_length))
    top = (asked.top_logprobs or 0) if asked.logprobs else None
    return await answered(
        call, asked, [prompt], _Form(has_logprobs=asked.logprobs), top_logprobs=top
    )


def _message(message: Message) -> dict[str, str]:
    # "developer" is OpenAI's newer name for it, which templates do not know.
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": message.content}


class _Form:
    prefix = "chatcmpl"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, *, has_logprobs: bool) -> None:
        self.has_logprobs = has_logprobs
        self._begun: set[int] = set()

    def whole(self, index: int, choice: Choice) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs(choice.tokens),
            "finish_reason": choice.finish,
        }

    def parts(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        found = []
        if index not in self._begun:
            self._begun.add(index)
            found.append(_part(index, {"role": "assistant", "content": ""}))
        if piece.text or (piece.tokens and self.has_logprobs):
            logprobs = self._logprobs(piece.tokens)
            found.append(_part(index, {"content": piece.text}, logprobs=logprobs))
        if piece.finish:
            found.append(_part(index, {}, finish=piece.finish))
        return found

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self.has_logprobs:
            return None
        return {"content": [_told(token) for token in tokens], "refusal": None}


def _part(
    index: int,
    delta: dict[str, str],
    *,
    logprobs: dict[str, Any] | None = None,
    finish: str | None = None,
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def _told(token: Token) -> dict[str, Any]:
    assert token.logprob is not None  # of an answer's token, if log-probabilities were asked for
    return {
        **_likelihood(token.text, token.logprob),
        "top_logprobs": [_likelihood(text, logprob) for text, logprob in token.top],
    }


def _likelihood(text: str, logprob: float) -> dict[str, Any]:
    known = None if HALF in text else list(text.encode("utf-8"))
    return {"token": text, "logprob": finite(logprob), "bytes": known}
