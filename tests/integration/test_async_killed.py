"""A worker that is killed between two of the things that it publishes for a request that nobody waits for."""

import asyncio
import signal
import sys
from contextlib import AsyncExitStack
from typing import Literal
from uuid import uuid4

import msgspec
import pytest

from chains_stream.messages import Done, Retry
from chains_stream.settings import KafkaSettings, Settings
from tests.integration.test_async_requests import HOOK, RAN, RUNNING, Parts
from tests.sample import Seen

KILLED = """
import asyncio, os, signal, sys
from contextlib import AsyncExitStack
from chains_stream import async_requests
from chains_stream.delays import Delays
from chains_stream.replies import FrameReply
from chains_stream.settings import KafkaSettings, Settings
from tests.integration.test_async_requests import Parts

def dying(function):
    async def then_die(*args, **more):
        await function(*args, **more)
        os.kill(os.getpid(), signal.SIGKILL)
    return then_die

async def main(broker, namespace, after):
    match after:
        case "retry":
            Delays.send = dying(Delays.send)
        case "answer":
            FrameReply.done = dying(FrameReply.done)
        case "delivery":
            async_requests.send_delivery = dying(async_requests.send_delivery)
    settings = Settings.of(
        broker=broker, namespace=namespace, partitions=2, reply_partitions=1,
        kafka=KafkaSettings(session_timeout_ms=6000),
    )
    async with AsyncExitStack() as stack:
        parts = Parts(stack, settings)
        await parts.start()
        host = await parts.host()
        print("serves", flush=True)
        await host.failed()

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    for seen in (Seen.reset, RAN.clear, RUNNING.clear):
        seen()


@pytest.mark.kafka
@pytest.mark.parametrize("after", ["retry", "answer", "delivery"])
async def test_what_a_killed_worker_had_published_is_neither_lost_nor_without_end(
    kafka_url: str, after: Literal["retry", "answer", "delivery"]
) -> None:
    settings = Settings.of(
        broker=kafka_url,
        namespace=f"t{uuid4().hex[:10]}",
        partitions=2,
        reply_partitions=1,
        grace_period=1,
        kafka=KafkaSettings(session_timeout_ms=6_000),
    )
    async with AsyncExitStack() as stack:
        parts = Parts(stack, settings)
        await parts.start()
        killed = await asyncio.create_subprocess_exec(
            sys.executable, "-c", KILLED, kafka_url, settings.namespace, after, stdout=asyncio.subprocess.PIPE
        )
        try:
            assert killed.stdout is not None
            assert await killed.stdout.readline() == b"serves\n"
            fails = 1 if after == "retry" else 0
            sent = await parts.send("one", webhook=HOOK, fails=fails, retry=Retry(3, 100, 100))
            async with asyncio.timeout(60):
                assert await killed.wait() == -signal.SIGKILL
        finally:
            if killed.returncode is None:
                killed.kill()
                await killed.wait()
        await parts.move()
        await parts.host()
        _, end = await parts.end(sent)
        assert isinstance(end, Done)
        assert msgspec.msgpack.decode(end.value) == "one"
        told = await parts.delivery(sent, 2 if after == "delivery" else 1)
        assert (told.url, told.status) == (HOOK, "SUCCEEDED")
        await parts.done(parts.topic)
        # The one that ended does not run again; the one that was to be tried again is the killed worker's, and its own.
        assert len(RAN) in (range(1, 4) if after == "retry" else [0])
