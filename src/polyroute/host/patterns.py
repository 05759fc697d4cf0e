"""Regular expressions that others wrote, which must not take longer than they are worth."""

from polyroute.errors import InputError

__all__ = ["matches"]

SECONDS = 0.5
"""For one name. Patterns of layers take microseconds; some crafted ones would take centuries."""


def matches(pattern: str, name: str) -> bool:
    """Whether a name matches a regular expression whole.

    Raises:
        InputError: it is no regular expression, or takes too long.
    """
    # As `re`, but with a time limit; imported here, because the core needs torch alone.
    import regex

    try:
        return regex.fullmatch(pattern, name, timeout=SECONDS) is not None
    except (regex.error, RecursionError) as error:
        raise InputError(
            f"the pattern {pattern[:80]!r} is no regular expression ({error})"
        ) from error
    except TimeoutError as error:
        raise InputError(
            f"the pattern {pattern[:80]!r} takes too long on {name!r}: write it without repeats "
            "within repeats"
        ) from error
