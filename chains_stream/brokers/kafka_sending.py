"""Writing to Kafka: records go straight into the batches that aiokafka sends, each with one future, the caller's.

`AIOKafkaProducer.send` makes two futures of a record, and looks up for each what holds for a whole batch.
"""

import asyncio
import copy
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka import errors as kafka
from aiokafka.producer.message_accumulator import BatchBuilder, MessageBatch
from aiokafka.record.default_records import DefaultRecordBatchBuilder

from chains_stream.brokers.kafka_cluster import PAUSE, Cluster, said
from chains_stream.brokers.kafka_stop import stop
from chains_stream.errors import BrokerError
from chains_stream.log import get_logger
from chains_stream.messages import Headers

FLUSH_SECONDS = 5.0  # for what is unsent when we close

log = get_logger(__name__)

# A batch that was given up leaves a gap in the numbers of an idempotent producer, and so does a leader that lost its
# log's end: the broker refuses all that this producer sends after it.
_GAPS = (
    kafka.OutOfOrderSequenceNumber,
    kafka.InvalidProducerEpoch,
    kafka.ProducerFenced,
    kafka.InvalidProducerIdMapping,
    kafka.UnknownProducerId,
)


class Batch(MessageBatch):  # type: ignore[misc] # aiokafka has no types
    """Records of one partition that are sent together, and the futures of their offsets."""

    def __init__(
        self,
        place: TopicPartition,
        accumulator: Any,
        failed: Callable[[str, BaseException], BrokerError],
        limit: int | None,
    ) -> None:
        """Hold as many bytes as its topic takes at once, if that `limit` is known: else the broker refuses them all."""
        size = accumulator._batch_size  # noqa: SLF001 - it has no other way
        builder = _builder(accumulator, size if limit is None else min(size, limit))
        super().__init__(place, builder, accumulator._batch_ttl, linger_time=0)  # noqa: SLF001 - as above
        self._failed = failed
        self._create_future = asyncio.get_running_loop().create_future
        self._stored: list[asyncio.Future[int]] = []

    def put(self, key: bytes | None, value: bytes, headers: Headers) -> asyncio.Future[int] | None:
        """Add a record; None if it is full, or was given up."""
        if self.future.done():
            return None
        if self._builder.append(timestamp=None, key=key, value=value, headers=list(headers)) is None:
            return None
        stored: asyncio.Future[int] = self._create_future()
        self._stored.append(stored)
        return stored

    def done(self, base_offset: int, timestamp: int | None = None, log_start_offset: int | None = None) -> None:
        super().done(base_offset, timestamp, log_start_offset)
        for offset, stored in enumerate(self._stored, base_offset):
            if not stored.done():
                stored.set_result(offset)

    def failure(self, exception: BaseException) -> None:
        super().failure(exception)
        self.future.exception()  # nobody awaits it: asyncio should not complain that nobody did
        for stored in self._stored:
            if not stored.done():
                stored.set_exception(self._failed(self.tp.topic, exception))
                stored.exception()  # as above


def _builder(accumulator: Any, size: int) -> BatchBuilder:
    """Make what `accumulator.create_builder` does, but for so many bytes."""
    manager = accumulator._txn_manager  # noqa: SLF001 - as above
    transactional = manager is not None and manager.transactional_id is not None
    return BatchBuilder(size, accumulator._compression_type, is_transactional=transactional)  # noqa: SLF001 - as above


def last_batch(
    producer: AIOKafkaProducer,
    place: TopicPartition,
    record: tuple[bytes | None, bytes, Headers],
    failed: Callable[[str, BaseException], BrokerError],
    limits: Mapping[str, int],
) -> Batch:
    """Give the batch that waits to be sent to a place, or a new one that has room for a record. Raises KafkaError.

    `limits` are the bytes that topics take at once, where that is known.
    """
    accumulator = producer._message_accumulator  # noqa: SLF001 - it has no other way
    if accumulator._exception is not None:  # noqa: SLF001 - as above
        raise copy.copy(accumulator._exception)  # noqa: SLF001 - as above
    waiting = accumulator._batches.get(place)  # noqa: SLF001 - as above
    if waiting:
        last: Batch = waiting[-1]
        return last
    # An empty batch takes a record of any size. One with records takes none of more than it has room for.
    key, value, headers = record
    size = DefaultRecordBatchBuilder.estimate_size_in_bytes(key, value, list(headers))
    if size > producer._max_request_size:  # noqa: SLF001 - as above
        raise kafka.MessageSizeTooLargeError(f"it has {size} bytes with its key and headers")
    batch = Batch(place, accumulator, failed, limits.get(place.topic))
    manager = producer._txn_manager  # noqa: SLF001 - as above
    if manager is not None:
        manager.maybe_add_partition_to_txn(place)
    accumulator._batches[place].append(batch)  # noqa: SLF001 - as above
    accumulator._wakeup(accumulator.waiter())  # noqa: SLF001 - as above
    return batch


