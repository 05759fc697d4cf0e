from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from models import TASKS, routed, stack

from polyroute import InputError, RoutedModel
from polyroute.study.tables import routes_from_dataset, routes_to_dataset


def model_of(tasks: tuple[str, ...] = TASKS, seed: int = 1) -> RoutedModel:
    return routed(stack(), tasks, num_heads=4, seed=seed)


def test_rows_go_through_parquet(tmp_path: Path) -> None:
    source = model_of()
    table = routes_to_dataset(source)
    assert table["task"][:] == list(TASKS)
    assert torch.equal(torch.tensor(table[2]["logits"]).view(3, 4, 4), source.routes["cedar"])
    table.to_parquet(tmp_path / "routes.parquet")
    read = Dataset.from_parquet(str(tmp_path / "routes.parquet"), cache_dir=str(tmp_path))
    target = model_of(("dune", "oak"), seed=3)
    oak = target.routes["oak"]
    routes_from_dataset(target, read)
    assert target.tasks == ("dune", "oak", "amber", "birch", "cedar")
    for task in TASKS:
        assert torch.equal(target.routes[task], source.routes[task])
    assert torch.equal(target.routes["oak"], oak)


def test_the_table_is_a_copy() -> None:
    model = model_of()
    table = routes_to_dataset(model)
    before = model.routes["amber"].reshape(-1).tolist()
    model.routes["amber"] = torch.zeros(3, 4, 4)
    assert table[0]["logits"] == before


def test_plain_lists_and_other_columns_are_taken() -> None:
    model = model_of()
    rows = {"note": ["x", "y"], "logits": [[1.0] * 48, [2.0] * 48], "task": ["elm", "amber"]}
    routes_from_dataset(model, Dataset.from_dict(rows))
    assert model.tasks == (*TASKS, "elm")
    assert torch.equal(model.routes["amber"], torch.full((3, 4, 4), 2.0))
    routes_from_dataset(model, Dataset.from_dict(rows).select(range(0)))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"task": ["a"]}, "has the columns 'task', of strings, and 'logits'"),
        ({"task": [1], "logits": [[1.0] * 48]}, "and this one has task: Value"),
        ({"task": ["a"], "logits": ["x"]}, "and this one has task"),
        ({"task": ["a"], "logits": [["x"] * 48]}, "and this one has task"),
        ({"task": ["a", "b"], "logits": [[1.0] * 48, [1.0] * 3]}, "row of task 'b' does not hold"),
        ({"task": ["a", "b"], "logits": [[1.0] * 48, None]}, "row of task 'b' does not hold 48"),
        ({"task": ["a", "a"], "logits": [[1.0] * 48] * 2}, "task 'a' has several rows"),
        ({"task": ["a", None], "logits": [[1.0] * 48] * 2}, "must be a non-empty string, not None"),
        ({"task": ["amber", "mu"], "logits": [[1.0] * 48] * 2}, "'mu' is reserved"),
        ({"task": ["amber"], "logits": [[float("nan")] * 48]}, "'amber' holds numbers that are"),
    ],
    ids=str,
)
def test_tables_of_something_else_are_refused_and_change_nothing(
    columns: dict[str, Any], message: str
) -> None:
    model = model_of()
    before = model.state_dict()["routes.logits"].clone()
    with pytest.raises(InputError, match=message):
        routes_from_dataset(model, Dataset.from_dict(columns))
    assert model.tasks == TASKS
    assert torch.equal(model.state_dict()["routes.logits"], before)


def test_models_without_rows_are_refused() -> None:
    model = routed(stack(), method="private")
    with pytest.raises(InputError, match="no routing logits to export"):
        routes_to_dataset(model)
    with pytest.raises(InputError, match="no routing logits to import"):
        routes_from_dataset(model, routes_to_dataset(model_of()))
    with pytest.raises(InputError, match=r"from a datasets.Dataset, not a list"):
        routes_from_dataset(model_of(), [])
