"""The servers that are attacked: real gateways with their Chains, in a process of their own that tells how it is.

It writes its URLs as a line of JSON, then its `Figures` for each line that it reads. Patience and what is kept are
small, so that an attack meets their ends: nothing may grow, or hang, beyond them.
"""

# ruff: noqa: T201 - a program that prints

import asyncio
import faulthandler
import gc
import hashlib
import logging
import os
import signal
import sys
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec

from chains_stream.brokers import memory_log
from chains_stream.chain import Chain
from chains_stream.cli.process import _event_loop
from chains_stream.gateway import claims, connection, exchange, results, websocket_session
from tests.fuzz.chain import Echo, Take
from tests.serving import serving

ROOT = Path(__file__).parents[2]
KEY = "fuzz-key"
DEADLINE = 3.0  # seconds of a request
MAX_BODY = 128 << 10  # bytes
PAGE = os.sysconf("SC_PAGE_SIZE")
SHOWN = 20  # errors


class Figures(msgspec.Struct):
    """How the process is: what it holds, and what it logged as an error."""

    rss: int
    descriptors: int
    connections: int
    tasks: dict[str, int]
    errors: list[str]
    objects: int


class Errors(logging.Handler):
    """Keeps what was logged as an error: there is no reason for one."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if len(self.seen) < SHOWN:
            self.seen.append(logging.Formatter().format(record))


def impatient() -> None:
    """Have the ends of patience, and the bounds of what is kept, come soon."""
    connection.KEEP_ALIVE = 1.0
    connection.HEAD_SECONDS = 2.0
    connection.SWEEP = 0.25
    exchange.BODY_SECONDS = 2.0
    exchange.BODY_IDLE_SECONDS = 1.0
    vars(websocket_session).update(BEAT=0.5, SILENCE=1.0)
    memory_log.MAX_RECORDS = 1_000
    results.MOST_KNOWN = 1_000
    claims.MOST_CLAIMS = 1_000


def figures(errors: Errors, connections: int) -> Figures:
    gc.collect()
    rss = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE
    tasks = Counter(getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks())
    return Figures(
        rss,
        sum(1 for _ in Path("/proc/self/fd").iterdir()),
        connections,
        dict(tasks),
        errors.seen,
        len(gc.get_objects()),
    )


async def serve() -> None:
    errors = Errors()
    logging.getLogger().addHandler(errors)
    shared: dict[str, Any] = {
        "deadline": DEADLINE,
        "max_body_bytes": MAX_BODY,
        "partitions": 1,
        "request_retention_ms": 5_000,
    }
    keys: dict[str, Any] = {
        "api_keys": f"fuzz:{hashlib.sha256(KEY.encode()).hexdigest()}",
        "cors_origins": "https://fuzz.invalid",
    }
    async with AsyncExitStack() as stack:
        talk = Chain.load(f"{ROOT}/chainlets/openai_chat.py").entrypoint
        running = [
            await stack.enter_async_context(serving(Take, **shared)),
            await stack.enter_async_context(serving(talk, **shared)),
            await stack.enter_async_context(serving(Take, **shared, **keys)),
            await stack.enter_async_context(serving(Echo, **shared)),
        ]
        print(msgspec.json.encode([each.url for each in running]).decode(), flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            open_now = sum(len(each.server._listener.connections) for each in running if each.server._listener)
            print(msgspec.json.encode(figures(errors, open_now)).decode(), flush=True)


if __name__ == "__main__":
    faulthandler.register(signal.SIGUSR1)  # shows where it is stuck
    impatient()
    with asyncio.Runner(loop_factory=_event_loop) as runner:  # as the command has it
        runner.run(serve())
