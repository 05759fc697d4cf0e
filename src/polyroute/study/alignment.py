"""Gradient alignment: whether tasks pull the adapters into one direction.

For task i with loss L_i and, at a site, mixed factors A_i, B_i:

    G_i = (dL_i/dA_i, dL_i/dB_i)          the effective gradient
    H_i = (dL_i/dA,   dL_i/dB)            the inventory's, of all skills of the site
    align(i, j) = <X_i, X_j> / (|X_i| |X_j| + 1e-12),   X = G or H

The effective alignment compares tasks under any method; the inventory's is that of the parameters
that tasks share. H is never formed, because each skill's gradient is a multiple of the mixture's:

    <H_i, H_j> = sum_h rho_h(i, j) <G_ih, G_jh>,   rho_h(i, j) = sum_k w_i[h, k] w_j[h, k]

with G_ih the part of G_i in head h's block. The definition is our own.

Shape letters: T tasks, P pairs, S sites, N routers, H heads, K skills, r rank, D width of a head's
block.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyroute.errors import InputError
from polyroute.kinds.batches import Row
from polyroute.kinds.choose import ModelKind
from polyroute.model import RoutedModel
from polyroute.study.gradients import differentiating, gradients

__all__ = ["Alignment", "alignment"]

EPSILON = 1e-12
DIGITS = 6
"""Decimals of the results that are written."""


@dataclass(frozen=True)
class Alignment:
    """How the gradients of pairs of tasks are aligned, at each site.

    Numbers are float64 `[S, P]`, and NaN where a gradient is zero or not finite and so has no
    direction.
    """

    tasks: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]
    """Positions in `tasks`."""
    sites: tuple[str, ...]
    effective: Tensor
    """Cosines of the gradients of the tasks' own factors."""
    inventory: Tensor
    """Cosines of the gradients of the skills."""
    overlap: Tensor
    """rho, the mean over heads."""
    skipped: int
    """How many gradients, of one factor of one task at one site, are zero and count for nothing. At
    the start of training every gradient of A is among them, because B is zero."""

    def mean(self) -> dict[str, float | None]:
        """The mean over sites and pairs of each measure, by name; None where there is no number."""
        measures = {name: getattr(self, name) for name in ("effective", "inventory", "overlap")}
        return {name: _number(float(values.nanmean())) for name, values in measures.items()}

    def to_dict(self) -> dict[str, Any]:
        """The alignment as JSON values, rounded to six decimals; None for NaN."""
        return {
            "tasks": list(self.tasks),
            "pairs": [list(pair) for pair in self.pairs],
            "sites": list(self.sites),
            "effective": _table(self.effective),
            "inventory": _table(self.inventory),
            "overlap": _table(self.overlap),
            "skipped": self.skipped,
        }


def _number(value: float) -> float | None:
    return round(value, DIGITS) if np.isfinite(value) else None


def _table(values: Tensor) -> list[list[float | None]]:
    return [[_number(value) for value in row] for row in values.tolist()]


