"""Which LoRAs of a library promise to help: one forward and backward ranks all of them.

At the base model, the loss L changes with the weight w_e of LoRA e in a layer by

    dL/dw_e = sum over tokens of (x a_e^T) . (b_e dL/dy)

so the gradient of zero weights says for every LoRA and layer how much a little of it would help. It
costs two products with all ranks, whatever the number of LoRAs. Choosing by relevance and then by
diversity is that of "Leveraging Open Knowledge" (Yang et al., 2024), here with the cosine between
updates as the likeness.

Shape letters: E skills, S sites.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polyroute.errors import InputError
from polyroute.kinds.batches import Row, evaluating
from polyroute.kinds.choose import ModelKind
from polyroute.library.attaching import library_of
from polyroute.library.delta import Delta, cosines, inner_products
from polyroute.library.static import Static
from polyroute.model import RoutedModel
from polyroute.settings import number, whole

__all__ = ["Ranking", "rank_skills"]


@dataclass(frozen=True)
class Ranking:
    """How much a little of each LoRA would lower the loss on some examples."""

    names: tuple[str, ...]
    """Of the LoRAs, as in the model."""
    by_site: Tensor
    """The decrease of the loss for a unit of weight, `[S, E]`; negative where it would rise."""
    alike: Tensor
    """The cosines between the updates, `[E, E]`."""

    @property
    def scores(self) -> dict[str, float]:
        """The decrease by name, over all layers, largest first."""
        total = self.by_site.sum(0).tolist()
        pairs = sorted(zip(self.names, total, strict=True), key=lambda pair: -pair[1])
        return dict(pairs)

    def top(self, count: int, *, diversity: float = 0.0) -> list[str]:
        """The names of the best.

        Args:
            count: how many, or as many as there are.
            diversity: from 0 to 1. The score of a LoRA loses this share, times the largest cosine
                with those that were chosen before.
        """
        whole()("count", count)
        number(least=0, most=1)("diversity", diversity)
        scores = self.by_site.sum(0).double()
        likeness, chosen = torch.zeros_like(scores), list[int]()
        for _ in range(min(count, len(self.names))):
            left = scores - diversity * likeness * scores.abs()
            left[chosen] = -torch.inf
            best = int(left.argmax())
            chosen.append(best)
            likeness = torch.maximum(likeness, self.alike[best].to(scores))
        return [self.names[place] for place in chosen]


def rank_skills(
    model: RoutedModel, kind: ModelKind, rows: Sequence[Row], *, batch_size: int = 8
) -> Ranking:
    """Rank the LoRAs of an attached library by a few examples of a task.

    Args:
        model: has the library.
        kind: how its base model learns.
        rows: encoded examples, see `polyroute.study.examples.encoded`.
        batch_size: examples in a forward.

    Raises:
        InputError: there is no example, or the model has no library.
    """
    library_of(model)
    model.check_unmerged()
    whole()("batch_size", batch_size)
    if not len(rows):
        raise InputError("give at least one example to rank LoRAs by")
    rule = Static(model, granularity="finegrained")
    gradient = torch.zeros_like(rule.weights)
    with evaluating(model), torch.enable_grad():
        for start in range(0, len(rows), batch_size):
            places = range(start, min(start + batch_size, len(rows)))
            batch = kind.collate([{**rows[i], "task": rule} for i in places])
            (own,) = torch.autograd.grad(kind.loss(model, batch), [rule.weights])
            gradient += own * (len(places) / len(rows))
    return Ranking(model.tasks, -gradient, _cosines(model))


@torch.no_grad()
def _cosines(model: RoutedModel) -> Tensor:
    inventory = library_of(model)
    deltas = [
        Delta({s.name: inventory.skill(i, k) for i, s in enumerate(model.sites)}, {})
        for k in range(inventory.num_skills)
    ]
    return cosines(inner_products(deltas, deltas))
