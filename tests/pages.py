"""Pages of the documentation: run from top to bottom, as a reader would; and the list of layers."""

import re
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from serving_process import serving

from polyroute.program.cli.app import main

PORT = "8000"
"""Of servers on the pages; tests take a free one in its place."""
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
    line's own entry, `polyroute serve` in a process of its own, and a block with a title is a file
    of that name.
    """
    with ExitStack() as servers:
        return _run(BLOCK.findall(page.read_text(encoding="utf-8")), page.name, servers)


def _run(blocks: list[tuple[str, str, str]], name: str, servers: ExitStack) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "__main__"}
    port = PORT
    for language, title, shown in blocks:
        text = shown.replace(PORT, port)
        if title:
            path = Path(title)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        elif language == "python":
            exec(compile(text, name, "exec"), names)
        elif language == "sh":
            for line in text.replace("\\\n", " ").splitlines():
                if line.startswith("polyroute serve "):
                    arguments = shlex.split(line.replace(f"--port {port}", ""))[2:]
                    port = servers.enter_context(_served(arguments))
                elif line.startswith("polyroute "):
                    main(shlex.split(line)[1:])
    return names


@contextmanager
def _served(arguments: list[str]) -> Iterator[str]:
    """Serve in a process of its own, at a free port, which is returned; it must end well."""
    with serving(Path("serve.log"), *arguments) as server:
        yield server.url.rsplit(":", 1)[1]
        assert server.end() == 0, server.log.read_text()
