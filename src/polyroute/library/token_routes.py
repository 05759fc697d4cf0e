"""Routes that need no training: each token of each layer chooses among the skills that exist.

    with model.route(pr.Arrow(top_k=3)):
        model.generate(**batch)

A route scores every skill by the input x `[..., d_in]` of a layer and by what the skill is; the
best few are mixed in output space. A skill that does not adapt a layer is not among the choices
there. The scores depend on what a skill computes, not on how it is factored. They depend on a token
alone, so a cache of keys and values, beams, padding and the order of a batch change nothing.

Shape letters: E skills, R the ranks of all skills together, r rank of a skill.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from polyroute.errors import InputError
from polyroute.kinds.batches import evaluating
from polyroute.layer.factors import Factors, LoRAFactors
from polyroute.library.attaching import places_of
from polyroute.library.delta import core, is_noise
from polyroute.library.tokens import real_tokens
from polyroute.model import RoutedModel
from polyroute.routes.index import index_on
from polyroute.routes.inventory import Inventory
from polyroute.routes.mixer import Mixer
from polyroute.routes.rule import Batch, RouteRule
from polyroute.settings import flag, number, whole

__all__ = [
    "LAG",
    "Arrow",
    "AverageActivation",
    "Scores",
    "SpectR",
    "TokenRoute",
    "token_route",
]

Scores = Callable[[Tensor], Tensor]
"""From the input of a layer, fp32 `[..., d_in]`, to the scores of the skills, `[..., E]`."""


class TokenRoute(RouteRule):
    """Each token of each layer uses the `top_k` skills of the highest scores.

    A subclass says in `scores_of` how the skills of a layer are scored.
    """

    needs_tasks = False
    stands_alone = True

    def __init__(self, top_k: int, temperature: float | None) -> None:
        super().__init__()
        self.top_k = whole()("top_k", top_k)
        self.temperature = temperature
        self._known: WeakKeyDictionary[Inventory, tuple[Any, list[Scores]]] = WeakKeyDictionary()

    def scores_of(self, skills: Mapping[int, LoRAFactors], site: int) -> Scores:
        """How the skills of a layer are scored, in their order.

        Args:
            skills: those that adapt the layer, in fp32 or more, by their numbers.
            site: the place of the layer in the list of sites.
        """
        raise NotImplementedError

    def factors(self, batch: Batch, mixer: Mixer) -> Sequence[Factors]:
        """The factors of each site, whose gates choose for each token."""
        every = self._scores(mixer)
        return [
            mixer.gated(site, partial(self._gate, batch, mixer, site, scores), batch,
                        top_k=self.top_k)
            if mixer.inventory.present_at(site) else _nothing(mixer, site, batch)
            for site, scores in enumerate(every)
        ]  # fmt: skip

    def _gate(self, batch: Batch, mixer: Mixer, site: int, scores: Scores, x: Tensor) -> Tensor:
        """The weights of a layer's tokens, `[..., H, E]`."""
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        with torch.autocast(x.device.type, enabled=False):
            there = scores(exact)
            best = there.topk(min(self.top_k, there.shape[-1]), dim=-1)
            if self.temperature is None:
                shares = torch.full_like(best.values, 1 / best.values.shape[-1])
            else:
                shares = torch.softmax(best.values / self.temperature, dim=-1)
            inventory = mixer.inventory
            weights = shares.new_zeros(*shares.shape[:-1], inventory.num_skills)
            numbers = index_on(x.device, tuple(inventory.present_at(site)))
            weights = weights.scatter(-1, numbers[best.indices], shares)
        heads = inventory.heads if inventory.combine == "weight" else 1
        shown = self.show(batch, site, weights.unsqueeze(-2))
        return shown.expand(*shown.shape[:-2], heads, -1)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_known"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._known = WeakKeyDictionary()

    def for_model(self, mixer: Mixer) -> None:
        """Get ready for the skills that a model has now; nothing by default."""

    @torch.no_grad()
    def _scores(self, mixer: Mixer) -> list[Scores]:
        """How the skills are scored, made again only after they changed."""
        inventory = mixer.inventory
        stamp = [(id(p), p._version, p.data_ptr()) for p in inventory.parameters()]
        known = self._known.get(inventory)
        if known is None or known[0] != stamp:
            if inventory.adapter == "ia3":
                raise InputError(f"{type(self).__name__} routes LoRA skills; these are (IA)^3")
            self.for_model(mixer)
            skills = [inventory.skills_at(site) for site in range(len(inventory.sites))]
            known = (
                stamp,
                [self.scores_of(own, site) if own else _none for site, own in enumerate(skills)],
            )
            self._known[inventory] = known
        return known[1]


def _none(x: Tensor) -> Tensor:
    return x.new_zeros(*x.shape[:-1], 0)


