"""The tokens that are streamed, and the bytes that they are as server-sent events: the same for all."""

import json
from collections.abc import Iterator
from functools import cache

HEAD = b"retry: 1000\n\n"


def token(number: int) -> str:
    return f" token{number}"


def event(number: int, text: str) -> bytes:
    return b"id: %d\ndata: %b\n\n" % (number, json.dumps(text).encode())


def done(count: int) -> bytes:
    return b'event: done\ndata: {"chunks":%d}\n\n' % count


@cache
def events(count: int) -> tuple[bytes, ...]:
    """Give a stream in pieces, ready to be sent."""
    return tuple(_events(count))


def _events(count: int) -> Iterator[bytes]:
    yield HEAD
    for number in range(count):
        yield event(number, token(number))
    yield done(count)
