"""The delay queue: records that go to a topic later.

It is one topic, whose partitions are the classes of delay: of those in one partition the first is always due first. A
mover reads each in order, pauses it until its first record is due, and publishes that to the topic that it names. So a
delay costs no timer a record, and outlasts every process.
"""

import asyncio
import zlib
from collections import defaultdict, deque
from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

from chains_stream.broker import Broker, Committed, GroupConsumer, Record, TopicSpec
from chains_stream.errors import BrokerError, ChainsUsageError, UnknownTopicError
from chains_stream.letters import dead_letter_spec, send_letter
from chains_stream.log import get_logger
from chains_stream.messages import Headers, new_id, now_ms
from chains_stream.policy import backoff
from chains_stream.settings import Settings

CLASSES = (1.0, 5.0, 30.0, 300.0, 1_800.0, 7_200.0, 18_000.0, 36_000.0)  # seconds, by partition
TARGET = "chains-target"  # UTF-8: the topic that a delayed record goes to

SPARE_MS = 24 * 3_600_000  # that a record is kept longer than its delay, for when nobody moves any
FETCH_RECORDS = 50  # that a mover holds, a partition
LOOK_AGAIN = 30.0  # seconds at most until a head is looked at again: the clock may have been put right
HANDOVER = 5.0  # seconds that a partition's going waits for what is being moved of it
AWAY = 30.0  # seconds until a record is tried again whose topic can't be written to

log = get_logger(__name__)


def delayed_topic(settings: Settings) -> str:
    """Name the topic of the delay queue."""
    return f"{settings.namespace}.delayed"


def delayed_spec(settings: Settings, classes: Sequence[float] = CLASSES) -> TopicSpec:
    """Describe that topic: one partition a class, kept for longer than the longest delay."""
    retention = max(settings.request_retention_ms, int(max(classes) * 1000) + SPARE_MS)
    return TopicSpec(delayed_topic(settings), len(classes), retention)


async def ensure_delayed(broker: Broker, settings: Settings, classes: Sequence[float] = CLASSES) -> None:
    """Create the topic of the delay queue, and that of its dead letters.

    Raises ChainsUsageError if there is one with another number of partitions; BrokerError.
    """
    spec = delayed_spec(settings, classes)
    await broker.ensure_topics([spec, dead_letter_spec(spec.name, settings)])
    count = await broker.partitions(spec.name)
    if count != len(classes):
        raise ChainsUsageError(
            f"the topic {spec.name} has {count} partitions, and must have {len(classes)}, one for each delay: "
            "delete it once it is empty, or use another namespace"
        )


class Delays:
    """Puts records into the delay queue."""

    def __init__(self, broker: Broker, settings: Settings, classes: Sequence[float] = CLASSES) -> None:
        self._broker = broker
        self._settings = settings
        self._topic = delayed_topic(settings)
        self._classes = classes

    async def ensure(self) -> None:
        """Make the queue, before the first `send`: see `ensure_delayed`."""
        await ensure_delayed(self._broker, self._settings, self._classes)

    def rounded(self, seconds: float) -> float:
        """Give the delay that a record gets for one of so many seconds."""
        return self._classes[self._number(seconds)] if seconds > 0 else 0.0

    async def send(
        self, topic: str, value: bytes, *, delay_seconds: float, key: bytes | None = None, headers: Headers = ()
    ) -> None:
        """Have a record published to a topic later: after the next class of delay, or the longest. None goes at once.

        Returns when it is stored. Raises BrokerError.
        """
        if delay_seconds <= 0:
            partition = await _partition(self._broker, topic, key, new_id())
            stored = await self._broker.publish(topic, value, partition=partition, key=key, headers=headers)
        else:
            number = self._number(delay_seconds)
            headers = (*_own(headers), (TARGET, topic.encode()))
            stored = await self._broker.publish(self._topic, value, partition=number, key=key, headers=headers)
        await stored

    def _number(self, seconds: float) -> int:
        return _class_of(self._classes, seconds)


