"""Loads a server over HTTP, as it is told on stdin: the same client for ours and for the rivals.

python -m benchmarks.http_caller calls URL --path /run_remote --answer json
python -m benchmarks.http_caller streams URL --path /run_remote
python -m benchmarks.http_caller paced URL --path /run_remote
python -m benchmarks.http_caller held URL --path /run_remote
"""

import argparse
import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import msgspec

from benchmarks import driving, pacing
from benchmarks.driving import WrongAnswerError
from benchmarks.http_client import Connection
from benchmarks.rivals import loop, tokens
from chains_stream.load import closed_loop, streams

WARM_UP_COUNT = 10  # tokens of a stream before those that are measured
TOKEN = b'\ndata: "'  # begins each; the end of a stream has an object there

# What a server makes of a text in its answer.
ANSWERS: dict[str, Callable[[str], bytes]] = {
    "json": lambda text: f'"{text}"'.encode(),
    "object": lambda text: f'{{"text":"{text}"}}'.encode(),
    "text": str.encode,
}


class StreamStep(msgspec.Struct, kw_only=True):
    """So many readers, each of whom reads streams of `count` tokens one after the other."""

    readers: int
    count: int = 200
    seconds: float = 2.0
    warm_up: float = 0.3
    pids: list[int] = []


class Hold(msgspec.Struct, kw_only=True):
    """Open so many more streams, read the first token of each, and keep them open."""

    streams: int


class Pool:
    """Connections to one server: as many as there are requests at once."""

    def __init__(self, url: str, stack: AsyncExitStack) -> None:
        self._url = url
        self._stack = stack
        self._free: list[Connection] = []

    async def take(self) -> Connection:
        while self._free:
            connection = self._free.pop()
            if connection.usable:
                return connection
            connection.close()
        return await self._stack.enter_async_context(Connection(self._url))

    def give_back(self, connection: Connection) -> None:
        self._free.append(connection)


async def measure_calls(pool: Pool, path: str, answer: Callable[[str], bytes], url: str) -> None:
    async def call(text: str) -> str:
        connection = await pool.take()
        given = await connection.post(path, f'{{"text":"{text}"}}'.encode())
        pool.give_back(connection)
        if given != answer(text):
            raise WrongAnswerError(f"{url}{path}: {given[:200]!r}")
        return text

    await driving.drive(call, driving.text_payload)


async def measure_streams(pool: Pool, path: str, url: str) -> None:
    async def do(step: StreamStep) -> dict[str, float]:
        async def read(count: int) -> AsyncIterator[int]:
            connection = await pool.take()
            left = count
            request = b'{"count":%d}' % count
            async for piece in connection.stream(path, request):
                if arrived := min(left, piece.count(TOKEN)):
                    left -= arrived
                    yield arrived
            if left:  # a piece ended in the middle of what begins a token
                yield left
            if connection.body() != b"".join(tokens.events(count)):
                raise WrongAnswerError(f"{url}{path}: {connection.body()[:200]!r} ...")
            pool.give_back(connection)

        if step.warm_up:
            short = streams(lambda: read(WARM_UP_COUNT))
            driving.require_faultless(await closed_loop(short, in_flight=step.readers, seconds=step.warm_up))
        act = streams(lambda: read(step.count))
        busy = driving.cpu_seconds(step.pids)
        result = await closed_loop(act, in_flight=step.readers, seconds=step.seconds)
        driving.require_faultless(result)
        busy = driving.cpu_seconds(step.pids) - busy
        return driving.figures_of(result) | {"cpu_s_per_token": busy / (result.completed * step.count)}

    await driving.obey(do, StreamStep)


async def measure_paced(pool: Pool, path: str) -> None:
    async def read(engine: pacing.Engine) -> AsyncIterator[tuple[float, list[str]]]:
        connection = await pool.take()
        request = msgspec.json.encode(engine)
        rest = b""
        async for piece in connection.stream(path, request):
            moment = time.monotonic()
            *events, rest = (rest + piece).split(b"\n\n")
            texts = [event.rpartition(TOKEN)[2][:-1].decode() for event in events if TOKEN in event]
            if texts:
                yield moment, texts
        pool.give_back(connection)

    await pacing.drive(read)


async def hold_streams(pool: Pool, path: str) -> None:
    held: list[AsyncIterator[bytes]] = []

    async def hold() -> None:
        connection = await pool.take()
        stream = connection.stream(path, b"{}")
        received = b""
        while TOKEN not in received:
            received += await anext(stream)
        held.append(stream)

    async def do(step: Hold) -> dict[str, float]:
        await asyncio.gather(*(hold() for _ in range(step.streams)))
        return {"open": len(held)}

    await driving.obey(do, Hold)


async def work(given: argparse.Namespace) -> None:
    async with AsyncExitStack() as stack:
        pool = Pool(given.url, stack)
        kinds: dict[str, Callable[[], Awaitable[None]]] = {
            "calls": lambda: measure_calls(pool, given.path, ANSWERS[given.answer], given.url),
            "streams": lambda: measure_streams(pool, given.path, given.url),
            "paced": lambda: measure_paced(pool, given.path),
            "held": lambda: hold_streams(pool, given.path),
        }
        await kinds[given.kind]()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["calls", "streams", "paced", "held"])
    parser.add_argument("url")
    parser.add_argument("--path", default="/run_remote")
    parser.add_argument("--answer", choices=list(ANSWERS), default="json")
    loop.run(work(parser.parse_args()))


if __name__ == "__main__":
    main()
