"""The text of a Super-NaturalInstructions example: the published bytes, within a token budget."""

import string
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from polyroute.errors import InputError, reason

__all__ = ["TK_INSTRUCT", "Encoding", "any_length", "fits_in", "named_tokenizer", "render"]

_TAIL = "\nOutput:"


@dataclass(frozen=True)
class Encoding:
    """What the text of an example shows besides its input."""

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
"""The encodings from which Tk-Instruct (arXiv:2204.07705) draws one for each example."""


def any_length(_: str) -> bool:
    """Every text is short enough, because there is no budget."""
    return True


def fits_in(tokenizer: PreTrainedTokenizerBase, max_input: int, text: str) -> bool:
    """Whether a text has at most `max_input` tokens, its end token included."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    # Room for an end token is kept even if the tokenizer adds none.
    needed: int = len(ids) + (ids[-1:] != [tokenizer.eos_token_id])
    return needed <= max_input


def named_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base model, given its name or folder.

    Raises:
        InputError: the tokenizer cannot be loaded.
    """
    try:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"the tokenizer {name!r} cannot be loaded ({reason(error)}); name a base model"
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
    """Write the text of one instance for a model to read.

    Args:
        task: the content of a task file: `Definition`, `Positive Examples`, `Negative Examples`.
        text: the input of the instance.
        name: the name of the task, for encodings that show it.
        encoding: what the text shows.
        fits: whether a text is short enough. Examples are added as long as the text fits; a text
            that is too long even without examples loses the end of its input.
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
    for sign, count in (("Positive", encoding.positive), ("Negative", encoding.negative)):
        for number, shown in enumerate(task.get(f"{sign} Examples", [])[:count], start=1):
            example = (
                f" {sign} Example {number} -\nInput: {_dot(shown['input'])}\n"
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
    # Find the longest beginning that fits. A text can have fewer tokens than its beginning, so
    # lengths are not strictly ordered; but bisection only returns a length that it has tried.
    lengths = range(len(whole) + 1)
    keep = bisect_right(lengths, False, key=lambda n: not fits(whole[:n] + _TAIL)) - 1
    if keep < 0:
        raise InputError("no text fits: max_input is too small for 'Output:'; give more tokens")
    return whole[:keep] + _TAIL


def _dot(text: str) -> str:
    text = text.strip()
    return text if text and text[-1] in string.punctuation else text + "."
