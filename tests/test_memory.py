"""The memory of the machine, and what is given back of it."""

import subprocess
import sys
from pathlib import Path

import pytest

from polyroute.host import memory


def test_memory_is_given_back_every_twenty_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now, given = [100.0], []
    monkeypatch.setattr(memory.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(memory, "give_back_memory", lambda: given.append(now[0]))
    trim = memory.Trim()
    for now[0] in (101.0, 119.0, 121.0, 122.0, 140.0, 142.0):
        trim.if_due()
    assert given == [121.0, 142.0]


def test_giving_back_works_on_this_machine() -> None:
    memory.give_back_memory()


BOUND = """
import resource
import torch
from polyroute.host import memory

memory.total = lambda: 2**30
memory.psutil.swap_memory = lambda: type("Swap", (), {"total": 0})
memory.bound()
torch.empty(2**28, dtype=torch.uint8)
try:
    torch.empty(2**31, dtype=torch.uint8)
except RuntimeError as error:
    assert "can't allocate memory" in str(error)
else:
    raise SystemExit("twice the memory was granted")
low = (2**20, resource.getrlimit(resource.RLIMIT_DATA)[1])
resource.setrlimit(resource.RLIMIT_DATA, low)
memory.bound()
assert resource.getrlimit(resource.RLIMIT_DATA) == low
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such limit")
def test_more_memory_than_there_is_is_refused_and_not_granted() -> None:
    ended = subprocess.run([sys.executable, "-c", BOUND], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_the_memory_of_a_container_is_that_of_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = memory.total(), memory.available()
    limit = tmp_path / "limit"
    monkeypatch.setattr(memory, "GROUPS", ((str(tmp_path), "limit", "used", "cached"),))
    limit.write_text("1000\n")
    (tmp_path / "used").write_text("400\n")
    (tmp_path / "memory.stat").write_text("anon 300\ncached 100\n")
    assert (memory.total(), memory.available()) == (1000, 700)
    limit.write_text("max\n")
    assert memory.total() >= there[0] > 1000
    limit.unlink()
    assert memory.available() > 1000
