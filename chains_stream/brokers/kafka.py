"""Apache Kafka, through aiokafka, which only the `kafka` modules here import.

Facts about aiokafka that this rests on: a producer has one request to each broker under way, so requests and results
(durable) and chunks (fast) have producers of their own; a consumer fetches a partition again only when what it got of
it is read, so records are moved to a queue of ours at once; exceptions in a rebalance listener are only logged, so they
are kept here and raised by `fetch`.
"""

import asyncio
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka import errors as kafka
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.structs import RecordMetadata

from chains_stream.broker import Committed, PartitionsChanged, TopicSpec
from chains_stream.brokers.kafka_cluster import PAUSE, Cluster, said
from chains_stream.brokers.kafka_reading import PATIENCE, KafkaGroupConsumer, KafkaReader
from chains_stream.errors import BrokerError, RecordTooLargeError, UnknownTopicError
from chains_stream.log import get_logger
from chains_stream.messages import Headers
from chains_stream.settings import Settings

FETCH_BYTES = 8 << 20  # a fetch, over all partitions
HEADER_ROOM = 64 << 10  # bytes in a produce request beside the value
BATCH_BYTES = 128 << 10  # records of one partition that go out together
SEGMENTS = 4  # that a topic's retention is cut into: a log is trimmed by whole segments
GROUP_FETCH_WAIT_MS = 100  # a partition that was just drained waits out the running fetch
NEVER_MS = 2**31 - 1

log = get_logger(__name__)


