"""One partition of the embedded broker: its records, who follows them, and which of them are of transactions.

As on Kafka, readers of committed records are given none beyond the first one of an open transaction, and none that was
aborted; others are given all. There are no markers at the end of a transaction.
"""

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import Protocol

from chains_stream.broker import Isolation, Record, TopicSpec
from chains_stream.errors import OffsetExpiredError
from chains_stream.messages import Headers, now_ms

MAX_RECORDS = 50_000  # in a partition
MAX_BYTES = 32 << 20  # of values in a partition
MAX_TURNS = 100  # of the event loop that a reader of a full ring is given


class Follower(Protocol):
    """Whoever reads a partition."""

    def wake(self, partition: "Partition") -> None:
        """Note that a partition has records."""

    def position_in(self, partition: "Partition") -> int:
        """Give the offset that it goes on from."""


class Partition:
    """One log: the records from `begin` to `end`, and who waits for more of them, or for room."""

    def __init__(self, spec: TopicSpec, number: int) -> None:
        self.topic = spec.name
        self.number = number
        self.ring = spec.ring
        self.begin = 0
        self.readers: set[Follower] = set()
        self._records: deque[Record] = deque()
        self._open: dict[object, int] = {}  # the offset of the first record of each open transaction
        self._aborted: set[int] = set()
        self._size = 0
        self._retention_ms = spec.retention_ms
        self._line = asyncio.Lock()  # of publishers; the first one waits for `_room`
        self._room: asyncio.Future[None] | None = None

    @property
    def end(self) -> int:
        return self.begin + len(self._records)

    def readable(self, isolation: Isolation) -> int:
        """Give the offset that reading ends at for now."""
        if isolation == "read_uncommitted" or not self._open:
            return self.end
        return min(self._open.values())

    def full(self, size: int) -> bool:
        """Tell whether a value of `size` bytes has no place; an empty partition takes any."""
        return len(self._records) >= MAX_RECORDS or (self._size + size > MAX_BYTES and bool(self._records))

    def admits(self, size: int) -> bool:
        """Tell whether a value of `size` bytes has its place at once."""
        room = len(self._records) < MAX_RECORDS and self._size + size <= MAX_BYTES
        return (room or not self.full(size)) and not self._line.locked()

    async def wait_for_room(self, size: int) -> None:
        """Wait, in line, until a value has its place."""
        async with self._line:
            while self.full(size):
                self._room = asyncio.get_running_loop().create_future()
                await self._room

    def append(self, key: bytes | None, value: bytes, headers: Headers, transaction: object | None = None) -> int:
        records, now = self._records, now_ms()
        offset = self.begin + len(records)
        oldest = now - self._retention_ms
        while records and records[0].timestamp_ms < oldest:
            self._drop_first()
        records.append(Record(self.topic, self.number, offset, now, key, value, headers))
        self._size += len(value)
        if transaction is not None:
            self._open.setdefault(transaction, offset)
        self._wake_readers()
        return offset

    def settle(self, transaction: object, aborted: Iterable[int]) -> None:
        """End a transaction, and give the offsets of its records if they must not count."""
        del self._open[transaction]
        self._aborted.update(offset for offset in aborted if offset >= self.begin)
        self._wake_readers()

    def visible(self, records: list[Record], isolation: Isolation) -> list[Record]:
        """Give those of its records, from before the `readable` end, that count for a reader."""
        if isolation == "read_uncommitted" or not self._aborted:
            return records
        return [record for record in records if record.offset not in self._aborted]

    async def let_readers_catch_up(self) -> None:
        """Let other tasks run while a reader is still in the older half of a ring, up to a bound.

        Publishing never suspends otherwise: a burst could push the ring past a reader that had no chance to read.
        """
        for _ in range(MAX_TURNS):
            middle = self.begin + len(self._records) // 2
            if all(reader.position_in(self) > middle for reader in self.readers):
                return
            await asyncio.sleep(0)

    def make_room(self, size: int) -> None:
        while self.full(size):
            self._drop_first()

    def drop_before(self, offset: int) -> None:
        """Forget the records before an offset: every group is done with them, or they are to go."""
        while self._records and self.begin < offset:
            self._drop_first()
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    def slice(self, offset: int, limit: int) -> list[Record]:
        if not self.begin <= offset <= self.end:
            held = f"the oldest record is {self.begin}, the next one will be {self.end}"
            raise OffsetExpiredError(f"{self.topic}[{self.number}] does not hold the offset {offset}: {held}")
        if limit <= 0:
            return []
        # By index, which a deque finds from its nearer end: readers are near the end of a long ring.
        records, start = self._records, offset - self.begin
        if start == len(records) - 1:
            return [records[-1]]
        return [records[index] for index in range(start, min(start + limit, len(records)))]

    def first_from(self, timestamp_ms: int) -> int:
        """Give the offset of the first record that is not older; the end if there is none."""
        return next((record.offset for record in self._records if record.timestamp_ms >= timestamp_ms), self.end)

    def _wake_readers(self) -> None:
        for reader in self.readers:
            reader.wake(self)

    def _drop_first(self) -> None:
        self._size -= len(self._records.popleft().value)
        self._aborted.discard(self.begin)
        self.begin += 1
