"""A stream as HTTP: server-sent events, one JSON a line, or the chunks as they are.

Chunks go to the socket as soon as they are there. While the socket is busy they gather in an `Outbox`, and go out
together; when that is full nothing more is read, the caller returns no credit, and the stream stops at its source.
"""

import asyncio
from typing import Annotated, Any, Protocol, get_args, get_origin

from chains_stream.calls import Call
from chains_stream.codec import Buffer, Codec
from chains_stream.gateway.exchange import Exchange

OUTBOX_BYTES = 64 << 10  # of one stream that wait for its socket: about what fits into the socket's own buffer
HEARTBEAT = 15.0  # seconds of silence until a comment keeps proxies from closing the connection
RETRY_MS = 1000  # until a client of server-sent events connects again

EVENTS = "text/event-stream"
LINES = "application/x-ndjson"
TEXT = "text/plain"
OCTETS = "application/octet-stream"

# JSON may hold them, and many clients take them for the end of a line; within JSON only strings have them.
_LINE_ENDS = ((b"\xc2\x85", b"\\u0085"), (b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"))


class Form(Protocol):
    """How a stream is written. All but `failure` give what is sent at that point, which may be nothing."""

    content_type: str
    head: bytes
    heartbeat: bytes

    def chunk(self, sequence: int, value: Buffer) -> bytes:
        """Write a chunk, which is msgpack. Raises InvalidResultError."""

    def end(self, chunks: int) -> bytes: ...

    def failure(self, problem: bytes) -> bytes | None:
        """Write a problem, which is JSON; None if the form can't tell of one."""


class Events:
    """Server-sent events (WHATWG HTML, section 9.2): chunks are messages, then comes one of ``done`` and ``error``."""

    content_type = EVENTS
    head = b"retry: %d\n\n" % RETRY_MS
    heartbeat = b":\n\n"

    def __init__(self, codec: Codec) -> None:
        self._codec = codec

    def chunk(self, sequence: int, value: Buffer) -> bytes:
        return b"id: %d\ndata: %b\n\n" % (sequence, _one_line(self._codec.result_to_json(value)))

    def end(self, chunks: int) -> bytes:
        return b'event: done\ndata: {"chunks":%d}\n\n' % chunks

    def failure(self, problem: bytes) -> bytes:
        return b"event: error\ndata: %b\n\n" % _one_line(problem)


class Lines:
    """Newline-delimited JSON; a failure is a last line ``{"error": …}``."""

    content_type = LINES
    head = heartbeat = b""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec

    def chunk(self, sequence: int, value: Buffer) -> bytes:  # noqa: ARG002 - Form's
        return b"%b\n" % _one_line(self._codec.result_to_json(value))

    def end(self, chunks: int) -> bytes:  # noqa: ARG002 - Form's
        return b""

    def failure(self, problem: bytes) -> bytes:
        return b'{"error":%b}\n' % _one_line(problem)


class Raw:
    """Chunks of ``str`` as UTF-8, of ``bytes`` as they are, and nothing between them."""

    head = heartbeat = b""

    def __init__(self, codec: Codec, media_type: str) -> None:
        self.content_type = f"{TEXT}; charset=utf-8" if media_type == TEXT else media_type
        self._codec = codec

    def chunk(self, sequence: int, value: Buffer) -> bytes:  # noqa: ARG002 - Form's
        chunk = self._codec.decode_result(value)
        return chunk.encode() if isinstance(chunk, str) else bytes(chunk)

    def end(self, chunks: int) -> bytes:  # noqa: ARG002 - Form's
        return b""

    def failure(self, problem: bytes) -> None:  # noqa: ARG002 - Form's
        return None


def media_types(codec: Codec) -> list[str]:
    """Give what a stream can be had as, the default first."""
    raw = _raw_type(codec.signature.result)
    return [raw, EVENTS, LINES] if raw else [LINES, EVENTS]


def form_of(media_type: str, codec: Codec) -> Form:
    """Give the form for one of `media_types`."""
    if media_type == EVENTS:
        return Events(codec)
    return Lines(codec) if media_type == LINES else Raw(codec, media_type)


class Outbox:
    """What one stream has to send: bounded, and taken as a whole."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._parts: list[bytes] = []
        self._size = 0
        self._ended = False
        self._filled = asyncio.Event()
        self._emptied = asyncio.Event()

    async def put(self, part: bytes) -> None:
        """Add a part; waits while there is more than the limit."""
        while self._size >= self._limit:
            self._emptied.clear()
            await self._emptied.wait()
        self._parts.append(part)
        self._size += len(part)
        self._filled.set()

    def end(self) -> None:
        self._ended = True
        self._filled.set()

    def nudge(self) -> None:
        """Have `take` return with nothing."""
        self._filled.set()

    async def take(self) -> bytes | None:
        """Wait for something, and give all there is. None at the end, and nothing after a nudge."""
        if not self._parts and not self._ended:
            self._filled.clear()
            await self._filled.wait()
        if not self._parts:
            return None if self._ended else b""
        taken = b"".join(self._parts)
        self._parts.clear()
        self._size = 0
        self._emptied.set()
        return taken


class Stream:
    """One stream on its way from a call to a client."""

    def __init__(self, exchange: Exchange, call: Call, form: Form) -> None:
        self._exchange = exchange
        self._call = call
        self._form = form
        self._outbox = Outbox(OUTBOX_BYTES)
        self._chunks = 0
        self._clock = asyncio.get_running_loop().time
        self._written = 0.0
        self._heart: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        """Answer with the stream. What fails before the first chunk is raised before the answer has begun."""
        form, exchange = self._form, self._exchange
        first = await self._next()
        await exchange.start(
            200,
            # The last one keeps nginx from holding chunks back.
            {"content-type": form.content_type, "cache-control": "no-cache", "x-accel-buffering": "no"},
        )
        if first is None:
            await exchange.finish(form.head + form.end(0))
            return
        await self._write(form.head + first)
        if form.heartbeat:
            self._beat()
        reading = asyncio.create_task(self._read(), name="read stream")
        try:
            while (data := await self._outbox.take()) is not None:
                await self._write(data or form.heartbeat)
        finally:
            reading.cancel()
            await asyncio.wait([reading])
            if self._heart is not None:
                self._heart.cancel()
        reading.result()  # raises what ended the stream, if it was no end
        await exchange.finish(form.end(self._chunks))

    async def _read(self) -> None:
        try:
            while (data := await self._next()) is not None:
                await self._outbox.put(data)
        finally:
            self._outbox.end()

    async def _next(self) -> bytes | None:
        chunks = await self._call.next()
        if chunks is None:
            return None
        first = self._chunks
        self._chunks += len(chunks)
        return b"".join([self._form.chunk(first + at, chunk) for at, chunk in enumerate(chunks)])

    async def _write(self, data: bytes) -> None:
        await self._exchange.write(data)
        self._written = self._clock()

    def _beat(self) -> None:
        """Have a heartbeat sent if it is due, and look again when the next one may be."""
        silent = self._clock() - self._written
        if silent >= HEARTBEAT:
            self._outbox.nudge()
            silent = 0.0
        self._heart = asyncio.get_running_loop().call_later(HEARTBEAT - silent, self._beat)


def _raw_type(kind: Any) -> str | None:
    """Give the media type of chunks that are text or bytes whatever they hold, or None."""
    while True:
        if get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
        elif hasattr(kind, "__supertype__"):  # of NewType
            kind = kind.__supertype__
        elif hasattr(kind, "__value__"):  # of `type X = …`
            kind = kind.__value__
        else:
            break
    if kind is str:
        return TEXT
    return OCTETS if kind in (bytes, bytearray, memoryview) else None


def _one_line(data: bytes) -> bytes:
    if not data.isascii():
        for end, escaped in _LINE_ENDS:
            data = data.replace(end, escaped)
    return data
