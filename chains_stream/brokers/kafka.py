"""Apache Kafka, through aiokafka, which only the `kafka` modules here import.

Requests and results (durable) and chunks (fast) have producers of their own: aiokafka has one request of a producer to
each broker under way.
"""

import asyncio
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any
from weakref import WeakSet

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka import errors as kafka
from aiokafka.admin import NewTopic
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor

from chains_stream.broker import HEADER_ROOM, TRANSACTION_MS, Committed, Isolation, PartitionsChanged, Start, TopicSpec
from chains_stream.brokers.kafka_cluster import BEGIN, END, Cluster, check_size
from chains_stream.brokers.kafka_group import KafkaGroupConsumer
from chains_stream.brokers.kafka_reading import KafkaReader
from chains_stream.brokers.kafka_sending import Sender
from chains_stream.brokers.kafka_transactions import KafkaTransactor
from chains_stream.errors import BrokerError
from chains_stream.log import get_logger
from chains_stream.messages import Headers
from chains_stream.settings import Settings

FETCH_BYTES = 8 << 20  # a fetch of a reader, over all partitions
# A worker that is full holds a fetch besides its buffer. Of a partition it holds some batches of ours; Kafka gives a
# larger one whole, one a fetch.
GROUP_FETCH_BYTES = 2 << 20
GROUP_PARTITION_BYTES = 256 << 10
BATCH_HEAD = 100  # bytes around a record that lies alone in its batch, at most
MESSAGE_BYTES = 1_048_588  # that Kafka takes unless a topic says otherwise
BATCH_BYTES = 128 << 10  # records of one partition that go out together
SEGMENTS = 4  # that a topic's retention is cut into: a log is trimmed by whole segments
HEARTBEAT_MS = 1000  # a member learns by it that another one came or went, which waits until then
GROUP_METADATA_MS = 30_000  # until a group notices that its topic has other partitions than it dealt out
GROUP_FETCH_WAIT_MS = 100  # a partition that was just drained waits out the running fetch
TRANSACTION_RETRY_MS = 20  # leaders refuse records in passing while they ask whether the transaction is open
NEVER_MS = 2**31 - 1

log = get_logger(__name__)


