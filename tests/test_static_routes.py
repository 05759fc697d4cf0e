"""Constant weights over the LoRAs of a library, learned and ranked."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import batch, llama, relative_error, routed
from test_library_commands import loras_of
from torch import Tensor
from transformers import ByT5Tokenizer, T5ForConditionalGeneration
from unlike_loras import SETTINGS

import polyroute as pr
from polyroute.kinds.choose import ModelKind
from polyroute.library.ranking import Ranking
from polyroute.study.examples import encoded_records

WEIGHTS = {"plain": 0.5, "rs": -1.5}


def attached(loras: Path) -> pr.RoutedModel:
    return pr.attach(llama(), pr.Library.from_peft(loras)).eval()


def logits(model: pr.RoutedModel, tasks: Any) -> Tensor:
    found: Tensor = model(**batch(llama()), tasks=tasks).logits
    return found


@torch.no_grad()
def test_weights_are_those_of_a_merge(loras: Path, tmp_path: Path) -> None:
    model, library = attached(loras), pr.Library.from_peft(loras)
    library.merge("arithmetic", weights=WEIGHTS).save_peft(tmp_path / "merged" / "one")
    merged = pr.attach(llama(), pr.Library.from_peft(tmp_path / "merged")).eval()
    for granularity in ("coarsegrained", "blockwise", "finegrained"):
        rule = pr.Static(model, WEIGHTS, granularity=granularity)  # type: ignore[arg-type]
        assert relative_error(logits(model, rule), logits(merged, "one")) < 1e-5


@torch.no_grad()
def test_one_weight_is_the_lora_and_none_is_the_base(loras: Path) -> None:
    model = attached(loras)
    for name in SETTINGS:
        assert (
            relative_error(logits(model, pr.Static(model, {name: 1})), logits(model, name)) < 1e-6
        )
    base = llama()(**batch(llama())).logits
    assert relative_error(logits(model, pr.Static(model)), base) < 1e-6
    uniform = pr.Static(model, softmax=True, granularity="finegrained")
    assert torch.allclose(uniform.values(), torch.full((len(model.sites), 3), 1 / 3))
    assert relative_error(logits(model, uniform), logits(model, "mu")) < 1e-5


def test_weights_learn_and_nothing_else_does(loras: Path) -> None:
    model = attached(loras)
    wanted = logits(model, "rs").detach()
    before = [p.clone() for p in model.inventory.parameters()]
    rule = pr.Static(model)
    optimizer = torch.optim.Adam(rule.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        with model.route(rule):
            (model(**batch(llama())).logits - wanted).square().mean().backward()
        optimizer.step()
    found = dict(zip(model.tasks, rule.values()[0].tolist(), strict=True))
    assert found == pytest.approx({"patterns": 0, "plain": 0, "rs": 1}, abs=0.02)
    assert all(
        torch.equal(*pair) for pair in zip(before, model.inventory.parameters(), strict=True)
    )


def test_weights_belong_to_their_model(loras: Path) -> None:
    model = attached(loras)
    some = pr.attach(llama(), pr.Library.from_peft(loras), ["plain"])
    mhr = routed(llama())
    for act, sentence in (
        (lambda: logits(model, pr.Static(some)), "this rule knows nothing of 'patterns'"),
        (lambda: pr.Static(model, {"mu": 1.0}), "'mu' is the average of all LoRAs"),
        (
            lambda: pr.Static(model, granularity="block"),
            "unknown granularity 'block'",
        ),
        (lambda: pr.Static(model, {"rz": 1}), "unknown task 'rz': did you mean 'rs'"),
        (lambda: pr.Static(model, {"rs": float("nan")}), "weight must be a finite number"),
        (lambda: pr.Static(model, 1.0, softmax=True), "weights of a softmax start uniform"),
        (lambda: pr.Static(mhr, {mhr.tasks[0]: 1.0}), "tasks have no skills of their own here"),
        (lambda: logits(mhr, pr.Static(mhr, 0.1)), "constant weights add the updates of LoRAs"),
    ):
        with pytest.raises(pr.InputError, match=sentence):
            act()  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def setting(place: Path) -> tuple[pr.RoutedModel, ModelKind, list[Any]]:
    """A library on a tiny base model in fp64, and examples."""
    base = T5ForConditionalGeneration.from_pretrained(place / "base").double()
    kind = pr.kind_of(base, ByT5Tokenizer.from_pretrained(place / "base"), max_input=32)
    model = pr.attach(base, pr.Library.from_peft(loras_of(place))).eval()
    records = [{"input": word, "target": word[::-1]} for word in ("abc", "defg", "hi", "jklmn")]
    return model, kind, encoded_records(records, "back", kind)


def test_ranks_are_derivatives_of_the_loss(
    setting: tuple[pr.RoutedModel, ModelKind, list[Any]],
) -> None:
    model, kind, rows = setting
    found = pr.rank_skills(model, kind, rows, batch_size=3)
    rule = pr.Static(model, granularity="finegrained")

    def loss() -> float:
        total = 0.0
        for start, count in ((0, 3), (3, 1)):  # a batch is a mean over its tokens
            chosen = [{**row, "task": rule} for row in rows[start : start + count]]
            total += float(kind.loss(model, kind.collate(chosen))) * count / len(rows)
        return total

    step = 1e-3  # the loss is in fp32
    with torch.no_grad():
        for site, skill in ((0, 0), (3, 1), (len(model.sites) - 1, 0)):
            slopes = []
            for sign in (1, -1):
                rule.weights[site, skill] = sign * step
                slopes.append(loss())
            rule.weights.zero_()
            slope = (slopes[0] - slopes[1]) / (2 * step)
            assert float(found.by_site[site, skill]) == pytest.approx(-slope, rel=2e-3, abs=1e-3)
    assert found.scores == pytest.approx(
        dict(zip(found.names, found.by_site.sum(0).tolist(), strict=True))
    )
    assert found.alike.diagonal().tolist() == pytest.approx([1, 1])
    assert all(parameter.grad is None for parameter in model.inventory.parameters())


def test_a_lora_that_was_trained_for_a_task_comes_first(
    setting: tuple[pr.RoutedModel, ModelKind, list[Any]],
) -> None:
    model, kind, rows = setting
    optimizer = model.optimizer("full", lr=2e-2)
    chosen = [{**row, "task": "upper"} for row in rows]
    for _ in range(30):
        kind.loss(model, kind.collate(chosen)).backward()
        optimizer.step()
        optimizer.zero_grad()
    ranking = pr.rank_skills(model.eval(), kind, rows)
    assert next(iter(ranking.scores)) == "upper"
    assert ranking.top(1) == ["upper"]


def test_diversity_leaves_out_what_is_alike() -> None:
    alike = torch.tensor([[1, 0.9, 0.1], [0.9, 1, 0.1], [0.1, 0.1, 1]])
    ranking = Ranking(("a", "b", "c"), torch.tensor([[3.0, 2.9, 1.0]]), alike)
    assert ranking.top(2) == ["a", "b"]
    assert ranking.top(2, diversity=1) == ["a", "c"]
    assert ranking.top(9, diversity=1) == ["a", "c", "b"]
    for wrong in ({"count": 0}, {"count": 2, "diversity": 2}, {"count": 2, "diversity": -1}):
        with pytest.raises(pr.InputError, match="must"):
            ranking.top(**wrong)  # type: ignore[arg-type]


def test_only_libraries_are_ranked(
    setting: tuple[pr.RoutedModel, ModelKind, list[Any]],
) -> None:
    model, kind, rows = setting
    with pytest.raises(pr.InputError, match="this needs the LoRAs of a library"):
        pr.rank_skills(routed(llama()), kind, rows)
    with pytest.raises(pr.InputError, match="give at least one example"):
        pr.rank_skills(model, kind, [])


def test_weights_are_learned_from_examples(
    setting: tuple[pr.RoutedModel, ModelKind, list[Any]],
) -> None:
    model, kind, rows = setting
    model.inventory.requires_grad_()
    rule = pr.learn_weights(model, kind, rows, steps=20, seed=1)
    assert all(p.requires_grad for p in model.inventory.parameters())

    def loss(rule: pr.RouteRule) -> float:
        with torch.no_grad():
            return float(kind.loss(model, kind.collate([{**row, "task": rule} for row in rows])))

    assert loss(rule) < loss(pr.Static(model)) - 1e-3
    again = pr.learn_weights(model, kind, rows, steps=20, seed=1)
    assert torch.equal(rule.weights, again.weights)
    of_layers = pr.Static(model, granularity="finegrained")
    assert pr.learn_weights(model, kind, rows, of_layers, steps=20) is of_layers
    assert of_layers.weights.shape == (len(model.sites), 2)
    small = pr.learn_weights(model, kind, rows, steps=20, penalty=100.0)
    assert float(small.values().detach().abs().sum()) < 0.5 * float(rule.weights.abs().sum())
    for wrong in ({"steps": 0}, {"batch_size": 0}, {"lr": 0.0}, {"penalty": -1.0}):
        with pytest.raises(pr.InputError, match=next(iter(wrong))):
            pr.learn_weights(model, kind, rows, **wrong)  # type: ignore[arg-type]
    with pytest.raises(pr.InputError, match="at least one example"):
        pr.learn_weights(model, kind, [])
    with pytest.raises(pr.InputError, match="did you mean 'entropy'"):
        pr.learn_weights(model, kind, rows, objective="entrop")  # type: ignore[arg-type]


def test_weights_are_searched_without_gradients(
    setting: tuple[pr.RoutedModel, ModelKind, list[Any]],
) -> None:
    pytest.importorskip("nevergrad")
    model, kind, rows = setting

    def loss(rule: pr.RouteRule) -> float:
        with torch.no_grad():
            return float(kind.loss(model, kind.collate([{**row, "task": rule} for row in rows])))

    some = {"trials": 30, "penalty": 0.0, "most": 0.7, "batch_size": len(rows)}
    rule = pr.search_weights(model, kind, rows, **some)  # type: ignore[arg-type]
    assert loss(rule) < loss(pr.Static(model)) - 1e-3
    assert float(rule.weights.detach().abs().max()) <= 0.7
    again = pr.search_weights(model, kind, rows, **some)  # type: ignore[arg-type]
    assert torch.equal(rule.weights, again.weights)
    start = pr.Static(model, {"upper": 0.3})
    only = pr.search_weights(model, kind, rows, start, trials=1)
    assert only is start
    assert torch.equal(only.weights, pr.Static(model, {"upper": 0.3}).weights)
    with pytest.raises(pr.InputError, match="larger than most"):
        pr.search_weights(model, kind, rows, start, most=0.2)
    with pytest.raises(pr.InputError, match="trials"):
        pr.search_weights(model, kind, rows, trials=0)


def test_a_missing_nevergrad_is_named(
    setting: tuple[pr.RoutedModel, ModelKind, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, kind, rows = setting
    monkeypatch.setitem(sys.modules, "nevergrad", None)
    with pytest.raises(pr.InputError, match=r"install polyroute\[nevergrad\]"):
        pr.search_weights(model, kind, rows)


def test_entropies_are_those_of_the_choices(
    setting: tuple[pr.RoutedModel, ModelKind, list[Any]],
) -> None:
    model, kind, rows = setting
    asked = [{**row, "task": "upper", "choice_ids": [[5], [7], [9]]} for row in rows]
    found = kind.entropies(model, asked)
    for one, scores in zip(found, kind.scores(model, asked), strict=True):
        probabilities = scores[:, 0].double().softmax(0)
        expected = -(probabilities * probabilities.log()).sum()
        assert float(one) == pytest.approx(float(expected), rel=1e-4)
    with pytest.raises(pr.InputError, match="choices"):
        kind.entropies(model, rows)


def test_weights_are_learned_without_answers(
    setting: tuple[pr.RoutedModel, ModelKind, list[Any]],
) -> None:
    model, kind, rows = setting
    asked = [{**row, "choice_ids": [[5], [7], [9]], "target_ids": []} for row in rows]

    def entropy(rule: pr.RouteRule) -> float:
        with torch.no_grad():
            return float(kind.entropies(model, [{**row, "task": rule} for row in asked]).mean())

    rule = pr.Static(model, 0.3, granularity="finegrained")
    before = entropy(rule)
    pr.learn_weights(model, kind, asked, rule, objective="entropy", penalty=0.0, steps=10)
    assert entropy(rule) < before - 1e-3


def test_weights_are_not_saved_with_a_model(loras: Path) -> None:
    rule = pr.Static(attached(loras))
    with pytest.raises(pr.InputError, match="constant weights are not saved with a model"):
        pr.attach(llama(), pr.MHRConfig(), ["a"], rule=rule)


def test_a_library_that_became_its_mean_is_no_longer_ranked(
    setting: tuple[pr.RoutedModel, ModelKind, list[Any]],
) -> None:
    model, kind, rows = setting
    model.set_phase("mu")
    with pytest.raises(pr.InputError, match="this needs the LoRAs of a library"):
        pr.rank_skills(model, kind, rows)
