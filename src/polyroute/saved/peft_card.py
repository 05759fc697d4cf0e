"""The card of an adapter in PEFT's files: how it is loaded, and how its base model is prompted."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyroute.host.files import read_json, write_text
from polyroute.host.texts import read_text
from polyroute.saved.base_names import loading_of
from polyroute.saved.card import MARK
from polyroute.saved.hub import CARD, HUB_ID
from polyroute.saved.peft_export import CONFIG
from polyroute.saved.prompting import Prompting

__all__ = ["write_peft_card"]

CLASSES = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM"}
"""The classes of transformers that load a base model, by PEFT's name for its type of task."""
PLAIN = ("LORA", "IA3")
"""Methods that PEFT loads without polyroute."""


def write_peft_card(
    folder: str | os.PathLike[str],
    prompting: Prompting | None,
    config: Mapping[str, Any] | None = None,
    *,
    origin: str = "trained with polyroute",
) -> None:
    """Write the README.md of an adapter; one that polyroute did not write stays.

    Args:
        folder: the folder of the adapter.
        prompting: how its base model was prompted; None where that is not known.
        config: what `run.json` says of the run that it comes from; None where there is no run.
        origin: the end of the sentence that says what the adapter is.
    """
    place = Path(folder)
    card = place / CARD
    if card.is_file() and MARK not in read_text(card):
        return
    fields = read_json(place / CONFIG)
    write_text(card, _card(fields, prompting, loading_of(config or {}), origin))


def _card(
    config: dict[str, Any], prompting: Prompting | None, loading: str | None, origin: str
) -> str:
    from huggingface_hub import ModelCard, ModelCardData

    name = config["base_model_name_or_path"]
    is_id = isinstance(name, str) and HUB_ID.fullmatch(name) and not Path(name).exists()
    base = name if is_id else None
    method = {"LORA": "LoRA", "IA3": "(IA)^3"}.get(config["peft_type"], config["peft_type"])
    data = ModelCardData(
        library_name="peft",
        base_model=base,
        base_model_relation=None if base is None else "adapter",
        tags=["polyroute", config["peft_type"].lower()],
    )
    parts = [
        MARK,
        f"# {method} adapter",
        f"A {method} adapter in PEFT's files, {origin}" + ("" if origin[-1] == "\n" else "."),
        *_prompts(prompting),
        *_use(config, base, prompting, loading),
    ]
    text = "\n\n".join(parts)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n"))


def _prompts(prompting: Prompting | None) -> list[str]:
    if prompting is None:
        return []
    sentence = prompting.sentence()
    return [
        "## Prompts",
        f"{sentence} The adapter was trained on prompts of this form, so give it no others.",
    ]


def _use(
    config: dict[str, Any], base: str | None, prompting: Prompting | None, loading: str | None
) -> list[str]:
    """How PEFT loads it, where PEFT alone can."""
    loader = CLASSES.get(config["task_type"])
    if config["peft_type"] not in PLAIN:
        return []
    lines = ["from peft import PeftModel"]
    if loading is not None:
        lines += ["import polyroute as pr", "", loading]
    elif base is None or loader is None:
        lines += ["", "# base, tokenizer: the base model that the adapter was trained on"]
    else:
        lines += [
            f"from transformers import {loader}, AutoTokenizer", "",
            f'base = {loader}.from_pretrained("{base}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{base}")',
        ]  # fmt: skip
    lines.append('model = PeftModel.from_pretrained(base, "FOLDER")  # the folder of this file')
    if loader is not None and prompting is not None:
        lines += [*prompting.code(), "ids = model.generate(**prompt)"]
    snippet = "\n".join(lines)
    return [f"## Use\n\n```python\n{snippet}\n```"]
