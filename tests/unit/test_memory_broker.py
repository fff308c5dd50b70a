"""The bounds of the embedded broker."""

import asyncio

import pytest

from chains_stream.broker import Committed, TopicSpec
from chains_stream.brokers import memory_log as memory
from chains_stream.brokers.memory import MemoryBroker
from chains_stream.errors import FencedError, OffsetExpiredError
from chains_stream.messages import now_ms
from chains_stream.settings import Settings

HOUR_MS = 3_600_000


async def nothing(_partitions: frozenset[int]) -> None: ...


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> MemoryBroker:
    monkeypatch.setattr(memory, "MAX_RECORDS", 1_000)
    return MemoryBroker(Settings())


async def fill_up(broker: MemoryBroker, topic: str, partition: int = 0) -> None:
    for _ in range(memory.MAX_RECORDS):
        await broker.publish(topic, b"", partition=partition)


async def test_publishers_wait_for_the_group_in_line(broker: MemoryBroker) -> None:
    await broker.ensure_topics([TopicSpec("requests", 1, HOUR_MS)])
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
    await broker.ensure_topics([TopicSpec("requests", 1, HOUR_MS)])
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


async def test_deleting_makes_room(broker: MemoryBroker) -> None:
    await broker.ensure_topics([TopicSpec("dead", 1, HOUR_MS)])
    await fill_up(broker, "dead")
    waiting = asyncio.ensure_future(broker.publish("dead", b"", partition=0))
    await asyncio.sleep(0)
    await broker.delete_before("dead", {0: 5})
    assert await (await asyncio.wait_for(waiting, 5)) == memory.MAX_RECORDS


async def test_the_slowest_group_decides(broker: MemoryBroker) -> None:
    await broker.ensure_topics([TopicSpec("requests", 1, HOUR_MS)])
    for n in range(10):
        await broker.publish("requests", bytes([n]), partition=0)
    fast = await broker.consume("requests", "fast", on_assigned=nothing, on_revoked=nothing)
    slow = await broker.consume("requests", "slow", on_assigned=nothing, on_revoked=nothing)
    await fast.commit({0: Committed(10)})
    assert len(await slow.fetch(10)) == 10
    await fast.close()
    await slow.close()


async def test_bytes_are_bounded_too(broker: MemoryBroker) -> None:
    await broker.ensure_topics([TopicSpec("requests", 1, HOUR_MS)])
    fits = memory.MAX_BYTES // 1_000_000
    for _ in range(fits):
        await broker.publish("requests", b"x" * 1_000_000, partition=0)
    waiting = asyncio.ensure_future(broker.publish("requests", b"x" * 1_000_000, partition=0))
    done, _ = await asyncio.wait([waiting], timeout=0.05)
    assert not done
    waiting.cancel()
    await asyncio.wait([waiting])


async def test_a_ring_drops_its_oldest_records(broker: MemoryBroker) -> None:
    await broker.ensure_topics([TopicSpec("replies", 1, HOUR_MS, ring=True)])
    slow = await broker.read("replies", {0: 0})
    await fill_up(broker, "replies")
    await broker.publish("replies", b"one more", partition=0)
    with pytest.raises(OffsetExpiredError, match="oldest record is 1"):
        await slow.fetch()
    late = await broker.read("replies", {0: 1})
    assert (await late.fetch())[0].offset == 1
    await slow.close()
    await late.close()


async def test_a_publisher_that_gives_up_as_its_turn_comes_passes_it_on(broker: MemoryBroker) -> None:
    await broker.ensure_topics([TopicSpec("requests", 1, HOUR_MS)])
    await fill_up(broker, "requests")
    consumer = await broker.consume("requests", "g", on_assigned=nothing, on_revoked=nothing)
    first, second = (asyncio.ensure_future(broker.publish("requests", b"", partition=0)) for _ in range(2))
    await asyncio.sleep(0)
    await consumer.commit({0: Committed(1)})  # room for one: the first is woken, and has not run yet
    first.cancel()
    assert await (await asyncio.wait_for(second, 5)) == memory.MAX_RECORDS
    await consumer.close()


async def test_newcomers_do_not_overtake_who_waits_for_room(broker: MemoryBroker) -> None:
    await broker.ensure_topics([TopicSpec("requests", 1, HOUR_MS)])
    await fill_up(broker, "requests")
    consumer = await broker.consume("requests", "g", on_assigned=nothing, on_revoked=nothing)
    early = asyncio.ensure_future(broker.publish("requests", b"early", partition=0))
    await asyncio.sleep(0)
    await consumer.commit({0: Committed(1)})
    late = asyncio.ensure_future(broker.publish("requests", b"late", partition=0))
    assert await (await asyncio.wait_for(early, 5)) == memory.MAX_RECORDS
    await consumer.commit({0: Committed(2)})
    assert await (await asyncio.wait_for(late, 5)) == memory.MAX_RECORDS + 1
    await consumer.close()


