"""What makes a valid request a malformed one: on the level of HTTP, of headers, of JSON, of bytes."""

import json
import random
from copy import deepcopy
from typing import Any

from tests.fuzz.drafts import Draft

FRAMES_SHARE = 0.6  # of mutations, where there are frames

_METHODS = (
    "GET",
    "POST",
    "PUT",
    "DELETE",
    "PATCH",
    "TRACE",
    "CONNECT",
    "PRI",
    "get",
    "FOO",
    "",
    "P OST",
    "M-SEARCH",
    "\0",
)
_VERSIONS = ("1.0", "0.9", "2.0", "1.2", "11", "", "1.1 ", "x", "1.1\r\nhost: u", "9" * 40)
_LENGTHS = (
    b"0",
    b"1",
    b"-1",
    b"+5",
    b"1 0",
    b"0x10",
    b"99999999",
    b"9" * 19,
    b"9" * 40,
    b"",
    b"5, 5",
    b"5,6",
    b"\xff",
    b"1e3",
)
_CODINGS = (
    b"chunked",
    b"gzip",
    b"gzip, chunked",
    b"chunked, chunked",
    b"identity",
    b"",
    b"xchunked",
    b"Chunked ",
    b"\x00",
)
_CHUNKS = (
    b"zz\r\nabc\r\n0\r\n\r\n",
    b"5\r\nabc\r\n0\r\n\r\n",
    b"-1\r\n\r\n",
    b"ffffffffffffffff1\r\n",
    b"3;" + b"x" * 5_000 + b"\r\nabc\r\n0\r\n\r\n",
    b"3\nabc\n0\n\n",
    b"2\r\n{}\r\n0\r\nname: " + b"t" * 70_000 + b"\r\n\r\n",
    b"2\r\n{}\r\n0\r\nbad trailer\r\n\r\n",
    b"1\r\n{\r\n" * 2_000 + b"0\r\n\r\n",
    b"0\r\n\r\n",
)
_TARGETS = ("*", "", "//", "/%", "/%00", "/%ff%fe", "/run_remote%0a", "/run_remote/", "/../run_remote", "/run_remote?" + "a=b&" * 2_000,
    "http://t/run_remote", "http://[::1/run_remote", "t:80", "/" + "a" * 70_000, "/\udcff\udcfe", "/run_remote#x", "/a b", "/\x01",
    "/async_request/", "/async_request/x", "/async_request/" + "A" * 48, "/async_request/" + "-" * 48 + "/events", "/v1/", "/v1/models/%2e%2e/x",
    "/async_request/%C3%A4/events?starting_after=%FF", "/v1/chat/completions/", "/v1/models/" + "%41" * 500)  # fmt: skip
_NAMES = (b"prefer", b"idempotency-key", b"last-event-id", b"accept", b"content-type", b"content-encoding", b"expect", b"host",
    b"authorization", b"x-api-key", b"x-request-timeout", b"chains-affinity-key", b"traceparent", b"tracestate", b"origin",
    b"access-control-request-method", b"upgrade", b"connection", b"content-length", b"transfer-encoding", b"x-request-id",
    b"sec-websocket-version", b"sec-websocket-key", b"sec-websocket-protocol", b"sec-websocket-extensions", b"cookie", b"range", b"te")  # fmt: skip
