"""The stages that train for `users.py`: an inventory for all, then a row or a LoRA for each."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import users_data as data
from torch import Tensor
from users_data import Ints, Population
from users_report import HALVES

import polyroute as pr
from polyroute.adapt import Adapted
from polyroute.host.files import write_json
from polyroute.kinds.choose import ModelKind, kind_of
from polyroute.loading import load_base
from polyroute.model import RoutedModel

AVERAGE = "average user"
WAYS = ("row", "lora", "fresh lora")
"""A row of the table; a LoRA that starts at the average of the skills; one that starts at none."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is run; chosen on training users alone."""

    population: Population = field(default_factory=Population)
    training_users: int = 9_000
    new_users: int = 1_000
    shots: int = 20
    skills: int = 8
    heads: int = 8
    rank: int = 4
    granularity: str = "blockwise"
    exclude: str = "encoder.*"
    """Layers without an adapter. What tells users apart is how they answer, and without the encoder
    training learned as much from as many examples, and sooner."""
    epochs: int = 2
    users_a_step: int = 32
    examples_a_visit: int = 4
    """Examples of each user in a step; a row takes `epochs * shots / examples_a_visit` steps."""
    lr: float = 5e-3
    route_lr: float = 0.5
    warmup: float = 0.05
    fit_steps: int = 20
    fit_batch: int = 8
    fit_lrs: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
    lora_lrs: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    fresh_lrs: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    tuning_users: int = 48
    """Training users on whom one rate of each list is chosen."""
    lora_users: int = 100
    steered_users: int = 64
    steering_inputs: int = 2
    """For each domain."""
    seed: int = 0


QUICK = Settings(
    training_users=160,
    new_users=24,
    epochs=1,
    fit_steps=4,
    tuning_users=6,
    lora_users=6,
    steered_users=4,
)


class Study:
    """The population, the base model and the stages."""

    def __init__(self, settings: Settings, work: Path) -> None:
        self.settings, self.work = settings, work
        everybody = settings.training_users + settings.new_users
        self.users = data.draw_users(settings.population, everybody, 2 * settings.shots)
        self.new = np.arange(settings.training_users, everybody)
        self.base, tokenizer = load_base("demo")
        self.kind: ModelKind = kind_of(self.base, tokenizer, max_input=48, max_target=20)
        self._encoded: dict[tuple[int, ...], dict[str, Any]] = {}

    def half(self, name: str) -> range:
        """The examples of one half of what a user wrote."""
        first = HALVES.index(name) * self.settings.shots
        return range(first, first + self.settings.shots)

    def rows(self, user: int, examples: Sequence[int] | Ints) -> list[dict[str, Any]]:
        """Encoded examples of one user. Users share inputs and answers, so each is encoded once."""
        users, found = self.users, []
        for e in examples:
            key = (users.domain[user, e], users.question[user, e], *users.choice[user, e])
            if key not in self._encoded:
                columns = {k: [v] for k, v in data.record(users, user, int(e)).items()}
                self._encoded[key] = {k: v[0] for k, v in self.kind.encode(columns).items()}
            found.append({**self._encoded[key], "task": name(user)})
        return found

    def done(self, file: str) -> dict[str, Any] | None:
        """What a stage left behind."""
        path = self.work / file
        return json.loads(path.read_text()) if path.exists() else None


def name(user: int | np.integer[Any]) -> str:
    """The task that a user is."""
    return f"user{user}"


