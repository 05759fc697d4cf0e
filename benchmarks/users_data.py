"""Synthetic users for `users.py`: who they are, what they write, and what can be known of them.

Everybody reads the same prompts, three words of one *domain* (fruits, months, number words), and
answers with one operation of each *stage* of the demo suite: which word, what to do with it, how to
dress it up. An *archetype* prefers one operation for each domain and stage. A user belongs to one
archetype and has choice probabilities of their own, drawn around its preferences:

    m_a = (1 - spread) onehot(preferred_a) + spread uniform,   p_u ~ Dirichlet(concentration m_a)

Prompts name no user and no operation, so the choices are all that tells users apart. Only such
words are asked for whose 45 possible answers all differ, so an answer gives its operations away and
the best possible identifier can be computed exactly.

Shape letters: U users, P probes, C candidates, E examples, A archetypes, D domains, S stages, O
operations of all stages, one after the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from polyroute.demo.suite import Skills, answer

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

PROMPT = "???"
"""The control code in which every operation is hidden: the base model knows the operations, and has
seen this prompt with all kinds of answers."""
DOMAINS: dict[str, tuple[str, ...]] = {
    "fruits": (
        "apple", "banana", "cherry", "fig", "grape", "kiwi",
        "lemon", "lime", "mango", "peach", "pear", "plum",
    ),
    "months": (
        "january", "february", "march", "april", "may", "june",
        "july", "august", "september", "october", "november", "december",
    ),
    "numbers": (
        "one", "two", "three", "four", "five", "six",
        "seven", "eight", "nine", "ten", "eleven", "twelve",
    ),
}  # fmt: skip
STAGES: dict[str, tuple[str, ...]] = {
    "select": ("first", "last", "longest"),
    "transform": ("upper", "reverse", "initial", "length", "lookup"),
    "format": ("bracket", "dash", "star"),
}
SIZES = tuple(len(operations) for operations in STAGES.values())
STARTS = tuple(itertools.accumulate((0, *SIZES[:-1])))
OPERATIONS = sum(SIZES)
TRIPLES: tuple[Skills, ...] = tuple(itertools.product(*STAGES.values()))  # type: ignore[arg-type]
"""Every way to answer, in the order of the candidates of an input."""


@dataclass(frozen=True, kw_only=True)
class Population:
    """How users differ."""

    archetypes: int = 8
    spread: float = 0.5
    """Share of an archetype's choices that is spread over all operations."""
    concentration: float = 2.0
    """How closely users keep to their archetype; higher is closer."""
    seed: int = 0


@dataclass(frozen=True)
class Users:
    """Users and everything that they wrote."""

    preferred: Ints
    """`[A, D, S]`: the operation, within its stage, that each archetype prefers."""
    archetype: Ints
    """`[U]`."""
    probabilities: Floats
    """`[U, D, O]`: how often each operation is chosen; sums to one within each stage."""
    domain: Ints
    """`[U, E]`."""
    question: Ints
    """`[U, E]`: which of the domain's inputs; a user never gets one twice."""
    choice: Ints
    """`[U, E, S]`: the operation chosen, within its stage."""


@cache
def questions(domain: str) -> tuple[tuple[str, ...], ...]:
    """The inputs of a domain: three words whose 45 answers all differ."""
    return tuple(
        words
        for words in itertools.permutations(DOMAINS[domain], 3)
        if len({answer(words, triple) for triple in TRIPLES}) == len(TRIPLES)
    )


def prior(population: Population, preferred: Ints) -> Floats:
    """The Dirichlet parameters of each archetype, `[A, D, O]`."""
    blocks = [
        (1 - population.spread) * np.eye(size)[preferred[:, :, s]] + population.spread / size
        for s, size in enumerate(SIZES)
    ]
    return population.concentration * np.concatenate(blocks, axis=-1)


