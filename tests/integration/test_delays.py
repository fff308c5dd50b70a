"""Records that go to their topic later, whatever becomes of those who move them; on both brokers."""

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any
from uuid import uuid4

import pytest

from chains_stream import delays
from chains_stream.broker import Broker, Record, TopicSpec
from chains_stream.client import open_connected
from chains_stream.delays import TARGET, Delays, Mover, delayed_spec, delayed_topic
from chains_stream.errors import BrokerError, ChainsUsageError
from chains_stream.letters import Letter, dead_letter_topic
from chains_stream.messages import now_ms
from chains_stream.settings import KafkaSettings, Settings
from tests.members import HOUR_MS, take

CLASSES = (0.3, 1.0, 2.0)
WAIT = 40.0


class Queue:
    """A delay queue with short delays, and a topic to which its records go."""

    def __init__(self, stack: AsyncExitStack, settings: Settings) -> None:
        self.settings = settings
        self.target = f"{settings.namespace}.target"
        self.broker: Broker
        self.delays: Delays
        self._stack = stack

    async def start(self) -> None:
        self.broker = await open_connected(self._stack, self.settings)
        await self.broker.ensure_topics([TopicSpec(self.target, 2, HOUR_MS), delayed_spec(self.settings, CLASSES)])
        self.delays = Delays(self.broker, self.settings, CLASSES)

    async def mover(self) -> Mover:
        mover = Mover(self.broker, self.settings, CLASSES)
        self._stack.push_async_callback(mover.drain)
        await mover.start()
        return mover

    async def send(self, name: str, seconds: float, **more: Any) -> None:
        await self.delays.send(self.target, name.encode(), delay_seconds=seconds, **more)

    async def arrived(self, count: int) -> list[Record]:
        """Wait for so many records on the target, from its beginning on."""
        reader = await self.broker.read(self.target, {0: 0, 1: 0})
        try:
            async with asyncio.timeout(WAIT):
                return await take(reader, count)
        finally:
            await reader.close()


@pytest.fixture(params=["memory", pytest.param("kafka", marks=pytest.mark.kafka)])
async def queue(request: pytest.FixtureRequest) -> AsyncIterator[Queue]:
    url = "memory://" if request.param == "memory" else request.getfixturevalue("kafka_url")
    async with AsyncExitStack() as stack:
        made = Queue(stack, Settings.of(broker=url, namespace=f"t{uuid4().hex[:10]}"))
        await made.start()
        yield made


async def test_a_record_comes_when_its_class_of_delay_has_passed(queue: Queue) -> None:
    await queue.mover()
    began = time.monotonic()
    await queue.send("late", 1.5)
    await queue.send("soon", 0.1, key=b"key", headers=(("mine", b"header"),))
    await queue.send("now", 0)
    came: dict[bytes, float] = {}
    for count in (1, 2, 3):
        records = await queue.arrived(count)
        came |= {r.value: time.monotonic() - began for r in records if r.value not in came}
    assert came[b"now"] < 0.3
    assert 0.3 <= came[b"soon"] < 1.5
    assert came[b"late"] >= 2.0
    soon = next(record for record in records if record.value == b"soon")
    assert (soon.key, soon.headers) == (b"key", (("mine", b"header"),)), "it comes as it was sent"


async def test_a_longer_delay_than_the_longest_is_the_longest(queue: Queue) -> None:
    await queue.mover()
    await queue.send("long", 1000)
    assert [record.value for record in await queue.arrived(1)] == [b"long"]


async def test_what_was_not_moved_is_moved_after_a_restart(queue: Queue) -> None:
    first = await queue.mover()
    for number in range(150):
        await queue.send(str(number), 0.2 if number < 100 else 0.9)
    await queue.arrived(100)
    await first.drain()
    await asyncio.gather(*(queue.send(str(number), 0.2) for number in range(150, 200)))
    await queue.mover()
    values = sorted(int(record.value) for record in await queue.arrived(200))
    assert values == list(range(200)), "each once: nobody died"


async def test_movers_come_and_go_and_nothing_is_lost(queue: Queue) -> None:
    movers = [await queue.mover()]
    for number in range(300):
        await queue.send(str(number), (0.1, 0.9, 1.9)[number % 3])
        if number % 100 == 50:
            movers.append(await queue.mover())
    await queue.arrived(50)
    await movers.pop(0).drain()
    assert {int(record.value) for record in await queue.arrived(300)} == set(range(300))
    assert await queue.broker.backlog(delayed_topic(queue.settings), delayed_topic(queue.settings)) < 300


async def test_both_partitions_of_the_target_get_some(queue: Queue) -> None:
    await queue.mover()
    for number in range(20):
        await queue.send(str(number), 0.1)
    assert {record.partition for record in await queue.arrived(20)} == {0, 1}


