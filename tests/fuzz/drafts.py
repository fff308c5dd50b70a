"""Valid requests for every route: what mutations begin with."""

import json
import random
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from tests.fuzz.server import KEY

ORDERS, TALK, KEYED, SOCKET = range(4)  # the servers, in the order of their URLs

_JSON = "application/json"
TEXT = 1
_OPCODES = (TEXT, 2, 9, 10)
_SIZES = (0, 1, 5, 125, 126, 300)
_FORMS = (
    "*/*",
    "text/event-stream",
    "application/x-ndjson",
    "text/plain",
    "application/json",
    "application/octet-stream",
)
ORDER = {
    "lines": [{"name": "tea", "price": 2.5, "parts": [{"name": "leaf"}]}, {"name": "milk"}],
    "kind": "again",
    "count": 2,
    "at": "2026-05-04T03:02:01Z",
    "seal": "AAEC",
    "marks": {"a": 1, "b": None},
}
CHAT = {
    "model": "answer",
    "messages": [
        {"role": "system", "content": "The office opens at nine. Parking is behind the house."},
        {"role": "user", "content": [{"type": "text", "text": "When does the office open?"}]},
    ],
    "n": 1,
    "temperature": 0.5,
    "stop": ["."],
    "max_tokens": 8,
    "stream": False,
    "stream_options": {"include_usage": True},
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
}
_EMBED = {"model": "embed", "input": ["tea", "milk"], "encoding_format": "float", "dimensions": 16}
_SUBMISSION = {
    "model_input": {"order": ORDER, "note": "n"},
    "priority": 1,
    "max_time_in_queue_seconds": 5,
    "inference_retry_config": {"max_attempts": 1, "initial_delay_ms": 0, "max_delay_ms": 0},
}


@dataclass
class Draft:
    """A request before it is written: each part can be made wrong. `value` is a body that is JSON."""

    method: str
    target: str
    value: Any = None
    version: str = "1.1"
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes | None = None
    chunked: bool = False
    length: bytes | None = None  # instead of the true one
    frames: bytes = b""  # of a WebSocket, sent behind it
    server: int = ORDERS

    def write(self) -> bytes:
        body = self.body
        if body is None:
            body = b"" if self.value is None else json.dumps(self.value).encode()
        lines = [f"{self.method} {self.target} HTTP/{self.version}".encode("utf-8", "surrogateescape")]
        lines += [b"%b: %b" % header for header in self.headers]
        if self.chunked:
            lines.append(b"transfer-encoding: chunked")
            body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in _halves(body)) + b"0\r\n\r\n"
        elif body or self.length is not None:
            lines.append(b"content-length: " + (b"%d" % len(body) if self.length is None else self.length))
        return b"\r\n".join([*lines, b"", b""]) + body + self.frames


def draft(choice: random.Random, ids: Sequence[str]) -> Draft:
    """Choose a valid request; `ids` are of requests that there were, some for each server."""
    server = choice.choice((ORDERS, TALK, KEYED, SOCKET))
    own = _OWN.get(server, _of_any) if choice.random() < OWN_SHARE else _of_any
    made = choice.choice(own)(choice, ids[server], server)
    made.server = server
    made.value = deepcopy(made.value)
    made.headers.append((b"host", b"t"))
    if made.value is not None:
        made.headers.append((b"content-type", _JSON.encode()))
        made.chunked = choice.random() < 0.1
    if server == KEYED and choice.random() < 0.9:
        made.headers.append((b"authorization", f"Bearer {KEY}".encode()))
    if choice.random() < 0.2:
        made.headers.append((b"accept", choice.choice(_FORMS).encode()))
    return made


def _arguments(server: int) -> dict[str, Any]:
    return {"request": CHAT} if server == TALK else {"order": ORDER, "note": "n"}


def _run(choice: random.Random, text: str, server: int) -> Draft:
    return Draft("POST", "/run_remote", _arguments(server))


