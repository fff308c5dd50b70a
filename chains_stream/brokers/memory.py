"""The embedded broker: topics, partitions, offsets and consumer groups in the memory of one process.

It behaves as Kafka does where `tests/contract` can tell, and is bounded. A partition of a topic that groups consume
makes publishers wait while too much of it is not committed; one of a `TopicSpec.ring` drops its oldest records, and a
reader that has fallen behind them gets OffsetExpiredError. Records past their topic's retention go with the next one.
"""

import asyncio
from collections.abc import Collection, Mapping, Sequence

from chains_stream.broker import (
    HEADER_ROOM,
    TRANSACTION_MS,
    Committed,
    Isolation,
    PartitionsChanged,
    Record,
    Start,
    TopicSpec,
)
from chains_stream.brokers.memory_log import Partition
from chains_stream.brokers.memory_reading import Following, MemoryReader
from chains_stream.brokers.memory_transactions import MemoryTransactor, stored_at
from chains_stream.errors import BrokerError, OffsetExpiredError, RecordTooLargeError, UnknownTopicError
from chains_stream.log import get_logger
from chains_stream.messages import Headers
from chains_stream.settings import Settings

MAX_NOTE_BYTES = 4096  # with a committed offset, as Kafka's default

log = get_logger(__name__)


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

    def begin(self, start: Start, isolation: Isolation) -> None:
        """Settle where a group goes on that nobody is in, and that has committed nothing."""
        if start == "earliest" or self.members or self.committed:
            return
        for log in self._partitions:
            offset = log.readable(isolation) if start == "latest" else log.first_from(start)
            self.committed[log.number] = Committed(offset)

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


class MemoryConsumer(Following):
    """A member of a group."""

    skips_expired = True

    def __init__(
        self,
        topic: "Topic",
        group: Group,
        on_assigned: PartitionsChanged,
        on_revoked: PartitionsChanged,
        isolation: Isolation,
    ) -> None:
        super().__init__(isolation)
        self._topic = topic
        self._group = group
        self._on_assigned = on_assigned
        self._on_revoked = on_revoked
        self._held: frozenset[int] = frozenset()
        self.assigned = False

    async def fetch(self, max_records: int) -> list[Record]:
        return await self._fetch(max_records)

    async def commit(self, positions: Mapping[int, Committed]) -> frozenset[int]:
        stored = self._held & positions.keys()
        self._topic.commit(self._group, positions, stored)
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
            partition.number: max(0, partition.readable(self._isolation) - max(position, partition.begin))
            for partition, position in self._positions.items()
        }

    def position(self, partition: int) -> int:
        log = self._topic.partitions[partition]
        return max(self._positions[log], log.begin)

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

    def commit(self, group: Group, positions: Mapping[int, Committed], numbers: Collection[int]) -> None:
        """Store positions of these partitions, and drop what all groups that have joined so far are done with."""
        for number, committed in positions.items():
            if len(committed.metadata.encode()) > MAX_NOTE_BYTES:
                raise BrokerError(f"{self.name}[{number}]: a note is over {MAX_NOTE_BYTES} bytes long")
        for number in numbers:
            partition = self.partitions[number]
            group.committed[number] = positions[number]
            partition.drop_before(min(group.position(partition) for group in self.groups.values()))


