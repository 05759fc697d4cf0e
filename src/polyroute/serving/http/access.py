"""API keys, and which names of tasks each may see."""

import hmac
import logging
import os
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from hashlib import sha256
from itertools import permutations
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from polyroute.errors import InputError
from polyroute.host.texts import read_text
from polyroute.serving.http.errors import Refusal
from polyroute.serving.requests import SHARED
from polyroute.task_names import check_name

__all__ = ["Access", "Names", "read_api_keys"]


@dataclass(frozen=True)
class Names:
    """The names that a key's owner gives to tasks, and those that the service knows them by.

    Attributes:
        prefix: what the names of all of the owner's tasks begin with there.
    """

    prefix: str = ""

    def inner(self, name: str) -> str:
        """The name that the service knows."""
        return name if name in SHARED else self.prefix + name

    def outer(self, name: str) -> str:
        """The name that the owner knows, of one that begins with the prefix."""
        return name if name in SHARED else name.removeprefix(self.prefix)

    def told(self, sentence: str, name: str) -> str:
        """A sentence of the service about a task, with the owner's name for it."""
        return sentence.replace(repr(self.inner(name)), repr(name)) if self.prefix else sentence


class Access:
    """Lets only those ask who have a key.

    Args:
        app: what they ask.
        api_keys: what the names of each key's tasks begin with; without any key all may ask.
        open_paths: what needs no key.
    """

    def __init__(
        self, app: ASGIApp, api_keys: Mapping[str, str], open_paths: Collection[str]
    ) -> None:
        self.app, self._open = app, frozenset(open_paths)
        self._names = {_digest(key): Names(prefix) for key, prefix in api_keys.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, with the names its key may see, or refuse it."""
        if scope["type"] == "http":
            names = self._names_of(scope)
            if names is None:
                refusal = Refusal(
                    401,
                    "this needs an API key that the server knows: send it as the header "
                    "`Authorization: Bearer KEY`",
                    "invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await refusal.response()(scope, receive, send)
                return
            scope["state"]["names"] = names
        await self.app(scope, receive, send)

    def _names_of(self, scope: Scope) -> Names | None:
        if not self._names or scope["path"] in self._open:
            return Names()
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        given, found = _digest(key.strip()), None
        for known, names in self._names.items():
            # All are compared, so that the time says nothing about which one is near.
            if hmac.compare_digest(given, known):
                found = names
        return found if scheme.lower() == "bearer" else None


def read_api_keys(path: str | os.PathLike[str]) -> dict[str, str]:
    """The keys of a file, with what the names of each key's tasks begin with.

    A line is `KEY` or `KEY PREFIX`. Lines that begin with `#`, and empty ones, are comments.

    Args:
        path: of the file.

    Returns:
        The prefix of each key; an empty one for a key that sees all tasks.

    Raises:
        InputError: the file has no key, one twice, a line that is not of this form, or two
            prefixes of which one is the beginning of the other by accident.
    """
    path = Path(path)
    keys: dict[str, str] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        parts = line.split()
        if not parts or parts[0].startswith("#"):
            continue
        where = f"{path}, line {number}"
        key, prefix = parts[0], "".join(parts[1:2])
        if len(parts) > 2 or not (key.isascii() and key.isprintable()):
            raise InputError(f"{where}: write `KEY` or `KEY PREFIX`, the key in ASCII")
        if key in keys:
            raise InputError(f"{where}: the file has this key twice; remove one of them")
        if prefix:
            check_name(prefix)
        keys[key] = prefix
    if not keys:
        raise InputError(
            f"{path} has no API key: write one on each line, or serve without the file"
        )
    _check_apart(path, set(keys.values()) - {""})
    if os.name == "posix" and path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        logging.getLogger(__name__).warning(
            "others on this machine can read the API keys in %s; `chmod 600` keeps them to you",
            path,
        )
    return keys


def _check_apart(path: Path, prefixes: set[str]) -> None:
    """Make sure that no key sees tasks of another, unless its prefix looks like a folder's."""
    for one, other in permutations(sorted(prefixes), 2):
        if other.startswith(one) and not one.endswith("/"):
            raise InputError(
                f"{path}: the key of {one!r} would see the tasks of {other!r}, which begins with "
                "it; end prefixes with a slash"
            )


def _digest(key: str) -> bytes:
    return sha256(key.encode("latin-1", "replace")).digest()
