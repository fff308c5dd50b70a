"""A stream as HTTP: server-sent events, one JSON a line, or the chunks as they are.

Chunks go to the socket as soon as they are there. While the socket is busy they gather in the call, and go out
together; when they fill its window the caller returns no credit, and the stream stops at its source.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Annotated, Any, Protocol, get_args, get_origin

import msgspec

from chains_stream.codec import Buffer, Codec
from chains_stream.errors import InvalidResultError
from chains_stream.gateway.exchange import PIECE, Exchange, Header
from chains_stream.gateway.negotiation import choose
from chains_stream.gateway.problems import Refusal

HEARTBEAT = 15.0  # seconds of silence until a comment keeps proxies from closing the connection
LOOKS = 8  # in that time, at all streams
CHOICES = 100  # different headers `accept` whose choice is remembered: clients of one kind send the same
CHOICE_BYTES = 256
RETRY_MS = 1000  # until a client of server-sent events connects again

EVENTS = "text/event-stream"
LINES = "application/x-ndjson"
TEXT = "text/plain"
OCTETS = "application/octet-stream"
JSON = "application/json"

# JSON may hold them, and many clients take them for the end of a line; within JSON only strings have them.
_LINE_ENDS = ((b"\xc2\x85", b"\\u0085"), (b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"))


class Form(Protocol):
    """How a stream is written. All but `failure` give what is sent at that point, which may be nothing."""

    headers: tuple[Header, ...]
    head: bytes
    heartbeat: bytes

    def chunk(self, sequence: int, value: Buffer) -> bytes:
        """Write a chunk, which is msgpack. Raises InvalidResultError."""

    def end(self, chunks: int) -> bytes: ...

    def failure(self, problem: bytes) -> bytes | None:
        """Write a problem, which is JSON; None if the form can't tell of one."""


class Events:
    """Server-sent events (WHATWG HTML, section 9.2): chunks are messages, then comes one of ``done`` and ``error``."""

    head = b"retry: %d\n\n" % RETRY_MS
    heartbeat = b":\n\n"

    def __init__(self, codec: Codec) -> None:
        self.headers = stream_headers(EVENTS)
        self._to_json = json_writer(codec)

    def chunk(self, sequence: int, value: Buffer) -> bytes:
        return b"id: %d\ndata: %b\n\n" % (sequence, one_line(self._to_json(value)))

    def end(self, chunks: int) -> bytes:
        return b'event: done\ndata: {"chunks":%d}\n\n' % chunks

    def failure(self, problem: bytes) -> bytes:
        return b"event: error\ndata: %b\n\n" % one_line(problem)


class Lines:
    """Newline-delimited JSON; a failure is a last line ``{"error": …}``."""

    head = heartbeat = b""

    def __init__(self, codec: Codec) -> None:
        self.headers = stream_headers(LINES)
        self._to_json = json_writer(codec)

    def chunk(self, sequence: int, value: Buffer) -> bytes:  # noqa: ARG002 - Form's
        return b"%b\n" % one_line(self._to_json(value))

    def end(self, chunks: int) -> bytes:  # noqa: ARG002 - Form's
        return b""

    def failure(self, problem: bytes) -> bytes:
        return b'{"error":%b}\n' % one_line(problem)


class Raw:
    """Chunks of ``str`` as UTF-8, of ``bytes`` as they are, and nothing between them."""

    head = heartbeat = b""

    def __init__(self, codec: Codec, media_type: str) -> None:
        self.headers = stream_headers(f"{TEXT}; charset=utf-8" if media_type == TEXT else media_type)
        self._decode = codec.decode_result

    def chunk(self, sequence: int, value: Buffer) -> bytes:  # noqa: ARG002 - Form's
        chunk = self._decode(value)
        return chunk.encode() if isinstance(chunk, str) else bytes(chunk)

    def end(self, chunks: int) -> bytes:  # noqa: ARG002 - Form's
        return b""

    def failure(self, problem: bytes) -> None:  # noqa: ARG002 - Form's
        return None


def json_writer(codec: Codec) -> Callable[[Buffer], bytes]:
    """Give what validates a chunk that is msgpack and writes it as JSON, the quick way for text.

    Raises InvalidResultError.
    """
    if _raw_type(codec.signature.result) != TEXT:
        return codec.result_to_json
    decode = msgspec.msgpack.Decoder(codec.signature.result).decode
    encode = msgspec.json.Encoder().encode

    def write(value: Buffer) -> bytes:
        try:
            return encode(decode(value))
        except Exception:  # noqa: BLE001 - the slow way says what is wrong
            return codec.result_to_json(value)

    return write


def stream_headers(content_type: str) -> tuple[Header, ...]:
    """Give the headers of a stream."""
    return (
        (b"content-type", content_type.encode()),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),  # keeps nginx from holding chunks back
    )


def media_types(codec: Codec) -> list[str]:
    """Give what a stream can be had as, the default first."""
    raw = _raw_type(codec.signature.result)
    return [raw, EVENTS, LINES] if raw else [LINES, EVENTS]


def form_of(media_type: str, codec: Codec) -> Form:
    """Give the form for one of `media_types`."""
    if media_type == EVENTS:
        return Events(codec)
    return Lines(codec) if media_type == LINES else Raw(codec, media_type)


