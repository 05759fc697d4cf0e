"""The text of a Super-NaturalInstructions example, byte for byte as published, within a budget."""

import string
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from polyroute.errors import InputError

__all__ = ["TK_INSTRUCT", "Encoding", "any_length", "fits_in", "named_tokenizer", "render"]

_TAIL = "\nOutput:"


@dataclass(frozen=True)
class Encoding:
    """What the text of an example holds besides its input."""

    definition: bool = True
    positive: int = 0
    negative: int = 0
    explanations: bool = False
    task_name: bool = False


TK_INSTRUCT = (
    Encoding(),
    Encoding(definition=False, positive=2),
    Encoding(positive=2),
    Encoding(positive=2, negative=2),
    Encoding(positive=2, explanations=True),
)
"""The encodings among which Tk-Instruct (arXiv:2204.07705) draws for each example."""


def any_length(_: str) -> bool:
    """Whether a text is short enough where nothing bounds it: always."""
    return True


def fits_in(tokenizer: PreTrainedTokenizerBase, max_input: int, text: str) -> bool:
    """Whether a text has at most so many tokens, its end token included."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    # Room for an end token is kept even where the tokenizer adds none.
    needed: int = len(ids) + (ids[-1:] != [tokenizer.eos_token_id])
    return needed <= max_input


def named_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model, by its name or folder.

    Raises:
        InputError: it cannot be loaded.
    """
    try:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"the tokenizer {name!r} cannot be loaded ({reason}); name a base model"
        ) from error
    return loaded


def render(
    task: Mapping[str, Any],
    text: str,
    *,
    name: str = "",
    encoding: Encoding = Encoding(),
    fits: Callable[[str], bool] = any_length,
    eos: str = "</s>",
) -> str:
    """Write the text that a model reads of one instance.

    Args:
        task: what a task file holds: `Definition`, `Positive Examples`, `Negative Examples`.
        text: the input of the instance.
        name: of the task, for encodings that show it.
        encoding: what goes into the text.
        fits: whether a text is short enough; examples are added while it is, and what is still too
            long loses the end of its input.
        eos: the end token that closes each example.

    Raises:
        InputError: not even the "Output:" at the end fits.
    """
    head = f"{name}. " if encoding.task_name else ""
    if encoding.definition:
        definition = task["Definition"]
        first = definition if isinstance(definition, str) else definition[0]
        head += f"Task definition: {_dot(first)}\n"
    body = f"Now complete the following example -\nInput: {_dot(text)}"
    for kind, count in (("Positive", encoding.positive), ("Negative", encoding.negative)):
        for number, shown in enumerate(task.get(f"{kind} Examples", [])[:count], start=1):
            example = (
                f" {kind} Example {number} -\nInput: {_dot(shown['input'])}\n"
                f" Output: {_dot(shown['output'])} {eos}\n"
            )
            if encoding.explanations and "explanation" in shown:
                example += f" Explanation: {_dot(shown['explanation'])}\n"
            if not fits(head + example + "\n" + body + _TAIL):
                break
            head += example + "\n"
    whole = head + body
    if fits(whole + _TAIL):
        return whole + _TAIL
    # The longest beginning that fits; what bisection returns has itself been tried, even though
    # a text may have fewer tokens than its beginning.
    lengths = range(len(whole) + 1)
    keep = bisect_right(lengths, False, key=lambda n: not fits(whole[:n] + _TAIL)) - 1
    if keep < 0:
        raise InputError("no text fits: max_input is too small for 'Output:'; give more tokens")
    return whole[:keep] + _TAIL


def _dot(text: str) -> str:
    text = text.strip()
    return text if text and text[-1] in string.punctuation else text + "."
