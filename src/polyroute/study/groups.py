"""Start an inventory with a group of tasks on each skill, so that its skills come to differ.

Skills that start alike, with routes that start uniform, get the same gradient: for long they are
one LoRA under several names. Here tasks whose gradients agree at the base model start on one skill:

    x_t = sum over sites of G_t / |G_t|,   similarity(t, u) = cosine of x_t - m and x_u - m

with G_t the gradient of the task's loss for the adapter's factors at that site, and m the mean of
all x. Groups are those of k-means in which no group has more than its share of tasks. The logit
of a task is 3 for the skill of its group and -3 for the others. All skills share one A, since a
mixture of A's that were drawn apart would be shorter than each. This way of starting is our own;
docs/paper.md has what it does.

With as many skills as tasks each task has one of its own, which no gradient has to find, and the
logits of the others are -6: there are many of them, and together they would outweigh it. With
`shared_skill` a last skill is on for all tasks beside these, as in C-Poly (Wang et al. 2023,
arXiv:2312.03248).

A gradient is kept as a sketch (Charikar et al. 2002: its numbers, with random signs, added up in
random places), whose inner products are those of the gradients up to 1 / sqrt(SKETCH).

Shape letters: T tasks, G groups, S numbers of a sketch, N routers, H heads, K skills, n sites, r
rank, D width of a head's block.
"""

from collections.abc import Mapping, Sequence

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from polyroute.data.sampling import draw_few_shot
from polyroute.errors import InputError
from polyroute.host.progress import progress
from polyroute.kinds.choose import ModelKind
from polyroute.model import RoutedModel
from polyroute.study.examples import task_sizes
from polyroute.study.gradients import differentiating, gradients

__all__ = ["balanced_groups", "share_one_a", "start_in_groups"]

LOGIT, ALONE = 3.0, 6.0
"""The logit of the skill of a task's group; the others have its negative or, where each task has a
skill of its own, the negative of the second."""
SKETCH = 2**14
MOST_TASKS = 1000
"""So many tasks are grouped by gradients; the others start uniform."""
AT_ONCE = 16
"""Examples in a forward."""
RESTARTS = 20
ROUNDS = 100


def start_in_groups(
    model: RoutedModel,
    kind: ModelKind,
    rows: datasets.Dataset,
    *,
    examples: int = 8,
    seed: int = 0,
) -> dict[str, int]:
    """Give each skill of a fresh inventory a group of tasks whose gradients agree.

    With as many skills as tasks each task gets its own. Otherwise at most 1,000 tasks, drawn at
    random, are grouped, and the others start as they are.

    Args:
        model: a fresh inventory with routes, whose B is zero; its A and its table change.
        kind: how its base model learns.
        rows: the training rows, task after task (`polyroute.encoded_mixture`).
        examples: how many of each task are drawn; each costs a forward and a backward.
        seed: of what is drawn.

    Returns:
        The skill of each task that was grouped.

    Raises:
        InputError: the inventory has no routes, has more skills than there are tasks, or has been
            trained; or a task is not in its table.
    """
    sizes = task_sizes(rows)
    first_T = np.cumsum([0, *sizes[:-1]]).tolist()
    names = list(rows.select(first_T)["task"])
    _check(model, names)
    share_one_a(model)
    if _num_groups(model) == len(names):
        groups, others = {name: skill for skill, name in enumerate(names)}, -ALONE
    else:
        places = {n: range(i, i + size) for n, i, size in zip(names, first_T, sizes, strict=True)}
        groups, others = _by_gradients(model, kind, rows, places, examples, seed), -LOGIT
    if model.adapter_config.normalization in ("l2", "none"):
        others = 0.0  # logits are weights there, and a negative one would subtract a skill
    shape = model.routes.shape
    assert shape is not None
    for name, skill in groups.items():
        logits_NHK = torch.full(shape, others)
        logits_NHK[..., skill] = LOGIT
        model.routes[name] = logits_NHK
    return groups


