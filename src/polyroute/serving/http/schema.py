"""What clients may send. Whatever is not understood is refused by name, never ignored."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from polyroute.errors import InputError
from polyroute.serving.http.errors import shown

__all__ = [
    "ChatAsked",
    "CompletionAsked",
    "EmbeddingAsked",
    "Message",
    "RowAsked",
    "Sampled",
    "TaskAsked",
]

MOST = 2**31 - 1
"""Of numbers of tokens, and of a token's own number."""
SEEDS = 2**63
STOPS = 16
LARGEST = 3e38
"""A row has numbers of fp32."""


class _Asked(BaseModel):
    """What a client sends as JSON; null is the same as leaving a field out."""

    model_config = ConfigDict(extra="forbid", strict=True)
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Options that OpenAI's interface has and this server has not, with the values that ask for
    nothing, which some clients always send.
    """
    notes: ClassVar[frozenset[str]] = frozenset()
    """What does not change the answer."""

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_for_nothing(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        known = {*cls.model_fields, *cls.unsupported, *cls.notes}
        kept = {}
        for name, value in given.items():
            if name in cls.notes or (value is None and name in known):
                continue
            if name not in cls.unsupported:
                kept[name] = value
            elif value not in cls.unsupported[name]:
                raise InputError(f"this server does not have the option {name}; leave it out")
        return kept


class StreamOptions(_Asked):
    """What a stream tells besides."""

    unsupported = {"include_obfuscation": (False,)}
    include_usage: bool = False


def _stops(given: Any) -> Any:
    """One text or several; an empty one ends nothing."""
    texts = [given] if isinstance(given, str) else given
    return [text for text in texts if text != ""] if isinstance(texts, list) else texts


class Sampled(_Asked):
    """What completions and chats have in common."""

    notes = frozenset({"user", "safety_identifier", "prompt_cache_key"})
    model: str
    max_tokens: int | None = Field(None, ge=0, le=MOST)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1, le=MOST)
    seed: int | None = Field(None, ge=-SEEDS, lt=SEEDS)
    stop: Annotated[list[str], BeforeValidator(_stops)] = Field([], max_length=STOPS)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _streams(self) -> "Sampled":
        if self.stream_options is not None and not self.stream:
            raise InputError("stream_options are of a stream; set stream, or leave them out")
        return self

    @property
    def tells_usage(self) -> bool:
        """Whether the last chunk of the stream counts tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


PENALTIES: Mapping[str, tuple[Any, ...]] = {
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
}


def _prompts(given: Any) -> Any:
    """One prompt or several, each a text or tokens."""
    prompts = [given] if isinstance(given, str) or _are_tokens(given) else given
    is_list = isinstance(prompts, list) and bool(prompts)
    if is_list and all(isinstance(prompt, str) or _are_tokens(prompt) for prompt in prompts):
        return prompts
    raise InputError(
        "prompt must be a text, a list of texts, a list of tokens, or a list of such lists; a "
        "token is its number in the vocabulary"
    )


def _are_tokens(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(
        type(token) is int and 0 <= token <= MOST for token in given
    )  # fmt: skip


class CompletionAsked(Sampled):
    """The body of POST /v1/completions."""

    unsupported = {**PENALTIES, "best_of": (1,), "suffix": ("",)}
    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts)]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False


def _joined(given: Any) -> Any:
    """The text of a message, which may come in parts."""
    if not isinstance(given, list):
        return given
    for part in given:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise InputError(
                'content must be a text, or a list of parts {"type": "text", "text": ...}'
                + (f"; parts of type {shown(kind)} are not read" if isinstance(kind, str) else "")
            )
    return "".join(part["text"] for part in given)


class Message(_Asked):
    """One message of a conversation. Answers of OpenAI's clients can be sent back as they are."""

    unsupported = {
        "name": (), "refusal": (), "audio": (), "function_call": (), "tool_calls": ([],),
        "annotations": ([],),
    }  # fmt: skip
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_joined)]


class ChatAsked(Sampled):
    """The body of POST /v1/chat/completions."""

    unsupported = {
        **PENALTIES, "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
        "function_call": ("none", "auto"), "response_format": ({"type": "text"},),
        "modalities": (["text"],), "audio": (), "prediction": (), "reasoning_effort": ("none",),
        "verbosity": (), "web_search_options": (), "store": (False,), "metadata": ({},),
        "service_tier": ("auto", "default"), "moderation": (), "prompt_cache_options": (),
        "prompt_cache_retention": (),
    }  # fmt: skip
    notes = Sampled.notes | {"parallel_tool_calls"}
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=MOST)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _agrees(self) -> "ChatAsked":
        if self.top_logprobs is not None and not self.logprobs:
            raise InputError("top_logprobs are of logprobs; set logprobs, or leave them out")
        if self.max_tokens == 0:
            raise InputError("max_tokens must be at least 1 in a chat")
        wanted = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(wanted) > 1:
            raise InputError(
                "max_tokens and max_completion_tokens are the same; leave one of them out"
            )
        return self

    @property
    def most(self) -> int | None:
        """The most tokens of an answer, if that was given."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def _texts(given: Any) -> Any:
    """One text or several."""
    texts = [given] if isinstance(given, str) else given
    if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
        return texts
    raise InputError("input must be a text or a list of texts; tokens are not read here")


class EmbeddingAsked(_Asked):
    """The body of POST /v1/embeddings."""

    unsupported = {"dimensions": ()}
    notes = frozenset({"user"})
    model: str
    input: Annotated[list[str], BeforeValidator(_texts)] = Field(max_length=2048)
    encoding_format: Literal["float", "base64"] = "float"


class TaskAsked(_Asked):
    """The body of POST /v1/tasks; further fields are settings of adaptation, which it checks."""

    model_config = ConfigDict(extra="allow")
    name: str
    examples: list[dict[str, Any]] = Field(min_length=1)


class RowAsked(_Asked):
    """The body of PUT /v1/tasks/NAME."""

    row: list[list[list[Annotated[float, Field(ge=-LARGEST, le=LARGEST)]]]] = Field(min_length=1)
