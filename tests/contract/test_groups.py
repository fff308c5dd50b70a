"""What every broker does for the members of a group."""

import asyncio
from collections import defaultdict

import pytest

from chains_stream.broker import Broker, Committed, TopicSpec
from chains_stream.errors import BrokerError, OffsetExpiredError, UnknownTopicError
from tests.members import HOUR_MS, Member, fill


async def test_a_new_group_begins_with_the_oldest_record(broker: Broker, topic: str) -> None:
    await fill(broker, topic, 20)
    member = await Member(broker, topic).join()
    assert [record.value for record in await member.take(20)] == [str(n).encode() for n in range(20)]
    await member.consumer.close()


async def test_fetch_gives_no_more_than_asked_for(broker: Broker, topic: str) -> None:
    await fill(broker, topic, 20)
    member = await Member(broker, topic).join()
    assert len(await member.consumer.fetch(1)) == 1
    assert 1 <= len(await member.consumer.fetch(7)) <= 7
    await member.consumer.close()


async def test_what_is_not_committed_is_delivered_again(broker: Broker, topic: str) -> None:
    await fill(broker, topic, 10)
    first = await Member(broker, topic).join()
    await first.take(10)
    await first.consumer.commit({0: Committed(4)})
    await first.consumer.close()
    second = await Member(broker, topic).join()
    assert [record.offset for record in await second.take(6)] == list(range(4, 10))
    await second.consumer.close()


async def test_a_note_is_kept_with_the_position(broker: Broker, topic: str) -> None:
    await fill(broker, topic, 3)
    member = await Member(broker, topic).join()
    assert (await member.consumer.committed([0])).get(0) is None
    note = "x" * 4_000
    await member.consumer.commit({0: Committed(2, note), 1: Committed(0, "")})
    assert (await member.consumer.committed([0])).get(0) == Committed(2, note)
    assert (await member.consumer.committed([1])).get(1) == Committed(0, "")
    await member.consumer.close()


async def test_members_share_the_partitions_and_get_them_back(broker: Broker, topic: str) -> None:
    first = await Member(broker, topic).join()
    assert first.held == {0, 1, 2, 3}
    second = await Member(broker, topic).join()
    await first.until(2)
    assert first.held | second.held == {0, 1, 2, 3}
    assert first.revoked == [frozenset({0, 1, 2, 3})]
    assert await broker.members(topic) == 2
    await second.consumer.close()
    await first.until(4)
    await first.consumer.close()
    assert first.revoked[-1] == {0, 1, 2, 3}
    assert await broker.members(topic) == 0


async def test_a_commit_while_partitions_are_revoked_counts(broker: Broker, topic: str) -> None:
    for partition in range(4):
        await fill(broker, topic, 2, partition=partition)
    first = await Member(broker, topic).join()
    await first.take(8)
    first.commit_on_revoke = {partition: Committed(1) for partition in range(4)}
    second = await Member(broker, topic).join()
    await first.until(2)
    again = await second.take(2) + await first.take(2)
    assert sorted((record.partition, record.offset) for record in again) == [(n, 1) for n in range(4)]
    await first.consumer.close()
    await second.consumer.close()


async def test_a_commit_for_a_partition_that_went_to_another_changes_nothing(broker: Broker, topic: str) -> None:
    for partition in range(4):
        await fill(broker, topic, 3, partition=partition)
    first = await Member(broker, topic).join()
    await first.take(12)
    second = await Member(broker, topic).join()
    await first.until(2)
    lost = min(second.held)
    await second.consumer.commit({lost: Committed(1)})
    await first.consumer.commit({lost: Committed(3)})
    assert (await second.consumer.committed([lost])).get(lost) == Committed(1)
    await first.consumer.close()
    await second.consumer.close()


