"""Skills of any ranks, each for some of the layers: LoRAs that were made apart.

Their ranks lie one after another without padding: of a stack, layer after layer, and in a layer
skill after skill. What (A, B) computes is also computed by (M^-1 A, M B), so factors of LoRAs that
were made apart have no mean. Such skills are therefore combined in output space alone:

    A_u = [A_1 ... A_K],   B_u = [w[u, 1] B_1 ... w[u, K] B_K]

A skill that does not adapt a layer adds nothing there, and the weights of the others stay as they
are.

Shape letters: n layers of the stack, U distinct tasks, K skills, r rank of a mixture, R the ranks
of all skills and layers of a stack together.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from polyroute.config import MHRConfig
from polyroute.layer.factors import Factors, LoRAFactors, OutputSpaceFactors, PlainFactors
from polyroute.layer.gated import Gate
from polyroute.layer.sites import Site
from polyroute.routes.index import index_on
from polyroute.routes.inventory import Inventory
from polyroute.routes.stacks import Stack

__all__ = ["RaggedInventory", "make_inventory"]


def make_inventory(
    sites: Sequence[Site],
    config: MHRConfig,
    num_skills: int,
    ranks: Sequence[Sequence[int]] | None,
    device: torch.device | None = None,
) -> Inventory:
    """An inventory: of one rank or, if ranks are given, of these; on the device of its layers."""
    device = sites[0].device if device is None else device
    if ranks is None:
        return Inventory(sites, config, num_skills, device)
    return RaggedInventory(sites, config, ranks, device)


class RaggedInventory(Inventory):
    """Skills of any ranks; the parameters are `lora_a[shape]` `[R, d_in]` and `lora_b[shape]`.

    Args:
        sites: the adapted layers.
        config: the settings; one head, and the largest rank.
        ranks: for each site the rank of each skill, 0 if it does not adapt the layer.
        device: the device of the parameters; by default torch's.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        config: MHRConfig,
        ranks: Sequence[Sequence[int]],
        device: torch.device | None = None,
    ) -> None:
        self.ranks = tuple(tuple(of_site) for of_site in ranks)
        super().__init__(sites, config, len(self.ranks[0]), device)
        self.combine = "output"

    def _shape(self, stack: Stack, factor: str) -> tuple[int, ...]:
        total = sum(sum(self.ranks[site]) for site in stack.sites)
        return total, stack.d_in if factor == "lora_a" else stack.d_out

    def _places(self, stack: Stack, skills: Sequence[int]) -> list[list[int]]:
        """For each layer of a stack the rows of some skills, in their order."""
        found, start = [], 0
        for site in stack.sites:
            starts = []
            for rank in self.ranks[site]:
                starts.append(start)
                start += rank
            own = [range(starts[k], starts[k] + self.ranks[site][k]) for k in skills]
            found.append([row for rows in own for row in rows])
        return found

    def _taken(
        self, stack: Stack, factor: str, sets: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor]:
        """The factor of some sets of skills, filled up to one rank, `[n, U, r, D]`, and its mask.

        The mask `[n, U, r, 1]` is 0 where a row fills up.
        """
        flat = self._stacks_of(factor)[stack.key]
        by_set = [self._places(stack, skills) for skills in sets]
        rank = max(1, *(len(rows) for layers in by_set for rows in layers))
        n, count = len(stack.sites), len(sets)
        rows, mask = [], []
        for layer in range(n):
            for layers in by_set:
                own = layers[layer]
                rows += [*own, *[0] * (rank - len(own))]
                mask += [*[1] * len(own), *[0] * (rank - len(own))]
        if not len(flat):  # no skill adapts these layers any more
            return flat.new_zeros(n, count, rank, flat.shape[1]), flat.new_zeros(n, count, rank, 1)
        picked = flat.index_select(0, index_on(flat.device, tuple(rows)))
        is_own = index_on(flat.device, tuple(mask)).to(flat.dtype)
        return picked.view(n, count, rank, -1), is_own.view(n, count, rank, 1)

    def _mixed(
        self, stack: Stack, factor: str, weights: Tensor | None, router: Tensor, sets: Tensor | None
    ) -> Tensor:
        if weights is None:
            assert sets is not None
            taken, mask = self._taken(stack, factor, [[skill] for skill in sets.tolist()])
            # One of both is enough, because the update is their product.
            return taken * mask if factor == "lora_b" else taken
        taken, mask = self._taken(stack, factor, [range(self.num_skills)])
        if factor == "lora_a":
            return taken.expand(-1, len(weights), -1, -1)
        return taken * (self._by_rank(stack, weights, router, taken.shape[2]) * mask)

    def _by_rank(self, stack: Stack, weights: Tensor, router: Tensor, rank: int) -> Tensor:
        """The weights `[U, N, 1, K]` of skills as those of their ranks, `[n, U, r, 1]`."""
        owners: list[int] = []
        for site in stack.sites:
            own = [skill for skill, count in enumerate(self.ranks[site]) for _ in range(count)]
            owners += [*own, *[0] * (rank - len(own))]
        owner = index_on(weights.device, tuple(owners)).view(len(stack.sites), rank)
        w_UnK = weights.index_select(1, router).squeeze(2)
        w_Unr = w_UnK.gather(2, owner.expand(len(weights), -1, -1))
        return w_Unr.transpose(0, 1).unsqueeze(-1)

    def mix(
        self,
        weights: Tensor | None,
        routers: Sequence[Tensor],
        *,
        sets: Tensor | None = None,
        gather: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> list[PlainFactors]:
        """The factors of every site, as those of `Inventory.mix` with `combine="output"`.

        Tasks of one forward that have different ranks are filled up to the largest with zeros. A
        single one has its own ranks, which may be 0.
        """
        found = super().mix(weights, routers, sets=sets, gather=gather, dtype=dtype)
        chosen = weights if sets is None else sets
        if chosen is None or len(chosen) > 1:
            return found
        skill = None if weights is not None or sets is None else int(sets[0])
        trimmed: list[PlainFactors] = []
        for own, ranks in zip(found, self.ranks, strict=True):
            assert isinstance(own, LoRAFactors)
            rank = sum(ranks) if skill is None else ranks[skill]
            trimmed.append(LoRAFactors(own.a[:rank], own.b[:rank]))
        return trimmed

    def gated(
        self,
        site: int,
        gate: Gate,
        *,
        per_example: bool = False,
        top_k: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> Factors:
        """The skills of one site, whose updates a gate averages while the layer runs."""
        own = self.site_tensors(site)
        return OutputSpaceFactors(
            a=own["lora_a"] if dtype is None else own["lora_a"].to(dtype),
            b=own["lora_b"] if dtype is None else own["lora_b"].to(dtype),
            gate=gate, per_example=per_example, ranks=self.ranks[site], top_k=top_k,
        )  # fmt: skip

    def site_tensors(self, site: int) -> dict[str, Tensor]:
        """The ranks of all skills of one layer: `lora_a` `[R, d_in]`, `lora_b` `[R, d_out]`."""
        stack = next(s for s in self.stacks if site in s.sites)
        before = stack.sites[: stack.sites.index(site)]
        start = sum(sum(self.ranks[other]) for other in before)
        size = sum(self.ranks[site])
        return {
            factor: self._stacks_of(factor)[stack.key][start : start + size]
            for factor in self.factor_names
        }

    def present_at(self, site: int) -> Sequence[int]:
        """The numbers of the skills that adapt a layer."""
        return [skill for skill, rank in enumerate(self.ranks[site]) if rank]

    def skills_at(self, site: int) -> dict[int, LoRAFactors]:
        """The skills that adapt a layer, by number; see `skill`."""
        return {skill: self.skill(site, skill) for skill in self.present_at(site)}

    def skill(self, site: int, skill: int) -> LoRAFactors:
        """One skill of one layer, as views of the parameters; of rank 0 if it has none there."""
        start = sum(self.ranks[site][:skill])
        rows = slice(start, start + self.ranks[site][skill])
        own = self.site_tensors(site)
        return LoRAFactors(own["lora_a"][rows], own["lora_b"][rows])

    def _as_one(
        self, stack: Stack, factor: str, skill: int | None = None, weights: Tensor | None = None
    ) -> Tensor:
        assert weights is None, "tasks of a library have no weights"
        skills = [skill] if skill is not None else range(self.num_skills)
        taken, mask = self._taken(stack, factor, [skills])
        if factor == "lora_b":
            share = 1.0 if skill is not None else 1.0 / self.num_skills
            taken = taken * mask * share
        return taken.unsqueeze(1)

    @property
    def rank_of_average(self) -> int:
        """The rank of the mixture of all skills, in the layer where it is largest."""
        return max(map(sum, self.ranks))

    @property
    def size_of_one(self) -> int:
        """The number of parameters of the largest adapter."""
        widths = [site.d_in + site.d_out for site in self.sites]
        return max(
            sum(width * ranks[k] for width, ranks in zip(widths, self.ranks, strict=True))
            for k in range(self.num_skills)
        )

    @torch.no_grad()
    def average(self) -> None:
        """Replace the skills, in place, by their mean as the only skill."""
        for stack in self.stacks:
            self._stacks_of("lora_b")[stack.key].div_(self.num_skills)
        self.ranks = tuple((sum(of_site),) for of_site in self.ranks)
        self.rank = self.rank_of_average
        self.num_skills = 1

    @torch.no_grad()
    def add_skill(self, source: int | None) -> None:
        """Append one skill, in place: a copy of skill `source`, or the mean of all if it is None.

        The mean has the ranks of all skills together.
        """
        kept = list(range(self.num_skills))
        new = kept if source is None else [source]
        share = 1.0 / len(new)
        self._rearrange([*([k] for k in kept), new], [*[1.0] * len(kept), share])

    @torch.no_grad()
    def keep_skills(self, skills: Sequence[int]) -> None:
        """Drop all other skills, in place, and put these in the given order."""
        self._rearrange([[k] for k in skills], [1.0] * len(skills))

    def _rearrange(self, skills: Sequence[Sequence[int]], shares: Sequence[float]) -> None:
        """Replace the skills, in place, by sums of some of them, each times its share."""
        for stack, factor, parameters in self._stacked():
            flat = parameters[stack.key]
            by_new = [self._places(stack, own) for own in skills]
            parts = []
            for layer in range(len(stack.sites)):
                for places, share in zip(by_new, shares, strict=True):
                    own = flat.detach()[places[layer]]
                    parts.append(own * share if factor == "lora_b" else own)
            parameters[stack.key] = nn.Parameter(torch.cat(parts), flat.requires_grad)
        self.ranks = tuple(
            tuple(sum(of_site[k] for k in own) for own in skills) for of_site in self.ranks
        )
        self.num_skills = len(skills)
        self.rank = max(1, *(rank for of_site in self.ranks for rank in of_site))
