"""Ways to merge LoRAs into one: each computes the update of a layer from those of the LoRAs.

A weight multiplies a LoRA before anything else happens. Sums, KnOTS and WUDI stay of low rank. TIES
and DARE choose among single entries, so their updates are dense, and there is one layer of them in
memory at a time.

Shape letters: R ranks of all LoRAs of a layer, p rank of their common basis.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from polyroute.errors import InputError, did_you_mean
from polyroute.layer.factors import LoRAFactors
from polyroute.library.delta import Delta, base_and_error, is_noise, nearest, side_by_side
from polyroute.library.names import METHODS

__all__ = ["DENSE", "WAYS", "Terms", "Update", "check_options", "merged"]

Update = Callable[[str], LoRAFactors | Tensor]
"""The merged update of a layer: factors, or dense `[d_out, d_in]`."""
Parts = Callable[[str], Iterator[tuple[str, Tensor]]]
"""The matrices of a layer, by LoRA, whose entries are compared."""


@dataclass(frozen=True)
class Terms:
    """LoRAs by name, each with its weight.

    Raises:
        InputError: a weight is not finite, or the LoRAs belong to different base models.
    """

    deltas: Mapping[str, Delta]
    weights: Mapping[str, float]
    base: Mapping[str, Any] = field(init=False)
    """What the LoRAs say of their base model."""

    def __post_init__(self) -> None:
        base, _ = base_and_error(self.pairs)  # raises before a method begins to compute
        object.__setattr__(self, "base", base)

    @property
    def pairs(self) -> list[tuple[float, Delta]]:
        """Weights and LoRAs."""
        return [(float(self.weights[name]), delta) for name, delta in self.deltas.items()]

    @property
    def layers(self) -> list[str]:
        """Those that any of the LoRAs adapts, in order."""
        return sorted({layer for delta in self.deltas.values() for layer in delta.layers})

    def of(self, layer: str) -> dict[str, LoRAFactors]:
        """The weighted factors of a layer, of the LoRAs that adapt it."""
        found = {n: d.layers[layer] for n, d in self.deltas.items() if layer in d.layers}
        return {n: LoRAFactors(own.a, own.b * float(self.weights[n])) for n, own in found.items()}

    def dense(self, layer: str) -> Iterator[tuple[str, Tensor]]:
        """The weighted updates `[d_out, d_in]` of a layer, one at a time."""
        for name, own in self.of(layer).items():
            yield name, own.b.t() @ own.a


def arithmetic(terms: Terms) -> Update:
    """The sum of task arithmetic (Ilharco et al., 2023); of weights 1 / E it is the mean."""

    def update(layer: str) -> LoRAFactors:
        return side_by_side(layer, list(terms.of(layer).values()))

    return update


def ties(terms: Terms, *, keep: float = 0.2, drop: float = 0.0, seed: int = 0) -> Update:
    """TIES (Yadav et al., NeurIPS 2023): trim, elect a sign, take the mean of those that agree.

    Of each LoRA the entries of the largest magnitude stay, over all of its layers together. The
    sign of an entry is that of the sum. Where a sum is exactly zero nothing is elected.

    Args:
        terms: the LoRAs.
        keep: the share of entries that stay, above 0 and at most 1.
        drop: the share of entries that DARE drops before.
        seed: see `dare`.
    """
    return _elected(terms, _dropped(terms.dense, drop, seed), keep)


def dare(terms: Terms, *, drop: float = 0.9, seed: int = 0) -> Update:
    """DARE (Yu et al., ICML 2024): drop entries at random, scale up the others, and sum.

    Args:
        terms: the LoRAs.
        drop: the probability of an entry to be dropped, from 0 on and below 1.
        seed: draws what is dropped, for each LoRA and layer by their names.
    """
    parts = _dropped(terms.dense, drop, seed)

    def update(layer: str) -> Tensor:
        return _sum(matrix for _, matrix in parts(layer))

    return update


def knots(terms: Terms, *, keep: float = 0.2, drop: float = 0.0, seed: int = 0) -> Update:
    """KnOTS (Stoica et al., 2024): TIES in the basis of outputs that the LoRAs share.

    With the singular value decomposition [D_1 ... D_E] = U S [V_1 ... V_E] of a layer's updates,
    the matrices S V_e are merged, and U carries the result back. No product is formed: the
    decomposition is that of a core `[R, R]`.

    Args:
        terms: the LoRAs.
        keep: see `ties`.
        drop: see `ties`.
        seed: see `dare`.
    """

    @lru_cache(1)
    def aligned(layer: str) -> tuple[Tensor, dict[str, Tensor]]:
        factors = terms.of(layer)
        basis_a, uppers, start = {}, [], 0
        for name, own in factors.items():
            basis_a[name], upper = torch.linalg.qr(own.a.double().t())
            uppers.append(upper.t())
        basis_b, upper_b = torch.linalg.qr(
            side_by_side(layer, list(factors.values())).b.double().t()
        )
        core = upper_b @ torch.block_diag(*uppers)  # type: ignore[no-untyped-call]
        left, values, right = torch.linalg.svd(core, full_matrices=False)
        there = ~is_noise(values, float(values.norm()))
        there[0] = True  # where all are zero, so is the result, of rank 1
        scaled = values[there, None] * right[there]
        parts = {}
        for name, basis in basis_a.items():
            parts[name] = (scaled[:, start : start + basis.shape[1]] @ basis.t()).float()
            start += basis.shape[1]
        return (basis_b @ left[:, there]).t().float(), parts

    def parts(layer: str) -> Iterator[tuple[str, Tensor]]:
        yield from aligned(layer)[1].items()

    elected = _elected(terms, _dropped(parts, drop, seed), keep)

    def update(layer: str) -> LoRAFactors:
        basis_pd, _ = aligned(layer)
        return LoRAFactors(elected(layer), basis_pd)

    return update


def wudi(terms: Terms, *, ridge: float = 0.1) -> Update:
    """WUDI (Cheng et al., 2025): the update M that interferes least with each LoRA's inputs.

        min_M  sum_e |(M - D_e) D_e^T|^2 / |D_e|^2

    The minimum is taken in closed form. With Q an orthonormal basis of the rows of all A, t_e =
    D_e Q, G_e = t_e^T t_e / |D_e|^2 and rho = ridge times the mean diagonal of G = sum_e G_e,

        M = (sum_e t_e G_e + rho sum_e t_e) (G + rho I)^-1 Q^T.

    Args:
        terms: the LoRAs.
        ridge: pulls towards the sum, which keeps the norm of M in bounds; 0 for the bare minimum.
    """
    if not (isinstance(ridge, int | float) and 0 <= ridge < math.inf):
        raise InputError(f"ridge must be a number from 0 on, not {ridge!r}")

    def update(layer: str) -> LoRAFactors:
        factors = terms.of(layer)
        a_Rd = side_by_side(layer, list(factors.values())).a.double()
        _, values, basis_pd = torch.linalg.svd(a_Rd, full_matrices=False)
        count = int((~is_noise(values, float(values.norm()))).sum())
        basis_pd = basis_pd[: max(1, count)]
        inside = [own.b.double().t() @ (own.a.double() @ basis_pd.t()) for own in factors.values()]
        total_dp = _sum(inside)
        wanted_dp, gram_pp = torch.zeros_like(total_dp), total_dp.new_zeros(2 * [len(basis_pd)])
        for own_dp in inside:
            if own_dp.any():
                own_gram_pp = own_dp.t() @ own_dp / own_dp.square().sum()
                gram_pp += own_gram_pp
                wanted_dp += own_dp @ own_gram_pp
        rho = ridge * float(gram_pp.diagonal().mean())
        inverse = torch.linalg.pinv(gram_pp + rho * torch.eye(len(gram_pp)), hermitian=True)
        merged_dp = (wanted_dp + rho * total_dp) @ inverse
        return LoRAFactors(basis_pd.float(), merged_dp.t().float())

    return update


WAYS: Mapping[str, Callable[..., Update]] = {
    "mean": arithmetic,
    "arithmetic": arithmetic,
    "ties": ties,
    "dare": dare,
    "knots": knots,
    "wudi": wudi,
}
"""By the name of a method."""


DENSE = ("ties", "dare")
"""Methods whose updates are dense."""


def merged(terms: Terms, update: Update, keep: Callable[[Tensor], int] | None = None) -> Delta:
    """The LoRA of merged updates.

    Args:
        terms: the LoRAs.
        update: merges a layer.
        keep: recompresses each layer, see `polyroute.library.delta.keeping`.
    """
    layers: dict[str, LoRAFactors] = {}
    lost = 0.0
    for layer in terms.layers:
        own = update(layer)
        if keep is not None:
            own, own_lost = nearest(own, keep)
            lost += own_lost
        assert isinstance(own, LoRAFactors)
        layers[layer] = own
    return Delta(layers, terms.base, math.sqrt(lost))


def check_options(method: str, options: Mapping[str, float]) -> None:
    """Make sure that there is such a method, and that it has these options.

    Raises:
        InputError: there is none, or it has no such option, or its value is out of range.
    """
    if method not in WAYS:
        raise InputError(
            f"no way to merge is called {method!r}: {did_you_mean(method, list(WAYS))}"
        )
    known = METHODS[method]
    for name, value in options.items():
        if name not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise InputError(f"{method!r} has no option {name!r}: {has}")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if name == "keep" and not (is_number and 0 < value <= 1):
            raise InputError(f"keep must be a number above 0 and at most 1, not {value!r}")
        if name == "drop" and not (is_number and 0 <= value < 1):
            raise InputError(f"drop must be a number from 0 on and below 1, not {value!r}")


def _sum(matrices: Iterator[Tensor] | list[Tensor]) -> Tensor:
    total: Tensor | None = None
    for matrix in matrices:
        total = matrix if total is None else total + matrix
    assert total is not None
    return total


def _dropped(parts: Parts, drop: float, seed: int) -> Parts:
    if not drop:
        return parts

    def left(layer: str) -> Iterator[tuple[str, Tensor]]:
        for name, matrix in parts(layer):
            # Named, so that the order of the LoRAs changes nothing.
            own = zlib.crc32(f"{seed} {name} {layer}".encode())
            generator = torch.Generator().manual_seed(own)
            stays = torch.rand(matrix.shape, generator=generator) >= drop
            yield name, matrix * stays / (1 - drop)

    return left


def _elected(terms: Terms, parts: Parts, keep: float) -> Callable[[str], Tensor]:
    """TIES over any matrices."""
    least = _thresholds(terms.layers, parts, keep) if keep < 1 else {}

    def trimmed(layer: str) -> Iterator[Tensor]:
        for name, matrix in parts(layer):
            yield torch.where(matrix.abs() >= least.get(name, 0.0), matrix, 0.0)

    def update(layer: str) -> Tensor:
        signs = _sum(trimmed(layer)).sign()
        total, count = torch.zeros_like(signs), torch.zeros_like(signs)
        for matrix in trimmed(layer):
            agrees = (matrix.sign() == signs) & (matrix != 0)
            total += matrix * agrees
            count += agrees
        return total / count.clamp(min=1)

    return update


BITS = 16
"""A magnitude is found by the upper and then the lower half of its bits."""


def _thresholds(layers: list[str], parts: Parts, keep: float) -> dict[str, float]:
    """For each LoRA the magnitude that a share `keep` of all its entries reaches.

    It is exact, and needs one matrix in memory: fp32 numbers from 0 on have the order of their
    bits, so two histograms find the one that is wanted.
    """

    def count(choose: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for layer in layers:
            for name, matrix in parts(layer):
                bits = matrix.float().abs().flatten().view(torch.int32)
                counted = torch.bincount(choose(name, bits), minlength=1 << BITS)
                found[name] = found[name] + counted if name in found else counted
        return found

    upper = count(lambda _, bits: bits >> BITS)
    places: dict[str, int] = {}
    wanted: dict[str, int] = {}
    for name, counts in upper.items():
        whole = math.ceil(keep * int(counts.sum()))
        places[name], wanted[name] = _place(counts, whole)
    lower = count(lambda name, bits: bits[bits >> BITS == places[name]] & ((1 << BITS) - 1))
    return {
        name: _number((places[name] << BITS) | _place(counts, wanted[name])[0])
        for name, counts in lower.items()
    }


def _place(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The bin that holds the `wanted`-th largest value, and its place among the bin's."""
    from_top = counts.flip(0).cumsum(0)
    bin_from_top = int((from_top < wanted).sum())
    above = int(from_top[bin_from_top - 1]) if bin_from_top else 0
    return len(counts) - 1 - bin_from_top, wanted - above


def _number(bits: int) -> float:
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))
