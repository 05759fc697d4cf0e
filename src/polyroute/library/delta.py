"""One LoRA as what it adds to the weights of a base model, with exact arithmetic.

The factors of a LoRA are not unique: (M^-1 A, M B) is the same LoRA for every invertible M. So
everything here depends on the products alone, and no product is formed. With a_i `[r_i, d_in]` and
b_i `[r_i, d_out]`, which add b_i^T a_i to a layer's weight `[d_out, d_in]`:

    sum_i w_i b_i^T a_i = [w_1 b_1; w_2 b_2; ...]^T [a_1; a_2; ...]           of rank sum_i r_i
    <b_1^T a_1, b_2^T a_2> = sum of the entries of (a_1 a_2^T) * (b_1 b_2^T)
    b^T a = Q_b (R_b R_a^T) Q_a^T       with a^T = Q_a R_a and b^T = Q_b R_b

The singular values of an update are therefore those of a core of `[r, r]`, and the best update of a
lower rank is that of the core (Eckart and Young, 1936). Norms are those of Frobenius, over all
layers. Sums are computed in fp32, and norms and cores in fp64.

Shape letters: r rank of a layer, R and Q the ranks of several LoRAs together.
"""

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from polyroute.errors import InputError
from polyroute.exchange.lora import factors_of
from polyroute.exchange.peft_folder import PICKLE, read_peft_folder
from polyroute.host.dtypes import are_finite_fractions
from polyroute.layer.factors import LoRAFactors
from polyroute.saved.hub import locate
from polyroute.saved.peft_card import write_peft_card
from polyroute.saved.peft_export import CONFIG, TENSORS, PeftTarget
from polyroute.settings import number, whole

__all__ = [
    "TRANSPOSED",
    "Delta",
    "base_and_error",
    "by_owner",
    "core",
    "cosines",
    "inner_products",
    "is_noise",
    "keeping",
    "nearest",
    "norm",
    "side_by_side",
    "weighted_sum",
]

SAID = ("base_model_name_or_path", "task_type")
"""What PEFT's settings say of the base model."""
TRANSPOSED = "fan_in_fan_out"


