"""Conversations as examples: each turn of the assistant is the target of one of them.

The system prompt stays beside the example in the column `system`, and the turns before the last
user turn in `history`, so that a chat template can be applied later.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from polyroute.errors import InputError, did_you_mean
from polyroute.host.json_text import json_type

__all__ = ["Turn", "examples", "turns_of"]

_SPEAKERS = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_KEYS = (("role", "content"), ("from", "value"))
_OF_TOOLS = {"tool", "function", "function_call", "function_response", "ipython", "observation"}
"""Speakers that are programs, or the calls of them."""
_CALLS = ("tool_calls", "function_call")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_NO_TOOLS = "calls of tools are not read; write the call and its result as text, or remove the row"

_NO_REASONING = (
    "which is not read; write it into the content, in the form that the base model knows, or "
    "remove it"
)


class Turn(NamedTuple):
    """What one speaker says."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str
    is_target: bool = True
    """Whether it is to be learned, if it is the assistant's."""


def turns_of(value: Any, what: str) -> list[Turn]:
    """Read turns, which are given as `{role, content}` or, in the way of ShareGPT, `{from, value}`.

    Args:
        value: the cell of a table.
        what: the beginning of error messages.

    Raises:
        InputError: the value is not a list of turns, a speaker is unknown, or a text is not one.
    """
    if not isinstance(value, list):
        raise InputError(
            f"{what} is {json_type(value)}, not a list of turns; write each turn as "
            '{"role": "user", "content": "..."}'
        )
    return [_turn(each, f"{what}, turn {number}") for number, each in enumerate(value, start=1)]


def _turn(value: Any, what: str) -> Turn:
    if not isinstance(value, Mapping):
        raise InputError(f"{what} is {json_type(value)}; write an object with a role and a content")
    for who, says in _KEYS:
        if who in value and says in value:
            break
    else:
        raise InputError(
            f"{what} has the fields {', '.join(map(repr, value)) or 'of no name'}; give it 'role' "
            "and 'content'"
        )
    role, content = value[who], _joined(value[says], f"{what}: the {says}")
    for field in (*_CALLS, *_REASONING):
        if value.get(field):
            why = f"and {_NO_TOOLS}" if field in _CALLS else _NO_REASONING
            raise InputError(f"{what} has {field!r}, {why}")
    if isinstance(role, str) and role in _OF_TOOLS:
        raise InputError(f"{what} is the {role}'s, and {_NO_TOOLS}")
    if not isinstance(role, str) or role not in _SPEAKERS:
        raise InputError(
            f"{what}: the {who} {role!r} is not known; {did_you_mean(str(role), _SPEAKERS)}"
        )
    if not isinstance(content, str):
        raise InputError(f"{what}: the {says} is {json_type(content)}; write it as one text")
    return Turn(_SPEAKERS[role], content, _is_target(value, what))


def _is_target(turn: Mapping[str, Any], what: str) -> bool:
    """Whether a turn is to be learned, as its `weight` says."""
    weight = turn.get("weight")
    if weight not in (None, 0, 1):
        raise InputError(
            f"{what}: the weight is {weight!r}; give 1 to a turn that is to be learned, else 0"
        )
    return weight != 0


def _joined(content: Any, what: str) -> Any:
    """The text of a content that is a list of parts, one after the other as templates write them.

    Raises:
        InputError: a part is an image, a sound or anything else but text.
    """
    if not isinstance(content, list):
        return content
    for number, part in enumerate(content, start=1):
        is_text = isinstance(part, Mapping) and isinstance(part.get("text"), str)
        if not is_text or part.get("type") not in ("text", None):
            kind = part.get("type") if isinstance(part, Mapping) else json_type(part)
            raise InputError(
                f"{what} has a part {number} of type {kind!r}, and only parts of text are read; "
                "describe it in words, or remove the row"
            )
    return "".join(part["text"] for part in content)


def examples(turns: list[Turn], what: str, *, given: int = 0) -> Iterator[dict[str, Any]]:
    """One example for each turn of the assistant that is to be learned.

    A user turn at the end, which nobody answers, is the target of nothing and is left out.

    Args:
        turns: a conversation; the user and the assistant take turns, after a system prompt if there
            is one.
        what: the beginning of error messages.
        given: how many turns at the beginning are only context.

    Raises:
        InputError: the turns do not alternate, or the assistant never answers.
    """
    has_system = bool(turns) and turns[0].role == "system"
    system = turns[0].content or None if has_system else None
    talk = turns[has_system:]
    answers = 0
    for place, turn in enumerate(talk):
        wanted = "assistant" if place % 2 else "user"
        if turn.role != wanted:
            raise InputError(
                f"{what}, turn {place + has_system + 1} is the {turn.role}'s, but the {wanted} is "
                "next; let user and assistant take turns, after one system prompt at most"
            )
        if wanted == "assistant" and place + has_system >= given:
            answers += 1
            if not turn.is_target:
                continue
            yield {
                "input": talk[place - 1].content,
                "target": turn.content,
                "system": system,
                "history": [
                    {"role": earlier.role, "content": earlier.content}
                    for earlier in talk[: place - 1]
                ]
                or None,
            }
    if not answers:
        raise InputError(f"{what} has no answer of the assistant; add one or remove the row")
