"""Apache Kafka, through aiokafka: the only module that imports it.

Facts about aiokafka that this rests on: a producer has one request to each broker under way, so requests and results
(durable) and chunks (fast) have producers of their own; a consumer fetches a partition again only when what it got of
it is read, so records are moved to a queue of ours at once; exceptions in a rebalance listener are only logged, so they
are kept here and raised by `fetch`.
"""

import asyncio
import functools
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener, ConsumerRecord, TopicPartition
from aiokafka import errors as kafka
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.conn import create_conn
from aiokafka.helpers import create_ssl_context
from aiokafka.structs import OffsetAndMetadata, RecordMetadata

from chains_stream.broker import Committed, PartitionsChanged, Record, TopicSpec
from chains_stream.errors import (
    BrokerAuthorizationError,
    BrokerError,
    ChainsUsageError,
    OffsetExpiredError,
    RecordTooLargeError,
)
from chains_stream.log import get_logger
from chains_stream.messages import Headers
from chains_stream.settings import KafkaSettings, Settings

QUEUE_RECORDS = 1000  # fetched and not yet taken, a consumer
FETCH_BYTES = 8 << 20  # a fetch, over all partitions
HEADER_ROOM = 64 << 10  # bytes in a produce request beside the value
BATCH_BYTES = 128 << 10  # records of one partition that go out together
SEGMENTS = 4  # that a topic's retention is cut into: a log is trimmed by whole segments
GROUP_FETCH_WAIT_MS = 100  # a partition that was just drained waits out the running fetch
NEVER_MS = 2**31 - 1
PAUSE = 0.1  # seconds before asking a broker again that is not ready

log = get_logger(__name__)


