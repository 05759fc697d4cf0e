"""Compile: a library becomes an inventory of few skills, and a row of weights for each LoRA.

    D_e  ~  sum_k w[e, k] b_k^T a_k       for every layer; w may be negative

where D_e is the update of LoRA e, and the skills have a rank of their own. A row is what the table
of any inventory holds, so LoRAs get neighbours, mixtures and phase z, and a hundred thousand of
them fit. The sum of squared errors falls in turns (alternating least squares): given the rows, each
skill is the best update of its rank for what the others leave (Eckart and Young, 1936); given the
skills, the rows solve a linear system. Everything happens in a core as large as the ranks.

It works as far as LoRAs share something; `errors` says how far, for each.

Shape letters: E LoRAs, K skills, R the ranks of all LoRAs of a layer, r rank of a skill.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polyroute.build import attach
from polyroute.config import Granularity, MHRConfig
from polyroute.errors import InputError
from polyroute.layer.factors import LoRAFactors
from polyroute.layer.granularity import routers_of
from polyroute.library.attaching import library_of
from polyroute.library.delta import by_owner
from polyroute.library.library import Library
from polyroute.model import RoutedModel
from polyroute.settings import number, whole

__all__ = ["Compiled", "compile_library"]

TURNS = 30
"""Of the alternation; it starts near its end, at the leading directions among the LoRAs."""
SMALL = 1e-12
"""Guards divisions by what can be zero, and bounds what a system of rows takes for zero."""


@dataclass(frozen=True)
class Compiled:
    """An inventory in place of a library."""

    model: RoutedModel
    """It has a task for each LoRA."""
    errors: dict[str, float]
    """For each LoRA the share of its norm that the inventory misses."""


class _Core:
    """One layer of all LoRAs, in orthonormal bases of their inputs and outputs."""

    def __init__(self, factors: Sequence[LoRAFactors | None]) -> None:
        there = [own for own in factors if own is not None]
        # On the CPU, where the rows are, whatever device the model is on.
        a_Rd, b_Rd = (
            torch.cat([getattr(own, f).detach().double().cpu() for own in there])
            for f in ("a", "b")
        )
        self.basis_a, upper_a = torch.linalg.qr(a_Rd.t())
        self.basis_b, upper_b = torch.linalg.qr(b_Rd.t())
        self.inner_a, self.inner_b = upper_a.t(), upper_b.t()
        self.loras = len(factors)
        ranks = [0 if own is None else len(own.a) for own in factors]
        self.owner = torch.tensor([e for e, rank in enumerate(ranks) for _ in range(rank)])
        products = (self.inner_a @ self.inner_a.t()) * (self.inner_b @ self.inner_b.t())
        self.gram = by_owner(products, self.owner, self.owner, self.loras, self.loras)
        self.skills_a: Tensor = torch.empty(0)
        self.skills_b: Tensor = torch.empty(0)

    def weighted(self, weights_E: Tensor) -> Tensor:
        """The weighted sum of the LoRAs, `[R, R]`, outputs first."""
        total: Tensor = (self.inner_b * weights_E[self.owner, None]).t() @ self.inner_a
        return total

    def skill(self, k: int) -> Tensor:
        """One skill, `[R, R]`."""
        return self.skills_b[k].t() @ self.skills_a[k]

    def fit(self, rows_EK: Tensor, k: int, rank: int) -> None:
        """Make one skill the best for what the others leave."""
        own_E = rows_EK[:, k]
        size = own_E.square().sum().clamp(min=SMALL)
        left = self.weighted(own_E)
        for j, shared in enumerate((own_E @ rows_EK).tolist()):
            if j != k:
                left = left - shared * self.skill(j)
        u, s, v = torch.linalg.svd(left / size, full_matrices=False)
        roots = s[:rank, None].sqrt()
        self.skills_a[k, : len(roots)] = roots * v[:rank]
        self.skills_b[k, : len(roots)] = roots * u[:, :rank].t()

    def start(self, rows_EK: Tensor, rank: int) -> None:
        """Begin with skills that ignore one another."""
        count = rows_EK.shape[1]
        self.skills_a = torch.zeros(count, rank, self.basis_a.shape[1], dtype=torch.float64)
        self.skills_b = torch.zeros(count, rank, self.basis_b.shape[1], dtype=torch.float64)
        for k in range(count):
            self.fit(rows_EK, k, rank)

    def products(self) -> tuple[Tensor, Tensor]:
        """Inner products of LoRAs with skills `[E, K]`, and of skills `[K, K]`."""
        count = len(self.skills_a)
        flat_a, flat_b = (t.flatten(0, 1) for t in (self.skills_a, self.skills_b))
        of_skill = torch.arange(count).repeat_interleave(self.skills_a.shape[1])
        mixed = (self.inner_a @ flat_a.t()) * (self.inner_b @ flat_b.t())
        own = (flat_a @ flat_a.t()) * (flat_b @ flat_b.t())
        return (
            by_owner(mixed, self.owner, of_skill, self.loras, count),
            by_owner(own, of_skill, of_skill, count, count),
        )


def compile_library(
    base_model: nn.Module,
    library: Library,
    *,
    num_skills: int,
    rank: int | None = None,
    granularity: Granularity = "coarsegrained",
    most_error: float = 0.5,
) -> Compiled:
    """Attach an inventory of few skills that stands for a library, all of which is in memory.

    Args:
        base_model: the model that the LoRAs were trained on.
        library: the LoRAs.
        num_skills: the number K of skills.
        rank: of a skill; by default the largest of the library.
        granularity: layers that share weights; more rows fit better and are more numbers.
        most_error: the largest mean of `errors` that is taken.

    Raises:
        InputError: a number is out of range; the library belongs to another base model; or its
            LoRAs share so little that more than `most_error` would be lost.
    """
    whole()("num_skills", num_skills)
    number(above=0)("most_error", most_error)
    if rank is None:
        rank = max(r for own in library.ranks.values() for r in own.values())
    names = list(library)
    config = MHRConfig(
        method="poly", num_skills=num_skills, rank=rank, combine="output", normalization="none",
        granularity=granularity,
    )  # fmt: skip
    with_all = attach(base_model, library)  # checks that it fits, and knows the layers' names
    layers = [site.name for site in with_all.sites]
    inventory = library_of(with_all)
    cores = [
        _Core([own if len((own := inventory.skill(i, e)).a) else None for e in range(len(names))])
        for i in range(len(layers))
    ]
    with_all.unload()
    routers, router_of = routers_of(layers, granularity)
    rows_NEK = torch.stack([
        _alternate([core for core, own in zip(cores, router_of, strict=True) if own == router],
                   len(names), num_skills, rank)
        for router in range(len(routers))
    ])  # fmt: skip
    errors = _errors(cores, rows_NEK, router_of, names)
    mean = sum(errors.values()) / len(errors)
    if mean > most_error:
        raise InputError(
            f"these {len(names)} LoRAs share too little: {num_skills} skills of rank {rank} miss "
            f"{mean:.0%} of them; take more skills, keep the library as it is, or raise most_error"
        )
    model = attach(base_model, config, names, sites=layers)
    _fill(model, cores, rows_NEK)
    return Compiled(model, errors)


def _alternate(cores: Sequence[_Core], loras: int, skills: int, rank: int) -> Tensor:
    """The rows `[E, K]` of layers that share weights; the cores then have their skills."""
    if loras <= skills:  # each LoRA is a skill
        alone_EK = torch.eye(loras, skills, dtype=torch.float64)
        for core in cores:
            core.start(alone_EK, rank)
        return alone_EK
    gram_EE = torch.stack([core.gram for core in cores]).sum(0)
    _, vectors = torch.linalg.eigh(gram_EE)
    rows_EK: Tensor = vectors.flip(1)[:, :skills]
    for core in cores:
        core.start(rows_EK, rank)
    for _ in range(TURNS):
        shared_EK = torch.zeros(loras, skills, dtype=torch.float64)
        own_KK = torch.zeros(skills, skills, dtype=torch.float64)
        for core in cores:
            mixed, own = core.products()
            shared_EK += mixed
            own_KK += own
        rows_EK = shared_EK @ torch.linalg.pinv(own_KK, hermitian=True, rtol=SMALL)
        for core in cores:
            for k in range(skills):
                core.fit(rows_EK, k, rank)
    return rows_EK


def _errors(
    cores: Sequence[_Core], rows_NEK: Tensor, router_of: Sequence[int], names: Sequence[str]
) -> dict[str, float]:
    lost_E = torch.zeros(len(names), dtype=torch.float64)
    size_E = torch.zeros_like(lost_E)
    for core, router in zip(cores, router_of, strict=True):
        mixed, own = core.products()
        rows_EK, squares_E = rows_NEK[router], core.gram.diagonal()
        size_E += squares_E
        lost_E += squares_E + ((rows_EK @ own - 2 * mixed) * rows_EK).sum(1)
    shares = (lost_E.clamp(min=0) / size_E.clamp(min=1e-300)).sqrt().tolist()
    return dict(zip(names, shares, strict=True))


@torch.no_grad()
def _fill(model: RoutedModel, cores: Sequence[_Core], rows_NEK: Tensor) -> None:
    for i, core in enumerate(cores):
        own = model.inventory.site_tensors(i)
        a_Krd = core.skills_a @ core.basis_a.t()
        b_Krd = core.skills_b @ core.basis_b.t()
        own["lora_a"].copy_(a_Krd.mT.unsqueeze(0))
        own["lora_b"].copy_(b_Krd.unsqueeze(0))
    for e, name in enumerate(model.tasks):
        model.routes[name] = rows_NEK[:, e, None].to(model.inventory.like)
