"""A lean HTTP/1.1 client that loads a server with JSON, and counts the tokens of streams as they arrive.

At 256 requests in flight httpx spends 6 ms of processor time on each, and would measure itself. This one does what a
load needs and no more: POST over kept connections, one request at a time on each; no redirects, no cookies, no retries.
"""

import asyncio
import ssl
from collections.abc import AsyncGenerator, Callable
from types import TracebackType
from typing import NamedTuple, Self, cast
from urllib.parse import urlsplit

import msgspec

from chains_stream.errors import ChainsUsageError
from chains_stream.load import FailedError

CONNECT_TIMEOUT = 10.0  # seconds
STALE = 3.0  # seconds of rest after which a connection is not used again: servers close theirs after five or so
MAX_HEAD = 64 << 10  # bytes of an answer's head

LINES = "application/x-ndjson"
EVENTS = "text/event-stream"
_FAILURE = b'{"error":'  # how the last line of a stream that failed begins


class Answer(NamedTuple):
    """An answer that has arrived as a whole."""

    status: int
    content_type: str
    content: bytes

    @property
    def succeeded(self) -> bool:
        return _succeeded(self.status)

    def check(self) -> None:
        """Raise FailedError, of the status and the problem's code, unless this is a success."""
        if not self.succeeded:
            raise FailedError(f"HTTP {self.status} {_code(self.content)}".rstrip())