def _nothing(mixer: Mixer, site: int, batch: Batch) -> Factors:
    """The factors of a layer that no skill adapts any more."""
    own = mixer.sites[site]
    like = mixer.inventory.like.detach().to(batch.dtype)
    return LoRAFactors(like.new_zeros(0, own.d_in), like.new_zeros(0, own.out_features))


class Arrow(TokenRoute, name="arrow"):
    """Arrow (Ostapenko et al., 2024): the score is |x . p_e|.

    The prototype p_e is the direction of inputs to which the skill's update answers most, its first
    right singular vector, computed exactly. Weights are a softmax over the `top_k` best scores.

    Args:
        top_k: skills that a token uses.
        temperature: scores are divided by it. The input is not normalised, so what is sharp depends
            on the base model.
    """

    def __init__(self, top_k: int = 3, temperature: float = 1.0) -> None:
        super().__init__(top_k, number(above=0)("temperature", temperature))

    def settings(self) -> dict[str, Any]:
        """The arguments."""
        return {"top_k": self.top_k, "temperature": self.temperature}

    def scores_of(self, skills: Mapping[int, LoRAFactors], site: int) -> Scores:
        """The sizes of the products with the prototypes."""
        prototypes_Ed = torch.stack([_prototype(own) for own in skills.values()])
        return lambda x: (x @ prototypes_Ed.to(x.dtype).t()).abs()


def _prototype(own: LoRAFactors) -> Tensor:
    """The first right singular vector `[d_in]` of an update; zero if the update is."""
    core_pq, basis_a, _ = core(own)
    _, values, right = torch.linalg.svd(core_pq)
    vector = basis_a @ right[0]
    return (vector if float(values[0]) > 0 else torch.zeros_like(vector)).to(own.a.dtype)


class SpectR(TokenRoute, name="spectr"):
    """SpectR (Fleshman and Van Durme, 2025): the score is how much of x a skill's update sees.

    With V_e an orthonormal basis of the inputs that the update of rank r_e answers to, the score is
    |V_e^T x| / sqrt(r_e), so that skills of high rank have no advantage. Each of the `top_k` best
    has the same weight.

    Args:
        top_k: skills that a token uses.
        weighted: score by the size of what the update adds, |x D_e|, instead.
    """

    def __init__(self, top_k: int = 4, *, weighted: bool = False) -> None:
        super().__init__(top_k, None)
        self.weighted = flag()("weighted", weighted)

    def settings(self) -> dict[str, Any]:
        """The arguments."""
        return {"top_k": self.top_k, "weighted": self.weighted}

    def scores_of(self, skills: Mapping[int, LoRAFactors], site: int) -> Scores:
        """The norms of the projections."""
        bases = [_seen(own, weighted=self.weighted) for own in skills.values()]
        ranks = [len(basis) for basis in bases]
        projections_Rd = torch.cat(bases)
        owner = projections_Rd.new_tensor(
            [place for place, rank in enumerate(ranks) for _ in range(rank)], dtype=torch.long
        )
        scale = projections_Rd.new_tensor([1.0 if self.weighted else 1 / rank for rank in ranks])

        def scores(x: Tensor) -> Tensor:
            seen_R = (x @ projections_Rd.to(x.dtype).t()).square()
            total = seen_R.new_zeros(*seen_R.shape[:-1], len(ranks))
            found: Tensor = (total.index_add(-1, owner, seen_R) * scale).sqrt()
            return found

        return scores


def _seen(own: LoRAFactors, *, weighted: bool) -> Tensor:
    """The right singular vectors `[r, d_in]` of an update, if weighted times their values."""
    core_pq, basis_a, _ = core(own)
    _, values, right = torch.linalg.svd(core_pq, full_matrices=False)
    size = float(own.a.double().norm() * own.b.double().norm())
    there = ~is_noise(values, size)
    there[0] = True  # an update that is zero has one direction, of no length
    lengths = values[there] if weighted else (values[there] > 0).to(values)
    basis: Tensor = (lengths[:, None] * right[there]) @ basis_a.t()
    return basis.to(own.a.dtype)