class KafkaBroker:
    """A Kafka cluster."""

    def __init__(self, servers: Sequence[str], settings: Settings) -> None:
        self._settings = settings
        self._max_record_bytes = settings.max_record_bytes
        self._cluster = Cluster(servers, settings.kafka)
        self._durable = Sender(self._cluster, self._producer, acks="all", enable_idempotence=True)
        self._fast = Sender(self._cluster, self._producer, acks=1)
        self._feeds: WeakSet[KafkaGroupConsumer | KafkaReader] = WeakSet()
        self._transactors: set[KafkaTransactor] = set()  # that were not closed
        self._closing: set[asyncio.Task[None]] = set()  # of readers that nobody waits for any more

    @property
    def url(self) -> str:
        return self._cluster.url

    @property
    def max_record_bytes(self) -> int:
        return self._max_record_bytes

    async def start(self) -> None:
        try:
            async with asyncio.timeout(self._cluster.patience):
                await self._cluster.start()
                await self._durable.start()
                await self._fast.start()
        except TimeoutError:
            error = self._cluster.unreachable()
            await self.close()
            raise error from None
        except (kafka.KafkaError, OSError) as error:
            await self.close()
            right = "WRITE on a topic, or IDEMPOTENT_WRITE,"
            raise self._cluster.translated(error, "write to", right=right, what="the cluster") from error
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        if self._closing:
            await asyncio.wait(self._closing)
        await asyncio.gather(*[transactor.close() for transactor in self._transactors])
        await asyncio.gather(self._durable.close(), self._fast.close())
        await self._cluster.close()

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
        if len(value) > self._max_record_bytes:
            return None
        sender = self._durable if durable else self._fast
        return sender.put((topic, partition), key, value, headers)

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
        stored = self.put(topic, value, partition=partition, key=key, headers=headers, durable=durable)
        if stored is not None:
            return stored
        check_size(topic, value, self._max_record_bytes)
        if not 0 <= partition < self._cluster.counts.get(topic, 0):
            await self._cluster.require(topic, partition)
        try:
            sender = self._durable if durable else self._fast
            return await sender.send(TopicPartition(topic, partition), key, value, headers)
        except kafka.UnknownTopicOrPartitionError as error:
            self._cluster.counts.pop(topic, None)
            reason = f"{self.url} told nothing of {topic}: it can't be reached, or the topic was deleted"
            raise BrokerError(reason) from error
        except kafka.KafkaError as error:
            raise self._cluster.translated(error, "write", right="WRITE", what=topic) from error

    def transactor(self, transactional_id: str, *, timeout_ms: int = TRANSACTION_MS) -> KafkaTransactor:
        make = functools.partial(
            self._producer,
            transactional_id=transactional_id,
            transaction_timeout_ms=timeout_ms,
            acks="all",
            retry_backoff_ms=TRANSACTION_RETRY_MS,
        )
        made = KafkaTransactor(
            self._cluster,
            make,
            transactional_id,
            timeout_ms=timeout_ms,
            max_record_bytes=self._max_record_bytes,
            registry=self._transactors,
        )
        self._transactors.add(made)
        return made

    async def consume(
        self,
        topic: str,
        group: str,
        *,
        on_assigned: PartitionsChanged,
        on_revoked: PartitionsChanged,
        isolation: Isolation = "read_uncommitted",
        start: Start = "earliest",
    ) -> KafkaGroupConsumer:
        await self._cluster.partitions(topic)
        if start != "earliest":
            await self._begin(topic, group, start, isolation)
        session, instance_id = self._settings.kafka.session_timeout_ms, self._settings.instance_id
        make = functools.partial(
            self._consumer,
            group_id=group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            session_timeout_ms=session,
            heartbeat_interval_ms=min(session // 3, HEARTBEAT_MS),
            # A worker that is full does not poll, and is alive all the same.
            max_poll_interval_ms=NEVER_MS,
            fetch_max_wait_ms=GROUP_FETCH_WAIT_MS,
            fetch_max_bytes=GROUP_FETCH_BYTES,
            max_partition_fetch_bytes=GROUP_PARTITION_BYTES,
            group_instance_id=instance_id,
            isolation_level=isolation,
            metadata_max_age_ms=GROUP_METADATA_MS,
            # Whoever stays keeps what it has: a partition that moves costs the requests that run on it. A class of its
            # own, as aiokafka's keeps what a member was assigned in the class, for all groups of a process.
            partition_assignment_strategy=(type("Sticky", (StickyPartitionAssignor,), {}),),
        )
        callbacks = (on_assigned, on_revoked)
        # A member that was killed holds its partitions until its session times out, and the group waits for it.
        patience = 3 * session / 1000 + self._cluster.patience
        consumer = KafkaGroupConsumer(
            self._cluster,
            make,
            topic,
            group,
            callbacks,
            isolation=isolation,
            instance_id=instance_id,
            patience=patience,
        )
        await consumer.join()
        self._feeds.add(consumer)
        return consumer

    async def _begin(self, topic: str, group: str, start: Start, isolation: Isolation) -> None:
        """Store where a group that has nothing stored of a topic begins.

        Told to aiokafka alone, it would be lost with a member that dies before its first commit, and be taken for
        partitions that are added later as well.
        """
        numbers = range(await self._cluster.partitions(topic))
        if not await self._cluster.committed(group, topic, numbers):
            at = END if start == "latest" else max(0, int(start))
            await self._cluster.begin_group(group, topic, await self._cluster.offsets(topic, numbers, at, isolation))

    async def read(
        self, topic: str, positions: Mapping[int, int | None], *, isolation: Isolation = "read_uncommitted"
    ) -> KafkaReader:
        for number in positions:
            await self._cluster.require(topic, number)
        at_end = [number for number, offset in positions.items() if offset is None]
        ends = await self._cluster.offsets(topic, at_end, END, isolation)
        known = {number: ends[number] if offset is None else offset for number, offset in positions.items()}
        make = functools.partial(self._consumer, group_id=None, auto_offset_reset="none", isolation_level=isolation)
        reader = KafkaReader(self._cluster, make, topic, known, isolation)
        starting = asyncio.create_task(reader.start(), name=f"open {topic}")
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            # Broken off while it connects, aiokafka would leave the connection open.
            closing = asyncio.create_task(_close_once_started(starting, reader), name=f"close {topic}")
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
            raise
        self._feeds.add(reader)
        return reader

    async def ensure_topics(self, topics: Sequence[TopicSpec]) -> None:
        if topics:
            await self._cluster.ensure({spec.name: self._new_topic(spec) for spec in topics})

    async def partitions(self, topic: str) -> int:
        return await self._cluster.partitions(topic)

    async def begin_offset(self, topic: str, partition: int) -> int:
        return (await self._cluster.offsets(topic, [partition], BEGIN))[partition]

    async def end_offset(self, topic: str, partition: int, *, isolation: Isolation = "read_uncommitted") -> int:
        return (await self._cluster.offsets(topic, [partition], END, isolation))[partition]

    async def offsets_at(self, topic: str, partitions: Collection[int], timestamp_ms: int) -> dict[int, int]:
        return await self._cluster.offsets(topic, partitions, max(0, timestamp_ms))

    async def delete_before(self, topic: str, positions: Mapping[int, int]) -> None:
        await self._cluster.delete_before(topic, positions)

    async def committed(self, topic: str, group: str, partitions: Collection[int]) -> dict[int, Committed]:
        return await self._cluster.committed(group, topic, partitions)

    async def backlog(self, topic: str, group: str) -> int:
        numbers = range(await self._cluster.partitions(topic))
        committed, begins, ends = await asyncio.gather(
            self._cluster.committed(group, topic, numbers),
            self._cluster.offsets(topic, numbers, BEGIN),
            self._cluster.offsets(topic, numbers, END),
        )
        done = {number: committed[number].offset for number in committed}
        return sum(max(0, ends[number] - max(begins[number], done.get(number, 0))) for number in numbers)

    def trouble(self) -> str | None:
        return next((trouble for feed in self._feeds if (trouble := feed.trouble()) is not None), None)

    async def record_limit(self, topic: str) -> int:
        found = await self._cluster.record_limit(topic)
        room = self._max_record_bytes + HEADER_ROOM
        return room if found is None else min(found - BATCH_HEAD, room)

    async def members(self, group: str) -> int:
        return await self._cluster.members(group)

    def _new_topic(self, spec: TopicSpec) -> NewTopic:
        configuration = {
            "retention.ms": str(spec.retention_ms),
            "segment.ms": str(max(1, spec.retention_ms // SEGMENTS)),
        }
        if self._max_record_bytes + HEADER_ROOM > MESSAGE_BYTES:
            configuration["max.message.bytes"] = str(self._max_record_bytes + HEADER_ROOM)
        return NewTopic(spec.name, spec.partitions, self._settings.replication_factor, topic_configs=configuration)

    def _consumer(self, **options: Any) -> AIOKafkaConsumer:
        room = self._max_record_bytes + HEADER_ROOM
        bounds = {"max_partition_fetch_bytes": room, "fetch_max_bytes": max(FETCH_BYTES, room)}
        return AIOKafkaConsumer(**bounds | options, **self._cluster.connection)

    def _producer(self, **options: Any) -> AIOKafkaProducer:
        room = self._max_record_bytes + HEADER_ROOM
        bounds = {"max_batch_size": BATCH_BYTES, "max_request_size": room}
        return AIOKafkaProducer(linger_ms=0, **bounds, **options, **self._cluster.connection)


async def _close_once_started(starting: asyncio.Task[None], reader: KafkaReader) -> None:
    await asyncio.wait([starting])
    if not starting.cancelled() and (error := starting.exception()) is not None:
        log.info("broker.read_abandoned", reason=str(error))
    await reader.close()
