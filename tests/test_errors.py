import string

import pytest

from polyroute.errors import did_you_mean


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
