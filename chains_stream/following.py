"""Reading an answer from the log, from any point of it and by any process, and going on with it as it comes.

One live reader a partition serves all that have caught up with it; those that lie further back are read to it in
passes, together. What a reader does not take is not held: it falls behind, and a later pass reads it again.
"""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Coroutine, Iterable
from typing import Any

import msgspec

from chains_stream.answers import Answer
from chains_stream.broker import Broker, Reader, Record
from chains_stream.calls import MIN_WINDOW_BYTES, Caller
from chains_stream.control import Credit
from chains_stream.errors import BrokerError, OffsetExpiredError
from chains_stream.log import get_logger
from chains_stream.messages import Frame
from chains_stream.policy import Scope
from chains_stream.readback import found_in
from chains_stream.settings import Settings

log = get_logger(__name__)


class Following(Answer):
    """An answer that is read from the log. Close it.

    Attributes:
        offset: of the next record that it needs.
        end: of the record that held its end, once it was met.
    """

    __slots__ = ("_granted", "_granted_size", "_held", "_partition", "credits", "end", "offset", "scope", "topic")

    def __init__(
        self, partition: "_Partition", correlation_id: bytes, offset: int, *, topic: str, scope: Scope, had: int
    ) -> None:
        super().__init__(correlation_id, partition.modules, had)
        self.topic = topic  # of the request
        self.scope = scope
        self.offset = offset
        self.end: int | None = None
        self.credits = False
        self._partition = partition
        self._held = 0  # bytes of the chunks that wait to be taken
        self._granted = self._granted_size = 0

    @property
    def full(self) -> bool:
        """Whether it holds so much that it reads no more for now."""
        settings = self._partition.settings
        return len(self._chunks) >= settings.stream_window or self._held >= settings.stream_window_bytes

    def begin_at(self, attempt: int) -> None:
        """Take no frames of lower attempts."""
        self._fold.attempt = attempt

    def close(self) -> None:
        self._partition.leave(self)

    def _add(self, value: msgspec.Raw, reference: str | None) -> None:
        super()._add(value, reference)
        if self._fold.chunks > self.had:
            self._held += len(memoryview(value))
        else:  # it need not come back for these, and the worker may be waiting for it to say that it has them
            self._tell_taken()

    def _begin_again(self) -> bool:
        self._held = 0
        return super()._begin_again()

    def _fetch(self, reference: str) -> Awaitable[msgspec.Raw]:
        return self._partition.caller.fetch(reference)

    def _at_once(self) -> tuple[int, int]:
        return self._partition.caller.at_once(self._partition.settings.stream_window_bytes)

    def _take(self, limits: tuple[int, int]) -> list[msgspec.Raw]:
        before = self._taken_size
        taken = super()._take(limits)
        # What lay in the store was not counted.
        self._held = max(0, self._held - (self._taken_size - before)) if self._chunks else 0
        return taken

    def _credit(self) -> None:
        if not self.full:
            self._partition.go_on(self)
        self._tell_taken()

    def _tell_taken(self) -> None:
        """The worker waits for this reader where the one that it had is gone."""
        chunks, size = self._taken - self._granted, self._taken_size - self._granted_size
        settings = self._partition.settings
        if not self.credits or self.ended:
            return
        if chunks * 2 >= settings.stream_window or size * 2 >= min(settings.stream_window_bytes, MIN_WINDOW_BYTES):
            self._granted, self._granted_size = self._taken, self._taken_size
            self._partition.caller.tell(self, Credit(self.id, self._taken, self._taken_size))

    def _over(self) -> None:
        self._partition.settle(self)


class Follower:
    """Follows answers for a whole process; `modules` are where the user's exceptions may be found."""

    def __init__(self, broker: Broker, caller: Caller, settings: Settings, modules: tuple[str, ...] = ()) -> None:
        self._broker = broker
        self._caller = caller
        self._settings = settings
        self._modules = modules
        self._partitions: dict[tuple[str, int], _Partition] = {}
        self._tasks: set[asyncio.Task[None]] = set()  # of these, and of those that nobody follows any more

    def follow(
        self,
        place: tuple[str, int],
        offset: int,
        correlation_id: bytes,
        *,
        topic: str,
        scope: Scope,
        had: int = 0,
        attempt: int = 0,
        credits_worker: bool = False,
    ) -> Following:
        """Give the answer whose frames lie in a partition from `offset` on, to a request on `topic`.

        Those of lower attempts than `attempt` are none of it.

        It fails with OffsetExpiredError if the log no longer reaches so far back. If it `credits_worker`, a worker that
        waits for its reader goes on as this one takes chunks.
        """
        partition = self._partitions.get(place)
        if partition is None:
            partition = self._partitions[place] = _Partition(place, self)
        following = Following(partition, correlation_id, offset, topic=topic, scope=scope, had=had)
        following.credits = credits_worker
        following.begin_at(attempt)
        partition.join(following)
        return following

    async def close(self) -> None:
        """Fail what is still followed, and stop reading."""
        for partition in tuple(self._partitions.values()):
            partition.fail(BrokerError("the connection was closed"))
            self.forget(partition)
        for task in self._tasks:
            if not task.cancelling():  # else it is closing its reader, which a second time would break off
                task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    # --- for the partitions

    @property
    def broker(self) -> Broker:
        return self._broker

    @property
    def caller(self) -> Caller:
        return self._caller

    @property
    def settings(self) -> Settings:
        return self._settings

    @property
    def modules(self) -> tuple[str, ...]:
        return self._modules

    def start(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work, name="follow")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def forget(self, partition: "_Partition") -> None:
        if self._partitions.get(partition.place) is partition:
            del self._partitions[partition.place]