def visits(settings: Settings) -> list[tuple[Ints, Ints]]:
    """Users `[G]` and their examples `[G, n]`, step after step: each example once an epoch."""
    rng = np.random.default_rng(settings.seed)
    size, n = settings.training_users, settings.examples_a_visit
    steps = []
    for _ in range(settings.epochs):
        order = rng.permuted(np.tile(np.arange(settings.shots), (size, 1)), axis=1)
        for start in range(0, settings.shots, n):
            shuffled = rng.permutation(size)
            for users in np.array_split(shuffled, max(1, size // settings.users_a_step)):
                steps.append((users, order[users, start : start + n]))
    return steps


def train(study: Study) -> dict[str, Any]:
    """One inventory for all training users, from the first half of what they wrote."""
    settings, folder = study.settings, study.work / "inventory"
    if (report := study.done("training.json")) is not None:
        return report
    torch.manual_seed(settings.seed)
    config = pr.MHRConfig(
        num_skills=settings.skills,
        num_heads=settings.heads,
        rank=settings.rank,
        granularity=settings.granularity,  # type: ignore[arg-type]
        exclude_modules=settings.exclude,
    )
    model = pr.attach(study.base, config, [name(u) for u in range(settings.training_users)])
    optimizer = model.optimizer(phase="full", lr=settings.lr, route_lr=settings.route_lr)
    rates = [group["lr"] for group in optimizer.param_groups]
    steps, losses = visits(settings), []
    started = time.perf_counter()
    model.train()
    for step, (users, examples) in enumerate(steps):
        batch = [row for u, e in zip(users, examples, strict=True) for row in study.rows(u, e)]
        loss = study.kind.loss(model, study.kind.collate(batch))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.inventory.parameters(), 1.0)
        factor = min((step + 1) / (settings.warmup * len(steps)), 1 - step / len(steps))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % max(1, len(steps) // 20) == 0:
            recent = float(np.mean(losses[-max(1, len(steps) // 20) :]))
            print(f"training: step {step + 1} of {len(steps)}, loss {recent:.3f}", flush=True)
    model.eval()
    model.save_pretrained(folder)
    report = {
        "seconds": time.perf_counter() - started,
        "steps": len(steps),
        "losses": losses[:: max(1, len(losses) // 200)],
        "routing_numbers_a_user": math.prod(model.routes.shape or ()),
        "counts": model.counts(),
    }
    study.base = model.unload()  # type: ignore[assignment]
    write_json(study.work / "training.json", report)
    return report


def inventory(study: Study) -> RoutedModel:
    """The trained skills; of the training users only their average row is left."""
    model = pr.from_pretrained(study.base, study.work / "inventory")
    assert model.routes.logits is not None
    mean = model.routes.logits.detach().mean(0)
    model.keep_tasks([])
    model.add_task(AVERAGE, mean)
    return model


def without_inventory(study: Study) -> RoutedModel:
    """A base model whose LoRA, of the same rank and layers, has learned nothing yet."""
    base, _ = load_base("demo")
    torch.manual_seed(study.settings.seed)
    config = pr.MHRConfig(
        method="shared", rank=study.settings.rank, exclude_modules=study.settings.exclude
    )
    return pr.attach(base, config, [AVERAGE])


def fit(
    study: Study, model: RoutedModel, who: Sequence[int] | Ints, half: str, way: str, rate: float
) -> list[Adapted]:
    """Adapt to users from one half of what they wrote; every user gets the same settings.

    Args:
        study: the study.
        model: what to start from.
        who: the users.
        half: the examples.
        way: one of `WAYS`.
        rate: learning rate of what trains.
    """
    settings = study.settings
    examples = {name(u): [data.record(study.users, u, e) for e in study.half(half)] for u in who}
    return pr.adapt_many(
        model,
        examples,
        kind=study.kind,
        phase="z" if way == "row" else "mu",
        # A seed of its own for each half: the two rows of a user must have nothing in common but
        # the user, not even the order of the domains.
        seeds=[settings.seed + HALVES.index(half)],
        steps=settings.fit_steps,
        batch_size=settings.fit_batch,
        **({"route_lr": rate, "init": AVERAGE} if way == "row" else {"lr": rate}),
    )


def routes_of(results: Sequence[Adapted]) -> Tensor:
    """The rows `[U, N, H, K]`."""
    return torch.stack([r.route for r in results if r.route is not None])
