"""`polyroute export --all`: every task of a run in a folder of its own, and lists for servers."""

import errno
import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from commands_run import document, forked, read, refused, wait_for
from hypothesis import given
from hypothesis import strategies as st
from models import TASKS, gpt2, llama, relative_error, routed
from safetensors.torch import load_file
from test_rules import MODELS
from transformers import ByT5Tokenizer

import polyroute as pr
from polyroute import InputError, RoutedModel
from polyroute.exchange import peft_folders
from polyroute.exchange.peft_folders import write_folders
from polyroute.host.files import BLOCK, whole_folders, write_in_place
from polyroute.program.cli.app import main
from polyroute.routes.mixer import Mixer
from polyroute.saved.checkpoint import read_checkpoint
from polyroute.saved.peft_card import write_peft_card
from polyroute.saved.peft_export import peft_target
from polyroute.saved.peft_pattern import Pattern
from polyroute.saved.runs import open_run, record
from polyroute.task_names import folder_names

FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
OWN = {"run.json", "lora_modules.txt", "adapters.json"}
ODD = (
    "a/b", "a_b", "..", ".", ".hidden", "../../out", "Amber", "amber", "AMBER", "MU", "run.json",
    "adapters.json", "lora_modules.txt", "Straße ß", "x" * 300, "x" * 299 + "y", "it's", 'say "x"',
    "a=b", "a,b", "--all", "{x}", "%41", "A", "$HOME `ls` $(ls)", "back\\slash", "*", " ", "tab ~",
)  # fmt: skip


def run_of(model: RoutedModel, place: Path) -> Path:
    """A run with this inventory, of the base model in the same folder."""
    run = open_run(place / "run", "train", resume=False, overwrite=False)
    limits = {"max_input": 32, "max_target": 8}
    record(run, "train", {"model": str(place / "base"), "prompt": "plain", **limits})
    model.save_pretrained(run)
    return run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("exported")
    llama().save_pretrained(place / "base")
    ByT5Tokenizer(extra_ids=0).save_pretrained(place / "base")
    return place


