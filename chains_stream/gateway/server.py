"""The HTTP server: uvicorn in this process, on a socket of ours, started and stopped by whoever owns it."""

import asyncio
import errno
import math
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import h11
import msgspec
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from chains_stream.errors import ChainsUsageError
from chains_stream.gateway.exchange import CONNECTION, FAREWELL
from chains_stream.gateway.problems import MEDIA_TYPE, Problem, title
from chains_stream.policy import new_request_id

BACKLOG = 2048  # connections that wait to be accepted
SLACK = 2 * FAREWELL + 1.0  # seconds after the grace period for the last answers to be cut short


class Server:
    """Serves an ASGI app at an address.

    Args:
        host: a name or address of this machine.
        port: 0 picks a free one.
        grace_period: seconds that running requests have after `stop`.

    Attributes:
        url: where the server is reached from this machine, once it is bound.
    """

    def __init__(self, host: str, port: int, grace_period: float) -> None:
        self.url = ""
        self._host = host
        self._port = port
        self._grace_period = grace_period
        self._socket: socket.socket | None = None
        self._uvicorn: _Uvicorn | None = None
        self._serving: asyncio.Task[None] | None = None
        self._interrupt: Callable[[], None] = _nothing

    async def bind(self) -> str:
        """Take the port, and give the URL; connections are refused until `start`.

        Before models are loaded, say, which takes a while. Raises ChainsUsageError.
        """
        if self._socket is None:
            try:
                self._socket = await _bound(self._host, self._port)
            except (OSError, UnicodeError) as error:
                raise ChainsUsageError(self._explain(error)) from error
            host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self._host, self._host)  # noqa: S104 - any
            port = self._socket.getsockname()[1]
            self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        return self.url

    async def start(self, app: ASGIApp, interrupt: Callable[[], None] | None = None) -> str:
        """Take requests, and give the URL. Raises ChainsUsageError.

        `interrupt` is called when the grace period is over: it has the requests that still run end at once.
        """
        assert self._serving is None, "started once"
        await self.bind()
        assert self._socket is not None, "bound"
        if interrupt is not None:
            self._interrupt = interrupt
        config = uvicorn.Config(
            app,
            http=_Connection,
            ws="none",
            lifespan="off",
            interface="asgi3",
            backlog=BACKLOG,
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=math.ceil(self._grace_period + SLACK),
        )
        self._uvicorn = _Uvicorn(config)
        self._serving = asyncio.create_task(self._uvicorn.serve([self._socket]), name="http")
        ready = asyncio.create_task(self._uvicorn.ready.wait(), name="http ready")
        try:
            await asyncio.wait([self._serving, ready], return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
            await asyncio.wait([ready])
        if self._serving.done():
            serving, self._serving = self._serving, None
            try:
                serving.result()
            except OSError as error:
                raise ChainsUsageError(self._explain(error)) from error
        return self.url

    async def stop(self) -> None:
        """Stop accepting, let running requests finish within the grace period, end the others, and close."""
        timer = asyncio.get_running_loop().call_later(self._grace_period, self._interrupt)
        try:
            if self._uvicorn is not None and self._serving is not None:
                self._uvicorn.should_exit = True
                await self._serving
        finally:
            timer.cancel()
            if self._socket is not None:
                self._socket.close()

    def _explain(self, error: OSError | UnicodeError) -> str:
        host, port = self._host, self._port
        if isinstance(error, UnicodeError | socket.gaierror):  # what is no name at all does not get as far as a lookup
            return f"{host} is not the name or an address of this machine: choose another with --host"
        match error.errno:
            case errno.EADDRINUSE:
                return f"port {port} on {host} is in use: choose another with --port"
            case errno.EADDRNOTAVAIL:
                return f"{host} is not an address of this machine: choose another with --host"
            case errno.EACCES:
                return f"port {port} on {host} is not allowed to this user: choose one above 1023 with --port"
            case _:
                return f"can't listen on port {port} of {host}: {error.strerror}"


class _Uvicorn(uvicorn.Server):
    """Uvicorn without signals, which belong to the command line, and with a way to wait until it serves."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()


class _Connection(H11Protocol):
    """A connection that its app can break off, and that answers malformed HTTP as we answer everything else."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's own
        super().connection_made(transport)
        self.app_state = {**self.app_state, CONNECTION: self}
        # Writing pauses as soon as the socket is full: what is sent next, and the end of a request, wait until nothing
        # is buffered here, so that a client which does not read costs no more than one piece of an answer.
        transport.set_write_buffer_limits(high=0)

    def break_off(self, *, at_once: bool) -> None:
        # An answer in HTTP/1.0 ends where its connection does: only a reset tells that it is not the end.
        if at_once or self.conn.their_http_version == b"1.0":
            linger = struct.pack("ii", 1, 0)
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        if at_once:
            self.transport.abort()
        else:
            self.transport.close()

    @property
    def buffers(self) -> bool:
        return self.flow.write_paused

    async def taken(self) -> None:
        await self.flow.drain()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()  # in the middle of another answer
            return
        request_id = new_request_id()
        problem = Problem(title=title(400), status=400, detail=msg, code="invalid-http", request_id=request_id)
        body = msgspec.json.encode(problem)
        headers: list[tuple[Any, Any]] = [
            ("content-type", MEDIA_TYPE),
            ("content-length", str(len(body))),
            ("x-request-id", request_id),
            ("connection", "close"),
        ]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


async def _bound(host: str, port: int) -> socket.socket:
    found = await asyncio.get_running_loop().getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    family, kind, protocol, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except BaseException:
        bound.close()
        raise
    return bound


def _nothing() -> None:
    """Nothing is to be interrupted."""
