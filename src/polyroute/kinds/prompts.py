"""Prompts of decoder-only models: what precedes an answer, and what goes if it is too long."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from polyroute.data.suite import CHAT, prompt
from polyroute.errors import InputError
from polyroute.kinds.batches import Ids, token_ids

__all__ = [
    "Message",
    "PlainText",
    "Prompter",
    "fitted",
    "joined",
    "prompt_text",
    "rows_of",
    "turns",
]

COLUMNS = ("task", "instruction", "input", *CHAT)
"""The columns of examples that a prompt is made of, or that its errors name."""

Message = Mapping[str, str]
"""One turn of a conversation: its `role` and its `content`."""


def rows_of(examples: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """Examples by column as examples by row, as far as prompts are made of them."""
    names = [name for name in COLUMNS if name in examples]
    columns = zip(*(examples[name] for name in names), strict=True)
    return [dict(zip(names, row, strict=True)) for row in columns]


def turns(example: Mapping[str, Any]) -> list[Message]:
    """The messages of an example up to its answer, without its system message.

    Args:
        example: `instruction`, `input` and, if it has one, `history`, a list of messages.
    """
    user = {"role": "user", "content": prompt(example["instruction"], example["input"])}
    return [*(example.get("history") or []), user]


def joined(system: str | None, messages: Sequence[Message]) -> str:
    """The texts of a conversation, each on lines of its own."""
    parts = [system or "", *(message["content"] for message in messages)]
    return "\n".join(part for part in parts if part)


class Prompter(Protocol):
    """Makes prompts of conversations."""

    tokenizer: PreTrainedTokenizerBase

    def text(self, system: str | None, messages: Sequence[Message]) -> str:
        """The text of a prompt, up to where the answer begins."""

    def ids(self, texts: list[str]) -> list[Ids]:
        """The token ids of such texts."""


class PlainText:
    """Prompts without a chat template: the texts of all turns, each on lines of its own."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def text(self, system: str | None, messages: Sequence[Message]) -> str:
        """See `Prompter`; a newline precedes the answer."""
        return joined(system, messages) + "\n"

    def ids(self, texts: list[str]) -> list[Ids]:
        """See `Prompter`; the end token that some tokenizers add is left out."""
        eos = self.tokenizer.eos_token_id
        whole = token_ids(self.tokenizer, texts, special=True)
        opened = [ids[:-1] if ids[-1:] == [eos] else ids for ids in whole]
        return [ids or [eos] for ids in opened]  # GPT-2 was trained on texts after an end token


def prompt_text(prompter: Prompter, example: Mapping[str, Any]) -> str:
    """The text of an example's prompt.

    Args:
        prompter: makes it.
        example: see `turns`; it may have a `system` message too.
    """
    return prompter.text(example.get("system"), turns(example))


def fitted(prompter: Prompter, example: Mapping[str, Any], room: int, remedy: str) -> Ids:
    """The token ids of a prompt that is too long, cut to `room` tokens.

    The oldest turns of its history go first, then the beginning of its input. Its instruction goes
    only if there is no input, and its system message never goes.

    Args:
        prompter: makes it.
        example: see `prompt_text`.
        room: the most tokens.
        remedy: what helps if that is too few, for the error.

    Raises:
        InputError: what never goes is longer.
    """
    left = dict(example)
    while True:
        ids = prompter.ids([prompt_text(prompter, left)])[0]
        if len(ids) <= room:
            return ids
        name = "input" if left["input"] else "instruction"
        if left.get("history"):
            left["history"] = left["history"][2:]
        elif left[name]:
            left[name] = _without(prompter.tokenizer, left[name], len(ids) - room)
        else:
            raise InputError(
                f"task {example.get('task', '')!r} has a system message or a chat template of more "
                f"than {room} tokens: {remedy}"
            )


def _without(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> str:
    """A text without at least its first `count` tokens."""
    ids = token_ids(tokenizer, [text], special=False)[0]
    shorter = str(tokenizer.decode(ids[count:])).lstrip() if len(ids) > count else ""
    return shorter if len(shorter) < len(text) else text[count:]
