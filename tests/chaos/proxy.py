"""A TCP proxy to a broker, with a network that can fail."""

import asyncio
import socket
import struct
from typing import Self

CHUNK = 64 << 10
_AT_ONCE = struct.pack("ii", 1, 0)  # for SO_LINGER: closing sends RST


class Proxy:
    """Forwards connections from `port` to `target`, both on this machine, unless the network is down.

    Either connections are reset, and new ones too, or nothing goes through while all stay open, as if packets were
    lost: what was held back goes on once the network is back.
    """

    def __init__(self, port: int, target: int) -> None:
        self._port = port
        self._target = target
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._resetting = False

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._forward, "127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None, "entered"
        self._server.close()
        self.heal()
        self._reset_all()
        await self._server.wait_closed()

    def cut(self) -> None:
        """Reset all connections, and each new one, until `heal`."""
        self._resetting = True
        self._reset_all()

    def silence(self) -> None:
        """Let nothing through until `heal`."""
        self._flowing.clear()

    def heal(self) -> None:
        self._resetting = False
        self._flowing.set()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._resetting:
            _reset(writer)
            return
        try:
            there, to = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            _reset(writer)
            return
        pair = {writer, to}
        self._open |= pair
        try:
            ways = [asyncio.create_task(self._pump(reader, to)), asyncio.create_task(self._pump(there, writer))]
            _, running = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in running:
                way.cancel()
            await asyncio.wait(ways)
        finally:
            self._open -= pair
            for end in pair:
                end.close()

    async def _pump(self, source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(CHUNK):
                await self._flowing.wait()
                to.write(data)
                await to.drain()
        except OSError:
            return  # one side is gone, and so is the connection

    def _reset_all(self) -> None:
        for writer in tuple(self._open):
            _reset(writer)


def _reset(writer: asyncio.StreamWriter) -> None:
    connection: socket.socket | None = writer.get_extra_info("socket")
    if connection is not None and connection.fileno() >= 0:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
    writer.transport.abort()
