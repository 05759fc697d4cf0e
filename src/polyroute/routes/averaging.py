"""How large the skills were that phase `mu` averages: what the published steps go by.

The published code does not average in phase `mu`. It keeps all copies of a factor and trains them
under uniform weights, and Adafactor's steps are proportional to the size of the copies. The average
of K unlike factors is about sqrt(K) times smaller. With weights w_k that sum to one,

    sum_k w_k A_k^2 = M^2 + sum_k w_k (A_k - M)^2,   where M = sum_k w_k A_k

All copies of uniform weights take the same steps, so the second part, the *spread*, stays as it was
when training began, except for weight decay. One number for each layer and factor is therefore
enough to know the size of the copies that are no longer there.

Shape letters: n layers of a stack, H heads, K skills, r rank, D width of a head's block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyroute.routes.inventory import Inventory

__all__ = ["Averaged", "averaged"]


@dataclass(frozen=True)
class Averaged:
    """What is kept of the skills that became one adapter."""

    heads: int
    """The number of heads that they had."""
    spread: dict[str, Tensor]
    """The mean square of what they differ by from their mixture, for each layer, `[n]`; by the
    names of the parameters of an inventory."""

    def group(self, names: Sequence[str]) -> dict[str, Any]:
        """What a parameter group says of them, for parameters of these names in this order."""
        return {"heads": self.heads, "spread": [self.spread[name] for name in names]}


@torch.no_grad()
def averaged(inventory: Inventory, mixture: Sequence[Tensor] | None = None) -> Averaged | None:
    """What to keep of skills that are going to be averaged.

    Args:
        inventory: the skills.
        mixture: for each stack the weights `[n, H, K]` of its layers; by default all are 1 / K.

    Returns:
        None where every step is the same without it: of a single skill, and of LoRAs that are
        combined in output space, where they are not averaged but stand side by side.
    """
    if inventory.num_skills == 1 or (inventory.combine == "output" and inventory.adapter == "lora"):
        return None
    spread = {}
    for number, stack in enumerate(inventory.stacks):
        for factor in inventory.factor_names:
            name = f"{factor}.{stack.key}"
            skills = inventory.get_parameter(name)
            n, heads, count = skills.shape[:3]
            w_nHK = skills.new_full((n, heads, count), 1 / count)
            if mixture is not None:
                w_nHK = mixture[number].to(skills)
            weights = w_nHK[..., None, None]
            mean = (weights * skills).sum(2, keepdim=True)
            variance = (weights * (skills - mean).square()).sum(2)
            # Weights of some normalizations do not sum to one, and may be negative.
            spread[name] = variance.flatten(1).mean(1).clamp_(min=0)
    return Averaged(inventory.heads, spread)
