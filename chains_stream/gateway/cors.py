"""Cross-origin requests: which pages of other sites may call from a browser (Fetch Standard, section 3.2).

Keys go in headers and never in cookies, so answers allow no credentials, and `*` is safe where keys are checked.
"""

import re
from typing import Self

from chains_stream.errors import ChainsUsageError
from chains_stream.settings import Settings

Header = tuple[bytes, bytes]

METHODS = b"GET, POST, DELETE"
MAX_AGE = 7200  # seconds that a browser remembers what it asked: no browser keeps it longer
EXPOSED = b"x-request-id, retry-after, x-should-retry, location, ratelimit, ratelimit-policy"

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/,*]+")
_NAMES = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+(\s*,\s*[!#$%&'*+.^_`|~0-9A-Za-z-]+)*")
_VARY = (b"vary", b"origin")
_EXPOSE = (b"access-control-expose-headers", EXPOSED)


class Cors:
    """The origins that may call."""

    def __init__(self, origins: frozenset[bytes] | None) -> None:
        self._origins = origins  # None: all
        self._any = ((b"access-control-allow-origin", b"*"), _EXPOSE)

    @classmethod
    def of(cls, settings: Settings) -> Self | None:
        """Give what is configured, or None if nothing is. Raises ChainsUsageError."""
        if settings.cors_origins is None:
            return None
        origins = [origin.strip().lower() for origin in settings.cors_origins.split(",") if origin.strip()]
        if "*" in origins:
            return cls(None)
        for origin in origins:
            if not _ORIGIN.fullmatch(origin):
                what = "a scheme, a host and perhaps a port, as https://example.org, or *"
                raise ChainsUsageError(f"CHAINS_CORS_ORIGINS: an origin should be {what} (got {origin!r})")
        return cls(frozenset(origin.encode() for origin in origins))

    def allows(self, origin: bytes | None) -> bool:
        """Tell whether a page of this origin may call; who sends none is no page of another site."""
        return origin is None or self._origins is None or origin in self._origins

    def headers(self, origin: bytes | None) -> tuple[Header, ...]:
        """Give what an answer to a request from `origin` needs for the page to read it."""
        if self._origins is None:
            return self._any
        if origin is None or origin not in self._origins:
            return (_VARY,)
        return ((b"access-control-allow-origin", origin), _VARY, _EXPOSE)

    def preflight(self, asked: bytes | None) -> tuple[Header, ...]:
        """Give what a browser asks before it sends a request with the headers `asked`.

        All are allowed by name: `*` would leave `authorization` out.
        """
        headers = [
            (b"access-control-allow-methods", METHODS),
            (b"access-control-max-age", b"%d" % MAX_AGE),
        ]
        if asked is not None and _NAMES.fullmatch(asked):
            headers.append((b"access-control-allow-headers", asked))
        return tuple(headers)
