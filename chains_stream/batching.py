"""Frames on their way to callers: those of many calls that go to one reply partition share a record.

A record costs the worker, the broker and the caller far more than a frame in it. So, as with a group commit: while a
record is on its way to a partition, the frames for it gather, and go out together once that one is stored. A frame that
finds nothing on its way goes at once, and so do all on the embedded broker, where nothing ever is.
"""

import asyncio
from collections import deque
from typing import NamedTuple

from chains_stream.broker import Broker
from chains_stream.errors import BrokerError
from chains_stream.messages import Frame, Headers, encode_frames

FRAME_ROOM = 64  # bytes that a frame takes beside its value
RECORD_BYTES = 64 << 10  # from which on a record takes no more frames
WAITING_BYTES = 1 << 20  # of a partition that gather, until whoever sends more waits
CLOSE_SECONDS = 5.0  # for what has gathered, when the process ends
CLOSED = "closed before the answer was sent"


class FrameBatcher:
    """Sends frames for all Chainlets of a process. It must be closed after its users, and before the broker."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._queues: dict[_Where, _Queue] = {}  # of the partitions to which something is on its way

    async def send(
        self, topic: str, partition: int, frame: Frame, size: int, claim: Headers = (), *, durable: bool
    ) -> asyncio.Future[int]:
        """Send a frame with a value of `size` bytes; return once it has its place, waiting for one if there is none.

        The frames of one `durable` kind that one task sends to a partition keep their order. `claim` are headers that
        say where the value is: such a frame has a record of its own. The future gives the offset of the frame's record
        once the broker has stored it, or raises BrokerError. Frames that are not durable may share it: it is not to be
        cancelled. Raises BrokerError.
        """
        where = _Where(topic, partition, durable)
        queue = self._queues.get(where)
        if queue is not None:
            return await queue.add(frame, size + FRAME_ROOM, claim)
        stored = await self._broker.publish(
            topic, encode_frames((frame,)), partition=partition, headers=claim, durable=durable
        )
        if not stored.done() and where not in self._queues:
            self._queues[where] = _Queue(self._broker, where, stored, self._queues)
        return stored

    async def close(self) -> None:
        """Send what has gathered; what the broker does not take within `CLOSE_SECONDS` fails."""
        if self._queues:
            _, late = await asyncio.wait([queue.task for queue in self._queues.values()], timeout=CLOSE_SECONDS)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)


class _Where(NamedTuple):
    topic: str
    partition: int
    durable: bool


class _Gathered:
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
            self.fail(BrokerError("the broker was closed before the answer was stored"))
        elif (error := stored.exception()) is not None:
            self.fail(error)
        else:
            offset = stored.result()
            for future in self.futures:
                if not future.done():
                    future.set_result(offset)

    def fail(self, error: BaseException) -> None:
        for future in self.futures:
            if not future.done():
                future.set_exception(error)
                future.exception()  # nobody needs to wait for it: asyncio should not complain that nobody did


class _Queue:
    """What gathers for one partition while a record is on its way there. It removes itself when there is nothing more.

    One task publishes, so that nothing is overtaken: `add` only appends.
    """

    def __init__(
        self, broker: Broker, where: _Where, stored: asyncio.Future[int], queues: "dict[_Where, _Queue]"
    ) -> None:
        self._broker = broker
        self._where = where
        self._queues = queues
        self._records: deque[_Gathered] = deque()
        self._size = 0
        self._largest = min(RECORD_BYTES, broker.max_record_bytes)
        self._waiting = 0  # for room
        # Set when half is free, for all that wait: one by one, each frame of a busy worker would cost two turns.
        self._room = asyncio.Event()
        self._changed = asyncio.Event()  # the record on its way is stored, or one that waited for room comes or gave up
        self.task = asyncio.create_task(self._run(stored), name=f"frames {where.topic}/{where.partition}")

    async def add(self, frame: Frame, size: int, claim: Headers) -> asyncio.Future[int]:
        while self._size >= WAITING_BYTES:
            self._room.clear()
            self._waiting += 1
            try:
                await self._room.wait()
            finally:
                self._waiting -= 1
                self._changed.set()  # whether it comes now, or has given up: the task looks again
            if self.task.done():
                raise BrokerError(CLOSED)
        last = self._records[-1] if self._records else None
        if last is None or claim or last.claim or last.size + size > self._largest:
            last = _Gathered(claim)
            self._records.append(last)
        self._size += size
        return last.add(frame, size, shared=not self._where.durable)

    async def _run(self, on_its_way: asyncio.Future[int]) -> None:
        try:
            on_its_way.add_done_callback(self._wake)
            while True:
                if not on_its_way.done():
                    await self._changed.wait()
                    self._changed.clear()
                elif self._records:
                    while self._records:
                        on_its_way = await self._publish(self._records.popleft()) or on_its_way
                    on_its_way.add_done_callback(self._wake)
                elif self._waiting:  # those that come next must not be overtaken by who finds no queue
                    await self._changed.wait()
                    self._changed.clear()
                else:
                    return
        finally:
            del self._queues[self._where]
            for gathered in self._records:
                gathered.fail(BrokerError(CLOSED))
            self._room.set()  # whoever still waits is told with the next turn

    def _wake(self, _stored: asyncio.Future[int]) -> None:
        self._changed.set()

    async def _publish(self, gathered: _Gathered) -> asyncio.Future[int] | None:
        """Publish a record, and give the future of its offset; None if it could not be: whoever waits is told."""
        topic, partition, durable = self._where
        self._size -= gathered.size
        if self._size <= WAITING_BYTES // 2:
            self._room.set()
        try:
            value, headers = encode_frames(gathered.frames), gathered.claim
            stored = await self._broker.publish(topic, value, partition=partition, headers=headers, durable=durable)
        except Exception as error:  # noqa: BLE001 - the jobs that wait deal with it
            gathered.fail(error)
            return None
        except BaseException:
            gathered.fail(BrokerError(CLOSED))
            raise
        stored.add_done_callback(gathered.stored)
        return stored