async def test_groups_do_not_see_each_other(broker: Broker, topic: str) -> None:
    await fill(broker, topic, 5)
    one = await Member(broker, topic).join(f"{topic}.one")
    other = await Member(broker, topic).join(f"{topic}.other")
    await one.take(5)
    await one.consumer.commit({0: Committed(5)})
    assert len(await other.take(5)) == 5
    await one.consumer.close()
    await other.consumer.close()


async def test_a_waiting_fetch_wakes_for_a_record_on_any_partition(broker: Broker, topic: str) -> None:
    member = await Member(broker, topic).join()
    for partition in range(4):
        waiting = asyncio.ensure_future(member.consumer.fetch(10))
        await (await broker.publish(topic, b"x", partition=partition))
        async with asyncio.timeout(20):
            assert [record.partition for record in await waiting] == [partition]
    await member.consumer.close()


async def test_a_callback_that_fails_is_raised(broker: Broker, topic: str) -> None:
    assignments = 0

    async def second_fails(_partitions: frozenset[int]) -> None:
        nonlocal assignments
        assignments += 1
        if assignments == 2:
            raise ValueError("in the callback")

    async def fails(_partitions: frozenset[int]) -> None:
        raise ValueError("in the callback")

    async def fine(_partitions: frozenset[int]) -> None: ...

    with pytest.raises(BrokerError, match="in the callback"):
        await broker.consume(topic, f"{topic}.early", on_assigned=fails, on_revoked=fine)
    consumer = await broker.consume(topic, topic, on_assigned=second_fails, on_revoked=fine)
    other = await Member(broker, topic).join()
    with pytest.raises(BrokerError, match="in the callback"):
        async with asyncio.timeout(20):
            await consumer.fetch(1)
    await other.consumer.close()
    await consumer.close()


async def test_records_wait_until_the_member_knows_its_partitions(broker: Broker, topic: str) -> None:
    for partition in range(4):
        await fill(broker, topic, 2, partition=partition)
    first = await Member(broker, topic).join()
    first.hesitate.set()
    joining = asyncio.ensure_future(Member(broker, topic).join())
    await asyncio.wait_for(first.hesitating.wait(), 30)
    fetching = asyncio.ensure_future(first.consumer.fetch(10))
    done, _ = await asyncio.wait([fetching], timeout=0.3)
    assert not done, "the partitions have records, and the member is not ready"
    first.hesitate.clear()
    first.go_on.set()
    assert {record.partition for record in await fetching} <= first.held
    second = await joining
    await first.consumer.close()
    await second.consumer.close()


async def test_a_member_that_gives_up_joining_leaves_the_others_all_partitions(broker: Broker, topic: str) -> None:
    first = await Member(broker, topic).join()
    first.hesitate_to_revoke.set()
    joining = asyncio.ensure_future(Member(broker, topic).join())
    await asyncio.wait_for(first.hesitating.wait(), 30)
    joining.cancel()
    first.hesitate_to_revoke.clear()
    first.go_on.set()
    await asyncio.wait([joining])
    assert joining.cancelled()
    await first.until(4)
    await fill(broker, topic, 1, partition=3)
    assert [record.partition for record in await first.take(1)] == [3]
    await first.consumer.close()


async def test_more_members_than_partitions(broker: Broker, topic: str) -> None:
    narrow = f"{topic}.narrow"
    await broker.ensure_topics([TopicSpec(narrow, 1, HOUR_MS)])
    first = await Member(broker, narrow).join()
    spare = await Member(broker, narrow).join()
    idle, busy = sorted((first, spare), key=lambda member: len(member.held))
    await busy.until(1)
    assert idle.held == frozenset()
    before = len(idle.revoked)
    await busy.consumer.close()
    await idle.until(1)
    assert len(idle.revoked) == before, "it held nothing that could be revoked"
    await fill(broker, narrow, 1)
    assert len(await idle.take(1)) == 1
    await idle.consumer.close()


