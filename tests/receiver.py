"""A receiver of webhooks on this machine, which answers as a test tells it to."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import msgspec

WAIT = 30.0  # seconds that a test waits for what must come


class Post(NamedTuple):
    """One request that came."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)


def answer(status: str, *headers: str, body: str = "") -> bytes:
    """Write an answer."""
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", *headers, "", body]
    return "\r\n".join(lines).encode()


OK = answer("204 No Content")


class Receiver:
    """What came, and what is answered to it.

    Attributes:
        posts: all that came, as they came.
        answers: gives the bytes to answer a post with; `posts` holds it already.
    """

    def __init__(self) -> None:
        self.posts: list[Post] = []
        self.answers: Callable[[Post], Awaitable[bytes]] = self._ok
        self.port = 0
        self._changed = asyncio.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def wait(self, count: int = 1, *, path: str | None = None) -> list[Post]:
        """Wait until so many posts have come, to one path if it is named."""
        async with asyncio.timeout(WAIT):
            while len(found := [post for post in self.posts if path is None or post.path == path]) < count:
                self._changed.clear()
                await self._changed.wait()
        return found

    async def _ok(self, _post: Post) -> bytes:
        return OK

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in head[1:] if line)}
            body = await reader.readexactly(int(headers["content-length"]))
            post = Post(head[0].split(" ")[1], headers, body)
            self.posts.append(post)
            self._changed.set()
            writer.write(await self.answers(post))
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # who posted has gone
        finally:
            writer.close()


@asynccontextmanager
async def receiving(tls: ssl.SSLContext | None = None) -> AsyncIterator[Receiver]:
    """Receive on a free port, for the length of the block."""
    receiver, tasks = Receiver(), set[asyncio.Task[None]]()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(receiver.take(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=tls)
    receiver.port = server.sockets[0].getsockname()[1]
    try:
        yield receiver
    finally:
        server.close()
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()
