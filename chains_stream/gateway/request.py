"""A request as an ASGI app takes and answers it, and its answer as HTTP writes it."""

import asyncio
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any, Protocol

from starlette.types import Message

from chains_stream.log import get_logger

CLOSE = b"connection: close\r\n"

_NO_BODY = (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED)
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_CHUNKED = b"transfer-encoding: chunked\r\n"
_STATUS_LINES = {status.value: b"HTTP/1.1 %d %b\r\n" % (status, status.phrase.encode()) for status in HTTPStatus}

log = get_logger(__name__)


class Wire(Protocol):
    """The connection that a request came by."""

    transport: asyncio.Transport

    @property
    def buffers(self) -> bool:
        """Whether some of what was written is still here."""

    @property
    def closes(self) -> bool:
        """Whether the answer that is under way is the last."""

    async def taken(self) -> None:
        """Wait until nothing is buffered."""

    def resume_reading(self) -> None: ...

    def date(self) -> bytes:
        """Give the header that tells the time."""

    def go_on(self, *, keeps_alive: bool) -> None:
        """Take the next request, as the answer is complete."""

    def ended(self, task: "asyncio.Task[None]") -> None:
        """Forget the task of a request."""

    def switch(self, receive: Callable[[bytes], None]) -> bool:
        """Read no more HTTP: `receive` is given what arrives. False if something of that has arrived, or it closes."""

    def pause_reading(self) -> None: ...

    def reset(self) -> None:
        """Have the other side told of a failure when the connection is closed."""


