"""All that a server does, without HTTP: answers, embeddings, and tasks that come and go."""

import asyncio
import io
import tempfile
import time
import zipfile
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from polyroute.build import from_pretrained
from polyroute.errors import InputError
from polyroute.kinds.causal import CausalKind
from polyroute.kinds.chat import ChatTemplate
from polyroute.kinds.choose import ModelKind
from polyroute.kinds.encoder import EncoderKind
from polyroute.model import RoutedModel
from polyroute.saved.peft_card import write_peft_card
from polyroute.saved.rows import read_description
from polyroute.saved.runs import read_run
from polyroute.serving.answers import Limits
from polyroute.serving.batched import BatchedEngine
from polyroute.serving.continuous import ContinuousEngine
from polyroute.serving.embeddings import EmbeddingEngine
from polyroute.serving.learning import Learner
from polyroute.serving.places import Places, place_names
from polyroute.serving.requests import BASE, SHARED, Generation, Piece, check_characters
from polyroute.serving.shared_weights import shared_weights
from polyroute.serving.tasks import SavedTasks, row_of

__all__ = ["ModelService", "ServedRun", "make_service"]

WINDOW = 5.0
"""Seconds whose tokens make the rate that `load` tells."""
Engine = ContinuousEngine | BatchedEngine | EmbeddingEngine


@dataclass(frozen=True, kw_only=True)
class ServedRun:
    """What is served.

    Attributes:
        name: what clients are told that the run is called.
        run: its folder.
        tasks_dir: where tasks of clients are kept; None if they can add none.
        limits: of what is taken.
    """

    name: str
    run: Path
    tasks_dir: Path | None
    limits: Limits


def make_service(served: ServedRun, base: Any, kind: ModelKind) -> "ModelService":
    """Load all that a server needs.

    Args:
        served: what is served.
        base: the base model, without an inventory.
        kind: how it reads and answers.

    Raises:
        InputError: the run cannot be served in this way.
    """
    has_rows = read_description(served.run).get("rows") is not None
    if not has_rows and served.tasks_dir is not None:
        raise InputError(
            f"the tasks of {served.run} have no rows, so clients can add none: leave out "
            "--tasks-dir"
        )
    tasks = SavedTasks(served.run, served.tasks_dir) if has_rows else None
    learned = None
    if served.tasks_dir is not None:
        learned = from_pretrained(shared_weights(base), served.run, tasks=[]).eval()
    model = from_pretrained(base, served.run, tasks=[] if has_rows else None).eval()
    if has_rows:
        model.add_tasks(place_names(served.limits.most_requests))
    model.requires_grad_(False)
    places = Places(model, tasks)
    engine: Engine
    if isinstance(kind, EncoderKind):
        engine = EmbeddingEngine(model, kind, places, served.limits)
    elif isinstance(kind, CausalKind) and model.rule.is_fixed:
        engine = ContinuousEngine(model, kind, places, served.limits)
    else:
        engine = BatchedEngine(model, kind, places, served.limits)
    return ModelService(served, engine, kind, tasks, learned)


