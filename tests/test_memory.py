"""Memory is given back now and then, and seldom enough to cost nothing."""

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