async def heard_of(producer: AIOKafkaProducer, place: TopicPartition) -> None:
    """Wait until a producer knows a partition, which may have been added. Raises KafkaError."""
    if place.partition not in await producer.client._wait_on_metadata(place.topic):  # noqa: SLF001 - as above
        await producer.client.force_metadata_update()
        if place.partition not in await producer.client._wait_on_metadata(place.topic):  # noqa: SLF001 - as above
            raise kafka.KafkaError(f"the producer has not heard of partition {place.partition} yet")


async def drained(producer: AIOKafkaProducer, batch: Batch) -> None:
    """Wait until a full batch is sent, and another one can be begun. Raises KafkaError."""
    try:
        async with asyncio.timeout(producer._request_timeout_ms / 1000):  # noqa: SLF001 - as `send` of aiokafka
            await batch.wait_drain()
    except TimeoutError:
        raise kafka.KafkaTimeoutError from None


def sends_itself(producer: AIOKafkaProducer) -> AIOKafkaProducer:
    """Have a producer that was not started yet send as we do; see `_send_waiting`."""
    producer._sender._sender_routine = functools.partial(_send_waiting, producer._sender)  # noqa: SLF001 - as above
    return producer


class Sender:
    """A producer of aiokafka, replaced by a new one when it can send no more."""

    def __init__(self, cluster: Cluster, make: Callable[..., AIOKafkaProducer], **options: Any) -> None:
        self._cluster = cluster
        self._make = functools.partial(make, **options)
        self.producer: AIOKafkaProducer | None = None
        self._replacing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self.producer = self._new()
        await self.producer.start()

    def put(
        self, place: tuple[str, int], key: bytes | None, value: bytes, headers: Headers
    ) -> asyncio.Future[int] | None:
        """Add a record to what waits to be sent to its topic and partition; None if nothing does, or it is full."""
        if self.producer is None:
            return None
        waiting = self.producer._message_accumulator._batches.get(place)  # noqa: SLF001 - as above
        return waiting[-1].put(key, value, headers) if waiting else None

    async def send(
        self, place: TopicPartition, key: bytes | None, value: bytes, headers: Headers
    ) -> asyncio.Future[int]:
        """Add a record to what is sent next, or wait for room. Raises KafkaError."""
        while True:
            producer = self.producer or await self._ready()
            await heard_of(producer, place)
            replaced = producer is not self.producer
            if replaced:
                continue
            batch = last_batch(producer, place, (key, value, headers), self._failed, self._cluster.limits)
            stored = batch.put(key, value, headers)
            if stored is not None:
                return stored
            await drained(producer, batch)

    def _new(self) -> AIOKafkaProducer:
        return sends_itself(self._make())

    async def _ready(self) -> AIOKafkaProducer:
        """Wait for a producer that can send. Raises ProducerClosed."""
        if self._replacing is not None:
            await asyncio.wait([self._replacing])
        if self.producer is None:
            raise kafka.ProducerClosed
        return self.producer

    def _failed(self, topic: str, error: BaseException) -> BrokerError:
        """Take note of an error in sending, mend what made it, and say it in our words."""
        if self.producer is not None and self._replacing is None:
            dead = self.producer._sender.sender_task.done()  # noqa: SLF001 - it tells nobody that it has ended
            if dead or isinstance(error, _GAPS):
                log.warning("producer.replaced", reason=said(error))
                self._replacing = asyncio.create_task(self._replace(), name="replace producer")
                self._replacing.add_done_callback(self._replaced)
        return self._cluster.translated(error, "write", right="WRITE", what=topic)

    async def close(self) -> None:
        if self._replacing is not None:
            self._replacing.cancel()
            await asyncio.wait([self._replacing])
        producer, self.producer = self.producer, None
        if producer is not None:
            await self._stop(producer)

    async def _replace(self) -> None:
        """All that the old producer still holds ends first: so records keep their order."""
        old, self.producer = self.producer, None
        assert old is not None, "it failed"
        await self._stop(old)
        while self.producer is None:
            await self._cluster.find_a_server()
            producer = self._new()
            try:
                await producer.start()
            except (kafka.KafkaError, OSError) as error:
                log.info("producer.waiting", reason=said(error))
                await stop(producer)
                await asyncio.sleep(PAUSE)
            except BaseException:
                await stop(producer)
                raise
            else:
                self.producer = producer

    def _replaced(self, task: asyncio.Task[None]) -> None:
        self._replacing = None
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("producer.lost", exc_info=error)

    async def _stop(self, producer: AIOKafkaProducer) -> None:
        try:
            async with asyncio.timeout(FLUSH_SECONDS):
                await producer.flush()
        except TimeoutError:
            log.warning("producer.unsent", reason=f"the broker stored nothing more within {FLUSH_SECONDS:g} s")
        finally:
            # An idempotent producer gives no record up, and its `stop` would wait for a broker that is gone.
            unsent = kafka.KafkaConnectionError("closed before the record was stored")
            producer._message_accumulator.fail_all(unsent)  # noqa: SLF001 - it has no other way
            await stop(producer)