class Client:
    """Sends requests to one address, over as many connections as there are requests at once.

    Args:
        url: ``http://`` or ``https://``, host, port; requests go to `path` below it.
        path: where to.
        accept: the media types that are asked for.
        key: an API key of the gateway.

    Attributes:
        url: as it was given.
        host: the name or address in it.
    """

    def __init__(
        self, url: str, *, path: str = "/run_remote", accept: str = f"{LINES}, application/json", key: str | None = None
    ) -> None:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ChainsUsageError(f"{url}: {error}") from None
        plain = url.isascii() and url.isprintable() and " " not in url
        if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
            raise ChainsUsageError(f"{url}: not http://host:port or https://host:port")
        self.url = url
        self.host = parts.hostname
        self._port = port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        lines = [
            f"POST {parts.path.rstrip('/')}{path} HTTP/1.1",
            f"host: {parts.netloc.rpartition('@')[2]}",
            f"accept: {accept}",
            "content-type: application/json",
            *([] if key is None else [f"authorization: Bearer {key}"]),
            "content-length: ",
        ]
        self._head = "\r\n".join(lines).encode()
        self._resting: list[tuple[float, _Connection]] = []
        self._open: set[_Connection] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections, and wait until they are."""
        self._resting.clear()
        for connection in tuple(self._open):
            await connection.close()
            self._open.discard(connection)

    async def first(self, body: bytes) -> Answer:
        """Send a request, and leave at the first of a stream, or the end of a failure: to see what would be loaded.

        Raises OSError, FailedError.
        """
        connection = await self._send(body, counts=True)
        try:
            await connection.more()
            return connection.answer()
        finally:
            self._put_back(connection)

    async def post(self, body: bytes) -> Answer:
        """Send a request, and give the answer, whatever its status. Raises OSError, FailedError."""
        connection = await self._send(body, counts=False)
        try:
            while await connection.more():
                pass
            return connection.answer()
        finally:
            self._put_back(connection)

    async def call(self, body: bytes) -> None:
        """Send a request, and wait for all of the answer. Raises OSError, FailedError, also for a status of failure."""
        (await self.post(body)).check()

    async def stream(self, body: bytes) -> AsyncGenerator[int, None]:
        """Send a request, and yield how many tokens have arrived, as they arrive. Raises OSError, FailedError.

        Tokens are lines of JSON, or server-sent events that are messages; of any other type they can't be told apart,
        and what a chunk of HTTP holds counts as one.
        """
        connection = await self._send(body, counts=True)
        try:
            while count := await connection.more():
                yield count
            connection.answer().check()
        finally:
            self._put_back(connection)

    async def _send(self, body: bytes, *, counts: bool) -> "_Connection":
        connection = await self._connection()
        connection.begin(self._head + b"%d\r\n\r\n%b" % (len(body), body), counts=counts)
        return connection

    async def _connection(self) -> "_Connection":
        loop = asyncio.get_running_loop()
        while self._resting:
            since, connection = self._resting.pop()
            if connection.usable and loop.time() - since < STALE:
                return connection
            connection.abort()
            self._open.discard(connection)
        async with asyncio.timeout(CONNECT_TIMEOUT):
            _, connection = await loop.create_connection(_Connection, self.host, self._port, ssl=self._tls)
        self._open.add(connection)
        return connection

    def _put_back(self, connection: "_Connection") -> None:
        if connection.usable:
            self._resting.append((asyncio.get_running_loop().time(), connection))
        else:
            connection.abort()
            self._open.discard(connection)


class _Connection(asyncio.Protocol):
    """One connection, and the answer that arrives on it."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._closed = asyncio.Event()
        self._waiter: asyncio.Future[None] | None = None
        self._buffer = b""
        self._over = True
        self._keep = True
        self._failure: str | None = None

    @property
    def usable(self) -> bool:
        """Tell whether another request may be sent on it."""
        return self._over and self._keep and self._failure is None and not self._closed.is_set()

    def begin(self, request: bytes, *, counts: bool) -> None:
        """Send a request; its answer is counted, or kept."""
        assert self._transport is not None, "connected"
        self._counts = counts
        self._status = 0
        self._content_type = ""
        self._parts: list[bytes] = []
        self._tokens: Callable[[bytes], int] | None = None
        self._count = 0
        self._rest = b""  # of a line or an event that is not complete
        self._over = False
        self._parse = self._parse_head
        self._transport.write(request)

    async def more(self) -> int:
        """Wait for something to arrive, and give how many tokens have; 0 at the end. Raises FailedError."""
        while not self._count and not self._over:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        count, self._count = self._count, 0
        if not count and self._failure is not None:
            raise FailedError(self._failure)
        return count

    def answer(self) -> Answer:
        return Answer(self._status, self._content_type, b"".join(self._parts))

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    async def close(self) -> None:
        self.abort()
        await self._closed.wait()

    # --- asyncio's

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # which uvloop's is not, but for its methods

    def connection_lost(self, error: Exception | None) -> None:
        self._closed.set()
        if not self._over:
            ends_so = self._status and self._parse == self._parse_rest and error is None
            self._end(None if ends_so else "connection broke")

    def data_received(self, data: bytes) -> None:
        if self._over:
            self._keep = False  # nobody asked for it
            return
        try:
            self._buffer = self._parse(self._buffer + data if self._buffer else data)
        except ValueError:
            self._end("malformed HTTP")
            self.abort()
        if self._count or self._over:
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _end(self, failure: str | None = None) -> None:
        self._over = True
        self._failure = failure or self._failure
        self._wake()

    # --- an answer: each part is parsed as far as it has arrived, and gives what is left for later

    def _parse_head(self, data: bytes) -> bytes:
        end = data.find(b"\r\n\r\n")
        if end < 0:
            if len(data) > MAX_HEAD:
                raise ValueError
            return data
        first, *lines = data[:end].split(b"\r\n")
        self._status = int(first[9:12])
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
        self._content_type = fields.get(b"content-type", b"").partition(b";")[0].strip().lower().decode("latin-1")
        self._keep = fields.get(b"connection", b"").lower() != b"close" and first.startswith(b"HTTP/1.1")
        if self._counts and _succeeded(self._status):
            self._tokens = {LINES: self._count_lines, EVENTS: self._count_events}.get(self._content_type, _one)
        if fields.get(b"transfer-encoding", b"").lower() == b"chunked":
            self._parse = self._parse_chunks
        elif b"content-length" in fields:
            self._left = int(fields[b"content-length"])
            self._parse = self._parse_length
        else:
            self._keep = False
            self._parse = self._parse_rest
        return self._parse(data[end + 4 :])

    def _parse_length(self, data: bytes) -> bytes:
        self._take(data[: self._left])
        self._left -= len(data)
        if self._left <= 0:
            self._keep &= self._left == 0
            self._end()
        return b""

    def _parse_rest(self, data: bytes) -> bytes:
        self._take(data)
        return b""

    def _parse_chunks(self, data: bytes) -> bytes:
        at = 0
        while True:
            end = data.find(b"\r\n", at)
            if end < 0:
                return data[at:]
            size = int(data[at:end].partition(b";")[0], 16)
            after = end + 2 + size
            if size == 0:
                if data.find(b"\r\n\r\n", end) < 0:
                    return data[at:]
                self._end()
                return b""
            if len(data) < after + 2:
                return data[at:]
            self._take(data[end + 2 : after])
            at = after + 2

    def _take(self, content: bytes) -> None:
        if not content:
            return
        if self._tokens is None:
            self._parts.append(content)
        else:
            self._count += self._tokens(content)

    def _count_lines(self, content: bytes) -> int:
        lines = (self._rest + content).split(b"\n")
        self._rest = lines.pop()
        if len(lines) and lines[-1].startswith(_FAILURE):
            code = _code(lines[-1][len(_FAILURE) : -1])
            if code:
                self._failure = f"stream failed {code}"
                return len(lines) - 1
        return len(lines)

    def _count_events(self, content: bytes) -> int:
        *events, self._rest = (self._rest + content).replace(b"\r\n", b"\n").split(b"\n\n")
        count = 0
        for event in events:
            name, data = b"message", b""
            for line in event.split(b"\n"):
                field, _, value = line.partition(b":")
                if field == b"event":
                    name = value.strip()
                elif field == b"data":
                    data = value.strip()
            if name == b"error":
                self._failure = f"stream failed {_code(data)}".rstrip()
            count += name == b"message" and data not in (b"", b"[DONE]")
        return count


def _one(_content: bytes) -> int:
    return 1


def _succeeded(status: int) -> bool:
    return 200 <= status < 300  # noqa: PLR2004 - HTTP's own numbers


class _Problem(msgspec.Struct):
    code: str = ""


def _code(content: bytes) -> str:
    """Give the code of problem details, or nothing."""
    try:
        return msgspec.json.decode(content, type=_Problem).code
    except msgspec.DecodeError:
        return ""
