"""The inventory: every skill of every adapted layer, stacked so that all layers are mixed at once.

Layers of one shape form a *stack*. One batched matrix product mixes a stack for all of its layers,
heads and tasks. This happens once per forward, outside the layers, which then apply plain factors
of rank r.

Shape letters: n layers of the stack, N routers, U distinct tasks, B examples, H heads, K skills,
r rank, D width of a head's block (d_in / H or d_out / H).
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from polyroute.config import MHRConfig
from polyroute.errors import InputError
from polyroute.layer.factors import (
    Factors,
    IA3Factors,
    LoRAFactors,
    OutputSpaceFactors,
    PlainFactors,
    WeightSpaceFactors,
)
from polyroute.layer.gated import Gate
from polyroute.layer.sites import Site
from polyroute.routes.mixing import mix_skills, pick_skills, stack_skills
from polyroute.routes.stacks import Stack, skills_like, stacks_of

__all__ = ["Inventory"]


class Inventory(nn.Module):
    """The skills of all adapted layers, in stacks.

    The parameters are `lora_a[shape]` `[n, H, K, r, d_in/H]` and `lora_b[shape]`
    `[n, H, K, r, d_out/H]`, or `ia3[shape]` `[n, H, K, 1, d_out/H]`. The rank comes before the
    width because every skinny product of forward and backward is fastest in that layout.

    The skills may be divided into *sets* of consecutive skills, so that each task mixes only the
    skills of its own set; tasks are adapted side by side in this way. Private skills form one set,
    of which each task takes one skill whole.

    Args:
        sites: the adapted layers.
        config: `adapter`, `num_heads`, `rank`, `alpha`, `combine` and `init` are read.
        num_skills: the number K of skills, those of all sets together.
        device: the device of the parameters; by default torch's.
        num_sets: the number of sets; it divides `num_skills`.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        config: MHRConfig,
        num_skills: int,
        device: torch.device | None = None,
        *,
        num_sets: int = 1,
    ) -> None:
        super().__init__()
        dtype = skills_like(sites).dtype
        self.heads = config.heads
        self.num_skills = num_skills
        self.num_sets = num_sets
        self.rank = config.rank
        self.scale = config.scale
        self.adapter = config.adapter
        self.combine: str = config.combine
        self.init = config.init
        self.stacks = stacks_of(sites)
        self.sites = tuple(sites)
        self.factor_names = ("ia3",) if config.adapter == "ia3" else ("lora_a", "lora_b")
        for factor in self.factor_names:
            self.add_module(factor, nn.ParameterDict())
        for stack, factor, parameters in self._stacked():
            skills = torch.empty(self._shape(stack, factor), dtype=dtype, device=device)
            parameters[stack.key] = nn.Parameter(skills)
        self.reset_parameters()

    def _shape(self, stack: Stack, factor: str) -> tuple[int, ...]:
        block = (stack.d_in if factor == "lora_a" else stack.d_out) // self.heads
        return len(stack.sites), self.heads, self.num_skills, self.rank, block

    @property
    def like(self) -> Tensor:
        """Some of the skills, for their type and device."""
        # Every forward asks several times, and `next(self.parameters())` is slow.
        skills: Tensor = self._stacks_of(self.factor_names[0])[self.stacks[0].key]
        return skills

    def check_memory(self) -> None:
        """Make sure that the skills have values.

        Raises:
            InputError: they are on the meta device.
        """
        if self.like.device.type == "meta":
            raise InputError(
                "the skills are on the meta device, where they have no values: give the model "
                "memory with to_empty(device=...), load the base model's weights, then fill the "
                "skills by load_adapter(folder) or set_phase('random')"
            )

    def _stacks_of(self, factor: str) -> nn.ParameterDict:
        stacks = self._modules[factor]
        assert isinstance(stacks, nn.ParameterDict)
        return stacks

    def _stacked(self) -> Iterator[tuple[Stack, str, nn.ParameterDict]]:
        """Every stack with every factor, and the dictionary that has its parameter by `key`."""
        for stack in self.stacks:
            for factor in self.factor_names:
                yield stack, factor, self._stacks_of(factor)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw A again and set B to zero ((IA)^3: all ones), so the base model computes as before.

        A is uniform within 1/sqrt(3 d_in) (`init="mttl"`) or 1/sqrt(d_in / H) (`init="peft"`).
        """
        for stack, factor, parameters in self._stacked():
            self._reset(parameters[stack.key], factor, stack)

    def _reset(
        self, skills: Tensor, factor: str, stack: Stack, generator: torch.Generator | None = None
    ) -> None:
        if factor == "lora_a":
            width = 3 * stack.d_in if self.init == "mttl" else stack.d_in / self.heads
            skills.uniform_(-1 / math.sqrt(width), 1 / math.sqrt(width), generator=generator)
        else:
            skills.fill_(1.0 if factor == "ia3" else 0.0)

    def skills_of(self, place: int, *, gradients: bool = False) -> list[Tensor]:
        """The skills of one set, or their gradients, for each stack and factor.

        Args:
            place: the number of the set.
            gradients: return the gradients of the skills instead.

        Returns:
            Views `[n, H, K / sets, r, D]`.
        """
        views = []
        for stack, _, parameters in self._stacked():
            skills = parameters[stack.key]
            whole = skills.grad if gradients else skills
            assert whole is not None
            views.append(self._set_of(whole, place))
        return views

    def _set_of(self, skills: Tensor, place: int) -> Tensor:
        size = self.num_skills // self.num_sets
        return skills[:, :, place * size : (place + 1) * size]

    @torch.no_grad()
    def redraw_set(self, place: int, seed: int) -> None:
        """Draw one set again, as `reset_parameters` does, with the same numbers on every device."""
        generator = torch.Generator().manual_seed(seed)
        for stack, factor, parameters in self._stacked():
            skills = self._set_of(parameters[stack.key], place)
            drawn = torch.empty(skills.shape)
            self._reset(drawn, factor, stack, generator)
            skills.copy_(drawn)

    @torch.no_grad()
    def fill_set(
        self,
        place: int,
        source: "Inventory",
        skill: int | None = None,
        mixture: Sequence[Tensor] | None = None,
    ) -> None:
        """Overwrite one set with skills of another inventory of the same layers.

        Args:
            place: the number of the set.
            source: the other inventory. If a set has as many skills as it, all are copied. If a
                set has one skill, that becomes `skill` of the source, their `mixture`, or the mean
                of all.
            skill: see `source`.
            mixture: for each stack the weights `[n, H, K]` of its layers.
        """
        for number, stack in enumerate(source.stacks):
            weights = None if mixture is None else mixture[number].unsqueeze(0)
            for factor in source.factor_names:
                own = self._set_of(self._stacks_of(factor)[stack.key], place)
                new = source._stacks_of(factor)[stack.key]
                if own.shape != new.shape:
                    new = source._as_one(stack, factor, skill, weights)
                own.copy_(pad(new, (0, 0, 0, own.shape[-2] - new.shape[-2])))

    def _as_one(
        self, stack: Stack, factor: str, skill: int | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """One skill, a mixture, or the average, as one plain adapter: `[n, 1, 1, r, H D]`."""
        skills: Tensor = self._stacks_of(factor)[stack.key]
        n, heads, count, rank, block = skills.shape
        if self.combine == "output" and factor != "ia3":
            if weights is None:
                weights = skills.new_full((1, n, heads, count), 1.0 / count)
            w_UnHK = weights if factor == "lora_b" else torch.ones_like(weights)
            return stack_skills(skills, w_UnHK, None).unsqueeze(1)
        if weights is not None:
            return mix_skills(skills, weights, None).unsqueeze(1)
        one = skills.mean(2, keepdim=True) if skill is None else skills[:, :, [skill]]
        # Side by side, the heads of one skill are one plain adapter.
        return one.permute(0, 2, 3, 1, 4).reshape(n, 1, 1, rank, heads * block)

    def mix(
        self,
        weights: Tensor | None,
        routers: Sequence[Tensor],
        *,
        sets: Tensor | None = None,
        gather: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> list[PlainFactors]:
        """Average the factors of the skills, for all layers and all distinct tasks at once.

            A_u[h] = sum_k w[u, h, k] A[h, k],   B_u[h] = alpha/r sum_k w[u, h, k] B[h, k]

        The blocks of A are stacked along the input, those of B along the output. This is MHR
        (Caccia et al., 2023), and with one head Poly (Ponti et al., 2022). A and B are averaged
        separately, so the result has rank r.

        With `combine="output"` the updates are averaged instead, so the result has rank K r:

            A_u = [A_1 ... A_K],   B_u[h] = alpha/r [w[u, h, 1] B[h, 1] ... w[u, h, K] B[h, K]]

        Args:
            weights: `[U, N, H, K]`, where K counts the skills of one set; None takes the only
                skill of each task's set whole.
            routers: for each stack `[n]`, the router of each of its layers.
            sets: `[U]`, the set of each task; None mixes all skills.
            gather: `[B]`, the place among the U results of the one that each example uses; None if
                U is 1, or if the U results are those of the examples in order.
            dtype: type of the result; default that of the skills.

        Returns:
            The factors of every site, without the leading axis if U is 1.
        """
        out: list[list[Tensor]] = [[] for _ in self.sites]
        for stack, router in zip(self.stacks, routers, strict=True):
            for factor in self.factor_names:
                mixed = self._mixed(stack, factor, weights, router, sets)
                if dtype is not None:
                    mixed = mixed.to(dtype)
                if mixed.shape[1] == 1:
                    mixed = mixed.squeeze(1)
                elif gather is not None:
                    # Gather once for all layers of the stack, not once in each layer.
                    mixed = mixed.index_select(1, gather)
                # Unbind once: indexing layer by layer costs a zero-filled copy each in backward.
                for place, one in zip(stack.sites, mixed.unbind(0), strict=True):
                    out[place].append(one)
        adapter = IA3Factors if self.adapter == "ia3" else LoRAFactors
        for site, factors in zip(self.sites, out, strict=True):
            # Output units that were added to the layer later have no update.
            if added := site.out_features - site.d_out:
                neutral = 1.0 if self.adapter == "ia3" else 0.0
                factors[-1] = pad(factors[-1], (0, added), value=neutral)
        return [adapter(*factors) for factors in out]

    def _mixed(
        self, stack: Stack, factor: str, weights: Tensor | None, router: Tensor, sets: Tensor | None
    ) -> Tensor:
        """One factor of all layers of a stack, `[n, U, r, H D]`, scale included.

        The arguments are those of `mix`.
        """
        skills = self._stacks_of(factor)[stack.key]
        scale = self.scale if factor == "lora_b" else 1.0
        if weights is None:
            assert sets is not None
            return pick_skills(skills, sets, scale)
        w_UnHK = weights.index_select(1, router)
        if self.combine == "output" and self.adapter == "lora":
            w_UnHK = w_UnHK * scale if factor == "lora_b" else torch.ones_like(w_UnHK)
            return stack_skills(skills, w_UnHK, sets)
        return mix_skills(skills, w_UnHK * scale if scale != 1.0 else w_UnHK, sets)

    def gated(
        self,
        site: int,
        gate: Gate,
        *,
        per_example: bool = False,
        top_k: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> Factors:
        """The skills of one site, mixed by a gate while the layer runs.

        Args:
            site: the place of the site in the list of sites.
            gate: weights over H heads and K skills, or a function that computes them from the
                layer's input; see `polyroute.layer.gated.weights_of_tokens`. In output space the
                weights may have any number of heads that divides the layer's output width.
            per_example: whether the gate is `[B, H, K]`, the weights of each example.
            top_k: the largest number of weights of a token that are not zero; None if unknown.
            dtype: type that the skills are cast to; default their own.

        Raises:
            InputError: the skills are (IA)^3.
        """
        if self.adapter == "ia3":
            raise InputError("a gate mixes LoRA skills, and these are (IA)^3: use adapter='lora'")
        tensors = self.site_tensors(site)
        a_HKrD, b_HKrD = tensors["lora_a"].mT, tensors["lora_b"] * self.scale
        if dtype is not None:
            a_HKrD, b_HKrD = a_HKrD.to(dtype), b_HKrD.to(dtype)
        if self.combine == "weight":
            return WeightSpaceFactors(a=a_HKrD, b=b_HKrD, gate=gate, per_example=per_example)
        ranks = (self.rank,) * self.num_skills
        a, b = (t.permute(1, 2, 0, 3).flatten(0, 1).flatten(1) for t in (a_HKrD, b_HKrD))
        return OutputSpaceFactors(
            a=a, b=b, gate=gate, per_example=per_example, ranks=ranks, top_k=top_k
        )

    @torch.no_grad()
    def average(self) -> None:
        """Replace the skills, in place, by their uniform mixture as the only skill, with one head.

        It computes what the uniform mixture computes (Poly-mu, MHR-mu) with 1/K of the parameters;
        in output space with all of them, as one skill of rank K r.
        """
        for stack, factor, parameters in self._stacked():
            parameters[stack.key] = nn.Parameter(self._as_one(stack, factor).clone())
        self.rank = self.rank_of_average
        self.num_skills = self.num_sets = self.heads = 1

    @property
    def rank_of_average(self) -> int:
        """The rank of the average of all skills, and of every other mixture of them."""
        return self.rank * (self.num_skills if self.combine == "output" else 1)

    @property
    def size_of_one(self) -> int:
        """The number of parameters of one adapter."""
        has_a = self.adapter == "lora"
        return self.rank * sum(has_a * site.d_in + site.d_out for site in self.sites)

    @torch.no_grad()
    def add_skill(self, source: int | None) -> None:
        """Append one skill, in place: a copy of skill `source`, or the mean of all if it is None.

        If there are no skills, it is a new one, as `reset_parameters` makes it.
        """
        for stack, factor, parameters in self._stacked():
            skills = parameters[stack.key]
            if self.num_skills == 0:
                new = skills.new_empty(*skills.shape[:2], 1, *skills.shape[3:])
                self._reset(new, factor, stack)
            elif source is None:
                new = skills.mean(2, keepdim=True)
            else:
                new = skills[:, :, source : source + 1]
            parameters[stack.key] = nn.Parameter(torch.cat([skills, new], dim=2))
        self.num_skills += 1

    @torch.no_grad()
    def keep_skills(self, skills: Sequence[int]) -> None:
        """Drop all other skills, in place, and put these in the given order."""
        for stack, _, parameters in self._stacked():
            kept = parameters[stack.key][:, :, list(skills)]
            parameters[stack.key] = nn.Parameter(kept.clone())
        self.num_skills = len(skills)

    def site_tensors(self, site: int) -> dict[str, Tensor]:
        """The skills of one layer in the layout of the published checkpoints.

        Args:
            site: the place of the layer in the list of sites.

        Returns:
            `lora_a` `[H, K, d_in/H, r]` and `lora_b` `[H, K, r, d_out/H]`, or `ia3`
            `[H, K, 1, d_out/H]`; views of the parameters.
        """
        stack = next(s for s in self.stacks if site in s.sites)
        row = stack.sites.index(site)
        tensors = {factor: self._stacks_of(factor)[stack.key][row] for factor in self.factor_names}
        if "lora_a" in tensors:
            tensors["lora_a"] = tensors["lora_a"].transpose(-1, -2)
        return tensors

    def present_at(self, site: int) -> Sequence[int]:
        """The numbers of the skills that adapt a layer."""
        return range(self.num_skills)

    def skills_at(self, site: int) -> dict[int, LoRAFactors]:
        """Each LoRA skill of a layer as one plain LoRA, by its number; heads lie side by side."""
        own = self.site_tensors(site)
        a_KrD = own["lora_a"].permute(1, 3, 0, 2).flatten(2)
        b_KrD = own["lora_b"].permute(1, 2, 0, 3).flatten(2)
        return {k: LoRAFactors(a_KrD[k], b_KrD[k]) for k in self.present_at(site)}
