"""A bounded run of records for a Chainlet that is fed events, with no group: what `chains replay` and files are.

A `Supply` gives the records, a `SupplyConsumer` hands them to the one worker that there is, and knows how far it is; an
`Outlet` takes what is written to a topic in that topic's place.
"""

import asyncio
from collections import deque
from collections.abc import Collection, Mapping
from typing import Protocol

from chains_stream.broker import Broker, Committed, PartitionsChanged, Reader, Record, TopicSpec
from chains_stream.messages import Headers

OVERSHOOT = 1_000  # records beyond the range that are read and dropped, until they are read no more


class Supply(Protocol):
    """Where the records of a run come from.

    Attributes:
        starts: where the run begins, by partition.
    """

    @property
    def starts(self) -> Mapping[int, int]: ...

    async def fetch(self, max_records: int) -> list[Record]:
        """Wait for records, those of a partition in order; none if all were given. Cancelling it loses none.

        Raises BrokerError, OSError.
        """


class Outlet(Protocol):
    """Takes the records that are written to one topic."""

    async def ensure(self, spec: TopicSpec) -> None:
        """Have it there, like a topic that is described so. Raises BrokerError."""

    async def partitions(self) -> int:
        """Give how many partitions it has. Raises BrokerError."""

    async def record_limit(self) -> int | None:
        """Give how many bytes a record may have, as `Broker.record_limit` does; None if any. Raises BrokerError."""

    async def publish(
        self, value: bytes, *, partition: int, key: bytes | None, headers: Headers
    ) -> "asyncio.Future[int]":
        """Write a record, as `Broker.publish` does."""


class RangeSupply:
    """The committed records of a topic within ranges of offsets, of which the last ones may hold no record."""

    def __init__(self, broker: Broker, topic: str, ranges: Mapping[int, range]) -> None:
        self.starts = {partition: offsets.start for partition, offsets in ranges.items()}
        self._broker = broker
        self._topic = topic
        self._left = {partition: offsets for partition, offsets in ranges.items() if offsets}
        self._positions = dict(self.starts)
        self._reader: Reader | None = None
        self._beyond = 0  # records that were dropped
        self._read: deque[Record] = deque()

    async def fetch(self, max_records: int) -> list[Record]:
        while not self._read and self._left:
            await self._fill()
        return [self._read.popleft() for _ in range(min(max_records, len(self._read)))]

    async def close(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            await reader.close()

    async def _fill(self) -> None:
        if self._reader is None:
            positions = {partition: self._positions[partition] for partition in self._left}
            self._reader = await self._broker.read(self._topic, positions, isolation="read_committed")
            self._beyond = 0
        for record in await self._reader.fetch():
            if record.partition in self._left and record.offset < self._left[record.partition].stop:
                self._read.append(record)
            else:
                self._beyond += 1
        # What is no record, such as the marker at a transaction's end, is passed by the position alone.
        self._positions |= {partition: self._reader.position(partition) for partition in self._left}
        self._left = {n: offsets for n, offsets in self._left.items() if self._positions[n] < offsets.stop}
        if not self._left or self._beyond > OVERSHOOT:
            await self.close()


class SupplyConsumer:
    """Gives a supply's records to a worker, as the only member of its group.

    Attributes:
        given: how many records it has given.
        positions: by partition, the offset below which all is worked off.
        done: set once all that there is was given, and worked off.
    """

    def __init__(self, supply: Supply) -> None:
        self.given = 0
        self.positions = dict(supply.starts)
        self.done = asyncio.Event()
        self._supply = supply
        self._begun = sum(self.positions.values())
        self._committed: dict[int, Committed] = {}
        self._last: dict[int, int] = {}  # offset that was given
        self._held: deque[Record] = deque()  # fetched, while their partition is paused
        self._paused: set[int] = set()
        self._resumed = asyncio.Event()
        self._exhausted = False
        self._on_revoked: PartitionsChanged | None = None

    @property
    def exhausted(self) -> bool:
        """Whether all that there is was given."""
        return self._exhausted and not self._held

    @property
    def passed(self) -> int:
        """How many offsets are worked off, whether there was a record or not."""
        return sum(self.positions.values()) - self._begun

    async def join(self, on_assigned: PartitionsChanged, on_revoked: PartitionsChanged) -> None:
        """Give it all partitions."""
        self._on_revoked = on_revoked
        await on_assigned(frozenset(self.positions))

    async def fetch(self, max_records: int) -> list[Record]:
        while True:
            if taken := self._take(max_records):
                self.given += len(taken)
                self._last |= {record.partition: record.offset for record in taken}
                return taken
            if self._held or self._exhausted:
                self._resumed.clear()
                await self._resumed.wait()
                continue
            self._held.extend(await self._supply.fetch(max_records))
            if not self._held:
                self._exhausted = True
                self._look()

    def _take(self, most: int) -> list[Record]:
        """Take records that were fetched, but for those of partitions that are paused."""
        taken: list[Record] = []
        kept: deque[Record] = deque()
        while self._held and len(taken) < most:
            record = self._held.popleft()
            (kept if record.partition in self._paused else taken).append(record)
        self._held.extendleft(reversed(kept))
        return taken

    async def commit(self, positions: Mapping[int, Committed]) -> frozenset[int]:
        self._committed |= positions
        self.positions |= {partition: committed.offset for partition, committed in positions.items()}
        self._look()
        return frozenset(positions)

    def _look(self) -> None:
        worked_off = all(self.positions[partition] > offset for partition, offset in self._last.items())
        if self._exhausted and worked_off:
            self.done.set()

    async def committed(self, partitions: Collection[int]) -> dict[int, Committed]:
        return {partition: self._committed[partition] for partition in partitions if partition in self._committed}

    def pause(self, partition: int) -> None:
        self._paused.add(partition)

    def resume(self, partition: int) -> None:
        self._paused.discard(partition)
        self._resumed.set()

    def lag(self) -> dict[int, int]:
        lag = dict.fromkeys(self.positions, 0)
        for record in self._held:
            lag[record.partition] += 1
        return lag

    def position(self, partition: int) -> int:
        return self._last.get(partition, self.positions[partition] - 1) + 1

    async def close(self) -> None:
        if self._on_revoked is not None:
            await self._on_revoked(frozenset(self.positions))


class TopicOutlet:
    """A topic of a broker, in the place of the one that a Chainlet names."""

    def __init__(self, broker: Broker, topic: str) -> None:
        self._broker = broker
        self._topic = topic

    async def ensure(self, spec: TopicSpec) -> None:
        await self._broker.ensure_topics([TopicSpec(self._topic, spec.partitions, spec.retention_ms)])

    async def partitions(self) -> int:
        return await self._broker.partitions(self._topic)

    async def record_limit(self) -> int:
        return await self._broker.record_limit(self._topic)

    async def publish(
        self, value: bytes, *, partition: int, key: bytes | None, headers: Headers
    ) -> "asyncio.Future[int]":
        return await self._broker.publish(self._topic, value, partition=partition, key=key, headers=headers)
