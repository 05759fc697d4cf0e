"""Chat templates: how an instruct model is prompted, and which tokens are the assistant's answer.

A prompt is what a chat server would send: the messages, rendered by the tokenizer's own template,
up to where the assistant begins. An answer is what the template makes of the assistant's message,
its end-of-turn token included; what follows that token belongs to the next turn.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from polyroute.errors import InputError, did_you_mean
from polyroute.kinds.batches import Ids, token_ids
from polyroute.kinds.names import PROMPTS
from polyroute.kinds.prompts import Message

__all__ = ["ChatTemplate", "template_of"]

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
        self._before = self.ids([self.text(None, [PROBE])])[0]
        # Computed at once: a kind must not change, or `datasets` would not find what it cached.
        self.end = self.answer_ids(["?"])[0][-1]

    def text(self, system: str | None, messages: Sequence[Message]) -> str:
        """See `polyroute.kinds.prompts.Prompter`."""
        return self._render([*self._opening(system), *messages])

    def ids(self, texts: list[str]) -> list[Ids]:
        """See `polyroute.kinds.prompts.Prompter`; the template writes all special tokens itself."""
        return token_ids(self.tokenizer, texts, special=False)

    def answer_ids(self, texts: Sequence[str]) -> list[Ids]:
        """The token ids of answers, each through its end-of-turn token."""
        answers = [{"role": "assistant", "content": text} for text in texts]
        chats = [self._render([*self._opening(None), PROBE, one], ended=True) for one in answers]
        return [self._answer(ids, text) for ids, text in zip(self.ids(chats), chats, strict=True)]

    def _answer(self, ids: Ids, chat: str) -> Ids:
        """What follows the prompt in a chat, through the last special token."""
        count = len(self._before)
        if ids[:count] == self._before:
            ids = ids[count:]
        else:  # the tokenizer merges the end of the prompt with the answer, where no server would
            whole = self.text(None, [PROBE])
            ids = self.ids([chat[len(whole) :]])[0]
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        last = max((place for place, one in enumerate(ids) if one in special), default=None)
        return [*ids, self.tokenizer.eos_token_id] if last is None else ids[: last + 1]

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
            reason = " ".join(str(error).split())
            raise InputError(
                f"the chat template cannot render an example ({reason}): use prompt='plain'"
            ) from error
        return str(text)


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
