"""Choosing the next token of each request of a batch."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polyroute.serving.requests import Generation

__all__ = ["NOT_FINITE", "Chosen", "Draws", "chosen_tokens", "logprobs_of"]


NOT_FINITE = "the model computed numbers that are not finite"
"""What a request is told whose next token nothing chooses."""


@dataclass(frozen=True)
class Chosen:
    """A token, with its log-probability if that was asked for."""

    id: int
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()
    """The likeliest tokens of its place, likeliest first."""
    is_finite: bool = True
    """Whether the model computed numbers that a token can be chosen by."""


class Draws:
    """The random numbers of one request, which do not depend on the others of its batches.

    Args:
        seed: see `Generation.seed`.
    """

    def __init__(self, seed: int | None) -> None:
        seed = secrets.randbits(63) if seed is None else seed
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, logits: Tensor, temperature: float, top_p: float) -> int:
        """One token from logits `[V]`."""
        probabilities = torch.softmax(logits.double().cpu() / temperature, -1)
        if top_p < 1:
            ordered, places = probabilities.sort(descending=True)
            # A token stays if those before it have less than this share; the first always stays.
            ordered[(ordered.cumsum(-1) - ordered) >= top_p] = 0.0
            return int(places[torch.multinomial(ordered, 1, generator=self.generator)])
        return int(torch.multinomial(probabilities, 1, generator=self.generator))


def chosen_tokens(
    logits: Tensor, requests: Sequence[Generation], draws: Sequence[Draws]
) -> list[Chosen]:
    """The next token of each request.

    Args:
        logits: `[B, V]`, fp32.
        requests: B of them.
        draws: the random numbers of each.
    """
    likeliest = logits.argmax(-1).tolist()
    is_finite = torch.isfinite(logits.amax(-1)).tolist()  # the maximum of NaN is NaN
    found = []
    for i, (request, own) in enumerate(zip(requests, draws, strict=True)):
        if not is_finite[i]:
            found.append(Chosen(0, is_finite=False))
            continue
        token = likeliest[i]
        if request.temperature > 0:
            token = own.draw(logits[i], request.temperature, request.top_p)
        if request.top_logprobs is None:
            found.append(Chosen(token))
        else:
            (told,) = logprobs_of(logits[i : i + 1], [token], request.top_logprobs)
            found.append(told)
    return found


def logprobs_of(logits: Tensor, tokens: Sequence[int], top: int) -> list[Chosen]:
    """Tokens with their log-probabilities, and those of the likeliest tokens in their places.

    Args:
        logits: `[L, V]`.
        tokens: L of them.
        top: how many of the likeliest are told.
    """
    logprobs = torch.log_softmax(logits.float(), -1)
    places = torch.tensor(tokens, dtype=torch.long, device=logprobs.device)
    own = logprobs.gather(1, places[:, None])[:, 0].tolist()
    values, ids = logprobs.topk(top, dim=-1)
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return [
        Chosen(token, logprob, list(zip(of, at, strict=True)))
        for token, logprob, (of, at) in zip(tokens, own, pairs, strict=True)
    ]
