"""Print what pyproject.toml says that polyroute needs, for pip.

    python scripts/dependencies.py [EXTRA ...]

pip compares hashes only of what comes as files, which the project's own folder is not, so `make`
installs these, with the hashes of constraints.txt, and then polyroute without dependencies.
"""

import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
OWN = "polyroute["
"""Begins a requirement of an extra that names other extras."""


def needed(extras: list[str]) -> list[str]:
    """The requirements of polyroute itself and of extras, with those that extras name."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    found = list(project["dependencies"])
    left = list(extras)
    while left:
        for requirement in project["optional-dependencies"][left.pop()]:
            if requirement.startswith(OWN):
                left += requirement.removeprefix(OWN).rstrip("]").split(",")
            else:
                found.append(requirement)
    return found


if __name__ == "__main__":
    print("\n".join(needed(sys.argv[1:])))
