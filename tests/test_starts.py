"""Where a new task starts: at the mixture of a route, and at routes that answer its examples."""

from pathlib import Path
from typing import Any

import pytest
import torch
from base_models import bert, llama, t5
from test_adapt import TRAINED, examples, tensors_of, trained

from polyroute import adapt_many
from polyroute.adapting import loop as slot_training
from polyroute.adapting.row_batches import losses_of
from polyroute.adapting.starts import FIRST, KEPT, TRIED, _promising, nearest_routes
from polyroute.errors import InputError
from polyroute.study.examples import encoded_records

STILL: dict[str, Any] = {"steps": 1, "lr": 1e-30, "route_lr": 1e-30, "batch_size": 4}
"""Settings that leave a slot where it starts."""


@pytest.mark.parametrize("make", [bert, t5, llama])
@pytest.mark.parametrize("method", ["poly", "mhr", "private"])
def test_mu_starts_at_the_mixture_of_a_task(make: Any, method: str) -> None:
    model, kind = trained(make, method)
    result = adapt_many(
        model, {"new": examples("new")}, kind=kind, phase="mu", init="second", **STILL
    )[0]
    expected = [t for f in model.factors_of("second") for t in vars(f).values()]
    for one, other in zip(tensors_of(result), expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("shots", [6, 20])
@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize("phase", ["z", "mu", "full"])
def test_the_nearest_of_few_tasks_are_weighed_by_their_likelihood(
    phase: str, make: Any, shots: int
) -> None:
    model, kind = trained(make)
    made = examples("new", shots)
    result = adapt_many(
        model, {"new": made}, kind=kind, phase=phase, init="nearest", **STILL  # type: ignore[arg-type]
    )[0]  # fmt: skip
    encoded = encoded_records(made, "new", kind)
    rows = [encoded[i] for i in result.indices]
    parts = rows[:FIRST], rows[FIRST:]
    assert bool(parts[1]) == (shots > FIRST)
    model.eval()

    def summed(part: list[Any], task: str) -> float:
        batch = kind.collate([{**row, "task": task} for row in part])
        return float(kind.loss(model, batch).detach()) * len(part)

    sums_T = first_T = torch.tensor([summed(parts[0], task) for task in TRAINED])
    if parts[1]:
        sums_T = first_T + torch.tensor([summed(parts[1], task) for task in TRAINED])
        sums_T[first_T.argsort()[KEPT:]] = torch.inf
    share = torch.softmax(-sums_T, 0)
    assert (share == 0).sum() == (len(TRAINED) - KEPT if parts[1] else 0)
    logits = sum(s * model.routes[task] for s, task in zip(share, TRAINED, strict=True))
    if phase != "mu":
        assert result.route is not None
        torch.testing.assert_close(result.route, logits, atol=1e-4, rtol=1e-4)
    model.add_task("there", logits)
    expected = [t for f in model.factors_of("there") for t in vars(f).values()]
    for one, other in zip(tensors_of(result), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make", [bert, t5, llama])
def test_close_to_the_average_the_candidates_are_the_best_there_are(make: Any) -> None:
    model, kind = trained(make)
    torch.manual_seed(1)
    many = 5 * TRIED
    rows = 0.02 * torch.randn(many, model.routes[0].numel())
    model.add_tasks([f"other {i}" for i in range(many)], rows)
    model.keep_tasks([f"other {i}" for i in range(many)])
    encoded = encoded_records(examples("new", 20), "new", kind)
    model.eval()
    with torch.no_grad():
        batches = [(name, encoded) for name in model.routes.names]
        losses = torch.tensor(losses_of(model, kind, batches, 500), dtype=torch.float64)
    packing = kind.packing_of(model, model.routes.names[0])
    assert (packing is None) == (make is not llama)
    candidates = _promising(model, kind, [encoded], 500, packing)[0].tolist()
    best = losses.argsort()[:TRIED].tolist()
    assert candidates[0] in best[:2]
    assert len(set(candidates) & set(best)) >= TRIED - 2


def test_company_changes_nothing() -> None:
    model, kind = trained()
    both = {name: examples(name) for name in ("one", "other task")}
    settings = {"kind": kind, "phase": "z", "init": "nearest", **STILL}
    together = adapt_many(model, both, **settings)
    for result in together:
        single = adapt_many(model, {result.task: both[result.task]}, **settings)[0]
        torch.testing.assert_close(single.route, result.route, atol=1e-5, rtol=1e-5)


def test_an_interrupted_slot_goes_on_from_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, kind = trained()
    given = {"new": examples("new")}
    options = {"kind": kind, "phase": "full", "init": "nearest", "steps": 4, "batch_size": 4}
    expected = adapt_many(model, given, **options)[0]
    monkeypatch.setattr(slot_training, "SECONDS_BETWEEN_SAVES", 0.0)
    take, steps = slot_training._take_step, iter(range(9))

    def interrupted(*arguments: Any) -> None:
        if next(steps) == 2:
            raise KeyboardInterrupt
        take(*arguments)

    monkeypatch.setattr(slot_training, "_take_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        adapt_many(model, given, folder=tmp_path / "x", **options)
    actual = adapt_many(model, given, folder=tmp_path / "x", **options)[0]
    for one, other in zip(tensors_of(actual), tensors_of(expected), strict=True):
        torch.testing.assert_close(one, other)


def test_the_model_is_left_as_it_was() -> None:
    model, kind = trained()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.routes.requires_grad_(False)
    rows = encoded_records(examples("new"), "new", kind)
    nearest_routes(model, kind, {"new": rows}, tokens=500)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None for p in model.parameters())
    assert not model.routes.logits.requires_grad


@pytest.mark.parametrize("method", ["shared", "private"])
def test_methods_without_routes_have_no_nearest(method: str) -> None:
    model, kind = trained(method=method)
    with pytest.raises(InputError, match="this inventory has none"):
        adapt_many(model, {"new": examples("new")}, kind=kind, phase="mu", init="nearest")


def test_phases_that_start_afresh_take_no_start() -> None:
    model, kind = trained()
    with pytest.raises(InputError, match="would be ignored"):
        adapt_many(model, {"new": examples("new")}, kind=kind, phase="random", init="nearest")


def test_a_task_called_nearest_leaves_no_doubt() -> None:
    model, kind = trained()
    model.add_task("nearest")
    with pytest.raises(InputError, match="could also mean the task of that name"):
        adapt_many(model, {"new": examples("new")}, kind=kind, phase="z", init="nearest")
