"""What the HTTP interface asks of the model behind it."""

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

from polyroute.serving.requests import Generation, Piece

__all__ = ["Service"]


class Service(Protocol):
    """The models that are served: a run's tasks, the average of its inventory, and the base.

    Attributes:
        name: of the run.
        writes: whether the base model writes text; an encoder only embeds it.
        has_chat: whether the tokenizer has a chat template.
        has_rows: whether tasks have rows, which can be looked at.
        can_learn: whether clients can add and remove tasks.
        max_length: the most tokens of a prompt and its answer together.
        most_requests: the most answers that are computed or wait at once.
    """

    name: str
    writes: bool
    has_chat: bool
    has_rows: bool
    can_learn: bool
    max_length: int
    most_requests: int

    def load(self) -> Mapping[str, float]:
        """Gauges for /metrics by name, such as how many requests run and how many wait."""

    def is_healthy(self) -> bool:
        """Whether requests are being answered."""

    def task_names(self, prefix: str = "") -> Sequence[str]:
        """The tasks that begin with a prefix, without `mu` and `base`; called from any thread."""

    def has_task(self, name: str) -> bool:
        """Whether a name can be asked for; `mu` and `base` are names too."""

    def prompt_ids(self, text: str) -> list[int]:
        """The tokens of a prompt. It is called from another thread, one call at a time."""

    def chat_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The tokens of a conversation. It is called from another thread, one call at a time.

        Raises:
            InputError: the template refuses the messages.
        """

    def answer(self, generation: Generation) -> AsyncIterator[Piece]:
        """An async generator of one answer; see `serving.text_engine.TextEngine.answer`."""

    async def embed(self, task: str, texts: Sequence[str]) -> tuple[list[list[float]], int]:
        """A vector for each text, and how many tokens they have together.

        Raises:
            InputError: the model makes no vectors, or a text is too long.
        """

    def row(self, name: str) -> list[Any]:
        """The row `[N, H, K]` of a task, as nested lists.

        Raises:
            InputError: the task has none.
        """

    def weights(self, name: str) -> tuple[list[Any], Sequence[str]]:
        """The weights `[N, H, K]` of a task, as nested lists, and the names of the N routers.

        Raises:
            InputError: the task has no row.
        """

    async def put_row(self, name: str, row: list[Any]) -> bool:
        """Give a task a row; returns whether the task is new.

        Raises:
            InputError: the name or the row cannot be used.
        """

    async def delete(self, name: str) -> None:
        """Remove a task.

        Raises:
            InputError: the task does not exist.
        """

    async def nearest(self, name: str, k: int, prefix: str = "") -> list[tuple[str, float]]:
        """The `k` tasks with the most similar routes, nearest first, with their similarity.

        Args:
            name: of the task.
            k: how many.
            prefix: what the names of those that are ranked begin with.

        Raises:
            InputError: the task does not exist or has no row.
        """

    async def learn(
        self, name: str, examples: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Start to learn a task from examples; returns the job, as `job` does.

        Raises:
            InputError: an example or a setting cannot be used.
            BusyError: too many jobs wait.
        """

    def job(self, name: str) -> Mapping[str, Any] | None:
        """How the learning of a task goes, as JSON values; None if it was not learned here."""

    async def export(self, name: str) -> bytes:
        """A zip file of a task as a folder for PEFT.

        Raises:
            InputError: the task cannot be exported.
        """
