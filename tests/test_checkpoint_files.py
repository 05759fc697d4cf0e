import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TASKS, Stack, batch, llama, routed, stack, t5
from safetensors.torch import load_file, save_file
from unsigned import without_digests

from polyroute import InputError, MHRConfig, attach, from_pretrained
from polyroute.host.files import make_folder, read_metadata

ROWS = "routes-00000-of-00001.safetensors"
FILES = {"polyroute.json", "inventory.safetensors", ROWS}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved inventory of `stack()`, whose files may be changed."""
    folder = tmp_path / "inventory"
    routed(stack(), num_heads=2, num_skills=3, rank=2).save_pretrained(folder)
    return without_digests(folder)


def overwrite(file: Path, tensors: dict[str, Any]) -> None:
    """Write other tensors into a file, which still says that it belongs to its description."""
    save_file(tensors, file, metadata=read_metadata(file))


def assert_untouched(base: Stack) -> None:
    assert type(base.up) is torch.nn.Linear
    assert all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("adapter", ["lora", "ia3"])
@pytest.mark.parametrize("method", ["mhr", "poly", "private", "shared"])
def test_a_round_trip_keeps_every_bit(tmp_path: Path, method: Any, adapter: Any) -> None:
    model = routed(t5(), method=method, adapter=adapter, rank=2)
    model.save_pretrained(tmp_path / "a" / "b")
    loaded = from_pretrained(t5(), tmp_path / "a" / "b")
    assert loaded.tasks == model.tasks
    assert loaded.adapter_config == model.adapter_config
    expected, actual = model.state_dict(), loaded.state_dict()
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    inputs = batch(t5())
    tasks = list(TASKS)
    assert torch.equal(model(**inputs, tasks=tasks).logits, loaded(**inputs, tasks=tasks).logits)


@pytest.mark.parametrize(
    "config",
    [
        {"alpha": 3.0, "init": "peft", "dropout": 0.2, "num_heads": 2},
        {"gate": "straight_through", "shared_skill": True},
        {"normalization": "l2"},
        {"granularity": "coarsegrained"},
        {"granularity": "blockwise", "target_modules": ["q_proj", "v_proj"]},
        {"exclude_modules": r".*mlp.*", "anneal_steps": 3},
    ],
    ids=str,
)
def test_every_setting_that_changes_the_forward_is_saved(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    model, inputs = routed(llama(), **config), batch(llama())
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(llama(), tmp_path)
    assert loaded.adapter_config == model.adapter_config
    assert loaded.routers == model.routers
    for tasks in ("dune", list(TASKS)):
        expected = model(**inputs, tasks=tasks).logits
        assert torch.equal(loaded(**inputs, tasks=tasks).logits, expected)


def test_a_checkpoint_of_another_scale_is_not_loaded_into_a_model(saved: Path) -> None:
    other = routed(stack(), num_heads=2, num_skills=3, rank=2, alpha=4.0)
    with pytest.raises(InputError, match=r"has alpha=3\.0 and this model alpha=4\.0"):
        other.load_adapter(saved)


def test_a_grouping_by_function_is_saved_by_its_result(tmp_path: Path) -> None:
    model = routed(stack(), granularity=lambda name: "ends" if name != "down" else name)
    model.save_pretrained(tmp_path)
    loaded, x = from_pretrained(stack(), tmp_path), torch.randn(2, 8)
    assert loaded.routers == ["ends", "down"]
    assert torch.equal(loaded(x, tasks="amber"), model(x, tasks="amber"))
    loaded.save_pretrained(tmp_path / "again")
    again = from_pretrained(stack(), tmp_path / "again")
    assert torch.equal(again(x, tasks="amber"), model(x, tasks="amber"))


def test_the_files_have_the_published_layout(saved: Path) -> None:
    assert {path.name for path in saved.iterdir()} == FILES
    shapes = {k: tuple(v.shape) for k, v in load_file(saved / "inventory.safetensors").items()}
    assert shapes == {
        "up.lora_a": (2, 3, 4, 2),
        "up.lora_b": (2, 3, 2, 8),
        "down.lora_a": (2, 3, 8, 2),
        "down.lora_b": (2, 3, 2, 4),
        "again.lora_a": (2, 3, 4, 2),
        "again.lora_b": (2, 3, 2, 8),
    }
    rows = load_file(saved / ROWS)
    assert {k: tuple(v.shape) for k, v in rows.items()} == {"rows": (4, 3 * 2 * 3), "order": (4,)}
    assert rows["order"].tolist() == [0, 1, 2, 3]
    description = json.loads((saved / "polyroute.json").read_text())
    assert set(description) == {
        "format", "id", "config", "num_skills", "anneal_progress", "base", "rows", "routers",
        "sites",
    }  # fmt: skip
    assert description["rows"] == {"shards": 1, "shape": [3, 2, 3]}
    for name in ("inventory.safetensors", ROWS):
        assert json.loads(read_metadata(saved / name)["polyroute"])["id"] == description["id"]
    assert json.loads(read_metadata(saved / ROWS)["polyroute"])["names"] == list(TASKS)
    assert set(description["base"]) == {"name", "class", "sample"}
    names = [one["name"] for one in description["base"]["sample"]]
    assert names == ["up.bias", "down.bias", "again.bias"]  # the weights are under "sites"
    fields = {"name", "d_in", "d_out", "router", "base_sample", "base_norm", "base_dtype"}
    for site in description["sites"]:
        assert set(site) == fields
        assert site["base_dtype"] == "torch.float32"
        assert len(site["base_sample"]) == 8


def test_the_tensors_on_disk_are_the_skills_and_the_rows(saved: Path) -> None:
    model = routed(stack(), num_heads=2, num_skills=3, rank=2)
    tensors = load_file(saved / "inventory.safetensors")
    for i, name in enumerate(("up", "down", "again")):
        for kind, values in model.inventory.site_tensors(i).items():
            assert torch.equal(tensors[f"{name}.{kind}"], values)
    rows = load_file(saved / ROWS)["rows"]
    assert torch.equal(rows[2].view(3, 2, 3), model.routes["cedar"])


def test_ia3_files_have_one_tensor_a_layer(tmp_path: Path) -> None:
    routed(stack(), num_heads=2, num_skills=3, adapter="ia3").save_pretrained(tmp_path)
    shapes = {k: tuple(v.shape) for k, v in load_file(tmp_path / "inventory.safetensors").items()}
    assert shapes == {"up.ia3": (2, 3, 1, 8), "down.ia3": (2, 3, 1, 4), "again.ia3": (2, 3, 1, 8)}


@pytest.mark.parametrize("method", ["mhr", "private", "shared"])
def test_a_subset_of_the_tasks_can_be_loaded_or_none(tmp_path: Path, method: Any) -> None:
    model, x = routed(stack(), method=method), torch.randn(2, 8)
    model.save_pretrained(tmp_path)
    some = from_pretrained(stack(), tmp_path, tasks=["dune", "amber"])
    assert some.tasks == ("dune", "amber")
    assert torch.equal(some(x, tasks=["dune", "amber"]), model(x, tasks=["dune", "amber"]))
    none = from_pretrained(stack(), tmp_path, tasks=[])
    assert none.tasks == ()
    if method != "private":
        torch.testing.assert_close(none(x, tasks="mu"), model(x, tasks="mu"))
    none.add_task("elm")
    assert none(x, tasks=["elm", "elm"]).shape == (2, 16)
    with pytest.raises(InputError, match="unknown task 'oak'"):
        from_pretrained(stack(), tmp_path, tasks=["oak"])


@pytest.mark.parametrize("phase", ["mu", "mu-uncollapsed"])
def test_an_averaged_model_can_be_saved(tmp_path: Path, phase: Any) -> None:
    model, x = routed(stack(), num_heads=4), torch.randn(2, 8)
    routed(stack(), num_heads=4).save_pretrained(tmp_path)
    model.set_phase(phase)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES - {ROWS}
    loaded = from_pretrained(stack(), tmp_path)
    assert torch.equal(loaded(x, tasks="amber"), model(x, tasks="amber"))
    assert loaded.counts() == model.counts()


def test_another_base_model_is_refused(saved: Path) -> None:
    for base, message in (
        (stack(narrow=4), "layer 'up' is 4 to 16 here, 8 to 16 there"),
        (torch.nn.Sequential(torch.nn.Linear(8, 8)), "Sequential has no linear layer 'up'"),
        (stack(seed=5), r"weights of layer 'up' differ .*check_base=False"),
    ):
        with pytest.raises(InputError, match=f"belongs to another base model: .*{message}"):
            from_pretrained(base, saved)
        assert all(p.requires_grad for p in base.parameters())
    assert from_pretrained(stack(seed=5), saved, check_base=False).tasks == TASKS


def test_the_same_base_in_half_precision_is_accepted(tmp_path: Path) -> None:
    routed(llama()).save_pretrained(tmp_path)
    assert from_pretrained(llama().bfloat16(), tmp_path).tasks == TASKS


@pytest.mark.parametrize("name", ["inventory.safetensors", ROWS])
def test_damaged_tensors_are_refused(saved: Path, name: str) -> None:
    file, base = saved / name, stack()
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:4], b"", b"{}" * 40):
        file.write_bytes(content)
        with pytest.raises(InputError, match=f"{name} is not a whole safetensors file"):
            from_pretrained(base, saved)
        assert_untouched(base)
    file.unlink()
    with pytest.raises(InputError, match=f"{name} does not exist"):
        from_pretrained(base, saved)


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        ("inventory.safetensors", {"x": torch.ones(2)}, "tensor 'again.lora_a' is on one side"),
        (ROWS, {"x": torch.ones(2)}, "it does not hold rows, their order and names"),
        (
            ROWS,
            {"rows": torch.ones(3, 18), "order": torch.arange(3)},
            "18 numbers for each of its 4",
        ),
        (
            ROWS,
            {"rows": torch.ones(4, 17), "order": torch.arange(4)},
            "18 numbers for each of its 4",
        ),
        (
            ROWS,
            {"rows": torch.ones(4, 18), "order": torch.arange(3)},
            "18 numbers for each of its 4",
        ),
    ],
    ids=str,
)
def test_tensors_of_something_else_are_refused(
    saved: Path, name: str, tensors: dict[str, Any], message: str
) -> None:
    base = stack()
    overwrite(saved / name, tensors)
    with pytest.raises(InputError, match=message):
        from_pretrained(base, saved)
    assert_untouched(base)


def test_a_tensor_of_another_shape_is_refused(saved: Path) -> None:
    tensors = load_file(saved / "inventory.safetensors")
    tensors["down.lora_b"] = torch.ones(2, 3, 2, 5)
    overwrite(saved / "inventory.safetensors", tensors)
    with pytest.raises(
        InputError, match=r"'down.lora_b' has shape \[2, 3, 2, 5\] there and \[2, 3, 2, 4"
    ):
        from_pretrained(stack(), saved)


@pytest.mark.parametrize("key", ["id", "config", "num_skills", "base", "rows", "sites", "routers"])
def test_a_description_without_an_entry_is_refused(saved: Path, key: str) -> None:
    description = json.loads((saved / "polyroute.json").read_text())
    del description[key]
    (saved / "polyroute.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match=f"lacks the entry '{key}'; it is damaged"):
        from_pretrained(stack(), saved)


def change(file: Path, *place: Any, to: Any = None) -> None:
    """Overwrite one entry of a description, or delete it."""
    description = json.loads(file.read_text())
    entry = description
    for key in place[:-1]:
        entry = entry[key]
    if to is None:
        del entry[place[-1]]
    else:
        entry[place[-1]] = to
    file.write_text(json.dumps(description))
    without_digests(file.parent)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("sites", 1, "name"), None, r"'sites\[1\]' is not complete: it lacks 'name'"),
        (("sites", 1, "router"), 3, r"'sites\[1\].router' is not one of its 3 routers"),
        (("sites", 1, "router"), "0", r"'sites\[1\].router' is not one of its 3 routers"),
        (("sites", 1, "d_in"), "8", r"'sites\[1\].d_in' is not a width"),
        (("sites", 1), "up", r"'sites\[1\]' is not an object"),
        (("sites",), [], "'sites' is not a list of at least one layer"),
        (("sites",), 3, "'sites' is not a list"),
        (("sites", 0, "base_sample"), [1.0] * 7, r"base_sample' is not 8 numbers, or null"),
        (("sites", 0, "base_sample"), ["x"] * 8, r"base_sample' is not 8 numbers, or null"),
        (("sites", 0, "base_sample"), 3, r"base_sample' is not 8 numbers, or null"),
        (("base", "sample"), [{"name": "x"}], "'base.sample' is not a list of whole samples"),
        (("base",), "T5", "'base' is not name and class"),
        (("config", "granularity"), None, "'config' is not complete: it lacks 'granularity'"),
        (("config",), [], "'config' is not an object"),
        (("config", "rank"), "2", "rank must be a positive whole number, not '2'"),
        (("config", "alpha"), [2], r"alpha must be a finite number, not \[2\]"),
        (("config", "target_modules"), 3, "target_modules must be a regular expression"),
        (("config", "num_heads"), 2.0, "num_heads must be a positive whole number"),
        (("num_skills",), 4, "'num_skills' is not 3, as its config says"),
        (("num_skills",), "3", "'num_skills' is not 3"),
        (("anneal_progress",), "late", "'anneal_progress' is not between 0 and 1"),
        (("anneal_progress",), float("nan"), "'anneal_progress' is not between 0 and 1"),
        (("routers",), {"a": 1}, "'routers' is not a list"),
        (("routers",), [None, None, None], "'routers' is not a list of names"),
        (("rows", "shards"), None, "'rows' or 'id' is not what is written there"),
        (("rows", "shards"), 3, "'rows' or 'id' is not what"),
        (("rows", "shape"), [3, 2], "'rows' or 'id' is not what"),
        (("rows", "shape"), [3, 2, 4], r"'rows.shape' is not \[3, 2, 3\]"),
        (("rows",), "yes", "'rows' or 'id' is not what"),
        (("id",), 3, "'rows' or 'id' is not what"),
    ],
    ids=str,
)
def test_a_description_damaged_inside_is_refused(
    saved: Path, place: tuple[Any, ...], value: Any, message: str
) -> None:
    change(saved / "polyroute.json", *place, to=value)
    base = stack()
    with pytest.raises(InputError, match=rf"polyroute\.json is damaged: .*{message}"):
        from_pretrained(base, saved)
    assert_untouched(base)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "int"])
@pytest.mark.parametrize(
    ("name", "tensor"),
    [("inventory.safetensors", "down.lora_b"), (ROWS, "rows")],
)
def test_tensors_that_are_not_finite_numbers_are_refused(
    saved: Path, name: str, tensor: str, value: Any
) -> None:
    tensors = load_file(saved / name)
    if value == "int":
        tensors[tensor] = tensors[tensor].long()
    else:
        tensors[tensor].view(-1)[3] = value
    overwrite(saved / name, tensors)
    base, model = stack(), routed(stack(), num_heads=2, num_skills=3, rank=2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for load in (lambda: from_pretrained(base, saved), lambda: model.load_adapter(saved)):
        with pytest.raises(InputError, match=f"is damaged: tensor '{tensor}' holds values"):
            load()
    assert_untouched(base)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@torch.no_grad()
def test_a_lightly_tuned_base_is_refused_in_the_same_type_only(tmp_path: Path) -> None:
    routed(llama(), target_modules=["q_proj"]).save_pretrained(tmp_path)
    for name, message in (
        ("model.layers.0.self_attn.q_proj.weight", "layer 'model.layers.0.self_attn.q_proj'"),
        ("model.embed_tokens.weight", "parameter 'model.embed_tokens.weight'"),
        ("lm_head.weight", "parameter 'lm_head.weight'"),
    ):
        base = llama()
        base.get_parameter(name).mul_(1.01)
        with pytest.raises(InputError, match=f"the weights of {message} differ"):
            from_pretrained(base, tmp_path)
        assert from_pretrained(base, tmp_path, check_base=False).tasks == TASKS
        base = llama()
        base.get_parameter(name).mul_(1.01)
        assert from_pretrained(base.bfloat16(), tmp_path).tasks == TASKS


def test_a_checkpoint_without_samples_of_the_rest_still_loads(tmp_path: Path) -> None:
    routed(llama(), target_modules=["q_proj"]).save_pretrained(tmp_path)
    change(tmp_path / "polyroute.json", "base", "sample")
    for i in range(2):
        change(tmp_path / "polyroute.json", "sites", i, "base_dtype")
    assert from_pretrained(llama(), tmp_path).tasks == TASKS


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["amber", 3, "cedar", "dune"], "is damaged: 'tasks' is not a list of names"),
        ("abcd", "is damaged: 'tasks' is not a list"),
        (["amber"], "is damaged: 'num_skills' is not 1"),
        (None, "lacks the entry 'tasks'"),
    ],
    ids=str,
)
def test_damaged_names_of_tasks_without_rows_are_refused(
    tmp_path: Path, value: Any, message: str
) -> None:
    routed(stack(), method="private").save_pretrained(tmp_path)
    change(tmp_path / "polyroute.json", "tasks", to=value)
    with pytest.raises(InputError, match=message):
        from_pretrained(stack(), tmp_path)


def test_equal_inventories_are_equal_files_and_one_number_changes_the_id(tmp_path: Path) -> None:
    model = routed(stack(), num_heads=2)
    ids = set()
    for i in range(4):
        model.save_pretrained(tmp_path / str(i))
        ids.add(json.loads((tmp_path / str(i) / "polyroute.json").read_text())["id"])
        with torch.no_grad():
            if i == 1:
                model.routes.logits[2, 3] += 1e-6  # type: ignore[index]
            if i == 2:
                model.inventory.lora_b["8x16"].view(-1)[5] += 1e-6  # type: ignore[operator, index]
    assert len(ids) == 3
    for path in (tmp_path / "0").iterdir():
        assert path.read_bytes() == (tmp_path / "1" / path.name).read_bytes()


@pytest.mark.parametrize("done", [1, 2])
def test_a_save_that_was_interrupted_is_noticed(
    saved: Path, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    """After so many files the disk is full."""
    count = 0
    whole = os.replace

    def fail(source: Any, target: Any) -> None:
        nonlocal count
        count += 1
        if count > done:
            raise OSError("disk full")
        whole(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("polyroute.host.files.os.replace", fail)
        with pytest.raises(OSError, match="disk full"):
            routed(stack(), num_heads=2, num_skills=3, rank=2, seed=9).save_pretrained(saved)
    base = stack()
    with pytest.raises(InputError, match="are of two saves, so one was interrupted; save the inv"):
        from_pretrained(base, saved)
    assert_untouched(base)
    routed(stack(), num_heads=2, num_skills=3, rank=2, seed=9).save_pretrained(saved)
    assert from_pretrained(base, saved).tasks == TASKS


def test_a_file_of_another_save_is_noticed(saved: Path, tmp_path: Path) -> None:
    routed(stack(), num_heads=2, num_skills=3, rank=2, seed=9).save_pretrained(tmp_path / "other")
    for name in ("inventory.safetensors", ROWS):
        before = (saved / name).read_bytes()
        (saved / name).write_bytes((tmp_path / "other" / name).read_bytes())
        with pytest.raises(InputError, match=rf"{name} and polyroute\.json are of two saves"):
            from_pretrained(stack(), saved)
        (saved / name).write_bytes(before)


def test_private_adapters_without_a_task_are_not_saved(tmp_path: Path) -> None:
    model = routed(stack(), method="private")
    model.keep_tasks([])
    with pytest.raises(InputError, match="no private adapter is left to save: add a task first"):
        model.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("", "is not valid JSON"),
        ("[]", "is not in inventory format 2"),
        ("{}", "is not in inventory format 2"),
        ('{"format": 99}', "upgrade polyroute"),
        ("\x00\x01", "is not valid JSON"),
    ],
)
def test_a_damaged_description_is_refused(saved: Path, text: str, message: str) -> None:
    (saved / "polyroute.json").write_text(text)
    with pytest.raises(InputError, match=message):
        from_pretrained(stack(), saved)


def test_a_description_that_is_not_text_is_refused(saved: Path) -> None:
    (saved / "polyroute.json").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InputError, match="is not valid JSON"):
        from_pretrained(stack(), saved)


def test_a_setting_that_does_not_exist_is_refused(saved: Path) -> None:
    description = json.loads((saved / "polyroute.json").read_text())
    description["config"]["rang"] = 4
    (saved / "polyroute.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match="config key 'rang' does not exist: did you mean 'rank'"):
        from_pretrained(stack(), saved)


def test_a_folder_without_an_inventory_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=r"holds no inventory: there is no polyroute\.json"):
            from_pretrained(stack(), folder)


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    model, file = routed(stack()), tmp_path / "file"
    file.write_text("mine")
    for write in (model.save_pretrained, lambda folder: model.export_peft("amber", folder)):
        with pytest.raises(InputError, match="is a file; name a folder"):
            write(file)
        with pytest.raises(InputError, match="cannot create the folder"):
            write(file / "below")
    assert file.read_text() == "mine"


def test_a_folder_without_write_permission_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The superuser may write everywhere, so the answer of the system is replaced.
    monkeypatch.setattr("polyroute.host.files.os.access", lambda *_: False)
    with pytest.raises(InputError, match=r"cannot write to the folder .*; check its permissions"):
        make_folder(tmp_path)


def test_a_failed_write_leaves_the_old_files_and_no_temporary_ones(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("polyroute.host.files.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        routed(stack(), seed=9).save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_saving_again_replaces_everything(saved: Path) -> None:
    model, x = routed(stack(), ("x", "y"), seed=7, num_heads=4), torch.randn(2, 8)
    model.save_pretrained(saved)
    assert {path.name for path in saved.iterdir()} == FILES
    loaded = from_pretrained(stack(), saved)
    assert torch.equal(loaded(x, tasks=["x", "y"]), model(x, tasks=["x", "y"]))


def test_load_adapter_overwrites_in_place(saved: Path) -> None:
    model = routed(stack(), num_heads=2, num_skills=3, rank=2, seed=5)
    kept = list(model.parameters())
    x = torch.randn(2, 8)
    with torch.no_grad(), model.route("amber"):
        before = model(x)
        model.load_adapter(saved)
        after = model(x)
    assert all(a is b for a, b in zip(model.parameters(), kept, strict=True))
    expected = from_pretrained(stack(), saved)(x, tasks="amber")
    assert torch.equal(after, expected)
    assert not torch.equal(before, after)


def test_load_adapter_refuses_other_tasks_and_sizes(saved: Path) -> None:
    with pytest.raises(InputError, match="holds other tasks than this model"):
        routed(stack(), ("x",), num_heads=2, num_skills=3, rank=2).load_adapter(saved)
    model = routed(stack(), num_heads=2, num_skills=3, rank=4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(InputError, match=r"has rank=2 and this model rank=4"):
        model.load_adapter(saved)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_loaded_model_trains_on(saved: Path) -> None:
    model = from_pretrained(stack(), saved, tasks=[])
    model.add_task("elm")
    optimizer = torch.optim.SGD(model.param_groups("z"))
    before = model.routes["elm"]
    model(torch.randn(2, 8), tasks="elm").square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.routes["elm"], before)


def test_a_base_is_free_for_another_inventory_after_a_refusal(saved: Path) -> None:
    base = stack()
    with pytest.raises(InputError, match="unknown task"):
        from_pretrained(base, saved, tasks=["oak"])
    assert_untouched(base)
    attach(base, MHRConfig(), ["x"])