class KafkaBroker:
    """A Kafka cluster."""

    def __init__(self, servers: Sequence[str], settings: Settings) -> None:
        self._servers = list(servers)
        self._settings = settings
        self._connection = connection_arguments(settings.kafka)
        self._clients: list[Any] = []
        self._partitions: dict[str, int] = {}  # of topics, once known; they may grow, and never shrink
        self._admin: AIOKafkaAdminClient
        self._durable: AIOKafkaProducer
        self._fast: AIOKafkaProducer

    @property
    def url(self) -> str:
        return f"kafka://{','.join(self._servers)}"

    @property
    def max_record_bytes(self) -> int:
        return self._settings.max_record_bytes

    async def start(self) -> None:
        await self._find_a_server()
        common = {"bootstrap_servers": self._servers, **self._connection}
        sending = {
            "linger_ms": 0,
            "max_batch_size": BATCH_BYTES,
            "max_request_size": self._settings.max_record_bytes + HEADER_ROOM,
        }
        # Each is started as soon as it is made, and stopped even if its start fails.
        async with self.errors("write to", right="WRITE on a topic, or IDEMPOTENT_WRITE,", what="the cluster"):
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
            try:
                await self._clients.pop()()
            except kafka.KafkaError as error:
                log.warning("broker.close_failed", broker=self.url, reason=_said(error))

    async def ensure_topics(self, topics: Sequence[TopicSpec]) -> None:
        wanted = {spec.name: spec for spec in topics}
        if not wanted:
            return
        async with self.errors("create topics", right="CREATE", what=", ".join(wanted)):
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
            async with self.errors("read the partitions", right="DESCRIBE", what=topic):
                # Asked by name, a topic that is missing might be created.
                if topic not in await self._admin.list_topics():
                    raise BrokerError(f"{self.url}: there is no topic {topic}")
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
            raise self.translated(error, "write", right="WRITE", what=topic) from error
        stored: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        sent.add_done_callback(functools.partial(self._resolve, stored, topic))
        return stored

    async def consume(
        self, topic: str, group: str, *, on_assigned: PartitionsChanged, on_revoked: PartitionsChanged
    ) -> "KafkaGroupConsumer":
        client = AIOKafkaConsumer(
            bootstrap_servers=self._servers,
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
        # A member that was killed holds its partitions until its session times out, and the group waits for it.
        patience = 3 * self._settings.kafka.session_timeout_ms / 1000 + self._settings.kafka.connect_timeout
        consumer = KafkaGroupConsumer(self, client, topic, group, on_assigned, on_revoked, patience)
        await consumer.start()
        return consumer

    async def read(self, topic: str, positions: Mapping[int, int | None]) -> "KafkaReader":
        client = AIOKafkaConsumer(
            bootstrap_servers=self._servers, group_id=None, auto_offset_reset="none", **self._reading()
        )
        reader = KafkaReader(self, client, topic)
        await reader.start(positions)
        return reader

    async def end_offset(self, topic: str, partition: int) -> int:
        reader = await self.read(topic, {partition: None})
        try:
            return reader.position(partition)
        finally:
            await reader.close()

    async def members(self, group: str) -> int:
        async with self.errors("describe the group", right="DESCRIBE", what=group):
            (response,) = await self._admin.describe_consumer_groups([group])
            described = response.to_object()["groups"][0]
            if described["error_code"] == kafka.GroupIdNotFound.errno:
                return 0
            if described["error_code"]:
                raise kafka.for_code(described["error_code"])(group)
            return len(described["members"])

    async def committed(self, group: str, topic: str, partition: int) -> Committed | None:
        """Read a group's position with its note, which aiokafka's own `committed` drops."""
        place = TopicPartition(topic, partition)
        async with self.errors("read offsets", right="DESCRIBE", what=group):
            stored = (await self._admin.list_consumer_group_offsets(group, partitions=[place])).get(place)
        return Committed(stored.offset, stored.metadata) if stored is not None and stored.offset >= 0 else None

    def errors(self, doing: str, *, right: str = "", what: str = "") -> "_Errors":
        """Translate aiokafka's errors inside the block; `right` is the ACL that `doing` this to `what` needs."""
        return _Errors(self, doing, right, what)

    def translated(self, error: BaseException, doing: str, *, right: str, what: str) -> BrokerError:
        """Say in one line what aiokafka's error means to somebody who runs this."""
        if isinstance(error, BrokerError):
            return error
        kind: type[BrokerError] = BrokerError
        match error:
            case (
                kafka.TopicAuthorizationFailedError()
                | kafka.GroupAuthorizationFailedError()
                | kafka.ClusterAuthorizationFailedError()
            ):
                kind = BrokerAuthorizationError
                text = f"{self.url} does not let us {doing} {what}: the right {right} is missing"
            case kafka.MessageSizeTooLargeError() | kafka.RecordListTooLargeError():
                kind = RecordTooLargeError
                text = f"{self.url} takes no record of this size for {what}: {_said(error)}"
            case kafka.OffsetOutOfRangeError() | kafka.NoOffsetForPartitionError():
                kind = OffsetExpiredError
                text = f"{self.url} no longer holds the offset asked for of {what}"
            case kafka.KafkaConnectionError():
                wants = "if it wants TLS or SASL, set CHAINS_KAFKA_SECURITY_PROTOCOL"
                text = f"{self.url} closed the connection ({_said(error)}); {wants}"
            case kafka.UnknownTopicOrPartitionError():
                text = f"{self.url}: there is no such topic or partition: {what}"
            case _:
                text = f"{self.url} failed to {doing} {what}".rstrip() + f": {_said(error)}"
        return kind(text)

    async def _find_a_server(self) -> None:
        """Wait until one server answers, for as long as `connect_timeout`, and say why if none does."""
        timeout = self._settings.kafka.connect_timeout
        reasons: dict[str, str] = {}
        try:
            async with asyncio.timeout(timeout):
                while not await self._any_answers(reasons):  # noqa: ASYNC110 - nobody tells us when a broker is up
                    await asyncio.sleep(PAUSE)
        except TimeoutError:
            said = "; ".join(f"{server}: {reason}" for server, reason in reasons.items()) or "no answer"
            raise BrokerError(f"no Kafka broker answered at {self.url} within {timeout:g} s ({said})") from None

    async def _any_answers(self, reasons: dict[str, str]) -> bool:
        for server in self._servers:
            host, _, port = server.rpartition(":")
            try:
                connection = await create_conn(host.strip("[]"), int(port), **self._connection)
            except (kafka.SaslAuthenticationFailed, kafka.AuthenticationFailedError) as error:
                raise BrokerAuthorizationError(
                    f"{self.url} refused the credentials of {self._settings.kafka.sasl_username}: {_said(error)}"
                ) from None
            except (kafka.UnsupportedSaslMechanismError, ssl.SSLError) as error:
                raise BrokerError(f"{self.url} refused the connection: {_said(error)}") from None
            except (OSError, kafka.KafkaError) as error:
                if not reasons:
                    log.info("broker.waiting", broker=self.url, reason=_said(error))
                reasons[server] = _said(error)
            else:
                connection.close()
                return True
        return False

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
        return {"max_partition_fetch_bytes": room, "fetch_max_bytes": max(FETCH_BYTES, room), **self._connection}

    def _resolve(self, stored: asyncio.Future[int], topic: str, sent: asyncio.Future[RecordMetadata]) -> None:
        if stored.done():
            return
        if sent.cancelled():
            stored.set_exception(BrokerError(f"{self.url}: closed before the record was stored"))
        elif (error := sent.exception()) is not None:
            stored.set_exception(self.translated(error, "write", right="WRITE", what=topic))
        else:
            stored.set_result(sent.result().offset)
            return
        stored.exception()  # nobody needs to await it: asyncio should not complain that nobody did


class _Errors:
    """Translates what aiokafka raises inside the block."""

    def __init__(self, broker: KafkaBroker, doing: str, right: str, what: str) -> None:
        self._broker = broker
        self._doing = doing
        self._right = right
        self._what = what

    async def __aenter__(self) -> None: ...

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, kafka.KafkaError | OSError):
            raise self._broker.translated(error, self._doing, right=self._right, what=self._what) from error


