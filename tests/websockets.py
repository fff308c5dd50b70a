"""A Chain that talks through WebSockets as a test says, and what tests of it have in common."""

import asyncio
from typing import Any

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

import chains_stream as chains
from tests.sample import Seen
from tests.serving import WAIT, RawClient, Served

OPENING = (
    b"GET /websocket?%b HTTP/1.1\r\nhost: t\r\nupgrade: websocket\r\nconnection: Upgrade\r\n"
    b"sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\nsec-websocket-version: 13\r\n\r\n"
)
TEXT, BINARY, CLOSE, PING, PONG = 0x1, 0x2, 0x8, 0x9, 0xA


class Ask(chains.ChainletBase):
    """Something below, which a conversation calls."""

    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=64))

    async def run_remote(self, text: str) -> str:
        return text[::-1]


@chains.mark_entrypoint
class Talk(chains.ChainletBase):
    """Does what the parameter `do` of the URL says; `name` is what it notes things under."""

    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=64))

    def __init__(self, ask: Ask = chains.depends(Ask)) -> None:
        self._ask = ask

    async def run_remote(self, websocket: chains.WebSocketProtocol) -> None:
        name = _name(websocket)
        Seen.note(f"{name} began")
        try:
            await getattr(self, f"_{websocket.query_params.get('do', 'echo')}")(websocket)
        except chains.WebSocketClosedError as error:
            Seen.note(f"{name} left {error.close_code} {error.reason}".rstrip())
            raise
        finally:
            Seen.note(f"{name} ended")

    async def _echo(self, websocket: chains.WebSocketProtocol) -> None:
        while True:
            await websocket.send(await websocket.receive())

    async def _reverse(self, websocket: chains.WebSocketProtocol) -> None:
        async for text in websocket.iter_text():
            await websocket.send_text(await self._ask.run_remote(text))
        Seen.note(f"{_name(websocket)} connected {websocket.is_connected()}")

    async def _listen(self, websocket: chains.WebSocketProtocol) -> None:
        async for text in websocket.iter_text():
            Seen.note(f"got {text}")

    async def _slowly(self, websocket: chains.WebSocketProtocol) -> None:
        async for _ in websocket.iter_text():
            await asyncio.sleep(0.1)
            Seen.note("taken")

    async def _json(self, websocket: chains.WebSocketProtocol) -> None:
        async for value in websocket.iter_json():
            await websocket.send_json({"got": value})

    async def _bytes(self, websocket: chains.WebSocketProtocol) -> None:
        async for value in websocket.iter_bytes():
            await websocket.send_bytes(value + value)

    async def _told(self, websocket: chains.WebSocketProtocol) -> None:
        await websocket.send_json({"headers": dict(websocket.headers), "query": dict(websocket.query_params)})
        await websocket.send_text(websocket.headers["X-Test"])

    async def _push(self, websocket: chains.WebSocketProtocol) -> None:
        count, size = (int(websocket.query_params[name]) for name in ("count", "size"))
        for number in range(count):
            await websocket.send_text(str(number).ljust(size))
            Seen.note("pushed")

    async def _push_and_wait(self, websocket: chains.WebSocketProtocol) -> None:
        await websocket.send_text("x" * int(websocket.query_params["size"]))
        Seen.note("pushed")
        await self._listen(websocket)

    async def _collect(self, websocket: chains.WebSocketProtocol) -> None:
        await Seen.until("go", seconds=WAIT)
        sizes = [len(await websocket.receive_bytes()) for _ in range(int(websocket.query_params["count"]))]
        await websocket.send_json(sum(sizes))

    async def _together(self, websocket: chains.WebSocketProtocol) -> None:
        given_up = [asyncio.create_task(websocket.send_text("given up")) for _ in range(5)]
        await asyncio.sleep(0)
        for task in given_up:
            task.cancel()
        await asyncio.wait(given_up)
        await asyncio.gather(*[websocket.send_text(str(number)) for number in range(2_000)])

    async def _close(self, websocket: chains.WebSocketProtocol) -> None:
        waiting = asyncio.create_task(websocket.receive())
        await asyncio.sleep(0)
        await websocket.close(4321, "enough")
        await asyncio.wait([waiting])
        assert isinstance(waiting.exception(), chains.WebSocketClosedError)
        assert not websocket.is_connected()
        await websocket.close()  # again, which does nothing
        await Seen.until("go", seconds=WAIT)
        Seen.note(f"{_name(websocket)} went on")
        await websocket.send("nobody hears it")

    async def _fail(self, websocket: chains.WebSocketProtocol) -> None:
        await websocket.send("first")
        raise ValueError("no good: " + "ü" * 200)

    async def _hang(self, websocket: chains.WebSocketProtocol) -> None:
        await websocket.send("hanging")
        await asyncio.Event().wait()


def _name(websocket: chains.WebSocketProtocol) -> str:
    return websocket.query_params.get("name", "talk")


def url_of(served: Served, **query: object) -> str:
    parameters = "&".join(f"{name}={value}" for name, value in query.items())
    return f"ws{served.url.removeprefix('http')}/websocket?{parameters}"


def talk(served: Served, *, headers: dict[str, str] | None = None, max_queue: int = 16, **query: object) -> connect:
    """Open a WebSocket with the usual client."""
    return connect(
        url_of(served, **query),
        additional_headers=headers,
        max_queue=max_queue,
        max_size=None,
        proxy=None,
        open_timeout=WAIT,
    )


async def closed(websocket: ClientConnection) -> tuple[int, str]:
    """Wait until the server closes it, and give the code and the reason."""
    try:
        async with asyncio.timeout(WAIT):
            while True:
                await websocket.recv()
    except ConnectionClosed as error:
        return (1006, "") if error.rcvd is None else (error.rcvd.code, error.rcvd.reason)


class Frames(RawClient):
    """A client that sends frames of any kind, good ones and others."""

    async def open(self, query: bytes = b"do=echo") -> None:
        await self.send_raw(OPENING % query)
        head = await self.read_until(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 "), head

    async def send_frame(self, opcode: int, data: bytes, *, final: bool = True, masked: bool = True) -> None:
        length = len(data)
        short = length if length < 126 else 126 if length < 1 << 16 else 127
        head = bytes([opcode | (0x80 if final else 0), short | (0x80 if masked else 0)])
        if short >= 126:
            head += length.to_bytes(2 if short == 126 else 8, "big")
        await self.send_raw(head + (bytes(4) if masked else b"") + data)  # a mask of zeros changes nothing

    async def read_frame(self) -> tuple[int, bytes]:
        """Give the opcode and the data of the next frame."""
        async with asyncio.timeout(WAIT):
            first, length = await self.reader.readexactly(2)
            if length >= 126:
                length = int.from_bytes(await self.reader.readexactly(2 if length == 126 else 8), "big")
            return first & 0xF, await self.reader.readexactly(length)

    async def read_close(self) -> tuple[int, str]:
        """Read up to the end, and give the code and the reason of it."""
        while (found := await self.read_frame())[0] != CLOSE:
            pass
        return int.from_bytes(found[1][:2], "big"), found[1][2:].decode()


def json_of(data: str | bytes) -> Any:
    return msgspec.json.decode(data)