def alignment(
    model: RoutedModel,
    kind: ModelKind,
    examples_by_task: Mapping[str, Sequence[Row]],
    pairs: Sequence[tuple[str, str]] | None = None,
    *,
    route: str | None = None,
    batch_size: int = 16,
) -> Alignment:
    """Compare the gradients of tasks, in evaluation mode: no dropout, no noisy gates.

    A task's loss is the kind's, averaged over batches of its examples. Each task takes one forward
    and backward per batch; its gradients, as large as one adapter, are kept until all tasks are
    done. The model does not change, and no random number is drawn.

    Args:
        model: the routed model, in any phase, frozen or not.
        kind: how its base model learns.
        examples_by_task: encoded rows of each task.
        pairs: tasks to compare; by default all pairs of tasks.
        route: the task, or `"mu"`, that all examples are routed as, as in zero-shot evaluation;
            None routes each as its own task.
        batch_size: examples in a forward.

    Raises:
        InputError: fewer than two tasks, a task without examples or without a route, or a model
            that is merged or holds slots.
    """
    _check(model, examples_by_task, route)
    if pairs is None:
        pairs = list(combinations(examples_by_task, 2))
    if not pairs:
        raise InputError("no pair of tasks to compare: give examples of at least two tasks")
    for task in (task for pair in pairs for task in pair):
        if task not in examples_by_task:
            raise InputError(f"task {task!r} of a pair has no examples; add them")
    tasks = tuple(t for t in examples_by_task if any(t in pair for pair in pairs))
    with differentiating(model):
        gradients_T = [
            gradients(model, kind, examples_by_task[task], route or task, batch_size)
            for task in tasks
        ]
    weights_TNHK = torch.stack([_weights(model, route or task) for task in tasks])
    places = tuple((tasks.index(i), tasks.index(j)) for i, j in pairs)
    first, second = map(list, zip(*places, strict=True))
    measures: list[list[Tensor]] = [[], [], []]
    skipped = 0
    for site, router in enumerate(model.mixer.router_of_site):
        by_factor = [
            _products([of_task[site][factor] for of_task in gradients_T], model.inventory.heads)
            for factor in range(len(model.inventory.factor_names))
        ]
        skipped += sum(int((products.sum(0).diagonal() == 0).sum()) for products in by_factor)
        products_HTT = torch.stack(by_factor).sum(0)
        rho_HTT = torch.einsum("thk,uhk->htu", *[weights_TNHK[:, router]] * 2)
        found = (
            _cosines(products_HTT.sum(0)),
            _cosines((rho_HTT * products_HTT).sum(0)),
            rho_HTT.mean(0),
        )
        for measure, values_TT in zip(measures, found, strict=True):
            measure.append(values_TT[first, second])
    effective, inventory, overlap = map(torch.stack, measures)
    sites = tuple(site.name for site in model.sites)
    return Alignment(tasks, places, sites, effective, inventory, overlap, skipped)


def _check(model: RoutedModel, examples: Mapping[str, Sequence[Row]], route: str | None) -> None:
    model.check_unmerged()
    if model.inventory.num_sets > 1:
        raise InputError("the gradients of slots share no skills to compare: close the slots first")
    for task, rows in examples.items():
        model.routes.row(task if route is None else route)
        if not len(rows):
            raise InputError(f"task {task!r} has no examples to take a gradient of; give some")


def _weights(model: RoutedModel, task: str) -> Tensor:
    """The mixing weights of a task, `[N, H, K]`, even if it takes one skill whole."""
    row, mixer = model.routes.row(task), model.mixer
    weights = mixer.weights_of(row)
    if weights is None:
        own = torch.zeros(model.inventory.num_skills)
        own[row if model.adapter_config.method == "private" else 0] = 1.0
        weights = own.expand(len(mixer.routers), model.inventory.heads, -1)
    return weights.cpu().double()


def _products(gradients: Sequence[Tensor], heads: int) -> Tensor:
    """Inner products of T gradients `[r, H D]` of one factor, within each head: `[H, T, T]`."""
    stacked = torch.stack(list(gradients))
    stacked = stacked.to(torch.promote_types(stacked.dtype, torch.float32))
    tasks, rank, width = stacked.shape
    blocks = stacked.view(tasks, rank, heads, width // heads).permute(2, 0, 1, 3)
    blocks_HTD = blocks.reshape(heads, tasks, -1)
    return torch.bmm(blocks_HTD, blocks_HTD.mT).cpu().double()


def _cosines(products_TT: Tensor) -> Tensor:
    norm_T = products_TT.diagonal().clamp_min(0).sqrt()
    cosines = products_TT / (norm_T[:, None] * norm_T + EPSILON)
    is_zero = norm_T == 0
    return cosines.masked_fill(is_zero[:, None] | is_zero, torch.nan)