class MemoryBroker:
    """The broker of ``memory://``: what is in it is gone with the process."""

    def __init__(self, settings: Settings) -> None:
        self._topics: dict[str, Topic] = {}
        self._logs: dict[tuple[str, int], Partition] = {}  # of all topics
        self._holders: dict[str, MemoryTransactor] = {}  # of transactional ids
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

    def put(
        self,
        topic: str,
        value: bytes,
        *,
        partition: int,
        key: bytes | None = None,
        headers: Headers = (),
        durable: bool = True,  # noqa: ARG002 - nothing here outlives the process
    ) -> asyncio.Future[int] | None:
        log = self.room(topic, partition, len(value))
        return None if log is None else stored_at(log.append(key, value, headers))

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
        log = await self.place(topic, partition, len(value))
        return stored_at(log.append(key, value, headers))

    def room(self, topic: str, partition: int, size: int) -> Partition | None:
        """Give a partition that has room for a value of so many bytes; a record is to be appended at once."""
        log = self._logs.get((topic, partition))
        return log if log is not None and size <= self._max_record_bytes and log.admits(size) else None

    async def place(self, topic: str, partition: int, size: int) -> Partition:
        """Wait until a partition has room for a value of so many bytes; a record is to be appended at once."""
        if size > self._max_record_bytes:
            raise RecordTooLargeError(
                f"a record of {size} bytes for {topic} is over the limit of {self._max_record_bytes}"
            )
        log = self._logs.get((topic, partition)) or self._partition(topic, partition)
        if not log.admits(size):
            if log.ring:
                await log.let_readers_catch_up()
                log.make_room(size)
            else:
                await log.wait_for_room(size)
        return log

    def transactor(self, transactional_id: str, *, timeout_ms: int = TRANSACTION_MS) -> MemoryTransactor:
        return MemoryTransactor(self, self._holders, transactional_id, timeout_ms)

    def store_offsets(self, topic: str, group: str, positions: Mapping[int, Committed]) -> None:
        """Store how far a group's work is done, whoever holds the partitions. Raises BrokerError."""
        found = self._topic(topic)
        for number in positions:
            self._partition(topic, number)
        found.commit(found.group(group), positions, positions)

    async def consume(
        self,
        topic: str,
        group: str,
        *,
        on_assigned: PartitionsChanged,
        on_revoked: PartitionsChanged,
        isolation: Isolation = "read_uncommitted",
        start: Start = "earliest",
    ) -> MemoryConsumer:
        found = self._topic(topic)
        joined = found.group(group)
        joined.begin(start, isolation)
        consumer = MemoryConsumer(found, joined, on_assigned, on_revoked, isolation)
        await joined.join(consumer)
        if consumer.error is not None:
            await consumer.close()
            raise consumer.error
        return consumer

    async def read(
        self, topic: str, positions: Mapping[int, int | None], *, isolation: Isolation = "read_uncommitted"
    ) -> MemoryReader:
        logs = {self._partition(topic, number): offset for number, offset in positions.items()}
        known = {log: log.readable(isolation) if offset is None else offset for log, offset in logs.items()}
        return MemoryReader(known, isolation)

    async def begin_offset(self, topic: str, partition: int) -> int:
        return self._partition(topic, partition).begin

    async def end_offset(self, topic: str, partition: int, *, isolation: Isolation = "read_uncommitted") -> int:
        return self._partition(topic, partition).readable(isolation)

    async def offsets_at(self, topic: str, partitions: Collection[int], timestamp_ms: int) -> dict[int, int]:
        return {number: self._partition(topic, number).first_from(timestamp_ms) for number in partitions}

    async def delete_before(self, topic: str, positions: Mapping[int, int]) -> None:
        wanted = {self._partition(topic, number): offset for number, offset in positions.items()}
        for partition, offset in wanted.items():
            if offset > partition.end:
                raise OffsetExpiredError(f"{topic}[{partition.number}] ends at {partition.end}, before {offset}")
        for partition, offset in wanted.items():
            partition.drop_before(offset)

    async def committed(self, topic: str, group: str, partitions: Collection[int]) -> dict[int, Committed]:
        joined = self._topic(topic).groups.get(group)
        stored = {} if joined is None else joined.committed
        return {number: stored[number] for number in partitions if number in stored}

    async def backlog(self, topic: str, group: str) -> int:
        found = self._topic(topic)
        joined = found.groups.get(group)
        positions = [log.begin if joined is None else joined.position(log) for log in found.partitions]
        return sum(log.end - position for log, position in zip(found.partitions, positions, strict=True))

    def trouble(self) -> str | None:
        return None

    async def record_limit(self, topic: str) -> int:  # noqa: ARG002 - the same for all
        return self._max_record_bytes + HEADER_ROOM

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
