"""Where groups begin that have committed nothing."""

import asyncio

import pytest

from chains_stream.broker import Broker, Committed
from chains_stream.messages import now_ms
from tests.members import Member, fill


async def test_the_latest(broker: Broker, topic: str) -> None:
    await fill(broker, topic, 5)
    await fill(broker, topic, 2, partition=1)
    member = await Member(broker, topic).join(f"group.{topic}", start="latest")
    for partition in range(3):
        await (await broker.publish(topic, b"new", partition=partition))
    assert [record.value for record in await member.take(3)] == [b"new"] * 3
    await member.consumer.close()


async def test_a_time(broker: Broker, topic: str) -> None:
    await fill(broker, topic, 5)
    await fill(broker, topic, 1, partition=1)
    at = now_ms() + 20
    while now_ms() <= at:  # noqa: ASYNC110 - time tells nobody
        await asyncio.sleep(0.005)
    await (await broker.publish(topic, b"from then", partition=0))
    member = await Member(broker, topic).join(f"group.{topic}", start=at)
    (record,) = await member.take(1)
    assert (record.value, record.offset) == (b"from then", 5)
    await (await broker.publish(topic, b"later", partition=1))
    assert [record.value for record in await member.take(1)] == [b"later"]
    await member.consumer.close()


async def test_long_ago_is_the_oldest_record(broker: Broker, topic: str) -> None:
    await fill(broker, topic, 3)
    member = await Member(broker, topic).join(f"group.{topic}", start=0)
    assert [record.offset for record in await member.take(3)] == [0, 1, 2]
    await member.consumer.close()


async def test_where_it_begins_is_settled_once(broker: Broker, topic: str) -> None:
    """A member that leaves, or dies, before its first commit does not cost the records that come next."""
    await fill(broker, topic, 3)
    first = await Member(broker, topic).join(f"group.{topic}", start="latest")
    await first.consumer.close()
    await (await broker.publish(topic, b"meanwhile", partition=0))
    second = await Member(broker, topic).join(f"group.{topic}", start="latest")
    assert [record.value for record in await second.take(1)] == [b"meanwhile"]
    third = await Member(broker, topic).join(f"group.{topic}", start="earliest")
    await second.until(2)
    await second.consumer.close()
    await third.until(4)
    assert [record.value for record in await third.take(1)] == [b"meanwhile"]
    await third.consumer.close()


@pytest.mark.parametrize("start", ["latest", 0])
async def test_a_group_that_has_committed_goes_on_from_there(broker: Broker, topic: str, start: str | int) -> None:
    await fill(broker, topic, 5)
    first = await Member(broker, topic).join(f"group.{topic}")
    await first.take(5)
    await first.consumer.commit({0: Committed(2)})
    await first.consumer.close()
    second = await Member(broker, topic).join(f"group.{topic}", start=start)  # type: ignore[arg-type]
    assert [record.offset for record in await second.take(3)] == [2, 3, 4]
    await second.consumer.close()


async def test_whoever_joins_a_group_that_has_begun_changes_nothing(broker: Broker, topic: str) -> None:
    await fill(broker, topic, 4)
    first = await Member(broker, topic).join(f"group.{topic}")
    second = await Member(broker, topic).join(f"group.{topic}", start="latest")
    await first.until(2)
    both = asyncio.gather(*(member.take(4) for member in (first, second) if 0 in member.held))
    assert [record.offset for record in (await both)[0]] == [0, 1, 2, 3]
    await first.consumer.close()
    await second.consumer.close()
