"""Memory: how many tokens and slots of an adaptation fit into it, and what training holds."""

import math
import re
from dataclasses import dataclass

import torch

from polyroute.adapting.slots import has_one_skill, shape_of_row, weights_library
from polyroute.errors import InputError
from polyroute.host.memory import available
from polyroute.host.processes import count_here
from polyroute.kinds.choose import ModelKind
from polyroute.model import Phase, RoutedModel

__all__ = ["Budget", "bytes_in_training", "bytes_of", "plan"]

MOST_SLOTS = 256
"""Most slots side by side: more would save no time, and results would come later."""
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
BINARY = {"": 1, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
CPU_ACTIVATION, ACCELERATOR_ACTIVATION = 2**19, 2**26
"""Numbers in one activation `[tokens, d_in]` beyond which a larger batch is no faster: on a CPU it
no longer fits the cache (about 32 examples of 50 tokens were best at width 384), and an accelerator
is busy."""
COPIES = 8
"""Copies of each trained number: the number, its gradient, two moments and the best value so far;
and, while its gradient is computed, the mixture, the gradient of the mixture, and a gradient that
is zero for all other slots."""
SHORTEST_ROW = 16
"""Tokens of a row; in a shorter one the factors of the row take more memory than is planned."""


@dataclass(frozen=True)
class Budget:
    """What may be in memory at a time."""

    tokens: int
    """Most tokens in one forward, padding included."""
    slots: int
    """Most slots side by side."""


def bytes_of(size: str | int) -> int:
    """A size such as `8GB`, `500 MB` or `2GiB` in bytes.

    Raises:
        InputError: it is not a size above 0.
    """
    form = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?|)B?\s*", re.ASCII | re.IGNORECASE)
    match = form.fullmatch(str(size))
    number = 0 if match is None else float(match[1]) * {**UNITS, **BINARY}[match[2].upper()]
    if not 1 <= number < math.inf:
        raise InputError(f"memory must be a size such as 8GB, not {size!r}")
    return int(number)


def plan(model: RoutedModel, kind: ModelKind, phase: Phase, memory: str | int | None) -> Budget:
    """Divide memory between activations and slots; each gets a half.

    Args:
        model: the inventory and its base model, before slots are open.
        kind: tells whether each token also gets logits over the vocabulary.
        phase: what each slot trains.
        memory: what both may take, besides the base model; None for half of what is free now.

    Raises:
        InputError: not even one slot fits.
    """
    device = next(model.parameters()).device
    half = (_free(device) // 2 if memory is None else bytes_of(memory)) // 2
    widths = sum(site.d_in + site.d_out for site in model.sites)
    smallest = min(site.d_in for site in model.sites)
    # Inputs and outputs of the adapted layers, and as much again for the layers between them; the
    # factors of each row and their gradients; and the logits, their logarithms and gradients.
    inventory = model.inventory
    rank = inventory.rank_of_average if weights_library(model, phase) else inventory.rank
    numbers = 2 * widths + 2 * rank * widths // SHORTEST_ROW
    if kind.supports_generation:
        numbers += 3 * len(kind.tokenizer)
    per_token = 4 * numbers
    fullest = CPU_ACTIVATION if device.type == "cpu" else ACCELERATOR_ACTIVATION
    per_slot = COPIES * 4 * _trained(model, phase, widths)
    if half < max(per_slot, per_token):
        raise InputError(
            f"memory {memory or 'that is free'} is too small: one slot of phase {phase!r} needs "
            f"about {2 * max(per_slot, per_token) / 1e6:.1f} MB"
        )
    return Budget(min(fullest // smallest, half // per_token), min(MOST_SLOTS, half // per_slot))


def _trained(model: RoutedModel, phase: Phase, widths: int) -> int:
    """How many numbers one slot trains."""
    shape = shape_of_row(model, phase)
    row = 0 if shape is None else math.prod(shape)
    if phase == "z":
        return row
    skills = 1 if has_one_skill(model, phase) else model.inventory.num_skills
    return model.inventory.rank * widths * skills + row


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return available() // count_here()


def bytes_in_training(
    model: RoutedModel, is_adafactor: bool = False, *, rowwise: bool = False
) -> dict[str, int]:
    """What multi-task training holds from step to step on a device, in bytes, by purpose.

    Activations come on top and grow with the batch. Parameters that do not train have no gradient.

    Args:
        model: its phase is set.
        is_adafactor: whether Adafactor trains; otherwise it is AdamW, with two moments a number.
        rowwise: whether the table trains by rows; see `RoutedModel.optimizer`.
    """
    held = [*model.parameters(), *model.buffers()]
    trained = [p for p in model.parameters() if p.requires_grad]
    table = model.routes.logits
    moments = [*trained, table] if rowwise and table is not None else trained
    if is_adafactor:  # which keeps means over rows and over columns
        numbers = sum(p.numel() // p.shape[-1] + p.numel() // p.shape[-2] for p in moments)
    else:
        numbers = 2 * sum(p.numel() for p in moments)
    return {
        "weights": sum(t.numel() * t.element_size() for t in held),
        "gradients": sum(p.numel() * p.element_size() for p in trained),
        "optimizer_state": 4 * numbers,
    }
