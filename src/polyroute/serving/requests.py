"""What a client asks of the server, and what it gets back, whichever engine computes it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from polyroute.errors import InputError
from polyroute.routes.table import MU

__all__ = [
    "BASE",
    "SHARED",
    "BusyError",
    "Finish",
    "Generation",
    "Piece",
    "ServingError",
    "StoppingError",
    "Token",
    "check_characters",
]

BASE = "base"
"""The name of the base model alone, beside the tasks and `mu`."""
SHARED = (MU, BASE)
"""The names that all clients may ask for, and that none may give to a task."""
LONGEST_TOKEN = 64
"""Characters; a text that has so many for each token that fits is too long without a look."""
Finish = Literal["stop", "length"]


class ServingError(Exception):
    """A request failed; the message is one sentence without details of the code.

    Args:
        sentence: what is wrong.
    """

    def __init__(self, sentence: str = "the model failed on this request") -> None:
        super().__init__(sentence)


class BusyError(Exception):
    """The queue of requests is full; the client may try again."""


class StoppingError(Exception):
    """The server is shutting down and takes no more requests."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One answer that a client asks for.

    Attributes:
        task: the name of a task, `mu` for the average of the inventory, or `base`.
        prompt_ids: the tokens of the prompt, at least one.
        max_tokens: the most tokens of the answer; 0 computes the prompt's log-probabilities alone.
        temperature: 0 takes the likeliest token; otherwise logits are divided by it.
        top_p: tokens are drawn from the smallest set that has this share of the probability.
        seed: of the draws; None for another one each time.
        stop: the answer ends before the first of these texts.
        top_logprobs: how many of the likeliest tokens of each place are told; None for none.
        echo: whether the tokens of the prompt are part of the answer, with log-probabilities if
            these were asked for.
    """

    task: str
    prompt_ids: Sequence[int]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    top_logprobs: int | None = None
    echo: bool = False


@dataclass(frozen=True)
class Token:
    """One token of an answer.

    Attributes:
        id: its number in the vocabulary.
        text: what it reads as by itself.
        logprob: the natural logarithm of its probability at temperature 1; None for the first
            token of a prompt, which nothing predicts, and where none was asked for.
        top: the likeliest tokens of its place with their log-probabilities, likeliest first.
    """

    id: int
    text: str
    logprob: float | None = None
    top: Sequence[tuple[str, float]] = ()


@dataclass(frozen=True)
class Piece:
    """The next part of an answer.

    Attributes:
        text: what it adds; may be empty, since half of a character or of a stop text waits.
        tokens: those that it adds. Those of an echoed prompt come first, in a piece of their own.
        finish: why the answer ended, in its last piece alone.
        is_prompt: whether this is the echoed prompt.
    """

    text: str
    tokens: Sequence[Token] = ()
    finish: Finish | None = None
    is_prompt: bool = False


def check_characters(what: str, count: int, most_tokens: int) -> None:
    """Refuse a text at once that is too long whatever its tokens are; to find them takes long.

    Args:
        what: what the error calls the text.
        count: its characters.
        most_tokens: the most tokens that it may have.

    Raises:
        InputError: it is too long.
    """
    if count > LONGEST_TOKEN * most_tokens:
        raise InputError(
            f"{what} has {count} characters, and {most_tokens} tokens are the most: shorten it"
        )