@dataclass(frozen=True, eq=False)
class Delta:
    """One LoRA, or a sum of several, as an exact low-rank update of each layer.

        sql, legal = pr.Delta.from_peft("loras/sql"), pr.Delta.from_peft("loras/legal")
        (sql - 0.5 * legal).recompress(energy=0.99).save_peft("loras/sql-not-legal")

    A layer that only one of two has keeps the update that it has.
    """

    layers: Mapping[str, LoRAFactors]
    """By the layer's name in the base model, a `[r, d_in]` and b `[r, d_out]`, scale included."""
    base: Mapping[str, Any]
    """What `adapter_config.json` says of the base model."""
    error: float = 0.0
    """The update is at most this far from the exact one; above 0 only after `recompress`."""

    @classmethod
    def from_peft(cls, folder: str | os.PathLike[str], *, allow_pickle: bool = False) -> "Delta":
        """Read a LoRA that PEFT or polyroute wrote, whatever its ranks, scales and patterns.

        Its tensors stay in the file, mapped, and are read again when a layer is used.

        Args:
            folder: a folder or, if there is none of this name, an id on the hub, `user/lora` or
                `user/lora@revision`.
            allow_pickle: read `adapter_model.bin` where there are no safetensors.

        Raises:
            InputError: the folder holds no LoRA, or one that computes more than a low-rank update
                (DoRA, biases, trained weights of the base model), or is not whole.
        """
        place = locate(folder, (CONFIG, TENSORS, *([PICKLE] if allow_pickle else [])))
        fields, tensors = read_peft_folder(None, place, "LORA", allow_pickle=allow_pickle)
        layers = factors_of(fields, tensors, str(place))
        for layer, own in layers.items():
            if not (are_finite_fractions(own.a) and are_finite_fractions(own.b)):
                raise InputError(f"{place} is damaged: {layer!r} is not finite")
        base = {name: fields.get(name) for name in (*SAID, TRANSPOSED)}
        return cls(layers, base)

    def save_peft(self, folder: str | os.PathLike[str], *, origin: str | None = None) -> None:
        """Write it as an ordinary LoRA of PEFT, which has the scale in B.

        Args:
            folder: the folder to write to; made if missing.
            origin: ends the sentence of its card, `README.md`, that says what it is; by default how
                near it is to the exact update.

        Raises:
            InputError: the update is not finite, or the folder cannot be written.
        """
        for layer, own in self.layers.items():
            if not (own.a.isfinite().all() and own.b.isfinite().all()):
                raise InputError(
                    f"the LoRA is not written to {folder}, because layer {layer!r} is not finite: "
                    "use smaller weights"
                )
        config = {name: self.base.get(name) for name in SAID}
        config |= {"target_modules": sorted(self.layers), "inference_mode": True}
        is_transposed = bool(self.base.get(TRANSPOSED))
        target = PeftTarget(config, tuple(self.layers), is_transposed, {})
        target.write(folder, list(self.layers.values()))
        write_peft_card(folder, None, origin=origin or self._origin())

    def _origin(self) -> str:
        if not self.error:
            return "computed exactly from other LoRAs by polyroute"
        size = math.hypot(self.norm(), self.error)
        return (
            "computed from other LoRAs by polyroute. Its update is at most "
            f"{self.error:.3g} from the exact one, which is {self.error / size:.1%} of that one's "
            "norm"
        )

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each layer's factors, which that of their product may be below."""
        return {layer: len(own.a) for layer, own in self.layers.items()}

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """The widths of each layer, in and out."""
        return {layer: (own.a.shape[1], own.b.shape[1]) for layer, own in self.layers.items()}

    def __add__(self, other: "Delta") -> "Delta":
        """The sum, whose ranks are the sums of both ranks."""
        if not isinstance(other, Delta):
            return NotImplemented
        return weighted_sum([(1.0, self), (1.0, other)])

    def __radd__(self, other: object) -> "Delta":
        """Itself, if `sum` begins with 0."""
        return self if other == 0 else NotImplemented

    def __mul__(self, weight: float) -> "Delta":
        """Times a number."""
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            return NotImplemented
        return weighted_sum([(weight, self)])

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "Delta":
        """Divided by a number."""
        if isinstance(divisor, bool) or not isinstance(divisor, int | float) or not divisor:
            return NotImplemented
        number()("the divisor of a LoRA", divisor)
        return weighted_sum([(1 / divisor, self)])

    def __neg__(self) -> "Delta":
        """Its opposite."""
        return -1.0 * self

    def __sub__(self, other: "Delta") -> "Delta":
        """The difference; ranks add up."""
        if not isinstance(other, Delta):
            return NotImplemented
        return weighted_sum([(1.0, self), (-1.0, other)])

    def inner(self, other: "Delta") -> float:
        """The inner product of both updates; layers that one lacks count nothing."""
        return float(inner_products([self], [other]))

    def norm(self) -> float:
        """The Frobenius norm of the update over all layers."""
        return math.sqrt(sum(norm(own) ** 2 for own in self.layers.values()))

    def cosine(self, other: "Delta") -> float:
        """The cosine between both updates.

        Raises:
            InputError: one of them is zero, so it has no direction.
        """
        norms = self.norm() * other.norm()
        if not norms:
            raise InputError("a LoRA that adds nothing has no cosine with another")
        return self.inner(other) / norms

    def recompress(self, *, rank: int | None = None, energy: float | None = None) -> "Delta":
        """The nearest update of lower ranks; `error` says how near.

        Args:
            rank: the most of each layer.
            energy: each layer keeps as many singular values as have this share of the sum of their
                squares. 1 keeps the update exactly, with the smallest ranks that can hold it.

        Raises:
            InputError: not exactly one of both is given, or it is out of range.
        """
        keep = keeping(rank, energy)
        layers: dict[str, LoRAFactors] = {}
        lost = 0.0
        for layer, own in self.layers.items():
            layers[layer], own_lost = nearest(own, keep)
            lost += own_lost
        return replace(self, layers=layers, error=self.error + math.sqrt(lost))


