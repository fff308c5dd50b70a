"""What every broker does with records, readers and topics."""

import asyncio
from collections import defaultdict
from uuid import uuid4

import pytest

from chains_stream.broker import Broker, Record, TopicSpec
from chains_stream.errors import BrokerError, OffsetExpiredError, RecordTooLargeError
from chains_stream.messages import now_ms
from tests.members import HOUR_MS, fill, take


async def test_a_record_comes_back_as_it_was_sent(broker: Broker, topic: str) -> None:
    headers = (("kafka_correlationId", bytes(range(16))), ("twice", b"1"), ("twice", b""))
    value = bytes(range(256)) * 10
    reader = await broker.read(topic, {2: None})
    offset = await (await broker.publish(topic, value, partition=2, key=b"\x00key", headers=headers))
    (record,) = await take(reader, 1)
    await reader.close()
    assert (record.topic, record.partition, record.offset) == (topic, 2, offset)
    assert (record.key, record.value, record.headers) == (b"\x00key", value, headers)
    assert record.timestamp_ms > 1_700_000_000_000


@pytest.mark.parametrize("durable", [True, False])
async def test_a_partition_keeps_the_order_of_publishing(broker: Broker, topic: str, *, durable: bool) -> None:
    reader = await broker.read(topic, {0: 0})
    stored = [await broker.publish(topic, str(n).encode(), partition=0, durable=durable) for n in range(500)]
    assert await asyncio.gather(*stored) == list(range(500))
    assert [record.value for record in await take(reader, 500)] == [str(n).encode() for n in range(500)]
    await reader.close()


async def test_what_is_put_has_its_place_among_what_is_published(broker: Broker, topic: str) -> None:
    reader = await broker.read(topic, {0: 0})
    values = [str(number).encode() for number in range(500)]
    stored, at_once = [], 0
    for value in values:
        put = broker.put(topic, value, partition=0)
        at_once += put is not None
        stored.append(put or await broker.publish(topic, value, partition=0))
    assert at_once > 400, "all but the first of what is sent together"
    assert await asyncio.gather(*stored) == list(range(500))
    assert [record.value for record in await take(reader, 500)] == values
    await reader.close()


async def test_what_has_no_place_is_not_put(broker: Broker, topic: str) -> None:
    await (await broker.publish(topic, b"there", partition=0))
    assert broker.put(topic, bytes(broker.max_record_bytes + 1), partition=0) is None
    assert broker.put(topic, b"", partition=99) is None
    assert broker.put(f"{topic}.unknown", b"", partition=0) is None
    assert await broker.end_offset(topic, 0) == 1


async def test_readers_begin_where_they_are_told(broker: Broker, topic: str) -> None:
    await fill(broker, topic, 10)
    await fill(broker, topic, 3, partition=1)
    at_end = await broker.read(topic, {0: None})
    inside = await broker.read(topic, {0: 7, 1: None, 2: None})
    assert (at_end.position(0), inside.position(0), inside.position(1), inside.position(2)) == (10, 7, 3, 0)
    await (await broker.publish(topic, b"new", partition=0))
    await (await broker.publish(topic, b"else", partition=1))
    assert [record.value for record in await take(at_end, 1)] == [b"new"]
    by_partition = defaultdict(list)
    for record in await take(inside, 5):
        by_partition[record.partition].append(record.value)
    assert by_partition == {0: [b"7", b"8", b"9", b"new"], 1: [b"else"]}
    assert inside.position(0) == 11
    await at_end.close()
    await inside.close()


async def test_end_offset_is_that_of_the_next_record(broker: Broker, topic: str) -> None:
    assert await broker.end_offset(topic, 3) == 0
    await fill(broker, topic, 5, partition=3)
    assert await broker.end_offset(topic, 3) == 5


async def test_a_fetch_that_is_cancelled_loses_nothing(broker: Broker, topic: str) -> None:
    reader = await broker.read(topic, {0: 0})
    got: list[Record] = []
    for n in range(200):
        waiting = asyncio.ensure_future(reader.fetch())
        await broker.publish(topic, str(n).encode(), partition=0)
        for _ in range(n % 7):  # cancelled at another point of its way each time
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        if not waiting.cancelled():
            got += waiting.result()
    got += await take(reader, 200 - len(got)) if len(got) < 200 else []
    assert [record.offset for record in got] == list(range(200))
    await reader.close()


