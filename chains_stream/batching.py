"""Frames on their way to callers: those of many calls that go to one reply partition share a record.

A record costs the worker, the broker and the caller far more than a frame in it. So, as with a group commit: while a
record is on its way to a partition, the frames for it gather, and go out together once that one is stored. A frame that
finds nothing on its way goes at once, and so do all on the embedded broker, where nothing ever is.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial

from chains_stream.broker import Broker
from chains_stream.messages import Frame, Headers, encode_frames

FRAME_ROOM = 64  # bytes that a frame takes beside its value
RECORD_BYTES = 64 << 10  # from which on a record takes no more frames
WAITING_BYTES = 1 << 20  # of a partition that gather, until whoever sends more waits


class FrameBatcher:
    """Sends frames for all Chainlets of a process. It must be closed after its users, and before the broker."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._queues: dict[tuple[str, int, bool], _Queue] = {}  # of the partitions to which something is on its way

    async def send(
        self, topic: str, partition: int, frame: Frame, size: int, claim: Headers = (), *, durable: bool
    ) -> asyncio.Future[int]:
        """Send a frame with a value of `size` bytes; return once it has its place, waiting for one if there is none.

        The frames of one `durable` kind that one task sends to a partition keep their order. `claim` are headers that
        say where the value is: such a frame has a record of its own. The future gives the offset of the frame's record
        once the broker has stored it. Frames that are not durable may share it: it is not to be cancelled. Raises
        BrokerError.
        """
        where = (topic, partition, durable)
        queue = self._queues.get(where)
        if queue is not None:
            return await queue.add(frame, size + FRAME_ROOM, claim)
        stored = await self._broker.publish(
            topic, encode_frames((frame,)), partition=partition, headers=claim, durable=durable
        )
        if not stored.done() and where not in self._queues:
            self._queues[where] = _Queue(self._broker, where, stored, partial(self._queues.pop, where, None))
        return stored

    async def close(self) -> None:
        """Wait until all that was sent has gone to the broker."""
        while self._queues:
            await asyncio.gather(*[queue.emptied() for queue in tuple(self._queues.values())])


class _Batch:
    """The frames of one record to be."""

    __slots__ = ("claim", "frames", "futures", "size")

    def __init__(self, claim: Headers) -> None:
        self.frames: list[Frame] = []
        self.claim = claim
        self.size = 0
        self.futures: list[asyncio.Future[int]] = []

    def add(self, frame: Frame, size: int, *, shared: bool) -> asyncio.Future[int]:
        self.frames.append(frame)
        self.size += size
        if not (shared and self.futures):
            self.futures.append(asyncio.get_running_loop().create_future())
        return self.futures[-1]

    def stored(self, stored: asyncio.Future[int]) -> None:
        """Tell whoever waits what became of the record."""
        if stored.cancelled():
            self.fail(asyncio.CancelledError())
        elif (error := stored.exception()) is not None:
            self.fail(error)
        else:
            offset = stored.result()
            for future in self.futures:
                if not future.done():
                    future.set_result(offset)

    def fail(self, error: BaseException) -> None:
        for future in self.futures:
            if future.done():
                continue
            if isinstance(error, asyncio.CancelledError):
                future.cancel()
            else:
                future.set_exception(error)
                future.exception()  # nobody needs to wait for it: asyncio should not complain that nobody did


class _Queue:
    """What gathers for one partition while `on_its_way` is. `done` is called when there is nothing more."""

    def __init__(
        self,
        broker: Broker,
        where: tuple[str, int, bool],
        on_its_way: asyncio.Future[int],
        done: Callable[[], object],
    ) -> None:
        self._broker = broker
        self._topic, self._partition, self._durable = where
        self._done = done
        self._batches: deque[_Batch] = deque()
        self._size = 0
        self._largest = min(RECORD_BYTES, broker.max_record_bytes)
        self._waiting: list[asyncio.Future[None]] = []  # for room
        self._task: asyncio.Task[None] | None = None
        self._last = on_its_way
        on_its_way.add_done_callback(self._go_on)

    async def add(self, frame: Frame, size: int, claim: Headers) -> asyncio.Future[int]:
        while self._size and self._size + size > WAITING_BYTES:
            await self._wait_for_room()
        batch = self._batches[-1] if self._batches else None
        if batch is None or claim or batch.claim or batch.size + size > self._largest:
            batch = _Batch(claim)
            self._batches.append(batch)
        future = batch.add(frame, size, shared=not self._durable)
        self._size += size
        if self._last.done() and self._task is None:  # all else went while it waited for room
            self._go_on(self._last)
        return future

    async def _wait_for_room(self) -> None:
        room = asyncio.get_running_loop().create_future()
        self._waiting.append(room)
        try:
            await room
        finally:
            self._waiting.remove(room)
            if room.cancelled() and self._last.done() and self._task is None:
                self._go_on(self._last)

    async def emptied(self) -> None:
        while self._batches or self._task is not None or not self._last.done():
            await asyncio.wait([self._last] if self._task is None else [self._task])

    def _go_on(self, _stored: asyncio.Future[int]) -> None:
        if self._task is not None or not self._last.done():
            return  # `add` was quicker than the event loop: two at once would mix up the order
        if self._batches:
            self._task = asyncio.get_running_loop().create_task(self._publish(), name="frames")
        elif not self._waiting:  # else what comes after would overtake what waits
            self._done()

    async def _publish(self) -> None:
        while self._batches:
            batch = self._batches.popleft()
            self._size -= batch.size
            await self._publish_one(batch)
            for room in self._waiting:
                if not room.done():
                    room.set_result(None)
        self._task = None
        if self._last.done():
            self._go_on(self._last)
        else:
            self._last.add_done_callback(self._go_on)

    async def _publish_one(self, batch: _Batch) -> None:
        value = encode_frames(batch.frames)
        try:
            stored = await self._broker.publish(
                self._topic, value, partition=self._partition, headers=batch.claim, durable=self._durable
            )
        except BaseException as error:  # whoever waits is told, and deals with it
            batch.fail(error)
            if not isinstance(error, Exception):
                raise
        else:
            self._last = stored
            stored.add_done_callback(batch.stored)
