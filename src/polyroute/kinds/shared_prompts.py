"""Choices behind one shared prompt: each prompt of a decoder-only model is computed once.

A row holds the prompt and behind it all of its choices, one after another. Every choice sees the
prompt and its own tokens alone, and its positions go on from the end of the prompt, so it gets the
logits that it would get in a row of its own. The last token of a choice predicts nothing and is
left out.

Shape letters: B rows, L tokens of a row, N choices, n tokens of all choices.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from polyroute.errors import InputError
from polyroute.kinds.batches import IGNORED, Ids, evaluating, padded

__all__ = ["SharedRows", "can_share", "shared_rows"]


@dataclass(frozen=True)
class SharedRows:
    """Rows of prompts with choices behind them, on the CPU."""

    inputs: dict[str, Tensor]
    """`input_ids` and `position_ids`, both `[B, L]`."""
    sees: Tensor
    """`[B, L, L]`, whether a token (second axis) sees another one (third axis)."""
    places: Tensor
    """`[n]`, the place among the B L tokens that predicts each token of the choices."""
    labels: Tensor
    """`[N, C]`, the tokens of each choice, padded with -100."""

    def arguments(self, model: nn.Module) -> dict[str, Tensor]:
        """The arguments of a model's forward, on the CPU."""
        mask = self.sees[:, None]
        if _attention(model) != "sdpa":  # it takes truth values; others add the mask
            least = torch.finfo(torch.float32).min
            mask = torch.zeros(mask.shape).masked_fill(~mask, least)
        return {**self.inputs, "attention_mask": mask}


def shared_rows(prompts: Sequence[Ids], choices: Sequence[Sequence[Ids]], pad: int) -> SharedRows:
    """Put the choices of each prompt behind it.

    Args:
        prompts: the token ids of B prompts.
        choices: for each prompt, those of its choices.
        pad: the id that fills rows up.
    """
    rows, positions, places = [], [], []
    lengths = [
        len(prompt) + sum(len(ids) - 1 for ids in own)
        for prompt, own in zip(prompts, choices, strict=True)
    ]
    longest = max(lengths)
    sees = torch.eye(longest, dtype=torch.bool).repeat(len(prompts), 1, 1)
    causal = torch.ones(longest, longest, dtype=torch.bool).tril()
    for number, (prompt, own) in enumerate(zip(prompts, choices, strict=True)):
        first, end = number * longest, len(prompt)
        sees[number, :end, :end] = causal[:end, :end]
        row, position = list(prompt), list(range(end))
        for ids in own:
            start, end = end, end + len(ids) - 1
            sees[number, start:end, : len(prompt)] = True
            sees[number, start:end, start:end] = causal[: end - start, : end - start]
            row += ids[:-1]
            position += range(len(prompt), len(prompt) + end - start)
            places += [first + len(prompt) - 1, *range(first + start, first + end)]
        rows.append(row)
        positions.append(position)
    return SharedRows(
        inputs={"input_ids": padded(rows, pad), "position_ids": padded(positions, 0)},
        sees=sees,
        places=torch.tensor(places),
        labels=padded(list(chain.from_iterable(choices)), IGNORED),
    )


_known: "WeakKeyDictionary[nn.Module, dict[str, bool]]" = WeakKeyDictionary()
"""What was found of each model, by the name of its attention."""


def can_share(model: nn.Module, task: str, length: int) -> bool:
    """Whether a model computes the choices of shared rows as it would one by one.

    It is tried once for each model: a changed choice must leave the others as they are bit for bit,
    while a changed prompt and changed positions must not.

    Args:
        model: the routed model.
        task: the task that it is tried with.
        length: the number of tokens of the longest row; a model whose layers see only a window of
            tokens can share within it.
    """
    config: Any = getattr(model, "config", None)
    attention = _attention(model)
    window = getattr(config, "sliding_window", None)
    if attention not in ("sdpa", "eager") or (isinstance(window, int) and length > window):
        return False
    known = _known.setdefault(model, {})
    if attention not in known:
        known[attention] = _takes_positions(model) and _keeps_apart(model, task)
    return known[attention]


def _attention(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "_attn_implementation", ""))


def _takes_positions(model: nn.Module) -> bool:
    forward = getattr(model, "base_model", model).forward
    return "position_ids" in inspect.signature(forward).parameters


def _keeps_apart(model: nn.Module, task: str) -> bool:
    """Try a model on two choices of three tokens."""
    device = next(model.parameters()).device

    def logits(prompt: Ids, other: Ids, *, positions: bool = True) -> Tensor:
        rows = shared_rows([prompt], [[other, [11, 12, 13]]], 0)
        inputs = {name: value.to(device) for name, value in rows.arguments(model).items()}
        if not positions:
            inputs["position_ids"] = torch.arange(len(rows.sees[0]), device=device)[None]
        with evaluating(model):
            found: Tensor = model(**inputs, tasks=[task], use_cache=False).logits
        return found[0, 5:]  # those of the second choice

    try:
        found = logits([5, 6, 7], [8, 9, 10])
        sees_other = not torch.equal(found, logits([5, 6, 7], [9, 8, 10]))
        sees_prompt = not torch.equal(found, logits([8, 6, 7], [8, 9, 10]))
        has_positions = not torch.equal(found, logits([5, 6, 7], [8, 9, 10], positions=False))
    except InputError:
        raise
    except (IndexError, RuntimeError, TypeError, ValueError):  # it cannot take such a mask
        return False
    return sees_prompt and has_positions and not sees_other
