"""Members of Kafka's consumer groups.

Facts about aiokafka that this rests on, besides those of `kafka_reading`: exceptions in a rebalance listener are only
logged, so they are kept here and raised by `fetch`. Errors of the group are given to whoever asks for records, and
block the group until then.
"""

import asyncio
from collections.abc import Awaitable, Collection, Iterable, Mapping

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka import errors as kafka
from aiokafka.structs import OffsetAndMetadata

from chains_stream.broker import Committed, Isolation, PartitionsChanged, Record
from chains_stream.brokers.kafka_cluster import BEGIN, Cluster, said
from chains_stream.brokers.kafka_reading import Feed, MakeConsumer
from chains_stream.brokers.kafka_static import FencedInstanceIdError, name_instance
from chains_stream.brokers.kafka_stop import stop
from chains_stream.errors import BrokerError
from chains_stream.log import get_logger

COMMIT_SECONDS = 5.0  # aiokafka would try for as long as the broker is away, and the group waits for whoever leaves

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


class KafkaGroupConsumer(Feed, ConsumerRebalanceListener):  # type: ignore[misc] # aiokafka has no types
    """A member of a group on one topic."""

    def __init__(
        self,
        cluster: Cluster,
        make: MakeConsumer,
        topic: str,
        group: str,
        callbacks: tuple[PartitionsChanged, PartitionsChanged],
        *,
        isolation: Isolation,
        instance_id: str | None,
        patience: float,
    ) -> None:
        """Join within `patience`, in seconds; to be without partitions for longer later on is trouble."""
        super().__init__(cluster, make, topic, isolation)
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
            if partition in self._taken:  # else it was just assigned, and is told where to begin once that is known
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
            place = TopicPartition(self._topic, partition)
            committed_only = self._isolation == "read_committed"
            fetched = (self._client.last_stable_offset if committed_only else self._client.highwater)(place) or 0
            end = max(fetched, self._watch.ends.get(partition, 0))
            lags[partition] = max(0, end - self.position(partition))
        return lags

    def position(self, partition: int) -> int:
        taken = self._taken.get(partition, 0)
        if self._client is None or partition not in self._held:
            return taken
        first = self._buffer.next_offset(partition)
        if first is None:  # all that aiokafka has passed was taken, or was no record
            first = self._positions_of(self._client, [partition]).get(partition, taken)
        return max(taken, first)

    async def close(self) -> None:
        self._closing = True
        await super().close()

    async def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:  # noqa: ARG002 - eager: it is all
        await self._leave()

    async def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        async with self._changing:
            if self._closing or self._client is None:
                return
            self._held = frozenset(place.partition for place in assigned)
            self._taken.clear()
            if not await self._told(self._on_assigned(self._held)):
                return
            try:
                # Only now: who was told may have waited until nothing could change them any more.
                self._taken = await self._positions(self._held)
            except BrokerError as error:
                self._broken = error
                return
            # What was fetched so far may come from positions that are not ours; see `_positions`.
            self._buffer.clear()
            for partition, offset in self._taken.items():
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
            await stop(client)
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
