"""What makes a valid request a malformed one: on the level of HTTP, of headers, of JSON, of bytes."""

import json
import random
from copy import deepcopy
from typing import Any

from tests.fuzz import values
from tests.fuzz.drafts import Draft

FRAMES_SHARE = 0.6  # of mutations, where there are frames


def mutate(choice: random.Random, made: Draft) -> None:
    """Make one part of a request wrong, or strange."""
    if made.frames and choice.random() < FRAMES_SHARE:
        made.frames = damage(choice, made.frames)
        return
    choice.choice(_ALL)(choice, made)


def damage(choice: random.Random, data: bytes) -> bytes:
    """Flip, cut, double or insert bytes."""
    at = choice.randrange(len(data) + 1)
    size = choice.choice((1, 1, 2, 8, 64))
    match choice.randrange(6):
        case 0:
            flipped = bytes(byte ^ (1 << choice.randrange(8)) for byte in data[at : at + size])
            return data[:at] + flipped + data[at + size :]
        case 1:
            return data[:at]
        case 2:
            return data[:at] + data[at + size :]
        case 3:
            return data[: at + size] + data[at:]
        case 4:
            return data[:at] + choice.randbytes(size) + data[at:]
        case _:
            return (
                data[:at]
                + choice.choice((b"\r\n", b"\n", b"\r", b"\0", b" ", b":", b"\r\n\r\n", b"\xff", b"%", b'"'))
                + data[at:]
            )


def _method(choice: random.Random, made: Draft) -> None:
    made.method = choice.choice(values.METHODS)


def _version(choice: random.Random, made: Draft) -> None:
    made.version = choice.choice(values.VERSIONS)


def _target(choice: random.Random, made: Draft) -> None:
    if choice.random() < 0.5:
        made.target = choice.choice(values.TARGETS)
    else:
        made.target = damage(choice, made.target.encode("utf-8", "surrogateescape")).decode("utf-8", "surrogateescape")


def _length(choice: random.Random, made: Draft) -> None:
    made.length = choice.choice(values.LENGTHS)


def _coding(choice: random.Random, made: Draft) -> None:
    made.headers.append((b"transfer-encoding", choice.choice(values.CODINGS)))


def _chunks(choice: random.Random, made: Draft) -> None:
    made.headers.append((b"transfer-encoding", b"chunked"))
    made.body = choice.choice(values.CHUNKS)
    made.length = None


def _header(choice: random.Random, made: Draft) -> None:
    made.headers.insert(
        choice.randrange(len(made.headers) + 1), (choice.choice(values.NAMES), choice.choice(values.VALUES))
    )


def _headers(choice: random.Random, made: Draft) -> None:
    match choice.randrange(6):
        case 0:
            made.headers *= choice.choice((2, 3))
        case 1:
            made.headers += [(b"x-%d" % number, b"v") for number in range(choice.choice((100, 3_000)))]
        case 2 if made.headers:
            made.headers.pop(choice.randrange(len(made.headers)))
        case 3:
            made.headers.append((choice.randbytes(3), b"v"))
        case 4:
            made.headers.append((b"x-long", b"v" * choice.choice((8_000, 70_000))))
        case _:
            name, value = made.headers.pop() if made.headers else (b"x-more", b"v")
            made.headers.append((damage(choice, name), damage(choice, value)))


def _json(choice: random.Random, made: Draft) -> None:
    """Put something else into one place of a value; or take it out, or add to it."""
    places = _places(made.value)
    if not places:
        made.value = _nasty(choice)
        return
    holder, key = choice.choice(places)
    match choice.randrange(4):
        case 0 if isinstance(holder, dict):
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[choice.choice(values.FIELDS)] = _nasty(choice)
        case _:
            holder[key] = _nasty(choice)


def _nasty(choice: random.Random) -> Any:
    return deepcopy(choice.choice(values.NASTY))  # it may be changed in its turn


def _places(value: Any) -> list[tuple[Any, Any]]:
    keys: list[Any] = []
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    return [(value, key) for key in keys] + [place for key in keys for place in _places(value[key])]


def _body(choice: random.Random, made: Draft) -> None:
    made.body = choice.choice(values.BODIES)


def _damaged_body(choice: random.Random, made: Draft) -> None:
    made.body = damage(choice, json.dumps(made.value).encode())


_ALL = (
    _method,
    _version,
    _target,
    _target,
    _length,
    _coding,
    _chunks,
    _header,
    _header,
    _header,
    _header,
    _headers,
    _headers,
    _json,
    _json,
    _json,
    _json,
    _json,
    _body,
    _body,
    _damaged_body,
    _damaged_body,
)
