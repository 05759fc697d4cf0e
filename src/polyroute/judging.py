"""The judge of a library: do these LoRAs help with a task, and more than controls do?

Whatever is done with the library is also done with random LoRAs of the same ranks and norms, and a
fresh LoRA learns from the same examples. Over 958 LoRAs of users and 62 tasks, combining them gave
little more than a fresh LoRA, and random ones did nearly as well (2602.12323), so the judge has to
be able to say no. It says yes only where something from the library beats the base model, a fresh
LoRA and every random library, with intervals above zero that allow for the number of attempts.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import torch

from polyroute.adapt import adapt_many, check_seeds
from polyroute.adapting.row_batches import losses_of
from polyroute.config import Granularity
from polyroute.data.sampling import draw_few_shot, some_places
from polyroute.data.suite import Suite, check_tasks
from polyroute.host.progress import progress
from polyroute.kinds.batches import evaluating
from polyroute.kinds.choose import ModelKind
from polyroute.library.attaching import library_of
from polyroute.library.controls import Given, random_skills
from polyroute.library.learning import learn_weights
from polyroute.library.ranking import rank_skills
from polyroute.library.settings import JudgeSettings
from polyroute.library.static import Static
from polyroute.library.token_routes import Arrow, SpectR
from polyroute.model import RoutedModel
from polyroute.routes.rule import RouteRule
from polyroute.settings import whole
from polyroute.study.evaluate import Questions, check_answerable, questions, row_scores
from polyroute.study.examples import encoded, warn_of_cuts
from polyroute.study.intervals import Estimate, estimates

__all__ = ["BASE", "FRESH", "ORACLE", "RANDOM", "Judgement", "judge"]

BASE, FRESH, ORACLE = "base", "fresh LoRA", "oracle single"
RANDOM = "random, "
"""Begins the names of what was done with a random library."""
DOUBT = 0.05
"""The chance that a library of no use is said to help, shared by all attempts."""
UNITS = 20
"""Fewer tasks are too few to be certain, so that examples are counted; so are fewer examples."""
TRIED = 4
"""So many of the LoRAs that the ranking puts first are tried on the examples."""
TOKENS = 2048
"""Most of them in a forward on the examples."""

Chosen = str | RouteRule
"""What the model is routed by: a task or a rule."""
Scores = np.ndarray[Any, Any]
"""One for each unit."""


@dataclass(frozen=True)
class Judgement:
    """What was scored, and what follows."""

    scores: Mapping[str, Scores]
    """By contender, the score of each unit: a task or, where these are few, a test example."""
    unit: str
    """`task` or `example`."""
    chosen: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """By task, the single LoRA that was chosen for each seed."""

    @property
    def uses(self) -> list[str]:
        """What was done with the library."""
        return [name for name in USES if name in self.scores]

    def estimate(self, name: str, other: str | None = None) -> Estimate:
        """The mean score of a contender, or its mean difference to another, with its interval."""
        values = self.scores[name] - (self.scores[other] if other else 0)
        return estimates(values[:, None])[0]

    def controls_of(self, use: str) -> list[str]:
        """What a use has to beat: the base, a fresh LoRA, and random libraries used alike."""
        alike = [name for name in self.scores if name.rpartition(" ")[0] == RANDOM + use]
        return [BASE, FRESH, *alike]

    @property
    def helping(self) -> list[str]:
        """The uses that beat all of their controls, best first."""
        return [use for use in self._ranked if all(low > 0 for low in self._lows(use))]

    @property
    def _ranked(self) -> list[str]:
        return sorted(self.uses, key=lambda use: -float(self.scores[use].mean()))

    def _lows(self, use: str) -> list[float]:
        """The lower ends of the differences to the controls."""
        if len(self.scores[use]) < UNITS:
            return [-math.inf]
        # One side of the interval counts, and each attempt has its share of the doubt.
        outside = 2 * DOUBT / len(self.uses)
        controls = np.stack([self.scores[control] for control in self.controls_of(use)], axis=1)
        found = estimates(self.scores[use][:, None] - controls, outside=outside)
        lows = [estimate.low for estimate in found if estimate.low is not None]
        assert len(lows) == len(found)  # since there are several units
        return lows

    @property
    def verdict(self) -> str:
        """A sentence."""
        best = (self.helping or self._ranked)[0]
        randoms = [name for name in self.controls_of(best) if name.startswith(RANDOM)]
        strongest = max(randoms, key=lambda name: float(self.scores[name].mean()))
        against = ", ".join(
            f"{self.estimate(best, control).mean:+.3f} to {words}"
            for control, words in (
                (BASE, "the base model"), (FRESH, "a fresh LoRA"),
                (strongest, "the best of random libraries"),
            )
        )  # fmt: skip
        if self.helping:
            return f"yes, this library helps: {best} scores {against}"
        return (
            f"no, nothing shows that this library helps: its best use, {best}, scores {against}, "
            "and not all of these are certain to be above zero"
        )


def judge(  # noqa: PLR0913 (public: users know its keywords)
    model: RoutedModel,
    kind: ModelKind,
    suite: Suite,
    tasks: Sequence[str],
    settings: JudgeSettings,
    *,
    seeds: Sequence[int] = (0,),
    split: str = "test",
    max_examples: int | None = None,
) -> Judgement:
    """Judge an attached library on some tasks.

    Args:
        model: has the library.
        kind: how its base model learns and answers.
        suite: where the tasks are.
        tasks: their names.
        settings: how to judge.
        seeds: of the draw of examples and of whatever learns.
        split: what is scored.
        max_examples: the most examples of each task that are scored; None for all.

    Raises:
        InputError: the model has no library, a task does not exist or has too few examples, or a
            number is out of range.
    """
    library_of(model)
    tasks = check_tasks(suite, tasks)
    check_seeds(seeds)
    whole(optional=True)("max_examples", max_examples)
    check_answerable(suite, tasks, kind)
    trains = {task: encoded(suite, task, "train", kind) for task in tasks}
    drawn = {
        (task, seed): draw_few_shot(len(rows), settings.shots, seed)
        for task, rows in trains.items()
        for seed in seeds
    }
    asked = {}
    for task in tasks:
        every = questions(suite, task, split, kind)
        asked[task] = every.select(some_places(len(every.rows), max_examples))
    warn_of_cuts([one.rows for one in asked.values()], kind)
    by_task: dict[str, dict[str, list[Scores]]] = {}
    chosen: dict[str, list[str]] = {}
    for (task, seed), places in progress(list(drawn.items()), "judging", unit="draw"):
        case = _Case(model, kind, settings, trains[task].select(places), asked[task], seed)
        found = case.scores()
        chosen.setdefault(task, []).append(case.single)
        for name, scores in found.items():
            by_task.setdefault(name, {}).setdefault(task, []).append(scores)
    means = {
        name: {task: np.mean(several, axis=0) for task, several in own.items()}
        for name, own in by_task.items()
    }
    if len(tasks) < UNITS:
        pooled = {n: np.concatenate([own[task] for task in tasks]) for n, own in means.items()}
        return Judgement(pooled, "example", chosen)
    of_tasks = {n: np.array([own[task].mean() for task in tasks]) for n, own in means.items()}
    return Judgement(of_tasks, "task", chosen)


@dataclass
class _Case:
    """One task and one draw of examples."""

    model: RoutedModel
    kind: ModelKind
    settings: JudgeSettings
    shots: datasets.Dataset
    asked: Questions
    seed: int
    single: str = ""
    """The LoRA of the library that was best on the examples."""

    def scores(self) -> dict[str, Scores]:
        """By contender, the score of each test example."""
        found = {BASE: self._score(Given()), FRESH: self._score(self._fresh())}
        for use, make in USES.items():
            route = make(self)
            if use == SINGLE:
                self.single = str(route)
            found[use] = self._score(route)
        for draw in range(self.settings.randoms):
            with random_skills(self.model, 1000 * self.seed + draw):
                for use, make in USES.items():
                    found[f"{RANDOM}{use} {draw + 1}"] = self._score(make(self))
        if self.settings.oracle:
            every = [self._score(name) for name in self.model.tasks]
            found[ORACLE] = max(every, key=lambda own: float(own.mean()))
        return found

    def _score(self, route: Chosen) -> Scores:
        # Per token, where choices are scored: their lengths then matter less.
        rows = row_scores(self.model, self.kind, self.asked, route=route)
        return np.array([row[-1] for row in rows])

    def _fresh(self) -> Chosen:
        settings = self.settings
        with warnings.catch_warnings():
            # All contenders have these shots, whichever answers are missing.
            warnings.filterwarnings("ignore", message=".* draws of shots have no example")
            (one,) = adapt_many(
                self.model, {"new": self.shots}, kind=self.kind, phase="random",
                seeds=[self.seed], steps=settings.steps, batch_size=settings.batch_size,
                lr=settings.lr,
            )  # fmt: skip
        return Given(one.factors)

    def best_single(self) -> Chosen:
        """The LoRA with the least loss on the examples, of those that the ranking puts first."""
        rows = list(self.shots)
        names = rank_skills(self.model, self.kind, rows).top(TRIED)
        with evaluating(self.model), torch.no_grad():
            losses = losses_of(self.model, self.kind, [(name, rows) for name in names], TOKENS)
        return names[int(np.argmin(losses))]

    def weights(self, granularity: Granularity) -> Chosen:
        """Weights that were learned on the examples."""
        settings = self.settings
        return learn_weights(
            self.model, self.kind, list(self.shots), Static(self.model, granularity=granularity),
            steps=settings.steps, batch_size=settings.batch_size, lr=settings.weight_lr,
            seed=self.seed,
        )  # fmt: skip


SINGLE = "best single"
USES: Mapping[str, Callable[[_Case], Chosen]] = {
    "average": lambda _: "mu",
    SINGLE: _Case.best_single,
    "weights": lambda case: case.weights("coarsegrained"),
    "weights of layers": lambda case: case.weights("finegrained"),
    "arrow": lambda _: Arrow(),
    "spectr": lambda _: SpectR(),
}
"""What is done with a library, and with random ones."""
