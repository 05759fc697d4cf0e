"""The licences of everything that polyroute installs, as its packages state them.

    python scripts/licences.py [EXTRA ...]

Names of extras add what they need. What states no licence is marked, and makes the script end with
status 1.
"""

import sys
from importlib import metadata

from packaging.requirements import Requirement

UNKNOWN = "not stated"
LONGEST = 60
"""Characters of a licence; some packages paste the whole text into the field."""


def needed(name: str, extras: set[str], found: dict[str, metadata.Distribution]) -> None:
    """Add a distribution, and what it needs, to those that were found, unless it is missing."""
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return
    known = distribution.metadata["Name"].lower().replace("_", "-")
    if known in found:
        return
    found[known] = distribution
    for text in distribution.requires or ():
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            needed(requirement.name, set(requirement.extras), found)


def licence(distribution: metadata.Distribution) -> str:
    """What a distribution says its licence is."""
    fields = distribution.metadata
    stated = fields.get("License-Expression") or ""
    classified = [
        entry.rpartition(" :: ")[2]
        for entry in fields.get_all("Classifier") or ()
        if entry.startswith("License :: ") and entry.count(" :: ") > 1
    ]
    first_line = (fields.get("License") or "").strip().partition("\n")[0]
    return stated or ", ".join(classified) or first_line[:LONGEST] or UNKNOWN


def main() -> int:
    """Print a line for each distribution."""
    found: dict[str, metadata.Distribution] = {}
    needed("polyroute", set(sys.argv[1:]), found)
    lines = {name: licence(distribution) for name, distribution in sorted(found.items())}
    for name, stated in lines.items():
        print(f"{name:30} {found[name].version:18} {stated}")
    return int(UNKNOWN in lines.values())


if __name__ == "__main__":
    raise SystemExit(main())
