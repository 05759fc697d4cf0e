"""Names of tasks: which texts can be one, and which two are one name written twice.

Tables of a million users' names go through here, so what is usual is passed over fast.
"""

import hashlib
import unicodedata
from collections.abc import Collection, Iterable
from urllib.parse import quote

from polyroute.errors import InputError

__all__ = [
    "check_name",
    "check_names",
    "composed",
    "described",
    "folder_names",
    "shortened",
]

UNSAYABLE = {"Cc", "Cs", "Zl", "Zp"}
"""Categories of Unicode: control characters, halves of characters, ends of lines."""
LONGEST_FILE = 120
"""Characters of the name of a file that are kept; a hash stands for the others."""


def check_name(name: object) -> None:
    """Make sure that a text can name a task: it can be written to any file, and stays on its line.

    Raises:
        InputError: it is no text or empty, or has a control character or half of a character.
    """
    if not isinstance(name, str) or not name:
        raise InputError(f"a task name must be a non-empty string, not {name!r}")
    if name.isprintable():
        return
    for character in name:
        if unicodedata.category(character) in UNSAYABLE:
            raise InputError(
                f"the task name {name!r} has the character {described(character)}, which cannot "
                "be written everywhere; leave it out"
            )


def check_names(new: Collection[str], known: Collection[str] = ()) -> None:
    """Make sure that names can be given to tasks beside those that have known names.

    Raises:
        InputError: as `check_name`; or two names differ only in how Unicode composes their
            characters, as those of files from macOS do.
    """
    by_form: dict[str, str] = {}
    for name in new:
        check_name(name)
        form = composed(name)
        other = by_form.setdefault(form, name)
        if other == name and form in known:
            other = form
        if other != name:
            raise _confusable(other, name)
    for name in known:
        other = name if name.isascii() else by_form.get(composed(name), name)
        if other != name:
            raise _confusable(name, other)


def composed(name: str) -> str:
    """The form of a name that all ways to compose its characters share."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def shortened(name: str) -> str:
    """The name of a file or folder, as it is or, if it is long, cut, with a hash of the whole."""
    if len(name) <= LONGEST_FILE:
        return name
    return f"{name[:LONGEST_FILE]}-{_hash(name)}"


def folder_names(tasks: Iterable[str], reserved: Iterable[str] = ()) -> dict[str, str]:
    """A folder for each task, by name: what its name is, percent-encoded and `shortened`.

    So each is the name of one folder, wherever it stands, and no two tasks have the same one: of
    names that some file systems do not tell apart, since they differ in case alone, all but the
    first get a hash.

    Args:
        tasks: the names, each once; which of two gets a hash depends on their order.
        reserved: names that no folder may have.

    Raises:
        InputError: one cannot be the name of a task.
    """
    taken = {name.casefold() for name in reserved}
    found: dict[str, str] = {}
    for task in tasks:
        check_name(task)
        plain = quote(task, safe="")
        if plain.startswith("."):  # hidden, or even "." and ".."
            plain = f"%2E{plain[1:]}"
        name, tries = shortened(plain), 0
        while name.casefold() in taken:
            name = f"{shortened(plain)}-{_hash(f'{tries}{task}')}"
            tries += 1
        taken.add(name.casefold())
        found[task] = name
    return found


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def described(character: str) -> str:
    """A character that may not be seen, by its number and name."""
    name = unicodedata.name(character, "")
    return f"U+{ord(character):04X}" + (f" ({name})" if name else "")


def _confusable(one: str, other: str) -> InputError:
    return InputError(
        f"the task names {one!r} ({one!a}) and {other!r} ({other!a}) differ only in how "
        "their characters are composed (NFC and NFD of Unicode); rename one of them"
    )