async def test_a_group_fetch_that_is_cancelled_loses_nothing(broker: Broker, topic: str) -> None:
    member = await Member(broker, topic).join()
    got: list[int] = []
    for n in range(200):
        fetching = asyncio.ensure_future(member.consumer.fetch(3))
        stored = await broker.publish(topic, str(n).encode(), partition=0)
        if n % 3:
            await stored
        await asyncio.sleep(0)
        fetching.cancel()
        await asyncio.wait([fetching])
        if not fetching.cancelled():
            got += [record.offset for record in fetching.result()]
    got += [record.offset for record in await member.take(200 - len(got))]
    assert got == list(range(200))
    await member.consumer.close()


async def test_what_was_closed_says_so(broker: Broker, topic: str) -> None:
    reader = await broker.read(topic, {0: None})
    member = await Member(broker, topic).join()
    waiting = [asyncio.ensure_future(reader.fetch()), asyncio.ensure_future(member.consumer.fetch(1))]
    await asyncio.sleep(0)
    await reader.close()
    await member.consumer.close()
    for fetching in waiting:
        with pytest.raises(BrokerError, match="closed"):
            await asyncio.wait_for(fetching, 20)
    with pytest.raises(BrokerError, match="closed"):
        await reader.fetch()


async def test_a_note_that_is_too_long_is_refused(broker: Broker, topic: str) -> None:
    member = await Member(broker, topic).join()
    with pytest.raises(BrokerError):
        await member.consumer.commit({0: Committed(1, "x" * 4_097)})
    await member.consumer.commit({0: Committed(1, "x" * 4_096)})
    assert (await member.consumer.committed([0])).get(0) == Committed(1, "x" * 4_096)
    await member.consumer.close()


async def test_reading_what_does_not_exist_fails_at_once(broker: Broker, topic: str) -> None:
    async def nothing(_partitions: frozenset[int]) -> None: ...

    async with asyncio.timeout(10):
        with pytest.raises(BrokerError, match=f"{topic}.none"):
            await broker.read(f"{topic}.none", {0: None})
        with pytest.raises(BrokerError, match=f"{topic}.none"):
            await broker.consume(f"{topic}.none", topic, on_assigned=nothing, on_revoked=nothing)


async def test_a_partition_that_is_paused_gives_nothing_and_the_others_flow(broker: Broker, topic: str) -> None:
    """More lies on it than any buffer takes: it would hold up the others if it counted."""
    await fill(broker, topic, 3_000)
    member = await Member(broker, topic).join()
    first = await member.take(5)
    member.consumer.pause(0)
    for _ in range(3):
        await fill(broker, topic, 500, partition=1)
        assert {record.partition for record in await member.take(500)} == {1}
    fetching = asyncio.ensure_future(member.consumer.fetch(1))
    done, _ = await asyncio.wait([fetching], timeout=0.3)
    assert not done, "all that is left is of the paused partition"
    member.consumer.resume(0)
    rest = await fetching + await member.take(2_994)
    assert [(record.partition, record.offset) for record in first + rest] == [(0, n) for n in range(3_000)]
    await member.consumer.close()


async def test_pausing_again_and_again_loses_nothing_and_repeats_nothing(broker: Broker, topic: str) -> None:
    await fill(broker, topic, 300)
    await fill(broker, topic, 300, partition=1)
    member = await Member(broker, topic).join()
    got: defaultdict[int, list[int]] = defaultdict(list)
    paused = 1
    async with asyncio.timeout(60):
        for n in range(10_000):
            if n % 3 == 0:
                member.consumer.resume(paused)
                paused = 1 - paused
                member.consumer.pause(paused)
            for record in await member.consumer.fetch(7) if len(got[1 - paused]) < 300 else []:
                assert record.partition != paused
                got[record.partition].append(record.offset)
            if len(got[0]) == len(got[1]) == 300:
                break
    assert got == {0: list(range(300)), 1: list(range(300))}
    await member.consumer.close()


