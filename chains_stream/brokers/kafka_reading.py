"""Reading from Kafka: records are moved out of aiokafka's buffers at once, into a buffer of ours.

Facts about aiokafka that this rests on: a consumer fetches a partition again only when what it got of it is read, so it
is read where the answer to a fetch is taken apart, some turns of the loop before `getmany` would give it. A consumer
whose inner tasks ended goes on in silence, so they are watched, and a new one takes its place.
"""

import asyncio
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka import errors as kafka
from aiokafka.consumer.fetcher import FetchResult

from chains_stream.broker import Isolation, Record
from chains_stream.brokers.buffer import Buffer
from chains_stream.brokers.kafka_cluster import FINAL, Cluster, said, to_the_end
from chains_stream.brokers.kafka_stop import stop
from chains_stream.brokers.kafka_watch import Watch
from chains_stream.errors import BrokerError
from chains_stream.log import get_logger

BUFFER_RECORDS = 1000  # fetched and not yet taken, a consumer
BUFFER_BYTES = 16 << 20  # of values
POLL_SECONDS = 1.0  # how soon errors of a group are noticed
RECONNECT_SECONDS = 0.5  # before a consumer that broke is replaced
MAX_FAILURES = 5  # in a row, of a kind that aiokafka does not know to pass
_NO_PARTITION = TopicPartition("", -1)

log = get_logger(__name__)

MakeConsumer = Callable[..., AIOKafkaConsumer]


class Feed(ABC):
    """Keeps a consumer of aiokafka at work, and moves what it fetches to a buffer.

    Brokers that restart and leaders that move are aiokafka's to get over; what breaks it is got over by another one.
    """

    def __init__(self, cluster: Cluster, make: MakeConsumer, topic: str, isolation: Isolation) -> None:
        self._cluster = cluster
        self._make = make
        self._topic = topic
        self._isolation: Isolation = isolation
        self._buffer = Buffer(BUFFER_RECORDS, BUFFER_BYTES)
        self._client: AIOKafkaConsumer | None = None
        self._task: asyncio.Task[None] | None = None
        self._watch: Watch | None = None
        self._watching: asyncio.Task[None] | None = None
        self._broken: Exception | None = None  # met outside of the task, for it to deal with
        self._left = asyncio.Event()  # something was fetched, or met, that is for the task to deal with
        self._failures = 0
        self._reason = ""  # why it was opened anew, until it has its partitions

    async def start(self) -> None:
        """Connect, and begin to fetch. Raises BrokerError."""
        try:
            async with asyncio.timeout(self._cluster.patience):
                self._client = await self._open()
        except TimeoutError:
            raise self._cluster.unreachable() from None
        except (kafka.KafkaError, OSError) as error:
            raise self._translated(error) from error
        self._task = asyncio.create_task(self._run(), name=f"fetch {self._topic}")
        self._watch = Watch(
            functools.partial(self._cluster.ends, self._topic, self._watched(), self._isolation),
            (self._cluster.url, self._topic),
            self._moving,
            self._stalled,
            patience=self._patience(),
        )
        self._watching = asyncio.create_task(self._watch.run(), name=f"watch {self._topic}")
        self._watching.add_done_callback(_watched_no_more)

    def trouble(self) -> str | None:
        """Say what has kept it from moving on for too long."""
        if self._watch is None or self._watching is None:
            return None
        if self._watching.done():
            error = None if self._watching.cancelled() else self._watching.exception()
            return f"{self._cluster.url}: nobody watches over {self._topic} any more: {error!r}"
        return self._watch.trouble()

    async def close(self) -> None:
        await to_the_end(self._close())

    async def _close(self) -> None:
        self._watch = None
        for task in (self._watching, self._task):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        await self._leave()
        if self._client is not None:
            await stop(self._client)
            self._client = None
        self._buffer.clear()
        self._fail(BrokerError(f"{self._topic}: the consumer was closed"))

    @abstractmethod
    async def _open(self) -> AIOKafkaConsumer:
        """Make a consumer that goes on where the last one stopped."""

    @abstractmethod
    def _watched(self) -> Collection[int]:
        """Give the partitions that it may ever fetch."""

    @abstractmethod
    def _fetching(self) -> Collection[int] | None:
        """Give the partitions that it should fetch now; None while that is open."""

    def _patience(self) -> float:
        """Give the seconds that it may be without partitions."""
        return self._cluster.patience

    def _moving(self) -> dict[int, int] | str:
        """Give the positions that should move on now, where there is more, or why that is open."""
        partitions = self._fetching()
        if partitions is None or self._client is None:
            return self._reason or "they are being dealt out"
        return {} if self._buffer.full else self._positions_of(self._client, partitions)

    def _positions_of(self, client: AIOKafkaConsumer, partitions: Collection[int]) -> dict[int, int]:
        assignment = client._subscription.subscription.assignment  # noqa: SLF001 - its `position` would wait
        states = {partition: assignment.state_value(TopicPartition(self._topic, partition)) for partition in partitions}
        return {number: at.position for number, at in states.items() if at.has_valid_position and not at.paused}

    def _stalled(self, trouble: str) -> None:
        self._broken = BrokerError(trouble)

    async def _leave(self) -> None:  # noqa: B027 - a reader holds nothing
        """Let go of what the consumer holds, before it is stopped."""

    def _fail(self, error: BrokerError) -> None:
        self._buffer.fail(error)

    def _translated(self, error: BaseException) -> BrokerError:
        return self._cluster.translated(error, "read", right="READ", what=self._topic)

    async def _run(self) -> None:
        try:
            while True:
                try:
                    await self._move()
                except Exception as error:  # noqa: BLE001 - whatever broke inside aiokafka, another one may do
                    broken, self._broken = self._broken, None
                    self._get_over(broken or error)
                await self._replace()
        except (kafka.KafkaError, OSError, BrokerError) as error:
            self._fail(self._translated(error))
        except Exception as error:
            log.exception("fetch.defect", topic=self._topic)
            self._fail(BrokerError(f"{self._cluster.url}: fetching {self._topic} broke down: {error!r}"))

    async def _move(self) -> None:
        client = self._client
        assert client is not None, "opened"
        while True:
            if self._broken is not None:
                raise self._broken
            if self._buffer.full:
                await client.getmany(_NO_PARTITION)  # for the group's errors alone
                await self._buffer.wait_for_room(POLL_SECONDS)
                continue
            self._left.clear()
            self._put(client, await client.getmany(max_records=self._buffer.room))
            if client._fetcher.error_future.done():  # noqa: SLF001 - it tells nobody that its task has ended
                raise kafka.KafkaError("the fetching task of aiokafka ended")
            if not client._fetcher._records:  # noqa: SLF001 - else there was no room, or an error comes after the records
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_SECONDS):
                        await self._left.wait()

    def _put(self, client: AIOKafkaConsumer, fetched: Mapping[TopicPartition, Sequence[Record]]) -> None:
        for place, records in fetched.items():
            self._buffer.put(place.partition, records)
            self._failures = 0
        self._polled(client)

    def _tap(self, client: AIOKafkaConsumer) -> None:
        """Have a consumer that was started move what it fetches at once, where there is room, as records of ours."""
        fetcher = client._fetcher  # noqa: SLF001 - it has no other way
        fetch = fetcher._proc_fetch_request  # noqa: SLF001 - as above

        async def fetch_and_move(*request: Any) -> bool:
            if not await fetch(*request):
                return False
            await self._moved(client)
            return True

        fetcher._proc_fetch_request = fetch_and_move  # noqa: SLF001 - as above

    async def _moved(self, client: AIOKafkaConsumer) -> None:
        replaced = client is not self._client
        if replaced or self._broken is not None:  # what was raised on the way here may have passed records
            return
        fetcher = client._fetcher  # noqa: SLF001 - as above
        results = fetcher._records.values()  # noqa: SLF001 - as above
        whole = True
        for result in results:
            if type(result) is FetchResult:
                result._partition_records._consumer_record = _record  # noqa: SLF001 - it would make one of its own first
            else:
                whole = False  # an error, that is raised for the task
        if whole and not self._buffer.full and not client._subscription.reassignment_in_progress:  # noqa: SLF001 - as above
            try:
                # Without a timeout, and with an assignment, it does not wait: the assignment is the same to its end.
                self._put(client, await fetcher.fetched_records((), max_records=self._buffer.room))
            except Exception as error:  # noqa: BLE001 - it is raised in the task
                self._broken = error
        if results or self._broken is not None:
            self._left.set()

    def _polled(self, client: AIOKafkaConsumer) -> None:  # noqa: B027 - a member's positions are its worker's
        """Note how far the consumer is, when all that it gave is in the buffer."""

    def _get_over(self, error: Exception) -> None:
        """Raise what a new consumer won't mend."""
        self._failures += 1
        passing = getattr(error, "retriable", False) or isinstance(error, OSError)
        if isinstance(error, BrokerError):
            passing = error.retryable
        if isinstance(error, FINAL) or (not passing and self._failures > MAX_FAILURES):
            raise error
        self._reason = said(error)
        log.warning("fetch.reconnecting", topic=self._topic, reason=said(error))

    async def _replace(self) -> None:
        await self._leave()
        old, self._client = self._client, None
        if old is not None:
            await stop(old)
        while self._client is None:
            await asyncio.sleep(RECONNECT_SECONDS)
            try:
                self._client = await self._open()
            except Exception as error:  # noqa: BLE001 - as above
                self._get_over(error)


