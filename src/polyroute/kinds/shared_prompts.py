"""Choices behind one shared prompt: each prompt of a decoder-only model is computed once.

A row holds the prompt and behind it all of its choices, one after another. Every choice sees the
prompt and its own tokens alone, and its positions go on from the end of the prompt, so it gets the
logits that it would get in a row of its own. The last token of a choice predicts nothing and is
left out.

Shape letters: B rows, L tokens of a row, N choices, n tokens of all choices.
"""

import inspect
from collections.abc import Sequence
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from polyroute.errors import InputError
from polyroute.kinds.batches import FAILURES, IGNORED, Ids, logits_of, padded, unwrapped

__all__ = ["can_share", "longest_row", "shared_rows"]

ARGUMENTS = ("input_ids", "position_ids", "attention_mask")


def shared_rows(
    model: nn.Module, prompts: Sequence[Ids], choices: Sequence[Sequence[Ids]], pad: int
) -> dict[str, Tensor]:
    """Put the choices of each prompt behind it.

    Args:
        model: the model that is to run on them.
        prompts: the token ids of B prompts.
        choices: for each prompt, those of its choices.
        pad: the id that fills rows up.

    Returns:
        `labels` `[N, C]`, the tokens of each choice; `places` `[n]`, the place among the B L tokens
        that predicts each of them; `input_ids` and `position_ids` `[B, L]`; and `attention_mask`
        `[B, 1, L, L]`, whether a token (third axis) sees another one (fourth axis).
    """
    rows, positions, places = [], [], []
    longest = longest_row(prompts, choices)
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
    mask = sees[:, None]
    if _attention(model) != "sdpa":  # it takes truth values; others add the mask
        least = torch.finfo(torch.float32).min
        mask = torch.zeros(mask.shape).masked_fill(~mask, least)
    return {
        "labels": padded(list(chain.from_iterable(choices)), IGNORED),
        "places": torch.tensor(places),
        "input_ids": padded(rows, pad),
        "position_ids": padded(positions, 0),
        "attention_mask": mask,
    }


def longest_row(prompts: Sequence[Ids], choices: Sequence[Sequence[Ids]]) -> int:
    """The number of tokens of the longest row that `shared_rows` makes."""
    pairs = zip(prompts, choices, strict=True)
    return max(len(prompt) + sum(len(ids) - 1 for ids in own) for prompt, own in pairs)


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
    return "position_ids" in inspect.signature(unwrapped(model)[-1].forward).parameters


def _keeps_apart(model: nn.Module, task: str) -> bool:
    """Try a model on two choices of three tokens."""

    def logits(prompt: Ids, other: Ids, *, positions: bool = True) -> Tensor:
        rows = shared_rows(model, [prompt], [[other, [11, 12, 13]]], 0)
        inputs = {name: rows[name] for name in ARGUMENTS}
        if not positions:
            inputs["position_ids"] = torch.arange(rows["input_ids"].numel())[None]
        return logits_of(model, inputs, [task])[5:]  # those of the second choice

    try:
        found = logits([5, 6, 7], [8, 9, 10])
        sees_other = not torch.equal(found, logits([5, 6, 7], [9, 8, 10]))
        sees_prompt = not torch.equal(found, logits([8, 6, 7], [8, 9, 10]))
        has_positions = not torch.equal(found, logits([5, 6, 7], [8, 9, 10], positions=False))
    except InputError:
        raise
    except FAILURES:  # it cannot take such a mask
        return False
    return sees_prompt and has_positions and not sees_other