async def test_a_pause_ends_with_a_rebalance(broker: Broker, topic: str) -> None:
    for partition in range(4):
        await fill(broker, topic, 1, partition=partition)
    first = await Member(broker, topic).join()
    for partition in range(4):
        first.consumer.pause(partition)
    second = await Member(broker, topic).join()
    await first.until(2)
    assert {record.partition for record in await first.take(2)} == first.held
    for partition in second.held:
        first.consumer.pause(partition)  # as by a task that has not heard of it yet
        first.consumer.resume(partition)
    assert {record.partition for record in await second.take(2)} == second.held
    await first.consumer.close()
    await second.consumer.close()


async def test_many_records_of_one_partition_do_not_hold_up_the_others(broker: Broker, topic: str) -> None:
    for partition, count in enumerate((900, 3, 3, 3)):
        await fill(broker, topic, count, partition=partition)
    member = await Member(broker, topic).join()
    taken = [await member.consumer.fetch(8) for _ in range(9)]
    early = [record.partition for records in taken for record in records]
    assert all(early.count(partition) == 3 for partition in (1, 2, 3)), early
    await member.consumer.close()


async def test_lag_is_what_fetch_has_not_given(broker: Broker, topic: str) -> None:
    await fill(broker, topic, 20)
    await fill(broker, topic, 4, partition=1)
    member = await Member(broker, topic).join()
    got = await member.take(5)
    counts = [sum(record.partition == partition for record in got) for partition in range(4)]
    assert member.consumer.lag() == {0: 20 - counts[0], 1: 4 - counts[1], 2: 0, 3: 0}
    await member.take(19)
    assert member.consumer.lag() == dict.fromkeys(range(4), 0)
    second = await Member(broker, topic).join()
    await member.until(2)
    assert member.consumer.lag().keys() == member.held
    assert second.consumer.lag().keys() == second.held
    await member.consumer.close()
    await second.consumer.close()


async def test_what_lies_before_an_offset_can_be_deleted(broker: Broker, topic: str) -> None:
    await fill(broker, topic, 10)
    await fill(broker, topic, 3, partition=1)
    await broker.delete_before(topic, {0: 7, 1: 1})
    assert [await broker.begin_offset(topic, partition) for partition in range(3)] == [7, 1, 0]
    assert [await broker.end_offset(topic, partition) for partition in range(3)] == [10, 3, 0]
    await broker.delete_before(topic, {0: 2})
    assert await broker.begin_offset(topic, 0) == 7, "it was deleted already"
    with pytest.raises(OffsetExpiredError):
        await broker.delete_before(topic, {0: 11})
    reader = await broker.read(topic, {0: 3})
    with pytest.raises(OffsetExpiredError):
        await asyncio.wait_for(reader.fetch(), 20)
    member = await Member(broker, topic).join()
    left = sorted((record.partition, record.offset) for record in await member.take(5))
    assert left == [(0, 7), (0, 8), (0, 9), (1, 1), (1, 2)]
    await reader.close()
    await member.consumer.close()


async def test_the_backlog_is_what_is_not_committed(broker: Broker, topic: str) -> None:
    assert await broker.backlog(topic, topic) == 0
    await fill(broker, topic, 5)
    await fill(broker, topic, 3, partition=2)
    assert await broker.backlog(topic, topic) == 8, "before anybody has joined"
    member = await Member(broker, topic).join()
    await member.take(8)
    assert await broker.backlog(topic, topic) == 8, "taken is not done"
    await member.consumer.commit({0: Committed(4), 2: Committed(3)})
    assert await broker.backlog(topic, topic) == 1
    await member.consumer.close()
    assert await broker.backlog(topic, topic) == 1, "and when nobody is there any more"
    await broker.delete_before(topic, {0: 5})
    assert await broker.backlog(topic, topic) == 0, "what is gone does not wait"


async def test_a_topic_that_is_not_there_has_no_backlog(broker: Broker) -> None:
    with pytest.raises(UnknownTopicError):
        await broker.backlog("contract.none", "contract.none")