class ModelService:
    """What the HTTP interface asks; see `polyroute.serving.http.service.Service`."""

    def __init__(
        self,
        served: ServedRun,
        engine: Engine,
        kind: ModelKind,
        tasks: SavedTasks | None,
        learned: RoutedModel | None,
    ) -> None:
        self.served, self.engine, self.kind = served, engine, kind
        self.tasks = tasks
        self.learner = None
        if learned is not None and tasks is not None:
            self.learner = Learner(learned, kind, tasks.__contains__, self._keep)
        self.model: RoutedModel = engine.model
        self.name = served.name
        self.writes = not isinstance(engine, EmbeddingEngine)
        self.can_learn = self.learner is not None
        self.max_length = served.limits.most_tokens
        self.most_requests = served.limits.most_requests
        self.has_chat = self.writes and self._template is not None
        self.has_rows = tasks is not None
        self._rate = _TokenRate()

    @property
    def _template(self) -> ChatTemplate | None:
        return self.kind.template if isinstance(self.kind, CausalKind) else None

    async def start(self) -> None:
        """Begin to answer, once a first answer has made all that later ones need."""
        self.engine.start()
        if self.learner is not None:
            self.learner.start()
        if isinstance(self.engine, EmbeddingEngine):
            await self.engine.embed(BASE, ["."])
        else:
            first = Generation(task=BASE, prompt_ids=self.prompt_ids("."), max_tokens=1)
            async for _ in self.engine.answer(first):
                pass

    def stop(self) -> None:
        """End everything, and wait until no forward runs."""
        if self.learner is not None:
            self.learner.stop()
        self.engine.stop()
        if self.tasks is not None:
            self.tasks.close()

    def is_healthy(self) -> bool:
        """Whether it answers."""
        return self.engine.is_alive

    def load(self) -> Mapping[str, float]:
        """Numbers that say how busy it is."""
        learning = 0 if self.learner is None else len(self.learner)
        return {
            **self.engine.load(),
            "rows_in_memory": len(self.engine.places),
            "tasks_waiting": learning,
            "tokens_per_second": round(self._rate.now(), 1),
        }

    # ---------------------------------------------------------------- tasks

    def task_names(self, prefix: str = "") -> Sequence[str]:
        """The tasks whose names begin so, without `mu` and `base`."""
        if self.tasks is not None:
            return self.tasks.names(prefix)
        return sorted(name for name in self.model.tasks if name.startswith(prefix))

    def has_task(self, name: str) -> bool:
        """Whether it answers as this task."""
        return name in SHARED or name in (self.model.routes if self.tasks is None else self.tasks)

    def row(self, name: str) -> list[Any]:
        """The logits of a task, nested `[N][H][K]`.

        Raises:
            InputError: there is no such task, or it has no row.
        """
        row: list[Any] = self._saved.read(name).tolist()
        return row

    def weights(self, name: str) -> tuple[list[Any], list[str]]:
        """The weights by which a task mixes skills, nested `[N][H][K]`, and the routers' names.

        Raises:
            InputError: there is no such task, or it has no row.
        """
        row = self._saved.read(name).unsqueeze(0)
        weights: list[Any] = self.model.mixer.weights_from(row)[0].tolist()
        return weights, self.model.routers

    async def put_row(self, name: str, row: list[Any]) -> bool:
        """Write the row of a client's task; returns whether the task is new.

        Raises:
            InputError: the name is taken, or it is no row.
        """
        tasks = self._saved
        return await asyncio.to_thread(self._put, name, row_of(row, tasks.run.shape))

    def _put(self, name: str, row: Tensor) -> bool:
        with self._while_idle(name):
            return self._keep(name, row)

    def _keep(self, name: str, row: Tensor) -> bool:
        is_new = self._saved.put(name, row)
        self.engine.places.forget(name)
        return is_new

    async def delete(self, name: str) -> None:
        """Remove a client's task.

        Raises:
            InputError: there is no such task, the run has it, or it is being learned.
        """
        await asyncio.to_thread(self._delete, name)

    def _delete(self, name: str) -> None:
        with self._while_idle(name):
            self._saved.delete(name)
        self.engine.places.forget(name)
        if self.learner is not None:
            self.learner.forget(name)

    async def nearest(self, name: str, k: int, prefix: str = "") -> list[tuple[str, float]]:
        """The tasks that mix skills most like one, of those whose names begin so.

        Raises:
            InputError: there is no such task.
        """
        config = self.model.adapter_config
        return await asyncio.to_thread(self._saved.nearest, name, k, config, prefix)

    async def learn(
        self, name: str, examples: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Have a new task learned in the background.

        Raises:
            InputError: the name is taken, or an example or a setting cannot be used.
            BusyError: too many tasks wait.
        """
        self._saved.check_new(name)
        assert self.learner is not None
        return (await asyncio.to_thread(self.learner.ask, name, examples, settings)).to_dict()

    def job(self, name: str) -> Mapping[str, Any] | None:
        """What is known of a task that was asked for."""
        job = None if self.learner is None else self.learner.job(name)
        return None if job is None else job.to_dict()

    async def export(self, name: str) -> bytes:
        """A task as a LoRA of PEFT, in a zip file.

        Raises:
            InputError: there is no such task, or it is the base model.
        """
        return await asyncio.to_thread(self._exported, name)

    def _exported(self, name: str) -> bytes:
        if name == BASE:
            raise InputError("the base model alone is no LoRA: name a task")
        held = self.engine.places.hold(name)
        try:
            route = held.route
            assert route is not None  # as that of the base model is
            route = route if isinstance(route, str) else self.model.tasks[route]
            with tempfile.TemporaryDirectory() as folder:
                self.model.export_peft(route, folder)
                config = read_run(self.served.run)["config"]
                write_peft_card(folder, self.kind.prompting, config)
                found = io.BytesIO()
                with zipfile.ZipFile(found, "w") as archive:
                    for path in sorted(Path(folder).iterdir()):
                        archive.write(path, path.name)
        finally:
            held.release()
        return found.getvalue()

    @property
    def _saved(self) -> SavedTasks:
        if self.tasks is None:
            raise InputError("the tasks of this run have no rows")
        return self.tasks

    def _while_idle(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if self.learner is None else self.learner.while_idle(name)

    # ---------------------------------------------------------------- answers

    def prompt_ids(self, text: str) -> list[int]:
        """The tokens of a prompt that is given as text.

        Raises:
            InputError: it is too long, whatever its tokens are.
        """
        check_characters("the prompt", len(text), self.max_length)
        return self.kind.text_ids([text])[0]

    def chat_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The tokens of a conversation, up to where the assistant answers.

        Raises:
            InputError: the model has no chat template, or it cannot render the conversation, or
                that is too long.
        """
        template = self._template
        if template is None:
            raise InputError("this model has no chat template: use /v1/completions")
        characters = sum(len(message["content"]) for message in messages)
        check_characters("the conversation", characters, self.max_length)
        said = list(messages)
        system = said.pop(0)["content"] if said and said[0]["role"] == "system" else None
        return template.ids([template.text(system, said)])[0]

    async def answer(self, generation: Generation) -> AsyncGenerator[Piece]:
        """See `TextEngine.answer`."""
        if isinstance(self.engine, EmbeddingEngine):
            raise InputError("this model writes no text: use /v1/embeddings")
        async with aclosing(self.engine.answer(generation)) as pieces:
            async for piece in pieces:
                if not piece.is_prompt:
                    self._rate.add(len(piece.tokens))
                yield piece

    async def embed(self, task: str, texts: Sequence[str]) -> tuple[list[list[float]], int]:
        """The vectors of texts, and the number of their tokens.

        Raises:
            InputError: the model is no encoder, the task does not exist, or a text is too long.
        """
        if not isinstance(self.engine, EmbeddingEngine):
            raise InputError("this model gives no embeddings: use /v1/completions")
        return await self.engine.embed(task, texts)


class _TokenRate:
    """How many tokens a second were told of late."""

    def __init__(self) -> None:
        self._told: deque[tuple[float, int]] = deque()
        """The time and the number of tokens of each piece of the last `WINDOW` seconds."""

    def add(self, count: int) -> None:
        self._told.append((time.monotonic(), count))
        self._forget()

    def now(self) -> float:
        self._forget()
        return sum(count for _, count in self._told) / WINDOW

    def _forget(self) -> None:
        since = time.monotonic() - WINDOW
        while self._told and self._told[0][0] < since:
            self._told.popleft()