def draw_users(population: Population, users: int, examples: int) -> Users:
    """Draw users and their examples; the domains of any three successive examples differ.

    Raises:
        ValueError: a domain has too few inputs for so many examples.
    """
    pools = [len(questions(domain)) for domain in DOMAINS]
    if -(-examples // len(pools)) > min(pools):
        raise ValueError(f"{examples} examples a user need more than {min(pools)} inputs a domain")
    rng = np.random.default_rng(population.seed)
    shape = (population.archetypes, len(DOMAINS))
    preferred = np.stack([rng.integers(size, size=shape) for size in SIZES], axis=-1)
    archetype = rng.integers(population.archetypes, size=users)
    gamma = rng.gamma(prior(population, preferred)[archetype])
    # Underflow in a gamma of small shape is a probability of 0; one operation always remains.
    gamma = np.maximum(gamma, 1e-300)
    blocks = [gamma[..., a : a + n] for a, n in zip(STARTS, SIZES, strict=True)]
    probabilities = np.concatenate([b / b.sum(-1, keepdims=True) for b in blocks], axis=-1)
    first = rng.integers(len(DOMAINS), size=(users, 1))
    domain = (first + np.arange(examples)) % len(DOMAINS)
    orders = [rng.permuted(np.tile(np.arange(n), (users, 1)), axis=1) for n in pools]
    # The n-th example of a domain takes the n-th input of that domain's shuffled order.
    position = np.arange(examples) // len(DOMAINS)
    by_domain = np.stack([order[:, position] for order in orders], axis=-1)
    question = np.take_along_axis(by_domain, domain[..., None], axis=-1)[..., 0]
    taken = np.take_along_axis(probabilities, domain[..., None], axis=1)
    choices = []
    for start, size in zip(STARTS, SIZES, strict=True):
        cumulated = taken[..., start : start + size].cumsum(-1)
        choices.append((rng.random((users, examples, 1)) > cumulated[..., :-1]).sum(-1))
    return Users(preferred, archetype, probabilities, domain, question, np.stack(choices, -1))


def words_of(domain: int, question: int) -> tuple[str, ...]:
    """The three words of an input."""
    return questions(tuple(DOMAINS)[domain])[question]


def record(users: Users, user: int, example: int) -> dict[str, Any]:
    """One example as `ModelKind.encode` wants it; the task is the user."""
    words = words_of(int(users.domain[user, example]), int(users.question[user, example]))
    chosen = users.choice[user, example]
    triple = TRIPLES[int(np.ravel_multi_index(tuple(chosen), SIZES))]
    return {
        "task": f"user{user}",
        "instruction": PROMPT,
        "input": " ".join(words),
        "target": answer(words, triple),
        "choices": None,
    }


def counts(users: Users, who: Sequence[int] | Ints, examples: slice) -> Floats:
    """How often each user chose each operation in each domain, `[U, D, O]`."""
    rows = np.asarray(who)
    total = np.zeros((len(rows), len(DOMAINS), OPERATIONS))
    index = np.arange(len(rows))[:, None]
    for s, start in enumerate(STARTS):
        chosen = users.choice[rows, examples, s] + start
        np.add.at(total, (index, users.domain[rows, examples], chosen), 1.0)
    return total


def histogram_similarity(probe: Floats, enrolled: Floats) -> Floats:
    """Cosine `[P, C]` between centred frequencies of the operations."""

    def directions(counts_: Floats) -> Floats:
        shown = np.maximum(counts_[..., : SIZES[0]].sum(-1, keepdims=True), 1.0)
        flat = (counts_ / shown).reshape(len(counts_), -1)
        flat = flat - flat.mean(0)
        return np.asarray(flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-12))

    return np.asarray(directions(probe) @ directions(enrolled).T)


def best_similarity(probe: Floats, enrolled: Floats, alpha: Floats) -> Floats:
    """Log-probability `[P, C]` of each probe's choices if it were each candidate.

        log P(probe | enrolled) = log sum_a P(a | enrolled) prod DirMult(probe; alpha_a + enrolled)

    No identifier does better: it knows how the population was drawn, and sees the operations
    themselves rather than text. The order of the candidates is that of the posterior, since they
    are equally likely beforehand.

    Args:
        probe: counts `[P, D, O]`.
        enrolled: counts `[C, D, O]`.
        alpha: `[A, D, O]`, from `prior`.
    """
    n_PDO, n_CDO = torch.from_numpy(probe), torch.from_numpy(enrolled)
    joint = [_log_evidence(n_PDO[:, None] + n_CDO, a) for a in torch.from_numpy(alpha)]
    alone = [_log_evidence(n_CDO, a) for a in torch.from_numpy(alpha)]
    log_likelihood = torch.stack(joint).logsumexp(0) - torch.stack(alone).logsumexp(0)
    return np.asarray(log_likelihood.numpy())


def _log_evidence(n: Tensor, alpha: Tensor) -> Tensor:
    """Log-probability of sequences with counts `[..., D, O]` under one archetype, `[...]`."""
    total = ((n + alpha).lgamma() - alpha.lgamma()).sum((-1, -2))
    for start, size in zip(STARTS, SIZES, strict=True):
        a, m = alpha[:, start : start + size].sum(-1), n[..., start : start + size].sum(-1)
        total = total - ((m + a).lgamma() - a.lgamma()).sum(-1)
    return total