async def test_what_can_not_be_moved_is_put_aside_and_holds_up_nothing(queue: Queue) -> None:
    await queue.mover()
    delayed = delayed_topic(queue.settings)
    await queue.delays.send("chains.nowhere", b"lost", delay_seconds=0.1)
    await (await queue.broker.publish(delayed, b"stranger", partition=0))
    await queue.send("mine", 0.1)
    assert [record.value for record in await queue.arrived(1)] == [b"mine"]
    reader = await queue.broker.read(dead_letter_topic(delayed), {0: 0})
    letters = {record.value: Letter.of(record) for record in await take(reader, 2)}
    await reader.close()
    assert dict(letters[b"lost"].headers)[TARGET] == b"chains.nowhere", "it can be sent again"
    assert "chains.nowhere" in (letters[b"lost"].message or "")
    assert TARGET in (letters[b"stranger"].message or "")


async def test_a_topic_that_is_away_holds_up_no_other_and_repeats_none(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one is whose partitions have lost their leader, while the rest of the cluster is well."""
    publish, away = queue.broker.publish, f"{queue.settings.namespace}.away"
    await queue.broker.ensure_topics([TopicSpec(away, 1, HOUR_MS)])
    refused = asyncio.Semaphore(0)

    async def unavailable(topic: str, value: bytes, **more: Any) -> asyncio.Future[int]:
        if topic == away:
            refused.release()
            raise BrokerError("the partition has no leader")
        return await publish(topic, value, **more)

    monkeypatch.setattr(queue.broker, "publish", unavailable)
    await queue.delays.send(away, b"patient", delay_seconds=0.1)
    for number in range(5):
        await queue.send(str(number), 0.1)
    await queue.mover()
    await queue.arrived(5)
    for _ in range(4):
        await refused.acquire()
    await queue.send("last", 0.1)
    records = await queue.arrived(6)
    assert sorted(record.value for record in records) == [b"0", b"1", b"2", b"3", b"4", b"last"]
    monkeypatch.setattr(queue.broker, "publish", publish)
    reader = await queue.broker.read(away, {0: 0})
    async with asyncio.timeout(WAIT):
        [record] = await take(reader, 1)
    await reader.close()
    assert (record.value, record.headers) == (b"patient", ())


async def test_a_clock_that_went_wrong_holds_up_no_longer_than_the_delay(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written in the future, as whoever moves it sees it, comes after its delay; so does what is behind it."""
    monkeypatch.setattr(delays, "now_ms", lambda: now_ms() - HOUR_MS)
    await queue.send("first", 0.1)
    await queue.mover()
    await queue.arrived(1)
    monkeypatch.undo()
    await queue.send("second", 0.1)
    assert [record.value for record in await queue.arrived(2)] == [b"first", b"second"]


async def test_a_broker_that_is_away_in_part_has_nothing_moved_twice(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish, failures = queue.broker.publish, list(range(6))

    async def away_for_one(topic: str, value: bytes, **more: Any) -> asyncio.Future[int]:
        if value == b"0" and failures:
            failures.pop()
            raise BrokerError("no connection")
        return await publish(topic, value, **more)

    for number in range(5):
        await queue.send(str(number), 0.1)
    monkeypatch.setattr(queue.broker, "publish", away_for_one)
    await queue.mover()
    values = {record.value for record in await queue.arrived(5)}
    assert values == {b"0", b"1", b"2", b"3", b"4"}, "each once"


async def test_a_topic_with_other_partitions_is_one_clear_error(queue: Queue) -> None:
    with pytest.raises(ChainsUsageError, match=r"\.delayed has 3 partitions, and must have 8"):
        await Mover(queue.broker, queue.settings).start()


MOVE = """
import asyncio, sys
from chains_stream.client import open_connected
from chains_stream.delays import Mover
from chains_stream.messages import now_ms
from chains_stream.settings import KafkaSettings, Settings
from contextlib import AsyncExitStack

async def main():
    settings = Settings.of(broker=sys.argv[1], namespace=sys.argv[2], kafka=KafkaSettings(session_timeout_ms=6000))
    async with AsyncExitStack() as stack:
        mover = Mover(await open_connected(stack, settings), settings, (0.3, 1.0, 2.0))
        await mover.start()
        print("moves", flush=True)
        await mover.failed()

asyncio.run(main())
"""


@pytest.mark.kafka
async def test_what_a_killed_mover_left_is_moved_by_the_next(kafka_url: str) -> None:
    settings = Settings.of(
        broker=kafka_url, namespace=f"t{uuid4().hex[:10]}", kafka=KafkaSettings(session_timeout_ms=6_000)
    )
    async with AsyncExitStack() as stack:
        queue = Queue(stack, settings)
        await queue.start()
        killed = subprocess.Popen(  # noqa: ASYNC220 - it returns at once
            [sys.executable, "-c", MOVE, kafka_url, settings.namespace], stdout=subprocess.PIPE, text=True
        )
        try:
            assert killed.stdout is not None
            assert await asyncio.to_thread(killed.stdout.readline) == "moves\n"
            for number in range(1_000):
                await queue.send(str(number), 0.2 if number % 2 else 1.9)
            await queue.arrived(200)
        finally:
            killed.send_signal(signal.SIGKILL)
            killed.wait()
            assert killed.stdout is not None
            killed.stdout.close()
        await queue.mover()
        found: set[int] = set()
        count = 1_000
        while len(found) < 1_000:
            found = {int(record.value) for record in await queue.arrived(count)}
            count += 1_000 - len(found)  # some may have been moved twice
        assert found == set(range(1_000))