def _by_gradients(
    model: RoutedModel,
    kind: ModelKind,
    rows: datasets.Dataset,
    places: Mapping[str, range],
    examples: int,
    seed: int,
) -> dict[str, int]:
    """The skill of each task, by the gradients of some of its examples; `places` are their rows."""
    names = list(places)
    generator = np.random.default_rng(seed)
    chosen = np.sort(generator.permutation(len(names))[:MOST_TASKS])
    sketches = []
    with differentiating(model):
        for name in progress([names[task] for task in chosen], "grouping tasks"):
            there = places[name]
            drawn = draw_few_shot(len(there), min(examples, len(there)), seed)
            own = list(rows.select([there[place] for place in drawn]))
            found = gradients(model, kind, own, name, AT_ONCE)
            sketches.append(_sketch([torch.cat([g.flatten() for g in site]) for site in found]))
    skills = balanced_groups(torch.stack(sketches).numpy(), _num_groups(model), seed)
    return {names[task]: skill for task, skill in zip(chosen, skills, strict=True)}


@torch.no_grad()
def share_one_a(model: RoutedModel) -> None:
    """Give all skills the same A, so that every mixture of them has its size."""
    for stack in model.inventory.stacks:
        a_nHKrD = model.inventory.get_parameter(f"lora_a.{stack.key}")
        a_nHKrD.copy_(a_nHKrD[:, :, :1].expand_as(a_nHKrD))


def _check(model: RoutedModel, names: Sequence[str]) -> None:
    if model.routes.shape is None or model.adapter_config.adapter != "lora":
        raise InputError("only LoRA skills with routes can start in groups: choose mhr or poly")
    skills, grouped = _num_groups(model), min(len(names), MOST_TASKS)
    if skills > grouped and skills != len(names):
        raise InputError(
            f"{grouped} tasks cannot start in groups on {skills} skills: choose fewer skills"
        )
    for name in names:
        model.routes.row(name)
    for stack in model.inventory.stacks:
        if bool(model.inventory.get_parameter(f"lora_b.{stack.key}").any()):
            raise InputError("only a fresh inventory can start in groups; this one is trained")


def _num_groups(model: RoutedModel) -> int:
    """How many skills get a group: all but one that is on for every task."""
    return model.inventory.num_skills - model.adapter_config.shared_skill


def _sketch(sites: Sequence[Tensor]) -> Tensor:
    """The sum over sites of unit gradients, `[S]`; the same places and signs for every task."""
    generator = torch.Generator().manual_seed(0)
    sketch_S = torch.zeros(SKETCH, dtype=torch.float64)
    for gradient in sites:
        own = gradient.detach().cpu().double()
        places = torch.randint(SKETCH, own.shape, generator=generator)
        signs = torch.randint(2, own.shape, generator=generator) * 2 - 1
        norm = own.norm()
        if torch.isfinite(norm) and norm > 0:
            sketch_S.index_add_(0, places, own * signs / norm)
    return sketch_S


def balanced_groups(vectors_TS: NDArray[np.float64], groups: int, seed: int = 0) -> list[int]:
    """k-means by direction, in which no group has more than its share; the best of several starts.

    Args:
        vectors_TS: a vector of each task; what they have in common is subtracted.
        groups: how many.
        seed: of the starts.

    Returns:
        The group of each task.
    """
    centred_TS = vectors_TS - vectors_TS.mean(0)
    norm_T1 = np.linalg.norm(centred_TS, axis=1, keepdims=True)
    unit_TS = centred_TS / np.maximum(norm_T1, 1e-12)
    similarity_TT = unit_TS @ unit_TS.T
    tasks = len(vectors_TS)
    places = np.arange(tasks) % groups
    generator = np.random.default_rng(seed)
    best, best_score = places, -np.inf
    for _ in range(RESTARTS):
        own = generator.permutation(places)
        score = -np.inf
        for _ in range(ROUNDS):
            # The mean inner product with a group's members is that with its centroid.
            closeness_TG = similarity_TT @ np.eye(groups)[own] / np.bincount(own)
            _, seats = linear_sum_assignment(-closeness_TG[:, places])
            found = places[seats]
            new = float(closeness_TG[np.arange(tasks), found].sum())
            if new <= score + 1e-12:
                break
            own, score = found, new
        if score > best_score:
            best, best_score = own, score
    return [int(group) for group in best]
