"""How a base model is prompted, in words and in code, for the card of what was trained on it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from polyroute.errors import InputError
from polyroute.saved.markdown import code
from polyroute.saved.runs import BEFORE

__all__ = ["NOTE", "Prompting", "prompting_of"]

NOTE = "prompting"
"""Key in `run.json`, beside the config: what the prompts of the run turned out to be."""


@dataclass(frozen=True)
class Prompting:
    """How a base model is prompted."""

    way: str
    """`chat` by its template, `plain` by the text alone, `auto` by its template if it has one."""
    system: str | None = None
    """The system message of every chat that has none of its own."""
    newline: bool = False
    """Whether plain text ends with a newline, after which the answer follows."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def sentence(self) -> str:
        """What a user must know to prompt the base model in the same way."""
        end = ", with a newline before the answer" if self.newline else ""
        plain = f"by the text alone: instruction and input on lines of their own{end}"
        system = (
            "no system message but the template's own"
            if self.system is None
            else f"the system message {code(json.dumps(self.system, ensure_ascii=False))}"
        )
        chat = f"by its chat template: the text is the user's message, with {system}"
        words = {
            "plain": f"{plain}; no chat template",
            "chat": chat,
            "auto": f"{chat}. If its tokenizer has no chat template, it is prompted {plain}",
        }
        return f"The base model is prompted {words[self.way]}."

    def code(self, text: str = "...") -> list[str]:
        """Lines of Python that make `prompt`, the inputs of `generate`, with `tokenizer`."""
        if self.way != "chat":
            end = "\\n" if self.newline else ""
            return [f'prompt = tokenizer("{text}{end}", return_tensors="pt")']
        system = json.dumps(self.system, ensure_ascii=False)
        opening = "" if self.system is None else f'{{"role": "system", "content": {system}}}, '
        return [
            f'messages = [{opening}{{"role": "user", "content": "{text}"}}]',
            "prompt = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ")",
        ]


def prompting_of(run: Mapping[str, Any]) -> Prompting | None:
    """How the base model of a run was prompted, as far as its `run.json` says; else None.

    Raises:
        InputError: what it says cannot be read.
    """
    if NOTE in run:
        try:
            return Prompting(**run[NOTE])
        except TypeError as error:
            raise InputError(f"run.json is damaged: {NOTE} is {run[NOTE]!r}") from error
    config = {**BEFORE, **run.get("config", {})}
    if "model" not in config:
        return None
    return Prompting(config["prompt"], config["system"])
