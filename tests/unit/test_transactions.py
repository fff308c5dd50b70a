"""Outputs and offsets of a partition in one transaction, where the partition goes to others meanwhile."""

import asyncio
from typing import Any

from chains_stream.broker import Broker, Committed, TopicSpec
from chains_stream.brokers.memory import MemoryBroker
from chains_stream.offsets import Note
from chains_stream.settings import Settings
from chains_stream.transactions import MOST_BYTES, MOST_UNSENT, Transactions, Unsent

HOUR = 3_600_000


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
    transactions = Transactions(ours, "in", "group", lambda: None)
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
    transactions = Transactions(broker, "in", "group", emptied.set)
    await transactions.take_over([0])
    large = b"x" * (MOST_BYTES // 100)
    for count, value in ((MOST_UNSENT, b""), (100, large)):
        transactions.add(0, [Unsent("out", 0, None, value, ())] * (count - 1))
        before = transactions.full
        transactions.add(0, [Unsent("out", 0, None, value + b"x" * 100, ())])
        assert (before, transactions.full) == (False, True)
        emptied.clear()
        await transactions.commit({0: Committed(count, Note(epoch=1).write())})
        assert (transactions.full, emptied.is_set()) == (False, True)
