"""Where the route of a new task starts: near the training tasks that answer its examples best.

To try every training task on the examples would cost more than adapting does. One backward pass at
the uniform mixture tells, to first order, how much each would help:

    L(w_t) - L(u) ~ <dL/dw (u), w_t - u>,   and   dL/dw = 2 K dL/dz at z = 0, up to a constant in k

where w_t are the weights of task t, u the uniform weights and z the logits. That is one product
with the table of all tasks. (It holds where weights are normalised to sum to one; under another
normalization the factor differs, and the constant does not quite cancel.) Only the few tasks that
promise most are then tried.

Shape letters: S slots, T training tasks, C candidates, N routers, H heads, K skills.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from polyroute.adapting.row_batches import losses_of
from polyroute.adapting.slots import Slots
from polyroute.kinds.batches import Row, evaluating
from polyroute.kinds.choose import ModelKind
from polyroute.kinds.packing import Packing
from polyroute.model import RoutedModel
from polyroute.routes.weights import uniform_weights

__all__ = ["nearest_routes"]

TRIED = 8
"""For each slot the loss of this many candidates is measured."""
FIRST = 8
"""On this many of the slot's examples; on the others only that of the best."""
KEPT = 2
"""So many are the best."""
AT_ONCE = 128
"""The gradients of this many slots are taken together."""
COMPARED_AT_ONCE = 2**24
"""This many numbers of the table are compared at once."""


def nearest_routes(
    model: RoutedModel, kind: ModelKind, examples: Mapping[str, Sequence[Row]], tokens: int
) -> dict[str, Tensor]:
    """For each new task, the mean of the best candidates' logits, weighted by their likelihood.

    A candidate with mean loss L_c over n examples has the weight `softmax(-n L_c)`. That is the
    posterior probability that the examples come from it, if all candidates are equally likely
    before. One that is not among the best on the first examples has the weight 0.

    Args:
        model: a trained inventory with routes.
        kind: how its base model learns.
        examples: the training rows of each new task.
        tokens: most tokens in one forward.

    Returns:
        Logits `[N, H, K]`, by the names of `examples`.
    """
    shape = model.routes.shape
    assert shape is not None
    packing = kind.packing_of(model, model.routes.names[0])
    found: dict[str, Tensor] = {}
    names = list(examples)
    for start in range(0, len(names), AT_ONCE):
        chosen = names[start : start + AT_ONCE]
        own = [examples[name] for name in chosen]
        candidates_SC = _promising(model, kind, own, tokens, packing)
        with evaluating(model):
            sums_SC = _sums(model, kind, candidates_SC, own, tokens, packing)
        for name, rows, sums_C in zip(chosen, candidates_SC, sums_SC, strict=True):
            share_C = torch.softmax(-sums_C, 0)
            logits_CW = model.routes.read(rows.tolist())
            found[name] = (share_C.to(logits_CW) @ logits_CW).view(shape)
    return found


def _sums(
    model: RoutedModel,
    kind: ModelKind,
    candidates_SC: Tensor,
    examples: Sequence[Sequence[Row]],
    tokens: int,
    packing: Packing | None,
) -> Tensor:
    """The loss of each candidate, summed over examples, `[S, C]`; infinite if it is not kept."""

    def add(chosen_SC: Tensor, rows_S: Sequence[Sequence[Row]]) -> None:
        places = list(map(tuple, chosen_SC.nonzero().tolist()))
        if places:
            tried = [(tasks[int(candidates_SC[place])], rows_S[place[0]]) for place in places]
            losses = losses_of(model, kind, tried, tokens, packing=packing)
            for place, (_, rows), loss in zip(places, tried, losses, strict=True):
                sums_SC[place] += loss * len(rows)

    tasks = model.routes.names
    # Slots have their examples in random order.
    first, others = zip(*((rows[:FIRST], rows[FIRST:]) for rows in examples), strict=True)
    sums_SC = torch.zeros(candidates_SC.shape, dtype=torch.float64)
    add(torch.ones_like(sums_SC), first)
    is_best_SC = sums_SC.argsort(1).argsort(1) < KEPT
    has_others_S1 = torch.tensor([[bool(rows)] for rows in others])
    add(is_best_SC & has_others_S1, others)
    return sums_SC.masked_fill(~is_best_SC & has_others_S1, torch.inf)


def _promising(
    model: RoutedModel,
    kind: ModelKind,
    examples: Sequence[Sequence[Row]],
    tokens: int,
    packing: Packing | None,
) -> Tensor:
    """Numbers of the rows of the table that promise the lowest loss, `[S, C]`, best first."""
    assert model.routes.logits is not None
    assert model.routes.shape is not None
    shape, table_TW = model.routes.shape, model.routes.logits.detach()
    with torch.enable_grad(), Slots(model, "z", len(examples)) as slots:
        for place in range(len(examples)):
            slots.start(place, seed=0, init=table_TW.new_zeros(shape))
        batches = list(zip(slots.names, examples, strict=True))
        losses_of(model, kind, batches, tokens, backward=True, packing=packing)
        assert slots.routes.logits is not None
        assert slots.routes.logits.grad is not None
        gradient_SW = slots.routes.logits.grad.clone()
        slots.zero_grad()
    scores = []
    for rows in torch.split(table_TW, max(1, COMPARED_AT_ONCE // table_TW.shape[1])):
        weights = model.mixer.weights_from(rows.view(-1, *shape))
        scores.append(gradient_SW @ (weights - uniform_weights(weights)).flatten(1).t())
    scores_ST = torch.cat(scores, dim=1)
    return scores_ST.topk(min(TRIED, scores_ST.shape[1]), dim=1, largest=False).indices