class Request:
    """One request as an ASGI app takes and answers it; and what `exchange.OwnRequest` has beyond ASGI.

    Attributes:
        scope: until it has begun.
        started: whether the app has given the status line.
        complete: whether it has given all of its answer.
        on_leave: called when the client leaves before that.
    """

    __slots__ = (
        "_arriving",
        "_bodiless",
        "_body",
        "_chunked",
        "_connection",
        "_expects",
        "_gone",
        "_head",
        "_keeps_alive",
        "_left",
        "_method",
        "_news",
        "_told",
        "_version",
        "complete",
        "on_leave",
        "scope",
        "started",
    )

    def __init__(self, connection: Wire, method: str, version: str, *, expects: bool, keeps_alive: bool) -> None:
        self.scope: dict[str, Any] | None = None
        self.started = False
        self.complete = False
        self.on_leave: Callable[[], None] | None = None
        self._connection = connection
        self._method = method
        self._version = version
        self._keeps_alive = keeps_alive
        self._expects = expects  # to be told to go on before it sends its body
        self._body: bytes | bytearray = b""  # that the app has not taken yet
        self._arriving = True
        self._told = False  # the app, that this was all
        self._gone = False
        self._news: asyncio.Event | None = None  # there while the app waits
        self._head = b""  # goes out with the first part of the body
        self._bodiless = False
        self._chunked = False
        self._left: int | None = None  # bytes of an answer whose length was announced

    # --- for the connection

    def take(self, body: bytes) -> int:
        """Keep a part of the body, and give how much of it is waiting."""
        if self.complete:
            return 0
        if not self._body:
            self._body = body
        else:
            if isinstance(self._body, bytes):
                self._body = bytearray(self._body)
            self._body += body
        self._tell()
        return len(self._body)

    @property
    def waiting(self) -> int:
        """Bytes of the body that the app has not taken yet."""
        return len(self._body)

    def arrive(self) -> None:
        self._arriving = False
        self._tell()

    def lose(self) -> None:
        self._gone = True
        self._tell()
        if self.on_leave is not None and not self.complete:
            self.on_leave()

    def finish(self, task: "asyncio.Task[None]") -> None:
        """See to what an app that has ended left undone."""
        connection = self._connection
        connection.ended(task)
        self.on_leave = None
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error("http.app_failed", exc_info=error)
        if self.complete or self._gone:
            return
        if not self.started and not task.cancelled():
            self._start(500, [(b"content-length", b"0"), (b"connection", b"close")])
            self._write(b"", more=False)
        else:
            connection.transport.close()

    # --- for the app

    async def receive(self) -> Message:
        connection = self._connection
        if self._expects and not (self.complete or connection.transport.is_closing()):
            self._expects = False
            connection.transport.write(_CONTINUE)
        while True:
            if self._gone or self.complete:
                return {"type": "http.disconnect"}
            if self._body or not (self._arriving or self._told):
                self._told = not self._arriving
                body, self._body = bytes(self._body), b""
                return {"type": "http.request", "body": body, "more_body": self._arriving}
            connection.resume_reading()
            if self._news is None:
                self._news = asyncio.Event()
            await self._news.wait()

    async def send(self, message: Message) -> None:
        connection = self._connection
        if connection.buffers and not self._gone:
            await connection.taken()
        if self._gone:
            return
        kind = message["type"]
        if kind == "http.response.body" and self.started and not self.complete:
            self._write(message.get("body", b""), more=message.get("more_body", False))
        elif kind == "http.response.start" and not self.started:
            self._start(message["status"], message.get("headers", ()))
        else:
            raise RuntimeError(f"{kind} is not expected at this point of an answer")

    def whole_body(self) -> bytes | None:
        """Take the body, if all of it has arrived and none was taken."""
        if self._arriving or self._told or self._gone:
            return None
        self._told = True
        body, self._body = bytes(self._body), b""
        self._connection.resume_reading()  # to see the client leave
        return body

    @property
    def buffers(self) -> bool:
        return self._connection.buffers

    async def taken(self) -> None:
        await self._connection.taken()

    def break_off(self, *, at_once: bool) -> None:
        connection = self._connection
        if connection.transport.is_closing() and not (at_once and connection.buffers):
            return  # it ends by itself, or has ended: then there is no socket any more
        if self._head:
            connection.transport.write(self._head)
            self._head = b""
        # An answer in HTTP/1.0 ends where its connection does: only a reset tells that it is not the end.
        if at_once or self._version == "1.0":
            connection.reset()
        if at_once:
            connection.transport.abort()
        else:
            connection.transport.close()

    def upgrade(self, headers: Iterable[tuple[bytes, bytes]], receive: Callable[[bytes], None]) -> "Wire | None":
        """Answer with 101, after which the connection is the app's until it ends; None if that can't be."""
        connection = self._connection
        if self.started or self._gone or not connection.switch(receive):
            return None
        self.started = True
        lines = [b"%b: %b\r\n" % header for header in headers]
        connection.transport.write(b"".join([status_line(101), connection.date(), *lines, b"\r\n"]))
        return connection

    # --- what is written

    def _start(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        self._chunked, self._left = False, None  # a start that failed may have set them
        lines = [status_line(status), self._connection.date()]
        self._bodiless = self._method == "HEAD" or status in _NO_BODY
        # Who asked before it sends its body, and was not told to, may send it or not: what comes next can't be known.
        closes = self._connection.closes or not self._keeps_alive or (self._expects and self._arriving)
        count = 2
        for name, value in headers:
            if name == b"content-length":
                self._left = int(value)
            elif name == b"connection" and value == b"close":
                closes = True
                continue
            lines.append(b"%b: %b\r\n" % (name, value))
            count += 1
        if self._left is None and not self._bodiless:
            # An answer of unknown length is in chunks, or ends where the connection does.
            self._chunked = self._version == "1.1"
            if self._chunked:
                lines.append(_CHUNKED)
                count += 1
        if self._bodiless:
            self._left = None
        if closes:
            self._keeps_alive = False
            lines.append(CLOSE)
            count += 1
        lines.append(b"\r\n")
        head = b"".join(lines)
        if head.count(b"\n") != count + 1 or head.count(b"\r") != count + 1:
            raise RuntimeError("a header of an answer holds the end of a line")
        self.started = True
        self._head = head

    def _write(self, body: bytes, *, more: bool) -> None:
        if self._chunked:
            if body:
                body = b"%x\r\n%b\r\n" % (len(body), body)
            if not more:
                body += b"0\r\n\r\n"
        elif self._left is not None:
            self._left -= len(body)
            if self._left < 0 or (self._left and not more):
                raise RuntimeError("the body of an answer is not as long as was announced")
        elif self._bodiless:
            body = b""
        if self._head:
            body = self._head + body
            self._head = b""
        transport = self._connection.transport
        if body:
            transport.write(body)
        if not more:
            self.complete = True
            self._tell()
            self._connection.go_on(keeps_alive=self._keeps_alive)

    def _tell(self) -> None:
        if self._news is not None:
            self._news.set()
            self._news = None


def status_line(status: int) -> bytes:
    return _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status