class Forms:
    """The forms that the answers of one Chainlet can be had in."""

    def __init__(self, codec: Codec, offered: Sequence[str] | None = None) -> None:
        """Offer the `media_types` of a Chainlet, or others, the default first."""
        if offered is None:
            offered = media_types(codec) if codec.signature.streaming else [JSON]
        self.media_types = tuple(offered)
        self._forms = {kind: form_of(kind, codec) for kind in offered if kind != JSON}
        self._choices: dict[bytes, str] = {}

    def choose(self, accept: bytes) -> Form | None:
        """Choose by the header `accept` how to write a stream; None for a unary result. Raises Refusal."""
        chosen = self._choices.get(accept)
        if chosen is None:
            chosen = self._choose(accept.decode("latin-1"))
            if len(accept) <= CHOICE_BYTES and len(self._choices) < CHOICES:
                self._choices[accept] = chosen
        return self._forms.get(chosen)

    def _choose(self, accept: str) -> str:
        chosen = choose(accept, self.media_types)
        if chosen is None and choose(accept, [JSON]):
            # `curl --json` and many libraries ask for it whatever they call; no stream can be had so, and the client
            # sees by the content type what it got.
            chosen = self.media_types[0]
        if chosen is None:
            raise Refusal(
                HTTPStatus.NOT_ACCEPTABLE,
                "not-acceptable",
                f"the answer can be had as {', '.join(self.media_types)}, and `accept` allows none of these",
                offered=list(self.media_types),
            )
        return chosen


class Source(Protocol):
    """What a stream is made of: see `answers.Answer`."""

    @property
    def chunks(self) -> int: ...

    async def next(self) -> list[msgspec.Raw] | None: ...

    def nudge(self) -> None: ...


class Stream:
    """One stream on its way to a client; `first` is the number of its first chunk."""

    __slots__ = ("_call", "_exchange", "_form", "_pulse", "_sequence", "_waits", "_written")

    def __init__(self, exchange: Exchange, call: Source, form: Form, pulse: "Pulse", first: int = 0) -> None:
        self._exchange = exchange
        self._call = call
        self._form = form
        self._pulse = pulse
        self._sequence = first
        self._written = 0.0  # when something last was
        self._waits = False  # for chunks

    @property
    def sequence(self) -> int:
        """The number of the next chunk."""
        return self._sequence

    async def go_on(self, source: Source) -> None:
        """Answer with the rest of the stream, from elsewhere, after `run` has raised."""
        self._call = source
        if self._exchange.started and self._form.heartbeat:
            self._pulse.add(self)
        await self.run()

    async def run(self, *, at_once: bool = False) -> None:
        """Answer with the stream. What fails before the first chunk is raised before the answer has begun.

        Unless it begins `at_once`: then the client knows that it is heard, however long the first chunk takes.
        """
        call, form = self._call, self._form
        try:
            if at_once:
                await self._write(b"")
                self._waits = True
            while (chunks := await call.next()) is not None:
                self._waits = False
                await self._pass_on(chunks)
                self._waits = True
        finally:
            self._pulse.streams.discard(self)
        data = form.end(call.chunks)
        if not self._exchange.started:
            await self._start()
            data = form.head + data
        await self._exchange.finish(data)

    def beat(self, now: float, silence: float) -> None:
        """Have something written if nothing was for so many seconds."""
        if self._waits and now - self._written >= silence:
            self._call.nudge()

    async def _pass_on(self, chunks: list[msgspec.Raw]) -> None:
        """Write chunks, those that are there at once together; none are a heartbeat."""
        form, sequence = self._form, self._sequence
        parts: list[bytes] = []
        size = 0
        try:
            for chunk in chunks:
                part = form.chunk(sequence, chunk)
                sequence += 1
                parts.append(part)
                size += len(part)
                if size >= PIECE:
                    await self._write(b"".join(parts))
                    parts.clear()
                    size = 0
        except InvalidResultError:
            if parts:  # those before it are good
                await self._write(b"".join(parts))
            raise
        finally:
            self._sequence = sequence
        if parts or not chunks:
            await self._write(b"".join(parts) or form.heartbeat)

    async def _write(self, data: bytes) -> None:
        if not self._exchange.started:
            await self._start()
            data = self._form.head + data
            if self._form.heartbeat:
                self._pulse.add(self)
        await self._exchange.write(data)
        self._written = time.monotonic()

    async def _start(self) -> None:
        self._exchange.tell = self._form.failure
        await self._exchange.start(HTTPStatus.OK, *self._form.headers)
        self._exchange.forget_request()


class Pulse:
    """Keeps silent streams alive: one timer looks at all of them, for as long as there are any."""

    def __init__(self) -> None:
        self.streams: set[Stream] = set()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, stream: Stream) -> None:
        self.streams.add(stream)
        if self._timer is None:
            self._wait()

    def _wait(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(HEARTBEAT / LOOKS, self._look)

    def _look(self) -> None:
        self._timer = None
        if not self.streams:
            return
        now = time.monotonic()
        for stream in self.streams:
            stream.beat(now, HEARTBEAT * (1 - 1 / LOOKS))
        self._wait()


def bare(kind: Any) -> Any:
    """Give a type without what is noted of it: constraints, a name."""
    while True:
        if get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
        elif hasattr(kind, "__supertype__"):  # of NewType
            kind = kind.__supertype__
        elif hasattr(kind, "__value__"):  # of `type X = …`
            kind = kind.__value__
        else:
            return kind


def _raw_type(kind: Any) -> str | None:
    """Give the media type of chunks that are text or bytes whatever they hold, or None."""
    kind = bare(kind)
    if kind is str:
        return TEXT
    return OCTETS if kind in (bytes, bytearray, memoryview) else None


def one_line(data: bytes) -> bytes:
    """Give JSON in which nothing ends a line, whatever a client takes for the end of one."""
    if not data.isascii():
        for end, escaped in _LINE_ENDS:
            data = data.replace(end, escaped)
    return data
