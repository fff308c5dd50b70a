"""Reading the embedded broker: partitions in turn, from positions of the reader's own."""

import asyncio
from collections.abc import Mapping

from chains_stream.broker import Isolation, Record
from chains_stream.brokers.memory_log import Partition
from chains_stream.errors import BrokerError, OffsetExpiredError

FETCH_RECORDS = 500  # that a reader gets at once


class Following:
    """Reads partitions in turn, from positions of its own."""

    skips_expired = False  # instead of raising OffsetExpiredError
    tells_passed = False  # by giving no records, that it passed some that don't count

    def __init__(self, isolation: Isolation) -> None:
        self._isolation = isolation
        self._passed = False
        self._positions: dict[Partition, int] = {}
        self._ready: dict[Partition, None] = {}  # those with records to read, the longest waiting first
        self._paused: set[int] = set()
        self._waiter: asyncio.Future[None] | None = None
        self.error: BrokerError | None = None

    def wake(self, partition: Partition) -> None:
        """Note that a partition has records."""
        if partition.number not in self._paused:
            self._ready[partition] = None
            self._wake()

    def position_in(self, partition: Partition) -> int:
        return self._positions[partition]

    def fail(self, error: BrokerError) -> None:
        """Have `fetch` raise this from now on. The first one stays."""
        self.error = self.error or error
        self._wake()

    def _follow(self, positions: Mapping[Partition, int]) -> None:
        for partition in self._positions:
            partition.readers.discard(self)
        self._positions = dict(positions)
        self._ready = {partition: None for partition in positions if partition.number not in self._paused}
        for partition in positions:
            partition.readers.add(self)
        self._wake()

    async def _fetch(self, limit: int) -> list[Record]:
        while True:
            if self.error is not None:
                raise self.error
            if self._ready and ((taken := self._take(limit)) or (self._passed and self.tells_passed)):
                return taken
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def _take(self, limit: int) -> list[Record]:
        taken: list[Record] = []
        self._passed = False
        while self._ready and len(taken) < limit:
            partition = next(iter(self._ready))
            position = self._positions[partition]
            if self.skips_expired:
                position = max(position, partition.begin)
            try:
                records = partition.slice(
                    position, min(limit - len(taken), partition.readable(self._isolation) - position)
                )
            except OffsetExpiredError:
                if taken:
                    break  # the next fetch meets it, and each one after
                raise
            del self._ready[partition]
            counting = partition.visible(records, self._isolation)
            self._passed |= len(counting) < len(records)
            taken += counting
            position = self._positions[partition] = position + len(records)
            if position < partition.readable(self._isolation):
                self._ready[partition] = None  # at the end of the line
        return taken

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class MemoryReader(Following):
    """Follows named partitions."""

    tells_passed = True

    def __init__(self, positions: Mapping[Partition, int], isolation: Isolation) -> None:
        super().__init__(isolation)
        self._follow(positions)

    def position(self, partition: int) -> int:
        return next(position for followed, position in self._positions.items() if followed.number == partition)

    async def fetch(self) -> list[Record]:
        return await self._fetch(FETCH_RECORDS)

    async def close(self) -> None:
        self._follow({})
        self.fail(BrokerError("the reader was closed"))