class AverageActivation(TokenRoute, name="average_activation"):
    """Routes by the mean input that each skill has seen (the baseline of PHATGOOSE, 2402.05859).

    With LN a layer norm without parameters, the score of a key v_e is LN(x) . LN(v_e) / sqrt(d_in),
    and weights are a softmax over the `top_k` best.

        rule = pr.AverageActivation.of(model, {"sql": sql_batches, "legal": legal_batches})

    Args:
        keys: for each site the keys of all skills, `[E, d_in]`.
        top_k: skills that a token uses.
        owners: the tasks whose skills they belong to; by default the numbers of the skills.
    """

    def __init__(
        self, keys: Sequence[Tensor], top_k: int = 2, *, owners: Sequence[str | int] | None = None
    ) -> None:
        super().__init__(top_k, 1.0)
        self.keys = tuple(keys)
        self._owners = tuple(range(len(keys[0]))) if owners is None else tuple(owners)
        self._places = tuple(range(len(self._owners)))

    @classmethod
    @torch.no_grad()
    def of(
        cls, model: RoutedModel, batches: Mapping[str, Iterable[Mapping[str, Any]]], top_k: int = 2
    ) -> "AverageActivation":
        """Take the mean inputs of a model's layers while it reads what each task is about.

        Args:
            model: has a skill of its own for each task.
            batches: for each task arguments of the base model; zeros of `attention_mask` are left
                out.
            top_k: as in the constructor.

        Raises:
            InputError: the tasks are not those of the model, or tasks have no skills of their own.
        """
        if not model.rule.owns_skills or set(batches) != set(model.tasks):
            raise InputError(
                "give batches for each LoRA of the library: "
                f"{', '.join(sorted(set(batches) ^ set(model.tasks))) or 'tasks share skills here'}"
            )
        by_task = [_mean_inputs(model, task, batches[task]) for task in model.tasks]
        keys = [torch.stack(of_site) for of_site in zip(*by_task, strict=True)]
        return cls(keys, top_k, owners=model.tasks)

    def for_model(self, mixer: Mixer) -> None:
        """Find the keys of the present skills."""
        self._places = places_of(self._owners, mixer)

    def settings(self) -> dict[str, Any]:
        """Nothing that JSON can hold."""
        raise InputError("the keys of this route are not saved with a model: use model.route(rule)")

    def scores_of(self, skills: Mapping[int, LoRAFactors], site: int) -> Scores:
        """The products with the keys."""
        width = self.keys[site].shape[1]
        rows = [self._places[skill] for skill in skills]
        keys_Ed = torch.nn.functional.layer_norm(self.keys[site][rows], (width,))

        def scores(x: Tensor) -> Tensor:
            normal = torch.nn.functional.layer_norm(x, (width,))
            return normal @ keys_Ed.to(x).t() / math.sqrt(width)

        return scores


def _mean_inputs(
    model: RoutedModel, task: str, batches: Iterable[Mapping[str, Any]]
) -> list[Tensor]:
    """The mean input `[d_in]` of each adapted layer over all tokens that are not padding."""
    totals: list[Tensor | float] = [0.0] * len(model.sites)
    counts = [0] * len(model.sites)

    def note(site: int, mask: Tensor | None, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        (x,) = args
        rows = real_tokens(x.float(), mask, model.sites[site])
        totals[site] = totals[site] + rows.sum(0)
        counts[site] += len(rows)

    with evaluating(model):
        for batch in batches:
            mask = batch.get("attention_mask")
            hooks = [
                layer.register_forward_pre_hook(partial(note, site, mask))
                for site, layer in enumerate(model.routed_layers)
            ]
            try:
                model(**batch, tasks=task)
            finally:
                for hook in hooks:
                    hook.remove()
    if not all(counts):
        raise InputError(f"{task!r} has no batch of tokens: give at least one")
    return [total / count for total, count in zip(totals, counts, strict=True)]  # type: ignore[misc]


class LAG(TokenRoute, name="lag"):
    """LAG (Fleshman and Van Durme, 2025): Arrow proposes skills, and SpectR chooses among them.

    Args:
        top_k: skills that a token uses, all with the same weight.
        proposed: skills that Arrow proposes; with all of them this is SpectR.
    """

    def __init__(self, top_k: int = 1, proposed: int = 20) -> None:
        super().__init__(top_k, None)
        self.proposed = whole()("proposed", proposed)
        if self.proposed < self.top_k:
            raise InputError(f"proposed must be at least top_k={top_k}, not {proposed}")
        self._arrow, self._spectr = Arrow(), SpectR()

    def settings(self) -> dict[str, Any]:
        """The arguments."""
        return {"top_k": self.top_k, "proposed": self.proposed}

    def scores_of(self, skills: Mapping[int, LoRAFactors], site: int) -> Scores:
        """Those of SpectR, where Arrow proposes a skill."""
        first, second = (r.scores_of(skills, site) for r in (self._arrow, self._spectr))
        count = min(self.proposed, len(skills))

        def scores(x: Tensor) -> Tensor:
            proposed = first(x).topk(count, dim=-1).indices
            chosen = second(x)
            barred = torch.full_like(chosen, -math.inf)
            found: Tensor = barred.scatter(-1, proposed, chosen.gather(-1, proposed))
            return found

        return scores


def token_route(name: str, top_k: int | None = None) -> TokenRoute:
    """A route without training or texts by its name, one of `polyroute.library.names.TOKEN_ROUTES`.

    Args:
        name: of the rule.
        top_k: skills that a token uses; None for as many as the rule's default.
    """
    made = {rule.name: rule for rule in (Arrow, SpectR, LAG)}[name]
    return made() if top_k is None else made(top_k=top_k)
