"""What a consumer has received, and nobody has taken yet."""

import asyncio
from collections import deque
from collections.abc import Iterable
from contextlib import suppress

from chains_stream.broker import Record
from chains_stream.errors import BrokerError


class Buffer:
    """Records between the task that receives them and the one that takes them.

    It is `full` from `max_records`, or `max_bytes` of values, on; whoever fills it waits for room before it asks for
    more, so it holds at most one batch beyond that. While it is held, nothing is given.
    """

    def __init__(self, max_records: int, max_bytes: int) -> None:
        self._max_records = max_records
        self._max_bytes = max_bytes
        self._records: deque[Record] = deque()
        self._size = 0
        self._held = False
        self._error: BrokerError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._room = asyncio.Event()

    @property
    def full(self) -> bool:
        return len(self._records) >= self._max_records or self._size >= self._max_bytes

    def put(self, records: Iterable[Record]) -> None:
        for record in records:
            self._records.append(record)
            self._size += len(record.value)
        self._wake()

    async def wait_for_room(self, seconds: float) -> None:
        """Wait until it is no longer full, for so long at most."""
        self._room.clear()
        if self.full:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._room.wait()

    async def take(self, limit: int) -> list[Record]:
        """Wait for records. Raises what `fail` was given, once all records before it are taken."""
        while self._held or not self._records:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        # Nothing below waits: a cancelled `take` has taken nothing.
        taken = [self._records.popleft() for _ in range(min(limit, len(self._records)))]
        self._size -= sum(len(record.value) for record in taken)
        if not self.full:
            self._room.set()
        return taken

    def hold(self) -> None:
        """Forget what was not taken, and give nothing until `release`."""
        self._held = True
        self.clear()

    def release(self) -> None:
        self._held = False
        self._wake()

    def clear(self) -> None:
        self._records.clear()
        self._size = 0
        self._room.set()

    def fail(self, error: BrokerError) -> None:
        """Have `take` raise this, from the end of the records on. The first one stays."""
        if self._error is None:
            self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
