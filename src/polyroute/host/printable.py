"""Text from files and users, as it may be shown in a terminal or opened in a spreadsheet."""

import re

__all__ = ["printable", "spreadsheet_cell"]

HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and line feed
    "\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks that turn the direction of text around
    "\ud800-\udfff]"  # halves of characters, which no encoding has
)
FORMULA = ("=", "+", "-", "@", "\t", "\r")


def printable(text: str) -> str:
    """The text with every hidden character written out, as Python does.

    A terminal obeys control characters: they move the cursor, clear the screen, set the title.
    """
    return HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def spreadsheet_cell(value: object) -> object:
    """A value for CSV; a text that a spreadsheet would compute gets an apostrophe before it."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
