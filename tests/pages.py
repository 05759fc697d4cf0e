"""Pages of the documentation: run from top to bottom, as a reader would; and the list of layers."""

import re
import shlex
from pathlib import Path
from typing import Any

from polyroute.program.cli.app import main

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"^```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
"""Language, title and text of a block of code."""


def layers() -> list[set[str]]:
    """The modules that the design page lists, line by line; each may import from those below."""
    _, _, text = BLOCK.findall((DOCS / "design.md").read_text(encoding="utf-8"))[0]
    return [set(re.findall(r"\w+", line)) for line in text.splitlines()]


def run_page(page: Path) -> dict[str, Any]:
    """Run the page in the current folder; returns the names that its Python leaves behind.

    Python runs in one namespace, every `polyroute` command of a shell block through the command
    line's own entry, and a block with a title is a file of that name.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    for language, title, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        if title:
            path = Path(title)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        elif language == "python":
            exec(compile(text, page.name, "exec"), names)
        elif language == "sh":
            for line in text.replace("\\\n", " ").splitlines():
                if line.startswith("polyroute "):
                    main(shlex.split(line)[1:])
    return names
