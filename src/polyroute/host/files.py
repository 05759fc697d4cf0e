"""Folders, and files of JSON and safetensors that are written whole or not at all."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from polyroute.errors import InputError

__all__ = [
    "check_place",
    "finite",
    "make_folder",
    "read_json",
    "read_metadata",
    "read_tensors",
    "whole_folder",
    "write_json",
    "write_tensors",
    "write_text",
]


def check_place(folder: str | os.PathLike[str]) -> None:
    """Check that `make_folder` would work, without creating anything.

    Raises:
        InputError: a file is in the way, or the folder cannot be written to.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; name a folder to write to")
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not there.is_dir():
        raise InputError(f"cannot create the folder {path}: {there} is a file")
    if not os.access(there, os.W_OK):
        raise InputError(f"cannot write to the folder {there}; check its permissions")


def make_folder(folder: str | os.PathLike[str]) -> Path:
    """Create the folder and its parents.

    Raises:
        InputError: a file is in the way, or the folder cannot be written to.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; name a folder to write to")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create the folder {path}: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise InputError(f"cannot write to the folder {path}; check its permissions")
    return path


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Write a new folder, whole or not at all.

    What the block writes to the folder it gets appears as `folder` at its end. If another process
    was faster, its folder stays.

    Raises:
        InputError: the folder cannot be created.
    """
    make_folder(folder.parent)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())  # mkdtemp lets only the owner read the folder
        for path in filter(Path.is_file, temporary.rglob("*")):
            path.chmod(0o666 & ~_umask())
            with path.open("rb+") as file:  # what a power cut leaves must not look whole
                os.fsync(file.fileno())
        try:
            os.replace(temporary, folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def finite(value: Any) -> Any:
    """The value, with None in place of NaN and infinity, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: object) -> None:
    """Write indented JSON, whole or not at all.

    Raises:
        InputError: a number is NaN or infinite, which JSON does not have.
    """
    try:
        text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise InputError(
            f"{path} is not written: a number in it is NaN or infinite, so something diverged"
        ) from error
    write_text(path, text + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, whole or not at all."""
    _replace(path, text.encode())


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        InputError: the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all.

    The metadata should have one entry: safetensors writes several in any order, so that equal
    content would not give equal files.
    """
    contiguous = {name: t.detach().contiguous().cpu() for name, t in tensors.items()}
    temporary = _temporary_beside(path)
    try:
        save_file(contiguous, temporary, metadata=dict(metadata or {"format": "pt"}))
        os.replace(temporary, path)
    except SafetensorError as error:  # for example a full disk
        temporary.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error}") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        InputError: the file is missing, truncated or in another format.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is not a whole safetensors file: {error}") from error


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file.

    Raises:
        InputError: the file is missing, truncated or in another format.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is not a whole safetensors file: {error}") from error


def _replace(path: Path, content: bytes) -> None:
    temporary = _temporary_beside(path)
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _temporary_beside(path: Path) -> Path:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    Path(name).chmod(0o666 & ~_umask())  # mkstemp lets only the owner read the file
    return Path(name)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
