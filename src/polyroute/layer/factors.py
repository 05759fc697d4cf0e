"""Factors: what one layer applies, a plain adapter or skills that a gate mixes as the layer runs.

Shape letters: B examples, H heads, K skills, r rank, R the ranks of all skills together.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from polyroute.layer.few_vectors import Places
from polyroute.layer.gated import (
    Gate,
    apply_output_space,
    apply_sorted,
    apply_weight_space,
    sorting_pays,
    weights_of_tokens,
)
from polyroute.layer.ia3 import apply_ia3
from polyroute.layer.kernels import apply_kept_lora, apply_lora
from polyroute.layer.segments import Segments

__all__ = [
    "Factors",
    "IA3Factors",
    "KeptFactors",
    "LoRAFactors",
    "OutputSpaceFactors",
    "PlainFactors",
    "Segments",
    "WeightSpaceFactors",
]


class Factors(Protocol):
    """A layer's adapter: for one task, for each example of a batch, or for each token."""

    @property
    def num_examples(self) -> int | None:
        """The number B of examples if each has an adapter of its own; None otherwise."""

    def apply(
        self, base: nn.Module, x: Tensor, dropout: float, segments: Segments | None = None
    ) -> Tensor:
        """The adapted layer's output; `x` is `[..., d_in]`, as in `polyroute.layer.kernels`."""

    def to(self, device: torch.device) -> Self:
        """The same factors on another device; themselves if they are there already."""


class PlainFactors(Factors, Protocol):
    """One ordinary adapter, or one for each example, known before the layer runs."""

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight `[d_out, d_in]` and bias `[d_out]` that compute the same; for one task."""

    def peft_tensors(self) -> Mapping[str, Tensor]:
        """The tensors of a PEFT adapter by the ending of their name, `[B, ...]` for several."""

    def without(self, is_base: Tensor) -> Self:
        """The same, but without effect for some examples, `[B]`."""

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""


@dataclass(frozen=True)
class LoRAFactors:
    """A low-rank update, its scale included in `b`."""

    a: Tensor
    """`[r, d_in]`, or `[B, r, d_in]` if examples differ."""
    b: Tensor
    """`[r, d_out]`, or `[B, r, d_out]` if examples differ."""

    @property
    def num_examples(self) -> int | None:
        """B if examples differ."""
        return len(self.a) if self.a.dim() == 3 else None

    def apply(
        self, base: nn.Module, x: Tensor, dropout: float, segments: Segments | None = None
    ) -> Tensor:
        """base(x) + x a^T b."""
        return apply_lora(base, x, self.a, self.b, dropout, segments)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + b^T a."""
        return weight + (self.b.t() @ self.a).to(weight.dtype), bias

    def peft_tensors(self) -> Mapping[str, Tensor]:
        """A and the transpose of B, as PEFT stores them."""
        return {"lora_A.weight": self.a, "lora_B.weight": self.b.mT}

    def without(self, is_base: Tensor) -> Self:
        """B is zero for the examples of the base model alone."""
        return replace(self, b=self.b.masked_fill(is_base.view(-1, 1, 1), 0.0).view_as(self.b))

    @property
    def device(self) -> torch.device:
        """Where both factors are."""
        return self.a.device

    def to(self, device: torch.device) -> Self:
        """Both factors on another device."""
        return replace(self, a=self.a.to(device), b=self.b.to(device))


@dataclass(frozen=True)
class KeptFactors:
    """LoRA factors of many examples, among which those of packed rows look up their own."""

    a: Tensor
    """`[S, r, d_in]`."""
    b: Tensor
    """`[S, r, d_out]`, scale included."""
    examples: Tensor
    """Which of them each example has, `[B]`."""
    places: Places
    """The same for each token."""

    @property
    def num_examples(self) -> int:
        """B."""
        return len(self.examples)

    def apply(
        self, base: nn.Module, x: Tensor, dropout: float, segments: Segments | None = None
    ) -> Tensor:
        """base(x) + x a^T b."""
        found = None if dropout else apply_kept_lora(base, x, self.a, self.b, self.places)
        if found is not None:
            return found
        own = LoRAFactors(self.a[self.examples], self.b[self.examples])
        return own.apply(base, x, dropout, segments)

    def to(self, device: torch.device) -> Self:
        """The same factors on another device."""
        return replace(self, a=self.a.to(device), b=self.b.to(device))


