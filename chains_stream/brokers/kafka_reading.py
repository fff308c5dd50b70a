"""Reading from Kafka: records are moved out of aiokafka's buffers at once, into a queue of ours."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, ConsumerRecord, TopicPartition
from aiokafka import errors as kafka
from aiokafka.structs import OffsetAndMetadata

from chains_stream.broker import Committed, PartitionsChanged, Record
from chains_stream.brokers.kafka_cluster import PAUSE, Cluster, said
from chains_stream.errors import BrokerError
from chains_stream.log import get_logger

QUEUE_RECORDS = 1000  # fetched and not yet taken, a consumer; one more fetch may come on top
QUEUE_BYTES = 16 << 20
PATIENCE = 5.0  # seconds for a commit, or for leaving: aiokafka would try for as long as the broker is away

log = get_logger(__name__)

# A commit that comes too late: the partitions are another member's, which takes the records up again.
_LOST = (
    kafka.CommitFailedError,
    kafka.IllegalGenerationError,
    kafka.IllegalStateError,
    kafka.RebalanceInProgressError,
    kafka.UnknownMemberIdError,
)


class Queue:
    """Moves records from aiokafka's buffers to a queue of ours as they come, up to a bound."""

    def __init__(self, cluster: Cluster, client: AIOKafkaConsumer, topic: str) -> None:
        self._cluster = cluster
        self._client = client
        self._topic = topic
        self._records: deque[Record] = deque()
        self._error: BrokerError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._size = 0  # bytes of their values
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
        self._size = 0
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
        self._size -= sum(len(record.value) for record in taken)
        if not self._full():
            self._taken.set()
        return taken

    def _full(self) -> bool:
        return len(self._records) >= QUEUE_RECORDS or self._size >= QUEUE_BYTES

    async def _fill(self) -> None:
        while True:
            while self._full():
                self._taken.clear()
                await self._taken.wait()
            try:
                fetched = await self._client.getmany(timeout_ms=1000)
            except kafka.KafkaError as error:
                if getattr(error, "retriable", False):
                    log.info("fetch.retry", topic=self._topic, reason=said(error))
                    await asyncio.sleep(PAUSE)
                    continue
                self.fail(self._cluster.translated(error, "read", right="READ", what=self._topic))
                return
            except Exception as error:  # noqa: BLE001 - whatever it is, `fetch` has to say so
                self.fail(BrokerError(f"{self._cluster.url}: {self._topic} can't be read: {error!r}"))
                return
            for records in fetched.values():
                self._records.extend(map(_record, records))
                self._size += sum(len(record.value or b"") for record in records)
            if fetched:
                self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class KafkaReader:
    """Follows named partitions."""

    def __init__(self, cluster: Cluster, client: AIOKafkaConsumer, topic: str) -> None:
        self._cluster = cluster
        self._client = client
        self._topic = topic
        self._queue = Queue(cluster, client, topic)
        self._positions: dict[int, int] = {}

    async def start(self, positions: Mapping[int, int | None]) -> None:
        places = [TopicPartition(self._topic, partition) for partition in positions]
        try:
            async with self._cluster.errors("read", right="READ", what=self._topic):
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
            await _stop(self._client)
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
        await _stop(self._client)


class KafkaGroupConsumer(ConsumerRebalanceListener):  # type: ignore[misc] # aiokafka has no types
    """A member of a group on one topic."""

    def __init__(  # noqa: PLR0917 - called in one place
        self,
        cluster: Cluster,
        client: AIOKafkaConsumer,
        topic: str,
        group: str,
        on_assigned: PartitionsChanged,
        on_revoked: PartitionsChanged,
        read_committed: Callable[[int], Awaitable[Committed | None]],
        patience: float,
    ) -> None:
        self._cluster = cluster
        self._client = client
        self._topic = topic
        self._group = group
        self._on_assigned = on_assigned
        self._on_revoked = on_revoked
        self._queue = Queue(cluster, client, topic)
        self._held: frozenset[int] = frozenset()
        self._read_committed = read_committed
        self._committing = asyncio.Lock()
        self._patience = patience
        self._joined: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.on_failure(self._not_joined)

    async def start(self) -> None:
        """Join, and wait for the first assignment."""
        try:
            async with self._cluster.errors("join the group", right="READ", what=self._group):
                self._client.subscribe([self._topic], listener=self)
                await self._client.start()
            self._queue.start()
            await self._first_assignment()
        except BaseException:
            await self.close()
            raise

    async def fetch(self, max_records: int) -> list[Record]:
        return await self._queue.take(max_records)

    async def commit(self, positions: Mapping[int, Committed]) -> frozenset[int]:
        offsets = {
            TopicPartition(self._topic, partition): OffsetAndMetadata(committed.offset, committed.metadata)
            for partition, committed in positions.items()
            if partition in self._held
        }
        if not offsets:
            return frozenset()
        try:
            translated = self._cluster.errors("commit", right="READ", what=self._group)
            # One after the other: an older position must not come after a newer one.
            async with translated, asyncio.timeout(PATIENCE), self._committing:
                await self._client.commit(offsets)
        except BrokerError as error:
            if not isinstance(error.__cause__, _LOST):
                raise
            log.info("commit.too_late", topic=self._topic, reason=said(error.__cause__))
            return frozenset()
        return frozenset(place.partition for place in offsets)

    async def committed(self, partition: int) -> Committed | None:
        return await self._read_committed(partition)

    async def close(self) -> None:
        if self._held:
            await self.on_partitions_revoked([TopicPartition(self._topic, partition) for partition in self._held])
        await self._queue.stop()
        await _stop(self._client)

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
            raise BrokerError(f"{self._cluster.url}: {reason}") from None


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


async def _stop(consumer: AIOKafkaConsumer) -> None:
    """Stop a consumer, within a time.

    While the broker is away, aiokafka lets the cancellation of a task of its own come out of it.
    """
    try:
        async with asyncio.timeout(PATIENCE):
            await consumer.stop()
            return
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
    except TimeoutError:
        log.warning("consumer.not_stopped", seconds=PATIENCE)
    await consumer._client.close()  # noqa: SLF001 - what `stop` did not get to
