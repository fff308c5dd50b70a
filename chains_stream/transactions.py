"""Outputs and offsets of a topic's partitions, stored together: what `exactly_once` is made of.

Each partition has a transactor of its own, which is started before it is read where to go on, so that nothing of an
earlier holder can come in between (Kafka's KIP-98, and KIP-447 for what could be had with fewer of them).
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from chains_stream.broker import Broker, Committed, Record, Transactor
from chains_stream.errors import BrokerError, RecordTooLargeError
from chains_stream.log import get_logger
from chains_stream.messages import Headers
from chains_stream.offsets import Note

# Records, and their values and those of the events that gave them, that wait for a commit: no more events then.
MOST_UNSENT, MOST_BYTES = 10_000, 64 << 20

Bury = Callable[[Record, BrokerError], Awaitable[bool]]

log = get_logger(__name__)


class Unsent(NamedTuple):
    """A record that is to be written."""

    topic: str
    partition: int
    key: bytes | None
    value: bytes
    headers: Headers

    @property
    def size(self) -> int:
        """Give its bytes: of value, key and headers."""
        size = len(self.value) + len(self.key or b"")
        return size + sum(len(name) + len(value or b"") for name, value in self.headers) if self.headers else size


class _RefusedError(Exception):
    """The broker takes all but one record of a transaction, now and for ever: that with number `at`."""

    def __init__(self, at: int, reason: RecordTooLargeError) -> None:
        super().__init__(str(reason))
        self.at = at
        self.reason = reason


class _Partition:
    """A partition's transactor, and what is to be written with its next commits, in the order in which it was given."""

    def __init__(self) -> None:
        self.transactor: Transactor | None = None
        self.doubt: tuple[Committed, int] | None = None  # what may be committed, and how many records with it
        self.overtaken = False  # by another worker: the group will tell
        self.turn = asyncio.Lock()  # a transactor has one transaction at a time
        self._unsent: list[Unsent] = []
        self._events: list[Record] = []  # that gave them, one after the other
        self._written = 0  # records before those
        self.bytes = 0  # of the values of those that are not written, and of their events

    def add(self, records: Collection[Unsent], event: Record) -> None:
        if not records:
            return
        self._unsent += records
        self._events += [event] * len(records)
        self.bytes += len(event.value) + sum([len(record.value) for record in records])

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
        self._drop(slice(count))

    def event(self, at: int) -> Record:
        """Give the event that gave an unsent record."""
        return self._events[at]

    def forget(self, event: Record) -> None:
        """Have nothing written that an event gave."""
        first = next(at for at, each in enumerate(self._events) if each is event)
        self._drop(slice(first, first + sum(each is event for each in self._events)))

    def _drop(self, these: slice) -> None:
        gone = self._unsent[these]
        self._written += len(gone)
        self.bytes -= _held(gone, self._events[these])
        del self._unsent[these], self._events[these]


def _held(records: Collection[Unsent], events: Sequence[Record]) -> int:
    """Give the bytes of the values of records, and of the events that gave them, each of which counts once."""
    firsts = (event for at, event in enumerate(events) if at == 0 or event is not events[at - 1])
    return sum(len(record.value) for record in records) + sum(len(event.value) for event in firsts)


class Transactions:
    """The transactors of the partitions of one topic, and what was given for events of them and is not stored yet."""

    def __init__(self, broker: Broker, topic: str, group: str, emptied: Callable[[], None], bury: Bury) -> None:
        """Store what is given for `topic`, and for `group`; `emptied` is called when it becomes less.

        `bury` puts an event aside whose outputs can't be stored, and tells whether it did.
        """
        self._emptied = emptied
        self._bury = bury
        self._broker = broker
        self._topic = topic
        self._group = group
        self._partitions: dict[int, _Partition] = {}
        self._moving = asyncio.Event()  # partitions may go to others: the group waits for our commit

    def add(self, event: Record, records: Collection[Unsent]) -> None:
        """Have the commits of its partition from now on write what an event gave, which is finished by then."""
        if event.partition in self._partitions:
            self._partitions[event.partition].add(records, event)

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

    def begin_move(self) -> None:
        self._moving.set()

    def end_move(self) -> None:
        self._moving.clear()

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
            one_by_one = False
            while not partition.overtaken:
                records = partition.up_to(given)
                partition.doubt = committed, len(records)  # until it is known, whatever ends this
                try:
                    await self._write(partition.transactor, records, number, committed, one_by_one=one_by_one)
                except (BrokerError, _RefusedError) as error:
                    if self._partitions.get(number) is not partition:
                        return False  # it was lost meanwhile: to settle it would fence whoever has it now
                    log.warning("transaction.failed", topic=self._topic, partition=number, reason=str(error))
                    if await self._settle(number, partition):
                        break
                    await self._mend(partition, error, found=one_by_one)
                    if self._partitions.get(number) is not partition:
                        return False  # as above
                    one_by_one = True  # so that it shows which record is to blame
                else:
                    partition.doubt = None
                    partition.wrote(len(records))
                    break
            return not partition.overtaken

    async def _mend(self, partition: _Partition, error: BrokerError | _RefusedError, *, found: bool) -> None:
        """Have a transaction not fail again as it did. Raises BrokerError if it may succeed later, or can't be mended.

        `found` says that its records were stored one by one.
        """
        if partition.overtaken:
            return
        if isinstance(error, _RefusedError):
            await self._bury_giver(partition, error)
        elif found or not isinstance(error, RecordTooLargeError):
            raise error

    async def _bury_giver(self, partition: _Partition, refused: _RefusedError) -> None:
        """Put the event aside that gave a record which will never be stored. Raises BrokerError.

        That takes as long as its topic is away, for which those who move partitions must not wait: then it is left to
        whoever has the partition next.
        """
        event = partition.event(refused.at)
        if self._moving.is_set():
            raise refused.reason
        burying = asyncio.ensure_future(self._bury(event, refused.reason))
        moving = asyncio.ensure_future(self._moving.wait())
        try:
            await asyncio.wait([burying, moving], return_when=asyncio.FIRST_COMPLETED)
            buried = burying.done() and burying.result()
        finally:
            burying.cancel()
            moving.cancel()
            await asyncio.wait([burying, moving])
        if not buried:
            raise refused.reason
        partition.forget(event)

    async def _write(
        self,
        transactor: Transactor | None,
        records: Collection[Unsent],
        number: int,
        committed: Committed,
        *,
        one_by_one: bool,
    ) -> None:
        assert transactor is not None, "started"
        transactor.begin()
        for at, (topic, partition, key, value, headers) in enumerate(records):
            try:
                stored = transactor.put(topic, value, partition=partition, key=key, headers=headers)
                if stored is None:
                    stored = await transactor.publish(topic, value, partition=partition, key=key, headers=headers)
                if one_by_one:
                    await stored
            except RecordTooLargeError as error:
                raise _RefusedError(at, error) from error
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
