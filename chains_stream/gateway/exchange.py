"""One HTTP request under way: what came in, what went out, and whether anybody still wants the answer.

`Entry` stands around the whole app. It makes an `Exchange` of each request, gives it an id, and logs one line at its
end; a mistake of the gateway's own ends there.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import cache
from http import HTTPStatus
from typing import Protocol

from prometheus_client import Counter
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as ASGIScope
from structlog.contextvars import bind_contextvars, clear_contextvars

from chains_stream import metrics
from chains_stream.errors import DeadlineExceededError
from chains_stream.gateway import problems
from chains_stream.gateway.problems import Problem, Refusal
from chains_stream.log import get_logger
from chains_stream.messages import now_ms
from chains_stream.policy import Scope, new_request_id

TIMEOUT_HEADER = "x-request-timeout"  # seconds that a client gives its request, at most what the gateway gives it
AFFINITY_HEADER = "chains-affinity-key"  # text; requests of one key go to one worker for as long as it is there
MAX_AFFINITY = 256  # bytes
DISCARDED = 64 << 10  # bytes of a body that cost less to take and throw away than a new connection does
BODY_SECONDS = 60.0  # that a body may take to arrive, whatever the deadline of its request
BODY_IDLE_SECONDS = 10.0  # of these, without a byte
PIECE = 64 << 10  # bytes of an answer that are handed to the connection at once; the next wait until it has sent them
TAKEN_WITHIN = 10.0  # seconds that a client has to take an answer that has no deadline: of an error, of a probe
FAREWELL = 1.0  # seconds that a client has to take the end of an answer that was cut short

_EXCHANGE = "chains.exchange"  # in the ASGI scope of a request
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-.{0,100})?")  # W3C Trace Context
_MAX_TRACESTATE = 512  # characters
_SECONDS = re.compile(r"\d{1,9}(\.\d{1,9})?", re.ASCII)

log = get_logger(__name__)


class ClientLeftError(Exception):
    """The client closed its connection before it had the whole answer: nobody is left to tell of it."""


class CutOffError(Exception):
    """An answer had to be broken off, and the server can't be asked to: it does so when its app raises."""


class Connection(Protocol):
    """The connection that a request came by, as our own server puts it into the ASGI scope."""

    def break_off(self, *, at_once: bool) -> None:
        """Close it in the middle of an answer, after what is buffered, or with that lost."""

    @property
    def buffers(self) -> bool:
        """Whether some of what was written to it is still buffered here."""

    async def taken(self) -> None:
        """Wait until nothing is."""


CONNECTION = "chains.connection"


