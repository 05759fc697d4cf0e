"""Chat templates: how an instruct model is prompted, and which tokens are the assistant's answer.

A prompt is what a chat server would send: the messages, rendered by the tokenizer's own template,
up to where the assistant begins. An answer is what the template makes of the assistant's message,
its end-of-turn token included; what follows that token belongs to the next turn.
"""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from polyroute.data.suite import prompt
from polyroute.errors import InputError, did_you_mean
from polyroute.kinds.batches import Ids

__all__ = ["PROMPTS", "ChatTemplate", "template_of"]

Message = dict[str, str]

PROMPTS = ("auto", "chat", "plain")
"""How a base model is prompted: `chat` by its template, `plain` by the text alone; `auto` is chat
if the tokenizer has a template."""
PROBE: Message = {"role": "user", "content": "?"}


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: a tokenizer that has one.
        system: the system message of every prompt that has none of its own. By default there is
            none, and some templates then write their own.

    Raises:
        InputError: the tokenizer has no template, or the template cannot render a short chat.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise InputError("the tokenizer has no chat template: use prompt='plain'")
        self.tokenizer = tokenizer
        self.system = system
        self._before = self._ids([self._render([*self._opening(None), PROBE])])[0]
        # Computed at once: a kind must not change, or `datasets` would not find what it cached.
        self.end = self.answer_ids(["?"])[0][-1]

    def prompt_ids(self, example: dict[str, Any], room: int) -> Ids:
        """The token ids of a prompt, of `room` tokens at most.

        If it is too long, the oldest turns of its history go first, then the beginning of its
        input; its instruction goes only where there is no input.

        Args:
            example: `instruction`, `input` and, if it has them, `system` and `history` (a list of
                messages).
            room: the most tokens.

        Raises:
            InputError: the system message alone is longer.
        """
        history = list(example.get("history") or [])
        instruction, text = example["instruction"], example["input"]
        if not text:
            instruction, text = "", instruction
        opening = self._opening(example.get("system"))
        while True:
            user = {"role": "user", "content": prompt(instruction, text)}
            ids = self._ids([self._render([*opening, *history, user])])[0]
            if len(ids) <= room:
                return ids
            if history:
                del history[: 2 if len(history) > 1 else 1]
            elif text:
                text = self._without(text, len(ids) - room)
            elif instruction:
                instruction, text = "", instruction
            else:
                raise InputError(
                    f"a system message and the chat template take more than {room} tokens: raise "
                    "max_input"
                )

    def answer_ids(self, texts: Sequence[str]) -> list[Ids]:
        """The token ids of answers, each through its end-of-turn token."""
        answers = [{"role": "assistant", "content": text} for text in texts]
        chats = [self._render([*self._opening(None), PROBE, one], ended=True) for one in answers]
        return [self._answer(ids, text) for ids, text in zip(self._ids(chats), chats, strict=True)]

    def _answer(self, ids: Ids, chat: str) -> Ids:
        """What follows the prompt in a chat, through the last special token."""
        count = len(self._before)
        if ids[:count] == self._before:
            ids = ids[count:]
        else:  # the tokenizer merges the end of the prompt with the answer, where no server would
            whole = self._render([*self._opening(None), PROBE])
            ids = self._ids([chat[len(whole) :]])[0]
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        last = max((place for place, one in enumerate(ids) if one in special), default=None)
        return [*ids, self.tokenizer.eos_token_id] if last is None else ids[: last + 1]

    def _opening(self, system: str | None) -> list[Message]:
        text = system if system is not None else self.system
        return [] if text is None else [{"role": "system", "content": text}]

    def _render(self, messages: list[Message], *, ended: bool = False) -> str:
        """The text of a chat, up to where the assistant begins unless it is `ended`."""
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=not ended
            )
        except Exception as error:  # a template is a program: it can raise anything
            reason = " ".join(str(error).split())
            raise InputError(
                f"the chat template cannot render an example ({reason}): use prompt='plain'"
            ) from error
        return str(text)

    def _ids(self, texts: list[str]) -> list[Ids]:
        encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)
        ids: list[Ids] = encoded["input_ids"]
        return ids

    def _without(self, text: str, count: int) -> str:
        """A text without at least its first `count` tokens."""
        kept = self._ids([text])[0][count:]
        shorter = str(self.tokenizer.decode(kept)).lstrip() if kept else ""
        return shorter if len(shorter) < len(text) else text[count:]


def template_of(
    wanted: "str | ChatTemplate", tokenizer: PreTrainedTokenizerBase
) -> ChatTemplate | None:
    """The template that a base model is prompted by; None for plain text.

    Args:
        wanted: one of `PROMPTS`, or a template.
        tokenizer: the base model's tokenizer.

    Raises:
        InputError: there is no such way, or `chat` is asked of a tokenizer without a template.
    """
    if isinstance(wanted, ChatTemplate):
        return wanted
    if wanted not in PROMPTS:
        raise InputError(f"unknown prompt {wanted!r}: {did_you_mean(str(wanted), PROMPTS)}")
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if wanted == "plain" or (wanted == "auto" and not has_template):
        return None
    return ChatTemplate(tokenizer)