class _Coordination:
    """What a producer with transactions asks of its coordinator, one thing after the other."""

    def __init__(self, sender: Any, requests: set[asyncio.Task[None]], wake: Callable[[object], None]) -> None:
        manager = sender._txn_manager  # noqa: SLF001 - as above
        self._manager = manager if manager is not None and manager.transactional_id is not None else None
        self._next = sender._maybe_do_transactional_request  # noqa: SLF001 - as above
        self._requests = requests
        self._wake = wake
        self._asked: asyncio.Task[None] | None = None
        if self._manager is not None:
            self._manager.notify_task_waiter = functools.partial(wake, None)

    def advance(self) -> Collection[TopicPartition]:
        """Ask what is next, and give the partitions that the coordinator has to know of before they are written to."""
        if self._manager is None:
            return ()
        if self._asked is None or self._asked.done():
            self._asked = self._next()
            if self._asked is not None:
                self._asked.add_done_callback(self._wake)
                self._requests.add(self._asked)
        unknown: set[TopicPartition] = self._manager.partitions_to_add()
        return unknown


async def _send_waiting(sender: Any) -> None:
    """Send what waits, one request to each broker at a time, as a `Sender` of aiokafka does.

    It awaits one future alone, which new records and ended requests resolve. aiokafka has `asyncio.wait` do that, which
    costs a turn of the loop before a record is sent, and a good part of the CPU of a request.
    """
    accumulator, client = sender._message_accumulator, sender.client  # noqa: SLF001 - as above
    in_flight, muted = sender._in_flight, sender._muted_partitions  # noqa: SLF001 - as above
    requests: set[asyncio.Task[None]] = set()

    def wake(_: object) -> None:
        accumulator._wakeup(accumulator.waiter())  # noqa: SLF001 - as above

    coordination = _Coordination(sender, requests, wake)
    try:
        while True:
            await sender._maybe_wait_for_pid()  # noqa: SLF001 - as above
            for request in [request for request in requests if request.done()]:
                requests.discard(request)
                request.result()
            waiting = muted.union(coordination.advance())
            batches, leaderless = accumulator.drain_by_nodes(ignore_nodes=in_flight, muted_partitions=waiting)
            for node, of_node in batches.items():
                in_flight.add(node)
                muted.update(of_node)
                request = asyncio.create_task(sender._send_produce_req(node, of_node), name="produce")  # noqa: SLF001 - as above
                request.add_done_callback(wake)
                requests.add(request)
            if leaderless:
                client.force_metadata_update().add_done_callback(wake)
            await accumulator.waiter()
    except asyncio.CancelledError:
        return  # `Sender.close` takes it for an error of its own otherwise
    except kafka.KafkaError:
        raise
    except Exception as error:
        log.exception("producer.defect")
        raise kafka.KafkaError(f"sending broke down: {error!r}") from error
    finally:
        await _broken_off(requests)


async def _broken_off(requests: Collection[asyncio.Task[None]]) -> None:
    """Wait for what is under way, which nobody waits for any more; if that takes too long for somebody, end it."""
    try:
        if requests:
            await asyncio.wait(requests)
    except asyncio.CancelledError:
        for request in requests:
            request.cancel()
        await asyncio.wait(requests)
    failed = [error for request in requests if not request.cancelled() and (error := request.exception())]
    if failed:
        log.info("producer.broken_off", reason="; ".join(map(said, failed)))
