"""Chat templates: how an instruct model is prompted, and which tokens are the assistant's answer.

A prompt is what a chat server would send: the messages, rendered by the tokenizer's own template,
up to where the assistant begins. An answer is what the template makes of the assistant's message,
its end-of-turn token included; what follows that token belongs to the next turn.

Templates of thinking models may open a thinking part at the end of a prompt, and write answers
without one. There a prompt ends where the two begin to differ, in training and in evaluation, and
a warning says so.
"""

import warnings
from collections.abc import Sequence
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from polyroute.errors import InputError, did_you_mean, reason
from polyroute.kinds.batches import Ids, token_ids
from polyroute.kinds.names import PROMPTS
from polyroute.kinds.prompts import Message

__all__ = ["ChatTemplate", "template_of"]

PROBE: Message = {"role": "user", "content": "?"}
ANSWERS = ("?", "!")
"""Two answers: what chats with them have in common is what the template writes before an answer."""

SHOWN = 60
"""So many characters of an answer are shown in an error."""


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: a tokenizer that has one.
        system: the system message of every prompt that has none of its own. By default there is
            none, and some templates then write their own.

    Attributes:
        left_out: what the template writes at the end of a prompt, but not before an answer.
        end: the token that ends an answer.
        lead: what the template writes before an answer and after the prompt, such as an empty
            thinking part.

    Raises:
        InputError: the tokenizer has no template, or the template cannot render a short chat, or
            an answer does not follow what precedes it there.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> None:
        if not getattr(tokenizer, "chat_template", None):
            if system is not None:
                raise InputError(
                    "the tokenizer has no chat template for a system message: leave out --system"
                )
            raise InputError("the tokenizer has no chat template: use prompt='plain'")
        self.tokenizer = tokenizer
        self.system = system
        # Computed at once: a kind must not change, or `datasets` would not find what it cached.
        self.left_out = self._opened_only()
        self._probe = self.text(None, [PROBE])
        self._before = self.ids([self._probe])[0]
        written = [self._answered(text) for text in ANSWERS]
        lead, behind = self.ids(
            [
                _common(*written).removeprefix(self._probe),
                _common(*(chat[::-1] for chat in written))[::-1],
            ]
        )
        self.lead = str(tokenizer.decode(lead, skip_special_tokens=True)).strip()
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        rest = len(list(takewhile(lambda one: one not in special, reversed(behind))))
        self._of_next_turn = rest if rest < len(behind) else None
        self.end = self.answer_ids(["?"])[0][-1]

    def text(self, system: str | None, messages: Sequence[Message]) -> str:
        """See `polyroute.kinds.prompts.Prompter`.

        Raises:
            InputError: the template cannot render the conversation, or ends it in another way.
        """
        conversation = [*self._opening(system), *messages]
        text = self._render(conversation)
        if text.endswith(self.left_out):
            return text.removesuffix(self.left_out)
        answer = {"role": "assistant", "content": ANSWERS[0]}
        if self._render([*conversation, answer], ended=True).startswith(text):
            return text
        raise InputError(
            f"the chat template does not end every prompt with {self.left_out!r}, which leaves "
            "unclear where an answer begins: use prompt='plain'"
        )

    def ids(self, texts: list[str]) -> list[Ids]:
        """See `polyroute.kinds.prompts.Prompter`; the template writes all special tokens itself."""
        return token_ids(self.tokenizer, texts, special=False)

    def answer_ids(self, texts: Sequence[str]) -> list[Ids]:
        """The token ids of answers, each through its end-of-turn token.

        Raises:
            InputError: the template leaves out a part of an answer.
        """
        chats = [self._answered(text) for text in texts]
        for text, chat in zip(texts, chats, strict=True):
            written = "".join(chat.removeprefix(self._probe).split())
            if not chat.startswith(self._probe) or "".join(text.split()) not in written:
                shown = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
                raise InputError(
                    f"the chat template does not write the whole answer {shown!r}: use "
                    "prompt='plain'"
                )
        return [self._answer(ids, text) for ids, text in zip(self.ids(chats), chats, strict=True)]

    def _answer(self, ids: Ids, chat: str) -> Ids:
        """What follows the prompt in a chat, through the token that ends the turn."""
        count = len(self._before)
        if ids[:count] == self._before:
            ids = ids[count:]
        else:  # the tokenizer merges the end of the prompt with the answer, where no server would
            ids = self.ids([chat.removeprefix(self._probe)])[0]
        if self._of_next_turn is None:  # no token of the template ends a turn
            return [*ids, self.tokenizer.eos_token_id]
        return ids[: len(ids) - self._of_next_turn]

    def _opened_only(self) -> str:
        """The end of every prompt that the template does not write before an answer.

        Raises:
            InputError: the template writes the messages before an answer differently.
        """
        asked = [*self._opening(None), PROBE]
        opened, spoken = self._render(asked), self._render(asked, ended=True)
        answered = [self._answered(text) for text in ANSWERS]
        common = _common(opened, *answered)
        whole = self.ids([opened, answered[0]])
        while len(common) >= len(spoken):
            ids = self.ids([common])[0]
            if all(one[: len(ids)] == ids for one in whole) or common == opened:
                break
            common = common[:-1]  # a token of one of them begins here and ends later
        else:
            raise InputError(
                "the chat template writes a conversation differently once it is answered: use "
                "prompt='plain'"
            )
        left_out = opened[len(common) :]
        if left_out:
            warnings.warn(
                f"the chat template ends prompts with {left_out!r} and writes answers without it, "
                "so prompts are given without it, in training and in evaluation",
                stacklevel=2,
            )
        return left_out

    def _answered(self, text: str) -> str:
        """A short chat with this answer."""
        answer = {"role": "assistant", "content": text}
        return self._render([*self._opening(None), PROBE, answer], ended=True)

    def _opening(self, system: str | None) -> list[Message]:
        text = system if system is not None else self.system
        return [] if text is None else [{"role": "system", "content": text}]

    def _render(self, messages: Sequence[Message], *, ended: bool = False) -> str:
        """The text of a chat, up to where the assistant begins unless it is `ended`."""
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=not ended,
            )
        except Exception as error:  # a template is a program: it can raise anything
            raise InputError(
                f"the chat template cannot render an example ({reason(error)}): use prompt='plain'"
            ) from error
        return str(text)


def _common(*texts: str) -> str:
    """What texts begin with, all of them."""
    letters = zip(*texts, strict=False)
    return "".join(each[0] for each in takewhile(lambda each: len(set(each)) == 1, letters))


def template_of(
    wanted: "str | ChatTemplate", tokenizer: PreTrainedTokenizerBase
) -> ChatTemplate | None:
    """The template that a base model is prompted by; None for plain text.

    Args:
        wanted: one of `polyroute.kinds.names.PROMPTS`, or a template.
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
