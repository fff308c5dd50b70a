"""Static membership: a member that is closed and comes back soon is the same one to its group."""

import asyncio
from contextlib import AsyncExitStack
from typing import Any
from uuid import uuid4

import pytest

from chains_stream.broker import Broker, Committed, TopicSpec
from chains_stream.brokers import kafka_stop, open_broker
from chains_stream.errors import BrokerError
from chains_stream.settings import Settings
from tests.members import HOUR_MS, Member, fill

pytestmark = pytest.mark.kafka


async def as_instance(stack: AsyncExitStack, url: str, instance_id: str) -> Broker:
    broker = open_broker(Settings.of(broker=url, instance_id=instance_id))
    stack.push_async_callback(broker.close)
    await broker.start()
    return broker


async def test_a_member_that_comes_back_moves_no_partitions(kafka_url: str) -> None:
    topic = f"static.{uuid4().hex}"
    async with AsyncExitStack() as stack:
        one, two = await as_instance(stack, kafka_url, "one"), await as_instance(stack, kafka_url, "two")
        await one.ensure_topics([TopicSpec(topic, 4, HOUR_MS)])
        first, second = await Member(one, topic).join(), await Member(two, topic).join()
        await first.until(2)
        for back, other in ((first, second), (second, first)):  # the first one leads the group
            for partition in range(4):
                await fill(one, topic, 1, partition=partition)
            got = await back.take(2)
            held, told = back.held, len(other.revoked)
            await back.consumer.commit({record.partition: Committed(record.offset + 1) for record in got})
            await back.consumer.close()
            await back.join()
            assert back.held == held
            await fill(one, topic, 1, partition=min(held))
            assert (await back.take(1))[0].partition in held
            assert len(other.revoked) == told, "no rebalance"
        await first.consumer.close()
        await second.consumer.close()


async def test_a_second_process_with_the_same_instance_id_ends_the_first_and_stays(kafka_url: str) -> None:
    topic = f"fenced.{uuid4().hex}"
    async with AsyncExitStack() as stack:
        old, new = [await as_instance(stack, kafka_url, "same") for _ in range(2)]
        await old.ensure_topics([TopicSpec(topic, 2, HOUR_MS)])
        first = await Member(old, topic).join()
        await fill(old, topic, 1)
        await first.take(1)
        second = await Member(new, topic).join()
        assert await first.consumer.commit({0: Committed(1)}) == frozenset(), "it is the second one's"
        with pytest.raises(BrokerError, match=r"instance id `same` joined the group") as caught:
            await asyncio.wait_for(first.consumer.fetch(1), 20)
        assert "\n" not in str(caught.value)
        await first.consumer.close()
        assert await second.consumer.commit({1: Committed(0)}) == {1}
        assert [record.offset for record in await second.take(1)] == [0]
        assert second.revoked == []
        await second.consumer.close()


async def test_a_fenced_member_that_does_nothing_is_told_too(kafka_url: str) -> None:
    topic = f"fenced.{uuid4().hex}"
    async with AsyncExitStack() as stack:
        old, new = [await as_instance(stack, kafka_url, "same") for _ in range(2)]
        await old.ensure_topics([TopicSpec(topic, 2, HOUR_MS)])
        first, second = await Member(old, topic).join(), await Member(new, topic).join()
        with pytest.raises(BrokerError, match=r"instance id `same` joined the group"):
            await asyncio.wait_for(first.consumer.fetch(1), 20)
        await first.consumer.close()
        await fill(new, topic, 1)
        assert len(await second.take(1)) == 1
        assert second.revoked == []
        await second.consumer.close()


async def test_whoever_gives_up_joining_leaves_the_group_at_once_and_nothing_behind(
    kafka_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others would wait for it until its session is over."""
    monkeypatch.setattr(kafka_stop, "LEAVE_SECONDS", 20.0)
    topic = f"leaving.{uuid4().hex}"
    async with AsyncExitStack() as stack:
        brokers = [open_broker(Settings.of(broker=kafka_url)) for _ in range(3)]
        for broker in brokers:
            stack.push_async_callback(broker.close)
            await broker.start()
        await brokers[0].ensure_topics([TopicSpec(topic, 2, HOUR_MS)])
        first, second, third = (Member(broker, topic) for broker in brokers)
        await first.join()
        await second.join()
        await asyncio.gather(first.until(1), second.until(1))
        first.hesitate_to_revoke.set()
        joining = asyncio.create_task(third.join())
        stack.callback(first.go_on.set)
        async with asyncio.timeout(30):
            await first.hesitating.wait()
            while await brokers[0].members(topic) != 3 or not second.revoked:
                pass  # Kafka tells nobody who else joins
        client: Any = second.consumer._client  # type: ignore[attr-defined]
        connections = list(client._client._conns.values())
        assert any(connection.connected() for connection in connections)
        await second.consumer.close()
        joining.cancel()
        await asyncio.wait([joining])
        assert await brokers[0].members(topic) == 1, "while the first one still hesitates"
        assert client._coordinator._coordination_task.done()
        assert client._fetcher._fetch_task.done()
        assert not any(connection.connected() for connection in (*connections, *client._client._conns.values()))
        first.go_on.set()
        await first.until(2)
        await first.consumer.close()


async def test_whoever_stays_keeps_what_it_has(kafka_url: str) -> None:
    """A partition that moves costs the requests that run on it."""
    topics = [f"sticky.{uuid4().hex}" for _ in range(2)]
    async with AsyncExitStack() as stack:
        brokers = [open_broker(Settings.of(broker=kafka_url)) for _ in range(3)]
        for broker in brokers:
            stack.push_async_callback(broker.close)
            await broker.start()
        await brokers[0].ensure_topics([TopicSpec(topic, 12, HOUR_MS) for topic in topics])
        # Several groups in a process, as a worker of several Chainlets has.
        groups = [[Member(broker, topic) for broker in brokers] for topic in topics]
        for members in groups:
            for member in members[:2]:
                await member.join()
        for members in groups:
            await asyncio.gather(*(member.until(6) for member in members[:2]))
        before = [[member.held for member in members[:2]] for members in groups]
        for members in groups:
            await members[2].join()
            await asyncio.gather(*(member.until(4) for member in members))
        after = [[member.held for member in members] for members in groups]
        for then, now in zip(before, after, strict=True):
            assert all(kept <= had for kept, had in zip(now, then, strict=False))
        for members in groups:
            await members[2].consumer.close()
            await asyncio.gather(*(member.until(6) for member in members[:2]))
            for member, had in zip(members, after[groups.index(members)], strict=False):
                assert had <= member.held
            for member in members[:2]:
                await member.consumer.close()