async def test_a_slow_consumer_bounds_the_log(broker: MemoryBroker) -> None:
    """A producer without pause, a consumer that lags: what lies between them never grows past the limit."""
    await broker.ensure_topics([TopicSpec("requests", 1, HOUR_MS)])
    total = 20 * memory.MAX_RECORDS

    async def produce() -> None:
        for _ in range(total):
            await broker.publish("requests", b"", partition=0)

    producing = asyncio.ensure_future(produce())
    consumer = await broker.consume("requests", "g", on_assigned=nothing, on_revoked=nothing)
    done = most = 0
    while done < total:
        fetched = await consumer.fetch(50)
        most = max(most, await broker.end_offset("requests", 0) - done)
        done += len(fetched)
        await consumer.commit({0: Committed(done)})
        await asyncio.sleep(0)
    await producing
    assert most == memory.MAX_RECORDS
    await consumer.close()


async def test_records_past_their_retention_go_with_the_next_one(broker: MemoryBroker) -> None:
    await broker.ensure_topics([TopicSpec("replies", 1, 20, ring=True)])
    reader = await broker.read("replies", {0: 0})
    consumer = await broker.consume("replies", "g", on_assigned=nothing, on_revoked=nothing)
    await broker.publish("replies", b"old", partition=0)
    until = now_ms() + 21
    while now_ms() <= until:  # noqa: ASYNC110 - the clock itself is what is waited for
        await asyncio.sleep(0.005)
    await broker.publish("replies", b"new", partition=0)
    with pytest.raises(OffsetExpiredError):
        await reader.fetch()
    young = await broker.read("replies", {0: 1})
    assert [record.value for record in await young.fetch()] == [b"new"]
    assert [record.value for record in await consumer.fetch(10)] == [b"new"], "groups go on with what there is"


async def test_what_one_partition_lost_does_not_take_the_others_records_along(broker: MemoryBroker) -> None:
    await broker.ensure_topics([TopicSpec("replies", 2, HOUR_MS, ring=True)])
    await broker.publish("replies", b"kept", partition=0)
    await fill_up(broker, "replies", partition=1)
    reader = await broker.read("replies", {0: 0, 1: 0})
    await broker.publish("replies", b"one more", partition=1)
    assert [record.value for record in await reader.fetch()] == [b"kept"]
    for _ in range(2):
        with pytest.raises(OffsetExpiredError):
            await reader.fetch()


async def test_leaving_that_is_cancelled_has_left_all_the_same(broker: MemoryBroker) -> None:
    await broker.ensure_topics([TopicSpec("requests", 2, HOUR_MS)])
    held: frozenset[int] = frozenset()
    blocked = asyncio.Event()

    async def assigned(partitions: frozenset[int]) -> None:
        nonlocal held
        held = partitions

    async def block(_partitions: frozenset[int]) -> None:
        if not blocked.is_set():
            blocked.set()
            await asyncio.Event().wait()

    stays = await broker.consume("requests", "g", on_assigned=assigned, on_revoked=nothing)
    leaves = await broker.consume("requests", "g", on_assigned=nothing, on_revoked=block)
    assert len(held) == 1
    closing = asyncio.ensure_future(leaves.close())
    await blocked.wait()
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert held == {0, 1}
    assert await broker.members("g") == 1
    await stays.close()


async def test_a_record_that_waits_for_room_does_not_outlive_its_transaction(broker: MemoryBroker) -> None:
    """Whoever is fenced while it waits appends nothing afterwards."""
    await broker.ensure_topics([TopicSpec("queue", 1, HOUR_MS)])
    await fill_up(broker, "queue")
    zombie, holder = broker.transactor("id"), broker.transactor("id")
    await zombie.start()
    zombie.begin()
    waiting = asyncio.ensure_future(zombie.publish("queue", b"zombie", partition=0))
    await asyncio.sleep(0)
    assert not waiting.done()
    await holder.start()
    await broker.delete_before("queue", {0: 10})
    with pytest.raises(FencedError):
        await waiting
    assert await broker.end_offset("queue", 0) == memory.MAX_RECORDS
    assert await broker.end_offset("queue", 0, isolation="read_committed") == memory.MAX_RECORDS


async def test_aborted_records_are_forgotten_with_their_partitions_oldest(broker: MemoryBroker) -> None:
    await broker.ensure_topics([TopicSpec("queue", 1, HOUR_MS)])
    transactor = broker.transactor("id")
    await transactor.start()
    for _ in range(3):
        transactor.begin()
        await transactor.publish("queue", b"x", partition=0)
        await transactor.abort()
    log = broker._partition("queue", 0)
    assert len(log._aborted) == 3
    await broker.delete_before("queue", {0: 2})
    assert log._aborted == {2}
