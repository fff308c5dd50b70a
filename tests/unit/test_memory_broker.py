"""The bounds of the embedded broker."""

import asyncio

import pytest

from chains_stream.broker import Committed, TopicSpec
from chains_stream.brokers import memory
from chains_stream.brokers.memory import MemoryBroker
from chains_stream.errors import OffsetExpiredError
from chains_stream.settings import Settings


async def nothing(_partitions: frozenset[int]) -> None: ...


@pytest.fixture
def broker() -> MemoryBroker:
    return MemoryBroker(Settings())


async def fill_up(broker: MemoryBroker, topic: str) -> None:
    for _ in range(memory.MAX_RECORDS):
        await broker.publish(topic, b"", partition=0)


async def test_publishers_wait_for_the_group_in_line(broker: MemoryBroker) -> None:
    await broker.ensure_topics([TopicSpec("requests", 1, 1000)])
    await fill_up(broker, "requests")
    waiting = [asyncio.ensure_future(broker.publish("requests", bytes([n]), partition=0)) for n in range(3)]
    done, _ = await asyncio.wait(waiting, timeout=0.05)
    assert not done
    consumer = await broker.consume("requests", "g", on_assigned=nothing, on_revoked=nothing)
    await consumer.fetch(10)
    assert not any(task.done() for task in waiting), "read is not done: only a commit makes room"
    await consumer.commit({0: Committed(2)})
    await asyncio.wait(waiting[:2], timeout=5)
    assert [task.done() for task in waiting] == [True, True, False]
    await consumer.commit({0: Committed(3)})
    assert [await (await task) for task in waiting] == [memory.MAX_RECORDS + n for n in range(3)]
    await consumer.close()


async def test_a_publisher_that_gives_up_leaves_the_line(broker: MemoryBroker) -> None:
    await broker.ensure_topics([TopicSpec("requests", 1, 1000)])
    await fill_up(broker, "requests")
    impatient = asyncio.ensure_future(broker.publish("requests", b"1", partition=0))
    patient = asyncio.ensure_future(broker.publish("requests", b"2", partition=0))
    await asyncio.sleep(0)
    impatient.cancel()
    await asyncio.wait([impatient])
    consumer = await broker.consume("requests", "g", on_assigned=nothing, on_revoked=nothing)
    await consumer.commit({0: Committed(1)})
    assert await (await patient) == memory.MAX_RECORDS
    await consumer.close()


async def test_the_slowest_group_decides(broker: MemoryBroker) -> None:
    await broker.ensure_topics([TopicSpec("requests", 1, 1000)])
    for n in range(10):
        await broker.publish("requests", bytes([n]), partition=0)
    fast = await broker.consume("requests", "fast", on_assigned=nothing, on_revoked=nothing)
    slow = await broker.consume("requests", "slow", on_assigned=nothing, on_revoked=nothing)
    await fast.commit({0: Committed(10)})
    assert len(await slow.fetch(10)) == 10
    await fast.close()
    await slow.close()


async def test_bytes_are_bounded_too(broker: MemoryBroker) -> None:
    await broker.ensure_topics([TopicSpec("requests", 1, 1000)])
    fits = memory.MAX_BYTES // 1_000_000
    for _ in range(fits):
        await broker.publish("requests", b"x" * 1_000_000, partition=0)
    waiting = asyncio.ensure_future(broker.publish("requests", b"x" * 1_000_000, partition=0))
    done, _ = await asyncio.wait([waiting], timeout=0.05)
    assert not done
    waiting.cancel()
    await asyncio.wait([waiting])


async def test_a_ring_drops_its_oldest_records(broker: MemoryBroker) -> None:
    await broker.ensure_topics([TopicSpec("replies", 1, 1000, ring=True)])
    slow = await broker.read("replies", {0: 0})
    await fill_up(broker, "replies")
    await broker.publish("replies", b"one more", partition=0)
    with pytest.raises(OffsetExpiredError, match="oldest record is 1"):
        await slow.fetch()
    late = await broker.read("replies", {0: 1})
    assert (await late.fetch())[0].offset == 1
    await slow.close()
    await late.close()
