"""Loading a base model and its tokenizer by name, and suites that need a tokenizer."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from polyroute.data.open import open_suite
from polyroute.data.suite import Suite
from polyroute.errors import InputError, did_you_mean
from polyroute.kinds.choose import kind_class

__all__ = ["check_base", "load_base", "load_suite"]

DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16)}
TOKENIZER_FILES = ("tokenizer", "vocab", "spiece", "sentencepiece")


def load_base(
    path: str, *, dtype: str = "float32"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base model and its tokenizer, in evaluation mode.

    Args:
        path: a local folder; an id on the hub; `"demo"`, the model that polyroute ships; or
            `"package:NAME"`, the first folder with a model inside the installed Python package
            NAME.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`.

    Raises:
        InputError: the model or its tokenizer is missing or cannot be read, some of its weights
            are missing, or its kind is unknown.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not supported: {did_you_mean(dtype, DTYPES)}")
    source = _located(path)
    try:
        kind = kind_class(AutoConfig.from_pretrained(source))
        model, info = kind.auto_class.from_pretrained(
            source, dtype=DTYPES[dtype], output_loading_info=True
        )
        if dtype == "bfloat16" and not torch.accelerator.is_available():
            # The backward of torch's fused attention takes half the time of a bf16 step on a CPU.
            model.set_attn_implementation("eager")
        tokenizer = AutoTokenizer.from_pretrained(source)
    except InputError:
        raise
    except Exception as error:  # a damaged file can make transformers raise anything
        raise _not_loaded(path, error) from error
    # transformers initialises missing weights at random. Poolers are exempt: no kind uses them.
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if missing:
        raise InputError(
            f"base model {path!r} lacks {len(missing)} of its weights, such as {missing[0]!r}: "
            "save the whole model with save_pretrained"
        )
    return model, tokenizer


def check_base(path: str) -> None:
    """Check that a base model exists, without loading its weights.

    Raises:
        InputError: there is no such model, or its kind is unknown.
    """
    source = _located(path)
    try:
        kind_class(AutoConfig.from_pretrained(source))
    except InputError:
        raise
    except Exception as error:  # as above
        raise _not_loaded(path, error) from error


def load_suite(path: str, options: Mapping[str, Any] | None = None) -> Suite:
    """Open a suite with options of its reader; `tokenizer` may name a base model.

    Raises:
        InputError: there is no such suite or base model, or the reader has no such option.
    """
    given = dict(options or {})
    if "tokenizer" in given:
        name = str(given["tokenizer"])
        source = _located(name)
        try:
            given["tokenizer"] = AutoTokenizer.from_pretrained(source)
        except Exception as error:  # as above
            raise _not_loaded(name, error) from error
    return open_suite(path, **given)


def _not_loaded(path: str, error: Exception) -> InputError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
    return InputError(
        f"base model {path!r} cannot be loaded: give a folder written by save_pretrained, or "
        f"a hub id that can be reached ({reason})"
    )


def _located(path: str) -> str:
    """The folder or hub id that a name stands for."""
    if path.startswith("package:"):
        return str(_folder_in_package(path.removeprefix("package:")))
    folder = Path(__file__).parent / "demo" / "base" if path == "demo" else Path(path).expanduser()
    if folder.is_dir():
        for prefixes in (("config.json",), TOKENIZER_FILES):
            # Without these files transformers can build an empty tokenizer without an error.
            if not any(file.name.startswith(prefixes) for file in folder.iterdir()):
                raise InputError(
                    f"base model folder {path!r} has no {prefixes[0]}: write model and tokenizer "
                    "there with save_pretrained"
                )
        return str(folder)
    if path == "demo":
        raise InputError("the demo model is missing from this installation: reinstall polyroute")
    if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise InputError(f"base model {path!r} is not a folder: give a model folder or a hub id")
    return path


def _folder_in_package(name: str) -> Path:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # a parent is missing, or the name is empty
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"Python package {name!r} is not installed: install it with pip")
    for root in spec.submodule_search_locations:
        for weights in sorted(Path(root).rglob("model.safetensors")):
            if (weights.parent / "config.json").is_file():
                return weights.parent
    raise InputError(
        f"Python package {name!r} holds no model: it needs a folder with config.json and "
        "model.safetensors"
    )