def weighted_sum(terms: Sequence[tuple[float, Delta]]) -> Delta:
    """The exact sum of LoRAs, each times its weight; at least one.

    Raises:
        InputError: a weight is not finite, or the LoRAs belong to different base models.
    """
    base, error = base_and_error(terms)
    parts: dict[str, list[LoRAFactors]] = {}
    for weight, delta in terms:
        for layer, own in delta.layers.items():
            parts.setdefault(layer, []).append(LoRAFactors(own.a, own.b * weight))
    return Delta({layer: side_by_side(layer, own) for layer, own in parts.items()}, base, error)


def base_and_error(terms: Sequence[tuple[float, Delta]]) -> tuple[Mapping[str, Any], float]:
    """What weighted LoRAs say of their base model, and how far their sum is from the exact one.

    Raises:
        InputError: a weight is not finite, or the LoRAs belong to different base models.
    """
    base = terms[0][1].base
    for weight, delta in terms:
        number()("the weight of a LoRA", weight)
        base = _agreed(base, delta.base)
    return base, sum(abs(weight) * delta.error for weight, delta in terms)


def side_by_side(layer: str, several: Sequence[LoRAFactors]) -> LoRAFactors:
    """The sum of updates of a layer, of which each keeps its ranks.

    Raises:
        InputError: their widths differ.
    """
    first, *others = several
    for own in others:
        _check_fit(layer, first, own)
    return LoRAFactors(torch.cat([o.a for o in several]), torch.cat([o.b for o in several]))


def inner_products(ours: Sequence[Delta], theirs: Sequence[Delta]) -> Tensor:
    """Those of all pairs, `[len(ours), len(theirs)]` in fp64.

    There are two products for each layer, whatever the number of LoRAs.

    Raises:
        InputError: the LoRAs belong to different base models.
    """
    found = torch.zeros(len(ours), len(theirs), dtype=torch.float64)
    for layer in sorted({layer for delta in ours for layer in delta.layers}):
        one, other = (_stacked(side, layer) for side in (ours, theirs))
        if one is None or other is None:
            continue
        (all_R, of_R), (all_Q, of_Q) = one, other
        _check_fit(layer, all_R, all_Q)
        products_RQ = (all_R.a @ all_Q.a.t()) * (all_R.b @ all_Q.b.t())
        found += by_owner(products_RQ, of_R, of_Q, len(ours), len(theirs))
    return found


def by_owner(values: Tensor, rows: Tensor, columns: Tensor, height: int, width: int) -> Tensor:
    """The sums `[height, width]` of the entries `[R, Q]` of each pair of owners.

    `rows` `[R]` says whose each row is, of `height` owners; `columns` `[Q]` and `width` likewise.
    """
    of_rows = values.new_zeros(height, values.shape[1]).index_add_(0, rows, values)
    return values.new_zeros(height, width).index_add_(1, columns, of_rows)


def _stacked(deltas: Sequence[Delta], layer: str) -> tuple[LoRAFactors, Tensor] | None:
    """The factors of a layer one after another in fp64, and whose each rank is; None without it."""
    there = [(i, own.layers[layer]) for i, own in enumerate(deltas) if layer in own.layers]
    if not there:
        return None
    every = side_by_side(layer, [own for _, own in there])
    of_R = torch.cat([torch.full((len(own.a),), i) for i, own in there])
    return LoRAFactors(every.a.double().cpu(), every.b.double().cpu()), of_R


def core(own: LoRAFactors) -> tuple[Tensor, Tensor, Tensor]:
    """The core `[p, q]` of an update, and orthonormal bases `[d_in, q]` and `[d_out, p]`."""
    basis_a, upper_a = torch.linalg.qr(own.a.double().t())
    basis_b, upper_b = torch.linalg.qr(own.b.double().t())
    return upper_b @ upper_a.t(), basis_a, basis_b


