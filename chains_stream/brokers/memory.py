"""The embedded broker: topics, partitions, offsets and consumer groups in the memory of one process.

It behaves as Kafka does where `tests/contract` can tell, and is bounded. A partition of a topic that groups consume
makes publishers wait while too much of it is not committed; one of a `TopicSpec.ring` drops its oldest records, and a
reader that has fallen behind them gets OffsetExpiredError. Records past their topic's retention go with the next one.
"""

import asyncio
from collections import deque
from collections.abc import Collection, Mapping, Sequence

from chains_stream.broker import Committed, PartitionsChanged, Record, TopicSpec
from chains_stream.errors import BrokerError, OffsetExpiredError, RecordTooLargeError, UnknownTopicError
from chains_stream.log import get_logger
from chains_stream.messages import Headers, now_ms
from chains_stream.settings import Settings

MAX_RECORDS = 50_000  # in a partition
MAX_BYTES = 32 << 20  # of values in a partition
MAX_TURNS = 100  # of the event loop that a reader of a full ring is given
FETCH_RECORDS = 500  # that a reader gets at once
MAX_NOTE_BYTES = 4096  # with a committed offset, as Kafka's default

log = get_logger(__name__)


class Partition:
    """One log: the records from `begin` to `end`, and who waits for more of them, or for room."""

    def __init__(self, spec: TopicSpec, number: int) -> None:
        self.topic = spec.name
        self.number = number
        self.ring = spec.ring
        self.begin = 0
        self.readers: set[_Follower] = set()
        self._records: deque[Record] = deque()
        self._size = 0
        self._retention_ms = spec.retention_ms
        self._line = asyncio.Lock()  # of publishers; the first one waits for `_room`
        self._room: asyncio.Future[None] | None = None

    @property
    def end(self) -> int:
        return self.begin + len(self._records)

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

    def append(self, key: bytes | None, value: bytes, headers: Headers) -> int:
        records, now = self._records, now_ms()
        offset = self.begin + len(records)
        oldest = now - self._retention_ms
        while records and records[0].timestamp_ms < oldest:
            self._drop_first()
        records.append(Record(self.topic, self.number, offset, now, key, value, headers))
        self._size += len(value)
        for reader in self.readers:
            reader.wake(self)
        return offset

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
        # By index, which a deque finds from its nearer end: readers are near the end of a long ring.
        records, start = self._records, offset - self.begin
        if start == len(records) - 1:
            return [records[-1]]
        return [records[index] for index in range(start, min(start + limit, len(records)))]

    def first_from(self, timestamp_ms: int) -> int:
        """Give the offset of the first record that is not older; the end if there is none."""
        return next((record.offset for record in self._records if record.timestamp_ms >= timestamp_ms), self.end)

    def _drop_first(self) -> None:
        self._size -= len(self._records.popleft().value)
        self.begin += 1


class _Follower:
    """Reads partitions in turn, from positions of its own."""

    skips_expired = False  # instead of raising OffsetExpiredError

    def __init__(self) -> None:
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
            if self._ready and (taken := self._take(limit)):
                return taken
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def _take(self, limit: int) -> list[Record]:
        taken: list[Record] = []
        while self._ready and len(taken) < limit:
            partition = next(iter(self._ready))
            position = self._positions[partition]
            if self.skips_expired:
                position = max(position, partition.begin)
            try:
                records = partition.slice(position, limit - len(taken))
            except OffsetExpiredError:
                if taken:
                    break  # the next fetch meets it, and each one after
                raise
            del self._ready[partition]
            taken += records
            position = self._positions[partition] = position + len(records)
            if position < partition.end:
                self._ready[partition] = None  # at the end of the line
        return taken

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class MemoryReader(_Follower):
    """Follows named partitions."""

    def __init__(self, positions: Mapping[Partition, int]) -> None:
        super().__init__()
        self._follow(positions)

    def position(self, partition: int) -> int:
        return next(position for followed, position in self._positions.items() if followed.number == partition)

    async def fetch(self) -> list[Record]:
        return await self._fetch(FETCH_RECORDS)

    async def close(self) -> None:
        self._follow({})
        self.fail(BrokerError("the reader was closed"))