class _Queue:
    """Moves records from aiokafka's buffers to a queue of ours as they come, up to a bound."""

    def __init__(self, broker: KafkaBroker, client: AIOKafkaConsumer, topic: str) -> None:
        self._broker = broker
        self._client = client
        self._topic = topic
        self._records: deque[Record] = deque()
        self._error: BrokerError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._taken = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._when_failed: Callable[[BrokerError], None] = lambda _: None

    def on_failure(self, callback: Callable[[BrokerError], None]) -> None:
        self._when_failed = callback

    def start(self) -> None:
        self._task = asyncio.create_task(self._fill(), name=f"fetch {self._topic}")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def fail(self, error: BrokerError) -> None:
        self._error = error
        self._when_failed(error)
        self._wake()

    def clear(self) -> None:
        self._records.clear()
        self._taken.set()

    async def take(self, limit: int) -> list[Record]:
        while not self._records:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        records = self._records
        taken = [records.popleft() for _ in range(min(limit, len(records)))]
        if len(records) < QUEUE_RECORDS:
            self._taken.set()
        return taken

    async def _fill(self) -> None:
        while True:
            while len(self._records) >= QUEUE_RECORDS:
                self._taken.clear()
                await self._taken.wait()
            try:
                fetched = await self._client.getmany(timeout_ms=1000)
            except kafka.KafkaError as error:
                if getattr(error, "retriable", False):
                    log.info("fetch.retry", topic=self._topic, reason=_said(error))
                    await asyncio.sleep(PAUSE)
                    continue
                self.fail(self._broker.translated(error, "read", right="READ", what=self._topic))
                return
            for records in fetched.values():
                self._records.extend(map(_record, records))
            if fetched:
                self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class KafkaReader:
    """Follows named partitions."""

    def __init__(self, broker: KafkaBroker, client: AIOKafkaConsumer, topic: str) -> None:
        self._broker = broker
        self._client = client
        self._topic = topic
        self._queue = _Queue(broker, client, topic)
        self._positions: dict[int, int] = {}

    async def start(self, positions: Mapping[int, int | None]) -> None:
        places = [TopicPartition(self._topic, partition) for partition in positions]
        try:
            async with self._broker.errors("read", right="READ", what=self._topic):
                # Assigned only once the positions are known: else aiokafka goes looking for committed ones.
                await self._client.start()
                await self._client._client.set_topics([self._topic])  # noqa: SLF001 - its `assign` would do it too late
                ends = await self._client.end_offsets(places)
                self._client.assign(places)
                for place in places:
                    offset = positions[place.partition]
                    self._positions[place.partition] = ends[place] if offset is None else offset
                    self._client.seek(place, self._positions[place.partition])
        except BaseException:
            await self._client.stop()
            raise
        self._queue.start()

    def position(self, partition: int) -> int:
        return self._positions[partition]

    async def fetch(self) -> list[Record]:
        records = await self._queue.take(QUEUE_RECORDS)
        for record in records:
            self._positions[record.partition] = record.offset + 1
        return records

    async def close(self) -> None:
        await self._queue.stop()
        await self._client.stop()


