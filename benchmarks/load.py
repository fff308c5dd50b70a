"""Load a running gateway: closed-loop unary requests, and concurrent streams.

    python benchmarks/load.py http://127.0.0.1:8000 --requests 10000 --in-flight 256 --body '{"n": 1}'
    python benchmarks/load.py http://127.0.0.1:8000 --streams 100 --body '{"count": 500}'

The client speaks HTTP/1.1 over bare asyncio streams, one connection for each request in flight: at 256 of them httpx
spends 6 ms of CPU on a request, and would measure itself. Closed-loop latencies hide what a stalled server does to
clients that don't wait for it; figures of open-loop arrivals are still to come.
"""

import argparse
import asyncio
import json
import platform
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Self
from urllib.parse import urlsplit


@dataclass
class Report:
    """What a run saw: statuses, whether the bodies were as expected, latencies in seconds, and the time in all."""

    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[bytes] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def percentile(self, share: float) -> float:
        """Give the latency, in ms, that `share` of the requests stayed below."""
        return sorted(self.latencies)[min(len(self.latencies) - 1, int(share * len(self.latencies)))] * 1000

    def __str__(self) -> str:
        rate = len(self.latencies) / self.seconds
        figures = ", ".join(f"p{share:g} {self.percentile(share / 100):.1f} ms" for share in (50, 99))
        return f"{dict(self.statuses)}, {len(self.wrong)} wrong; {rate:,.0f}/s, {figures}"


class Connection:
    """One HTTP/1.1 connection to a gateway, one request at a time."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None, "http://host:port"
        self._address = (parts.hostname, parts.port or 80)
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection(*self._address)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()
        await self._writer.wait_closed()

    async def post(self, body: bytes, accept: str) -> tuple[int, bytes]:
        head = f"POST /run_remote HTTP/1.1\r\nhost: {self._address[0]}\r\naccept: {accept}\r\n"
        length = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        self._writer.write((head + length).encode() + body)
        answer = (await self._reader.readuntil(b"\r\n\r\n")).decode().lower()
        status = int(answer.split()[1])
        if "transfer-encoding: chunked" in answer:
            return status, b"".join([chunk async for chunk in self._chunks()])
        size = int(answer.partition("content-length: ")[2].partition("\r\n")[0])
        return status, await self._reader.readexactly(size)

    async def _chunks(self) -> AsyncIterator[bytes]:
        while size := int(await self._reader.readline(), 16):
            yield (await self._reader.readexactly(size + 2))[:-2]
        await self._reader.readexactly(2)


async def load(
    url: str, bodies: Iterable[bytes], in_flight: int, *, accept: str = "*/*", expected: Callable[[bytes, bytes], bool]
) -> Report:
    """Send all bodies, `in_flight` at once; `expected` tells whether an answer is that of its request."""
    report = Report()
    waiting = iter(bodies)

    async def send() -> None:
        async with Connection(url) as connection:
            for body in waiting:
                began = time.perf_counter()
                status, answer = await connection.post(body, accept)
                report.latencies.append(time.perf_counter() - began)
                report.statuses[status] += 1
                if not expected(body, answer):
                    report.wrong.append(answer)

    began = time.perf_counter()
    await asyncio.gather(*(send() for _ in range(in_flight)))
    report.seconds = time.perf_counter() - began
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--body", required=True, help="the arguments, as JSON")
    parser.add_argument("--requests", type=int, default=1_000)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--streams", type=int, default=0, help="read so many streams at once instead")
    given = parser.parse_args(arguments)
    body = json.dumps(json.loads(given.body)).encode()
    print(f"chains_stream {version('chains-stream')}, Python {platform.python_version()}, {platform.platform()}")
    if given.streams:
        lines = 0

        def count(_body: bytes, answer: bytes) -> bool:
            nonlocal lines
            lines += answer.count(b"\n")
            return True

        report = asyncio.run(
            load(given.url, [body] * given.streams, given.streams, accept="application/x-ndjson", expected=count)
        )
        print(f"{report}; {lines / report.seconds:,.0f} chunks/s")
    else:
        print(
            asyncio.run(load(given.url, [body] * given.requests, given.in_flight, expected=lambda _body, _answer: True))
        )


if __name__ == "__main__":
    main()
