"""One HTTP/1 connection: httptools (Node's parser) reads it, and an ASGI app answers its requests.

Strict where two readings of one request could differ (RFC 9112, section 11.2): one `host`, no transfer coding but
`chunked`, no length beside it, no line that ends in a bare LF, no folded header. What a client can make us hold is
bounded: a head, a body that is not read, requests sent ahead of their answers.
"""

import asyncio
import re
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Coroutine
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, NoReturn, cast
from urllib.parse import unquote

import httptools
import msgspec
from starlette.types import ASGIApp

from chains_stream.gateway.exchange import FAREWELL, OWN_REQUEST, TAKEN_WITHIN
from chains_stream.gateway.problems import MEDIA_TYPE, Problem, title
from chains_stream.gateway.request import CLOSE, Request, status_line
from chains_stream.log import get_logger
from chains_stream.policy import new_request_id

MAX_HEAD = 64 << 10  # bytes of a request line and headers, and of trailers
HEADER_COST = 32  # bytes of these that each header counts for beyond its own, as in HTTP/2: small ones are held too
MAX_LENGTH = 19  # digits of a content-length
MAX_AHEAD = 16  # requests that a client may send before the first of them is answered; then the connection closes
HIGH_WATER = 64 << 10  # bytes of a body that nobody has asked for yet, until no more are read
KEEP_ALIVE = 5.0  # seconds that a connection may be idle after an answer
HEAD_SECONDS = 30.0  # that a head may take to arrive, the first one after the connection was made
NEWCOMER = 0.2  # seconds that a new connection has to send something, when the server stops
SWEEP = 1.0  # seconds between two looks at who has been idle for too long

_ASGI = {"version": "3.0", "spec_version": "2.3"}
_MALFORMED = 400, "this is no valid HTTP"
_TOO_LARGE = 431, f"a request line and headers are at most {MAX_HEAD} bytes, with {HEADER_COST} more a header"
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing drops what is buffered and tells the other side so
_LOOKED_AT = frozenset((b"host", b"content-length", b"transfer-encoding", b"expect"))

# What the parser does not know as a method, and yet is a request.
_OTHER_METHOD = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+ \S+ HTTP/1\.[01]\r\n")

log = get_logger(__name__)


class Listener:
    """What the connections of one server share.

    Attributes:
        connections: that are open.
        tasks: that run the app; they end by themselves when it has answered.
        stopping: whether no more connections are taken.
    """

    def __init__(self, app: ASGIApp, scheme: str = "http") -> None:
        self.app = app
        self.scheme = scheme
        self.loop = asyncio.get_running_loop()
        self.connections: set[Connection] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.stopping = False
        self._timer: asyncio.TimerHandle | None = None
        self._left = asyncio.Event()
        self._second = 0
        self._date = b""

    def connect(self) -> "Connection":
        return Connection(self)

    def join(self, connection: "Connection") -> None:
        self.connections.add(connection)
        if self._timer is None:
            self._timer = self.loop.call_later(SWEEP, self._sweep)

    def leave(self, connection: "Connection") -> None:
        self.connections.discard(connection)
        self._left.set()

    def end(self, task: "asyncio.Task[None]") -> None:
        self.tasks.discard(task)
        self._left.set()

    def _sweep(self) -> None:
        """Close connections that are idle, or do not end: one timer does for all."""
        self._timer = self.loop.call_later(SWEEP, self._sweep) if self.connections else None
        now = self.loop.time()
        for connection in tuple(self.connections):
            connection.close_if_idle(now)

    async def hear_out(self) -> None:
        """Give those that have only just connected a moment to send what they came for."""
        await asyncio.sleep(0)  # for those that were accepted, and are not here yet
        if any(connection.is_new for connection in self.connections):
            await asyncio.sleep(NEWCOMER)

    def shutdown(self) -> None:
        """Have every connection close once what it brought is answered."""
        self.stopping = True
        for connection in tuple(self.connections):
            connection.shutdown()

    async def idle(self) -> None:
        """Wait until every connection is closed and every request has ended."""
        while self.connections or self.tasks:
            self._left.clear()
            await self._left.wait()

    async def abort(self) -> None:
        """Cancel what runs, and break all connections off."""
        for task in self.tasks:
            task.cancel()
        for connection in tuple(self.connections):
            connection.transport.abort()
        await self.idle()

    def date(self) -> bytes:
        """Give the header that tells the time of an answer, formatted once a second."""
        now = int(time.time())
        if now != self._second:
            self._second = now
            self._date = b"date: %b\r\n" % formatdate(now, usegmt=True).encode()
        return self._date