class KafkaGroupConsumer(ConsumerRebalanceListener):  # type: ignore[misc] # aiokafka has no types
    """A member of a group on one topic."""

    def __init__(  # noqa: PLR0917 - called in one place
        self,
        broker: KafkaBroker,
        client: AIOKafkaConsumer,
        topic: str,
        group: str,
        on_assigned: PartitionsChanged,
        on_revoked: PartitionsChanged,
        patience: float,
    ) -> None:
        self._broker = broker
        self._client = client
        self._topic = topic
        self._group = group
        self._on_assigned = on_assigned
        self._on_revoked = on_revoked
        self._queue = _Queue(broker, client, topic)
        self._held: frozenset[int] = frozenset()
        self._patience = patience
        self._joined: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.on_failure(self._not_joined)

    async def start(self) -> None:
        """Join, and wait for the first assignment."""
        try:
            async with self._broker.errors("join the group", right="READ", what=self._group):
                self._client.subscribe([self._topic], listener=self)
                await self._client.start()
            self._queue.start()
            await self._first_assignment()
        except BaseException:
            await self.close()
            raise

    async def fetch(self, max_records: int) -> list[Record]:
        return await self._queue.take(max_records)

    async def commit(self, positions: Mapping[int, Committed]) -> None:
        offsets = {
            TopicPartition(self._topic, partition): OffsetAndMetadata(committed.offset, committed.metadata)
            for partition, committed in positions.items()
            if partition in self._held
        }
        if not offsets:
            return
        try:
            async with self._broker.errors("commit", right="READ", what=self._group):
                await self._client.commit(offsets)
        except BrokerError as error:
            if not isinstance(error.__cause__, _LOST):
                raise
            log.info("commit.too_late", topic=self._topic, reason=_said(error.__cause__))

    async def committed(self, partition: int) -> Committed | None:
        return await self._broker.committed(self._group, self._topic, partition)

    async def close(self) -> None:
        if self._held:
            await self.on_partitions_revoked([TopicPartition(self._topic, partition) for partition in self._held])
        await self._queue.stop()
        await self._client.stop()

    async def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:  # noqa: ARG002 - eager: it is all
        self._queue.clear()
        if self._held:
            await self._tell(self._on_revoked(self._held))
        self._held = frozenset()

    async def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        self._held = frozenset(place.partition for place in assigned)
        await self._tell(self._on_assigned(self._held))
        if not self._joined.done():
            self._joined.set_result(None)

    def _not_joined(self, error: BrokerError) -> None:
        if not self._joined.done():
            self._joined.set_exception(error)

    async def _tell(self, callback: Awaitable[None]) -> None:
        try:
            await callback
        except Exception as error:
            log.exception("broker.callback_failed", topic=self._topic)
            self._queue.fail(BrokerError(f"{self._topic}: a callback of the consumer failed: {error!r}"))

    async def _first_assignment(self) -> None:
        try:
            async with asyncio.timeout(self._patience):
                await self._joined
        except TimeoutError:
            reason = f"no partitions of {self._topic} were assigned within {self._patience:g} s"
            raise BrokerError(f"{self._broker.url}: {reason}") from None


# A commit that comes too late: the partitions are another member's, which takes the records up again.
_LOST = (
    kafka.CommitFailedError,
    kafka.IllegalGenerationError,
    kafka.IllegalStateError,
    kafka.RebalanceInProgressError,
    kafka.UnknownMemberIdError,
)


def connection_arguments(settings: KafkaSettings) -> dict[str, Any]:
    """Give the arguments for TLS and SASL that every client of aiokafka takes. Raises ChainsUsageError."""
    arguments: dict[str, Any] = {"security_protocol": settings.security_protocol}
    if "SSL" in settings.security_protocol.split("_"):
        try:
            arguments["ssl_context"] = create_ssl_context(
                cafile=settings.ssl_cafile,
                certfile=settings.ssl_certfile,
                keyfile=settings.ssl_keyfile,
                password=settings.ssl_password.get_secret_value() if settings.ssl_password else None,
            )
        except (OSError, ssl.SSLError) as error:
            raise ChainsUsageError(f"the TLS files of the settings kafka_ssl_… can't be used: {error}") from None
    if settings.security_protocol.startswith("SASL"):
        if settings.sasl_username is None or settings.sasl_password is None:
            raise ChainsUsageError(
                f"the security protocol {settings.security_protocol} needs a user: "
                "set CHAINS_KAFKA_SASL_USERNAME and CHAINS_KAFKA_SASL_PASSWORD"
            )
        arguments["sasl_mechanism"] = settings.sasl_mechanism or "PLAIN"
        arguments["sasl_plain_username"] = settings.sasl_username
        arguments["sasl_plain_password"] = settings.sasl_password.get_secret_value()
    elif settings.sasl_username is not None:
        raise ChainsUsageError(
            f"a SASL user is set, and the security protocol {settings.security_protocol} has none: "
            "set CHAINS_KAFKA_SECURITY_PROTOCOL to SASL_SSL or SASL_PLAINTEXT"
        )
    return arguments


def _record(record: ConsumerRecord) -> Record:
    return Record(
        record.topic,
        record.partition,
        record.offset,
        record.timestamp,
        record.key,
        record.value or b"",
        record.headers,
    )


def _has_leaders(topic: Mapping[str, Any]) -> bool:
    partitions = topic["partitions"]
    return not topic["error_code"] and bool(partitions) and all(p["leader"] >= 0 for p in partitions)


def _said(error: BaseException) -> str:
    """Give an error's own words on one line, or its name if it has none."""
    text = " ".join(str(error).split())
    return text or type(error).__name__
