"""Freeze: one plain LoRA that stands in for a route, on texts of a task.

A route in which tokens choose can be neither merged nor exported nor served elsewhere. On texts of
a task, its update of a layer is a function of the layer's input. The best update of rank r in its
place is a reduced-rank regression, which has a closed form. With the inputs X and the live updates
Y of all tokens, C = X^T X + ridge and M = X^T Y,

    min_D |X D - Y|^2   at   D = C^-1/2 [C^-1/2 M]_r

where [.]_r keeps r singular values. The sums C and M are collected in one pass over the texts. This
is an approximation: `errors` says for every layer what share of the live update is lost on texts
that were left out. A route of constant weights is a LoRA already, and its sum is recompressed.

Shape letters: n tokens, r rank.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from polyroute.errors import InputError
from polyroute.kinds.batches import evaluating
from polyroute.layer.factors import Factors, LoRAFactors, Segments
from polyroute.layer.sites import Site
from polyroute.library.controls import Given
from polyroute.library.delta import TRANSPOSED, Delta, keeping, nearest, norm
from polyroute.library.static import Static
from polyroute.library.tokens import real_tokens
from polyroute.model import RoutedModel
from polyroute.routes.mixer import Mixer
from polyroute.routes.rule import Batch, RouteRule
from polyroute.saved.peft_export import peft_target
from polyroute.settings import number, whole

__all__ = ["Frozen", "freeze"]

HELD_OUT = 5
"""Every so many texts one is left out of the sums, to measure the error."""
TINY = 1e-300
OF_TEXTS = "on texts that were left out it misses"
OF_WEIGHTS = "of the exact sum it misses"


@dataclass(frozen=True)
class Frozen:
    """A LoRA in place of a route."""

    delta: Delta
    errors: Mapping[str, float]
    """By layer, what share of the norm is lost: of the live updates on texts that were left out or,
    of constant weights, of the update itself."""
    route: str
    """The name of the rule."""
    missing: str = OF_TEXTS
    """Says in the card what the errors are."""

    def save_peft(self, folder: str | os.PathLike[str]) -> None:
        """Write it as an ordinary LoRA of PEFT, whose card has the errors.

        Raises:
            InputError: the folder cannot be written.
        """
        lines = "\n".join(f"- `{layer}`: {error:.3f}" for layer, error in self.errors.items())
        self.delta.save_peft(
            folder,
            origin=f"frozen from the route {self.route} by polyroute; {self.missing} "
            f"{self.error:.3f} of the norm, as a mean over layers:\n\n{lines}\n",
        )

    @property
    def error(self) -> float:
        """The mean of `errors`."""
        return math.fsum(self.errors.values()) / max(1, len(self.errors))


class _Nothing(nn.Module):
    """A layer that gives zeros, beside which an update stands alone."""

    def __init__(self, d_out: int) -> None:
        super().__init__()
        self.d_out = d_out

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.d_out)


class _Sums:
    """What a regression needs to know of inputs and updates."""

    def __init__(self, d_in: int, d_out: int) -> None:
        self.inputs = torch.zeros(d_in, d_in, dtype=torch.float64)
        self.products = torch.zeros(d_in, d_out, dtype=torch.float64)
        self.size = 0.0

    def add(self, x_nd: Tensor, y_nd: Tensor) -> None:
        x_nd, y_nd = x_nd.double().cpu(), y_nd.double().cpu()
        self.inputs += x_nd.t() @ x_nd
        self.products += x_nd.t() @ y_nd
        self.size += float(y_nd.square().sum())

    def lost(self, own: LoRAFactors) -> float:
        """The share of the updates' norm by which a LoRA misses them."""
        if not self.size:
            return 0.0
        a, b = own.a.double(), own.b.double()
        kept = ((a @ self.inputs @ a.t()) * (b @ b.t())).sum()
        shared = ((a @ self.products) * b).sum()
        return math.sqrt(max(0.0, float(self.size + kept - 2 * shared)) / self.size)


@dataclass(frozen=True)
class _Watched:
    """Factors that note what a layer sees and what they add."""

    factors: Factors
    sums: _Sums
    nothing: _Nothing
    mask: Tensor | None
    site: Site

    num_examples: None = None

    def apply(
        self, base: nn.Module, x: Tensor, dropout: float, segments: Segments | None = None
    ) -> Tensor:
        exact = x.float()
        update = self.factors.apply(self.nothing, exact, 0.0, segments)
        rows = (real_tokens(t, self.mask, self.site) for t in (exact, update))
        self.sums.add(*rows)
        y: Tensor = base(x)
        return y + update.to(y.dtype)

    def to(self, device: torch.device) -> "_Watched":
        return replace(self, factors=self.factors.to(device))