@pytest.fixture(scope="module")
def odd(base: Path) -> Path:
    """A run whose tasks have odd names, and whose rows lie in several shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("polyroute.saved.shards.ROWS_PER_SHARD", 8)
        run = run_of(routed(llama(), ODD, num_heads=4, rank=3, alpha=2.0), base)
    assert len(list(run.glob("routes-*"))) == 4
    return run


def tensors(folder: Path) -> torch.Tensor:
    """All numbers of an adapter, one after another, by the names of their tensors."""
    found = load_file(folder / "adapter_model.safetensors")
    return torch.cat([found[name].flatten().double() for name in sorted(found)])


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_adapter(folder: Path, single: Path, most: float = 1e-6) -> None:
    """All files are those of the export of one task, up to the order of sums over the skills.

    A product for several tasks adds the K skills in another order than one for a single task.
    """
    ours, theirs = content(folder), content(single)
    assert ours.keys() == theirs.keys()
    name = "adapter_model.safetensors"
    assert {k: v for k, v in ours.items() if k != name} == {
        k: v for k, v in theirs.items() if k != name
    }
    header = 8 + int.from_bytes(theirs[name][:8], "little")
    assert len(ours[name]) == len(theirs[name])
    assert ours[name][:header] == theirs[name][:header]
    assert relative_error(tensors(folder), tensors(single)) <= most


def taken_apart(argument: str) -> tuple[str, str]:
    """What vLLM makes of an argument of `--lora-modules`."""
    assert not argument.startswith("-")
    if "=" in argument and "," not in argument:
        name, path = argument.split("=")
        return name, path
    entry = json.loads(argument)
    assert entry.keys() == {"name", "path"}
    return entry["name"], entry["path"]


# ------------------------------------------------------------------ all adapters


def test_every_folder_is_that_of_the_single_task(
    odd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peft_folders, "MOST_AT_ONCE", 3)
    mixed: list[int] = []
    real = Mixer.factors_of

    def factors_of(self: Mixer, rows: Any, use: str = "exported") -> Any:
        mixed.append(1 if isinstance(rows, int) else len(rows))
        assert len(self.table) <= 3  # the table is read in parts
        return real(self, rows, use)

    monkeypatch.setattr(Mixer, "factors_of", factors_of)
    out = tmp_path / "loras"
    printed = document(["export", str(odd), "--all", "--out", str(out)], capsys)
    monkeypatch.undo()
    count = len(ODD) + 1
    assert printed == {"out": str(out), "format": "peft", "task": None, "adapters": count}
    assert mixed.count(3) == len(ODD) // 3
    assert {path.name for path in out.iterdir() if path.is_file()} == OWN
    folders = {one["lora_name"]: Path(one["lora_path"]) for one in read(out / "adapters.json")}
    assert list(folders) == ["mu", *ODD]
    assert {folder.parent for folder in folders.values()} == {out}
    assert len({folder.name.lower() for folder in folders.values()}) == count
    assert sorted(folders.values()) == sorted(path for path in out.iterdir() if path.is_dir())
    assert folders["mu"].name == "mu"
    assert folders["a_b"].name == "a_b"
    for task in ("mu", *ODD):
        main(["export", str(odd), f"--task={task}", "--out", str(tmp_path / "single")])
        assert_same_adapter(folders[task], tmp_path / "single")
        assert content(folders[task]).keys() == FILES
        shutil.rmtree(tmp_path / "single")
    different = relative_error(tensors(folders["a/b"]), tensors(folders["a_b"]))
    assert different > 1e-3
    lines = (out / "lora_modules.txt").read_text().splitlines()
    assert len(lines) == count
    expected = [(task, str(folder)) for task, folder in folders.items()]
    assert [taken_apart(word) for word in shlex.split(" ".join(lines))] == expected
    assert lines[0] == f"mu={out / 'mu'}"
    with (out / "lora_modules.txt").open() as file:
        command = ["xargs", "printf", r"%s\0"]
        done = subprocess.run(command, stdin=file, capture_output=True, check=True, text=True)
    words = done.stdout
    assert words.split("\0")[:-1] == shlex.split(" ".join(lines))
    main(["check", str(out)])
    shutil.rmtree(folders["amber"])
    assert f"{folders['amber']} holds no adapter" in refused(["check", str(out)], capsys)


def kinds() -> dict[str, tuple[Callable[[], Any], dict[str, Any], float]]:
    # Private and shared skills are taken whole, and with combine="output" they are multiplied one
    # by one: nothing is summed.
    return {
        "private": (llama, {"method": "private", "rank": 3}, 0.0),
        "shared": (llama, {"method": "shared"}, 0.0),
        "ia3": (llama, {"adapter": "ia3", "num_heads": 4}, 1e-6),
        "output": (llama, {"combine": "output", "num_heads": 2}, 0.0),
        "transposed": (gpt2, {"num_heads": 4}, 1e-6),
        "modules": (llama, {"modules_to_save": ["norm"]}, 1e-6),
        "float64": (lambda: llama().double(), {"num_heads": 2}, 1e-12),
        "bfloat16": (lambda: llama().bfloat16(), {"num_heads": 2}, 1e-6),
    }


@pytest.mark.parametrize("kind", [*kinds(), "average", "library"])
def test_every_kind_of_inventory_is_exported_as_its_single_tasks(
    kind: str, tmp_path: Path, loras: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peft_folders, "MOST_AT_ONCE", 3)
    build, config, most = kinds().get(kind, (llama, {"num_heads": 4}, 0.0))
    if kind == "library":  # of different ranks and layers
        model = pr.attach(llama(), pr.Library.from_peft(loras))
    else:
        model = routed(build(), **config)
    if kind == "average":
        model.set_phase("mu")
    if kind == "modules":
        with torch.no_grad():
            model.base_model.model.norm.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "saved")
    tasks = ("mu", *model.tasks)
    card = partial(write_peft_card, prompting=None)
    for task in tasks:
        model.export_peft(task, tmp_path / "single" / task)
        card(tmp_path / "single" / task)
    model.unload()
    saved = read_checkpoint(tmp_path / "saved").saved_routes
    empty = pr.from_pretrained(build(), tmp_path / "saved", tasks=None if saved is None else [])
    (tmp_path / "out").mkdir()
    folders = {task: tmp_path / "out" / task for task in tasks}
    assert sum(write_folders(empty, saved, folders, card)) == len(tasks)
    for task in tasks:
        assert_same_adapter(folders[task], tmp_path / "single" / task, most)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(tasks)


def test_tasks_that_wait_to_be_written_do_not_share_their_memory(tmp_path: Path) -> None:
    model = routed(llama(), num_heads=4)
    target = peft_target(model.base_model, model.sites)
    for task in TASKS:
        model.export_peft(task, tmp_path / "single" / task)
    pattern = Pattern(tmp_path / "single" / "dune")
    parts = [["amber"], ["birch"], ["cedar", "dune"], ["birch"]]
    rows = [[TASKS.index(task) for task in part] for part in parts]
    filled = [pattern.filled(target.tensors(model.mixer.factors_of(r)), len(r)) for r in rows]
    for number, (part, memory) in enumerate(zip(parts, filled, strict=True)):
        place = tmp_path / str(number)
        place.mkdir()
        pattern.write([place / task for task in part], memory)
    for number, part in enumerate(parts):
        for task in part:
            assert_same_adapter(tmp_path / str(number) / task, tmp_path / "single" / task)
    again = pattern.filled(target.tensors(model.mixer.factors_of([0])), 1)
    assert again.data_ptr() in {memory.data_ptr() for memory in filled}  # which is written


def test_no_list_for_vllm_names_adapters_that_it_cannot_serve(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "ia3"
    place.mkdir()
    (place / "base").symlink_to(base / "base")
    run = run_of(routed(llama(), adapter="ia3"), place)
    main(["export", str(run), "--all", "--out", str(tmp_path / "out")])
    assert "take LoRAs alone, so lora_modules.txt is not written" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "run.json", "adapters.json", "mu", *TASKS}  # fmt: skip


# ------------------------------------------------------------------ interrupted


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the killed process is a fork")
def test_a_killed_export_goes_on_with_what_is_left(
    odd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peft_folders, "MOST_AT_ONCE", 2)
    out = tmp_path / "loras"
    arguments = ["export", str(odd), "--all", "--out", str(out)]

    def adapters() -> list[Path]:
        return sorted(path for path in out.glob("[!.]*") if path.is_dir())

    with monkeypatch.context() as patch:
        real = peft_folders.whole_folders

        def slow(parent: Path) -> Any:
            time.sleep(0.1)
            return real(parent)

        patch.setattr(peft_folders, "whole_folders", slow)
        with forked(arguments):
            wait_for(lambda: len(adapters()) > 4)
    before = {path: (path.stat().st_mtime_ns, content(path)) for path in adapters()}
    assert 4 < len(before) < len(ODD)
    assert all(files.keys() == FILES for _, files in before.values())
    assert not (out / "adapters.json").exists()
    main(["check", str(out)])  # what is there is whole
    assert "--resume continues it" in refused(arguments, capsys)
    first, second, *_ = before
    (first / "adapter_model.safetensors").unlink()
    (out / ".left.unfinished").mkdir()
    main([*arguments, "--resume"])
    assert f"wrote {len(ODD) + 2 - len(before)} PEFT adapters" in capsys.readouterr().out
    assert len(adapters()) == len(ODD) + 1
    assert not list(out.glob(".*"))
    for path, (written, files) in before.items():
        assert content(path).keys() == files.keys()
        assert (path.stat().st_mtime_ns == written) == (path != first)
    again = tmp_path / "again"
    main([*arguments[:-1], str(again)])
    for path in adapters():
        assert relative_error(tensors(path), tensors(again / path.name)) < 1e-6
    main([*arguments, "--resume"])
    assert "wrote 0 PEFT adapters" in capsys.readouterr().out
    assert second.stat().st_mtime_ns == before[second][0]
    main([*arguments, "--overwrite"])
    assert second.stat().st_mtime_ns != before[second][0]


def test_an_export_of_another_inventory_is_not_taken_up(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "base").symlink_to(base / "base")
    run = run_of(routed(llama()), tmp_path)
    arguments = ["export", str(run), "--all", "--out", str(tmp_path / "loras")]
    main(arguments)
    pr.SavedRoutes(run).delete("birch")
    assert "was started from another inventory" in refused([*arguments, "--resume"], capsys)
    main([*arguments, "--overwrite"])
    assert not (tmp_path / "loras" / "birch").exists()
    one = ["export", str(run), "--task", "amber", "--out", str(tmp_path / "loras")]
    assert "holds no adapter" in refused(one, capsys)


# ------------------------------------------------------------------ refused


@pytest.mark.parametrize(("extra", "sentence"), [
    (["--all", "--task", "amber"], "--all and --task exclude each other"),
    (["--all", "--format", "mttl"], "--all is for --format peft"),
    (["--task", "amber", "--resume"], "--resume goes with --all"),
    (["--task", "amber", "--overwrite"], "--overwrite goes with --all"),
    (["--all", "--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
    (["--all", "--resume"], "there is no run to resume"),
    ([], "name it with --task, or take --all"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused(
    odd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], sentence: str
) -> None:
    out = tmp_path / "out"
    assert sentence in refused(["export", str(odd), "--out", str(out), *extra], capsys)
    assert not out.exists()


def test_an_export_goes_into_no_other_folder(
    odd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("mine")
    command = ["export", str(odd), "--all", "--out"]
    assert "is not empty and holds no run" in refused([*command, str(tmp_path)], capsys)
    assert "which the command reads" in refused([*command, str(odd.parent)], capsys)
    assert "is a file" in refused([*command, str(tmp_path / "mine")], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_damaged_row_is_refused_before_anything_is_written(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "base").symlink_to(base / "base")
    run = run_of(routed(llama()), tmp_path)
    (shard,) = run.glob("routes-*")
    shard.write_bytes(shard.read_bytes()[:-4] + b"\0\0\0\0")
    out = tmp_path / "out"
    assert "is damaged" in refused(["export", str(run), "--all", "--out", str(out)], capsys)
    assert not out.exists()


def test_tasks_of_a_rule_that_looks_at_the_input_are_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "base").symlink_to(base / "base")
    run = run_of(next(iter(MODELS.values()))(llama()), tmp_path)
    out = tmp_path / "out"
    sentence = refused(["export", str(run), "--all", "--out", str(out)], capsys)
    assert "cannot be exported: use 'mu', the average of the skills" in sentence
    assert not out.exists()


# ------------------------------------------------------------------ names and files


@given(st.lists(st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1), unique=True))
def test_no_two_tasks_share_a_folder_and_none_leaves_its_place(names: list[str]) -> None:
    found = folder_names(names, OWN)
    assert list(found) == names
    taken = [folder.lower() for folder in found.values()]
    assert len({*taken, *OWN}) == len(names) + len(OWN)
    for folder in found.values():
        assert folder.isascii()
        assert not folder.startswith(".")
        assert Path(folder).name == folder
        assert len(folder) < 200


def test_a_name_that_is_another_ones_name_with_a_hash_gets_a_hash_too() -> None:
    _, second = folder_names(["Amber", "amber"]).values()
    assert second.startswith("amber-")
    assert len(set(folder_names([second, "Amber", "amber"]).values())) == 3


@pytest.mark.parametrize("fails", ["nothing", "open", "write", "part"])
def test_a_file_is_the_same_with_and_without_the_cache_of_the_system(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = torch.arange(3 * BLOCK, dtype=torch.int64).to(torch.uint8)
    start = -memory.data_ptr() % BLOCK
    block = memory[start : start + 2 * BLOCK]
    if fails == "nothing" and not hasattr(os, "O_DIRECT"):
        pytest.skip("this system has no way past its cache")
    names = {"open": "open", "write": "write", "part": "write"}

    def fail(handle: Any, *_: Any) -> int:
        if fails == "part":
            return 1
        raise OSError(errno.EINVAL, "this file system cannot")

    with monkeypatch.context() as patch:
        if fails in names:
            patch.setattr(f"polyroute.host.files.os.{names[fails]}", fail)
        write_in_place(tmp_path / "file", memoryview(block.numpy()), BLOCK + 5)
        write_in_place(tmp_path / "short", b"short")
    assert (tmp_path / "file").read_bytes() == bytes(block.numpy()[: BLOCK + 5])
    assert (tmp_path / "short").read_bytes() == b"short"
    assert (tmp_path / "file").stat().st_mode & 0o777 == (tmp_path / "short").stat().st_mode & 0o777


def test_folders_appear_together_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "old").touch()

    def interrupted() -> None:
        with whole_folders(tmp_path) as place:
            (place / "a").mkdir()
            raise InputError("no")

    with pytest.raises(InputError):
        interrupted()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    with whole_folders(tmp_path) as place:
        for name in "ab":
            (place / name).mkdir()
            write_in_place(place / name / "new", name.encode())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["new"]
