"""What is said of an inventory's routing, against loops and small cases that are known."""

import json
import math
from itertools import combinations, permutations
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import TASKS, routed, stack
from torch import Tensor

from polyroute import InputError
from polyroute.program.cli.app import main
from polyroute.saved.checkpoint import read_checkpoint
from polyroute.study.analysis import analyse, saved_weights
from polyroute.study.categories import relate_to_categories
from polyroute.study.routing_measures import (
    diversity,
    gate_discreteness,
    gate_efficiency,
    gate_sparsity,
    route_similarity,
    skill_usage,
)


def logits_of(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(shape, generator=generator, dtype=torch.float64)


shapes = st.tuples(*[st.integers(1, 4)] * 4)


def angle(x: Tensor, y: Tensor) -> float:
    return 1 - float(x @ y / (x.norm() * y.norm()))


@given(shapes)
def test_diversity_is_the_mean_over_pairs(shape: tuple[int, int, int, int]) -> None:
    weights = logits_of(shape).softmax(-1)
    tasks, routers, heads, _ = shape
    for t in range(tasks):
        w = weights[t]
        of_heads = [
            angle(w[n, g], w[n, h])
            for n in range(routers)
            for g, h in combinations(range(heads), 2)
        ]
        of_routers = [
            angle(w[m, h], w[n, h])
            for h in range(heads)
            for m, n in combinations(range(routers), 2)
        ]
        for over, found in (("heads", of_heads), ("routers", of_routers)):
            mean = sum(found) / len(found) if found else 0.0
            assert float(diversity(weights, over=over)[t]) == pytest.approx(mean, abs=1e-12)


def test_diversity_is_none_where_heads_agree_and_one_where_they_share_no_skill() -> None:
    same = logits_of((3, 2, 1, 4)).softmax(-1).expand(-1, -1, 5, -1)
    torch.testing.assert_close(diversity(same, over="heads"), torch.zeros(3).double())
    apart = torch.eye(4).expand(3, 2, 4, 4)
    torch.testing.assert_close(diversity(apart, over="heads"), torch.ones(3))
    torch.testing.assert_close(diversity(apart, over="routers"), torch.zeros(3))
    with pytest.raises(InputError, match="over must be 'heads' or 'routers', not 'skills'"):
        diversity(apart, over="skills")


@given(shapes)
def test_the_monitor_is_its_sums(shape: tuple[int, int, int, int]) -> None:
    z = logits_of(shape)
    tasks, routers, heads, skills = shape
    for n in range(routers):
        gates = [
            [1 / (1 + math.exp(-float(z[t, n, h, k]))) for h in range(heads) for k in range(skills)]
            for t in range(tasks)
        ]
        flat = [p for row in gates for p in row]
        bits = [-p * math.log2(p) - (1 - p) * math.log2(1 - p) for p in flat]
        means = [sum(column) / tasks for column in zip(*gates, strict=True)]
        shares = [mean / sum(means) for mean in means]
        spread = -sum(s * math.log(s) for s in shares)
        expected = (
            sum(p > 0.5 for p in flat) / len(flat),
            sum(bits) / len(bits),
            spread / math.log(len(shares)) if len(shares) > 1 else 1.0,
        )
        for measure, value in zip(
            (gate_sparsity, gate_discreteness, gate_efficiency), expected, strict=True
        ):
            assert float(measure(z)[n]) == pytest.approx(value, abs=1e-6)


def test_the_monitor_at_its_ends() -> None:
    z = torch.tensor([[-200.0, 200.0], [-200.0, 200.0]])[:, None, None]
    assert gate_sparsity(z).tolist() == [0.5]
    assert gate_discreteness(z).tolist() == [0.0]
    assert gate_efficiency(z).tolist() == [0.0]
    half = torch.zeros_like(z)
    assert gate_discreteness(half).tolist() == [1.0]
    assert gate_efficiency(half).tolist() == [1.0]


# ------------------------------------------------------------- relation to categories


def grouped(groups: list[int], noise: float = 0.1) -> Tensor:
    """The similarity of tasks that are routed by group."""
    centres = torch.eye(max(groups) + 1, dtype=torch.float64)[groups]
    weights = centres + noise * logits_of(tuple(centres.shape))
    return route_similarity(weights[:, None, None])


def test_categories_that_are_the_routes_are_found() -> None:
    groups = [0, 1, 2, 0, 1, 2, 0, 1, 0]
    found = relate_to_categories(grouped(groups), [f"group {g}" for g in groups])
    assert found is not None
    assert (found.tasks, found.categories, found.ari, found.purity) == (9, 3, 1.0, 1.0)
    assert found.chance == pytest.approx((4 * 3 + 3 * 2 + 2 * 1) / (9 * 8))
    assert found.p < 0.005


def test_categories_that_are_not_the_routes_are_not() -> None:
    found = relate_to_categories(grouped([0, 0, 0, 1, 1, 1]), ["a", "b", "a", "b", "a", "b"])
    assert found is not None
    assert found.ari < 0.1
    assert found.p > 0.2


def test_chance_and_p_are_those_of_all_exchanges() -> None:
    similarity, names = grouped([0, 0, 1, 1, 2, 2], noise=0.5), ("a", "a", "a", "b", "b", "c")
    found = relate_to_categories(similarity, names)
    assert found is not None
    nearest = similarity.clone().fill_diagonal_(-2).argmax(1).tolist()
    purities = [
        sum(order[i] == order[near] for i, near in enumerate(nearest)) / 6
        for order in permutations(names)
    ]
    assert found.purity == purities[0]
    assert found.chance == pytest.approx(sum(purities) / len(purities))
    exact = sum(p >= found.purity for p in purities) / len(purities)
    assert found.p == pytest.approx(exact, abs=0.02)
    assert relate_to_categories(similarity, names) == found
    assert relate_to_categories(similarity, names, seed=1) != found


def test_tasks_without_a_category_are_left_out() -> None:
    groups = [0, 1, 0, 1, 0, 1]
    similarity = grouped([*groups, 0, 1])
    names = [f"group {g}" for g in groups]
    whole = relate_to_categories(similarity[:6, :6], names)
    assert relate_to_categories(similarity, [*names, "", ""]) == whole


@pytest.mark.parametrize("names", [["a"] * 4, ["a", "b", "c", "d"], [""] * 4, ["a", "a", "", ""]])
def test_categories_that_say_nothing_have_no_relation(names: list[str]) -> None:
    assert relate_to_categories(grouped([0, 0, 1, 1]), names) is None


# ------------------------------------------------------------- of a checkpoint


def average_linkage(distance: Tensor) -> list[float]:
    """The distances at which clusters merge, by the definition."""
    clusters, heights = [[i] for i in range(len(distance))], []

    def between(pair: tuple[list[int], list[int]]) -> float:
        return float(distance[pair[0]][:, pair[1]].mean())

    while len(clusters) > 1:
        first, second = min(combinations(clusters, 2), key=between)
        heights.append(between((first, second)))
        clusters = [c for c in clusters if c not in (first, second)] + [first + second]
    return heights


def test_the_analysis_of_a_checkpoint_is_that_of_its_weights(tmp_path: Path) -> None:
    tasks = tuple(f"task {i}" for i in range(7))
    model = routed(stack(), tasks, num_heads=2, num_skills=3)
    model.save_pretrained(tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    found = analyse(checkpoint)
    weights = saved_weights(checkpoint)
    assert weights is not None
    logits = torch.stack([model.routes[task] for task in tasks])
    assert (found.tasks, found.routers) == (list(tasks), model.routers)
    similarity = route_similarity(weights)
    for name, expected in {
        "weights": weights.mean((1, 2)),
        "usage": skill_usage(weights),
        "overall_usage": weights.mean((0, 1, 2)),
        "head_diversity": diversity(weights, over="heads"),
        "router_diversity": diversity(weights, over="routers"),
        "sparsity": gate_sparsity(logits),
        "discreteness": gate_discreteness(logits),
        "efficiency": gate_efficiency(logits),
        "similarity": similarity,
    }.items():
        torch.testing.assert_close(torch.tensor(getattr(found, name)), expected)
    heights = [row[2] for row in found.linkage]
    assert heights == pytest.approx(average_linkage(1 - similarity), abs=1e-6)
    assert sorted(found.order) == list(range(7))
    # The two that merge first stand side by side.
    first, second = (found.order.index(int(i)) for i in found.linkage[0][:2])
    assert abs(first - second) == 1
    assert found.categories is None
    assert found.relation is None
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()


def test_the_categories_of_an_analysis_are_by_task(tmp_path: Path) -> None:
    routed(stack(), num_heads=2).save_pretrained(tmp_path)
    categories = {"birch": "tree", "cedar": "tree", "dune": "sand", "oak": "tree"}
    found = analyse(read_checkpoint(tmp_path), categories)
    assert found.categories == ["", "tree", "tree", "sand"]
    assert found.relation is not None
    assert (found.relation.tasks, found.relation.categories) == (3, 2)
    assert found.to_dict()["relation"]["chance"] == pytest.approx(1 / 3)


def test_a_large_table_is_analysed_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyroute.study.analysis.LISTED", 3)
    routed(stack(), num_heads=2).save_pretrained(tmp_path)
    assert analyse(read_checkpoint(tmp_path)).tasks == list(TASKS[:3])


def test_what_is_not_routed_is_not_analysed(tmp_path: Path) -> None:
    routed(stack(), method="shared").save_pretrained(tmp_path / "shared")
    with pytest.raises(InputError, match="tasks of this 'shared' inventory have no routes"):
        analyse(read_checkpoint(tmp_path / "shared"))
    routed(stack(), ("oak",)).save_pretrained(tmp_path / "one")
    with pytest.raises(InputError, match="there is only one task"):
        analyse(read_checkpoint(tmp_path / "one"))


def test_inspecting_with_a_suite_relates_routes_to_its_categories(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, suite = tmp_path / "run", tmp_path / "suite"
    model = routed(stack(), num_heads=2)
    model.routes["birch"], model.routes["dune"] = model.routes["amber"], model.routes["cedar"]
    model.save_pretrained(run)
    suite.mkdir()
    roles = {}
    for name, category in zip(TASKS, ("a", "a", "b", "b"), strict=True):
        record = {"input": "x", "target": "y", "split": "train"}
        (suite / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
        roles[name] = {
            "category": category, "metric": "exact_match", "choices": False, "role": "train",
        }  # fmt: skip
    (suite / "roles.json").write_text(json.dumps(roles))
    main(["inspect", str(run), "--data", str(suite)])
    shown = capsys.readouterr().out
    assert "nearest task by route (cosine)" in shown
    assert "4 tasks in 2 categories" in shown
    assert "adjusted Rand index of clusters by route: 1.000" in shown
    assert "nearest task is of the same category: 1.000 (by chance 0.333, p 0.33" in shown
    for role in roles.values():
        role["category"] = "all"
    (suite / "roles.json").write_text(json.dumps(roles))
    with pytest.raises(SystemExit):
        main(["inspect", str(run), "--data", str(suite)])
    assert "into no categories that say something" in capsys.readouterr().err