class Group:
    """A consumer group on one topic: its members, which partitions each has, and how far the work is done."""

    def __init__(self, partitions: Sequence[Partition]) -> None:
        self.committed: dict[int, Committed] = {}
        self.members: list[MemoryConsumer] = []
        self._partitions = partitions
        self._changing = asyncio.Lock()

    async def join(self, member: "MemoryConsumer") -> None:
        async with self._changing:
            try:
                await self._become([*self.members, member])
            except BaseException:  # cancelled: nobody will read on its behalf
                await self._become([other for other in self.members if other is not member])
                raise

    async def leave(self, member: "MemoryConsumer") -> None:
        async with self._changing:
            others = [other for other in self.members if other is not member]
            try:
                await self._become(others)
            except BaseException:  # cancelled: the others have their partitions all the same
                await self._become(others)
                raise

    def position(self, partition: Partition) -> int:
        """Where work on a partition goes on."""
        committed = self.committed.get(partition.number)
        stored = committed is not None and partition.begin <= committed.offset <= partition.end
        return committed.offset if committed is not None and stored else partition.begin

    async def _become(self, members: list["MemoryConsumer"]) -> None:
        if members == self.members and all(member.assigned for member in members):
            return
        # All partitions are revoked before any is assigned, as Kafka's eager protocol does: a member never works on a
        # partition that another one still commits.
        for member in self.members:
            await member.revoke()
        self.members = members
        for index, member in enumerate(members):
            await member.assign(self._partitions[index :: len(members)])


class MemoryConsumer(_Follower):
    """A member of a group."""

    skips_expired = True

    def __init__(
        self, topic: "Topic", group: Group, on_assigned: PartitionsChanged, on_revoked: PartitionsChanged
    ) -> None:
        super().__init__()
        self._topic = topic
        self._group = group
        self._on_assigned = on_assigned
        self._on_revoked = on_revoked
        self._held: frozenset[int] = frozenset()
        self.assigned = False

    async def fetch(self, max_records: int) -> list[Record]:
        return await self._fetch(max_records)

    async def commit(self, positions: Mapping[int, Committed]) -> frozenset[int]:
        for partition, committed in positions.items():
            if len(committed.metadata.encode()) > MAX_NOTE_BYTES:
                raise BrokerError(f"{self._topic.name}[{partition}]: a note is over {MAX_NOTE_BYTES} bytes long")
        stored = self._held & positions.keys()
        for partition in stored:
            self._group.committed[partition] = positions[partition]
            self._topic.committed(partition)
        return stored

    async def committed(self, partitions: Collection[int]) -> dict[int, Committed]:
        stored = self._group.committed
        return {partition: stored[partition] for partition in partitions if partition in stored}

    def pause(self, partition: int) -> None:
        if partition in self._held:
            self._paused.add(partition)
            self._ready.pop(self._topic.partitions[partition], None)

    def resume(self, partition: int) -> None:
        if partition in self._paused:
            self._paused.remove(partition)
            self.wake(self._topic.partitions[partition])

    def lag(self) -> dict[int, int]:
        return {
            partition.number: partition.end - max(position, partition.begin)
            for partition, position in self._positions.items()
        }

    async def close(self) -> None:
        await self._group.leave(self)
        self.fail(BrokerError(f"{self._topic.name}: the consumer was closed"))

    async def assign(self, partitions: Sequence[Partition]) -> None:
        self._held = frozenset(partition.number for partition in partitions)
        self.assigned = True
        await self._tell(self._on_assigned)
        self._follow({partition: self._group.position(partition) for partition in partitions})

    async def revoke(self) -> None:
        self._follow({})
        self._paused.clear()
        self.assigned = False
        if self._held:
            await self._tell(self._on_revoked)
        self._held = frozenset()

    async def _tell(self, callback: PartitionsChanged) -> None:
        try:
            await callback(self._held)
        except Exception as error:
            # It is this member's fault, and not that of the one whose coming or going moved the partitions.
            log.exception("broker.callback_failed", topic=self._topic.name)
            self.fail(BrokerError(f"{self._topic.name}: a callback of the consumer failed: {error!r}"))


class Topic:
    """Partitions, and the groups that consume them."""

    def __init__(self, spec: TopicSpec) -> None:
        self.name = spec.name
        self.partitions = [Partition(spec, number) for number in range(spec.partitions)]
        self.groups: dict[str, Group] = {}

    def group(self, name: str) -> Group:
        if name not in self.groups:
            self.groups[name] = Group(self.partitions)
        return self.groups[name]

    def committed(self, number: int) -> None:
        """Drop what all groups that have joined so far are done with."""
        partition = self.partitions[number]
        partition.drop_before(min(group.position(partition) for group in self.groups.values()))


