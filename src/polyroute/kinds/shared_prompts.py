"""Choices behind one shared prompt: each prompt of a decoder-only model is computed once.

A row holds the prompt and behind it all of its choices, one after another (see
`polyroute.kinds.trees`). The last token of a choice predicts nothing and is left out.

Which models can do so is found out here, also for examples that share the beginning of their
prompts (see `polyroute.kinds.packing`).

Shape letters: B rows, L tokens of a row, N choices, n tokens of all choices.
"""

import inspect
from collections.abc import Iterable, Sequence
from itertools import chain
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from polyroute.errors import InputError
from polyroute.kinds.base import UNBOUNDED
from polyroute.kinds.batches import (
    FAILURES,
    IGNORED,
    Ids,
    logits_of,
    on_device_of,
    padded,
    unwrapped,
)
from polyroute.kinds.trees import Tree, laid_out

__all__ = ["draws_numbers", "longest_row", "longest_shared", "mask_for", "shared_rows"]

ARGUMENTS = ("input_ids", "position_ids", "attention_mask")


def shared_rows(
    prompts: Sequence[Ids], choices: Sequence[Sequence[Ids]], *, pad: int, limit: int
) -> dict[str, Tensor]:
    """Put the choices of each prompt behind it.

    Args:
        prompts: the token ids of B prompts.
        choices: for each prompt, those of its choices.
        pad: the id that fills rows up.
        limit: the number of positions that the model has.

    Returns:
        `labels` `[N, C]`, the tokens of each choice; `places` `[n]`, the place among the B L tokens
        that predicts each of them; and what `polyroute.kinds.trees.laid_out` makes.
    """
    pairs = list(zip(prompts, choices, strict=True))
    rows = [[Tree(prompt, [ids[:-1] for ids in own])] for prompt, own in pairs]
    inputs, places = laid_out(rows, pad=pad, limit=limit)
    first = [len(prompt) - 1 for prompt, own in pairs for _ in own]
    predicting = (own[start:] for own, start in zip(places, first, strict=True))
    return {
        "labels": padded(list(chain.from_iterable(choices)), IGNORED),
        "places": torch.tensor(list(chain.from_iterable(predicting))),
        **inputs,
    }


def longest_row(prompts: Sequence[Ids], choices: Sequence[Sequence[Ids]]) -> int:
    """The number of tokens of the longest row that `shared_rows` makes."""
    pairs = zip(prompts, choices, strict=True)
    return max(len(prompt) + sum(len(ids) - 1 for ids in own) for prompt, own in pairs)


def mask_for(model: nn.Module, sees: Tensor) -> Tensor:
    """The attention mask of rows of trees, as a model takes it.

    Args:
        model: the model that is to run on them.
        sees: whether a token sees another one.
    """
    if _attention(model) == "sdpa":  # it takes truth values; others add the mask
        return sees
    least = torch.finfo(torch.float32).min
    return torch.zeros(sees.shape, device=sees.device).masked_fill(~sees, least)


_known: "WeakKeyDictionary[nn.Module, dict[str, bool]]" = WeakKeyDictionary()
"""What was found of each model, by the name of its attention."""


def longest_shared(model: nn.Module, task: str) -> int:
    """The most tokens of a row in which a model computes branches as it would one by one.

    It is tried once for each model: a changed choice must leave the others as they are bit for bit,
    while a changed prompt and changed positions must not. A model whose layers see only a window of
    tokens can share within it. 0 is a model that cannot share.

    Args:
        model: the routed model.
        task: the task that it is tried with.
    """
    attention = _attention(model)
    if attention not in ("sdpa", "eager"):
        return 0
    known = _known.setdefault(model, {})
    if attention not in known:
        known[attention] = _takes_positions(model) and _keeps_apart(model, task)
    window = getattr(_config(model), "sliding_window", None)
    return (window if isinstance(window, int) else UNBOUNDED) if known[attention] else 0


def draws_numbers(model: nn.Module, task: str) -> bool:
    """Whether a model in training mode draws random numbers, as dropout and noisy gates do.

    Examples that share tokens would share what is drawn for them. The generators are left as they
    were.

    Args:
        model: the routed model.
        task: the task that it is tried with.
    """
    own = {parameter.device for parameter in model.parameters()} - {torch.device("cpu")}
    evaluated = [module for module in model.modules() if not module.training]
    try:
        before = _random_states(own)
        model.train()
        inputs = on_device_of(model, {"input_ids": torch.tensor([[5, 6, 7]])})
        with torch.no_grad():
            model(**inputs, tasks=[task], use_cache=False)
        after = _random_states(own)
        torch.set_rng_state(before[0])
        for device, state in zip(own, before[1:], strict=True):
            torch.get_device_module(device).set_rng_state(state, device)
    except FAILURES:  # its generators cannot be read
        return True
    finally:
        for module in evaluated:  # one by one: frozen parts may have been in evaluation mode
            module.training = False
    return not all(map(torch.equal, before, after))


def _random_states(devices: Iterable[torch.device]) -> list[Tensor]:
    own = [torch.get_device_module(device).get_rng_state(device) for device in devices]
    return [torch.get_rng_state(), *own]


def _attention(model: nn.Module) -> str:
    # Of the base model: what several processes share, `DistributedDataParallel`, has no config.
    return str(getattr(_config(model), "_attn_implementation", ""))


def _config(model: nn.Module) -> object:
    return getattr(unwrapped(model)[-1], "config", None)


def _takes_positions(model: nn.Module) -> bool:
    return "position_ids" in inspect.signature(unwrapped(model)[-1].forward).parameters


def _keeps_apart(model: nn.Module, task: str) -> bool:
    """Try a model on two choices of three tokens."""

    def logits(prompt: Ids, other: Ids, *, positions: bool = True) -> Tensor:
        rows = shared_rows([prompt], [[other, [11, 12, 13]]], pad=0, limit=UNBOUNDED)
        inputs = {name: rows[name] for name in ARGUMENTS}
        inputs["attention_mask"] = mask_for(model, rows["attention_mask"])
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
