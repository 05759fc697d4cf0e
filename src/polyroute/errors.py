"""The one exception that means "the input is wrong", as opposed to "polyroute is wrong"."""

import difflib
from bisect import bisect
from collections.abc import Callable, Iterable, Sequence

__all__ = ["InputError", "did_you_mean", "fault_of", "first_few", "reason"]

_MOST_COMPARED = 5000


class InputError(ValueError):
    """Something the caller gave cannot be used.

    The message is one sentence that names the thing and the fix. The command line prints it
    without a stack trace and exits with code 2.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A clause that offers the nearest known names, or lists a few where none is near.

    Comparing is slow. Of more than 5,000 names only those with the same first letter are compared,
    and of more than 5,000 of these the ones nearest in the alphabet.

    Args:
        name: what was asked for.
        known: what exists.

    Returns:
        Text to put at the end of an error message, without a full stop.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, _worth_comparing(name, names), n=3, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(repr(n) for n in near) + "?"
    if not names:
        return "none exist"
    return f"known: {first_few([repr(n) for n in names], 8)}"


def fault_of(check: Callable[..., object], *given: object) -> str | None:
    """The sentence with which a check refuses what it is given; None if it does not."""
    try:
        check(*given)
    except InputError as error:
        return str(error)
    return None


def first_few(names: Sequence[str], most: int) -> str:
    """The first names of a list, and how many more there are, as part of a sentence."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def reason(error: Exception, *, whole: bool = False) -> str:
    """The first line of an error's message, to be put in brackets behind a sentence.

    Args:
        error: of another library.
        whole: all lines, as one: for errors that say in later lines what is wrong, and where.
    """
    message = str(error).strip() or type(error).__name__
    shown = " ".join(message.split()) if whole else message.splitlines()[0].strip()
    return shown.rstrip(".:")


def _worth_comparing(name: str, names: list[str]) -> list[str]:
    """At most `_MOST_COMPARED` of the names, which are sorted."""
    if len(names) > _MOST_COMPARED:
        names = [known for known in names if known[:1] == name[:1]]
    if len(names) > _MOST_COMPARED:
        start = bisect(names, name) - _MOST_COMPARED // 2
        start = min(max(start, 0), len(names) - _MOST_COMPARED)
        names = names[start : start + _MOST_COMPARED]
    return names
