"""The inventory: every skill of every adapted layer, stacked so that all layers are mixed at once.

Layers of one shape form a *stack*. Mixing a stack is one batched matrix product for all its layers,
heads and tasks; it happens once per forward, outside the layers, which then see plain rank-r
factors.

Shape letters: n layers of the stack, U distinct tasks, B examples, H heads, K skills, r rank,
D width of a head's block (d_in / H or d_out / H).
"""

import math
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from polyroute.config import MHRConfig
from polyroute.layer.factors import Factors, IA3Factors, LoRAFactors
from polyroute.layer.sites import Site

__all__ = ["Inventory", "Stack"]


@dataclass(frozen=True)
class Stack:
    """The layers of one shape."""

    key: str
    sites: tuple[int, ...]
    """Positions in the list of sites."""
    d_in: int
    d_out: int


class Inventory(nn.Module):
    """Stacked skills.

    Parameters are `lora_a[shape]` `[n, H, K, r, d_in/H]` and `lora_b[shape]`
    `[n, H, K, r, d_out/H]`, or `ia3[shape]` `[n, H, K, 1, d_out/H]`. The rank comes before the
    width because every skinny product of forward and backward is fastest in that layout.

    With `num_sets` above 1 the K skills are that many *sets* of K / sets consecutive ones, and a
    task mixes those of its own set alone: that is how tasks are adapted side by side. (Private
    adapters are one set of which each task takes one skill whole.)
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
        self.heads = config.heads
        self.num_skills = num_skills
        self.num_sets = num_sets
        self.rank = config.rank
        self.scale = config.scale
        self.adapter = config.adapter
        self.init = config.init
        by_shape: dict[tuple[int, int], list[int]] = {}
        for i, site in enumerate(sites):
            by_shape.setdefault((site.d_in, site.d_out), []).append(i)
        self.stacks = tuple(
            Stack(f"{d_in}x{d_out}", tuple(members), d_in, d_out)
            for (d_in, d_out), members in by_shape.items()
        )
        self.num_sites = len(sites)
        self.kinds = ("ia3",) if config.adapter == "ia3" else ("lora_a", "lora_b")
        for kind in self.kinds:
            self.add_module(kind, nn.ParameterDict())
        for stack in self.stacks:
            for kind in self.kinds:
                shape = (
                    len(stack.sites),
                    self.heads,
                    num_skills,
                    self.rank,
                    self._block(kind, stack),
                )
                self._stacks_of(kind)[stack.key] = nn.Parameter(
                    torch.empty(shape, dtype=torch.float32, device=device)
                )
        self.reset_parameters()

    def _stacks_of(self, kind: str) -> nn.ParameterDict:
        stacks = self.get_submodule(kind)
        assert isinstance(stacks, nn.ParameterDict)
        return stacks

    def _block(self, kind: str, stack: Stack) -> int:
        return (stack.d_in if kind == "lora_a" else stack.d_out) // self.heads

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw A afresh and set B to zero ((IA)^3: all ones), so that nothing changes at the start.

        A is uniform within 1/sqrt(3 d_in) (`mttl`) or 1/sqrt(d_in / H) (`peft`).
        """
        for stack in self.stacks:
            for kind in self.kinds:
                self._reset(self._stacks_of(kind)[stack.key], kind, stack)

    def _reset(
        self, skills: Tensor, kind: str, stack: Stack, generator: torch.Generator | None = None
    ) -> None:
        if kind == "lora_a":
            width = 3 * stack.d_in if self.init == "mttl" else stack.d_in / self.heads
            skills.uniform_(-1 / math.sqrt(width), 1 / math.sqrt(width), generator=generator)
        else:
            skills.fill_(1.0 if kind == "ia3" else 0.0)

    def skills_of(self, place: int, *, gradients: bool = False) -> list[Tensor]:
        """One set, or its gradients, `[n, H, K / sets, r, D]` for each stack and factor; views."""
        size = self.num_skills // self.num_sets
        found = []
        for stack in self.stacks:
            for kind in self.kinds:
                skills = self._stacks_of(kind)[stack.key]
                whole = skills.grad if gradients else skills
                assert whole is not None
                found.append(whole[:, :, place * size : (place + 1) * size])
        return found

    @torch.no_grad()
    def redraw_set(self, place: int, seed: int) -> None:
        """Draw one set afresh, as `reset_parameters` does, whatever device it is on."""
        generator = torch.Generator().manual_seed(seed)
        kinds = [(stack, kind) for stack in self.stacks for kind in self.kinds]
        for skills, (stack, kind) in zip(self.skills_of(place), kinds, strict=True):
            drawn = torch.empty(skills.shape)
            self._reset(drawn, kind, stack, generator)
            skills.copy_(drawn)

    @torch.no_grad()
    def fill_set(
        self,
        place: int,
        source: "Inventory",
        skill: int | None = None,
        mixture: Sequence[Tensor] | None = None,
    ) -> None:
        """Overwrite one set by what another inventory of the same layers holds.

        Args:
            place: the set.
            source: all of its skills are copied where a set has as many; where a set has one skill,
                it becomes `skill` of the source, their `mixture`, or the mean of all.
            skill: see `source`.
            mixture: for each stack the weights `[n, H, K]` of each of its layers.
        """
        theirs = [
            (source._stacks_of(kind)[stack.key], None if mixture is None else mixture[number])
            for number, stack in enumerate(source.stacks)
            for kind in source.kinds
        ]
        for mine, (skills, weights) in zip(self.skills_of(place), theirs, strict=True):
            if mine.shape == skills.shape:
                mine.copy_(skills)
                continue
            if weights is not None:
                mine.copy_(_mix(skills, weights.unsqueeze(0), None).unsqueeze(1))
                continue
            one = skills.mean(2, keepdim=True) if skill is None else skills[:, :, [skill]]
            n, _, _, r, _ = one.shape  # the heads of a mean are blocks of one plain adapter
            mine.copy_(one.permute(0, 2, 3, 1, 4).reshape(n, 1, 1, r, -1))

    def mix(
        self,
        weights: Tensor | None,
        routers: Sequence[Tensor],
        *,
        sets: Tensor | None = None,
        gather: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> list[Factors]:
        """Average the factors of the skills, for all layers and all distinct tasks at once.

            A_u[h] = sum_k w[u, h, k] A[h, k],   B_u[h] = alpha/r sum_k w[u, h, k] B[h, k]

        The blocks of A are stacked along the input, those of B along the output (MHR; with one head
        it is Poly). A and B are averaged apart, so the result has rank r.

        Args:
            weights: `[U, N, H, K]`, N routers, K the skills of one set; None takes the only skill
                of the set whole.
            routers: for each stack `[n]`, the router of each of its layers.
            sets: `[U]`, the set of each task; None mixes over all skills there are.
            gather: `[B]`, which of the U results each example uses; None where U is 1 or the
                examples are the U rows themselves.
            dtype: of the result; default that of the skills.

        Returns:
            For every site its factors; without the leading axis where U is 1.
        """
        out: list[list[Tensor]] = [[] for _ in range(self.num_sites)]
        for stack, router in zip(self.stacks, routers, strict=True):
            for kind in self.kinds:
                inventory = self._stacks_of(kind)[stack.key]
                scale = self.scale if kind == "lora_b" else 1.0
                if weights is None:
                    assert sets is not None
                    mixed = _pick(inventory, sets, scale)
                else:
                    w_UnHK = weights.index_select(1, router)
                    mixed = _mix(inventory, w_UnHK * scale if scale != 1.0 else w_UnHK, sets)
                if dtype is not None:
                    mixed = mixed.to(dtype)
                if mixed.shape[1] == 1:
                    mixed = mixed.squeeze(1)
                elif gather is not None:
                    # One gather for all layers of the stack instead of one in each layer.
                    mixed = mixed.index_select(1, gather)
                # unbind once: indexing layer by layer costs a zero-filled copy each in backward.
                for site, factor in zip(stack.sites, mixed.unbind(0), strict=True):
                    out[site].append(factor)
        adapter = IA3Factors if self.adapter == "ia3" else LoRAFactors
        return [adapter(*factors) for factors in out]

    @torch.no_grad()
    def average(self) -> None:
        """Replace the skills, in place, by their mean as the only skill, with one head.

        The result computes what the uniform mixture computes (Poly-mu, MHR-mu), with 1/K of the
        parameters.
        """
        for stack in self.stacks:
            for kind in self.kinds:
                stacks = self._stacks_of(kind)
                mean = stacks[stack.key].mean(2, keepdim=True)
                n, _, _, r, _ = mean.shape
                merged = mean.permute(0, 2, 3, 1, 4).reshape(n, 1, 1, r, -1)
                stacks[stack.key] = nn.Parameter(merged.clone())
        self.num_skills = self.num_sets = self.heads = 1

    @torch.no_grad()
    def add_skill(self, source: int | None) -> None:
        """Append one skill: a copy of skill `source`, or the mean of all (None)."""
        for stack in self.stacks:
            for kind in self.kinds:
                stacks = self._stacks_of(kind)
                skills = stacks[stack.key]
                if self.num_skills == 0:
                    new = skills.new_empty(*skills.shape[:2], 1, *skills.shape[3:])
                    self._reset(new, kind, stack)
                elif source is None:
                    new = skills.mean(2, keepdim=True)
                else:
                    new = skills[:, :, source : source + 1]
                stacks[stack.key] = nn.Parameter(torch.cat([skills, new], dim=2))
        self.num_skills += 1

    @torch.no_grad()
    def keep_skills(self, skills: Sequence[int]) -> None:
        """Drop every skill but these, in place, in this order."""
        for stack in self.stacks:
            for kind in self.kinds:
                stacks = self._stacks_of(kind)
                stacks[stack.key] = nn.Parameter(stacks[stack.key][:, :, list(skills)].clone())
        self.num_skills = len(skills)

    def site_tensors(self, site: int) -> dict[str, Tensor]:
        """The skills of one layer in the published layout, which checkpoints use.

        Returns:
            `lora_a` `[H, K, d_in/H, r]` and `lora_b` `[H, K, r, d_out/H]`, or `ia3`
            `[H, K, 1, d_out/H]`; views of the parameters.
        """
        stack = next(s for s in self.stacks if site in s.sites)
        row = stack.sites.index(site)
        tensors = {kind: self._stacks_of(kind)[stack.key][row] for kind in self.kinds}
        if "lora_a" in tensors:
            tensors["lora_a"] = tensors["lora_a"].transpose(-1, -2)
        return tensors


def _mix(inventory: Tensor, w_UnHK: Tensor, sets: Tensor | None) -> Tensor:
    """`[n, H, K, r, D]` and `[U, n, H, K]` to `[n, U, r, H D]`."""
    n, heads, _, rank, block = inventory.shape
    rows, skills = w_UnHK.shape[0], w_UnHK.shape[-1]
    w = w_UnHK.permute(1, 2, 0, 3).reshape(n * heads, rows, skills).to(inventory.dtype)
    if sets is None:
        mixed: Tensor = WeightedSum.apply(w, inventory)  # type: ignore[no-untyped-call]
    else:
        own = inventory.view(n * heads, -1, skills, rank * block).index_select(1, sets)
        mixed = torch.matmul(w.unsqueeze(2), own)
    mixed = mixed.view(n, heads, rows, rank, block).permute(0, 2, 3, 1, 4)
    return mixed.reshape(n, rows, rank, heads * block)


def _pick(inventory: Tensor, sets: Tensor, scale: float) -> Tensor:
    """Skills taken whole: `[n, H, K, r, D]` to `[n, U, r, H D]`."""
    picked = inventory.index_select(2, sets)
    n, heads, rows, rank, block = picked.shape
    picked = picked.permute(0, 2, 3, 1, 4).reshape(n, rows, rank, heads * block)
    return picked * scale if scale != 1.0 else picked


class WeightedSum(torch.autograd.Function):
    """Weights `[n H, U, K]` times skills `[n, H, K, r, D]`, to `[n H, U, r D]`.

    A batched product, whose gradient for the skills is as large as all of them. On a CPU fresh
    memory of that size costs several times the arithmetic (page faults), so it is recycled.
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor, skills: Tensor) -> Tensor:
        ctx.save_for_backward(w, skills)
        return torch.bmm(w, skills.reshape(*w.shape[::2], -1))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        w, skills = ctx.saved_tensors
        need_w, need_skills = ctx.needs_input_grad
        dw = torch.bmm(dy, skills.reshape(*w.shape[::2], -1).mT) if need_w else None
        if not need_skills:
            return dw, None
        if torch.is_grad_enabled() or not skills.is_cpu or type(skills) is not nn.Parameter:
            return dw, torch.bmm(w.mT, dy).view(skills.shape)
        out = _recycled(skills)
        torch.bmm(w.mT, dy, out=out.view(*w.shape[::2], -1))
        return dw, out


_last_gradients: MutableMapping[Tensor, torch.UntypedStorage] = WeakTensorKeyDictionary()
"""For each stack of skills, the memory of the last gradient that was made for it."""


def _recycled(skills: Tensor) -> Tensor:
    """An uninitialised tensor of this shape, in the memory of the last one if that is free.

    Free is what no tensor refers to any more, as after `zero_grad()`: whoever still holds the last
    gradient keeps it. Taking the entry out first makes sure that two threads never get the same.
    """
    memory = _last_gradients.pop(skills, None)
    if (
        memory is None
        or memory.nbytes() != skills.numel() * skills.element_size()
        or torch._C._storage_Use_Count(memory._cdata) > 1
    ):
        memory = skills.new_empty(skills.numel()).untyped_storage()
    _last_gradients[skills] = memory
    return skills.new_empty(0).set_(memory).view(skills.shape)
