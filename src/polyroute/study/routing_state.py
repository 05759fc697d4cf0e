"""How far apart training has brought the routes of tasks and the skills that they mix.

Skills that are alike make one adapter of every mixture, and routes that are uniform give every task
the same one. Either way the inventory is a single LoRA under another name, and the loss alone does
not tell.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from polyroute.data.sampling import some_places
from polyroute.model import RoutedModel
from polyroute.study.routing_measures import routing_entropy, skill_likeness

__all__ = ["COSINE", "ENTROPY", "in_words", "routing_state"]

ENTROPY = "route_entropy"
COSINE = "skill_cosine"
SAMPLED = 500
"""The most tasks that are looked at."""
UNIFORM = 0.98
"""Routes of this entropy or more count as uniform. It is that of a mixture of 8 skills in which one
has the weight .23 and the others .11 each."""
ALIKE = 0.9
"""Skills of this cosine or more count as one: what they have in common is then three times as long
as what sets each apart."""


@torch.no_grad()
def routing_state(model: RoutedModel) -> dict[str, float]:
    """Measure a model in training.

    Returns:
        `route_entropy`, the mean entropy of the tasks' mixtures as a share of the uniform one's,
        and `skill_cosine`, the mean cosine between what two skills add (their B, or the scales of
        (IA)^3). It is empty where no tasks are routed by learned logits over several skills; the
        cosine is missing while no skill adds anything.
    """
    table, mixer = model.routes, model.mixer
    if table.shape is None or table.shape[-1] == 1 or not len(table):
        return {}
    rows = table.read(some_places(len(table), SAMPLED)).view(-1, *table.shape)
    found = {ENTROPY: float(routing_entropy(mixer.weights_from(rows)).mean())}
    likeness = skill_likeness(_added(model))
    return found if likeness is None else {**found, COSINE: likeness}


def _added(model: RoutedModel) -> Iterator[Tensor]:
    """What each skill adds in one layer after another, `[K, H, r, D]`; zero where it adds nothing.

    Layer by layer, because together they would be a copy of the inventory.
    """
    inventory = model.inventory
    factor, neutral = inventory.factor_names[-1], float(inventory.adapter == "ia3")
    for stack in inventory.stacks:
        for skills_HKrD in inventory.get_parameter(f"{factor}.{stack.key}").detach():
            yield skills_HKrD.transpose(0, 1) - neutral


def in_words(log: Sequence[Mapping[str, Any]]) -> str | None:
    """What the last measurement of a log means, if the inventory is still one adapter.

    Args:
        log: entries of the trainer's log.

    Returns:
        A sentence without its end, which says what to do about it; None where routes and skills
        have come apart, or where nothing was measured.
    """
    last: Mapping[str, Any] = next((entry for entry in reversed(log) if ENTROPY in entry), {})
    entropy, cosine = last.get(ENTROPY) or 0.0, last.get(COSINE) or 0.0  # None: not finite
    why = []
    if entropy >= UNIFORM:
        why.append(f"its routes are uniform (entropy {entropy:.2f} of that of a uniform mixture)")
    if cosine >= ALIKE:
        why.append(f"its skills are alike (cosine {cosine:.2f})")
    if not why:
        return None
    return (
        f"this inventory is one adapter so far, because {' and '.join(why)}: train longer, or "
        "begin again with skills that start apart (--group-tasks for LoRA, --route-spread for any)"
    )
