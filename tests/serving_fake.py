"""A service without a model and a server of it, for the tests of the HTTP interface."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from math import exp
from typing import Any

import uvicorn

from polyroute.errors import InputError
from polyroute.serving.http.app import make_app
from polyroute.serving.http.settings import HttpSettings
from polyroute.serving.requests import BusyError, Generation, Piece, Token

LIMIT = 64


class FakeService:
    """Reads a letter as a token, and answers with the words of the task's name and the prompt.

    A prompt that begins with `!` asks for trouble: `!busy`, `!hang`, `!break`, `!late`.
    """

    name = "run-7"

    def __init__(self, tasks: Sequence[str] = ("amber", "cedar")) -> None:
        self.writes = self.has_chat = self.has_rows = self.can_learn = self.healthy = True
        self.max_length = LIMIT
        self.most_requests = 1000
        self.rows: dict[str, list[Any]] = {name: [[[0.5]]] for name in tasks}
        self.jobs: dict[str, dict[str, Any]] = {}
        self.asked: list[Generation] = []
        self.started = 0
        self.closed = 0
        self.errors: dict[str, Exception] = {}
        self.delay = 0.0

    def load(self) -> Mapping[str, float]:
        return {"running": self.started - self.closed, "waiting": 3.0}

    def is_healthy(self) -> bool:
        return self.healthy

    def task_names(self, prefix: str = "") -> list[str]:
        return [name for name in self.rows if name.startswith(prefix)]

    def has_task(self, name: str) -> bool:
        return name in ("mu", "base") or name in self.rows

    def prompt_ids(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def chat_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        if messages[-1]["role"] == "assistant":
            raise InputError("the template wants a user's message last")
        return self.prompt_ids("|".join(f"{m['role'][0]}:{m['content']}" for m in messages))

    async def answer(self, generation: Generation) -> AsyncIterator[Piece]:
        self.asked.append(generation)
        self.started += 1
        prompt = "".join(map(chr, generation.prompt_ids))
        try:
            for trouble, error in self.errors.items():
                if prompt.startswith(trouble):
                    raise error
            if prompt.startswith("!busy"):
                raise BusyError
            if generation.echo:
                told = [Token(ord(p), p, None if i == 0 else -1.0) for i, p in enumerate(prompt)]
                yield Piece(prompt, told, is_prompt=True)
            words = [f"{generation.task}", " says", f" {len(prompt)}", " é"]
            for i, word in enumerate(words[: generation.max_tokens]):
                is_last = i + 1 in (len(words), generation.max_tokens)
                if prompt.startswith("!hang") or (prompt.startswith("!late") and i == 1):
                    await asyncio.sleep(60)
                if prompt.startswith("!break") and i == 2:
                    raise ValueError("secret detail")
                await asyncio.sleep(self.delay)
                top = [(word, -0.5), (" other", float("-inf"))][: generation.top_logprobs or 0]
                finish = ("stop" if i + 1 == len(words) else "length") if is_last else None
                yield Piece(word, [Token(i, word, -0.5, top)], finish)
            if generation.max_tokens == 0:
                yield Piece("", finish="length")
        finally:
            self.closed += 1

    async def embed(self, task: str, texts: Sequence[str]) -> tuple[list[list[float]], int]:
        if texts[0] == "!hang":
            try:
                await asyncio.sleep(60)
            finally:
                self.closed += 1
        return [[0.5, float(len(text))] for text in texts], sum(map(len, texts))

    def row(self, name: str) -> list[Any]:
        if name not in self.rows:
            raise InputError(f"{name!r} has no row; ask for a task")
        return self.rows[name]

    def weights(self, name: str) -> tuple[list[Any], list[str]]:
        row = self.row(name)
        gates = [[[1 / (1 + exp(-z)) for z in head] for head in router] for router in row]
        weights = [[[gate / sum(head) for gate in head] for head in of] for of in gates]
        return weights, [f"router {n + 1}" for n in range(len(row))]

    async def put_row(self, name: str, row: list[Any]) -> bool:
        if len(row) != 1:
            raise InputError(f"the row of {name!r} has {len(row)} layers, not 1")
        is_new = name not in self.rows
        self.rows[name] = row
        return is_new

    async def delete(self, name: str) -> None:
        del self.rows[name]

    async def nearest(self, name: str, k: int, prefix: str = "") -> list[tuple[str, float]]:
        return [(other, 0.9) for other in self.task_names(prefix) if other != name][:k]

    async def learn(
        self, name: str, examples: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        if "input" not in examples[0]:
            raise InputError(f"example 1 of {name!r} has no input")
        if len(self.jobs) == 2:
            raise BusyError("two tasks are being learnt; ask again later")
        self.jobs[name] = {"name": name, "status": "waiting", "error": None, "given": settings}
        return self.jobs[name]

    def job(self, name: str) -> Mapping[str, Any] | None:
        return self.jobs.get(name)

    async def export(self, name: str) -> bytes:
        return b"PK" + name.encode()


class Served:
    """A server of a service, on a free port."""

    def __init__(self, service: FakeService, settings: HttpSettings | None = None) -> None:
        self.service: Any = service
        app = make_app(service, settings or HttpSettings())
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
        self.thread = threading.Thread(target=self.server.run)

    def __enter__(self) -> "Served":
        self.thread.start()
        wait_until(lambda: self.server.started)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        assert not self.thread.is_alive()


def wait_until(is_so: Callable[[], bool], seconds: float = 10.0) -> float:
    """How long it took."""
    began = time.monotonic()
    while not is_so():
        assert time.monotonic() - began < seconds, "it never came to be"
        time.sleep(0.005)
    return time.monotonic() - began
