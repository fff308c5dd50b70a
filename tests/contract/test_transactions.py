"""What every broker does with transactions."""

import asyncio
import gc
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest

from chains_stream.broker import Broker, Committed, Reader, TopicSpec, Transactor
from chains_stream.errors import (
    BrokerError,
    ChainsUsageError,
    FencedError,
    RecordTooLargeError,
    UnknownTopicError,
)
from tests.members import HOUR_MS, Member, fill, take

Open = Callable[[str], Awaitable[Transactor]]


@pytest.fixture(autouse=True)
def dropped() -> Iterator[None]:
    """Collect the connections of what a test has dropped, as if its process had been killed: not in a later test."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
async def output(broker: Broker, topic: str) -> str:
    name = f"{topic}.output"
    await broker.ensure_topics([TopicSpec(name, 2, HOUR_MS)])
    return name


@pytest.fixture
async def transactor(broker: Broker, topic: str) -> AsyncIterator[Transactor]:
    made = await started(broker, topic)
    yield made
    await made.close()


async def started(broker: Broker, transactional_id: str) -> Transactor:
    made = broker.transactor(transactional_id)
    await made.start()
    return made


async def committed(broker: Broker, topic: str, partition: int = 0) -> list[bytes]:
    """Give what a reader of committed records meets of a partition, once no transaction on it is open any more."""
    return await met(broker, topic, partition, await broker.end_offset(topic, partition))


async def committed_now(broker: Broker, topic: str, partition: int = 0) -> list[bytes]:
    """Give what such a reader meets as long as what is open stays so."""
    return await met(broker, topic, partition, await broker.end_offset(topic, partition, isolation="read_committed"))


async def met(broker: Broker, topic: str, partition: int, end: int) -> list[bytes]:
    reader = await broker.read(topic, {partition: 0}, isolation="read_committed")
    values = await up_to(reader, end, partition)
    await reader.close()
    return values


async def up_to(reader: Reader, end: int, partition: int = 0) -> list[bytes]:
    values = []
    async with asyncio.timeout(30):
        while reader.position(partition) < end:
            values += [record.value for record in await reader.fetch()]
    return values


async def write(transactor: Transactor, topic: str, *values: str, partition: int = 0) -> list[asyncio.Future[int]]:
    return [await transactor.publish(topic, value.encode(), partition=partition) for value in values]


async def test_records_of_a_transaction_count_from_its_commit_on(
    broker: Broker, output: str, transactor: Transactor
) -> None:
    follower = await broker.read(output, {0: None, 1: None}, isolation="read_committed")
    dirty = await broker.read(output, {0: None, 1: None})
    transactor.begin()
    stored = await write(transactor, output, "a", "b") + await write(transactor, output, "c", partition=1)
    assert [await future for future in stored] == [0, 1, 0]
    assert {record.value for record in await take(dirty, 3)} == {b"a", b"b", b"c"}
    assert await committed_now(broker, output) == []
    waiting = asyncio.ensure_future(take(follower, 3))
    await asyncio.wait([waiting], timeout=0.3)
    assert not waiting.done()
    await transactor.commit()
    assert sorted((record.partition, record.value) for record in await waiting) == [(0, b"a"), (0, b"b"), (1, b"c")]
    assert await committed(broker, output) == [b"a", b"b"]
    assert await committed(broker, output, 1) == [b"c"]
    await follower.close()
    await dirty.close()


async def test_a_record_in_a_transaction_comes_back_as_it_was_sent(
    broker: Broker, output: str, transactor: Transactor
) -> None:
    headers = (("twice", b"1"), ("twice", b""))
    reader = await broker.read(output, {1: 0}, isolation="read_committed")
    transactor.begin()
    await transactor.publish(output, b"value", partition=1, key=b"\x00key", headers=headers)
    await transactor.commit()
    (record,) = await take(reader, 1)
    assert (record.partition, record.key, record.value, record.headers) == (1, b"\x00key", b"value", headers)
    await reader.close()


async def test_what_was_aborted_is_never_met(broker: Broker, output: str, transactor: Transactor) -> None:
    follower = await broker.read(output, {0: None}, isolation="read_committed")
    for turn in range(6):
        transactor.begin()
        await write(transactor, output, *[f"{turn}.{n}" for n in range(3)])
        await (transactor.commit() if turn % 2 else transactor.abort())
    expected = [f"{turn}.{n}".encode() for turn in (1, 3, 5) for n in range(3)]
    assert await committed(broker, output) == expected
    assert [record.value for record in await take(follower, 9)] == expected
    dirty = await broker.read(output, {0: 0})
    assert len(await take(dirty, 18)) == 18
    await follower.close()
    await dirty.close()


async def test_a_reader_gets_past_what_was_aborted(broker: Broker, output: str, transactor: Transactor) -> None:
    """Though it is given no record: its position tells that it is at the end."""
    follower = await broker.read(output, {0: None}, isolation="read_committed")
    transactor.begin()
    await write(transactor, output, "never", "met")
    await transactor.abort()
    end = await broker.end_offset(output, 0)
    assert end >= 2
    assert await up_to(follower, end) == []
    await follower.close()


async def test_an_open_transaction_holds_back_what_comes_after_it(
    broker: Broker, output: str, transactor: Transactor
) -> None:
    follower = await broker.read(output, {0: None, 1: None}, isolation="read_committed")
    await (await broker.publish(output, b"before", partition=0))
    transactor.begin()
    (stored,) = await write(transactor, output, "open")
    await stored
    await (await broker.publish(output, b"after", partition=0))
    await (await broker.publish(output, b"elsewhere", partition=1))
    assert {record.value for record in await take(follower, 2)} == {b"before", b"elsewhere"}
    assert await broker.end_offset(output, 0, isolation="read_committed") == 1
    at_end = await broker.read(output, {0: None}, isolation="read_committed")
    assert at_end.position(0) == 1
    await transactor.abort()
    assert [record.value for record in await take(follower, 1)] == [b"after"]
    assert [record.value for record in await take(at_end, 1)] == [b"after"]
    await follower.close()
    await at_end.close()


async def test_two_transactions_on_one_partition(broker: Broker, output: str, topic: str) -> None:
    one, other = [await started(broker, f"{topic}.{n}") for n in range(2)]
    follower = await broker.read(output, {0: None}, isolation="read_committed")
    for each, values in ((one, "a"), (other, "bc"), (one, "d"), (other, "e")):
        if values in ("a", "bc"):
            each.begin()
        await asyncio.gather(*await write(each, output, *values))
    await other.commit()
    assert await committed_now(broker, output) == [], "the first is open"
    await one.abort()
    assert [record.value for record in await take(follower, 3)] == [b"b", b"c", b"e"]
    await follower.close()
    await one.close()
    await other.close()


async def test_offsets_count_together_with_records(
    broker: Broker, topic: str, output: str, transactor: Transactor
) -> None:
    await fill(broker, topic, 10)
    member = await Member(broker, topic).join(f"group.{topic}")
    await member.take(10)
    transactor.begin()
    await write(transactor, output, "4")
    transactor.add_offsets(topic, f"group.{topic}", {0: Committed(3, "early")})
    transactor.add_offsets(topic, f"group.{topic}", {0: Committed(4, "note"), 1: Committed(0, "n" * 4_000)})
    assert await member.consumer.committed([0, 1]) == {}
    await transactor.commit()
    await until_committed(member, {0: Committed(4, "note"), 1: Committed(0, "n" * 4_000)})
    transactor.begin()
    await write(transactor, output, "9")
    transactor.add_offsets(topic, f"group.{topic}", {0: Committed(9)})
    await transactor.abort()
    assert await member.consumer.committed([0]) == {0: Committed(4, "note")}
    assert await committed(broker, output) == [b"4"]
    transactor.begin()
    transactor.add_offsets(topic, f"group.{topic}", {0: Committed(6, "alone")})
    await transactor.commit()
    await until_committed(member, {0: Committed(6, "alone")})
    await member.consumer.close()
    again = await Member(broker, topic).join(f"group.{topic}")
    assert [record.offset for record in await again.take(4)] == [6, 7, 8, 9]
    assert await broker.members(f"group.{topic}") == 1
    assert await broker.backlog(topic, f"group.{topic}") == 4
    await again.consumer.close()


async def test_an_empty_transaction_is_one(broker: Broker, output: str, transactor: Transactor) -> None:
    for end in (transactor.commit, transactor.abort, transactor.commit):
        transactor.begin()
        await end()
    transactor.begin()
    await write(transactor, output, "a")
    await transactor.commit()
    assert await committed(broker, output) == [b"a"]


async def test_a_second_holder_fences_the_first(broker: Broker, topic: str, output: str) -> None:
    await fill(broker, topic, 3)
    zombie = await started(broker, topic)
    zombie.begin()
    (stored,) = await write(zombie, output, "zombie")
    await stored
    zombie.add_offsets(topic, f"group.{topic}", {0: Committed(3)})
    holder = await started(broker, topic)
    assert await broker.end_offset(output, 0, isolation="read_committed") == await broker.end_offset(output, 0)
    with pytest.raises(FencedError, match=topic):
        await zombie.commit()
    with pytest.raises(FencedError):
        zombie.begin()
    member = await Member(broker, topic).join(f"group.{topic}")
    assert await member.consumer.committed([0]) == {}
    holder.begin()
    await write(holder, output, "holder")
    holder.add_offsets(topic, f"group.{topic}", {0: Committed(1)})
    await holder.commit()
    assert await committed(broker, output) == [b"holder"]
    assert await member.consumer.committed([0]) == {0: Committed(1)}
    await zombie.close()
    await holder.close()
    await member.consumer.close()


@pytest.mark.parametrize("what", ["records", "offsets", "abort"])
async def test_whoever_is_fenced_learns_it_from_what_it_does_next(
    broker: Broker, topic: str, output: str, what: str
) -> None:
    zombie = await started(broker, topic)
    zombie.begin()
    await write(zombie, output, "counts")
    await zombie.commit()
    if what == "abort":
        zombie.begin()
        await asyncio.gather(*await write(zombie, output, "was aborted already"))
    holder = await started(broker, topic)
    with pytest.raises(FencedError):
        if what == "records":
            zombie.begin()
            await write(zombie, output, "zombie")
            await zombie.commit()
        elif what == "offsets":
            zombie.begin()
            zombie.add_offsets(topic, f"group.{topic}", {0: Committed(1)})
            await zombie.commit()
        else:
            await zombie.abort()
    await zombie.close()
    assert await committed(broker, output) == [b"counts"]
    member = await Member(broker, topic).join(f"group.{topic}")
    assert await member.consumer.committed([0]) == {}
    await member.consumer.close()
    await holder.close()


async def test_what_a_dead_holder_left_open_is_aborted_by_the_next(broker: Broker, topic: str, output: str) -> None:
    """It is dropped without a word, in the midst: the next one settles it before it reads where to go on."""
    dead = await started(broker, topic)
    dead.begin()
    await asyncio.gather(*await write(dead, output, "lost"))
    dead.add_offsets(topic, f"group.{topic}", {0: Committed(1)})
    follower = await broker.read(output, {0: 0}, isolation="read_committed")
    holder = await started(broker, topic)
    holder.begin()
    await write(holder, output, "again")
    await holder.commit()
    assert [record.value for record in await take(follower, 1)] == [b"again"]
    await follower.close()
    await holder.close()
    await dead.close()


async def test_closing_aborts_what_is_open(broker: Broker, topic: str, output: str) -> None:
    left = await started(broker, topic)
    left.begin()
    await asyncio.gather(*await write(left, output, "lost"))
    await left.close()
    await (await broker.publish(output, b"after", partition=0))
    follower = await broker.read(output, {0: 0}, isolation="read_committed")
    assert [record.value for record in await take(follower, 1)] == [b"after"]
    with pytest.raises(BrokerError, match="closed"):
        left.begin()
    await left.close()
    await follower.close()


async def test_a_transaction_that_is_open_for_too_long_is_aborted(broker: Broker, topic: str, output: str) -> None:
    slow = broker.transactor(topic, timeout_ms=1_000)
    await slow.start()
    slow.begin()
    await asyncio.gather(*await write(slow, output, "late"))
    await (await broker.publish(output, b"after", partition=0))
    follower = await broker.read(output, {0: 0}, isolation="read_committed")
    assert [record.value for record in await take(follower, 1)] == [b"after"]
    with pytest.raises(FencedError):
        await slow.commit()
    await slow.close()
    again = await started(broker, topic)
    again.begin()
    await write(again, output, "in time")
    await again.commit()
    assert await committed(broker, output) == [b"after", b"in time"]
    await again.close()
    await follower.close()


async def test_large_transactions_keep_their_order(broker: Broker, output: str, transactor: Transactor) -> None:
    count, size = 5_000, 400
    transactor.begin()
    for n in range(count):
        value, partition = str(n).encode().ljust(size), n % 2
        if transactor.put(output, value, partition=partition) is None:
            await transactor.publish(output, value, partition=partition)
    await transactor.commit()
    for partition in range(2):
        values = [int(value) for value in await committed(broker, output, partition)]
        assert values == list(range(partition, count, 2))


async def test_many_transactions_keep_their_order(broker: Broker, output: str, transactor: Transactor) -> None:
    for n in range(100):
        transactor.begin()
        await write(transactor, output, str(n))
        await transactor.commit()
    assert [int(value) for value in await committed(broker, output)] == list(range(100))


async def test_a_record_that_has_no_place_leaves_the_transaction_as_it_was(
    broker: Broker, output: str, transactor: Transactor
) -> None:
    transactor.begin()
    await write(transactor, output, "a")
    with pytest.raises(RecordTooLargeError):
        await transactor.publish(output, bytes(broker.max_record_bytes + 1), partition=0)
    with pytest.raises(UnknownTopicError):
        await transactor.publish(output, b"", partition=2)
    with pytest.raises(UnknownTopicError):
        await transactor.publish(f"{output}.none", b"", partition=0)
    await write(transactor, output, "b")
    await transactor.commit()
    assert await committed(broker, output) == [b"a", b"b"]


async def test_a_failed_commit_spends_the_transactor(broker: Broker, topic: str, output: str) -> None:
    spent = await started(broker, topic)
    spent.begin()
    await write(spent, output, "never")
    spent.add_offsets(topic, f"group.{topic}", {0: Committed(1, "x" * 4_097)})
    with pytest.raises(BrokerError):
        await spent.commit()
    with pytest.raises(BrokerError):
        spent.begin()
    await spent.close()
    again = await started(broker, topic)
    again.begin()
    await write(again, output, "a")
    await again.commit()
    assert await committed(broker, output) == [b"a"]
    await again.close()


async def test_wrong_turns_are_refused(broker: Broker, topic: str, output: str) -> None:
    idle = broker.transactor(topic)
    with pytest.raises(ChainsUsageError, match="not started"):
        idle.begin()
    await idle.start()
    for too_early in (idle.commit(), idle.abort(), idle.publish(output, b"", partition=0)):
        with pytest.raises(ChainsUsageError, match="was begun"):
            await too_early
    with pytest.raises(ChainsUsageError, match="was begun"):
        idle.put(output, b"", partition=0)
    with pytest.raises(ChainsUsageError, match="was begun"):
        idle.add_offsets(topic, f"group.{topic}", {0: Committed(1)})
    idle.begin()
    with pytest.raises(ChainsUsageError, match="is open"):
        idle.begin()
    idle.add_offsets(topic, f"group.{topic}", {0: Committed(1)})
    with pytest.raises(ChainsUsageError, match="has offsets of"):
        idle.add_offsets(topic, "other", {0: Committed(1)})
    await idle.commit()
    await idle.close()


async def test_a_group_of_committed_records(broker: Broker, topic: str, transactor: Transactor) -> None:
    """Its lag, its position and its backlog come to nothing, though markers and aborted records lie between."""
    member = await Member(broker, topic).join(f"group.{topic}", isolation="read_committed")
    for turn in range(4):
        transactor.begin()
        await asyncio.gather(*await write(transactor, topic, f"{turn}.a", f"{turn}.b"))
        await (transactor.commit() if turn % 2 else transactor.abort())
    assert [record.value for record in await member.take(4)] == [b"1.a", b"1.b", b"3.a", b"3.b"]
    transactor.begin()
    await asyncio.gather(*await write(transactor, topic, "open"))
    await until_no_lag(member)
    await transactor.abort()
    end = await broker.end_offset(topic, 0)
    async with asyncio.timeout(30):
        while member.consumer.position(0) < end:
            fetching = asyncio.ensure_future(member.consumer.fetch(10))
            await asyncio.wait([fetching], timeout=0.1)
            assert not fetching.done()
            fetching.cancel()
    await until_no_lag(member)
    await member.consumer.commit({0: Committed(member.consumer.position(0))})
    assert await broker.backlog(topic, f"group.{topic}") == 0
    await (await broker.publish(topic, b"next", partition=0))
    assert [record.value for record in await member.take(1)] == [b"next"]
    await member.consumer.close()


async def until_committed(member: Member, expected: dict[int, Committed]) -> None:
    """Wait for offsets of a transaction that was committed: Kafka shows them once it has written its markers."""
    async with asyncio.timeout(10):
        while True:
            if await member.consumer.committed(expected) == expected:
                return
            await asyncio.sleep(0.01)


async def until_no_lag(member: Member) -> None:
    async with asyncio.timeout(30):
        while any(member.consumer.lag().values()):  # noqa: ASYNC110 - nobody is told
            await asyncio.sleep(0.05)
    assert set(member.consumer.lag()) == member.held


async def test_closing_ends_a_commit_that_is_under_way(broker: Broker, topic: str, output: str) -> None:
    """As when its partition is revoked: whether it counted is told by the next holder."""
    for turn in range(5):
        left = await started(broker, topic)
        left.begin()
        await write(left, output, f"{turn}")
        ending = asyncio.ensure_future(left.commit())
        for _ in range(turn * 4):
            await asyncio.sleep(0)
        async with asyncio.timeout(10):
            await left.close()
            await asyncio.wait([ending])
        assert not ending.cancelled()
        error = ending.exception()
        assert error is None or isinstance(error, BrokerError)
    again = await started(broker, topic)
    await again.close()
    assert set(await committed(broker, output)) <= {b"0", b"1", b"2", b"3", b"4"}


async def test_what_is_settled_while_partitions_are_assigned_is_where_it_goes_on(broker: Broker, topic: str) -> None:
    """The next holder's start ends what the last one had begun to commit, and comes before the offsets are read."""
    await fill(broker, topic, 10)
    last, following = broker.transactor(topic), broker.transactor(topic)
    await last.start()
    last.begin()
    last.add_offsets(topic, f"group.{topic}", {0: Committed(7)})

    async def assigned(_partitions: frozenset[int]) -> None:
        await last.commit()
        await following.start()

    async def revoked(_partitions: frozenset[int]) -> None: ...

    consumer = await broker.consume(topic, f"group.{topic}", on_assigned=assigned, on_revoked=revoked)
    async with asyncio.timeout(30):
        assert (await consumer.fetch(1))[0].offset == 7
    assert await consumer.committed([0]) == {0: Committed(7)}
    await consumer.close()
    await last.close()
    await following.close()


async def test_the_largest_record(broker: Broker, output: str, transactor: Transactor) -> None:
    transactor.begin()
    await write(transactor, output, "before")
    await transactor.publish(output, bytes(broker.max_record_bytes), partition=0)
    await write(transactor, output, "after")
    await transactor.commit()
    assert [len(value) for value in await committed(broker, output)] == [6, broker.max_record_bytes, 5]
