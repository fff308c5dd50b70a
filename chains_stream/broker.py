"""The one seam to the log. What differs between brokers lives behind it; `tests/contract` holds them equal.

A broker keeps topics of numbered partitions; a partition is a log of records, each with an offset. Two ways to read:
a `GroupConsumer` shares a topic's partitions with the other members of its group and commits how far its work is done;
a `Reader` follows partitions that it names, alone, and commits nothing. A `Transactor` writes records, and how far a
group's work is done, so that readers of committed records meet all of it or nothing.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import msgspec

from chains_stream.messages import Headers

HEADER_ROOM = 48_000  # bytes in a record beside the value
TRANSACTION_MS = 60_000  # that a transaction may be open

# Whether a reader meets the records of transactions that are open, or were aborted. One that does not also waits with
# what comes after the first record of an open transaction, as its place in the order is not known before.
Isolation = Literal["read_uncommitted", "read_committed"]

# Where a group begins that has committed nothing of a topic: a number is Unix time in ms, and stands for the first
# record that is not older.
Start = Literal["earliest", "latest"] | int


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
        """Give, for each partition held, how many records lie beyond what `fetch` has given, as far as is known.

        What may not be read yet, as its transaction is open, does not count.
        """

    def position(self, partition: int) -> int:
        """Give the offset that `fetch` goes on from in a partition that is held.

        It also passes what is no record, and what was aborted: committed once all before it is done, it leaves no
        backlog of those.
        """

    async def close(self) -> None:
        """Leave the group. `on_revoked` is called first, with the partitions still held."""


class Reader(Protocol):
    """Follows named partitions of one topic, with no group."""

    def position(self, partition: int) -> int:
        """Give the offset of the next record that `fetch` will return from `partition`."""

    async def fetch(self) -> list[Record]:
        """Wait for records. Cancelling it loses none. Raises BrokerError, OffsetExpiredError.

        It gives none where a `position` passed what is no record for it: the marker at the end of a transaction of
        Kafka's, or what was aborted.
        """

    async def close(self) -> None:
        """Stop reading."""


class Transactor(Protocol):
    """One transaction after the other, under an id that only one holder has at a time.

    Records and offsets of a transaction count together, or not at all. Give each input partition an id of its own, and
    read what is committed for it only after `start`: nothing of an earlier holder can come in between from then on,
    and what lies before the offset that is committed then is done.

    After any BrokerError of `commit`, `abort` or the future of a `publish`, or a `commit` that was cancelled, what
    became of the transaction is not known, and this transactor is spent. As long as the group says that the partition
    is ours, close it, start another one, read what is committed, and go on from there. FencedError says that another
    holder was started, or that the broker gave up a transaction that was open for too long: a moment's pause lets a
    holder that has lost the partition, and does not know it yet, hear of it.
    """

    async def start(self) -> None:
        """Take the id over: its last holder is fenced, and what it left open is aborted.

        Raises BrokerError, BrokerAuthorizationError, within `connect_timeout`.
        """

    def begin(self) -> None:
        """Begin a transaction. Raises FencedError, BrokerError."""

    def put(
        self,
        topic: str,
        value: bytes,
        *,
        partition: int,
        key: bytes | None = None,
        headers: Headers = (),
    ) -> asyncio.Future[int] | None:
        """As `publish` does, append a record, if that takes no waiting; else None. Raises what is wrong at once."""

    async def publish(
        self,
        topic: str,
        value: bytes,
        *,
        partition: int,
        key: bytes | None = None,
        headers: Headers = (),
    ) -> asyncio.Future[int]:
        """Append a record, in the transaction. As `Broker.publish`; records of one partition keep their order.

        A failure of the future is also raised by `commit`: nobody needs to await it. What is raised at once leaves the
        transaction as it was.
        """

    def add_offsets(self, topic: str, group: str, positions: Mapping[int, Committed]) -> None:
        """Have `commit` store how far a group's work is done, of one group; of a partition the last position counts.

        Nobody checks that the partitions are held: that is what the id is for.
        """

    async def commit(self) -> None:
        """Make all of the transaction count; readers meet it moments later.

        Raises FencedError and BrokerError, see above.
        """

    async def abort(self) -> None:
        """Have nothing of the transaction count; another one can begin. Raises as `commit` does."""

    async def close(self) -> None:
        """Abort what is open, as far as that can be done at once, and disconnect. The id can be taken over any time."""


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

    def put(
        self,
        topic: str,
        value: bytes,
        *,
        partition: int,
        key: bytes | None = None,
        headers: Headers = (),
        durable: bool = True,
    ) -> asyncio.Future[int] | None:
        """As `publish` does, append a record, if that takes no waiting; else None, also where `publish` would raise."""

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

    def transactor(self, transactional_id: str, *, timeout_ms: int = TRANSACTION_MS) -> Transactor:
        """Give a new holder of a transactional id, to be started.

        A transaction that stays open for longer than `timeout_ms` is aborted by the broker, and its holder is fenced.
        """

    async def consume(
        self,
        topic: str,
        group: str,
        *,
        on_assigned: PartitionsChanged,
        on_revoked: PartitionsChanged,
        isolation: Isolation = "read_uncommitted",
        start: Start = "earliest",
    ) -> GroupConsumer:
        """Join a group on a topic; one that has committed nothing of it begins at `start`.

        What `start` means is settled once, for all partitions that there are, by the first who joins. Those that are
        added later, or whose committed offset was passed by the retention, begin at the oldest record.

        Returns when the first partitions are assigned, which may be none. `on_assigned` runs before it is read where to
        go on, and before records of the partitions are delivered; `on_revoked` before others may get them; it may
        commit. What they raise is raised here, or by the next `fetch`, as BrokerError. A consumer of a process with an
        `instance_id` that is closed keeps its partitions until it joins again or its session ends; one whose id joins
        elsewhere gets a BrokerError.
        """

    async def read(
        self, topic: str, positions: Mapping[int, int | None], *, isolation: Isolation = "read_uncommitted"
    ) -> Reader:
        """Follow partitions from the given offsets, or from the end for None; positions are known on return.

        For a reader of committed records, the end lies before the first record of an open transaction.
        """

    async def begin_offset(self, topic: str, partition: int) -> int:
        """Give the offset of the oldest record that a partition may still hold."""

    async def end_offset(self, topic: str, partition: int, *, isolation: Isolation = "read_uncommitted") -> int:
        """Give the offset that the next record of a partition will get; of those committed, that of the first open one.

        A reader with this isolation gets there with no more records written.
        """

    async def offsets_at(self, topic: str, partitions: Collection[int], timestamp_ms: int) -> dict[int, int]:
        """Give, for each partition, the offset of the first record not older than that; its end if there is none."""

    async def delete_before(self, topic: str, positions: Mapping[int, int]) -> None:
        """Delete the records of partitions that lie before the given offsets.

        Raises OffsetExpiredError for one beyond the end.
        """

    async def committed(self, topic: str, group: str, partitions: Collection[int]) -> dict[int, Committed]:
        """Read what a group has stored for partitions of a topic; those without are left out. Raises BrokerError."""

    async def backlog(self, topic: str, group: str) -> int:
        """Count the records of a topic that a group has yet to commit, taken or not, as the ends and commits tell.

        The markers of transactions, and what was aborted, count as well where the commits do not pass them.
        Raises UnknownTopicError, BrokerError.
        """

    def trouble(self) -> str | None:
        """Say what has kept a consumer or a reader of this broker from moving on for too long; None if all is well."""

    async def record_limit(self, topic: str) -> int:
        """Give how many bytes a record of a topic may have with its key and headers, as far as it may be known.

        Raises BrokerError.
        """

    async def members(self, group: str) -> int:
        """Give the number of consumers that are in a group now."""
