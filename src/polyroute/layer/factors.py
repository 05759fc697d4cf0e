"""What one layer applies: a plain adapter, and all that can be done with it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from polyroute.errors import InputError
from polyroute.layer.kernels import apply_ia3, apply_lora, apply_token_lora

__all__ = ["Factors", "IA3Factors", "LoRAFactors", "TokenLoRAFactors"]


class Factors(Protocol):
    """A layer's adapter, for one task or for each example of a batch."""

    def apply(self, base: nn.Module, x: Tensor, dropout: float) -> Tensor:
        """The adapted layer's output; `x` is `[..., d_in]`, as in `polyroute.layer.kernels`."""

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """For one task: the weight `[d_out, d_in]` and bias `[d_out]` that compute the same."""

    def peft_tensors(self) -> Mapping[str, Tensor]:
        """For one task: the tensors of a PEFT adapter, by the ending of their name."""

    def to(self, device: torch.device) -> Self:
        """The same on another device; itself where it is there already."""


@dataclass(frozen=True)
class LoRAFactors:
    """A low-rank update, its scale included in `b`."""

    a: Tensor
    """`[r, d_in]`, or `[B, r, d_in]` where examples differ."""
    b: Tensor
    """`[r, d_out]`, or `[B, r, d_out]`."""

    def apply(self, base: nn.Module, x: Tensor, dropout: float) -> Tensor:
        """base(x) + x a^T b."""
        return apply_lora(base, x, self.a, self.b, dropout)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + b^T a."""
        return weight + self.b.t() @ self.a, bias

    def peft_tensors(self) -> Mapping[str, Tensor]:
        """PEFT stores both factors transposed to the way they multiply x."""
        return {"lora_A.weight": self.a, "lora_B.weight": self.b.t()}

    def to(self, device: torch.device) -> Self:
        """Both factors."""
        return replace(self, a=self.a.to(device), b=self.b.to(device))


@dataclass(frozen=True)
class TokenLoRAFactors:
    """The skills of a low-rank update, and how each token mixes them."""

    a: Tensor
    """`[H, K, r, d_in/H]`."""
    b: Tensor
    """`[H, K, r, d_out/H]`, its scale included."""
    weights: Tensor
    """`[..., H, K]`; the leading axes are those of the layer's input, or 1, or missing."""

    def apply(self, base: nn.Module, x: Tensor, dropout: float) -> Tensor:
        """base(x) + x a^T b, with a and b mixed for each token."""
        return apply_token_lora(base, x, self.a, self.b, self.weights, dropout)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Raises `InputError`: no one weight computes this."""
        raise InputError("tokens that are routed one by one have no single adapter to merge")

    def peft_tensors(self) -> Mapping[str, Tensor]:
        """Raises `InputError`: no one adapter computes this."""
        raise InputError("tokens that are routed one by one have no single adapter to export")

    def to(self, device: torch.device) -> Self:
        """The skills and the weights."""
        return replace(
            self, a=self.a.to(device), b=self.b.to(device), weights=self.weights.to(device)
        )


@dataclass(frozen=True)
class IA3Factors:
    """A scale of every output unit."""

    scale: Tensor
    """`[1, d_out]`, or `[B, 1, d_out]` where examples differ."""

    def apply(self, base: nn.Module, x: Tensor, dropout: float) -> Tensor:
        """base(x) * scale; there is no input of its own to drop."""
        return apply_ia3(base, x, self.scale)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W and bias, each row times its scale."""
        scale = self.scale.reshape(-1)
        return weight * scale[:, None], None if bias is None else bias * scale

    def peft_tensors(self) -> Mapping[str, Tensor]:
        """One column."""
        return {"ia3_l": self.scale.reshape(-1, 1)}

    def to(self, device: torch.device) -> Self:
        """The scale."""
        return replace(self, scale=self.scale.to(device))
