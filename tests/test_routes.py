"""Rows as data: neighbours, arithmetic, many additions."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TASKS, routed, stack

from polyroute import InputError, MHRConfig, RoutedModel, attach
from polyroute.routes.table import RoutingTable
from polyroute.study.routing_measures import route_similarity
from polyroute.task_names import check_names


def table(count: int = 30, seed: int = 0, config: MHRConfig | None = None) -> RoutingTable:
    routes = RoutingTable([f"task {i}" for i in range(count)], (2, 2, 3), config=config)
    assert routes.logits is not None
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        routes.logits.copy_(torch.randn(routes.logits.shape, generator=generator) * 3)
    return routes


@pytest.mark.parametrize("at_once", [1, 50, 10**6])
def test_the_nearest_tasks_are_those_of_the_similarity_of_weights(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polyroute.routes.nearest.COMPARED_AT_ONCE", at_once)
    routes = table()
    logits = torch.stack([routes[i] for i in range(30)])
    weights = torch.sigmoid(logits) / torch.sigmoid(logits).sum(-1, keepdim=True)
    expected = route_similarity(weights)[4]
    expected[4] = -2
    found = routes.nearest("task 4", k=30)
    order = expected.argsort(descending=True).tolist()[:29]
    assert [name for name, _ in found] == [f"task {i}" for i in order]
    torch.testing.assert_close(torch.tensor([c for _, c in found]), expected[order])
    assert routes.nearest(4, k=3) == found[:3]
    by_values = routes.nearest(routes["task 4"], k=1)[0]
    assert by_values[0] == "task 4"
    assert by_values[1] == pytest.approx(1.0)


def test_what_does_the_same_is_alike_whatever_its_logits() -> None:
    routes = table()
    routes["task 1"] = torch.tensor([20.0, -20.0, -20.0]).expand(2, 2, 3)
    routes["task 2"] = torch.tensor([60.0, -30.0, -40.0]).expand(2, 2, 3)
    name, cosine = routes.nearest("task 1", 1)[0]
    assert name == "task 2"
    assert cosine == pytest.approx(1.0)


def test_neighbours_follow_the_gate_of_the_model() -> None:
    plain, l2 = table(), table(config=MHRConfig(normalization="l2"))
    assert plain.nearest("task 0", 29) != l2.nearest("task 0", 29)
    model = routed(stack(), normalization="l2", num_heads=2)
    weights = torch.stack([model.weights_of(task) for task in TASKS])
    expected = route_similarity(weights)[0, 1:].sort(descending=True).values
    found = torch.tensor([cosine for _, cosine in model.routes.nearest("amber")])
    torch.testing.assert_close(found, expected)


def test_few_tasks_have_few_neighbours() -> None:
    assert table(1).nearest("task 0") == []
    assert [name for name, _ in table(2).nearest("task 0")] == ["task 1"]
    assert len(table(3).nearest("mu")) == 3
    with pytest.raises(InputError, match="unknown task 'oak'"):
        table().nearest("oak")
    with pytest.raises(InputError, match="k must be a positive whole number, not 0"):
        table().nearest("task 0", 0)
    with pytest.raises(InputError, match="a routing row has shape"):
        table().nearest(torch.ones(3))
    with pytest.raises(InputError, match="no routing logits"):
        RoutingTable(TASKS, None).nearest("amber")


def test_rows_are_tensors_to_calculate_with() -> None:
    model = routed(stack(), num_heads=2)
    amber, birch = model.routes["amber"], model.routes["birch"]
    halfway = torch.lerp(amber, birch, 0.5)
    model.add_task("between", init=halfway)
    assert torch.equal(model.routes["between"], halfway)
    model.routes["amber"] += 0.5 * (birch - amber)
    torch.testing.assert_close(model.routes["amber"], halfway)
    assert torch.equal(model.routes["birch"], birch)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 4), st.sampled_from(["uniform", "row", "flat", "each", "flat each", "task"]))
def test_many_tasks_are_added_as_one_after_the_other(count: int, how: str) -> None:
    together, apart = (routed(stack(), num_heads=2) for _ in range(2))
    names = [f"new {i}" for i in range(count)]
    values = torch.randn(count, 3, 2, 4)
    one = values[0] if count else torch.zeros(3, 2, 4)
    init = {
        "uniform": "uniform", "task": "cedar", "row": one, "flat": one.flatten(),
        "each": values, "flat each": values.flatten(1),
    }[how]  # fmt: skip
    assert together.add_tasks(names, init) == list(range(4, 4 + count))  # type: ignore[arg-type]
    for i, name in enumerate(names):
        row = apart.routes.add([name], values[i] if "each" in how else one)
        assert row == [4 + i]
        if how == "task":
            apart.routes[name] = apart.routes["cedar"]
    assert together.tasks == apart.tasks
    for name in together.tasks:
        if how == "uniform" and name in names:
            assert together.routes[name].abs().max() <= 1e-3
        else:
            assert torch.equal(together.routes[name], apart.routes[name])


@pytest.mark.parametrize(
    ("names", "init", "message"),
    [
        (["elm", "fir", "elm"], "uniform", "task 'elm' is given twice"),
        (["elm", "amber"], "uniform", "task 'amber' is given twice"),
        (["elm", "mu"], "uniform", "'mu' is reserved"),
        (["elm", ""], "uniform", "non-empty string"),
        (["elm", "fir"], "oak", "unknown task 'oak'"),
        (["elm", "fir"], torch.zeros(3, 3, 2, 4), "a routing row has shape"),
        ("elm", "uniform", "not the single string 'elm'"),
        (["elm", "a\nb"], "uniform", r"has the character U\+000A"),
        (["elm", "\ud800"], "uniform", r"has the character U\+D800"),
        (["\u00e9", "e\u0301"], "uniform", "how their characters are composed"),
        (["elm"], None, "a task is a name or a row number, not None"),
        (["elm"], torch.zeros(3, 2, 4).numpy(), "a dense tensor of real numbers, not ndarray"),
        (["elm"], torch.zeros(3, 2, 4, dtype=torch.complex64), "of type torch.complex64"),
        (["elm"], torch.full((24,), 1e300, dtype=torch.float64), "finite numbers"),
    ],
    ids=str,
)
def test_a_refused_addition_adds_nothing(names: list[str], init: str, message: str) -> None:
    model = routed(stack(), num_heads=2)
    before = model.state_dict()["routes.logits"].clone()
    with pytest.raises(InputError, match=message):
        model.add_tasks(names, init)
    assert model.tasks == TASKS
    assert torch.equal(model.state_dict()["routes.logits"], before)


def test_a_name_composed_in_two_ways_is_one_task() -> None:
    model = routed(stack())
    model.add_task("Caf\u00e9")
    with pytest.raises(InputError, match="how their characters are composed"):
        model.add_task("Cafe\u0301")
    assert model.add_task("caf\u00e9") == 5  # names of users may differ in case alone


def test_a_million_names_are_checked_in_seconds() -> None:
    names = [f"user {i} \u00e9" for i in range(10**6)]
    start = time.process_time()
    check_names(names)
    check_names(["new"], dict.fromkeys(names))
    assert time.process_time() - start < 6  # a second on an idle core


def test_private_tasks_are_added_together_too() -> None:
    model: RoutedModel = routed(stack(), method="private")
    assert model.add_tasks(["elm", "fir"], init="birch") == [4, 5]
    x = torch.randn(2, 8)
    assert torch.equal(model(x, tasks="fir"), model(x, tasks="birch"))


def test_training_tasks_start_as_far_apart_as_asked_and_new_tasks_uniform() -> None:
    torch.manual_seed(0)
    model = attach(stack(), MHRConfig(num_heads=4, route_spread=3.0), TASKS)
    logits = model.routes.logits
    assert logits is not None
    assert 2.5 < float(logits.detach().abs().max()) <= 3.0
    model.add_task("new")
    assert float(model.routes["new"].abs().max()) <= 1e-3
    model.set_phase("random")  # a control draws everything as training found it
    assert model.routes.logits is not None
    assert 2.5 < float(model.routes["new"].abs().max()) <= 3.0


def test_by_default_every_mixture_starts_uniform() -> None:
    model = attach(stack(), MHRConfig(num_heads=4), TASKS)
    assert model.routes.logits is not None
    assert float(model.routes.logits.detach().abs().max()) <= 1e-3
