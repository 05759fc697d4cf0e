"""`polyroute serve` in a process of its own."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Server:
    """A running server."""

    process: "subprocess.Popen[bytes]"
    url: str
    log: Path

    def end(self, number: int = signal.SIGINT) -> int:
        """Send a signal; returns what the server exits with."""
        self.process.send_signal(number)
        return self.process.wait(60)


@contextmanager
def serving(log: Path, *arguments: str) -> Iterator[Server]:
    """Serve at a free port; a server that still runs at the end of the block is killed.

    Args:
        log: a file for what it prints.
        *arguments: the run, and any options but the port.
    """
    program = [sys.executable, "-m", "polyroute", "serve", *arguments, "--port", "0"]
    with log.open("wb") as file:
        process = subprocess.Popen(program, stdout=file, stderr=file)
    try:
        found, end = None, time.monotonic() + 120
        while found is None and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
            found = re.search(r"http://\S+:\d+", log.read_text())
        assert found is not None, log.read_text()
        yield Server(process, found[0], log)
    finally:
        process.kill()
        process.wait()