class KafkaBroker:
    """A Kafka cluster."""

    def __init__(self, servers: Sequence[str], settings: Settings) -> None:
        self._settings = settings
        self._cluster = Cluster(servers, settings.kafka)
        self._clients: list[Any] = []
        self._partitions: dict[str, int] = {}  # of topics, once known; they may grow, and never shrink
        self._admin: AIOKafkaAdminClient
        self._durable: AIOKafkaProducer
        self._fast: AIOKafkaProducer

    @property
    def url(self) -> str:
        return self._cluster.url

    @property
    def max_record_bytes(self) -> int:
        return self._settings.max_record_bytes

    async def start(self) -> None:
        await self._cluster.find_a_server()
        common = self._cluster.connection
        sending = {
            "linger_ms": 0,
            "max_batch_size": BATCH_BYTES,
            "max_request_size": self._settings.max_record_bytes + HEADER_ROOM,
        }
        # Each is started as soon as it is made, and stopped even if its start fails.
        async with self._cluster.errors("write to", right="WRITE on a topic, or IDEMPOTENT_WRITE,", what="the cluster"):
            self._admin = AIOKafkaAdminClient(**common)
            self._clients.append(self._admin.close)
            await self._admin.start()
            self._durable = AIOKafkaProducer(acks="all", enable_idempotence=True, **sending, **common)
            self._clients.append(self._durable.stop)
            await self._durable.start()
            self._fast = AIOKafkaProducer(acks=1, **sending, **common)
            self._clients.append(self._fast.stop)
            await self._fast.start()

    async def close(self) -> None:
        while self._clients:
            stop = self._clients.pop()
            try:
                # A producer flushes for as long as the broker is away.
                async with asyncio.timeout(PATIENCE):
                    await stop()
            except (kafka.KafkaError, TimeoutError) as error:
                log.warning("broker.close_failed", broker=self.url, reason=said(error))

    async def ensure_topics(self, topics: Sequence[TopicSpec]) -> None:
        wanted = {spec.name: spec for spec in topics}
        if not wanted:
            return
        async with self._cluster.errors("create topics", right="CREATE", what=", ".join(wanted)):
            response = await self._admin.create_topics([self._new_topic(spec) for spec in wanted.values()])
            refused = [
                (name, kafka.for_code(code), message)
                for name, code, message in (entry[:3] for entry in response.topic_errors)
                if code not in (0, kafka.TopicAlreadyExistsError.errno)
            ]
            if refused:
                # Without the right to create a topic, one that exists serves as well.
                existing = set(await self._admin.list_topics())
                for name, error, message in refused:
                    if name not in existing:
                        raise error(message or name)
            await self._wait_for_leaders(list(wanted))

    async def partitions(self, topic: str) -> int:
        if topic not in self._partitions:
            async with self._cluster.errors("read the partitions", right="DESCRIBE", what=topic):
                # Asked by name, a topic that is missing might be created.
                if topic not in await self._admin.list_topics():
                    raise UnknownTopicError(f"{self.url}: there is no topic {topic}")
                self._partitions[topic] = len(await self._durable.partitions_for(topic))
        return self._partitions[topic]

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
        if len(value) > self._settings.max_record_bytes:
            raise RecordTooLargeError(
                f"a record of {len(value)} bytes for {topic} is over the limit of {self._settings.max_record_bytes}"
            )
        producer = self._durable if durable else self._fast
        try:
            sent = await producer.send(topic, value, key=key, partition=partition, headers=list(headers))
        except (kafka.KafkaError, AssertionError) as error:
            raise self._cluster.translated(error, "write", right="WRITE", what=topic) from error
        stored: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        sent.add_done_callback(functools.partial(self._resolve, stored, topic))
        return stored

    async def consume(
        self, topic: str, group: str, *, on_assigned: PartitionsChanged, on_revoked: PartitionsChanged
    ) -> KafkaGroupConsumer:
        client = AIOKafkaConsumer(
            group_id=group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            session_timeout_ms=self._settings.kafka.session_timeout_ms,
            heartbeat_interval_ms=self._settings.kafka.session_timeout_ms // 3,
            # A worker that is full does not poll, and is alive all the same.
            max_poll_interval_ms=NEVER_MS,
            fetch_max_wait_ms=GROUP_FETCH_WAIT_MS,
            **self._reading(),
        )
        read_committed = functools.partial(self._committed, group, topic)
        # A member that was killed holds its partitions until its session times out, and the group waits for it.
        patience = 3 * self._settings.kafka.session_timeout_ms / 1000 + self._settings.kafka.connect_timeout
        consumer = KafkaGroupConsumer(
            self._cluster, client, topic, group, on_assigned, on_revoked, read_committed, patience
        )
        await consumer.start()
        return consumer

    async def read(self, topic: str, positions: Mapping[int, int | None]) -> KafkaReader:
        client = AIOKafkaConsumer(group_id=None, auto_offset_reset="none", **self._reading())
        reader = KafkaReader(self._cluster, client, topic)
        await reader.start(positions)
        return reader

    async def end_offset(self, topic: str, partition: int) -> int:
        reader = await self.read(topic, {partition: None})
        try:
            return reader.position(partition)
        finally:
            await reader.close()

    async def members(self, group: str) -> int:
        async with self._cluster.errors("describe the group", right="DESCRIBE", what=group):
            (response,) = await self._admin.describe_consumer_groups([group])
            described = response.to_object()["groups"][0]
            if described["error_code"] == kafka.GroupIdNotFound.errno:
                return 0
            if described["error_code"]:
                raise kafka.for_code(described["error_code"])(group)
            return len(described["members"])

    async def _committed(self, group: str, topic: str, partition: int) -> Committed | None:
        """Read a group's position with its note, which aiokafka's own `committed` drops."""
        place = TopicPartition(topic, partition)
        async with self._cluster.errors("read offsets", right="DESCRIBE", what=group):
            stored = (await self._admin.list_consumer_group_offsets(group, partitions=[place])).get(place)
        return Committed(stored.offset, stored.metadata) if stored is not None and stored.offset >= 0 else None

    async def _wait_for_leaders(self, topics: list[str]) -> None:
        """Wait until the partitions of new topics can be used."""
        try:
            async with asyncio.timeout(self._settings.kafka.connect_timeout):
                while not all(map(_has_leaders, await self._admin.describe_topics(topics))):  # noqa: ASYNC110 - nobody tells us
                    await asyncio.sleep(PAUSE)
        except TimeoutError:
            raise BrokerError(f"{self.url}: no leaders for all partitions of {', '.join(topics)}") from None

    def _new_topic(self, spec: TopicSpec) -> NewTopic:
        configuration = {
            "retention.ms": str(spec.retention_ms),
            "segment.ms": str(max(1, spec.retention_ms // SEGMENTS)),
        }
        return NewTopic(spec.name, spec.partitions, self._settings.replication_factor, topic_configs=configuration)

    def _reading(self) -> dict[str, Any]:
        room = self._settings.max_record_bytes + HEADER_ROOM
        return {
            "max_partition_fetch_bytes": room,
            "fetch_max_bytes": max(FETCH_BYTES, room),
            **self._cluster.connection,
        }

    def _resolve(self, stored: asyncio.Future[int], topic: str, sent: asyncio.Future[RecordMetadata]) -> None:
        if stored.done():
            return
        if sent.cancelled():
            stored.set_exception(BrokerError(f"{self.url}: closed before the record was stored"))
        elif (error := sent.exception()) is not None:
            stored.set_exception(self._cluster.translated(error, "write", right="WRITE", what=topic))
        else:
            stored.set_result(sent.result().offset)
            return
        stored.exception()  # nobody needs to await it: asyncio should not complain that nobody did


def _has_leaders(topic: Mapping[str, Any]) -> bool:
    partitions = topic["partitions"]
    return not topic["error_code"] and bool(partitions) and all(p["leader"] >= 0 for p in partitions)