class MemoryBroker:
    """The broker of ``memory://``: what is in it is gone with the process."""

    def __init__(self, settings: Settings) -> None:
        self._topics: dict[str, Topic] = {}
        self._logs: dict[tuple[str, int], Partition] = {}  # of all topics
        self._max_record_bytes = settings.max_record_bytes

    @property
    def url(self) -> str:
        return "memory://"

    @property
    def max_record_bytes(self) -> int:
        return self._max_record_bytes

    async def start(self) -> None:
        """Nothing to connect to."""

    async def close(self) -> None:
        """Nothing is buffered."""

    async def ensure_topics(self, topics: Sequence[TopicSpec]) -> None:
        for spec in topics:
            if spec.name not in self._topics:
                made = self._topics[spec.name] = Topic(spec)
                self._logs |= {(spec.name, log.number): log for log in made.partitions}

    async def partitions(self, topic: str) -> int:
        return len(self._topic(topic).partitions)

    async def publish(
        self,
        topic: str,
        value: bytes,
        *,
        partition: int,
        key: bytes | None = None,
        headers: Headers = (),
        durable: bool = True,  # noqa: ARG002 - nothing here outlives the process
    ) -> asyncio.Future[int]:
        if len(value) > self._max_record_bytes:
            raise RecordTooLargeError(
                f"a record of {len(value)} bytes for {topic} is over the limit of {self._max_record_bytes}"
            )
        log = self._logs.get((topic, partition)) or self._partition(topic, partition)
        if not log.admits(len(value)):
            if log.ring:
                await log.let_readers_catch_up()
                log.make_room(len(value))
            else:
                await log.wait_for_room(len(value))
        stored: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        stored.set_result(log.append(key, value, headers))
        return stored

    async def consume(
        self, topic: str, group: str, *, on_assigned: PartitionsChanged, on_revoked: PartitionsChanged
    ) -> MemoryConsumer:
        found = self._topic(topic)
        joined = found.group(group)
        consumer = MemoryConsumer(found, joined, on_assigned, on_revoked)
        await joined.join(consumer)
        if consumer.error is not None:
            await consumer.close()
            raise consumer.error
        return consumer

    async def read(self, topic: str, positions: Mapping[int, int | None]) -> MemoryReader:
        partitions = {self._partition(topic, number): offset for number, offset in positions.items()}
        return MemoryReader(
            {partition: partition.end if offset is None else offset for partition, offset in partitions.items()}
        )

    async def begin_offset(self, topic: str, partition: int) -> int:
        return self._partition(topic, partition).begin

    async def end_offset(self, topic: str, partition: int) -> int:
        return self._partition(topic, partition).end

    async def offsets_at(self, topic: str, partitions: Collection[int], timestamp_ms: int) -> dict[int, int]:
        return {number: self._partition(topic, number).first_from(timestamp_ms) for number in partitions}

    async def delete_before(self, topic: str, positions: Mapping[int, int]) -> None:
        wanted = {self._partition(topic, number): offset for number, offset in positions.items()}
        for partition, offset in wanted.items():
            if offset > partition.end:
                raise OffsetExpiredError(f"{topic}[{partition.number}] ends at {partition.end}, before {offset}")
        for partition, offset in wanted.items():
            partition.drop_before(offset)

    async def backlog(self, topic: str, group: str) -> int:
        found = self._topic(topic)
        joined = found.groups.get(group)
        positions = [log.begin if joined is None else joined.position(log) for log in found.partitions]
        return sum(log.end - position for log, position in zip(found.partitions, positions, strict=True))

    def trouble(self) -> str | None:
        return None

    async def members(self, group: str) -> int:
        return sum(len(topic.groups[group].members) for topic in self._topics.values() if group in topic.groups)

    def _topic(self, name: str) -> Topic:
        if name not in self._topics:
            raise UnknownTopicError(f"there is no topic {name}")
        return self._topics[name]

    def _partition(self, topic: str, number: int) -> Partition:
        partitions = self._topic(topic).partitions
        if not 0 <= number < len(partitions):
            raise UnknownTopicError(f"the topic {topic} has no partition {number}; it has {len(partitions)}")
        return partitions[number]
