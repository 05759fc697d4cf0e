"""The users benchmark: its population, its yardsticks, and one tiny run of all of it."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from polyroute.layer.factors import LoRAFactors

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import users
import users_data as data
import users_measures
import users_report
import users_study

POPULATION = data.Population(archetypes=3)


@pytest.fixture(scope="module")
def drawn() -> data.Users:
    return data.draw_users(POPULATION, users=400, examples=40)


def test_an_answer_gives_its_operations_away() -> None:
    for d, domain in enumerate(data.DOMAINS):
        for q in range(len(data.questions(domain))):
            words = data.words_of(d, q)
            assert len({data.answer(words, triple) for triple in data.TRIPLES}) == 45


def test_a_user_answers_by_their_choices_and_sees_no_input_twice(drawn: data.Users) -> None:
    seen = set()
    for example in range(40):
        record = data.record(drawn, 7, example)
        seen.add(record["input"])
        select, transform, format_ = (
            names[i]
            for names, i in zip(data.STAGES.values(), drawn.choice[7, example], strict=True)
        )
        assert record["target"] == data.answer(
            record["input"].split(), (select, transform, format_)
        )
        assert "7" not in record["instruction"]
    assert len(seen) == 40


def test_choices_follow_the_probabilities_and_those_the_archetype(drawn: data.Users) -> None:
    who = np.arange(400)
    chosen = data.counts(drawn, who, slice(0, 40))
    asked = np.stack([(drawn.domain == d).sum(1) for d in range(3)], axis=1)
    expected = asked[..., None] * drawn.probabilities
    spread = np.sqrt((expected * (1 - drawn.probabilities)).sum())
    assert abs((chosen - expected)[..., 0].sum()) < 4 * spread
    assert np.corrcoef(chosen.ravel(), expected.ravel())[0, 1] > 0.9
    alpha = data.prior(POPULATION, drawn.preferred)
    np.testing.assert_allclose(alpha.sum(-1), 3 * POPULATION.concentration)
    average = drawn.probabilities[drawn.archetype == 1].mean(0)
    np.testing.assert_allclose(average, alpha[1] / POPULATION.concentration, atol=0.15)


def test_the_best_identifier_predicts_one_choice_after_the_other(drawn: data.Users) -> None:
    alpha = data.prior(POPULATION, drawn.preferred)
    enrolled = data.counts(drawn, [0, 1], slice(0, 20))
    probe = data.counts(drawn, [0, 1], slice(20, 40))
    found = data.best_similarity(probe, enrolled, alpha)

    def sequence(user: int, examples: range, counts: Any, a: int) -> float:
        total, state = 0.0, counts + alpha[a]
        for e in examples:
            d = drawn.domain[user, e]
            for s, (start, size) in enumerate(zip(data.STARTS, data.SIZES, strict=True)):
                urn = state[d, start : start + size]
                total += math.log(urn[drawn.choice[user, e, s]] / urn.sum())
                urn[drawn.choice[user, e, s]] += 1
        return total

    for p in range(2):
        for c in range(2):
            first = [sequence(c, range(20), np.zeros((3, 11)), a) for a in range(3)]
            then = [sequence(p, range(20, 40), enrolled[c].copy(), a) for a in range(3)]
            weights = np.exp(np.array(first) - max(first))
            expected = math.log((weights * np.exp(then)).sum() / weights.sum())
            assert found[p, c] == pytest.approx(expected)


def test_nothing_finds_more_users_than_the_best_identifier(drawn: data.Users) -> None:
    who = np.arange(400)
    enrolled, probe = (data.counts(drawn, who, half) for half in (slice(0, 20), slice(20, 40)))
    best = data.best_similarity(probe, enrolled, data.prior(POPULATION, drawn.preferred))
    histogram = data.histogram_similarity(probe, enrolled)
    found = [(users_report.ranks(s) == 0).mean() for s in (best, histogram)]
    assert found[0] > found[1] > 0.2


def test_guessing_gains_nothing_from_ties() -> None:
    assert users_report.ranks(np.zeros((5, 5))).tolist() == [2] * 5
    assert users_report.ranks(np.eye(5)).tolist() == [0] * 5
    low, high = users_report.wilson(0.0, 10)
    assert low == pytest.approx(0.0, abs=1e-12)
    assert high == pytest.approx(0.2775, abs=1e-3)
    assert users_report.chance(4)["mean_reciprocal_rank"] == pytest.approx(25 / 48)


def test_only_users_that_one_way_alone_finds_tell_the_ways_apart() -> None:
    assert users_report.sign_test([0, 0, 0, 3, 0], [1, 0, 2, 0, 0]) == (2, 1, 1.0)
    assert users_report.sign_test([0] * 6, [1] * 6) == (6, 0, pytest.approx(2 / 64))
    assert users_report.sign_test([0], [0]) == (0, 0, 1.0)


def test_updates_are_compared_as_if_they_were_written_out() -> None:
    torch.manual_seed(0)

    def result() -> Any:
        return SimpleNamespace(
            factors=[LoRAFactors(torch.randn(2, 5), torch.randn(2, 3)) for _ in range(2)]
        )

    enrolled, probe = [result() for _ in range(4)], [result() for _ in range(4)]

    def flat(one: Any) -> torch.Tensor:
        return torch.cat([(f.b.T @ f.a).flatten() for f in one.factors]).double()

    mean = torch.stack([flat(r) for r in enrolled]).mean(0)
    rows, columns = (torch.stack([flat(r) - mean for r in group]) for group in (probe, enrolled))
    expected = torch.cosine_similarity(rows[:, None], columns[None], dim=-1)
    found = users_measures.delta_cosines(enrolled, probe)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_a_tiny_study_runs_once_and_is_taken_up_again(tmp_path: Path) -> None:
    settings = replace(
        users_study.QUICK, training_users=32, new_users=6, fit_steps=1, fit_lrs=(1.0,),
        lora_lrs=(1e-3,), fresh_lrs=(1e-3,), tuning_users=2, lora_users=2, steered_users=2,
    )  # fmt: skip
    report = users.run(settings, tmp_path / "work")
    report = json.loads(json.dumps(users_report.rounded(report)))
    text = users_report.in_markdown(report)
    assert "One of 6 new users" in text
    users_report.draw(tmp_path / "users.png", report)
    assert (tmp_path / "users.png").stat().st_size > 10_000
    assert len(report["identification"]["ranks"]["rows"]) == 6
    # With one step of 8 examples the probabilities have hardly moved, but they are probabilities.
    assert all(0 < x < 1 for user in report["steering"]["shares"]["toward"] for x in user)
    before = (tmp_path / "work" / "inventory" / "inventory.safetensors").stat().st_mtime_ns
    again = json.loads(json.dumps(users_report.rounded(users.run(settings, tmp_path / "work"))))
    after = (tmp_path / "work" / "inventory" / "inventory.safetensors").stat().st_mtime_ns
    assert before == after
    assert again["identification"] == report["identification"]
    with pytest.raises(SystemExit, match="other settings"):
        users.run(replace(settings, rank=2), tmp_path / "work")
