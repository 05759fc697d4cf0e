"""Inventories on the hub, against a hub of our own."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from base_models import EXAMPLES, made, t5
from datasets import Dataset
from hub_server import Hub, Repository, serving
from huggingface_hub import ModelCard, constants
from models import TASKS, routed, stack

from polyroute import Delta, InputError, Library, RoutedModel, SavedRoutes, from_pretrained
from polyroute.saved import shards
from polyroute.saved.hub import locate, public
from polyroute.trainer import MultiTaskTrainer, MultiTaskTrainingArguments

NAME = "user/inventory"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.chdir(tmp_path)
    with serving(monkeypatch) as found:
        yield found


@pytest.fixture
def model() -> RoutedModel:
    return routed(stack(), num_heads=2)


def published(hub: Hub, model: RoutedModel, folder: Path, **more: bytes) -> Repository:
    """What a repository holds after an upload, without one."""
    model.save_pretrained(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()} | more
    hub.repositories[NAME] = Repository()
    hub.repositories[NAME].commit("main", files)
    return hub.repositories[NAME]


def same(one: RoutedModel, other: RoutedModel) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return one.tasks == other.tasks and all(torch.equal(a, b) for a, b in pairs)


def test_what_is_pushed_is_what_is_loaded(hub: Hub, model: RoutedModel) -> None:
    url = model.push_to_hub(NAME, private=False, commit_message="First version")
    number = hub.repositories[NAME].branches["main"]
    assert url == f"{hub.address}/{NAME}/commit/{number}"
    assert hub.messages == ["First version"]
    assert set(hub.files(NAME)) == {
        ".gitattributes", "README.md", "inventory.safetensors", "polyroute.json",
        "routes-00000-of-00001.safetensors",
    }  # fmt: skip
    assert same(from_pretrained(stack(), NAME), model)


def test_a_push_sends_no_base_model(hub: Hub, model: RoutedModel) -> None:
    sent: list[object] = []
    model.base_model.push_to_hub = lambda *given, **_: sent.append(given)
    model.push_to_hub(NAME)
    assert not sent
    assert "model.safetensors" not in hub.files(NAME)


def test_only_files_of_an_inventory_are_fetched(
    hub: Hub, model: RoutedModel, tmp_path: Path
) -> None:
    published(hub, model, tmp_path / "out", **{"optimizer.pt": b"x", "model.bin": b"x"})
    from_pretrained(stack(), NAME)
    assert sorted(hub.fetched) == [
        "inventory.safetensors", "polyroute.json", "routes-00000-of-00001.safetensors",
    ]  # fmt: skip


def test_a_second_push_replaces_the_first_and_leaves_other_files(
    hub: Hub, model: RoutedModel, tmp_path: Path
) -> None:
    stale = {
        "routes-00001-of-00002.safetensors": b"x",
        "notes.txt": b"x",
        "evaluate-test.json": b"",
    }
    published(hub, model, tmp_path / "out", **stale)
    model.push_to_hub(NAME)
    assert set(hub.files(NAME)) == {
        "README.md", "inventory.safetensors", "polyroute.json", "notes.txt",
        "routes-00000-of-00001.safetensors",
    }  # fmt: skip


def test_a_revision_is_pinned_by_branch_and_by_commit(
    hub: Hub, model: RoutedModel, tmp_path: Path
) -> None:
    model.push_to_hub(NAME)
    number = hub.repositories[NAME].branches["main"]
    former = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        model.routes.logits.add_(1)
    model.push_to_hub(NAME, revision="next")
    row = former["routes.logits"][0]
    for revision, expected in ((None, row), (number, row), ("next", row + 1)):
        loaded = from_pretrained(stack(), NAME, revision=revision)
        assert torch.equal(loaded.routes[TASKS[0]].flatten(), expected)
    pinned = SavedRoutes(f"{NAME}@next").read(TASKS[0])
    assert torch.equal(pinned.flatten(), row + 1)


def test_what_was_fetched_once_needs_no_network(
    hub: Hub, model: RoutedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(hub, model, tmp_path / "out")
    from_pretrained(stack(), NAME)
    hub.repositories.clear()
    assert same(from_pretrained(stack(), NAME, local_files_only=True), model)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(from_pretrained(stack(), NAME), model)


def test_the_folder_layout_of_the_cache_is_enough(
    model: RoutedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    number = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "models--user--inventory"
    model.save_pretrained(place / "snapshots" / number)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(number)
    assert same(from_pretrained(stack(), NAME, cache_dir=tmp_path), model)
    assert SavedRoutes(NAME, cache_dir=tmp_path, revision=number).names() == list(TASKS)


def test_a_folder_wins_over_the_hub(hub: Hub, model: RoutedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / NAME)
    assert same(from_pretrained(stack(), NAME), model)
    assert hub.tokens == []
    with pytest.raises(InputError, match=r"revision='v1' is for the hub, but .* is a local folder"):
        from_pretrained(stack(), NAME, revision="v1")


# ---------------------------------------------------------------- a table in parts


@pytest.fixture
def many(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RoutedModel:
    """A hundred tasks in 32 parts."""
    monkeypatch.setattr(shards, "ROWS_PER_SHARD", 4)
    model = routed(stack(), tuple(f"user-{i}" for i in range(100)))
    published(hub, model, tmp_path / "out")
    return model


def test_reading_a_row_fetches_one_part_of_the_table(hub: Hub, many: RoutedModel) -> None:
    table = SavedRoutes(NAME)
    assert hub.fetched == ["polyroute.json"]
    row = table.read("user-7")
    assert torch.equal(row, many.routes["user-7"])
    assert len(hub.fetched) == 2
    assert "user-7" in table
    assert len(hub.fetched) == 2
    assert table.names() == list(many.tasks)
    assert len(hub.fetched) == 33


def test_loading_few_tasks_fetches_their_parts_of_the_table(hub: Hub, many: RoutedModel) -> None:
    loaded = from_pretrained(stack(), NAME, tasks=["user-3", "user-50"])
    assert torch.equal(loaded.routes["user-50"], many.routes["user-50"])
    parts = [name for name in hub.fetched if name.startswith("routes")]
    assert 1 <= len(parts) <= 2


def test_all_parts_are_of_the_version_that_was_opened(
    hub: Hub, many: RoutedModel, tmp_path: Path
) -> None:
    table, row = SavedRoutes(NAME), many.routes["user-7"].clone()
    with torch.no_grad():
        many.routes.logits.add_(1)
    many.save_pretrained(tmp_path / "out")
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    hub.repositories[NAME].commit("main", files)
    assert torch.equal(table.read("user-7"), row)
    assert torch.equal(SavedRoutes(NAME).read("user-7"), row + 1)


def test_a_table_on_the_hub_is_not_written(hub: Hub, many: RoutedModel) -> None:
    table = SavedRoutes(NAME)
    row = table.read("user-7")
    for write in (
        lambda: table.write("user-7", row),
        lambda: table.add("new", row),
        lambda: table.delete("user-7"),
    ):
        with pytest.raises(InputError, match=r"user/inventory is on the hub.*hf download user/inv"):
            write()


# ---------------------------------------------------------------- what goes wrong


def refused(match: str, name: str = NAME, **options: object) -> None:
    with pytest.raises(InputError, match=match) as caught:
        from_pretrained(stack(), name, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_an_unknown_repository(hub: Hub) -> None:
    refused(r"there is no folder user/inventory here, and no repository user/inventory on the hub")


def test_a_private_repository_needs_a_token(hub: Hub, model: RoutedModel, tmp_path: Path) -> None:
    published(hub, model, tmp_path / "out").private = True
    refused("if it is private, log in with `hf auth login`, or set HF_TOKEN")
    assert same(from_pretrained(stack(), NAME, token="hf_secret"), model)
    assert hub.tokens[-1] == "Bearer hf_secret"


def test_a_gated_repository(hub: Hub, model: RoutedModel, tmp_path: Path) -> None:
    published(hub, model, tmp_path / "out").gated = True
    refused("user/inventory on the hub is gated: ask for access on its page")


def test_an_unknown_revision(hub: Hub, model: RoutedModel, tmp_path: Path) -> None:
    published(hub, model, tmp_path / "out")
    refused("user/inventory on the hub has no revision 'v9': name a branch", revision="v9")
    refused("has no revision 'v9'", name=f"{NAME}@v9")
    refused("both name a version", name=f"{NAME}@v9", revision="v9")
    refused("the revision of user/inventory is empty", revision="")
    refused("the revision of user/inventory is empty", name=f"{NAME}@")


def test_a_repository_without_an_inventory(hub: Hub) -> None:
    hub.repositories[NAME] = Repository()
    hub.repositories[NAME].commit("main", {"model.safetensors": b"x"})
    refused(r"user/inventory on the hub holds no inventory: there is no polyroute\.json in it")


def test_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    refused("not whole in the hub's cache: fetch it once without local_", local_files_only=True)
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        refused("not whole in the hub's cache: fetch it once without HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused("not whole in the hub's cache: the hub cannot be reached, so check the network")


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "./runs/mhr", "-/..", "user/"])
def test_a_name_that_is_neither_folder_nor_id_is_not_looked_for(hub: Hub, name: str) -> None:
    refused(r"holds no inventory: there is no polyroute\.json", name=name)
    refused("is no hub id such as user/inventory", name=name, revision="v1")
    assert hub.tokens == []


def test_a_push_that_the_hub_refuses(
    hub: Hub, model: RoutedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="'inventory' is no hub id: write it as user/inventory"):
        model.push_to_hub("inventory")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, **__: None)
    with pytest.raises(InputError, match=r"the hub refused .*404.* your rights, and log in with"):
        model.push_to_hub(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="user/inventory cannot be sent: HF_HUB_OFFLINE is set"):
        model.push_to_hub(NAME)


# ---------------------------------------------------------------- training


def test_a_trainer_sends_the_inventory_with_our_card(hub: Hub, tmp_path: Path) -> None:
    wrapper, kind = made(t5)
    model = routed(wrapper.base_model, ("where", "truth", "count"), num_heads=4)
    rows = Dataset.from_dict(kind.encode(EXAMPLES), features=kind.features).sort("task")
    args = MultiTaskTrainingArguments(
        str(tmp_path / "out"), max_steps=2, save_steps=1, report_to=[], use_cpu=True,
        push_to_hub=True, hub_model_id=NAME, hub_token="hf_secret",
    )  # fmt: skip
    trainer = MultiTaskTrainer(model, kind, args, rows)
    trainer.train()
    trainer.push_to_hub(license="mit")
    files = hub.files(NAME)
    assert "model.safetensors" not in files
    card = ModelCard(files["README.md"].decode())
    assert (card.data.library_name, card.data.license) == ("polyroute", "mit")
    assert f'pr.from_pretrained(base, "{NAME}")' in card.text
    other, _ = made(t5)
    assert same(from_pretrained(other.base_model, NAME), model)


# ---------------------------------------------------------------- what is sent of JSON


def test_paths_of_this_machine_stay_here(hub: Hub, model: RoutedModel) -> None:
    class Config:
        _name_or_path = "/home/somebody/bases/tiny"

    model.base_model.config = Config()
    model.push_to_hub(NAME)
    description = json.loads(hub.files(NAME)["polyroute.json"])
    assert description["base"]["name"] == "tiny"
    everything = b"".join(hub.files(NAME).values())
    assert re.search(rb"/home|/tmp", everything) is None
    assert same(from_pretrained(stack(), NAME), model)


def test_a_snapshot_is_located_as_it_is(hub: Hub, model: RoutedModel, tmp_path: Path) -> None:
    published(hub, model, tmp_path / "out")
    found = locate(NAME)
    assert locate(found) is found
    assert str(found) == NAME
    assert Path(found).parent.name == "snapshots"


@pytest.mark.parametrize(
    ("value", "sent"),
    [
        ("/home/ada/suite", "suite"),
        ("~/suite/", "suite"),
        ("cache_dir=/home/ada/cache", "cache"),
        ("file:///home/ada/suite.yaml", "suite.yaml"),
        ("C:\\Users\\ada\\suite", "suite"),
        ("user/inventory", "user/inventory"),
        ("lr=0.1", "lr=0.1"),
    ],
)
def test_paths_of_this_machine_are_not_sent(value: str, sent: str) -> None:
    assert public({"data": [value], "argv": [value]}) == {"data": [sent]}


def test_a_lora_on_the_hub_is_read_by_its_id(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    routed(stack(), method="shared").export_peft(TASKS[0], folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.repositories["user/lora"] = Repository()
    hub.repositories["user/lora"].commit("main", {**files, "weights.bin": b"pickle"})
    local, fetched = Delta.from_peft(folder), Delta.from_peft("user/lora@main")
    assert fetched.norm() == local.norm()
    assert not any("weights.bin" in path for path in hub.fetched)
    library = Library.from_peft({"here": folder, "there": "user/lora"})
    assert list(library) == ["here", "there"]
    hub.repositories["user/lora"].commit("main", {"README.md": b""})
    with pytest.raises(InputError, match="user/lora on the hub holds no adapter: there is no adap"):
        Delta.from_peft("user/lora@main")