async def test_an_unknown_member_count_is_nothing_to_fear(broker: Broker) -> None:
    assert await broker.members(f"nobody.{uuid4().hex}") == 0


async def test_topics_are_created_once_and_kept(broker: Broker, topic: str) -> None:
    await fill(broker, topic, 3)
    await broker.ensure_topics([TopicSpec(topic, 9, HOUR_MS), TopicSpec(f"{topic}.more", 2, HOUR_MS)])
    assert await broker.partitions(topic) == 4
    assert await broker.partitions(f"{topic}.more") == 2
    assert await broker.end_offset(topic, 0) == 3
    await broker.ensure_topics([])


async def test_what_does_not_exist_is_named(broker: Broker, topic: str) -> None:
    with pytest.raises(BrokerError, match=f"no topic {topic}.none"):
        await broker.partitions(f"{topic}.none")


async def test_a_record_over_the_limit_is_refused_and_the_next_one_taken(broker: Broker, topic: str) -> None:
    with pytest.raises(RecordTooLargeError, match="over the limit"):
        await broker.publish(topic, b"x" * (broker.max_record_bytes + 1), partition=0)
    assert await (await broker.publish(topic, b"x" * broker.max_record_bytes, partition=0)) == 0


async def test_an_offset_that_the_log_does_not_hold_is_expired(broker: Broker, topic: str) -> None:
    if broker.url == "memory://":
        await broker.ensure_topics([TopicSpec(f"{topic}.ring", 1, HOUR_MS, ring=True)])
        for _ in range(40):
            await broker.publish(f"{topic}.ring", b"x" * 1_000_000, partition=0)
        reader = await broker.read(f"{topic}.ring", {0: 0})
    else:
        await fill(broker, topic, 3)
        reader = await broker.read(topic, {0: 1_000})
    with pytest.raises(OffsetExpiredError):
        async with asyncio.timeout(20):
            await reader.fetch()
    await reader.close()


async def test_an_expired_reader_raises_again_and_again(broker: Broker, topic: str) -> None:
    await fill(broker, topic, 3)
    reader = await broker.read(topic, {0: 1_000})
    for _ in range(3):
        with pytest.raises(OffsetExpiredError):
            async with asyncio.timeout(20):
                await reader.fetch()
    await reader.close()


@pytest.mark.parametrize("place", [("", 4), ("", -1), (".none", 0)])
async def test_publishing_to_what_does_not_exist_fails_at_once(
    broker: Broker, topic: str, place: tuple[str, int]
) -> None:
    suffix, partition = place
    with pytest.raises(BrokerError, match=topic + suffix):
        async with asyncio.timeout(10):
            await broker.publish(topic + suffix, b"", partition=partition)


async def test_many_publishers_at_once_lose_nothing(broker: Broker, topic: str) -> None:
    reader = await broker.read(topic, dict.fromkeys(range(4), 0))

    async def publish(publisher: int) -> None:
        for n in range(100):
            value = f"{publisher} {n}".encode()
            await (await broker.publish(topic, value, partition=publisher % 4, durable=bool(publisher % 8 < 4)))

    await asyncio.gather(*map(publish, range(40)))
    by_publisher = defaultdict(list)
    for record in await take(reader, 4_000):
        publisher, n = map(int, record.value.split())
        by_publisher[publisher].append(n)
    assert by_publisher == {publisher: list(range(100)) for publisher in range(40)}
    await reader.close()


async def test_offsets_are_found_by_time(broker: Broker, topic: str) -> None:
    assert await broker.offsets_at(topic, [0, 1], 0) == {0: 0, 1: 0}
    await fill(broker, topic, 3)
    reader = await broker.read(topic, {0: 0})
    last = (await take(reader, 3))[-1].timestamp_ms
    while now_ms() <= last:  # noqa: ASYNC110 - the clock itself is what is waited for
        await asyncio.sleep(0.001)
    between = now_ms()
    await fill(broker, topic, 2)
    assert await broker.offsets_at(topic, [0, 1], between) == {0: 3, 1: 0}
    assert await broker.offsets_at(topic, [0], 0) == {0: 0}
    assert await broker.offsets_at(topic, [0], now_ms() + HOUR_MS) == {0: 5}
    assert await broker.offsets_at(topic, [], 0) == {}
    with pytest.raises(BrokerError, match=topic):
        await broker.offsets_at(topic, [4], 0)
    await reader.close()