class KafkaReader(Feed):
    """Follows named partitions."""

    def __init__(
        self, cluster: Cluster, make: MakeConsumer, topic: str, positions: Mapping[int, int], isolation: Isolation
    ) -> None:
        super().__init__(cluster, make, topic, isolation)
        self._fetched = dict(positions)  # what lies before them is in the buffer, or was taken

    def position(self, partition: int) -> int:
        buffered = self._buffer.next_offset(partition)
        return self._fetched[partition] if buffered is None else buffered

    async def fetch(self) -> list[Record]:
        return await self._buffer.take(BUFFER_RECORDS)

    def _watched(self) -> Collection[int]:
        return self._fetched.keys()

    def _fetching(self) -> Collection[int]:
        return self._fetched.keys()

    async def _open(self) -> AIOKafkaConsumer:
        await self._cluster.find_a_server()
        client = self._make()
        try:
            await client.start()
            self._tap(client)
            # No await in between: without a position aiokafka goes looking for a committed one.
            client.assign([TopicPartition(self._topic, partition) for partition in self._fetched])
            for partition, offset in self._fetched.items():
                client.seek(TopicPartition(self._topic, partition), offset)
            self._reason = ""
        except BaseException:
            await stop(client)
            raise
        return client

    def _polled(self, client: AIOKafkaConsumer) -> None:
        # It also passes what is never given: the markers at the ends of transactions, and what was aborted.
        positions = self._positions_of(client, self._fetched)
        if any(at > self._fetched[partition] for partition, at in positions.items()):
            self._fetched |= positions
            self._buffer.passed()


def _watched_no_more(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("watch.defect", exc_info=error)


def _record(place: TopicPartition, record: Any) -> Record:
    return Record(
        place.topic,
        place.partition,
        record.offset,
        record.timestamp,
        record.key,
        record.value or b"",
        tuple(record.headers),
    )
