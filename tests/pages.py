"""Pages of the documentation: run from top to bottom, as a reader would; and the list of layers."""

import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

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
                    port = servers.enter_context(_serving(shlex.split(line)[1:]))
                elif line.startswith("polyroute "):
                    main(shlex.split(line)[1:])
    return names


@contextmanager
def _serving(arguments: list[str]) -> Iterator[str]:
    """A server in a process of its own, at a free port, which is returned."""
    arguments = ["0" if one == PORT else one for one in arguments]
    log = Path("serve.log")
    with log.open("wb") as file:
        program = [sys.executable, "-m", "polyroute", *arguments]
        process = subprocess.Popen(program, stdout=file, stderr=file)
    try:
        found, end = None, time.monotonic() + 120
        while found is None and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
            found = re.search(r"http://\S+:(\d+)", log.read_text())
        assert found is not None, log.read_text()
        yield found[1]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
