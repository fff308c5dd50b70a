"""The one seam to the log. What differs between brokers lives behind it; `tests/contract` holds them equal.

A broker keeps topics of numbered partitions; a partition is a log of records, each with an offset. Two ways to read:
a `GroupConsumer` shares a topic's partitions with the other members of its group and commits how far its work is done;
a `Reader` follows partitions that it names, alone, and commits nothing.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

import msgspec

from chains_stream.messages import Headers


class Record(msgspec.Struct, frozen=True, gc=False):
    """One record of a partition's log. `timestamp_ms` is Unix time."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes
    headers: Headers


class TopicSpec(msgspec.Struct, frozen=True):
    """A topic that must exist: one that does is kept as it is, else it is created so."""

    name: str
    partitions: int
    retention_ms: int
    ring: bool = False  # the embedded broker, when full, drops the oldest record instead of making publishers wait


class Committed(NamedTuple):
    """How far a group's work on a partition is done: the first offset that is not, and a note (4,096 bytes)."""

    offset: int
    metadata: str = ""


PartitionsChanged = Callable[[frozenset[int]], Awaitable[None]]


class GroupConsumer(Protocol):
    """A member of a consumer group on one topic. A record that is not committed is delivered again, to any member."""

    async def fetch(self, max_records: int) -> list[Record]:
        """Wait for at least one record, and give up to `max_records`, each partition's in offset order.

        Partitions take turns: one with many records does not hold up the others.
        Cancelling it loses no record. Raises BrokerError.
        """

    async def commit(self, positions: Mapping[int, Committed]) -> frozenset[int]:
        """Store, by partition, how far the work is done. A partition that was lost meanwhile is left alone.

        Returns the partitions whose position was stored. Raises BrokerError.
        """

    async def committed(self, partitions: Collection[int]) -> dict[int, Committed]:
        """Read what the group has stored for partitions; those without are left out. Raises BrokerError."""

    def pause(self, partition: int) -> None:
        """Give no records of a partition, from now on, until `resume`, or until `on_revoked` ends its being held.

        What was fetched of it and not given is dropped, and fetched again later. Nothing for one that is not held.
        """

    def resume(self, partition: int) -> None:
        """Give records of a partition again, from where they stopped."""

    def lag(self) -> dict[int, int]:
        """Give, for each partition held, how many records lie beyond what `fetch` has given, as far as is known."""

    async def close(self) -> None:
        """Leave the group. `on_revoked` is called first, with the partitions still held."""


class Reader(Protocol):
    """Follows named partitions of one topic, with no group."""

    def position(self, partition: int) -> int:
        """Give the offset of the next record that `fetch` will return from `partition`."""

    async def fetch(self) -> list[Record]:
        """Wait for records. Cancelling it loses none. Raises BrokerError, OffsetExpiredError.

        It gives none where a `position` passed what is no record: the marker at the end of a transaction of Kafka's.
        """

    async def close(self) -> None:
        """Stop reading."""


class Broker(Protocol):
    """A log that is shared by callers and workers. Open one with `brokers.open`."""

    @property
    def url(self) -> str:
        """Where the broker is, without credentials: for messages and logs."""

    @property
    def max_record_bytes(self) -> int:
        """The largest value that `publish` takes, in bytes."""

    async def start(self) -> None:
        """Connect. Raises BrokerError, BrokerAuthorizationError, within `connect_timeout`."""

    async def close(self) -> None:
        """Send what is buffered, and disconnect."""

    async def ensure_topics(self, topics: Sequence[TopicSpec]) -> None:
        """Create the topics that don't exist; return when all can be used."""

    async def partitions(self, topic: str) -> int:
        """Give the number of partitions of a topic. Raises UnknownTopicError, BrokerError."""

    async def publish(
        self,
        topic: str,
        value: bytes,
        *,
        partition: int,
        key: bytes | None = None,
        headers: Headers = (),
        durable: bool = True,
    ) -> asyncio.Future[int]:
        """Append a record. Returns once it has a place in the send buffer, waiting for one if the buffer is full.

        Records of one `durable` kind that go to one partition keep their order. The future gives the offset once the
        broker has stored the record: on all in-sync replicas if `durable`, else on the leader; it raises BrokerError,
        and nobody needs to await it. A value over `max_record_bytes` raises RecordTooLargeError at once.
        """

    async def consume(
        self, topic: str, group: str, *, on_assigned: PartitionsChanged, on_revoked: PartitionsChanged
    ) -> GroupConsumer:
        """Join a group on a topic; a group without a committed offset begins at the oldest record.

        Returns when the first partitions are assigned, which may be none. `on_assigned` runs before records of the
        partitions are delivered, `on_revoked` before others may get them; it may commit. What they raise is raised
        here, or by the next `fetch`, as BrokerError. A consumer of a process with an `instance_id` that is closed keeps
        its partitions until it joins again or its session ends; one whose id joins elsewhere gets a BrokerError.
        """

    async def read(self, topic: str, positions: Mapping[int, int | None]) -> Reader:
        """Follow partitions from the given offsets, or from the end for None; positions are known on return."""

    async def begin_offset(self, topic: str, partition: int) -> int:
        """Give the offset of the oldest record that a partition may still hold."""

    async def end_offset(self, topic: str, partition: int) -> int:
        """Give the offset that the next record of a partition will get."""

    async def offsets_at(self, topic: str, partitions: Collection[int], timestamp_ms: int) -> dict[int, int]:
        """Give, for each partition, the offset of the first record not older than that; its end if there is none."""

    async def delete_before(self, topic: str, positions: Mapping[int, int]) -> None:
        """Delete the records of partitions that lie before the given offsets.

        Raises OffsetExpiredError for one beyond the end.
        """

    async def backlog(self, topic: str, group: str) -> int:
        """Count the records of a topic that a group has yet to commit, taken or not, as the ends and commits tell.

        Raises UnknownTopicError, BrokerError.
        """

    def trouble(self) -> str | None:
        """Say what has kept a consumer or a reader of this broker from moving on for too long; None if all is well."""

    async def members(self, group: str) -> int:
        """Give the number of consumers that are in a group now."""
