"""The HTTP server: on a socket of ours, started and stopped by whoever owns it."""

import asyncio
import errno
import ipaddress
import socket
from collections.abc import Callable

from starlette.types import ASGIApp

from chains_stream.errors import ChainsUsageError
from chains_stream.gateway.connection import Listener
from chains_stream.gateway.exchange import FAREWELL
from chains_stream.gateway.tls import HANDSHAKE_SECONDS, SHUTDOWN_SECONDS, Tls
from chains_stream.log import get_logger

BACKLOG = 2048  # connections that wait to be accepted
SLACK = 2 * FAREWELL + 1.0  # seconds after the grace period for the last answers to be cut short


log = get_logger(__name__)


class Server:
    """Serves an ASGI app at an address.

    Args:
        host: a name or address of this machine.
        port: 0 picks a free one.
        grace_period: seconds that running requests have after `stop`.
        tls: to serve https; else it is http.
        bound: a socket that is bound already, in place of one of the server's own; `stop` closes it.

    Attributes:
        url: where the server is reached from this machine, once it is bound.
        tls: what it was given.
    """

    def __init__(
        self,
        host: str,
        port: int,
        grace_period: float,
        *,
        tls: Tls | None = None,
        bound: socket.socket | None = None,
    ) -> None:
        self.url = ""
        self._host = host
        self._port = port
        self._grace_period = grace_period
        self.tls = tls
        self._socket = bound
        self._listener: Listener | None = None
        self._listening: asyncio.Server | None = None
        self._interrupt: Callable[[], None] = _nothing

    async def bind(self) -> str:
        """Take the port, and give the URL; connections are refused until `start`.

        Before models are loaded, say, which takes a while. Raises ChainsUsageError.
        """
        if self._socket is None:
            try:
                self._socket = await bind(self._host, self._port)
            except (OSError, UnicodeError) as error:
                raise ChainsUsageError(explain(self._host, self._port, error)) from error
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self._host, self._host)  # noqa: S104 - any
        scheme = "http" if self.tls is None else "https"
        self.url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{self._socket.getsockname()[1]}"
        return self.url

    @property
    def bound(self) -> socket.socket:
        """The socket, after `bind`."""
        assert self._socket is not None, "bound"
        return self._socket

    async def start(self, app: ASGIApp, interrupt: Callable[[], None] | None = None) -> str:
        """Take requests, and give the URL. Raises ChainsUsageError.

        `interrupt` is called when the grace period is over: it has the requests that still run end at once.
        """
        assert self._listening is None, "started once"
        await self.bind()
        assert self._socket is not None, "bound"
        if interrupt is not None:
            self._interrupt = interrupt
        tls = self.tls
        self._listener = Listener(app, "http" if tls is None else "https")
        loop = asyncio.get_running_loop()
        try:
            self._listening = await loop.create_server(
                self._listener.connect,
                sock=self._socket,
                backlog=BACKLOG,
                ssl=None if tls is None else tls.context,
                ssl_handshake_timeout=None if tls is None else HANDSHAKE_SECONDS,
                ssl_shutdown_timeout=None if tls is None else SHUTDOWN_SECONDS,
            )
        except OSError as error:
            raise ChainsUsageError(explain(self._host, self._port, error)) from error
        return self.url

    async def stop(self) -> None:
        """Stop accepting, let running requests finish within the grace period, end the others, and close."""
        if self._listening is not None and self._listener is not None:
            self._listening.close()
            await self._listener.hear_out()
            self._listener.shutdown()
            timer = asyncio.get_running_loop().call_later(self._grace_period, self._interrupt)
            try:
                async with asyncio.timeout(self._grace_period + SLACK):
                    await self._listener.idle()
            except TimeoutError:
                log.warning("http.unfinished", requests=len(self._listener.tasks))
                await self._listener.abort()
            finally:
                timer.cancel()
        if self._socket is not None:
            self._socket.close()


def explain(host: str, port: int, error: OSError | UnicodeError) -> str:
    """Say why a server can't listen there, and what to do."""
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


def is_local(bound: socket.socket) -> bool:
    """Tell whether a socket is bound to an address that this machine alone reaches."""
    return ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback


async def bind(host: str, port: int) -> socket.socket:
    """Give a socket that is bound and does not listen yet. Raises OSError, UnicodeError."""
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
