"""One HTTP request under way: what came in, what went out, and whether anybody still wants the answer."""

import asyncio
import re
from collections.abc import Callable, Iterable
from http import HTTPStatus
from types import TracebackType
from typing import Protocol
from urllib.parse import parse_qsl

from starlette.responses import Response
from starlette.types import Message, Receive, Send
from starlette.types import Scope as ASGIScope

from chains_stream.errors import DeadlineExceededError
from chains_stream.gateway import openai_errors, problems
from chains_stream.gateway.problems import Problem, Refusal
from chains_stream.log import get_logger
from chains_stream.messages import now_ms
from chains_stream.policy import Scope
from chains_stream.timeouts import Timeout

TIMEOUT_HEADER = "x-request-timeout"  # seconds that a client gives its request, at most what the gateway gives it
AFFINITY_HEADER = "chains-affinity-key"  # text; requests of one key go to one worker for as long as it is there
MAX_AFFINITY = 256  # bytes
DISCARDED = 64 << 10  # bytes of a body that cost less to take and throw away than a new connection does
BODY_SECONDS = 60.0  # that a body may take to arrive, whatever the deadline of its request
BODY_IDLE_SECONDS = 10.0  # of these, without a byte
PIECE = 64 << 10  # bytes of an answer that are handed to the connection at once; the next wait until it has sent them
TAKEN_WITHIN = 10.0  # seconds that a client has to take an answer that has no deadline: of an error, of a probe
FAREWELL = 1.0  # seconds that a client has to take the end of an answer that was cut short

KEY_HEADER = b"idempotency-key"

_NOSNIFF = (b"x-content-type-options", b"nosniff")
EXCHANGE = "chains.exchange"  # in the ASGI scope of a request
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-.{0,100})?")  # W3C Trace Context
_MAX_TRACESTATE = 512  # characters
_SECONDS = re.compile(rb"\d{1,9}(\.\d{1,9})?")

log = get_logger(__name__)


Header = tuple[bytes, bytes]


class ClientLeftError(Exception):
    """The client closed its connection before it had the whole answer: nobody is left to tell of it."""


class CutOffError(Exception):
    """An answer had to be broken off, and the server can't be asked to: it does so when its app raises."""


class Tunnel(Protocol):
    """A connection that speaks another protocol from now on."""

    transport: asyncio.Transport

    @property
    def buffers(self) -> bool:
        """Whether some of what was written is still buffered here."""

    async def taken(self) -> None:
        """Wait until nothing is."""

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class OwnRequest(Protocol):
    """A request as our own server has it in its scope: what can be done with it beyond ASGI.

    Attributes:
        on_leave: called when the client leaves before the answer is complete.
    """

    on_leave: Callable[[], None] | None

    def whole_body(self) -> bytes | None:
        """Give the body if all of it is here, and none of it was received."""

    def break_off(self, *, at_once: bool) -> None:
        """Close its connection in the middle of an answer, after what is buffered, or with that lost."""

    @property
    def buffers(self) -> bool:
        """Whether some of what was written to its connection is still buffered here."""

    async def taken(self) -> None:
        """Wait until nothing is."""

    def upgrade(self, headers: Iterable[Header], receive: Callable[[bytes], None]) -> Tunnel | None:
        """Answer with 101; from now on `receive` is given what arrives. None if it is too late for it."""


OWN_REQUEST = "chains.request"


