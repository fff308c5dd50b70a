"""What a consumer has received, and nobody has taken yet."""

import asyncio
from collections import deque
from collections.abc import Collection, Sequence
from contextlib import suppress
from operator import attrgetter

from chains_stream.broker import Record
from chains_stream.errors import BrokerError

_value = attrgetter("value")


class Buffer:
    """Records between the task that receives them and the one that takes them; partitions are served in turn.

    It is `full` from `max_records`, or `max_bytes` of values, on; whoever fills it waits for room before it asks for
    more, and for no more than `room`. While it is held, nothing is given.
    """

    def __init__(self, max_records: int, max_bytes: int) -> None:
        self._max_records = max_records
        self._max_bytes = max_bytes
        self._queues: dict[int, deque[Record]] = {}  # of partitions that have records; the first is next to be served
        self._count = 0
        self._size = 0
        self._held = False
        self._passed = False  # something that is no record, since the last `take`
        self._error: BrokerError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._room = asyncio.Event()

    @property
    def held(self) -> bool:
        return self._held

    @property
    def full(self) -> bool:
        return self._count >= self._max_records or self._size >= self._max_bytes

    @property
    def room(self) -> int:
        """How many records more make it full."""
        return self._max_records - self._count

    def put(self, partition: int, records: Sequence[Record]) -> None:
        queue = self._queues.get(partition)
        if queue is None:
            queue = self._queues[partition] = deque()
        queue.extend(records)
        self._count += len(records)
        self._size += _size(records)
        self._wake()

    def passed(self) -> None:
        """Have `take` return, though there may be no record."""
        self._passed = True
        self._wake()

    def next_offset(self, partition: int) -> int | None:
        """Give the offset of the next record of a partition, if there is one."""
        queue = self._queues.get(partition)
        return queue[0].offset if queue else None

    async def wait_for_room(self, seconds: float) -> None:
        """Wait until it is no longer full, for so long at most."""
        self._room.clear()
        if self.full:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._room.wait()

    async def take(self, limit: int) -> list[Record]:
        """Wait for records, or for `passed`, and give what there is.

        Raises what `fail` was given, once all records before it are taken.
        """
        while self._held or not (self._queues or self._passed):
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._passed = False
        # Nothing below waits: a cancelled `take` has taken nothing.
        taken = self._in_turn(limit)
        self._removed(taken)
        return taken

    def drop(self, partition: int) -> None:
        """Forget what was not taken of a partition."""
        self._removed(self._queues.pop(partition, ()))

    def hold(self) -> None:
        """Forget what was not taken, and give nothing until `release`."""
        self._held = True
        self.clear()

    def release(self) -> None:
        self._held = False
        self._wake()

    def clear(self) -> None:
        self._queues.clear()
        self._count = self._size = 0
        self._room.set()

    def fail(self, error: BrokerError) -> None:
        """Have `take` raise this, from the end of the records on. The first one stays."""
        if self._error is None:
            self._error = error
        self._wake()

    def _in_turn(self, limit: int) -> list[Record]:
        queues = self._queues
        taken: list[Record] = []
        while queues and len(taken) < limit:
            share = (limit - len(taken)) // len(queues) or 1
            for partition in list(queues)[: limit - len(taken)]:
                queue = queues.pop(partition)
                if share == 1:
                    taken.append(queue.popleft())
                elif len(queue) <= share:
                    taken += queue
                    continue
                else:
                    taken += [queue.popleft() for _ in range(share)]
                if queue:
                    queues[partition] = queue  # at the end of the line
        return taken

    def _removed(self, records: Collection[Record]) -> None:
        self._count -= len(records)
        self._size -= _size(records)
        if not self.full:
            self._room.set()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _size(records: Collection[Record]) -> int:
    return sum(map(len, map(_value, records)))
