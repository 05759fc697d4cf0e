"""Markdown for the model card: tables, code spans and numbers.

Text from names and data is escaped, so that it is never read as Markdown or HTML.
"""

import re
from collections.abc import Sequence

__all__ = ["Rows", "cell", "code", "number", "table"]

FOLDED = 20
"""A table with more rows than these is folded until a reader clicks on it."""
Rows = Sequence[Sequence[object]]


def table(columns: Sequence[str], rows: Rows) -> str:
    """A table; a long one is folded."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows]
    text = "\n".join(lines)
    if len(rows) <= FOLDED:
        return text
    return f"<details><summary>{len(rows)} rows</summary>\n\n{text}\n\n</details>"


class _Code(str):
    """A code span. It is Markdown already, so it is not escaped again."""


def code(value: object) -> str:
    """A code span on one line."""
    text = " ".join(str(value).split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return _Code(f"{fence} {text} {fence}" if "`" in text else f"`{text}`")


def cell(value: object) -> str:
    """A value on one line, escaped unless it comes from `code`."""
    text = " ".join(str(value).split())
    if not isinstance(value, _Code):
        text = re.sub(r"[\\`*<>\[\]]", r"\\\g<0>", text)
    return text.replace("|", "\\|")


def number(value: float | None) -> str:
    """Three decimals; nothing for None."""
    return "" if value is None else f"{value:.3f}"
