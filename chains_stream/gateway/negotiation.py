"""Which of the forms that we offer a client gets: ``Accept``, by RFC 9110, section 12.5.1."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_RANGE = re.compile(r"\s*(\*|[\w!#$&^.+-]+)/(\*|[\w!#$&^.+-]+)\s*((?:;.*)?)", re.ASCII | re.DOTALL)
_QUALITY = re.compile(r";\s*q\s*=\s*([01](?:\.\d{0,3})?)\s*(?=;|$)", re.ASCII | re.IGNORECASE)
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"?', re.DOTALL)  # a parameter's value, which may hold anything
_MAX_LENGTH = 4096  # characters of the header that are read: what a browser sends has some 200


class _Range(NamedTuple):
    kind: str
    subtype: str
    quality: float

    def fit(self, media_type: str) -> int:
        """Tell how closely this names a media type: 3 is itself, 2 its kind, 1 anything, 0 not at all."""
        kind, _, subtype = media_type.partition("/")
        if (self.kind, self.subtype) == ("*", "*"):
            return 1
        if self.kind != kind or self.subtype not in ("*", subtype):
            return 0
        return 2 if self.subtype == "*" else 3


def choose(accept: str | None, offered: Sequence[str]) -> str | None:
    """Choose one of the media types `offered`, the preferred first; None if the client accepts none of them.

    No header accepts everything. What is liked equally goes to the one that the client names more closely, then to the
    one that we prefer. Parameters other than ``q`` are not looked at, and a malformed range counts for nothing.
    """
    if accept is None or not accept.strip():
        return offered[0]
    ranges = list(_ranges(accept[:_MAX_LENGTH]))
    best, liked = None, (0.0, 0)
    for media_type in offered:
        # Of the ranges that fit, the closest decides: `text/*, text/plain;q=0` wants no plain text.
        fit, quality = max(((found.fit(media_type), found.quality) for found in ranges), default=(0, 0.0))
        if fit and quality and (quality, fit) > liked:
            best, liked = media_type, (quality, fit)
    return best


def _ranges(accept: str) -> Iterator[_Range]:
    for part in _QUOTED.sub("", accept).split(","):
        found = _RANGE.fullmatch(part)
        if found is None:
            continue
        quality = _QUALITY.search(found[3])
        if quality is None and re.search(r";\s*q\s*=", found[3], re.IGNORECASE):
            continue  # one that can't be read
        yield _Range(found[1].lower(), found[2].lower(), min(1.0, float(quality[1])) if quality else 1.0)
