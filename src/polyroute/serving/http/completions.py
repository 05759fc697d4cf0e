"""POST /v1/completions: text behind a prompt, with log-probabilities if they are asked for."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from polyroute.serving.http.bodies import JsonRoute
from polyroute.serving.http.calls import Called
from polyroute.serving.http.choices import Choice, Prompt, answered, check_count, finite
from polyroute.serving.http.schema import CompletionAsked
from polyroute.serving.requests import Piece, Token

__all__ = ["router"]

USUAL = 16
"""The most tokens of an answer, if none is given."""
router = APIRouter(route_class=JsonRoute)


@router.post("/v1/completions")
async def complete(call: Called, asked: CompletionAsked) -> Response:
    """Answer one or more prompts."""
    call.writes()
    call.known(asked.model)
    check_count(call, len(asked.prompt), asked.n)
    prompts = []
    for prompt in asked.prompt:
        ids = (
            await call.tokens(call.service.prompt_ids, prompt)
            if isinstance(prompt, str)
            else prompt
        )
        prompts.append(Prompt(ids, call.room(ids, asked.max_tokens, USUAL)))
    form = _Form(has_logprobs=asked.logprobs is not None)
    return await answered(call, asked, prompts, form, echo=asked.echo, top_logprobs=asked.logprobs)


class _Form:
    prefix = "cmpl"
    kind = chunk_kind = "text_completion"

    def __init__(self, *, has_logprobs: bool) -> None:
        self.has_logprobs = has_logprobs
        self._offsets: Counter[int] = Counter()

    def whole(self, index: int, choice: Choice) -> dict[str, Any]:
        return self._choice(index, choice.text, choice.tokens, choice.finish)

    def parts(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        if not (piece.text or piece.finish or (piece.tokens and self.has_logprobs)):
            return []
        return [self._choice(index, piece.text, piece.tokens, piece.finish)]

    def _choice(
        self, index: int, text: str, tokens: Sequence[Token], finish: str | None
    ) -> dict[str, Any]:
        logprobs = self._logprobs(index, tokens) if self.has_logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any]:
        """What is known of tokens. Offsets count characters from the beginning of the text."""
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token.text)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [
                None if token.logprob is None else finite(token.logprob) for token in tokens
            ],
            "top_logprobs": [_top(token) for token in tokens],
            "text_offset": offsets,
        }


def _top(token: Token) -> dict[str, float] | None:
    """The likeliest tokens of a place, and the one that came; None where nothing predicts it."""
    if token.logprob is None:
        return None
    found: dict[str, float] = {}
    for text, logprob in (*token.top, (token.text, token.logprob)):
        found.setdefault(text, finite(logprob))  # of two tokens that read the same, the likelier
    return found
