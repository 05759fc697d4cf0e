"""Folders, and files of JSON and safetensors that are written whole or not at all."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from polyroute.errors import InputError
from polyroute.host.json_text import parse_json
from polyroute.host.paths import check_link, check_readable, path_of, reading
from polyroute.host.texts import read_text

__all__ = [
    "BLOCK",
    "UNFINISHED",
    "check_place",
    "finite",
    "make_folder",
    "read_json",
    "read_metadata",
    "read_tensors",
    "remove",
    "remove_unfinished",
    "whole_file",
    "whole_folder",
    "whole_folders",
    "write_in_place",
    "write_json",
    "write_new_json",
    "write_tensors",
    "write_text",
]

UNFINISHED = ".unfinished"
"""Ends the names of files and folders that are being written."""
BLOCK = 4096
"""Bytes of which sizes and addresses are multiples where a file goes past the system's cache."""


def check_place(folder: str | os.PathLike[str]) -> None:
    """Check that `make_folder` would work, without creating anything.

    Raises:
        InputError: it is no path, a file is in the way, or the folder cannot be written to.
    """
    path = path_of(folder)
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
        InputError: it is no path, a file is in the way, or the folder cannot be written to.
    """
    path = path_of(folder)
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
    temporary = Path(
        tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=UNFINISHED)
    )
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())  # mkdtemp lets only the owner read the folder
        for path in filter(Path.is_file, temporary.rglob("*")):
            _finish(path)
        try:
            os.replace(temporary, folder)
        except OSError:
            if not folder.is_dir():
                raise
        _sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def whole_folders(parent: Path) -> Iterator[Path]:
    """Write new folders into one that exists, each whole or not at all.

    The folders that the block makes in the one it gets appear in `parent` at its end, in place of
    what has their names there. Whatever writes their files has to wait until the disk has them.
    """
    temporary = Path(tempfile.mkdtemp(dir=parent, prefix=".", suffix=UNFINISHED))
    try:
        yield temporary
        for folder in list(temporary.iterdir()):
            remove(parent / folder.name)
            folder.replace(parent / folder.name)
        _sync(parent)
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
    write_text(path, _json(path, value))


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_bytes(text.encode())


def write_in_place(path: Path, content: bytes | memoryview, size: int | None = None) -> None:
    """Write a new file where it stands, in a new folder, and wait until the disk has it.

    Whole blocks, at an address that is a multiple of `BLOCK`, go past the system's cache where they
    can: to copy them there takes longer than a fast disk needs, and drives out what others read.

    Args:
        path: the file.
        content: what it is to have.
        size: only the first so many bytes of that; the others fill up the last block.
    """
    is_whole = False
    if len(content) % BLOCK == 0:
        # AttributeError: a system without it. OSError: a file system without it, or an error that
        # the other way to write says too.
        with suppress(AttributeError, OSError):
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o666)
            try:
                is_whole = os.write(handle, content) == len(content)
                os.ftruncate(handle, len(content) if size is None else size)
                os.fsync(handle)
            finally:
                os.close(handle)
    if not is_whole:
        with path.open("wb") as file:
            file.write(content[:size])
            file.flush()
            os.fsync(file.fileno())


def write_new_json(path: Path, value: object) -> None:
    """Write indented JSON as a new file, whole or not at all.

    Raises:
        FileExistsError: there is such a file; of several processes all but one get this.
        InputError: as `write_json`.
    """
    text = _json(path, value)
    temporary = _temporary_beside(path)
    try:
        temporary.write_bytes(text.encode())
        _finish(temporary)
        try:
            os.link(temporary, path)  # unlike a rename, it fails if the file exists
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            path.open("x").close()
            os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _json(path: Path, value: object) -> str:
    try:
        return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:
        raise InputError(
            f"{path} is not written: a number in it is NaN or infinite, so something diverged"
        ) from error


def remove(path: Path) -> None:
    """Delete whatever stands under a name, if anything does: of a link not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_unfinished(folder: Path, *, own: str) -> None:
    """Delete what writers left in a folder, and below, when they were killed.

    Nobody else may be writing there, but in folders below that have a lock of their own.

    Args:
        folder: the folder.
        own: the name of a file; folders below that have one are left alone.
    """
    for path in list(folder.iterdir()):
        is_folder = path.is_dir() and not path.is_symlink()
        if path.name.startswith(".") and path.name.endswith(UNFINISHED):
            if is_folder:
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        elif is_folder and not (path / own).exists():
            remove_unfinished(path, own=own)


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        InputError: the file is missing, unreadable, too large or not JSON, or has a key twice.
    """
    check_link(path)
    try:
        with reading(path):
            text = read_text(path)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not valid JSON: it is not UTF-8 ({error.reason})") from error
    return parse_json(text, str(path), "replace the file")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all.

    The metadata should have one entry: safetensors writes several in any order, so that equal
    content would not give equal files.
    """
    contiguous = {name: t.detach().contiguous().cpu() for name, t in tensors.items()}
    try:
        with whole_file(path) as temporary:
            save_file(contiguous, temporary, metadata=dict(metadata or {"format": "pt"}))
    except SafetensorError as error:  # for example a full disk
        raise InputError(f"cannot write {path}: {error}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        InputError: the file is missing, unreadable, truncated or in another format.
    """
    check_readable(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is not a whole safetensors file: {error}") from error


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file.

    Raises:
        InputError: the file is missing, unreadable, truncated or in another format.
    """
    check_readable(path)
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is not a whole safetensors file: {error}") from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """What the block writes to the file it gets appears at `path` at its end, if it ends well.

    Raises:
        InputError: a folder has that name.
    """
    temporary = _temporary_beside(path)
    try:
        yield temporary
        _finish(temporary)
        try:
            os.replace(temporary, path)
        except IsADirectoryError as error:
            raise InputError(
                f"{path} is a folder, where a file is to be written; move it"
            ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _temporary_beside(path: Path) -> Path:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED)
    os.close(handle)
    return Path(name)


def _finish(path: Path) -> None:
    """Let others read a file as the umask says, and wait until the disk has it.

    What a power cut leaves must not look whole.
    """
    path.chmod(0o666 & ~_umask())  # temporary files can be read by their owner alone
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Wait until the disk has the names of a folder."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    except OSError:  # a file system that cannot
        pass
    finally:
        os.close(handle)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
