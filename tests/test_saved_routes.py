"""The routing table on disk, row by row."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TASKS, routed, stack
from safetensors.torch import load_file, save_file
from torch import Tensor

from polyroute import InputError, RoutedModel, SavedRoutes, from_pretrained
from polyroute.host.files import read_metadata
from polyroute.saved.checkpoint import read_checkpoint
from polyroute.study.analysis import describe_checkpoint

NAMES = tuple(f"task {i}" for i in range(60))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyroute.saved.shards.ROWS_PER_SHARD", 8)


def model_of(tasks: tuple[str, ...] = NAMES, seed: int = 1) -> RoutedModel:
    return routed(stack(), tasks, num_heads=2, num_skills=3, rank=2, seed=seed)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model_of().save_pretrained(tmp_path / "inventory")
    return tmp_path / "inventory"


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("routes-*"))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def row(value: float) -> Tensor:
    return torch.full((3, 2, 3), float(value))


def test_a_large_table_is_in_several_shards_and_comes_back_in_order(saved: Path) -> None:
    assert [path.name for path in shards(saved)] == [
        f"routes-{i:05d}-of-00008.safetensors" for i in range(8)
    ]
    sizes = [len(load_file(path)["rows"]) for path in shards(saved)]
    assert sum(sizes) == 60
    assert min(sizes) > 0
    model, loaded = model_of(), from_pretrained(stack(), saved)
    assert loaded.tasks == NAMES
    assert torch.equal(loaded.state_dict()["routes.logits"], model.state_dict()["routes.logits"])


def test_rows_can_be_read_one_at_a_time(saved: Path) -> None:
    table, model = SavedRoutes(saved), model_of()
    assert table.shape == (3, 2, 3)
    assert table.names() == list(NAMES)
    assert len(table) == 60
    assert "task 7" in table
    assert "oak" not in table
    assert 7 not in table
    for name in NAMES[::7]:
        assert torch.equal(table.read(name), model.routes[name])


def test_a_read_opens_one_shard(saved: Path) -> None:
    table = SavedRoutes(saved)
    expected = table.read("task 7")
    holding = [p for p in shards(saved) if "task 7" in json_names(p)]
    assert len(holding) == 1
    for path in shards(saved):
        if path != holding[0]:
            path.write_bytes(b"damaged")
    assert torch.equal(table.read("task 7"), expected)
    loaded = from_pretrained(stack(), saved, tasks=["task 7"])
    assert torch.equal(loaded.routes["task 7"], expected)
    with pytest.raises(InputError, match="is not a whole safetensors file"):
        table.names()


def json_names(path: Path) -> list[str]:
    names: list[str] = json.loads(read_metadata(path)["polyroute"])["names"]
    return names


def test_writing_changes_one_row_of_one_file(saved: Path) -> None:
    before, model = content(saved), model_of()
    SavedRoutes(saved).write("task 7", row(2.0))
    changed = {name for name, data in content(saved).items() if before[name] != data}
    assert len(changed) == 1
    loaded = from_pretrained(stack(), saved)
    assert loaded.tasks == NAMES
    for name in NAMES:
        expected = row(2.0) if name == "task 7" else model.routes[name]
        assert torch.equal(loaded.routes[name], expected)


def test_added_tasks_come_last_in_the_order_of_their_addition(saved: Path) -> None:
    table = SavedRoutes(saved)
    for i, name in enumerate(("zebra", "ant", "bee")):
        table.add(name, row(i).reshape(-1))
    table.delete("task 3")
    table.delete("ant")
    expected = [*(n for n in NAMES if n != "task 3"), "zebra", "bee"]
    assert table.names() == expected
    loaded = from_pretrained(stack(), saved)
    assert list(loaded.tasks) == expected
    assert torch.equal(loaded.routes["bee"], row(2))
    with pytest.raises(InputError, match="unknown task 'ant'"):
        table.read("ant")


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["write", "add", "delete"]),
            st.sampled_from([*TASKS, "x", "é", "名", "a b/c"]),
            st.integers(-3, 3),
        ),
        max_size=12,
    )
)
def test_any_changes_leave_what_a_dictionary_would_hold(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[str, str, int]]
) -> None:
    folder = tmp_path_factory.mktemp("inventory")
    model = model_of(TASKS)
    model.save_pretrained(folder)
    table = SavedRoutes(folder)
    expected = {task: model.routes[task] for task in TASKS}
    for change, name, value in changes:
        refused = (name in expected) == (change == "add")
        try:
            if change == "delete":
                table.delete(name)
                del expected[name]
            else:
                getattr(table, change)(name, row(value))
                expected[name] = row(value)
            assert not refused
        except InputError:
            assert refused
    assert table.names() == list(expected)
    loaded = from_pretrained(stack(), folder)
    assert loaded.tasks == tuple(expected)
    for name, values in expected.items():
        assert torch.equal(loaded.routes[name], values)
        assert torch.equal(table.read(name), values)


def test_what_cannot_be_written_is_refused_and_changes_nothing(saved: Path) -> None:
    table, before = SavedRoutes(saved), content(saved)
    refused: list[tuple[str, tuple[Any, ...], str]] = [
        ("read", ("task 77",), "unknown task 'task 77' in .*: did you mean"),
        ("write", ("oak", row(0)), "unknown task 'oak'"),
        ("delete", ("oak",), "unknown task 'oak'"),
        ("add", ("task 1", row(0)), r"exists in .*; overwrite it with write\(\)"),
        ("add", ("mu", row(0)), "'mu' is reserved"),
        ("add", ("", row(0)), "must be a non-empty string"),
        ("add", ("\ud800", row(0)), r"has the character U\+D800"),
        ("read", (5,), "is named by a text, not 5"),
        ("delete", (None,), "is named by a text, not None"),
        ("write", ("task 1", None), "a dense tensor of real numbers, not NoneType"),
        ("write", ("task 1", row(0).numpy()), "not ndarray"),
        ("write", ("task 1", row(0).to("meta")), "not one on meta"),
        ("write", ("task 1", row(0).to_sparse()), "layout torch.sparse_coo"),
        ("write", ("task 1", row(0).to(torch.complex64)), "of type torch.complex64"),
        ("add", ("oak", torch.ones(3, 2)), r"has shape \[3, 2, 3\].*not \[3, 2\]"),
        ("write", ("task 1", row(float("nan"))), "must hold finite numbers"),
        ("write", ("task 1", row(1).long()), "must hold finite fractional numbers"),
    ]
    for method, arguments, message in refused:
        with pytest.raises(InputError, match=message):
            getattr(table, method)(*arguments)
    assert content(saved) == before


def test_some_tasks_are_loaded_in_the_order_asked_for(saved: Path) -> None:
    model = model_of()
    some = ["task 31", "task 2", "task 59"]
    loaded = from_pretrained(stack(), saved, tasks=some)
    assert list(loaded.tasks) == some
    x = torch.randn(3, 8)
    assert torch.equal(loaded(x, tasks=some), model(x, tasks=some))
    with pytest.raises(InputError, match="given twice"):
        from_pretrained(stack(), saved, tasks=["task 1", "task 1"])
    with pytest.raises(InputError, match="not the single string"):
        from_pretrained(stack(), saved, tasks="task 1")
    with pytest.raises(InputError, match="tasks must be a list of names, not 5"):
        from_pretrained(stack(), saved, tasks=5)  # type: ignore[arg-type]


def test_saving_again_leaves_no_shard_of_another_count(saved: Path) -> None:
    model = from_pretrained(stack(), saved, tasks=["task 1", "task 2"])
    model.save_pretrained(saved)
    assert [path.name for path in shards(saved)] == ["routes-00000-of-00001.safetensors"]
    assert from_pretrained(stack(), saved).tasks == ("task 1", "task 2")
    model.set_phase("mu")
    model.save_pretrained(saved)
    assert shards(saved) == []
    with pytest.raises(InputError, match=r"the tasks of the inventory in .* have no routing rows"):
        SavedRoutes(saved)


def test_a_shard_of_an_earlier_save_is_noticed_when_it_is_read(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "old")
    model_of(seed=2).save_pretrained(saved)
    path = shards(saved)[3]
    shutil.copy(tmp_path / "old" / path.name, path)
    with pytest.raises(InputError, match=f"{path.name} and polyroute.json are of two saves"):
        from_pretrained(stack(), saved)
    path.unlink()
    with pytest.raises(InputError, match=f"{path.name} does not exist, so the routing table is"):
        from_pretrained(stack(), saved)


def test_a_failed_write_leaves_the_shard(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(saved)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("polyroute.host.files.os.replace", fail)
    table = SavedRoutes(saved)
    for change in (
        lambda: table.write("task 1", row(0)),
        lambda: table.add("oak", row(0)),
        lambda: table.delete("task 1"),
    ):
        with pytest.raises(OSError, match="disk full"):
            change()
    assert content(saved) == before


def test_a_damaged_row_is_named_and_others_are_read(saved: Path) -> None:
    path = shards(saved)[0]
    tensors, names = load_file(path), json_names(path)
    tensors["rows"][0, 5] = float("inf")
    save_file(tensors, path, metadata=read_metadata(path))
    table = SavedRoutes(saved)
    with pytest.raises(InputError, match=f"{path.name} is damaged: tensor 'rows' holds values"):
        table.read(names[0])
    table.read(names[1])


def test_a_folder_without_an_inventory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no inventory: there is no polyroute\.json"):
        SavedRoutes(tmp_path)


def test_a_table_without_tasks_can_be_saved_and_added_to(tmp_path: Path) -> None:
    model = model_of()
    model.keep_tasks([])
    model.save_pretrained(tmp_path)
    assert from_pretrained(stack(), tmp_path).tasks == ()
    SavedRoutes(tmp_path).add("elm", row(1))
    assert from_pretrained(stack(), tmp_path).tasks == ("elm",)


def test_shards_are_chosen_by_bytes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyroute.saved.shards.ROWS_PER_SHARD", 10**6)
    monkeypatch.setattr("polyroute.saved.shards.BYTES_PER_SHARD", 60 * 18 * 4 // 3)
    model_of().save_pretrained(tmp_path)
    assert len(shards(tmp_path)) == 4


def test_low_precision_rows_stay_as_they_are(tmp_path: Path) -> None:
    model = model_of()
    model.routes.bfloat16()
    model.save_pretrained(tmp_path)
    table = SavedRoutes(tmp_path)
    assert table.read("task 5").dtype == torch.bfloat16
    table.write("task 5", row(0.5))
    table.add("oak", row(0.25))
    assert torch.equal(table.read("task 5"), row(0.5).bfloat16())
    assert torch.equal(from_pretrained(stack(), tmp_path).routes["oak"], row(0.25))


def test_the_account_of_a_large_table_is_of_its_first_tasks(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polyroute.study.analysis.LISTED", 3)
    text = describe_checkpoint(read_checkpoint(saved))
    assert "routing table of 60 tasks with 1,080 parameters" in text
    assert "of the first 3 tasks:" in text
    assert "task 2" in text
    assert "task 3" not in text
