"""Regular expressions that others wrote, which must not take longer than they are worth."""

import time

from polyroute.errors import InputError

__all__ = ["matches"]

SECONDS = 0.5
"""For one name. Patterns of layers take microseconds; some crafted ones would take centuries."""
SLOW, TOGETHER = 0.01, 2.0
"""Seconds that are much for one name, and that names which take so much may take together."""

_taken: dict[str, float] = {}
"""By pattern, the seconds of its slow names."""


def matches(pattern: str, name: str) -> bool:
    """Whether a name matches a regular expression whole.

    Raises:
        InputError: it is no regular expression, or takes too long.
    """
    # As `re`, but with a time limit; imported here, because the core needs torch alone.
    import regex

    started = time.perf_counter()
    try:
        found = regex.fullmatch(pattern, name, timeout=SECONDS) is not None
    except (regex.error, RecursionError) as error:
        raise InputError(
            f"the pattern {pattern[:80]!r} is no regular expression ({error})"
        ) from error
    except TimeoutError:
        _taken[pattern] = TOGETHER
    seconds = time.perf_counter() - started
    if seconds > SLOW:
        _taken[pattern] = _taken.get(pattern, 0.0) + seconds
    if _taken.get(pattern, 0.0) >= TOGETHER:
        raise InputError(
            f"the pattern {pattern[:80]!r} takes too long on {name!r}: write it without repeats "
            "within repeats"
        )
    return found