class Exchange:
    """One request and its answer.

    Attributes:
        headers: of the request.
        request_id: goes with every answer, and through all hops of the Chain.
        status: of the answer; `CLIENT_CLOSED_REQUEST` once the client has left.
        error: the code of what went wrong, for the log.
        started: whether the status line has gone out.
        complete: whether all of the answer has; the connection may still buffer some of it.
        interrupted: whether the gateway stopped before the answer was complete.
    """

    def __init__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        self.headers = Headers(scope=scope)
        self.request_id = new_request_id()
        self.status = 0
        self.error: str | None = None
        self.started = False
        self.complete = False
        self.interrupted = False
        self._scope = scope
        self._receive = receive
        self._send = send
        self._limit: asyncio.Timeout | None = None
        self._reason: Exception | None = None
        self._listener: asyncio.Task[None] | None = None

    @property
    def route(self) -> str:
        """The path of the route that was met, for the log: never what a stranger wrote into the URL."""
        return getattr(self._scope.get("route"), "path", "unknown")

    @property
    def sending(self) -> bool:
        """Whether the client may still send so much of a body that an answer now has to end the connection."""
        if self._listener is not None:
            return False  # all of it has been read
        length = int(self.headers.get("content-length", "0"))
        return length > DISCARDED or "transfer-encoding" in self.headers or "expect" in self.headers

    def begin(self, deadline: float) -> Scope:
        """Begin a request to the Chain with `deadline` seconds, or fewer if the client says so. Raises Refusal."""
        seconds = min(deadline, _timeout(self.headers.get(TIMEOUT_HEADER)) or deadline)
        traceparent, tracestate = self.headers.get("traceparent", ""), self.headers.get("tracestate", "")
        traced = _TRACEPARENT.fullmatch(traceparent) is not None
        return Scope(
            request_id=self.request_id,
            deadline_ms=now_ms() + int(seconds * 1000),
            traceparent=traceparent.encode("latin-1") if traced else None,
            tracestate=tracestate.encode("latin-1") if traced and 0 < len(tracestate) <= _MAX_TRACESTATE else None,
            affinity=_affinity(self.headers.get(AFFINITY_HEADER)),
        )

    @asynccontextmanager
    async def wanted(self, scope: Scope) -> AsyncIterator[None]:
        """Run a block for as long as its outcome is wanted: until the deadline, or the client leaves, or we stop.

        Raises ClientLeftError, DeadlineExceededError, Refusal, or what `interrupt` was given.
        """
        limit = asyncio.timeout(max(0.0, scope.remaining))
        try:
            async with limit:
                self._limit = limit
                yield
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise self._reason or self._late() from error
        finally:
            self._limit = None

    async def body(self, limit: int, hold: Callable[[int, int], None]) -> bytes:
        """Read the body, of at most `limit` bytes; from then on notice when the client leaves.

        `hold` is told, before more is read, how many bytes are here and how many are announced beyond; it may raise to
        end the reading. Raises Refusal, ClientLeftError.
        """
        clock = asyncio.get_running_loop().time
        end = clock() + BODY_SECONDS
        announced = int(self.headers.get("content-length", "0"))  # the server has checked it
        parts = list[bytes]()
        received = 0
        while max(announced, received) <= limit:
            hold(received, max(0, announced - received))
            try:
                async with asyncio.timeout_at(min(end, clock() + BODY_IDLE_SECONDS)) as wait:
                    message = await self._receive()
            except TimeoutError:
                if not wait.expired():
                    raise
                raise _too_slow(f"{received} bytes of the body arrived, and then too little for too long") from None
            if message["type"] == "http.disconnect":
                raise ClientLeftError
            parts.append(message.get("body", b""))
            received += len(parts[-1])
            if received <= limit and not message.get("more_body", False):
                hold(received, 0)
                self._listen()
                return b"".join(parts)
        raise Refusal(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            "body-too-large",
            f"the body is larger than the {limit} bytes that this gateway takes (CHAINS_MAX_BODY_BYTES)",
            close=True,  # the rest is not read
        )

    def interrupt(self, reason: Exception) -> None:
        """End the block that is `wanted`: the gateway can't wait for it any longer."""
        self.interrupted = True
        self._end(reason)

    async def send(self, message: Message) -> None:
        """Send a message to the client, with what all answers have in common."""
        if message["type"] == "http.response.start":
            common = [(b"x-request-id", self.request_id.encode()), (b"x-content-type-options", b"nosniff")]
            await self._send({**message, "headers": [*message.get("headers", ()), *common]})
            self.started = True
            self.status = int(message["status"])
        else:
            await self._send(message)
            self.complete = not message.get("more_body", False)

    async def start(self, status: int, headers: dict[str, str]) -> None:
        """Send the status line and the headers."""
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": raw})

    async def write(self, data: bytes) -> None:
        """Send a part of the body; waits while the client is slow to take what it was sent before."""
        await self.send({"type": "http.response.body", "body": data, "more_body": True})

    async def finish(self, data: bytes = b"") -> None:
        """Send the last part of the body, and wait until the client has taken all that is not in the socket."""
        if len(data) > PIECE:
            for start in range(0, len(data), PIECE):
                await self.write(data[start : start + PIECE])
            data = b""
        await self.send({"type": "http.response.body", "body": data, "more_body": False})
        if (connection := self._connection) is not None and connection.buffers:
            await connection.taken()

    async def answer(self, problem: Problem, headers: dict[str, str] | None = None) -> None:
        """Answer with a problem."""
        self.error = problem.code
        await problems.respond(problem, headers)(self._scope, self._receive, self.send)
        await self.settle()

    async def settle(self) -> None:
        """See to it that the client takes what it was sent, however it was: if it does not, break off."""
        connection = self._connection
        if connection is None or not connection.buffers:
            return
        try:
            async with asyncio.timeout(TAKEN_WITHIN):
                await connection.taken()
        except TimeoutError:
            await self._cut_off(at_once=True)

    async def end_early(self, last: bytes | None) -> None:
        """End an answer that began well: with `last`, or, if there is none or it is not taken, by breaking off."""
        if self.complete:  # all of it is written, but not taken
            return await self._cut_off(at_once=True)
        if last is not None:
            try:
                async with asyncio.timeout(FAREWELL):
                    return await self.finish(last)
            except TimeoutError:
                return await self._cut_off(at_once=True)
        return await self._cut_off(at_once=False)

    async def close(self) -> None:
        """Stop listening to the client."""
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.wait([self._listener])

    def _listen(self) -> asyncio.Task[None]:
        """Have a task wait for the client to leave: polling for it would miss it while the answer is waited for."""
        if self._listener is None:
            self._listener = asyncio.create_task(self._until_left(), name="disconnect")
        return self._listener

    async def _until_left(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self.complete:  # with a complete answer the server has no more to tell us
            self._end(ClientLeftError())

    def _late(self) -> Exception:
        if self._listener is not None:
            return DeadlineExceededError("the deadline of the request passed")
        return _too_slow("the body did not arrive before the deadline of the request")

    def _end(self, reason: Exception) -> None:
        if self._limit is not None and self._reason is None and not self._limit.expired():
            self._reason = reason
            self._limit.reschedule(asyncio.get_running_loop().time())

    @property
    def _connection(self) -> Connection | None:
        connection: Connection | None = self._scope.get(CONNECTION)
        return connection

    async def _cut_off(self, *, at_once: bool) -> None:
        connection = self._connection
        if connection is None:
            raise CutOffError
        connection.break_off(at_once=at_once)
        # The listener sees it closed once the client has taken what was buffered; if it doesn't, that is lost.
        _, waiting = await asyncio.wait([self._listen()], timeout=FAREWELL)
        if waiting:
            connection.break_off(at_once=True)
            await asyncio.wait(waiting)


def exchange_of(scope: ASGIScope) -> Exchange:
    """Give the exchange that `Entry` has put around a request."""
    found = scope[_EXCHANGE]
    assert isinstance(found, Exchange)
    return found


class Entry:
    """The outermost part of the app."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        metrics.HTTP_IN_FLIGHT.inc()
        exchange = scope[_EXCHANGE] = Exchange(scope, receive, send)
        clear_contextvars()
        bind_contextvars(request_id=exchange.request_id)
        try:
            await self._app(scope, receive, exchange.send)
            await exchange.settle()
        except CutOffError:
            raise
        except Exception:
            log.exception("gateway.defect")
            await self._apologize(exchange)
        finally:
            metrics.HTTP_IN_FLIGHT.dec()
            seconds = time.perf_counter() - began
            ended, took = _children(exchange.route, exchange.status)
            ended.inc()
            took.observe(seconds)
            await exchange.close()
            fields = {} if exchange.error is None else {"error": exchange.error}
            log.info(
                "request",
                method=scope["method"],
                route=exchange.route,
                status=exchange.status,
                duration_ms=round(seconds * 1000, 1),
                **fields,
            )
            del scope[_EXCHANGE]  # the two hold each other, and what the server has read of a body

    async def _apologize(self, exchange: Exchange) -> None:
        if not exchange.started:
            await exchange.answer(problems.of_defect(exchange.request_id))
        elif not exchange.complete:
            exchange.error = "internal"
            await exchange.end_early(None)


@cache
def _children(route: str, status: int) -> tuple[Counter, metrics.Timing]:
    """Give what counts the requests of a route that end so. There are few: routes of ours, and statuses of HTTP."""
    return metrics.HTTP_REQUESTS.labels(route, status), metrics.HTTP_SECONDS.labels(route)


def _too_slow(text: str) -> Refusal:
    return Refusal(HTTPStatus.REQUEST_TIMEOUT, "body-too-slow", text, close=True)


def _affinity(value: str | None) -> bytes | None:
    if value is None:
        return None
    key = value.encode("latin-1")  # as it came
    if not (0 < len(key) <= MAX_AFFINITY and _is_text(key)):
        raise Refusal(
            HTTPStatus.BAD_REQUEST,
            "invalid-header",
            f"the header {AFFINITY_HEADER} should be a text of 1 to {MAX_AFFINITY} bytes of UTF-8",
        )
    return key


def _is_text(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _timeout(value: str | None) -> float | None:
    if value is None:
        return None
    seconds = float(value) if _SECONDS.fullmatch(value.strip()) else 0.0
    if seconds <= 0:
        raise Refusal(
            HTTPStatus.BAD_REQUEST,
            "invalid-header",
            f"the header {TIMEOUT_HEADER} should be a number of seconds greater than 0, such as 2.5",
        )
    return seconds
