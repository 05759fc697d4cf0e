"""GGUF files, made once into folders of safetensors that load like any other base model."""

import hashlib
import importlib.util
import io
import os
import shutil
import sys
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from polyroute.errors import InputError, reason
from polyroute.host import progress
from polyroute.host.files import make_folder, read_json, whole_folder, write_json
from polyroute.host.output import say
from polyroute.host.paths import expanded
from polyroute.kinds.choose import kind_class

__all__ = ["SUFFIX", "cache_folder", "dequantised", "missing_weights"]

SUFFIX = ".gguf"
VERSION = 1
"""Raise it when the folders of older versions must not be used any more."""
CONTENTS = "polyroute-contents.json"
"""Lists the files of a folder, each with its `_mark`."""
MARKED = 16 * 2**20
"""So many bytes of a file count for its mark."""


def dequantised(file: Path, dtype: str | None = None) -> Path:
    """The folder in the cache that holds the model of a GGUF file, made if it is missing.

    The name of the folder says what it depends on: the content of the file, the type, and the
    versions of transformers and of this module. A damaged folder is made again.

    Args:
        file: the GGUF file.
        dtype: the type of the weights; None for a folder with config and tokenizer alone.

    Raises:
        InputError: the file cannot be read, or the cache cannot be written.
    """
    try:
        with file.open("rb") as opened:
            content = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    made_by = f"transformers-{transformers.__version__}-{VERSION}"
    folder = cache_folder() / f"{file.stem}-{content[:16]}-{dtype or 'tokenizer'}-{made_by}"
    if not _is_whole(folder):
        shutil.rmtree(folder, ignore_errors=True)
        _make(folder, file, dtype)
    return folder


def cache_folder() -> Path:
    """Where the folders are: in `$POLYROUTE_CACHE`, or else in the cache of Hugging Face."""
    given = os.environ.get("POLYROUTE_CACHE")
    cache = expanded(given) if given else Path(constants.HF_HOME) / "polyroute"
    return cache / "gguf"


def missing_weights(info: dict[str, Any]) -> list[str]:
    """The weights that a model lacked when it was loaded; transformers drew them at random.

    Poolers are exempt, because no kind of model uses them.
    """
    return sorted(key for key in info["missing_keys"] if "pooler" not in key)


def _make(folder: Path, file: Path, dtype: str | None) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise InputError(
            f"{file.name} is a GGUF file, which needs the package gguf: install it with "
            "`pip install gguf`"
        )
    described = None if dtype is None else dequantised(file)
    work = "reading config and tokenizer of" if described is None else "dequantising"
    say(f"{work} {file.stem} once, into {folder}")
    try:
        make_folder(folder.parent)
    except InputError as error:
        raise InputError(f"{error}; or set POLYROUTE_CACHE to another folder") from error
    try:
        with whole_folder(folder) as place, _bar_on_a_terminal():
            if dtype is None or described is None:
                _describe(file, place)
            else:
                shutil.copytree(described, place, dirs_exist_ok=True)
                _load(file, described, dtype).save_pretrained(place)
            files = [path for path in place.rglob("*") if path.is_file()]
            marks = {path.relative_to(place).as_posix(): _mark(path) for path in files}
            write_json(place / CONTENTS, {n: mark for n, mark in marks.items() if n != CONTENTS})
    except InputError:
        raise
    except Exception as error:  # a damaged file can make transformers raise anything
        raise InputError(
            f"GGUF file {str(file)!r} cannot be dequantised into {folder.parent}: it must be "
            "whole, of an architecture that transformers reads, and fit on the disk "
            f"({reason(error)})"
        ) from error


def _describe(file: Path, place: Path) -> None:
    """Write the config and the tokenizer of a GGUF file."""
    # With an absolute path, transformers looks for the file nowhere else.
    source: dict[str, Any] = {"gguf_file": str(file.absolute()), "trust_remote_code": False}
    config = AutoConfig.from_pretrained(file.parent, **source)
    kind_class(config)  # refuses unknown kinds of models before any work
    config.save_pretrained(place)
    AutoTokenizer.from_pretrained(file.parent, **source).save_pretrained(place)


def _load(file: Path, described: Path, dtype: str) -> PreTrainedModel:
    """The model of a GGUF file with plain weights, which can be saved."""
    config = AutoConfig.from_pretrained(described, trust_remote_code=False)
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # older versions always dequantise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model, info = kind_class(config).auto_class.from_pretrained(
        file.parent, config=config, gguf_file=str(file.absolute()), dtype=getattr(torch, dtype),
        output_loading_info=True, trust_remote_code=False, **options,
    )  # fmt: skip
    missing = missing_weights(info)
    if missing:
        raise InputError(
            f"GGUF file {str(file)!r} lacks {len(missing)} of its model's weights, such as "
            f"{missing[0]!r}: give a file that holds the whole model"
        )
    # transformers takes the model for a quantised one, which it would not save.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    plain: PreTrainedModel = model
    return plain


def _bar_on_a_terminal() -> AbstractContextManager[Any]:
    """Within the block, the progress bar of transformers is shown on a terminal alone."""
    shows = sys.stderr.isatty() and not progress.hidden
    return nullcontext() if shows else redirect_stderr(io.StringIO())


def _is_whole(folder: Path) -> bool:
    """Whether a folder of the cache holds what was written to it."""
    try:
        contents = read_json(folder / CONTENTS)
        return isinstance(contents, dict) and all(
            _mark(folder / name) == mark for name, mark in contents.items()
        )
    except (InputError, OSError):
        return False


def _mark(path: Path) -> str:
    """The size of a file, and the hash of its beginning; reading all of a model would take long."""
    with path.open("rb") as file:
        return f"{path.stat().st_size} {hashlib.sha256(file.read(MARKED)).hexdigest()}"
