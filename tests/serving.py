"""A gateway for a test: the real server on a free port, the embedded broker, and Chainlets that do what a test says."""

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from http import HTTPStatus
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import httpx
import msgspec

import chains_stream as chains
from chains_stream.broker import Broker, Reader
from chains_stream.calls import Caller
from chains_stream.chain import Chain
from chains_stream.client import open_caller, open_connected
from chains_stream.gateway import entry
from chains_stream.gateway.app import Gateway
from chains_stream.gateway.server import Server
from chains_stream.gateway.tls import Tls
from chains_stream.settings import Settings
from chains_stream.worker import Host
from tests.sample import Seen

WAIT = 20.0  # seconds that a test waits for what must come
NARROW = 4 << 10  # bytes that each end of a narrow connection holds, about


class BusyError(Exception):
    """A user's own error with an HTTP status."""

    def __init__(self, status_code: int) -> None:
        super().__init__(status_code)
        self.status_code = status_code


class Greet(chains.ChainletBase):
    """All its arguments have defaults."""

    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=64))

    async def run_remote(self, name: str = "world", times: int = 1) -> str:
        return f"Hello, {name}!" * times


class Refuse(chains.ChainletBase):
    """Fails as it is told to."""

    async def run_remote(self, status: int, retry_after: float | None = None) -> None:
        if retry_after is not None:
            raise chains.OverloadedError("the queue is full", retry_after=retry_after)
        raise BusyError(status)


class Part(msgspec.Struct):
    text: str
    number: int | None = None


class Say(chains.ChainletBase):
    """Streams what it is given, then fails if it is told to."""

    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=64))

    async def run_remote(self, texts: list[str], fail: str = "") -> AsyncIterator[str]:
        for text in texts:
            yield text
        if fail:
            raise ValueError(fail)


class SayParts(chains.ChainletBase):
    """Streams structs."""

    async def run_remote(self, parts: list[Part], fail: str = "") -> AsyncIterator[Part]:
        for part in parts:
            yield part
        if fail:
            raise ValueError(fail)


class Pieces(chains.ChainletBase):
    """Streams bytes; notes each piece, and the end."""

    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=64))

    async def run_remote(self, data: bytes, size: int, repeat: int = 1, name: str = "pieces") -> AsyncIterator[bytes]:
        try:
            for _ in range(repeat):
                for start in range(0, len(data), size):
                    Seen.note(name)
                    yield data[start : start + size]
        finally:
            Seen.note(f"{name} closed")


class Pause(chains.ChainletBase):
    """Streams one chunk, then waits to be told to go on by `Seen`: ``go`` ends it, ``fail`` fails it."""

    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=64))

    async def run_remote(self, name: str, then: str = "go") -> AsyncIterator[str]:
        try:
            yield "first\n"
            Seen.note(f"{name} waits")
            await Seen.until(then, seconds=WAIT)
            yield "last\n"
        finally:
            Seen.note(f"{name} closed")


class Slow(chains.ChainletBase):
    """One at a time; waits to be told to go on."""

    async def run_remote(self, name: str) -> str:
        Seen.note(f"{name} began")
        try:
            await Seen.until("go", seconds=WAIT)
        finally:
            Seen.note(f"{name} stopped")
        return name


class Count(chains.ChainletBase):
    """Counts how often it ran, and fails until then if it is told to."""

    async def run_remote(self, name: str, succeed_at: int = 0) -> int:
        Seen.note(name)
        if Seen.counts[name] < succeed_at:
            raise ValueError(name)
        return Seen.counts[name]


class Served:
    """A gateway that runs, and what stands around it."""

    def __init__(
        self,
        entrypoint: type[chains.ChainletBase],
        stack: AsyncExitStack,
        settings: Settings,
        trust: ssl.SSLContext | None = None,
        *,
        port: int = 0,
    ) -> None:
        self.trust = trust
        self.chain = Chain.of(entrypoint)
        self.settings = settings
        self.url = ""
        self.server = Server("127.0.0.1", port, settings.grace_period, tls=Tls.of(settings))
        self.broker: Broker
        self.caller: Caller
        self.gateway: Gateway
        self.http: httpx.AsyncClient
        self._stack = stack
        self.hosted: Host | None = None

    async def start(self) -> None:
        self.broker = await open_connected(self._stack, self.settings)
        await self.open()

    async def open(self) -> None:
        """Open the gateway."""
        self.caller = await open_caller(self._stack, self.broker, self.settings)
        gateway = self.gateway = Gateway(self.chain, self.caller, self.broker, self.settings)
        self._stack.push_async_callback(gateway.close)
        await gateway.start()
        self._stack.push_async_callback(self.server.stop)
        self.url = await self.server.start(gateway.app, gateway.interrupt)
        limits = httpx.Limits(max_connections=None)
        verify: ssl.SSLContext | bool = True if self.trust is None else self.trust
        self.http = httpx.AsyncClient(base_url=self.url, timeout=WAIT, limits=limits, trust_env=False, verify=verify)
        self._stack.push_async_callback(self.http.aclose)

    @asynccontextmanager
    async def beside(self, port: int = 0) -> AsyncIterator["Served"]:
        """Give another gateway of the same Chain, as another process would have it."""
        async with AsyncExitStack() as stack:
            other = Served(self.chain.entrypoint, stack, self.settings, port=port)
            other.broker = self.broker
            await other.open()
            yield other

    async def host(self) -> None:
        """Have the Chainlets served."""
        self.hosted = Host(self.chain, self.chain.chainlets, self.broker, self.caller, self.settings)
        self._stack.push_async_callback(self.hosted.drain)
        await self.hosted.start()

    async def call(self, accept: str | None = None, **arguments: Any) -> httpx.Response:
        headers = {} if accept is None else {"accept": accept}
        return await self.http.post("/run_remote", json=arguments, headers=headers)

    @property
    def topic(self) -> str:
        return self.chain.topic(self.chain.entrypoint, self.settings.namespace)

    async def follow(self, topic: str) -> Reader:
        """Read what is published on a topic from now on."""
        return await self.broker.read(topic, dict.fromkeys(range(await self.broker.partitions(topic))))

    def connect(self, *, narrow: bool = False) -> "RawClient":
        """Give a client; a narrow connection holds only some KB of an answer that is not read."""
        if narrow:
            assert self.server._socket is not None
            self.server._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, NARROW)  # of those accepted from now on
        return RawClient(self.url, narrow=narrow, trust=self.trust)


