"""Outputs and offsets of a partition in one transaction, where the partition goes to others meanwhile."""

import asyncio
from typing import Any

import pytest

from chains_stream.broker import Broker, Committed, Record, TopicSpec
from chains_stream.brokers.memory import MemoryBroker
from chains_stream.errors import BrokerError, RecordTooLargeError
from chains_stream.offsets import Note
from chains_stream.settings import Settings
from chains_stream.transactions import MOST_BYTES, MOST_UNSENT, Transactions, Unsent

HOUR = 3_600_000
EVENT = Record("in", 0, 0, 0, None, b"", ())


async def _bury_nothing(_record: Record, error: BrokerError) -> bool:
    raise error


class _Slow:
    """A transactor whose commits wait until it is closed."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._closed = asyncio.Event()
        self.committing = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def close(self) -> None:
        await self._inner.close()
        self._closed.set()

    async def commit(self) -> None:
        self.committing.set()
        await self._closed.wait()
        await self._inner.commit()


class _SlowBroker(MemoryBroker):
    def __init__(self) -> None:
        super().__init__(Settings())
        self.made: list[_Slow] = []

    def transactor(self, transactional_id: str, **options: Any) -> Any:
        self.made.append(_Slow(super().transactor(transactional_id, **options)))
        return self.made[-1]


async def test_a_commit_under_way_of_a_partition_that_is_lost_fences_nobody() -> None:
    broker = _SlowBroker()
    await broker.ensure_topics([TopicSpec("in", 1, HOUR)])
    ours: Broker = broker
    transactions = Transactions(ours, "in", "group", lambda: None, _bury_nothing)
    await transactions.take_over([0])
    commit = asyncio.ensure_future(transactions.commit({0: Committed(1, Note(epoch=1).write())}))
    await broker.made[0].committing.wait()
    await transactions.lose([0])
    assert await commit == frozenset()
    assert len(broker.made) == 1, "another one would fence whoever holds the partition now"


async def test_it_is_full_until_what_was_given_is_stored() -> None:
    broker = MemoryBroker(Settings())
    await broker.ensure_topics([TopicSpec("in", 1, HOUR), TopicSpec("out", 1, HOUR, ring=True)])
    emptied = asyncio.Event()
    transactions = Transactions(broker, "in", "group", emptied.set, _bury_nothing)
    await transactions.take_over([0])
    large = b"x" * (MOST_BYTES // 100)
    for count, value in ((MOST_UNSENT, b""), (100, large)):
        transactions.add(EVENT, [Unsent("out", 0, None, value, ())] * (count - 1))
        before = transactions.full
        transactions.add(EVENT, [Unsent("out", 0, None, value + b"x" * 100, ())])
        assert (before, transactions.full) == (False, True)
        emptied.clear()
        await transactions.commit({0: Committed(count, Note(epoch=1).write())})
        assert (transactions.full, emptied.is_set()) == (False, True)


async def test_events_count_as_long_as_what_they_gave_is_not_stored() -> None:
    broker = MemoryBroker(Settings())
    await broker.ensure_topics([TopicSpec("in", 1, HOUR), TopicSpec("out", 1, HOUR, ring=True)])
    transactions = Transactions(broker, "in", "group", lambda: None, _bury_nothing)
    await transactions.take_over([0])
    value = bytes(MOST_BYTES // 100)
    before = []
    for offset in range(100):
        before.append(transactions.full)
        small = Unsent("out", 0, None, b"small", ())
        transactions.add(Record("in", 0, offset, 0, None, value, ()), [small, small])
    assert (any(before), transactions.full) == (False, True)
    await transactions.commit({0: Committed(100, Note(epoch=1).write())})
    assert not transactions.full
    await transactions.lose([0])


class _Narrow:
    """A transactor at a broker that refuses large records, and says so when a record is stored."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._refused: RecordTooLargeError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def put(self, topic: str, value: bytes, **rest: Any) -> "asyncio.Future[int] | None":
        if len(value) <= 100:
            return self._inner.put(topic, value, **rest)  # type: ignore[no-any-return] # whatever it is
        self._refused = RecordTooLargeError("too large")
        stored: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        stored.set_exception(self._refused)
        stored.exception()
        return stored

    async def commit(self) -> None:
        if self._refused is not None:
            raise self._refused
        await self._inner.commit()


class _NarrowBroker(MemoryBroker):
    def transactor(self, transactional_id: str, **options: Any) -> Any:
        return _Narrow(super().transactor(transactional_id, **options))


async def test_events_that_gave_what_can_t_be_stored_are_put_aside_and_others_are_stored() -> None:
    broker = _NarrowBroker(Settings())
    await broker.ensure_topics([TopicSpec("in", 1, HOUR), TopicSpec("out", 1, HOUR)])
    buried: list[int] = []

    async def bury(record: Record, _error: BrokerError) -> bool:
        buried.append(record.offset)
        return True

    transactions = Transactions(broker, "in", "group", lambda: None, bury)
    await transactions.take_over([0])
    for offset, sizes in enumerate([(1,), (2, 200, 3), (), (4,), (300,), (5,)]):
        given = [Unsent("out", 0, None, bytes(size), ()) for size in sizes]
        transactions.add(Record("in", 0, offset, 0, None, b"", ()), given)
    done = Committed(6, Note(epoch=1).write())
    assert await transactions.commit({0: done}) == {0}
    reader = await broker.read("out", {0: 0}, isolation="read_committed")
    assert [len(record.value) for record in await reader.fetch()] == [1, 4, 5]
    await reader.close()
    assert buried == [1, 4]
    assert await broker.committed("in", "group", [0]) == {0: done}


async def test_partitions_that_move_do_not_wait_for_an_event_that_can_t_be_put_aside() -> None:
    broker = _NarrowBroker(Settings())
    await broker.ensure_topics([TopicSpec("in", 1, HOUR), TopicSpec("out", 1, HOUR)])
    burying, away, buried = asyncio.Event(), asyncio.Event(), list[int]()

    async def bury(record: Record, _error: BrokerError) -> bool:
        burying.set()
        await away.wait()
        buried.append(record.offset)
        return True

    transactions = Transactions(broker, "in", "group", lambda: None, bury)
    await transactions.take_over([0])
    transactions.add(EVENT, [Unsent("out", 0, None, bytes(200), ())])
    done = {0: Committed(1, Note(epoch=1).write())}
    commit = asyncio.ensure_future(transactions.commit(done))
    async with asyncio.timeout(10):
        await burying.wait()
        transactions.begin_move()
        with pytest.raises(RecordTooLargeError):
            await commit
        with pytest.raises(RecordTooLargeError):
            await transactions.commit(done)
    assert buried == []
    transactions.end_move()
    away.set()
    assert await transactions.commit(done) == {0}
    assert buried == [0]
    await transactions.lose([0])


async def test_nothing_is_written_for_a_partition_that_was_lost_while_an_event_was_put_aside() -> None:
    broker = _NarrowBroker(Settings())
    await broker.ensure_topics([TopicSpec("in", 1, HOUR), TopicSpec("out", 1, HOUR)])

    async def bury(_record: Record, _error: BrokerError) -> bool:
        await transactions.lose([0])
        return True

    transactions = Transactions(broker, "in", "group", lambda: None, bury)
    await transactions.take_over([0])
    transactions.add(EVENT, [Unsent("out", 0, None, bytes(200), ())])
    assert await transactions.commit({0: Committed(1, Note(epoch=1).write())}) == frozenset()
