"""Text of an answer while its tokens come: whole characters, and nothing of a text that ends it."""

from collections.abc import Sequence
from typing import Any

__all__ = ["TextStream"]

INCOMPLETE = "\ufffd"
"""What half a character decodes to."""


class TextStream:
    """Turns the tokens of one answer into text, piece by piece.

    Args:
        tokenizer: of the base model.
        stop: texts before the first of which the answer ends.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = [text for text in stop if text]
        self.ids: list[int] = []
        self._told = 0  # tokens whose text was decoded
        self._before = 0  # the first token that the next ones are decoded with
        self._waiting = ""
        self.is_over = False

    def add(self, token: int) -> str:
        """The text that one more token completes; after a stop text, `is_over` is true."""
        self.ids.append(token)
        # Some tokenizers write a token in another way at the beginning of a text, so the tokens
        # before it are decoded with it.
        known = self._decode(self._before, self._told)
        text = self._decode(self._before, len(self.ids))
        if text.endswith(INCOMPLETE) or len(text) < len(known):
            return ""
        self._before, self._told = self._told, len(self.ids)
        return self._released(text[len(known) :])

    def end(self) -> str:
        """The text that was held back, once no token follows."""
        known = self._decode(self._before, self._told)
        self._waiting += self._decode(self._before, len(self.ids))[len(known) :]
        self._told = len(self.ids)
        return self._released("", is_last=True)

    def _decode(self, first: int, after: int) -> str:
        return str(self.tokenizer.decode(self.ids[first:after], skip_special_tokens=True))

    def _released(self, text: str, *, is_last: bool = False) -> str:
        """Text that cannot become part of a stop text."""
        waiting = self._waiting + text
        found = [place for one in self.stop if (place := waiting.find(one)) >= 0]
        if found:
            self.is_over, self._waiting = True, ""
            return waiting[: min(found)]
        held = 0 if is_last else max((_overlap(waiting, one) for one in self.stop), default=0)
        kept = len(waiting) - held
        self._waiting = waiting[kept:]
        return waiting[:kept]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
