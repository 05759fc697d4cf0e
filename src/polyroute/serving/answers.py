"""From the tokens that an engine chooses to the pieces of an answer."""

import asyncio
from collections.abc import AsyncGenerator, Container, Sequence
from dataclasses import dataclass
from typing import Any

from polyroute.errors import InputError
from polyroute.serving.requests import Finish, Generation, Piece, Token
from polyroute.serving.sampling import Chosen
from polyroute.serving.text import TextStream

__all__ = ["Event", "Failed", "Limits", "PromptTold", "pieces"]


@dataclass(frozen=True)
class PromptTold:
    """The tokens of the prompt, with their log-probabilities."""

    tokens: Sequence[Chosen]


@dataclass(frozen=True)
class Failed:
    """There is no answer, or no more of it."""

    error: Exception


Event = Chosen | PromptTold | Failed
"""What an engine says of a request: its next token, its prompt, or that it failed."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What an engine takes.

    Attributes:
        most_requests: at once, computed or waiting.
        most_at_once: in one forward.
        most_tokens: of a prompt and its answer together.
        most_batch_tokens: in one forward.
    """

    most_requests: int = 256
    most_at_once: int = 32
    most_tokens: int = 2048
    most_batch_tokens: int = 512

    def check(self, generation: Generation, vocabulary: int) -> None:
        """Make sure that a request fits.

        Args:
            generation: the request.
            vocabulary: the number of the model's tokens.

        Raises:
            InputError: it has no prompt, is too long, or has a token that the model has not.
        """
        prompt, more = len(generation.prompt_ids), generation.max_tokens
        if not prompt:
            raise InputError("the prompt is empty: give it at least one token")
        for token in generation.prompt_ids:
            if not 0 <= token < vocabulary:
                raise InputError(
                    f"the prompt has token {token}, and the model has tokens 0 to {vocabulary - 1}"
                )
        if prompt + more > self.most_tokens:
            raise InputError(
                f"the prompt has {prompt} tokens and max_tokens is {more}, more than the "
                f"{self.most_tokens} tokens that the server takes together: shorten the prompt or "
                "lower max_tokens"
            )


async def pieces(
    generation: Generation,
    events: "asyncio.Queue[Event]",
    tokenizer: Any,
    ends: Container[int],
) -> AsyncGenerator[Piece]:
    """The pieces of one answer, from what an engine says of it.

    Args:
        generation: the request.
        events: of the engine.
        tokenizer: of the base model.
        ends: the tokens that end an answer.

    Raises:
        ServingError: the model failed.
        StoppingError: the server shuts down.
    """
    if generation.echo:
        told: Sequence[Chosen] = [Chosen(id) for id in generation.prompt_ids]
        if generation.top_logprobs is not None:  # an engine tells the prompt before any token
            event = _checked(await events.get())
            assert isinstance(event, PromptTold)
            told = event.tokens
        yield _prompt(told, tokenizer)
    stream, count = TextStream(tokenizer, generation.stop), 0
    finish: Finish | None = None
    while finish is None and count < generation.max_tokens:
        event = _checked(await events.get())
        assert isinstance(event, Chosen)
        count += 1
        tokens, text = [], ""
        if event.id in ends:
            finish = "stop"
        else:
            tokens, text = [_token(event, tokenizer)], stream.add(event.id)
        if finish or count == generation.max_tokens:
            text += "" if stream.is_over else stream.end()
            finish = finish or "length"
        if stream.is_over:
            finish = "stop"
        if text or tokens or finish:
            yield Piece(text, tokens, finish)
    if not count:
        yield Piece("", finish="length")


def _checked(event: Event) -> Event:
    if isinstance(event, Failed):
        raise event.error
    return event


def _prompt(tokens: Sequence[Chosen], tokenizer: Any) -> Piece:
    told = [_token(token, tokenizer) for token in tokens]
    text = str(tokenizer.decode([token.id for token in tokens], skip_special_tokens=True))
    return Piece(text, told, is_prompt=True)


def _token(chosen: Chosen, tokenizer: Any) -> Token:
    top = [(str(tokenizer.decode([id])), logprob) for id, logprob in chosen.top]
    return Token(chosen.id, str(tokenizer.decode([chosen.id])), chosen.logprob, top)
