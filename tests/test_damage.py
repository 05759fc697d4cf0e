"""Damaged files: one changed byte anywhere in what was saved is noticed, and named."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from commands_run import Capture, adapt, document, ended, read, refused
from conftest import train_arguments
from hypothesis import HealthCheck, given, settings
from models import llama, routed
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_interruptions import at_slot_step, at_step, equal, send, untimed

import polyroute as pr
from polyroute.adapting.slot import read_slot
from polyroute.host.files import UNFINISHED
from polyroute.program.cli.app import main
from polyroute.saved.digests import described_digest
from polyroute.saved.manifest import MANIFEST
from polyroute.saved.runs import held
from polyroute.saved.shards import NOTE

FILES = ("polyroute.json", "inventory.safetensors", "routes-00000-of-00001.safetensors")


@pytest.fixture(scope="module")
def inventory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    routed(llama()).save_pretrained(folder)
    SAVED[folder / "polyroute.json"] = json.loads((folder / "polyroute.json").read_text())
    return folder


class Flipped:
    """Within the block, one byte of a file has one bit flipped."""

    def __init__(self, path: Path, place: int, bit: int = 0) -> None:
        self.path, self.before = path, path.read_bytes()
        place %= len(self.before)
        changed = bytearray(self.before)
        changed[place] ^= 1 << bit
        self.after = bytes(changed)

    def __enter__(self) -> None:
        self.path.write_bytes(self.after)

    def __exit__(self, *_: object) -> None:
        self.path.write_bytes(self.before)


def says_the_same(text: bytes, path: Path) -> bool:
    """One character for white space may stand for another."""
    try:
        content = json.loads(text)
    except ValueError:
        return False
    return bool(content == SAVED[path])


SAVED: dict[Path, object] = {}
"""What each description said before a bit of it was flipped."""


@given(
    name=st.sampled_from(FILES),
    place=st.one_of(st.integers(0, 4000), st.integers(0, 10**7)),  # headers more often
    bit=st.integers(0, 7),
)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_flipped_bit_is_noticed(inventory: Path, name: str, place: int, bit: int) -> None:
    with Flipped(inventory / name, place, bit):
        flipped = Path(inventory / name).read_bytes()
        if name.endswith(".json") and says_the_same(flipped, inventory / name):
            return
        with pytest.raises(pr.InputError, match=re.escape(str(inventory))):
            pr.from_pretrained(llama(), inventory)


def test_single_rows_are_read_and_whole_shards_are_compared(inventory: Path) -> None:
    path = inventory / FILES[2]
    routes = pr.SavedRoutes(inventory)
    name = next(iter(routes.names()))
    rows = load_file(path)["rows"]
    with Flipped(path, path.stat().st_size - 1), pytest.raises(pr.InputError, match="is damaged"):
        pr.SavedRoutes(inventory).check(routes.names())
    before = routes.read(name)
    routes.write(name, before + 1)
    assert torch.allclose(pr.SavedRoutes(inventory).read(name), before + 1)
    pr.SavedRoutes(inventory).check(routes.names())
    routes.write(name, before)
    assert torch.equal(load_file(path)["rows"], rows)


def test_files_of_older_versions_have_no_digest_and_load(inventory: Path, tmp_path: Path) -> None:
    for name in FILES:
        path = inventory / name
        if name.endswith(".json"):
            content = json.loads(path.read_text())
            del content["sha256"]
            (tmp_path / name).write_text(json.dumps(content))
            continue
        with safe_open(path, "pt") as file:
            note = json.loads(file.metadata()[NOTE])
        del note["sha256"]
        save_file(load_file(path), tmp_path / name, {NOTE: json.dumps(note)})
    assert pr.from_pretrained(llama(), tmp_path).tasks


@pytest.fixture(scope="module")
def stopped(place: Path) -> Path:
    """A run with checkpoints."""
    out = place / "with-checkpoints"
    main([*train_arguments(place, out.name), "--save-steps", "4"])
    return out


def last_two(run: Path) -> tuple[Path, Path]:
    found = sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return found[-2], found[-1]


def files_of(checkpoint: Path) -> Iterator[Path]:
    yield from (path for path in sorted(checkpoint.iterdir()) if path.name != "README.md")


def test_every_file_of_a_checkpoint_is_checked(stopped: Path, capsys: Capture) -> None:
    _, last = last_two(stopped)
    assert (last / MANIFEST).is_file()
    found = document(["check", str(stopped)], capsys)["checked"]
    assert last.name in found
    for path in files_of(last):
        for place in (0, path.stat().st_size // 2, path.stat().st_size - 2):
            with Flipped(path, place):
                sentence = refused(["check", str(stopped)], capsys)
            assert path.name in sentence or last.name in sentence, path


def test_damage_in_the_last_checkpoint_goes_back_to_the_one_before(
    stopped: Path, place: Path, capsys: Capture
) -> None:
    before, last = last_two(stopped)
    (stopped / "metrics.json").unlink()
    with Flipped(last / "optimizer.pt", 5000):
        main([*train_arguments(place, stopped.name), "--save-steps", "4", "--resume"])
    said = capsys.readouterr().out
    assert f"resuming from {before.name}" in said
    assert "optimizer.pt is damaged" in said


def test_what_cannot_be_checked_is_said(tmp_path: Path, capsys: Capture) -> None:
    assert "is not a folder" in refused(["check", str(tmp_path / "none")], capsys)
    assert "holds no run, no inventory and no adapter" in refused(["check", str(tmp_path)], capsys)


def test_writers_of_one_table_lose_nothing(tmp_path: Path) -> None:
    routed(llama()).save_pretrained(tmp_path)
    shape = pr.SavedRoutes(tmp_path).shape
    before = len(pr.SavedRoutes(tmp_path))
    children = []
    for writer in range(4):
        child = os.fork()
        if child == 0:
            try:
                routes = pr.SavedRoutes(tmp_path)
                for task in range(6):
                    routes.add(f"{writer} {task}", torch.full(shape, float(writer)))
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    routes = pr.SavedRoutes(tmp_path)
    assert len(routes) == before + 24
    assert float(routes.read("3 5").mean()) == 3
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: pr.SavedRoutes(tmp_path).delete(f"{i % 4} {i // 4}"), range(24)))
    assert len(pr.SavedRoutes(tmp_path)) == before


@pytest.mark.parametrize("is_back", [False, True])
def test_a_folder_that_disappears_is_no_success(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, is_back: bool
) -> None:
    out = tmp_path / "gone"

    def remove() -> None:
        shutil.rmtree(out)
        if is_back:
            out.mkdir()

    at_step(3, remove, monkeypatch)
    sentence = refused([*train_arguments(place, "x"), "--out", str(out), "--quiet"], capsys)
    assert "was removed or replaced while the run worked in it" in sentence


def test_a_run_inside_another_keeps_what_it_writes(stopped: Path) -> None:
    inside = stopped / "adapt-z-8"
    inside.mkdir()
    (inside / "run.json").write_text("{}")
    being_written = inside / f".task.abc{UNFINISHED}"
    being_written.mkdir()
    left = stopped / f".metrics.json.abc{UNFINISHED}"
    left.touch()
    with held(stopped):
        assert being_written.is_dir()
        assert not left.exists()
    shutil.rmtree(inside)


def test_what_is_missing_is_no_whole_run(stopped: Path, tmp_path: Path, capsys: Capture) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    (run / "metrics.json").write_text("{}")
    (run / "polyroute.json").unlink(missing_ok=True)
    assert "polyroute.json" in refused(["check", str(run)], capsys)
    run = shutil.copytree(stopped, tmp_path / "other")
    _, last = last_two(run)
    (last / MANIFEST).write_text("{}")
    assert "lists no file" in refused(["check", str(run)], capsys)
    (last / MANIFEST).unlink()
    (last / "optimizer.pt").write_bytes(b"xx")
    assert "optimizer.pt is damaged" in refused(["check", str(run)], capsys)


def test_a_writer_notices_that_everything_was_saved_again(tmp_path: Path) -> None:
    routed(llama()).save_pretrained(tmp_path)
    routes = pr.SavedRoutes(tmp_path)
    row = torch.zeros(routes.shape)
    routed(llama(), seed=3).save_pretrained(tmp_path)
    with pytest.raises(pr.InputError, match="was saved again since this table was opened"):
        routes.add("new", row)
    pr.SavedRoutes(tmp_path).add("new", row)
    assert "new" in pr.from_pretrained(llama(), tmp_path).tasks


def test_a_digest_is_that_of_what_is_read_again() -> None:
    written = {"settings": {10: "a", 2: "b", None: 1}}
    assert described_digest(written) == described_digest(json.loads(json.dumps(written)))


# ------------------------------------------------------------------ ends and descriptions


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path) -> None:
    Flipped(path, -9).__enter__()


def removed(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("spoil", [emptied, flipped, removed])
@pytest.mark.parametrize("name", ["inventory.safetensors", "polyroute.json"])
def test_the_end_of_a_run_is_restored_from_its_last_checkpoint(
    place: Path, stopped: Path, tmp_path: Path, capsys: Capture, name: str,
    spoil: Callable[[Path], None],
) -> None:  # fmt: skip
    out = shutil.copytree(stopped, tmp_path / "run")
    spoil(out / name)
    again = [*train_arguments(place, "x"), "--out", str(out), "--resume"]
    main(again)
    said = capsys.readouterr().out
    assert "restoring the end of the run from checkpoint-12" in said
    assert (out / name).read_bytes() == (stopped / name).read_bytes()
    main(again)
    assert "there is nothing to resume" in capsys.readouterr().out


def test_an_end_that_cannot_be_restored_is_refused(
    place: Path, stopped: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = shutil.copytree(
        stopped, tmp_path / "run", ignore=lambda *_: {"checkpoint-8", "checkpoint-12"}
    )
    (out / "inventory.safetensors").unlink()
    again = [*train_arguments(place, "x"), "--out", str(out), "--resume", "--quiet"]
    assert "no checkpoint is left to restore the run from" in refused(again, capsys)


@pytest.mark.parametrize("text", ["{}", "[]", '{"log": [5]}', '{"log": [], "eval_loss": "x"}'])
def test_metrics_have_their_types_or_are_written_again(
    place: Path, stopped: Path, tmp_path: Path, capsys: Capture, text: str
) -> None:
    out = shutil.copytree(stopped, tmp_path / "run")
    (out / "metrics.json").write_text(text)
    assert "metrics.json is damaged" in refused(["check", str(out)], capsys)
    main([*train_arguments(place, "x"), "--out", str(out), "--resume"])
    logs = [read(folder / "metrics.json")["log"] for folder in (out, stopped)]
    assert [untimed(entry) for entry in logs[0]] == [untimed(entry) for entry in logs[1]]


def test_one_flipped_letter_of_a_description_is_noticed(
    stopped: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = shutil.copytree(stopped, tmp_path / "run")
    text = (out / "run.json").read_text()
    for old, new in (('"heads"', '"heats"'), ('"sha256"', '"sha257"')):
        (out / "run.json").write_text(text.replace(old, new))
        assert "run.json is damaged: it does not say what was written" in refused(
            ["check", str(out)], capsys
        )
    description = json.loads(text)
    del description["sha256"]
    (out / "run.json").write_text(json.dumps(description))
    document(["check", str(out)], capsys)


def test_a_folder_that_disappears_is_noticed_at_the_next_checkpoint(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    out = tmp_path / "gone"
    at_step(2, lambda: (out / "run.json").unlink(), monkeypatch)
    extra = ["--out", str(out), "--quiet", "--steps", "4000", "--save-steps", "4"]
    assert "was removed or replaced" in refused([*train_arguments(place, "x"), *extra], capsys)
    assert not list(out.glob("checkpoint-*"))


# ------------------------------------------------------------------ adaptations


@pytest.fixture(scope="module")
def halfway(place: Path, stopped: Path) -> Path:
    """An adaptation that was interrupted, of one slot."""
    with pytest.MonkeyPatch.context() as patch:
        at_slot_step(5, send(signal.SIGTERM), patch)
        assert ended(one_slot(place, stopped, "halfway")) == 143
    return place / "halfway"


def one_slot(place: Path, run: Path, out: str, *extra: str) -> list[str]:
    return adapt(place, run, out, "--tasks", "pick", "--seeds", "0", *extra)


SLOT = Path(".running", "pick-seed-0.safetensors")


@given(place=st.one_of(st.integers(0, 4000), st.integers(0, 10**7)), bit=st.integers(0, 7))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_flipped_bit_of_a_running_slot_is_noticed(halfway: Path, place: int, bit: int) -> None:
    with (
        Flipped(halfway / SLOT, place, bit),
        pytest.raises(pr.InputError, match="delete it to start"),
    ):
        read_slot(halfway / SLOT)
    read_slot(halfway / SLOT)


@pytest.mark.parametrize("spoil", [emptied, flipped])
def test_a_damaged_slot_is_named_and_starts_anew(
    place: Path, stopped: Path, halfway: Path, tmp_path: Path, capsys: Capture,
    spoil: Callable[[Path], None],
) -> None:  # fmt: skip
    out = shutil.copytree(halfway, tmp_path / "run")
    assert ".running" in document(["check", str(out)], capsys)["checked"]
    spoil(out / SLOT)
    again = one_slot(place, stopped, str(out), "--resume", "--quiet")
    for command in (["check", str(out)], again):
        sentence = refused(command, capsys)
        assert SLOT.name in sentence
        assert "delete it to start that slot from the beginning" in sentence
    (out / SLOT).unlink()
    main(again)
    main(one_slot(place, stopped, str(tmp_path / "whole")))
    equal(out, tmp_path / "whole", "pick/seed-0/adapter_model.safetensors")


@pytest.fixture(scope="module")
def adapted(place: Path, stopped: Path) -> Path:
    main(one_slot(place, stopped, "adapted"))
    return place / "adapted"


@pytest.mark.parametrize("spoil", [emptied, flipped, removed])
@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "adapter_config.json", "route.safetensors"]
)
def test_a_damaged_adapter_is_noticed_and_made_again(
    place: Path, stopped: Path, adapted: Path, tmp_path: Path, capsys: Capture, name: str,
    spoil: Callable[[Path], None],
) -> None:  # fmt: skip
    out = shutil.copytree(adapted, tmp_path / "run")
    path = out / "pick" / "seed-0" / name
    document(["check", str(out)], capsys)
    spoil(path)
    assert name in refused(["check", str(out)], capsys)
    main(one_slot(place, stopped, str(out), "--resume"))
    assert "adapting to pick with seed 0 again" in capsys.readouterr().out
    document(["check", str(out)], capsys)
    main(one_slot(place, stopped, str(out), "--resume"))
    assert "again" not in capsys.readouterr().out


@pytest.mark.parametrize("text", ["[]", "{}", None])
def test_results_that_are_lost_are_noticed(
    adapted: Path, tmp_path: Path, capsys: Capture, text: str | None
) -> None:
    out = shutil.copytree(adapted, tmp_path / "run")
    (out / "results.json").unlink()
    if text is not None:
        (out / "results.json").write_text(text)
    assert "results.json" in refused(["check", str(out)], capsys)


def test_a_card_may_be_changed(adapted: Path, tmp_path: Path, capsys: Capture) -> None:
    out = shutil.copytree(adapted, tmp_path / "run")
    (out / "pick" / "seed-0" / "README.md").write_text("mine")
    document(["check", str(out)], capsys)