@dataclass(frozen=True)
class IA3Factors:
    """A scale of every output unit."""

    scale: Tensor
    """`[1, d_out]`, or `[B, 1, d_out]` if examples differ."""

    @property
    def num_examples(self) -> int | None:
        """B if examples differ."""
        return len(self.scale) if self.scale.dim() == 3 else None

    def apply(
        self, base: nn.Module, x: Tensor, dropout: float, segments: Segments | None = None
    ) -> Tensor:
        """base(x) * scale; dropout does nothing, as the scale has no input of its own."""
        return apply_ia3(base, x, self.scale, segments)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Each row of W, and of the bias, times its scale."""
        scale = self.scale.reshape(-1).to(weight.dtype)
        return weight * scale[:, None], None if bias is None else bias * scale

    def peft_tensors(self) -> Mapping[str, Tensor]:
        """The scale as one column."""
        return {"ia3_l": self.scale.mT}

    def without(self, is_base: Tensor) -> Self:
        """The scale is one for the examples of the base model alone."""
        kept = self.scale.masked_fill(is_base.view(-1, 1, 1), 1.0).view_as(self.scale)
        return replace(self, scale=kept)

    @property
    def device(self) -> torch.device:
        """Where the scale is."""
        return self.scale.device

    def to(self, device: torch.device) -> Self:
        """The scale on another device."""
        return replace(self, scale=self.scale.to(device))


@dataclass(frozen=True, kw_only=True)
class GatedFactors:
    """LoRA skills, and a gate that chooses among them for each token."""

    a: Tensor
    b: Tensor
    gate: Gate
    """Weights over the skills; see `polyroute.layer.gated.weights_of_tokens`."""
    per_example: bool = False
    """Whether the gate is `[B, H, K]`, the weights of each example."""

    @property
    def num_examples(self) -> int | None:
        """B if the gate belongs to the examples."""
        return len(self.gate) if self.per_example and isinstance(self.gate, Tensor) else None

    def to(self, device: torch.device) -> Self:
        """The skills and the gate's weights on another device.

        A gate that is a function computes on the device of its input.
        """
        gate = self.gate.to(device) if isinstance(self.gate, Tensor) else self.gate
        return replace(self, a=self.a.to(device), b=self.b.to(device), gate=gate)

    def _weights(self, x: Tensor, segments: Segments | None) -> Tensor:
        return weights_of_tokens(self.gate, x, per_example=self.per_example, segments=segments)


@dataclass(frozen=True, kw_only=True)
class WeightSpaceFactors(GatedFactors):
    """Skills whose factors the gate averages: a `[H, K, r, d_in/H]`, b `[H, K, r, d_out/H]`.

    The scale is included in `b`.
    """

    def apply(
        self, base: nn.Module, x: Tensor, dropout: float, segments: Segments | None = None
    ) -> Tensor:
        """base(x) + x a^T b, with a and b mixed for each token."""
        return apply_weight_space(base, x, self.a, self.b, self._weights(x, segments), dropout)


@dataclass(frozen=True, kw_only=True)
class OutputSpaceFactors(GatedFactors):
    """Skills of any ranks, whose updates of the output the gate averages.

    `a` `[R, d_in]` and `b` `[R, d_out]`, its scale included, hold the ranks of all skills that
    adapt the layer, skill after skill. With H heads each of the H blocks of the output has weights
    of its own.
    """

    ranks: tuple[int, ...]
    """The rank of each skill; 0 if the skill does not adapt the layer."""
    top_k: int | None = None
    """The largest number of weights of a token that are not zero; None if it is not known."""

    def apply(
        self, base: nn.Module, x: Tensor, dropout: float, segments: Segments | None = None
    ) -> Tensor:
        """base(x) + sum_k w_k (x a_k^T) b_k."""
        w = self._weights(x, segments)
        heads, skills = w.shape[-2:]
        if (
            heads == 1
            and self.top_k is not None
            and sorting_pays(len(self.a), self.a.shape[1], skills, self.top_k)
            and not torch.compiler.is_compiling()
        ):
            ranks = list(self.ranks)
            pairs = list(zip(torch.split(self.a, ranks), torch.split(self.b, ranks), strict=True))
            return apply_sorted(base, x, pairs, w[:, 0], self.top_k, dropout)
        return apply_output_space(base, x, self.a, self.b, self._by_rank(w), dropout)

    def _by_rank(self, w_NHK: Tensor) -> Tensor:
        """The weights of skills as weights of their ranks, `[N, H, R]`."""
        if set(self.ranks) == {1}:
            return w_NHK
        if len(set(self.ranks)) == 1:
            return w_NHK.repeat_interleave(self.ranks[0], -1)
        skill_of_rank = [skill for skill, rank in enumerate(self.ranks) for _ in range(rank)]
        return w_NHK.index_select(-1, torch.tensor(skill_of_rank, device=w_NHK.device))
