"""Packed rows in which many tasks have a few tokens each, as while many answers are generated.

Mixing the skills of a task costs as much as applying all skills to a few dozen tokens. Where the
tasks of a batch change with every forward, their mixtures would be made for a token or two. So
examples of a few tokens apply the skills themselves, and their weights act on the results:

    (x A(w)) B(w) = sum_k w_k (sum_j w_j x A_j) B_k

Longer examples, such as prompts, have their tasks mixed as always. docs/design.md, "Executors",
gives the measurements.

Shape letters: U distinct tasks, B examples, N routers, H heads, K skills.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polyroute.layer.factors import Factors, LoRAFactors, MixedLengthFactors, Segments
from polyroute.layer.gated import Run
from polyroute.routes.index import index_on
from polyroute.routes.tasks import BASE_ROW, Route, with_rows

if TYPE_CHECKING:
    from polyroute.routes.mixer import Mixer

__all__ = ["SHORT", "ShortExamples"]

Examples = tuple[tuple[int, int], ...]
"""The row and the number of tokens of each."""
SHORT = 16
"""Examples of fewer tokens apply the skills themselves."""


@dataclass
class ShortExamples:
    """Factors for packed rows with short examples, and the skills that they apply.

    The skills are kept in the type that the layers compute in, until a parameter changes.
    """

    _stamp: Any = None
    _skills: Sequence[tuple[Tensor, Tensor]] = ()
    """For each site a `[H, K, r, d_in/H]` and b `[H, K, r, d_out/H]`, scale included."""
    _weights: dict[Examples, Tensor] = field(default_factory=dict)
    """Those of the last batch."""

    def fit(self, route: Route, mixer: "Mixer") -> bool:
        """Whether a batch is better off this way; such a batch has no gradient."""
        inventory = mixer.inventory
        return (
            route.segments is not None
            and min(route.segments.lengths) < SHORT
            and len(set(route.rows or ())) > 1
            and mixer.rule.has_table
            and mixer.table.logits is not None
            and (inventory.adapter, inventory.combine, inventory.num_sets) == ("lora", "weight", 1)
            and all(site.out_features == site.d_out for site in mixer.sites)
        )

    def factors(
        self, route: Route, mixer: "Mixer", dtype: torch.dtype, stamp: Any
    ) -> Sequence[Factors]:
        """The factors of each site.

        Args:
            route: one that fits.
            mixer: has the skills and the table.
            dtype: the type that the layers compute in.
            stamp: changes whenever a parameter does.
        """
        assert route.rows is not None
        assert route.segments is not None
        if self._stamp != (stamp, dtype):
            self._stamp, self._weights = (stamp, dtype), {}
            self._skills = [self._of_site(mixer, site, dtype) for site in range(len(mixer.sites))]
        lengths = route.segments.lengths
        short = tuple((row, n) for row, n in zip(route.rows, lengths, strict=True) if n < SHORT)
        long = [row for row, n in zip(route.rows, lengths, strict=True) if n >= SHORT]
        mixed: Sequence[LoRAFactors | None] = [None] * len(mixer.sites)
        if long:
            mixed = [_each(own) for own in mixer.mix_rows(long, dtype)]
        weights, runs = self._weights_of(short, mixer, dtype), _runs(lengths)
        return [
            MixedLengthFactors(long=own, a=a, b=b, weights=weights[router], runs=runs)
            for own, (a, b), router in zip(mixed, self._skills, mixer.router_of_site, strict=True)
        ]

    def _of_site(self, mixer: "Mixer", site: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        tensors = mixer.inventory.site_tensors(site)
        a, b = tensors["lora_a"].mT.detach(), tensors["lora_b"].detach() * mixer.inventory.scale
        return a.to(dtype).contiguous(), b.to(dtype).contiguous()

    def _weights_of(self, examples: Examples, mixer: "Mixer", dtype: torch.dtype) -> Tensor:
        """The weights of the tokens of short examples, for each router `[H, N, K r]`."""
        if examples not in self._weights:
            rows = [row for row, _ in examples]
            weights = mixer.rule.choose(with_rows(rows), mixer, training=False).weights
            assert weights is not None
            is_base = index_on(weights.device, tuple(row == BASE_ROW for row in rows)).bool()
            weights = weights.masked_fill(is_base.view(-1, 1, 1, 1), 0.0).to(dtype)
            times = torch.tensor([n for _, n in examples], device=weights.device)
            w_NHBK = weights.permute(1, 2, 0, 3).repeat_interleave(times, 2)
            self._weights = {examples: w_NHBK.repeat_interleave(mixer.inventory.rank, 3)}
        return self._weights[examples]


def _runs(lengths: Sequence[int]) -> Sequence[Run]:
    """Examples that are all short or all long, put together where they lie next to one another."""
    runs, token = [], 0
    before = {True: 0, False: 0}  # short tokens, and long examples
    for is_short, group in groupby(lengths, lambda length: length < SHORT):
        own = tuple(group)
        size = sum(own) if is_short else len(own)
        place = slice(before[is_short], before[is_short] + size)
        runs.append(Run(slice(token, token + sum(own)), place, is_short, Segments(own)))
        before[is_short] += size
        token += sum(own)
    return runs


def _each(factors: Any) -> LoRAFactors:
    """Factors with an axis of examples, which those of a single example lack."""
    assert isinstance(factors, LoRAFactors)
    if factors.num_examples is not None:
        return factors
    return LoRAFactors(factors.a.unsqueeze(0), factors.b.unsqueeze(0))