class _Waiting(NamedTuple):
    """A record that a mover holds, and the time of its event loop at which it is due at the latest."""

    record: Record
    latest: float


class Mover:
    """Moves what is due to where it belongs. Any number of processes may have one: they share the classes.

    A record that was moved as its mover died is moved again, to the same partition.
    """

    def __init__(self, broker: Broker, settings: Settings, classes: Sequence[float] = CLASSES) -> None:
        self._broker = broker
        self._settings = settings
        self._classes = classes
        self._topic = delayed_topic(settings)
        self._consumer: GroupConsumer | None = None
        self._task: asyncio.Task[None] | None = None
        self._waiting: defaultdict[int, deque[_Waiting]] = defaultdict(deque)  # by partition; those are paused
        self._moved: set[tuple[int, int]] = set()  # of these, behind one that could not be: they don't go twice
        self._uncommitted: dict[int, Committed] = {}
        self._generation = 0  # of the assignment: what was taken under another one is not ours any more
        self._moving = asyncio.Lock()
        self._failures = 0  # in a row, to publish or to commit

    async def start(self) -> None:
        """Make the topic, join the group and begin. Raises ChainsUsageError, BrokerError."""
        await ensure_delayed(self._broker, self._settings, self._classes)
        self._consumer = await self._broker.consume(
            self._topic, self._topic, on_assigned=self._assigned, on_revoked=self._revoked
        )
        self._task = asyncio.create_task(self._run(self._consumer), name="move delayed")

    async def failed(self) -> None:
        """Wait until it can't go on. Raises what stopped it."""
        if self._task is not None:
            await asyncio.shield(self._task)

    async def drain(self) -> None:
        """Leave. What was not moved is for others, or for later."""
        if self._task is not None:
            await self._settle()
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)  # `failed` tells what it died of
        if self._consumer is not None:
            await self._consumer.close()

    async def _assigned(self, partitions: frozenset[int]) -> None:
        log.info("delayed.assigned", partitions=sorted(partitions))

    async def _revoked(self, partitions: frozenset[int]) -> None:
        await self._settle()
        log.info("delayed.revoked", partitions=sorted(partitions))
        self._generation += 1
        self._waiting.clear()
        self._moved.clear()
        self._uncommitted.clear()

    async def _settle(self) -> None:
        """Let what is under way be moved and committed, so that nobody moves it again."""
        try:
            async with asyncio.timeout(HANDOVER), self._moving:
                pass
        except TimeoutError:
            log.warning("delayed.given_up", reason="what is under way will be moved once more")

    async def _run(self, consumer: GroupConsumer) -> None:
        while True:
            try:
                async with asyncio.timeout(self._seconds()):
                    records = await consumer.fetch(FETCH_RECORDS)
            except TimeoutError:  # cancelled so, it has taken none
                records = []
            now = asyncio.get_running_loop().time()
            for record in records:
                self._waiting[record.partition].append(_Waiting(record, now + self._delay(record)))
            for partition in {record.partition for record in records}:
                consumer.pause(partition)
            async with self._moving:
                await self._move(consumer)

    def _seconds(self) -> float:
        """Give how long nothing is due."""
        heads = [self._due_in(queue[0]) for queue in self._waiting.values() if queue]
        seconds = min(LOOK_AGAIN, max(0.0, min(heads, default=LOOK_AGAIN)))
        return max(seconds, backoff(self._failures)) if self._failures else seconds

    def _delay(self, record: Record) -> float:
        return self._classes[record.partition] if record.partition < len(self._classes) else 0.0  # one added since

    def _due_in(self, waiting: _Waiting) -> float:
        """Give the seconds until a record is due: never more than its delay, whatever the clocks of others say."""
        record, latest = waiting
        by_clock = (record.timestamp_ms - now_ms()) / 1000 + self._delay(record)
        return min(by_clock, latest - asyncio.get_running_loop().time())

    async def _move(self, consumer: GroupConsumer) -> None:
        """Publish what is due, commit it once it is stored, and go on with the partitions of which all is moved."""
        generation, failed = self._generation, False
        for partition, queue in list(self._waiting.items()):
            due = [one.record for one in takewhile(lambda one: self._due_in(one) <= 0, queue)]
            moved = await self._publish([record for record in due if _place(record) not in self._moved])
            if generation != self._generation:
                return
            self._moved.update(moved)
            while queue and (place := _place(queue[0].record)) in self._moved:
                self._moved.remove(place)
                self._uncommitted[partition] = Committed(queue.popleft().record.offset + 1)
            failed = failed or bool(queue and due and queue[0].record.offset <= due[-1].offset)
        if self._uncommitted and not await self._commit(consumer):
            failed = True
        if generation != self._generation:
            return
        for partition in [number for number, queue in self._waiting.items() if not queue]:
            del self._waiting[partition]
            consumer.resume(partition)
        self._failures = self._failures + 1 if failed else 0

    async def _publish(self, records: Sequence[Record]) -> list[tuple[int, int]]:
        """Publish records to where they belong; give the places of those that are stored there."""
        moved = list[tuple[int, int]]()
        for record, result in zip(
            records, await asyncio.gather(*map(self._send, records), return_exceptions=True), strict=True
        ):
            if isinstance(result, BrokerError):
                log.warning("delayed.retry", topic=self._topic, reason=str(result))
            elif isinstance(result, BaseException):
                raise result
            else:
                moved.append(_place(record))
        return moved

    async def _send(self, record: Record) -> None:
        """Publish a record; one that can't be is put aside, or waits anew while only its topic is away.

        Raises BrokerError if the broker is away.
        """
        topic = (dict(record.headers).get(TARGET) or b"").decode("utf-8", "replace")
        try:
            if not topic:
                raise UnknownTopicError(f"a delayed record has no header {TARGET}")
            # By its place here: should it be moved twice, one worker gets both.
            place = f"{record.partition}/{record.offset}".encode()
            partition = await _partition(self._broker, topic, record.key, place)
            await (
                await self._broker.publish(
                    topic, record.value, partition=partition, key=record.key, headers=_own(record.headers)
                )
            )
        except BrokerError as error:
            if error.retryable:
                await self._put_back(record, topic, error)
                return
            letter = await send_letter(self._broker, record, self._topic, error)
            log.error(  # noqa: TRY400 - the message says it all
                "delayed.dead_lettered", target=topic, letter=f"{letter[0]}@{letter[1]}", reason=str(error)
            )

    async def _put_back(self, record: Record, topic: str, error: BrokerError) -> None:
        """Have a record come again later, so that it does not hold up those behind it. Raises BrokerError."""
        number = _class_of(self._classes, AWAY)
        stored = self._broker.publish(
            self._topic, record.value, partition=number, key=record.key, headers=record.headers
        )
        await (await stored)
        log.warning("delayed.put_back", target=topic, again_in=self._classes[number], reason=str(error))

    async def _commit(self, consumer: GroupConsumer) -> bool:
        try:
            await consumer.commit(self._uncommitted)
        except BrokerError as error:
            log.warning("delayed.commit_failed", reason=str(error))  # the next one covers it
            return False
        self._uncommitted.clear()
        return True


def _class_of(classes: Sequence[float], seconds: float) -> int:
    return next((number for number, delay in enumerate(classes) if delay >= seconds), len(classes) - 1)


async def _partition(broker: Broker, topic: str, key: bytes | None, otherwise: bytes) -> int:
    """Choose a partition: that of the key, or evenly."""
    return zlib.crc32(otherwise if key is None else key) % await broker.partitions(topic)


def _place(record: Record) -> tuple[int, int]:
    return record.partition, record.offset


def _own(headers: Headers) -> Headers:
    return tuple((name, value) for name, value in headers if name != TARGET)
