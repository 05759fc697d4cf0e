"""Damaged files: one changed byte anywhere in what was saved is noticed, and named."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from commands_run import Capture, document, refused
from conftest import train_arguments
from hypothesis import HealthCheck, given, settings
from models import llama, routed
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_interruptions import at_step

import polyroute as pr
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