class RequestLog(logging.Handler):
    """The lines that the gateway logs, for a test to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[dict[str, Any]] = []
        self._changed = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        event: Any = record.msg
        if event["event"] == "request":
            self.lines.append(dict(event))
            self._changed.set()

    async def wait(self, count: int = 1) -> list[dict[str, Any]]:
        """Wait until so many requests have ended."""
        async with asyncio.timeout(WAIT):
            while len(self.lines) < count:
                self._changed.clear()
                await self._changed.wait()
        return self.lines


@contextmanager
def request_log() -> Iterator[RequestLog]:
    """Log what the gateway logs, for as long as the block runs."""
    handler, logger = RequestLog(), logging.getLogger(entry.__name__)
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield handler
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@asynccontextmanager
async def serving(
    entrypoint: type[Any], *, workers: bool = True, trust: ssl.SSLContext | None = None, **settings: Any
) -> AsyncIterator[Served]:
    """Serve a Chain through a gateway; with no `workers`, until `host` is called. `trust` is for clients, with TLS."""
    named = {
        "namespace": f"t{uuid4().hex[:10]}",
        "partitions": 4,
        "reply_partitions": 1,
        "grace_period": 5.0,
        "secret": 32 * "t",
    }
    async with AsyncExitStack() as stack:
        served = Served(entrypoint, stack, Settings.of(**{**named, **settings}), trust)
        await served.start()
        if workers:
            await served.host()
        yield served


class RawClient:
    """A client that does what an HTTP library would not: leaves early, reads slowly, speaks badly."""

    def __init__(self, url: str, *, narrow: bool = False, trust: ssl.SSLContext | None = None) -> None:
        self._narrow = narrow
        self._trust = trust
        host, _, port = url.rpartition("//")[2].rpartition(":")
        self._address = host, int(port)

    async def __aenter__(self) -> Self:
        # A reader that holds little, so that what is not read stays in the socket.
        connection = socket.socket()
        connection.setblocking(False)
        if self._narrow:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, NARROW)
        await asyncio.get_running_loop().sock_connect(connection, self._address)
        limit = 1 << 10 if self._narrow else 16 << 10
        name = None if self._trust is None else self._address[0]
        self.reader, self.writer = await asyncio.open_connection(
            sock=connection, limit=limit, ssl=self._trust, server_hostname=name
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.leave()

    async def leave(self) -> None:
        """Close the connection, as a client does that has gone."""
        self.writer.transport.abort()

    async def send(self, arguments: dict[str, Any], *headers: str, version: str = "1.1") -> None:
        body = msgspec.json.encode(arguments)
        lines = ["content-type: application/json", f"content-length: {len(body)}", *headers]
        await self.send_raw(
            "\r\n".join([f"POST /run_remote HTTP/{version}", "host: t", *lines, "", ""]).encode() + body
        )

    async def send_raw(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def read_until(self, mark: bytes) -> bytes:
        async with asyncio.timeout(WAIT):
            return await self.reader.readuntil(mark)

    async def read_answer(self) -> bytes:
        """Read an answer that has a length, head and body."""
        head = await self.read_until(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        async with asyncio.timeout(WAIT):
            return head + await self.reader.readexactly(length)

    async def read_all(self) -> bytes:
        """Read to the end of the connection."""
        async with asyncio.timeout(WAIT):
            return await self.reader.read()


def problem_of(response: httpx.Response, status: HTTPStatus | int) -> dict[str, Any]:
    """Check that a response is problem details as all of ours are, and give them."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    assert problem["code"]
    assert problem["request_id"] == response.headers["x-request-id"]
    return problem
