"""How the HTTP interface treats those who ask."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["HttpSettings"]


@dataclass(frozen=True, kw_only=True)
class HttpSettings:
    """How the HTTP interface treats those who ask.

    Attributes:
        api_keys: what the names of each key's tasks begin with; without any key all may ask.
        allowed_hosts: the names by which the server may be called, an IPv6 address in brackets;
            without any, all names. A server for this machine alone needs them: otherwise a page
            of another site, whose name the site's owner points here, could read answers.
        timeout: seconds that a request may take.
        max_body: bytes of a request.
    """

    api_keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    allowed_hosts: Sequence[str] = ()
    timeout: float = 600.0
    max_body: int = 4 * 2**20