def nearest(
    update: LoRAFactors | Tensor, keep: Callable[[Tensor], int]
) -> tuple[LoRAFactors, float]:
    """The best update of a lower rank (Eckart and Young, 1936), and the square of the error.

    Args:
        update: of one layer; factors, or dense `[d_out, d_in]`.
        keep: how many of its singular values stay, see `keeping`.
    """
    if isinstance(update, Tensor):
        left, values, right = torch.linalg.svd(update.double(), full_matrices=False)
        size = float(values.norm())
        dtype = update.dtype
    else:
        core_pq, basis_a, basis_b = core(update)
        left, values, right = torch.linalg.svd(core_pq, full_matrices=False)
        left, right = basis_b @ left, right @ basis_a.t()
        size = float(update.a.double().norm() * update.b.double().norm())
        dtype = update.a.dtype
    kept = keep(torch.where(is_noise(values, size), 0.0, values))
    roots = values[:kept, None].sqrt()
    factors = LoRAFactors((right[:kept] * roots).to(dtype), (left[:, :kept].t() * roots).to(dtype))
    return factors, float(values[kept:].square().sum())


def norm(own: LoRAFactors) -> float:
    """The Frobenius norm of an update, which is that of its core."""
    return float(core(own)[0].norm())


def cosines(gram_EE: Tensor) -> Tensor:
    """Those of all pairs, from inner products; 0 where an update is zero."""
    norms_E = gram_EE.diagonal().clamp(min=0).sqrt()
    return gram_EE / (norms_E[:, None] * norms_E).clamp(min=1e-300)


def is_noise(values_r: Tensor, size: float) -> Tensor:
    """Which singular values, largest first, rounding alone can have left.

    Args:
        values_r: in fp64, of a matrix in fp32.
        size: the norm of what they were computed from.
    """
    coarse = float(values_r[0]) * torch.finfo(torch.float32).eps
    tiny = max(coarse, size * torch.finfo(torch.float64).eps) * len(values_r)
    return values_r <= tiny


def keeping(rank: int | None, energy: float | None) -> Callable[[Tensor], int]:
    """How many of some singular values, largest first, `Delta.recompress` keeps; at least one.

    Raises:
        InputError: not exactly one of both is given, or it is out of range.
    """
    if (rank is None) == (energy is None):
        raise InputError("recompress takes either rank or energy")
    if rank is not None:
        whole()("rank", rank)
        return lambda values: min(rank, len(values))
    assert energy is not None
    number(above=0, most=1)("energy", energy)

    def enough(values: Tensor) -> int:
        squares = values.square()
        lacking = squares.sum() * (1 - energy) if energy < 1 else torch.zeros(())
        rest = squares.flip(0).cumsum(0).flip(0)  # of each value and all smaller ones
        return max(1, int((rest > lacking).sum()))

    return enough


def _check_fit(layer: str, ours: LoRAFactors, theirs: LoRAFactors) -> None:
    for one, other in ((ours.a, theirs.a), (ours.b, theirs.b)):
        if one.shape[-1] != other.shape[-1]:
            raise InputError(
                f"layer {layer!r} has a width of {one.shape[-1]} in one LoRA and of "
                f"{other.shape[-1]} in another: they belong to different base models"
            )


def _agreed(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """What two LoRAs say of their base models, where they agree."""
    if bool(ours.get(TRANSPOSED)) != bool(theirs.get(TRANSPOSED)):
        raise InputError(
            f"one LoRA has {TRANSPOSED}={ours.get(TRANSPOSED)!r} and another "
            f"{theirs.get(TRANSPOSED)!r}: they belong to different base models"
        )
    names = [said.get("base_model_name_or_path") for said in (ours, theirs)]
    if all(names) and names[0] != names[1]:
        warnings.warn(
            f"one LoRA names the base model {names[0]!r} and another {names[1]!r}; their sum names "
            "none",
            stacklevel=4,
        )
        return {**ours, "base_model_name_or_path": None}
    return {key: ours.get(key) or theirs.get(key) for key in {**ours, **theirs}}
