"""What came back, read strictly: well-formed HTTP/1.1, and problem details wherever a request failed."""

import json
import re
from typing import Any, NamedTuple

from wsproto.connection import Connection, ConnectionType
from wsproto.utilities import ProtocolError

from chains_stream.gateway.problems import MEDIA_TYPE

# What a request may be answered with: no 500, and nothing that stands for a failure of the Chain, for it has none.
EXPECTED = {
    101,
    200,
    202,
    204,
    400,
    401,
    403,
    404,
    405,
    406,
    408,
    409,
    410,
    413,
    415,
    422,
    426,
    429,
    431,
    499,
    501,
    504,
}

_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) [ -~]*")
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+): ?([\t -~\x80-\xff]*)")
_CHUNK = re.compile(rb"([0-9a-f]{1,8})\r\n")
_ONCE = (b"content-length", b"content-type", b"date", b"transfer-encoding", b"x-request-id", b"location")
_BODILESS = (204, 304)
_CONTINUE = 100
SWITCHING = 101
_WELL = 300
_NEEDED = {405: [b"allow"], 426: [b"upgrade"], 429: [b"retry-after"], 503: [b"retry-after"]}  # headers


class WrongError(Exception):
    """An answer is not what it should be."""


class Answer(NamedTuple):
    status: int
    headers: dict[bytes, bytes]
    body: bytes
    whole: bool  # else it was cut short by the end of the connection


def read(data: bytes, *, head: bool, ended: bool) -> list[Answer]:
    """Give the answers that are there; an incomplete one only once the connection has ended. Raises WrongError.

    `head` tells that the requests were of HEAD.
    """
    found: list[Answer] = []
    while data:
        answer, data = _one(data, bodiless=head, ended=ended)
        if answer is None:
            break
        if answer.status != _CONTINUE:
            found.append(answer)
    return found


def _one(data: bytes, *, bodiless: bool, ended: bool) -> tuple[Answer | None, bytes]:
    top, mark, rest = data.partition(b"\r\n\r\n")
    if not mark:
        if ended:
            raise WrongError(f"half a head: {top[:200]!r}")
        return None, data
    line, *lines = top.split(b"\r\n")
    started = _STATUS.fullmatch(line)
    if started is None:
        raise WrongError(f"no status line: {line[:200]!r}")
    status = int(started[1])
    headers = _headers(lines)
    if status == _CONTINUE:
        return Answer(status, headers, b"", whole=True), rest
    if status == SWITCHING:  # what follows are frames
        return Answer(status, headers, rest, whole=True), b""
    if bodiless or status in _BODILESS:
        # A request that is none is answered before its method is known, and then the connection is closed.
        return Answer(status, headers, b"", whole=True), b"" if b"close" in headers.get(b"connection", b"") else rest
    body, rest, whole = _body(headers, rest, ended=ended)
    if not whole and not ended:
        return None, data
    return Answer(status, headers, body, whole), rest


def _headers(lines: list[bytes]) -> dict[bytes, bytes]:
    headers: dict[bytes, bytes] = {}
    for line in lines:
        found = _HEADER.fullmatch(line)
        if found is None:
            raise WrongError(f"no header: {line[:200]!r}")
        name = found[1].lower()
        if name in headers and name in _ONCE:
            raise WrongError(f"twice: {name!r}")
        headers[name] = b", ".join([headers[name], found[2]]) if name in headers else found[2]
    return headers


def _body(headers: dict[bytes, bytes], rest: bytes, *, ended: bool) -> tuple[bytes, bytes, bool]:
    """Give the body, what follows it, and whether it is whole."""
    length = headers.get(b"content-length")
    if headers.get(b"transfer-encoding") == b"chunked":
        if length is not None:
            raise WrongError("a length and chunks")
        return _chunked(rest)
    if length is not None:
        size = int(length)
        return rest[:size], rest[size:], len(rest) >= size
    if b"close" not in headers.get(b"connection", b""):
        raise WrongError("nothing tells where the body ends")
    return rest, b"", ended


def _chunked(data: bytes) -> tuple[bytes, bytes, bool]:
    body, at = bytearray(), 0
    while (found := _CHUNK.match(data, at)) is not None:
        size, start = int(found[1], 16), found.end()
        at = start + size + 2
        if len(data) < at:
            break
        if data[at - 2 : at] != b"\r\n":
            raise WrongError("a chunk is not as long as it says")
        if size == 0:
            return bytes(body), data[at:], True
        body += data[start : start + size]
    else:
        if len(data) - at > 10:
            raise WrongError(f"no chunk: {data[at : at + 50]!r}")
    return bytes(body), b"", False


def judge(answer: Answer, *, head: bool, of_openai: bool) -> None:
    """Check what an answer says. `of_openai`: it may be of a route of OpenAI's API. Raises WrongError."""
    status, headers = answer.status, answer.headers
    if status not in EXPECTED:
        raise WrongError(f"the status {status}: {answer.body[:500]!r}")
    if status == SWITCHING:
        _judge_frames(answer.body)
        return
    for name in (b"date", b"x-request-id", *_NEEDED.get(status, ())):
        if not headers.get(name):
            raise WrongError(f"{status} without {name!r}")
    if head:
        return
    kind = headers.get(b"content-type", b"")
    if status >= _WELL:
        _judge_problem(answer, kind, of_openai=of_openai)
    elif answer.whole:
        _judge_content(kind, answer.body)


def _judge_content(kind: bytes, body: bytes) -> None:
    if kind == b"application/json":
        _parse(body)
    elif kind.startswith(b"application/x-ndjson"):
        for line in body.splitlines():
            _parse(line)


def _judge_frames(data: bytes) -> None:
    reader = Connection(ConnectionType.CLIENT)
    try:
        reader.receive_data(data)
        for _ in reader.events():
            pass
    except ProtocolError as error:
        raise WrongError(f"no frames of a WebSocket: {error}: {data[:200]!r}") from error


def _judge_problem(answer: Answer, kind: bytes, *, of_openai: bool) -> None:
    told = _parse(answer.body)
    if kind == MEDIA_TYPE.encode():
        if (
            told.get("status") != answer.status
            or told.get("request_id", "").encode() != answer.headers[b"x-request-id"]
        ):
            raise WrongError(f"a problem that does not fit its answer: {told}")
        if not all(told.get(name) for name in ("title", "detail", "code")):
            raise WrongError(f"a problem that says too little: {told}")
    elif not (of_openai and kind == b"application/json" and told.get("error", {}).get("message")):
        raise WrongError(f"no problem details: {kind!r} {answer.body[:200]!r}")


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body, parse_constant=_no_constant)
    except ValueError as error:
        raise WrongError(f"no JSON: {body[:200]!r}: {error}") from error


def _no_constant(name: str) -> None:
    raise WrongError(f"{name} in JSON")
