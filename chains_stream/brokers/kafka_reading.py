"""Reading from Kafka: records are moved out of aiokafka's buffers at once, into a buffer of ours.

Facts about aiokafka that this rests on: a consumer fetches a partition again only when what it got of it is read, so it
is read where the answer to a fetch is taken apart, some turns of the loop before `getmany` would give it.
Exceptions in a rebalance listener are only logged, so they are kept here and raised by `fetch`. Errors of the group are
given to whoever asks for records, and block the group until then. A consumer whose inner tasks ended goes on in
silence, so they are watched, and a new one takes its place.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka import errors as kafka
from aiokafka.consumer.fetcher import FetchResult
from aiokafka.structs import OffsetAndMetadata

from chains_stream.broker import Committed, PartitionsChanged, Record
from chains_stream.brokers.buffer import Buffer
from chains_stream.brokers.kafka_cluster import BEGIN, FINAL, Cluster, said, stop, to_the_end
from chains_stream.brokers.kafka_static import FencedInstanceIdError, name_instance
from chains_stream.brokers.kafka_watch import Watch
from chains_stream.errors import BrokerError
from chains_stream.log import get_logger

BUFFER_RECORDS = 1000  # fetched and not yet taken, a consumer
BUFFER_BYTES = 16 << 20  # of values
POLL_SECONDS = 1.0  # how soon errors of a group are noticed
RECONNECT_SECONDS = 0.5  # before a consumer that broke is replaced
COMMIT_SECONDS = 5.0  # aiokafka would try for as long as the broker is away, and the group waits for whoever leaves
MAX_FAILURES = 5  # in a row, of a kind that aiokafka does not know to pass
_NO_PARTITION = TopicPartition("", -1)

log = get_logger(__name__)

# A commit that comes too late: the partitions are another member's, which takes the records up again.
_LOST = (
    kafka.CommitFailedError,
    kafka.IllegalGenerationError,
    kafka.IllegalStateError,
    kafka.RebalanceInProgressError,
    kafka.UnknownMemberIdError,
    FencedInstanceIdError,
)
MakeConsumer = Callable[..., AIOKafkaConsumer]


class _Feed(ABC):
    """Keeps a consumer of aiokafka at work, and moves what it fetches to a buffer.

    Brokers that restart and leaders that move are aiokafka's to get over; what breaks it is got over by another one.
    """

    def __init__(self, cluster: Cluster, make: MakeConsumer, topic: str) -> None:
        self._cluster = cluster
        self._make = make
        self._topic = topic
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
            self._cluster, self._topic, self._watched(), self._moving, self._stalled, patience=self._patience()
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
            await stop(self._client, self._client._client)  # noqa: SLF001 - what a broken one leaves open
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
            await stop(old, old._client)  # noqa: SLF001 - as in `close`
        while self._client is None:
            await asyncio.sleep(RECONNECT_SECONDS)
            try:
                self._client = await self._open()
            except Exception as error:  # noqa: BLE001 - as above
                self._get_over(error)


class KafkaReader(_Feed):
    """Follows named partitions."""

    def __init__(self, cluster: Cluster, make: MakeConsumer, topic: str, positions: Mapping[int, int]) -> None:
        super().__init__(cluster, make, topic)
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
            await stop(client, client._client)  # noqa: SLF001 - as above
            raise
        return client

    def _polled(self, client: AIOKafkaConsumer) -> None:
        # It also passes what is no record and is never given: the markers at the ends of transactions.
        positions = self._positions_of(client, self._fetched)
        if any(at > self._fetched[partition] for partition, at in positions.items()):
            self._fetched |= positions
            self._buffer.passed()


class KafkaGroupConsumer(_Feed, ConsumerRebalanceListener):  # type: ignore[misc] # aiokafka has no types
    """A member of a group on one topic."""

    def __init__(
        self,
        cluster: Cluster,
        make: MakeConsumer,
        topic: str,
        group: str,
        callbacks: tuple[PartitionsChanged, PartitionsChanged],
        *,
        instance_id: str | None,
        patience: float,
    ) -> None:
        """Join within `patience`, in seconds; to be without partitions for longer later on is trouble."""
        super().__init__(cluster, make, topic)
        self._group = group
        self._instance_id = instance_id
        self._join_patience = patience
        self._on_assigned, self._on_revoked = callbacks
        self._held: frozenset[int] = frozenset()
        self._taken: dict[int, int] = {}  # the offset of the next record that `fetch` will give, by partition held
        self._closing = False
        self._changing = asyncio.Lock()  # closing and a rebalance may meet
        self._committing = asyncio.Lock()  # one after the other: an older position must not come after a newer one
        self._joined: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._buffer.hold()  # until the first partitions are assigned

    async def join(self) -> None:
        """Join, and wait for the first assignment. Raises BrokerError."""
        try:
            async with asyncio.timeout(self._join_patience):
                await self.start()
                await self._joined
        except TimeoutError:
            await self.close()
            reason = f"no partitions of {self._topic} were assigned within {self._join_patience:g} s"
            raise BrokerError(f"{self._cluster.url}: {reason}") from None
        except BaseException:
            await self.close()
            raise

    async def fetch(self, max_records: int) -> list[Record]:
        records = await self._buffer.take(max_records)
        for record in records:
            self._taken[record.partition] = record.offset + 1
        return records

    async def commit(self, positions: Mapping[int, Committed]) -> frozenset[int]:
        offsets = {
            TopicPartition(self._topic, partition): OffsetAndMetadata(committed.offset, committed.metadata)
            for partition, committed in positions.items()
            if partition in self._held
        }
        if not offsets or self._client is None:
            return frozenset()
        try:
            async with asyncio.timeout(COMMIT_SECONDS), self._committing:
                await self._client.commit(offsets)
        except _LOST as error:
            log.info("commit.too_late", topic=self._topic, reason=said(error))
            return frozenset()
        except TimeoutError:
            reason = f"took no commit for {self._group} within {COMMIT_SECONDS:g} s"
            raise BrokerError(f"{self._cluster.url} {reason}") from None
        except (kafka.KafkaError, OSError) as error:
            raise self._cluster.translated(error, "commit for", right="READ", what=self._group) from error
        return frozenset(place.partition for place in offsets)

    async def committed(self, partitions: Collection[int]) -> dict[int, Committed]:
        return await self._cluster.committed(self._group, self._topic, partitions)

    def pause(self, partition: int) -> None:
        if partition in self._held and self._client is not None:
            place = TopicPartition(self._topic, partition)
            self._buffer.drop(partition)
            # What aiokafka has fetched of it, or is about to get, is dropped too: it comes from further on.
            self._client.seek(place, self._taken[partition])
            self._client.pause(place)

    def resume(self, partition: int) -> None:
        if partition in self._held and self._client is not None:
            self._client.resume(TopicPartition(self._topic, partition))

    def lag(self) -> dict[int, int]:
        if self._client is None or self._watch is None:
            return {}
        lags = {}
        for partition in self._held:
            fetched = self._client.highwater(TopicPartition(self._topic, partition)) or 0
            lags[partition] = max(0, max(fetched, self._watch.ends.get(partition, 0)) - self._taken[partition])
        return lags

    async def close(self) -> None:
        self._closing = True
        await super().close()

    async def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:  # noqa: ARG002 - eager: it is all
        await self._leave()

    async def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        async with self._changing:
            if self._closing or self._client is None:
                return
            partitions = frozenset(place.partition for place in assigned)
            try:
                positions = await self._positions(partitions)
            except BrokerError as error:
                self._broken = error
                return
            self._held, self._taken = partitions, dict(positions)
            if not await self._told(self._on_assigned(self._held)):
                return
            # What was fetched so far may come from positions that are not ours; see `_positions`.
            self._buffer.clear()
            for partition, offset in positions.items():
                self._client.seek(TopicPartition(self._topic, partition), offset)
            self._reason = ""
            self._buffer.release()
            if not self._joined.done():
                self._joined.set_result(None)

    async def _positions(self, partitions: frozenset[int]) -> dict[int, int]:
        """Find where to go on: aiokafka itself takes a coordinator that still loads for one that has stored nothing."""
        stored = await self._cluster.committed(self._group, self._topic, partitions)
        begins = await self._cluster.offsets(self._topic, partitions - stored.keys(), BEGIN)
        return begins | {partition: committed.offset for partition, committed in stored.items()}

    def _watched(self) -> Collection[int]:
        return range(self._cluster.counts[self._topic])

    def _fetching(self) -> Collection[int] | None:
        joining = self._client is None or self._client._subscription.reassignment_in_progress  # noqa: SLF001 - as above
        return None if joining or self._buffer.held else self._held

    def _patience(self) -> float:
        return self._join_patience

    async def _open(self) -> AIOKafkaConsumer:
        await self._cluster.find_a_server()
        client = self._make()
        try:
            # Subscribed only then: `start` would wait, for as long as it takes, for partitions.
            await client.start()
            self._tap(client)
            if self._instance_id is not None:
                name_instance(client, self._instance_id, self._fenced)
            # A leader of the group that has not heard of the topic yet would deal out none of it, and be content.
            await client._client._wait_on_metadata(self._topic)  # noqa: SLF001 - it has no other way
            self._client = client  # the callbacks may come before we return
            client.subscribe([self._topic], listener=self)
        except BaseException:
            self._client = None
            await stop(client, client._client)  # noqa: SLF001 - as above
            raise
        return client

    async def _leave(self) -> None:
        async with self._changing:
            self._buffer.hold()
            if self._held:
                await self._told(self._on_revoked(self._held))
            self._held = frozenset()

    def _fenced(self) -> None:
        reason = f"another process with the instance id `{self._instance_id}` joined the group {self._group}"
        self._broken = FencedInstanceIdError(f"{reason}; each needs one of its own (CHAINS_INSTANCE_ID)")

    async def _told(self, callback: Awaitable[None]) -> bool:
        try:
            await callback
        except Exception as error:
            log.exception("broker.callback_failed", topic=self._topic)
            self._fail(BrokerError(f"{self._topic}: a callback of the consumer failed: {error!r}"))
            return False
        return True

    def _translated(self, error: BaseException) -> BrokerError:
        if isinstance(error, kafka.GroupAuthorizationFailedError):
            return self._cluster.translated(error, "join the group", right="READ", what=self._group)
        return super()._translated(error)

    def _fail(self, error: BrokerError) -> None:
        super()._fail(error)
        if not self._joined.done():
            self._joined.set_exception(error)
            self._joined.exception()  # nobody waits for it any more where joining was given up


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