class _Partition:
    """The answers of one partition that are followed: live ones, those behind, and those that are full or at rest."""

    def __init__(self, place: tuple[str, int], follower: Follower) -> None:
        self.caller = follower.caller
        self.settings = follower.settings
        self.modules = follower.modules
        self.place = place
        self._follower = follower
        self._all: set[Following] = set()
        self._live: defaultdict[bytes, set[Following]] = defaultdict(set)
        self._behind: set[Following] = set()
        self._reading: set[Following] = set()  # in the pass that is under way
        self._some_behind = asyncio.Event()
        self._tail: Reader | None = None
        self._task: asyncio.Task[None] | None = None

    def join(self, following: Following) -> None:
        self._all.add(following)
        self.go_on(following)
        if self._task is None:
            self._task = self._follower.start(self._follow())

    def go_on(self, following: Following) -> None:
        """Have it read on, if it does not already."""
        known = following in self._live.get(following.id, ()) or following in self._reading
        if following in self._all and not (known or following.ended):
            self._behind.add(following)
            self._some_behind.set()

    def settle(self, following: Following) -> None:
        """It needs no more records."""
        self._behind.discard(following)
        self._reading.discard(following)
        if following.id in self._live:
            self._live[following.id].discard(following)
            if not self._live[following.id]:
                del self._live[following.id]

    def leave(self, following: Following) -> None:
        self.settle(following)
        self._all.discard(following)
        if not self._all and self._task is not None:
            self._follower.forget(self)
            self._task.cancel()

    def fail(self, error: Exception) -> None:
        for following in tuple(self._all):
            following.fail(error)
            self.settle(following)

    async def _follow(self) -> None:
        """Read for as long as anything is followed."""
        topic, number = self.place
        try:
            self._tail = await self._follower.broker.read(topic, {number: None})
            async with asyncio.TaskGroup() as both:
                both.create_task(self._read_live(self._tail))
                both.create_task(self._read_behind())
        except* BrokerError as errors:
            self.fail(errors.exceptions[0])
        except* Exception as errors:
            log.exception("following.stopped")
            self.fail(BrokerError(f"reading answers stopped: {errors.exceptions[0]!r}"))
        finally:
            self._follower.forget(self)
            if self._tail is not None:
                await self._tail.close()

    async def _read_live(self, reader: Reader) -> None:
        while True:
            for record in await reader.fetch():
                self._hand_out(record, self._live)

    async def _read_behind(self) -> None:
        while True:
            await self._some_behind.wait()
            self._some_behind.clear()
            self._reading, self._behind = self._behind, set()
            await self._drop_expired()
            if self._reading:
                await self._pass()

    async def _drop_expired(self) -> None:
        topic, number = self.place
        begin = await self._follower.broker.begin_offset(topic, number)
        for following in tuple(self._reading):
            if following.offset < begin:
                following.fail(OffsetExpiredError(f"{topic} no longer holds what lay before offset {begin}"))
                self.settle(following)

    async def _pass(self) -> None:
        """Read what lies between those behind and the live reader."""
        topic, number = self.place
        tail = self._tail
        assert tail is not None, "opened before"
        reader = await self._follower.broker.read(topic, {number: min(f.offset for f in self._reading)})
        try:
            while self._reading:
                by_id: defaultdict[bytes, set[Following]] = defaultdict(set)
                for following in self._reading:
                    by_id[following.id].add(following)
                if reader.position(number) >= tail.position(number):
                    self._catch_up(reader.position(number))
                    return
                for record in await reader.fetch():
                    self._hand_out(record, by_id)
        except OffsetExpiredError:
            self._behind |= self._reading
            self._some_behind.set()
        finally:
            self._reading = set()
            await reader.close()

    def _catch_up(self, position: int) -> None:
        """Those that were behind have all that lies before `position`, and the live reader gives the rest."""
        for following in self._reading:
            following.offset = max(following.offset, position)
            self._live[following.id].add(following)

    def _hand_out(self, record: Record, readers: "defaultdict[bytes, set[Following]]") -> None:
        fed = list(self._feed(found_in(record), record.offset, readers))
        for following in fed:
            following.offset = record.offset + 1
            if following.answered and following.end is None:
                following.end = record.offset
            if following.full:
                self.settle(following)
                readers.get(following.id, set()).discard(following)

    def _feed(
        self,
        frames: Iterable[tuple[Frame, str | None]],
        offset: int,
        readers: "defaultdict[bytes, set[Following]]",
    ) -> set[Following]:
        fed: set[Following] = set()
        for frame, reference in frames:
            for following in tuple(readers.get(frame.correlation_id, ())):
                if offset >= following.offset:
                    following.feed(frame, reference)
                    fed.add(following)
        return fed
