"""A bare aiokafka relay of tokens, made of the parts of `floor`: one record a token, and nothing else.

    python -m benchmarks.rivals.relay engine HOST:PORT NAME
    python -m benchmarks.rivals.relay reader HOST:PORT NAME    reads in the process that consumes
    python -m benchmarks.rivals.relay server HOST:PORT NAME    hands tokens on as server-sent events, by a bare ASGI app

A request goes to NAME.requests, its tokens come from NAME.replies. No errors, no cancelling, no backpressure.
"""

import argparse
import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from benchmarks import pacing
from benchmarks.rivals import asgi, floor, loop, serving, tokens


async def engine(address: str, name: str) -> None:
    """Generate what is asked for."""
    await floor.create_topics(address, name)
    consumer = await floor.reading(address, f"{name}.requests", floor.PARTITIONS)
    producer = floor.producer_of(address)
    await producer.start()
    sender = floor.Sender(producer, f"{name}.replies", 1)

    async def generate(identity: bytes, request: pacing.Engine) -> None:
        async for text in pacing.generate(request):
            sender.put(identity + text.encode())

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(sender.run())
        print("Engine is ready", flush=True)
        while True:
            for records in (await consumer.getmany(timeout_ms=floor.WAIT_MS)).values():
                for record in records:
                    request = msgspec.msgpack.decode(record.value[floor.ID :], type=pacing.Engine)
                    tasks.create_task(generate(record.value[: floor.ID], request))


class Stream:
    """What has arrived of one stream."""

    def __init__(self) -> None:
        self._texts: deque[str] = deque()
        self._arrived = asyncio.Event()

    def put(self, text: str) -> None:
        self._texts.append(text)
        self._arrived.set()

    async def take(self) -> list[str]:
        await self._arrived.wait()
        self._arrived.clear()
        taken = list(self._texts)
        self._texts.clear()
        return taken


class Relay:
    """Asks for streams, and hands on what arrives of them."""

    def __init__(self, sender: floor.Sender, consumer: Any) -> None:
        self._sender = sender
        self._consumer = consumer
        self._streams: dict[bytes, Stream] = {}
        self._number = 0

    async def read(self, request: pacing.Engine) -> AsyncIterator[list[str]]:
        self._number += 1
        identity = self._number.to_bytes(floor.ID, "big")
        stream = self._streams[identity] = Stream()
        self._sender.put(identity + msgspec.msgpack.encode(request))
        left = request.count
        while left:
            texts = await stream.take()
            left -= len(texts)
            yield texts
        del self._streams[identity]

    async def run(self) -> None:
        while True:
            for records in (await self._consumer.getmany(timeout_ms=floor.WAIT_MS)).values():
                for record in records:
                    self._streams[record.value[: floor.ID]].put(record.value[floor.ID :].decode())


@asynccontextmanager
async def relaying(address: str, name: str) -> AsyncIterator[Relay]:
    consumer = await floor.reading(address, f"{name}.replies", 1)
    producer = floor.producer_of(address)
    await producer.start()
    sender = floor.Sender(producer, f"{name}.requests", floor.PARTITIONS)
    relay = Relay(sender, consumer)
    tasks = [asyncio.create_task(sender.run()), asyncio.create_task(relay.run())]
    try:
        yield relay
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await producer.stop()
        await consumer.stop()


async def reader(address: str, name: str) -> None:
    async with relaying(address, name) as relay:

        async def read(request: pacing.Engine) -> AsyncIterator[tuple[float, list[str]]]:
            async for texts in relay.read(request):
                yield time.monotonic(), texts

        await pacing.drive(read)


async def server(address: str, name: str) -> None:
    async with relaying(address, name) as relay:

        async def app(scope: asgi.Message, receive: asgi.Receive, send: asgi.Send) -> None:
            if scope["type"] != "http":
                return
            request = msgspec.json.decode(await asgi.body_of(receive), type=pacing.Engine)
            await send(asgi.START)
            number = 0
            async for texts in relay.read(request):
                events = [tokens.event(number + place, text) for place, text in enumerate(texts)]
                number += len(texts)
                await send({"type": "http.response.body", "body": b"".join(events), "more_body": True})
            await send({"type": "http.response.body", "body": tokens.done(number), "more_body": False})

        await serving.serving(app)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"engine": engine, "reader": reader, "server": server}
    parser.add_argument("part", choices=list(parts))
    parser.add_argument("address")
    parser.add_argument("name")
    given = parser.parse_args()
    loop.run(parts[given.part](given.address, given.name))


if __name__ == "__main__":
    main()
