"""Learning constant weights over a library from a few examples, by gradient or by search."""

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from polyroute.errors import InputError
from polyroute.kinds.batches import Row, evaluating
from polyroute.kinds.choose import ModelKind
from polyroute.library.static import Static
from polyroute.model import RoutedModel
from polyroute.settings import SEEDS, named, number, whole

__all__ = ["learn_weights", "search_weights"]

Objective = Literal["answers", "entropy"]


def learn_weights(  # noqa: PLR0913 (public: users know its keywords)
    model: RoutedModel,
    kind: ModelKind,
    rows: Sequence[Row],
    rule: Static | None = None,
    *,
    objective: Objective = "answers",
    steps: int = 40,
    batch_size: int = 8,
    lr: float = 0.1,
    penalty: float = 0.05,
    seed: int = 0,
) -> Static:
    """Learn the weights of LoRAs by gradient; the LoRAs stay as they are.

    What is minimised is `objective`, plus `penalty` times the mean size of the weights as in
    LoraHub. With a softmax and no penalty this is LoRA Soups (Prabhakar et al., 2024); with
    `"entropy"`, weights for each layer that start at 0.3, and no penalty, it is AdaMerging (Yang et
    al., 2024) but for its bounds of 0 and 1, outside of which a weight has no gradient.

    Args:
        model: has the library.
        kind: how its base model learns.
        rows: encoded examples.
        rule: the weights to begin with, which are changed in place. By default each LoRA has one
            for the whole model, which starts at 0.
        objective: `"answers"`, the loss of the examples; or `"entropy"`, the mean entropy of the
            model's choices (see `ModelKind.entropies`), which needs no answers.
        steps: of Adam, with a rate that falls linearly to 0.
        batch_size: examples in a step.
        lr: the rate at the start.
        penalty: see above.
        seed: of the order of examples.

    Returns:
        The weights.

    Raises:
        InputError: there is no example, a number is out of range, the objective is `"entropy"` and
            an example has no choices, or the model averages the factors of skills.
    """
    whole()("steps", steps)
    whole()("batch_size", batch_size)
    whole(0, most=SEEDS - 1)("seed", seed)
    number(above=0)("lr", lr)
    learned = _Learned(model, kind, rows, rule, objective, penalty)
    optimizer = torch.optim.Adam(learned.rule.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-3, total_iters=steps)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    frozen = [p for p in model.inventory.parameters() if p.requires_grad]
    model.inventory.requires_grad_(False)
    try:
        with torch.inference_mode(False), evaluating(model), torch.enable_grad():
            for _ in range(steps):
                while len(order) < min(batch_size, len(rows)):
                    order += torch.randperm(len(rows), generator=generator).tolist()
                places, order = order[:batch_size], order[batch_size:]
                learned.step([rows[i] for i in places])
                optimizer.step()
                schedule.step()
    finally:
        for parameter in frozen:
            parameter.requires_grad_()
    return learned.rule


@torch.no_grad()
def search_weights(  # noqa: PLR0913 (public: users know its keywords)
    model: RoutedModel,
    kind: ModelKind,
    rows: Sequence[Row],
    rule: Static | None = None,
    *,
    objective: Objective = "answers",
    trials: int = 40,
    batch_size: int = 8,
    most: float = 1.5,
    penalty: float = 0.05,
    seed: int = 0,
) -> Static:
    """Search the weights of LoRAs without gradients, as LoraHub does (Huang et al., 2023).

    Nevergrad's `NGOpt` minimises what `learn_weights` does, here over all examples at once. Updates
    are weighted, where LoraHub weights both factors, so that its own weights act squared.

    Args:
        model: has the library.
        kind: how its base model learns.
        rows: encoded examples.
        rule: the weights to begin with, which are changed in place; see `learn_weights`.
        objective: see `learn_weights`.
        trials: of weights, the first being those to begin with.
        batch_size: examples in a forward.
        most: the largest size of a weight.
        penalty: see `learn_weights`.
        seed: of the search.

    Returns:
        The best weights that were tried.

    Raises:
        InputError: as `learn_weights`; nevergrad is not installed, or a weight to begin with is
            larger than `most`.
    """
    whole()("trials", trials)
    whole()("batch_size", batch_size)
    whole(0, most=SEEDS - 1)("seed", seed)
    number(above=0)("most", most)
    nevergrad = _nevergrad()
    learned = _Learned(model, kind, rows, rule, objective, penalty)
    weights = learned.rule.weights
    start = weights.detach().clone()
    if start.abs().max() > most:
        raise InputError(f"a weight to begin with is larger than most={most}: give a larger one")
    space = nevergrad.p.Array(init=start.double().cpu().numpy()).set_bounds(-most, most)
    space.random_state.seed(seed)
    search = nevergrad.optimizers.NGOpt(parametrization=space, budget=trials)
    search.suggest(space.value)
    best, least = start, math.inf
    with evaluating(model):
        for _ in range(trials):
            asked = search.ask()
            weights.copy_(torch.from_numpy(asked.value))
            loss = learned.over_all(batch_size)
            search.tell(asked, loss)
            if loss < least:
                best, least = weights.clone(), loss
    weights.copy_(best)
    return learned.rule


class _Learned:
    """What is minimised, as a function of the weights."""

    def __init__(
        self,
        model: RoutedModel,
        kind: ModelKind,
        rows: Sequence[Row],
        rule: Static | None,
        objective: Objective,
        penalty: float,
    ) -> None:
        named(get_args(Objective))("objective", objective)
        number(least=0)("penalty", penalty)
        if not len(rows):
            raise InputError("give at least one example to learn weights from")
        model.check_unmerged()
        self.rule = Static(model) if rule is None else rule
        self._rows, self._penalty = rows, penalty
        self._mean: Callable[[Sequence[Row]], Tensor] = {
            "answers": lambda some: kind.loss(model, kind.collate(some)),
            "entropy": lambda some: kind.entropies(model, some).mean(),
        }[objective]

    def _value(self, rows: Sequence[Row]) -> Tensor:
        routed = [{**row, "task": self.rule} for row in rows]
        return self._mean(routed)

    def _size(self) -> Tensor:
        return self._penalty * self.rule.values().abs().mean()

    def step(self, rows: Sequence[Row]) -> None:
        """Set the gradient of the weights for some examples; nothing else gets any."""
        loss = self._value(rows) + self._size()
        (self.rule.weights.grad,) = torch.autograd.grad(loss, [self.rule.weights])

    def over_all(self, batch_size: int) -> float:
        """The value over all examples; infinite where it is not a number."""
        total = 0.0
        for first in range(0, len(self._rows), batch_size):
            some = [self._rows[i] for i in range(first, min(first + batch_size, len(self._rows)))]
            total += float(self._value(some)) * len(some)
        value = total / len(self._rows) + float(self._size())
        return value if math.isfinite(value) else math.inf


def _nevergrad() -> ModuleType:
    try:
        import nevergrad
    except ImportError as error:
        raise InputError(
            "this search needs nevergrad: install polyroute[nevergrad], or learn the weights by "
            "gradient with learn_weights"
        ) from error
    found: ModuleType = nevergrad
    return found
