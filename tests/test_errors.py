import re
import string
from pathlib import Path

import pytest

import polyroute
from polyroute.errors import did_you_mean, reason


@pytest.mark.parametrize("name", ["river", "rivesr", "Rivers"])
def test_a_near_name_is_offered(name: str) -> None:
    assert did_you_mean(name, ["mountains", "rivers"]) == "did you mean 'rivers'?"


def test_where_no_name_is_near_a_few_are_listed() -> None:
    assert did_you_mean("xyz", string.ascii_lowercase[:10]) == (
        "known: 'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h' and 2 more"
    )
    assert did_you_mean("xyz", []) == "none exist"


# Many names under another letter; a few thousand under each letter; all under the same letter.
@pytest.mark.parametrize("prefixes", ["t", string.ascii_lowercase, "r"])
def test_a_near_name_with_the_same_first_letter_is_offered_among_many(prefixes: str) -> None:
    names = [f"{prefixes[i % len(prefixes)]}{i:06}" for i in range(100_000)]
    clause = did_you_mean("rivesr", [*names, "rivers"])
    assert clause.startswith("did you mean 'rivers'")


@pytest.mark.parametrize("near", ["task-000000", "task-054321", "task-099999"])
def test_a_name_is_offered_wherever_it_lies_among_many_alike(near: str) -> None:
    names = [f"task-{i:06}" for i in range(100_000)]
    assert did_you_mean(near + "x", names).startswith(f"did you mean {near!r}")


def test_the_reason_of_another_library_is_one_line_and_never_empty() -> None:
    error = ValueError("\n while parsing: \n  line 3:  no end.\n")
    assert reason(error) == "while parsing"
    assert reason(error, whole=True) == "while parsing: line 3: no end"
    assert reason(MemoryError()) == reason(MemoryError(), whole=True) == "MemoryError"


def test_nobody_shortens_the_error_of_another_library_in_a_way_of_its_own() -> None:
    package = Path(polyroute.__file__).parent
    own = re.compile(r"str\(error\)\.(strip|split|partition)")
    found = [file.name for file in package.rglob("*.py") if own.search(file.read_text("utf-8"))]
    assert found == ["errors.py"]