class _Watching(RouteRule):
    """Routes as another rule does, and collects the sums of every layer."""

    needs_tasks = False
    stands_alone = True

    def __init__(self, rule: RouteRule, model: RoutedModel) -> None:
        super().__init__()
        self.rule = rule
        self.nothing = [_Nothing(site.d_out) for site in model.sites]
        self.used, self.held_out = (
            [_Sums(site.d_in, site.d_out) for site in model.sites] for _ in range(2)
        )
        self.sums = self.used

    def factors(self, batch: Batch, mixer: Mixer) -> Sequence[Factors]:
        own = self.rule.factors(replace(batch, dtype=torch.float32), mixer)
        return [
            _Watched(one, of_site, nothing, batch.mask, site)
            for one, of_site, nothing, site in zip(
                own, self.sums, self.nothing, mixer.sites, strict=True
            )
        ]


@torch.no_grad()
def freeze(
    model: RoutedModel,
    rule: RouteRule,
    texts: Iterable[Any],
    *,
    rank: int = 16,
    ridge: float = 1e-3,
    run: Callable[[RoutedModel, Any, RouteRule], object] | None = None,
) -> Frozen:
    """Turn a route into one LoRA for the task that texts belong to.

    Args:
        model: whose skills the rule chooses.
        rule: a rule that stands alone, such as `polyroute.Arrow()`.
        texts: arguments of the base model, without answers. One of every five is left out of the
            sums, for `errors`.
        rank: the most of each layer.
        ridge: the share of the mean square of a layer's inputs that is added to every direction,
            for those that the texts do not show.
        run: runs the model on one of `texts`, by default with it as arguments.

    Raises:
        InputError: there are fewer than five texts, a number is out of range, or the rule needs a
            task.
    """
    whole()("rank", rank)
    number(least=0)("ridge", ridge)
    if not isinstance(rule, RouteRule) or not rule.stands_alone or isinstance(rule, Given):
        raise InputError(
            f"a route in which tokens choose is frozen, such as polyroute.Arrow(), not {rule!r}; "
            "export_peft writes the LoRA of a task exactly"
        )
    model.check_unmerged()
    target = peft_target(model.base_model, model.sites)
    base = {**target.config, TRANSPOSED: target.fan_in_fan_out}
    if isinstance(rule, Static):
        return _of_constant(model, rule, rank, base)
    watching, count = _Watching(rule, model), 0
    with evaluating(model):
        for given in texts:
            count += 1
            watching.sums = watching.held_out if count % HELD_OUT == 0 else watching.used
            if run is not None:
                run(model, given, watching)
            else:
                model(**given, tasks=watching)
    if count < HELD_OUT:
        raise InputError(
            f"a route is frozen on at least {HELD_OUT} texts, of which one measures the error; "
            f"there are {count}"
        )
    layers, errors = {}, {}
    for site, used, held_out in zip(model.sites, watching.used, watching.held_out, strict=True):
        layers[site.name] = _regression(used, rank, ridge)
        errors[site.name] = held_out.lost(layers[site.name])
    return Frozen(Delta(layers, base), errors, rule.name)


def _of_constant(model: RoutedModel, rule: Static, rank: int, base: Mapping[str, Any]) -> Frozen:
    batch = Batch(None, None, is_training=False, dtype=torch.float32, gates=None)
    keep, total = keeping(rank, None), 0.0
    layers, errors = {}, {}
    for site, own in zip(model.sites, rule.factors(batch, model.mixer), strict=True):
        if isinstance(own, LoRAFactors) and len(own.a):
            layers[site.name], lost = nearest(own, keep)
            errors[site.name] = math.sqrt(lost) / max(norm(own), TINY)
            total += lost
    return Frozen(Delta(layers, base, math.sqrt(total)), errors, rule.name, OF_WEIGHTS)


def _regression(sums: _Sums, rank: int, ridge: float) -> LoRAFactors:
    values, vectors = torch.linalg.eigh(sums.inputs)
    values = values.clamp(min=0) + ridge * sums.inputs.diagonal().mean()
    there = values > 1e-12 * values.max()
    inverse_root = vectors[:, there] * values[there].rsqrt()
    left, scales, right = torch.linalg.svd(inverse_root.t() @ sums.products, full_matrices=False)
    kept = min(rank, len(scales))
    roots = scales[:kept].sqrt()
    a = (inverse_root @ left[:, :kept] * roots).t()
    return LoRAFactors(a.float(), (roots[:, None] * right[:kept]).float())
