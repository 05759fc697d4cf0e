"""A routed encoder inside sentence-transformers: each text is embedded with the skills of its task.

    encoder = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
    model = polyroute.from_pretrained(encoder[0].model, "runs/mhr")
    encoder[0] = RoutedTransformer(encoder[0], model)
    encoder.encode(texts, task="banking")
    encoder.encode([{"text": "hello", "task": "banking"}, {"text": "hello", "task": "greetings"}])
    encoder.save_pretrained("out")
    encoder = SentenceTransformer("out", trust_remote_code=True)

`trust_remote_code` lets sentence-transformers import a module of another package, here polyroute.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from polyroute.build import from_pretrained
from polyroute.errors import InputError
from polyroute.model import RoutedModel

try:
    from sentence_transformers.base.modules import InputModule, Transformer
except ImportError as error:
    raise InputError(
        "sentence-transformers 6 or later is not installed: pip install sentence-transformers"
    ) from error

__all__ = ["RoutedTransformer"]

FOLDER = "inventory"
KINDS_OF_TEXT = ("query", "document")
"""What sentence-transformers itself passes as `task`, in `encode_query` and `encode_document`."""


class RoutedTransformer(InputModule):  # type: ignore[misc, unused-ignore]
    """The first module of a `SentenceTransformer`, with an inventory on its transformer.

    `encode(texts, task="banking")` embeds all texts with one task. A list of
    `{"text": ..., "task": ...}` gives each text its task; `encode` sorts texts by length, so a task
    must travel with its text. Without either, the task of an open `model.route` block applies, if
    it names one task.

    `encode_query`, `encode_document` and the evaluators that call them pass a `task` of their own,
    which is no task of the inventory: give these texts that have tasks, or open a `route` block.
    """

    forward_kwargs = {"task"}  # noqa: RUF012 - the type in the base class

    def __init__(self, transformer: Transformer, model: RoutedModel) -> None:
        if model.base_model is not transformer.model:
            raise InputError(
                "the routed model does not wrap the model of this encoder: attach the inventory to "
                "encoder[0].model, then give encoder[0] and the routed model"
            )
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.transformer = transformer
        self.model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # the tokenizer, the size of an embedding and so on
            if name == "transformer":
                raise
            return getattr(self.transformer, name)

    @property
    def max_seq_length(self) -> int | None:
        """The most tokens of a text."""
        return self.transformer.max_seq_length  # type: ignore[no-any-return, unused-ignore]

    @max_seq_length.setter
    def max_seq_length(self, value: int | None) -> None:
        self.transformer.max_seq_length = value

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Tokenise texts; tasks that come with the texts are returned as `tasks`.

        Raises:
            InputError: some texts of a batch have a task and others have none.
        """
        kwargs.pop("task", None)  # `forward` gets it, too
        tasks = [text["task"] for text in inputs if isinstance(text, Mapping) and "task" in text]
        texts = [text["text"] for text in inputs] if len(tasks) == len(inputs) else inputs
        if 0 < len(tasks) < len(inputs):
            raise InputError("some texts have a task and others have none: give all of them one")
        features = self.transformer.preprocess(texts, prompt=prompt, **kwargs)
        return {**features, "tasks": tasks} if tasks else dict(features)

    def forward(
        self, features: dict[str, Any], task: str | int | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Embed tokens with their tasks.

        Raises:
            InputError: a text has no task, two tasks or an unknown task, a route block with one
                task per example is open, or `task` may mean a task or a kind of text.
        """
        tasks = features.pop("tasks", None)
        block = self.model.open_routes.now()
        route = None if block is None else block.value
        if task in KINDS_OF_TEXT:
            if tasks is None and route is None and task in self.model.tasks:
                raise InputError(
                    f"task={task!r} is a kind of text in sentence-transformers, and a task of this "
                    "inventory, too: open a model.route block, or give "
                    "{'text': ..., 'task': ...} for each text"
                )
            task = None
        if tasks is not None and task is not None:
            raise InputError(f"these texts have their own tasks: leave out task={task!r}")
        if tasks is None and task is None and route is not None and route.per_example:
            raise InputError(
                "encode() sorts texts by length, so the tasks of the open route block would go to "
                "other texts: give {'text': ..., 'task': ...} for each text"
            )
        chosen = task if tasks is None else tasks
        with nullcontext() if chosen is None else self.model.route(chosen):
            return dict(self.transformer(features, **kwargs))

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write the transformer, and the inventory into a folder inside it."""
        self.transformer.save(output_path, *args, **kwargs)
        self.model.save_pretrained(Path(output_path) / FOLDER)

    @classmethod
    def load(  # type: ignore[override, unused-ignore]
        cls, model_name_or_path: str, subfolder: str = "", **kwargs: Any
    ) -> "RoutedTransformer":
        """Read what `save` wrote.

        Raises:
            InputError: there is no inventory, or it does not fit the transformer.
        """
        transformer = Transformer.load(model_name_or_path, subfolder=subfolder, **kwargs)
        names = {"token", "cache_folder", "revision", "local_files_only"} & kwargs.keys()
        where = {name: kwargs[name] for name in names}
        folder = cls.load_dir_path(model_name_or_path, str(Path(subfolder) / FOLDER), **where)
        if folder is None:
            raise InputError(f"{model_name_or_path} has no folder {FOLDER!r}: save it again")
        return cls(transformer, from_pretrained(transformer.model, folder))