class Connection(asyncio.Protocol):
    """Reads requests, and has them answered one after another."""

    __slots__ = (
        "_addresses",
        "_ahead",
        "_closing",
        "_current",
        "_deaf",
        "_expects",
        "_framing",
        "_headers",
        "_hosts",
        "_last",
        "_listener",
        "_muted",
        "_open",
        "_parser",
        "_partial",
        "_reading",
        "_receiving",
        "_refusal",
        "_running",
        "_since",
        "_size",
        "_tunnel",
        "_unread",
        "_url",
        "_used",
        "_writable",
        "transport",
    )

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._parser: Any = httptools.HttpRequestParser(self)
        self.transport: asyncio.Transport
        self._addresses: tuple[Any, Any] = None, None
        self._current: Request | None = None  # is being answered
        self._receiving: Request | None = None  # its body arrives
        self._ahead: deque[Request] | None = None  # wait for their turn
        self._running = 0  # tasks of the app; one that has answered may still wait until the answer is taken
        self._closing: float | None = None  # when it was first seen to be, with no task left
        self._last = False  # there is no other request after these
        self._deaf = False  # nothing more is read
        self._reading = True
        self._writable: asyncio.Event | None = None  # there while the socket is full
        self._since = listener.loop.time()  # when the last answer was complete
        self._used = False
        self._refusal = _MALFORMED
        self._open = False  # in a head or in trailers, of which the parser may hold a part
        self._partial = 0  # bytes of it in reads that did not complete it
        self._size = self._hosts = 0
        self._headers: list[tuple[bytes, bytes]] = []
        self._url = self._framing = b""
        self._expects = False
        self._unread = self._muted = False
        self._tunnel: Callable[[bytes], None] | None = None  # takes what arrives, once it is HTTP no more

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._listener.join(self)
        self._addresses = _address(transport, "sockname"), _address(transport, "peername")
        # Writing pauses as soon as the socket is full: what is sent next, and the end of a request, wait until nothing
        # is buffered here, so that a client which does not read costs no more than one piece of an answer.
        # With TLS that is what is not encrypted yet; some 64 KB are in the transport below, of which nobody can ask. It
        # takes 0 bytes for more than none, and would pause for ever.
        self.transport.set_write_buffer_limits(high=int(self._listener.scheme == "https"), low=0)
        if self._listener.stopping:  # it was accepted just before
            self.transport.close()

    def eof_received(self) -> None:
        """Close: that a client leaves is noticed by this, so one that shuts its sending side down loses its answer."""

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's
        self._listener.leave(self)
        self.resume_writing()
        if self._current is not None:
            self._current.lose()
        self._current = self._receiving = self._ahead = self._parser = self._tunnel = None

    def pause_writing(self) -> None:
        if self._writable is None:
            self._writable = asyncio.Event()

    def resume_writing(self) -> None:
        if self._writable is not None:
            self._writable.set()
            self._writable = None

    @property
    def _waiting_ahead(self) -> int:
        """Bytes of bodies whose requests wait for their turn."""
        return sum([request.waiting for request in self._ahead]) if self._ahead else 0

    @property
    def buffers(self) -> bool:
        """Whether some of what was written is still here."""
        return self._writable is not None

    async def taken(self) -> None:
        """Wait until nothing is."""
        while self._writable is not None:
            await self._writable.wait()

    def pause_reading(self) -> None:
        if self._reading and not self.transport.is_closing():
            self._reading = False
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        # With nothing read a client's leaving is not noticed: only what it sent ahead, if that is much, is a reason.
        if not (self._reading or self._waiting_ahead > HIGH_WATER or self.transport.is_closing()):
            self._reading = True
            self.transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        if self._tunnel is not None:
            self._tunnel(data)
            return
        if self._open:
            self._partial += len(data)  # a part that ends in it, or begins anew, sets it back
        while data and not self._deaf:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:  # to nothing that is spoken here: it goes on as it was
                data = data[upgrade.args[0] :]
                if self._unread:
                    self._read_on()
                continue
            except httptools.HttpParserError as error:
                self._refuse(error, data)
                return
            break
        if self._open and self._partial > MAX_HEAD:
            self._refusal = _TOO_LARGE
            self._refuse(None, data)

    # --- what the parser finds

    def _read_on(self) -> None:
        """Have a parser read the body of a request that asked for an upgrade: theirs takes such requests to have none.

        Without this a body would be read as the next request.
        """
        self._muted = True
        self._parser = httptools.HttpRequestParser(self)
        self._parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n\r\n" % self._framing)
        self._unread = self._muted = False

    def on_message_begin(self) -> None:
        if self._muted:
            return
        self._open = True
        self._partial = self._size = self._hosts = 0
        self._url = self._framing = b""
        self._expects = False

    def on_url(self, url: bytes) -> None:
        if self._muted:
            return
        self._count(len(url))
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + HEADER_COST)
        if self._receiving is not None:
            return  # a trailer
        name, value = name.lower(), value.rstrip(b" \t")
        if name in _LOOKED_AT:
            if name == b"host":
                self._hosts += 1
            elif name == b"expect":
                self._expects = value.lower() == b"100-continue"
            elif name == b"content-length":
                if len(value) > MAX_LENGTH:
                    self._fail(400, f"a content-length has at most {MAX_LENGTH} digits")
                self._framing = b"" if value.strip(b"0") == b"" else b"content-length: " + value
            elif value.lower() != b"chunked" or self._parser.get_http_version() != "1.1":
                self._fail(400, "the only transfer coding is `chunked`, in HTTP/1.1")
            else:
                self._framing = b"transfer-encoding: chunked"
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self._muted:
            return
        version, headers = self._parser.get_http_version(), self._headers
        if version not in ("1.1", "1.0"):
            self._fail(400, "this server speaks HTTP/1.1 and HTTP/1.0")
        if self._hosts != 1 and (self._hosts or version == "1.1"):
            self._fail(400, "a request has one header `host`")
        if self._last:
            self._fail(503, "the server is stopping")
        if self._ahead is not None and len(self._ahead) >= MAX_AHEAD:
            self._fail(400, "too many requests were sent ahead")
        self._open, self._headers = False, []
        path, query = _split(self._url)
        text = path.decode("ascii")
        method = self._parser.get_method().decode("ascii")
        keeps_alive = version == "1.1" and self._parser.should_keep_alive()
        expects = self._expects and version == "1.1"
        request = Request(self, method, version, expects=expects, keeps_alive=keeps_alive)
        request.scope = {
            "type": "http",
            "asgi": _ASGI,
            "http_version": version,
            "server": self._addresses[0],
            "client": self._addresses[1],
            "scheme": self._listener.scheme,
            "method": method,
            "root_path": "",
            "path": unquote(text) if "%" in text else text,
            "raw_path": path,
            "query_string": query,
            "headers": headers,
            OWN_REQUEST: request,
        }
        self._receiving = request
        self._unread = bool(self._framing) and self._parser.should_upgrade()
        if self._current is None:
            self._begin(request)
        else:
            self._ahead = self._ahead or deque()
            self._ahead.append(request)

    def on_chunk_header(self) -> None:
        self._open = True  # the last one is followed by trailers
        self._partial = 0

    def on_body(self, body: bytes) -> None:
        self._open = False
        receiving = self._receiving
        if receiving is not None and (receiving.take(body) > HIGH_WATER or self._waiting_ahead > HIGH_WATER):
            self.pause_reading()

    def on_message_complete(self) -> None:
        self._open = False
        if self._receiving is not None and not self._unread:
            self._receiving.arrive()
            self._receiving = None

    def _count(self, size: int) -> None:
        self._size += size
        if self._size > MAX_HEAD:
            self._fail(*_TOO_LARGE)

    def _fail(self, status: int, text: str) -> NoReturn:
        """Have the parser stop."""
        self._refusal = status, text
        raise ValueError(text)

    def _refuse(self, error: httptools.HttpParserError | None, data: bytes) -> None:
        """Read no more; answer that the request is none, if that can still be its answer."""
        self._deaf = self._last = True
        current, receiving = self._current, self._receiving
        if current is not None and receiving is not current:
            # It came behind requests that are answered first; then the connection is closed.
            if receiving is not None and self._ahead:
                self._ahead.pop()  # its body is malformed
                self._receiving = None
            return
        if receiving is not None and receiving.started:
            self.transport.abort()
            return
        status, text = self._refusal
        if isinstance(error, httptools.HttpParserInvalidMethodError) and _OTHER_METHOD.match(data):
            status, text = 501, "the method is not known here"
        elif self._refusal is _MALFORMED:
            text = f"{text}: {error}"
        request_id = new_request_id()
        code = "invalid-http" if status == HTTPStatus.BAD_REQUEST else title(status).lower().replace(" ", "-")
        body = msgspec.json.encode(
            Problem(title=title(status), status=status, detail=text, code=code, request_id=request_id)
        )
        head = f"content-type: {MEDIA_TYPE}\r\ncontent-length: {len(body)}\r\nx-request-id: {request_id}\r\n"
        lines = status_line(status) + self._listener.date() + head.encode() + CLOSE
        self.transport.write(b"%b\r\n%b" % (lines, body))
        if current is None:
            self._part()
        else:  # the app learns by this that its request is none
            self.transport.close()
        log.info("http.refused", request_id=request_id, status=status, reason=text)

    # --- answers

    def _begin(self, request: Request) -> None:
        self._current = request
        scope, request.scope = request.scope, None
        listener = self._listener
        work = cast("Coroutine[Any, Any, None]", listener.app(scope or {}, request.receive, request.send))
        task = listener.loop.create_task(work)
        listener.tasks.add(task)
        self._running += 1
        task.add_done_callback(request.finish)

    def ended(self, task: "asyncio.Task[None]") -> None:
        self._running -= 1
        self._listener.end(task)

    @property
    def closes(self) -> bool:
        """Whether the answer that is under way is the last."""
        return self._last and not self._ahead

    def date(self) -> bytes:
        return self._listener.date()

    def go_on(self, *, keeps_alive: bool) -> None:
        """Take the next request, as the answer is complete."""
        self._current = None
        if self.transport.is_closing():  # that too when the client has left
            return
        if not keeps_alive or self.closes:
            if self._receiving is None:
                self.transport.close()
            else:
                self._part()
        elif self._ahead:
            self._begin(self._ahead.popleft())
        else:
            self.resume_reading()
            self._used = True
            self._since = self._listener.loop.time()

    def _part(self) -> None:
        """Close to a client that may still send, after it had time to read the answer (RFC 9112, section 9.6).

        What arrives at a closed socket resets the connection, and the client loses what it has not read.
        """
        self._deaf = self._last = True
        self._open = False
        if self.transport.is_closing():
            return
        if self.transport.can_write_eof():  # in TLS there is none
            self.transport.write_eof()
        self.resume_reading()
        self._listener.loop.call_later(FAREWELL, self.transport.close)

    def close_if_idle(self, now: float) -> None:
        """Close if no request came for a while, or not all of one; abort if what is left to send is not taken."""
        if self.transport.is_closing():
            if self._closing is None and not self._running:
                self._closing = now
            elif self._closing is not None and now - self._closing >= TAKEN_WITHIN:
                self.transport.abort()
            return
        waits_for_more = self._open or self._receiving is not None or not self._used
        if self._current is None and now - self._since >= (HEAD_SECONDS if waits_for_more else KEEP_ALIVE):
            self.transport.close()

    @property
    def is_new(self) -> bool:
        """Whether it was made a moment ago, and nothing has come by it yet."""
        unused = not (self._used or self._current is not None or self.transport.is_closing())
        return unused and self._listener.loop.time() - self._since < NEWCOMER

    def shutdown(self) -> None:
        """Close once what is here is answered; begin nothing that comes from now on."""
        self._last = True
        self._deaf = self._receiving is None
        if self._current is None:
            self.transport.close()

    def switch(self, receive: Callable[[bytes], None]) -> bool:
        """Read no more HTTP: `receive` is given what arrives. False if something of that has arrived, or it closes.

        The request that asked for it stays the one that is answered, until its task ends.
        """
        if self._ahead or self._open or self._receiving is not None or self._last or self.transport.is_closing():
            return False
        self._tunnel = receive
        self.resume_reading()
        return True

    def reset(self) -> None:
        """Have the other side told of a failure when the connection is closed."""
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)


def _split(url: bytes) -> tuple[bytes, bytes]:
    """Give the path and the query of what was requested."""
    if not url.startswith((b"/", b"*")):
        try:
            parsed = httptools.parse_url(url)
        except httptools.HttpParserInvalidURLError:
            return url, b""  # of CONNECT: a host and a port
        return parsed.path or b"/", parsed.query or b""
    path, _, query = url.partition(b"?")
    return path, query


def _address(transport: asyncio.BaseTransport, which: str) -> tuple[str, int] | None:
    found = transport.get_extra_info(which)
    return (str(found[0]), int(found[1])) if isinstance(found, tuple) else None
