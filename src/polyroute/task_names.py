"""Names of tasks: which texts can be one, and which two are one name written twice.

Tables of a million users' names go through here, so what is usual is passed over fast.
"""

import unicodedata
from collections.abc import Collection

from polyroute.errors import InputError

__all__ = ["check_name", "check_names", "composed", "described"]

UNSAYABLE = {"Cc", "Cs", "Zl", "Zp"}
"""Categories of Unicode: control characters, halves of characters, ends of lines."""


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


def described(character: str) -> str:
    """A character that may not be seen, by its number and name."""
    name = unicodedata.name(character, "")
    return f"U+{ord(character):04X}" + (f" ({name})" if name else "")


def _confusable(one: str, other: str) -> InputError:
    return InputError(
        f"the task names {one!r} ({one!a}) and {other!r} ({other!a}) differ only in how "
        "their characters are composed (NFC and NFD of Unicode); rename one of them"
    )
