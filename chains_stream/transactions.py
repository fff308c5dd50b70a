"""Outputs and offsets of a topic's partitions, stored together: what `exactly_once` is made of.

Each partition has a transactor of its own, which is started before it is read where to go on, so that nothing of an
earlier holder can come in between (Kafka's KIP-98, and KIP-447 for what could be had with fewer of them).
"""

import asyncio
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from chains_stream.broker import Broker, Committed, Transactor
from chains_stream.errors import BrokerError
from chains_stream.log import get_logger
from chains_stream.messages import Headers
from chains_stream.offsets import Note

MOST_UNSENT, MOST_BYTES = 10_000, 64 << 20  # records, and their values, that wait for a commit: no more events then

log = get_logger(__name__)


class Unsent(NamedTuple):
    """A record that is to be written."""

    topic: str
    partition: int
    key: bytes | None
    value: bytes
    headers: Headers


class _Partition:
    """A partition's transactor, and what is to be written with its next commits, in the order in which it was given."""

    def __init__(self) -> None:
        self.transactor: Transactor | None = None
        self.doubt: tuple[Committed, int] | None = None  # what may be committed, and how many records with it
        self.overtaken = False  # by another worker: the group will tell
        self.turn = asyncio.Lock()  # a transactor has one transaction at a time
        self._unsent: list[Unsent] = []
        self._written = 0  # records before those
        self.bytes = 0  # of the values of those that are not written

    def add(self, records: Collection[Unsent]) -> None:
        self._unsent += records
        self.bytes += sum(len(record.value) for record in records)

    def __len__(self) -> int:
        """How many records are not written yet."""
        return len(self._unsent)

    @property
    def given(self) -> int:
        """How many records were given so far."""
        return self._written + len(self._unsent)

    def up_to(self, given: int) -> list[Unsent]:
        """Give what is not written of the first so many that were given."""
        return self._unsent[: max(0, given - self._written)]

    def wrote(self, count: int) -> None:
        self._written += count
        self.bytes -= sum(len(record.value) for record in self._unsent[:count])
        del self._unsent[:count]


class Transactions:
    """The transactors of the partitions of one topic, and what was given for events of them and is not stored yet."""

    def __init__(self, broker: Broker, topic: str, group: str, emptied: Callable[[], None]) -> None:
        """Store what is given for `topic`, and for `group`; `emptied` is called when it becomes less."""
        self._emptied = emptied
        self._broker = broker
        self._topic = topic
        self._group = group
        self._partitions: dict[int, _Partition] = {}

    def add(self, number: int, records: Collection[Unsent]) -> None:
        """Have the commits of a partition from now on write these too: those of an event that is finished by then."""
        if number in self._partitions:
            self._partitions[number].add(records)

    @property
    def full(self) -> bool:
        """Whether so much is not stored yet, as commits are slow or fail, that no more should be given."""
        held = self._partitions.values()
        return sum(map(len, held)) >= MOST_UNSENT or sum(each.bytes for each in held) >= MOST_BYTES

    async def take_over(self, partitions: Collection[int]) -> None:
        await self.lose(partitions)
        new = {number: _Partition() for number in partitions}
        started = [self._start(number, partition) for number, partition in new.items()]
        results = await asyncio.gather(*started, return_exceptions=True)
        self._partitions |= new  # those that were started have somebody to close them, whatever became of the others
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def commit(self, positions: Mapping[int, Committed]) -> frozenset[int]:
        """Write what is finished of partitions, and how far they are done. Raises BrokerError if one of them failed."""
        # Counted before anything is waited for: `positions` tell of what was finished until now, and of no more.
        due = {n: (self._partitions[n], self._partitions[n].given) for n in positions if n in self._partitions}
        results = await asyncio.gather(
            *(self._commit(n, partition, given, positions[n]) for n, (partition, given) in due.items()),
            return_exceptions=True,
        )
        self._emptied()
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return frozenset(number for number, stored in zip(due, results, strict=True) if stored)

    async def lose(self, partitions: Collection[int]) -> None:
        lost = [partition for n in partitions if (partition := self._partitions.pop(n, None)) is not None]
        self._emptied()
        await asyncio.gather(*(each.transactor.close() for each in lost if each.transactor is not None))

    async def _start(self, number: int, partition: _Partition) -> None:
        if partition.transactor is not None:
            await partition.transactor.close()
            partition.transactor = None
        transactor = self._broker.transactor(f"{self._group}.{self._topic}.{number}")
        try:
            await transactor.start()
        except BaseException:
            await transactor.close()
            raise
        partition.transactor = transactor

    async def _commit(self, number: int, partition: _Partition, given: int, committed: Committed) -> bool:
        async with partition.turn:
            if self._partitions.get(number) is not partition:
                return False  # it was lost meanwhile
            if partition.doubt is not None or partition.transactor is None:
                await self._settle(number, partition)
            if partition.overtaken:
                return False
            records = partition.up_to(given)
            partition.doubt = committed, len(records)  # until it is known, whatever ends this
            try:
                await self._write(partition.transactor, records, number, committed)
            except BrokerError as error:
                if self._partitions.get(number) is not partition:
                    return False  # it was lost meanwhile: to settle it would fence whoever has it now
                log.warning("transaction.failed", topic=self._topic, partition=number, reason=str(error))
                if not await self._settle(number, partition) and not partition.overtaken:
                    raise
                return not partition.overtaken
            partition.doubt = None
            partition.wrote(len(records))
            return True

    async def _write(
        self, transactor: Transactor | None, records: Collection[Unsent], number: int, committed: Committed
    ) -> None:
        assert transactor is not None, "started"
        transactor.begin()
        for record in records:
            await transactor.publish(
                record.topic, record.value, partition=record.partition, key=record.key, headers=record.headers
            )
        transactor.add_offsets(self._topic, self._group, {number: committed})
        await transactor.commit()

    async def _settle(self, number: int, partition: _Partition) -> bool:
        """Find out whether a transaction counts of which that is not known, once nothing can become of it any more."""
        await self._start(number, partition)
        if self._partitions.get(number) is not partition and partition.transactor is not None:
            await partition.transactor.close()  # it was lost meanwhile, and nobody else will
            return False
        if partition.doubt is None:
            return False
        found = (await self._broker.committed(self._topic, self._group, [number])).get(number, Committed(0))
        committed, count = partition.doubt
        stored = found == committed
        partition.overtaken = Note.read(found.metadata).epoch > Note.read(committed.metadata).epoch
        partition.doubt = None
        if stored:
            partition.wrote(count)
        return stored