class Exchange:
    """One request and its answer.

    Attributes:
        headers: of the request, by their names in lower case; of many of one name the first.
        correlation_id: of the request to the Chain, if one is made.
        request_id: goes with every answer, and through all hops of the Chain.
        status: of the answer; `CLIENT_CLOSED_REQUEST` once the client has left.
        error: the code of what went wrong, for the log.
        started: whether the status line has gone out.
        complete: whether all of the answer has; the connection may still buffer some of it.
        owner: the name of the API key that the request came with; empty where there are no keys.
        interrupted: whether the gateway stopped before the answer was complete.
        claimed: whether it has claimed its idempotency key: it is one that is answered again.
        tell: writes a problem, given as JSON, as the end of an answer that has begun; None if it can't.
        common: headers that its answer gets, whatever it is.
        route: the path of the route that was met, for the log: never what a stranger wrote into the URL.
    """

    __slots__ = (
        "_limit",
        "_listener",
        "_own",
        "_read",
        "_reason",
        "_receive",
        "_scope",
        "_send",
        "claimed",
        "common",
        "complete",
        "correlation_id",
        "error",
        "headers",
        "interrupted",
        "owner",
        "request_id",
        "route",
        "started",
        "status",
        "tell",
    )

    def __init__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        self.headers: dict[bytes, bytes] = dict(reversed(scope["headers"]))
        self.correlation_id = b""
        self.request_id = ""
        self.status = 0
        self.error: str | None = None
        self.started = False
        self.complete = False
        self.interrupted = False
        self.claimed = False
        self.tell: Callable[[bytes], bytes | None] | None = None
        self.owner = ""
        self.common: tuple[Header, ...] = (_NOSNIFF,)
        self.route = "unknown"
        self._scope = scope
        self._receive = receive
        self._send = send
        self._own: OwnRequest | None = scope.get(OWN_REQUEST)
        self._limit: Wanted | None = None
        self._reason: Exception | None = None
        self._read = False  # all of the body
        self._listener: asyncio.Task[None] | None = None

    @property
    def accept(self) -> bytes:
        """What the client accepts, of however many headers."""
        return b", ".join([value for name, value in self._scope["headers"] if name == b"accept"])

    @property
    def sending(self) -> bool:
        """Whether the client may still send so much of a body that an answer now has to end the connection."""
        if self._read:
            return False
        return self._announced > DISCARDED or b"transfer-encoding" in self.headers

    @property
    def _announced(self) -> int:
        return int(self.headers.get(b"content-length", b"0"))  # the server has checked it

    @property
    def keyed(self) -> bool:
        """Whether the request has an idempotency key."""
        return KEY_HEADER in self.headers

    @property
    def left(self) -> bool:
        """Whether the client has left before it had the whole answer."""
        return isinstance(self._reason, ClientLeftError)

    @property
    def path_parameters(self) -> dict[str, str]:
        """What the route found in the path."""
        found: dict[str, str] = self._scope.get("path_params", {})
        return found

    @property
    def query(self) -> dict[str, str]:
        """The parameters of the query; of many of one name the first."""
        return dict(reversed(parse_qsl(self._scope["query_string"].decode("latin-1"), keep_blank_values=True)))

    def preference(self, name: str) -> float | None:
        """Give the seconds that the header `prefer` has for a name (RFC 7240); None for a value that is none."""
        value = self.headers.get(b"prefer")
        if value is None:
            return None
        for part in value.decode("latin-1").split(","):
            found, _, seconds = part.partition(";")[0].partition("=")
            if found.strip().lower() == name and _SECONDS.fullmatch(seconds.strip(' "').encode("latin-1")):
                return float(seconds.strip(' "'))
        return None

    def begin(self, deadline: float) -> Scope:
        """Begin a request to the Chain with `deadline` seconds, or fewer if the client says so. Raises Refusal."""
        headers = self.headers
        seconds = min(deadline, _timeout(headers.get(TIMEOUT_HEADER.encode())) or deadline)
        traceparent, tracestate = headers.get(b"traceparent"), headers.get(b"tracestate", b"")
        traced = traceparent is not None and _TRACEPARENT.fullmatch(traceparent) is not None
        return Scope(
            request_id=self.request_id,
            deadline_ms=now_ms() + int(seconds * 1000),
            traceparent=traceparent if traced else None,
            tracestate=tracestate if traced and 0 < len(tracestate) <= _MAX_TRACESTATE else None,
            affinity=_affinity(headers.get(AFFINITY_HEADER.encode())),
        )

    def wanted(self, scope: Scope) -> "Wanted":
        """Give a block that runs for as long as its outcome is wanted."""
        self._limit = Wanted(self, max(0.0, scope.remaining))
        return self._limit

    async def body(self, limit: int, hold: Callable[[int, int], None]) -> bytes:
        """Read the body, of at most `limit` bytes; from then on notice when the client leaves.

        `hold` is told, before more is read, how many bytes are here and how many are announced beyond; it may raise to
        end the reading. Raises Refusal, ClientLeftError.
        """
        whole = None if self._own is None else self._own.whole_body()
        if whole is not None and len(whole) <= limit:
            self._listen()
            hold(len(whole), 0)
            return whole
        clock = asyncio.get_running_loop().time
        end = clock() + BODY_SECONDS
        announced = self._announced if whole is None else len(whole)
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

    def upgrade(self, headers: Iterable[Header], receive: Callable[[bytes], None], lost: Callable[[], None]) -> Tunnel:
        """Answer with 101; from now on `receive` is given what arrives, and `lost` is called if the client goes.

        That, too, ends the block that is `wanted`. Raises Refusal.
        """
        own = self._own
        tunnel = None
        if own is not None:
            tunnel = own.upgrade([*headers, (b"x-request-id", self.request_id.encode()), *self.common], receive)
        if own is None or tunnel is None:
            raise Refusal(
                HTTPStatus.BAD_REQUEST,
                "invalid-handshake",
                "the client sent more, or the connection was closing, before its upgrade was answered",
                close=True,
            )

        def leave() -> None:
            lost()
            self._leave()

        own.on_leave = leave
        self.started = True
        self.status = HTTPStatus.SWITCHING_PROTOCOLS
        return tunnel

    @property
    def can_upgrade(self) -> bool:
        """Whether the server is ours, which can."""
        return self._own is not None

    @property
    def request(self) -> ASGIScope:
        """The request as ASGI has it."""
        return self._scope

    def end(self, reason: Exception) -> None:
        """End the block that is `wanted`, which raises the reason."""
        self._end(reason)

    def interrupt(self, reason: Exception) -> None:
        """End the block that is `wanted`: the gateway can't wait for it any longer."""
        self.interrupted = True
        self._end(reason)

    async def send(self, message: Message) -> None:
        """Send a message to the client, with what all answers have in common."""
        if message["type"] == "http.response.start":
            own = (b"x-request-id", self.request_id.encode())
            await self._send({**message, "headers": [*message.get("headers", ()), own, *self.common]})
            self.started = True
            self.status = int(message["status"])
        else:
            await self._send(message)
            self.complete = not message.get("more_body", False)

    async def start(self, status: int, *headers: Header) -> None:
        """Send the status line and the headers."""
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, data: bytes) -> None:
        """Send a part of the body; waits while the client is slow to take what it was sent before."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    def forget_request(self) -> None:
        """Let go of what was read of the request, for as long as the answer to it takes."""
        self.headers = {}
        if self._own is not None:  # another server may still look at it
            self._scope.clear()

    async def finish(self, data: bytes = b"") -> None:
        """Send the last part of the body, and wait until the client has taken all that is not in the socket."""
        if len(data) > PIECE:
            for start in range(0, len(data), PIECE):
                await self.write(data[start : start + PIECE])
            data = b""
        await self.send({"type": "http.response.body", "body": data, "more_body": False})
        if (own := self._own) is not None and own.buffers:
            await own.taken()

    def respond(self, problem: Problem, headers: dict[str, str] | None = None) -> Response:
        """Write a problem as clients of this path expect it."""
        if self._scope["path"].startswith(openai_errors.PREFIX):
            return openai_errors.respond(problem, headers)
        return problems.respond(problem, headers)

    async def answer(self, problem: Problem, headers: dict[str, str] | None = None) -> None:
        """Answer with a problem."""
        self.error = problem.code
        await self.respond(problem, headers)(self._scope, self._receive, self.send)
        await self.settle()

    @property
    def unsettled(self) -> bool:
        """Whether the client has not taken all that it was sent."""
        return self._own is not None and self._own.buffers

    async def settle(self) -> None:
        """See to it that the client takes what it was sent, however it was: if it does not, break off."""
        own = self._own
        if own is None or not own.buffers:
            return
        try:
            async with asyncio.timeout(TAKEN_WITHIN):
                await own.taken()
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
        if self._own is not None:
            self._own.on_leave = None
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.wait([self._listener])

    def _listen(self) -> None:
        """Notice from now on when the client leaves."""
        self._read = True
        if self._own is not None:
            self._own.on_leave = self._leave
        else:  # a task waits for it: polling would miss it while the answer is waited for
            self._listener = asyncio.create_task(self._until_left(), name="disconnect")

    async def _until_left(self) -> None:
        await self._gone()
        if not self.complete:  # with a complete answer the server has no more to tell us
            self._leave()

    async def _gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    def _leave(self) -> None:
        self._end(ClientLeftError())

    def settled(self) -> None:
        """Let go of the block that was `wanted`, as it ends: nothing else ends it any more."""
        self._limit = None

    def unwanted(self) -> Exception:
        """Say why the block was ended that is `wanted`."""
        if self._reason is not None:
            return self._reason
        if self._read:
            return DeadlineExceededError("the deadline of the request passed")
        return _too_slow("the body did not arrive before the deadline of the request")

    def _end(self, reason: Exception) -> None:
        if self._limit is not None and self._reason is None and not self._limit.expired():
            self._reason = reason
            self._limit.expire()

    async def _cut_off(self, *, at_once: bool) -> None:
        own = self._own
        if own is None:
            raise CutOffError
        own.break_off(at_once=at_once)
        # It is closed once the client has taken what was buffered; if it doesn't, that is lost.
        try:
            async with asyncio.timeout(FAREWELL):
                await self._gone()
        except TimeoutError:
            own.break_off(at_once=True)
            await self._gone()


class Wanted(Timeout):
    """Ends a block at the deadline of its request, or when the client leaves, or when the gateway stops.

    Raises ClientLeftError, DeadlineExceededError, Refusal, or what `Exchange.interrupt` was given.
    """

    __slots__ = ("_exchange",)

    def __init__(self, exchange: Exchange, seconds: float) -> None:
        super().__init__(seconds)
        self._exchange = exchange

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exchange.settled()
        try:
            super().__exit__(kind, error, trace)
        except TimeoutError as over:
            raise self._exchange.unwanted() from over


def exchange_of(scope: ASGIScope) -> Exchange:
    """Give the exchange that `Entry` has put around a request."""
    found = scope[EXCHANGE]
    assert isinstance(found, Exchange)
    return found


def _too_slow(text: str) -> Refusal:
    return Refusal(HTTPStatus.REQUEST_TIMEOUT, "body-too-slow", text, close=True)


def _affinity(key: bytes | None) -> bytes | None:
    if key is not None and not (0 < len(key) <= MAX_AFFINITY and _is_text(key)):
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


def _timeout(value: bytes | None) -> float | None:
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
