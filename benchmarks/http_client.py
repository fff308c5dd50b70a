"""The load client for HTTP: a bare asyncio protocol, so that it costs little beside what it measures.

One connection for each request in flight, kept from one request to the next. It keeps the bytes of an answer, and takes
HTTP's framing off them only when they are complete, to check them.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self, cast
from urllib.parse import urlsplit

from benchmarks.driving import WrongAnswerError

STALE = 2.0  # seconds of rest after which a connection is not used again: servers close theirs after five
END = b"0\r\n\r\n"  # of a body in chunks; no chunk of ours ends so


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection, one request at a time."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None, "http://host:port"
        self._host, self._port = parts.hostname, parts.port or 80
        self._transport: asyncio.Transport
        self._received = bytearray()
        self._began = 0  # where the body does
        self._arrived: asyncio.Future[None] | None = None
        self._lost = False
        self._used = time.monotonic()

    @property
    def usable(self) -> bool:
        """Tell whether another request may be sent on it."""
        return not self._lost and time.monotonic() - self._used < STALE

    async def __aenter__(self) -> Self:
        await asyncio.get_running_loop().create_connection(lambda: self, self._host, self._port)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._transport.abort()

    async def post(self, path: str, body: bytes) -> bytes:
        """Send a request and wait for its answer, which tells its length. Raises WrongAnswerError."""
        self._send(path, body, "application/json")
        head = await self._head()
        length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
        while len(self._received) < self._began + length:
            await self._more()
        return bytes(self._received[self._began :])

    async def stream(self, path: str, body: bytes) -> AsyncIterator[bytes]:
        """Send a request and give the bytes of its body, in HTTP's chunks, as they arrive. Raises WrongAnswerError."""
        self._send(path, body, "text/event-stream")
        await self._head()
        taken = self._began
        while True:
            if len(self._received) > taken:
                piece = bytes(self._received[taken:])
                taken += len(piece)
                yield piece
            if self._received.endswith(END):
                return
            await self._more()

    def body(self) -> bytes:
        """Give the body of the stream that has arrived, without HTTP's chunks."""
        parts: list[bytearray] = []
        at = self._began
        while True:
            line = self._received.index(b"\r\n", at)
            size = int(self._received[at:line], 16)
            if not size:
                return b"".join(parts)
            parts.append(self._received[line + 2 : line + 2 + size])
            at = line + 4 + size

    def _send(self, path: str, body: bytes, accept: str) -> None:
        self._received.clear()
        head = f"POST {path} HTTP/1.1\r\nhost: {self._host}\r\naccept: {accept}\r\ncontent-type: application/json\r\n"
        self._transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)

    async def _head(self) -> bytes:
        while (end := self._received.find(b"\r\n\r\n")) < 0:
            await self._more()
        head = bytes(self._received[: end + 4]).lower()
        if b" 200 " not in head[:16]:
            raise WrongAnswerError(self._received[:1000].decode(errors="replace"))
        self._began = end + 4
        return head

    async def _more(self) -> None:
        if self._lost:
            raise WrongAnswerError("the connection was closed in the middle of an answer")
        self._arrived = asyncio.get_running_loop().create_future()
        await self._arrived

    def _wake(self) -> None:
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)

    # --- asyncio's

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is of no class of asyncio

    def data_received(self, data: bytes) -> None:
        self._used = time.monotonic()
        self._received += data
        self._wake()

    def connection_lost(self, _error: Exception | None) -> None:
        self._lost = True
        self._wake()