_VALUES = (
    b"", b" ", b"0", b"-1", b"1", b"2.5", b"1e9", b"nan", b"999999999", b"9" * 30, b"wait", b"wait=", b"wait=0.01", b"wait=-1", b"wait=1e9",
    b"resume=0", b"resume=1", b"resume=abc", b"wait=1, resume=1;x", b"respond-async", b"k1", b"k2", b"k3", b"k" * 255, b"k" * 256,
    b"k" * 70_000, b"\xff\xfe", b"\xc3", b"\xc3\xa4", b"a\tb", b"\x01", b"\x7f", b"a,b;q=", b"*/*;q=0", b"text/*;q=2", b"text/plain;q=0.5,*/*;q=x",
    b"text/event-stream", b"text/event-stream;q=0", b"application/x-ndjson", b",,,", b"\"", b"a/b/c", b"application/json; charset=utf-16",
    b"application/json;;;", b"text/plain", b"gzip", b"100-continue", b"Bearer", b"Bearer ck_x", b"Bearer \xff", b"Basic Og==", b"close", b"keep-alive",
    b"websocket", b"h2c", b"13", b"12", b"Upgrade", b"chunked", b"https://fuzz.invalid", b"null", b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01", b"00-x",
    b"q=" * 400, b"bytes=0-", b"0.001", b"0.02", b"true", "١".encode(),
)  # fmt: skip
_NASTY: tuple[Any, ...] = (None, True, False, 0, -1, 1, 10, 2**31, 2**63, -(2**63) - 1, 2**64, 10**400, 1.5, -0.0, 1e308, float("nan"),
    float("inf"), "", "x", "x" * 41, "x" * 5_000, "\0", "\ud800", "ä€😀", "2026-13-45T99:99:99Z", "AAE", "!!", [], {}, [[]], {"": None}, [None] * 9,
    ["x"] * 300, {"type": "text"}, {"type": "nothing", "text": 1}, "null", "1", [1, "1"], {"a": {"a": {"a": {}}}})  # fmt: skip
_FIELDS = ("", "x", "stream", "model_input", "webhook_endpoint", "priority", "type")
_BODIES = (b"", b" ", b"{", b"}", b"[]", b"null", b"1", b'"', b'"x"', b"\xef\xbb\xbf{}", b"\xff\xfe{\0}\0", b'{"a":1,}', b"{'a':1}", b'{"order":NaN}',
    b'{"order":1e999}', b'{"order":"\xff"}', b'{"order":"\\ud800"}', b'{"order":' + b"9" * 5_000 + b"}", b"[" * 100_000, b'{"order":' * 20_000,
    b"[" * 500 + b"]" * 500, b'{"order":{"lines":[' + b'{"name":"a","parts":[' * 3_000 + b"]}" * 3_000 + b"]}}", b"x" * 200_000, b"\0" * 1_000,
    b'{"order":{},"order":{}}', b'{"model_input":' + b"[" * 5_000, b'{"model_input":{}}', b'{"model_input":null,"priority":9}',
    b"--b\r\ncontent-disposition: form-data\r\n\r\n1\r\n--b--", b'{"messages":[]}', b'{"input":' + b"[" * 900 + b"]" * 900 + b"}")  # fmt: skip


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
    made.method = choice.choice(_METHODS)


def _version(choice: random.Random, made: Draft) -> None:
    made.version = choice.choice(_VERSIONS)


def _target(choice: random.Random, made: Draft) -> None:
    if choice.random() < 0.5:
        made.target = choice.choice(_TARGETS)
    else:
        made.target = damage(choice, made.target.encode("utf-8", "surrogateescape")).decode("utf-8", "surrogateescape")


def _length(choice: random.Random, made: Draft) -> None:
    made.length = choice.choice(_LENGTHS)


def _coding(choice: random.Random, made: Draft) -> None:
    made.headers.append((b"transfer-encoding", choice.choice(_CODINGS)))


def _chunks(choice: random.Random, made: Draft) -> None:
    made.headers.append((b"transfer-encoding", b"chunked"))
    made.body = choice.choice(_CHUNKS)
    made.length = None


def _header(choice: random.Random, made: Draft) -> None:
    made.headers.insert(choice.randrange(len(made.headers) + 1), (choice.choice(_NAMES), choice.choice(_VALUES)))


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
            holder[choice.choice(_FIELDS)] = _nasty(choice)
        case _:
            holder[key] = _nasty(choice)


def _nasty(choice: random.Random) -> Any:
    return deepcopy(choice.choice(_NASTY))  # it may be changed in its turn


def _places(value: Any) -> list[tuple[Any, Any]]:
    keys: list[Any] = []
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    return [(value, key) for key in keys] + [place for key in keys for place in _places(value[key])]


def _body(choice: random.Random, made: Draft) -> None:
    made.body = choice.choice(_BODIES)


def _damaged_body(choice: random.Random, made: Draft) -> None:
    made.body = damage(choice, json.dumps(made.value).encode())


_ALL = (_method, _version, _target, _target, _length, _coding, _chunks, _header, _header, _header, _header, _headers, _headers,
    _json, _json, _json, _json, _json, _body, _body, _damaged_body, _damaged_body)  # fmt: skip