def _submit(choice: random.Random, text: str, server: int) -> Draft:
    wrapped = {**_SUBMISSION, "model_input": _arguments(server)}
    return Draft("POST", "/async_run_remote", wrapped if choice.random() < 0.7 else _arguments(server))


def _ask(choice: random.Random, text: str, server: int) -> Draft:
    made = Draft(choice.choice(("GET", "GET", "DELETE")), f"/async_request/{text}")
    if choice.random() < 0.3:
        made.headers.append((b"prefer", b"wait=1"))
    return made


def _events(choice: random.Random, text: str, server: int) -> Draft:
    made = Draft("GET", f"/async_request/{text}/events")
    if choice.random() < 0.5:
        made.target += f"?starting_after={choice.randrange(4)}"
    else:
        made.headers.append((b"last-event-id", b"%d" % choice.randrange(4)))
    return made


def _plain(choice: random.Random, text: str, server: int) -> Draft:
    paths = (
        "/healthz",
        "/readyz",
        "/metrics",
        "/openapi.json",
        "/docs",
        "/async_queue_status",
        "/v1/models",
        "/nowhere",
    )
    return Draft(choice.choice(("GET", "GET", "GET", "HEAD", "OPTIONS")), choice.choice(paths))


def _socket(choice: random.Random, text: str, server: int) -> Draft:
    headers = [
        (b"upgrade", b"websocket"),
        (b"connection", b"Upgrade"),
        (b"sec-websocket-version", b"13"),
        (b"sec-websocket-key", b"dGhlIHNhbXBsZSBub25jZQ=="),
    ]
    frames = [_frame(choice, choice.choice(_OPCODES), choice.randbytes(choice.choice(_SIZES))) for _ in range(3)]
    closing = _frame(choice, 8, b"\x03\xe8end")
    return Draft("GET", "/websocket", headers=headers, frames=b"".join([*frames, closing]))


def _cross(choice: random.Random, text: str, server: int) -> Draft:
    headers = [
        (b"origin", choice.choice((b"https://fuzz.invalid", b"https://other.invalid"))),
        (b"access-control-request-method", b"POST"),
        (b"access-control-request-headers", b"content-type, authorization"),
    ]
    return Draft("OPTIONS", "/run_remote", headers=headers)


def _chat(choice: random.Random, text: str, server: int) -> Draft:
    return Draft("POST", "/v1/chat/completions", {**CHAT, "stream": choice.random() < 0.4})


def _embed(choice: random.Random, text: str, server: int) -> Draft:
    value = {**_EMBED, "encoding_format": choice.choice(("float", "base64"))}
    return Draft("POST", "/v1/embeddings", value)


def _models(choice: random.Random, text: str, server: int) -> Draft:
    return Draft("GET", choice.choice(("/v1/models", "/v1/models/answer", "/v1/models/none", "/v1/completions")))


_of_any = (_run, _run, _submit, _submit, _ask, _ask, _events, _plain, _plain, _socket, _cross)
_of_talk = (_chat, _chat, _embed, _models)
_OWN = {TALK: _of_talk, SOCKET: (_socket,)}
OWN_SHARE = 0.7  # of requests to a server that only it takes


def _frame(choice: random.Random, opcode: int, data: bytes) -> bytes:
    """Write a frame as a client does, of which text is none but ASCII."""
    if opcode == TEXT:
        data = bytes(byte & 0x7F for byte in data)
    mask = choice.randbytes(4)
    size = len(data)
    extended = b"" if size < 126 else size.to_bytes(2 if size < 1 << 16 else 8)
    head = bytes([0x80 | opcode, 0x80 | {0: size, 2: 126, 8: 127}[len(extended)]])
    return head + extended + mask + bytes(byte ^ mask[at % 4] for at, byte in enumerate(data))


def _halves(body: bytes) -> list[bytes]:
    middle = len(body) // 2
    return [part for part in (body[:middle], body[middle:]) if part]
