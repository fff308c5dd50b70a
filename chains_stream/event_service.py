"""What all events of a Chainlet have in common: how their records are read, and how what they give is written."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Collection, Mapping
from typing import Any, NamedTuple

from chains_stream import metrics, policy
from chains_stream.broker import Broker, Record, TopicSpec
from chains_stream.errors import (
    InvalidArgumentError,
    InvalidResultError,
    RecordTooLargeError,
    SchemaRegistryError,
    UnknownSchemaError,
    message_of,
    user_frames,
)
from chains_stream.events import Event, Feed, Output, Sink, partition_of, takes_none
from chains_stream.formats import Registry, keying, named
from chains_stream.formats.format import NO_HEADERS
from chains_stream.letters import dead_letter_spec, send_letter
from chains_stream.local import Callee
from chains_stream.log import get_logger
from chains_stream.patience import persist, place_of
from chains_stream.settings import Settings
from chains_stream.transactions import Unsent

Storing = tuple[tuple[str, int], asyncio.Future[int]]  # a topic's partition, and what is done once it is stored there

MOST_GIVEN, MOST_GIVEN_BYTES = 10_000, 32 << 20  # by one event with `exactly_once`, of records and their bytes

log = get_logger(__name__)


class Written:
    """Where what a Chainlet gives goes: its sinks, by their topics."""

    def __init__(self, broker: Broker, feed: Feed, registry: Registry) -> None:
        self._broker = broker
        self._sinks: dict[str, _SinkWriter] = {
            sink.topic: _SinkWriter(sink, feed.gives, registry) for sink in feed.sinks
        }
        self._first = self._sinks[feed.sinks[0].topic] if feed.sinks else None

    async def start(self) -> None:
        """Find out how many partitions the topics have, and what they take. Raises BrokerError."""
        for topic, sink in self._sinks.items():
            sink.partitions = await self._broker.partitions(topic)
            sink.limit = await self._broker.record_limit(topic)

    def sink(self, topic: str | None) -> "_SinkWriter":
        """Give the sink of a topic, or the first one. Raises InvalidResultError if there is none."""
        sink = self._sinks.get(topic) if topic else self._first
        if sink is None:
            known = ", ".join(self._sinks) or "none"
            raise InvalidResultError(f"an Output names the topic `{topic or ''}`, which is no sink: there are {known}")
        return sink

    def put(self, record: Unsent) -> asyncio.Future[int] | None:
        """As `store` does, write a record, if that takes no waiting; else None."""
        topic, partition, key, value, headers = record
        return self._broker.put(topic, value, partition=partition, key=key, headers=headers)

    async def store(self, record: Unsent) -> asyncio.Future[int]:
        """Write a record, in the order of these calls; the future is done once it is stored. Raises BrokerError."""
        topic, partition, key, value, headers = record
        return await self._broker.publish(topic, value, partition=partition, key=key, headers=headers)


class _SinkWriter:
    """One sink, and how its records are made."""

    def __init__(self, sink: Sink, kind: Any, registry: Registry) -> None:
        self.partitions = 1
        self.limit = 0  # bytes of a record
        self._topic = sink.topic
        self._writer = named(sink.format).writer(kind, registry)
        self.needs_registry = self._writer.needs_registry  # else nothing is ever missing
        self._key = None if sink.key is None else keying(sink.key, kind)
        self._rotation = 0

    def missing(self) -> Awaitable[None] | None:
        """Give what must be awaited before a record can be made, if anything. It raises SchemaRegistryError."""
        return self._writer.missing(self._topic)

    def record(
        self, given: Any, of_event: bytes | None, key: bytes | None = None, headers: Mapping[str, bytes] = NO_HEADERS
    ) -> Unsent:
        """Make a record of what was given, with a key of its own, or the event's.

        Raises InvalidResultError for what can't be written, RecordTooLargeError.
        """
        value, written = self._writer.write(given, self._topic, headers)
        if key is None:
            key = of_event if self._key is None else self._key(given)
        record = Unsent(self._topic, self._partition(key), key, value, written)
        # Told later by the broker, it would fail for all that goes out with it, or for a whole transaction.
        if record.size > self.limit:
            reason = f"takes no record of this size: it has {record.size} bytes, and may have {self.limit}"
            raise RecordTooLargeError(f"{self._topic} {reason}")
        return record

    def _partition(self, key: bytes | None) -> int:
        if key is not None:
            return partition_of(key, self.partitions)
        self._rotation += 1
        return self._rotation % self.partitions


class Unreadable(Exception):  # noqa: N818 - it says of its cause what it is of
    """A record can't be read, as its cause says, and never will be."""


class Keyed(NamedTuple):
    """A record that was read for its key: the key, what its run gets, and what was wrong with it."""

    key: bytes | None = None
    item: Any = None
    fault: Exception | None = None


class EventService:
    """What all events of a Chainlet have in common."""

    def __init__(
        self, callee: Callee, feed: Feed, group: str, broker: Broker, settings: Settings, *, read: Collection[str] = ()
    ) -> None:
        """Feed `callee`; `read` are topics that are read in this process, by other Chainlets."""
        self.callee = callee
        self.feed = feed
        self.group = group
        self.broker = broker
        self.settings = settings
        self._read = read
        self.name = f"{callee.name}.events"  # of metrics and in logs
        self.registry = Registry(settings.registry)
        self.written = Written(broker, feed, self.registry)
        self.key = None if feed.source.key is None else keying(feed.source.key, feed.kind)
        self._reader = named(feed.source.format).reader(feed.kind, self.registry)
        self.needs_registry = self._reader.needs_registry  # else nothing is ever missing
        self._optional = takes_none(feed.kind)
        self.queue_wait = metrics.QUEUE_WAIT.labels(self.name)
        self.run_time = metrics.RUN_TIME.labels(self.name)

    async def start(self) -> None:
        """Have the topics there are. Raises BrokerError."""
        settings, topic = self.settings, self.feed.source.topic
        names = [topic, *(sink.topic for sink in self.feed.sinks)]
        # On the embedded broker what nobody reads would fill up, and hold back who writes it.
        specs = [
            TopicSpec(name, settings.partitions, settings.request_retention_ms, ring=name not in (topic, *self._read))
            for name in names
        ]
        await self.broker.ensure_topics([*specs, dead_letter_spec(topic, settings)])
        await self.written.start()

    def missing(self, record: Record) -> Awaitable[None] | None:
        """Give what must be awaited before a record can be read, if anything.

        That raises Unreadable, SchemaRegistryError.
        """
        if not self.needs_registry or (not record.value and self._optional):
            return None
        missing = self._reader.missing(record.value)
        return None if missing is None else _found(missing)

    def read(self, record: Record) -> Any:
        """Read a record: give the value, or the `Event`, as `run_remote` takes it. Raises Unreadable."""
        headers = {name: value or b"" for name, value in record.headers} if record.headers else {}
        if not record.value and self._optional:
            value = None
        else:
            try:
                value = self._reader.read(record.value, headers, record.topic)
            except (InvalidArgumentError, UnknownSchemaError) as error:
                raise Unreadable from error
        return _event(record, value, headers) if self.feed.whole else value

    async def put_aside(self, record: Record, error: BaseException, reason: str) -> None:
        """Put an event into the dead-letter topic; `reason` is the kind of error, of metrics. Raises BrokerError."""
        metrics.DEAD_LETTERED.labels(self.name, reason).inc()
        topic, offset = await persist(lambda: send_letter(self.broker, record, self.group, error), record)
        log.warning("event.dead_lettered", letter=f"{topic}@{offset}", reason=message_of(error), **place_of(record))

    def tell(self, record: Record, error: BaseException, attempt: int) -> None:
        """Log that an attempt has failed."""
        frames = user_frames(error.__traceback__)
        log.warning(
            "event.failed",
            chainlet=self.callee.name,
            attempt=attempt,
            error=type(error).__name__,
            message=message_of(error),
            at=f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None,
            **place_of(record),
        )

    async def keyed(self, record: Record) -> Keyed:
        """Find what an event is kept in order by, where that is in its value. What fails here fails in its run."""
        assert self.key is not None, "else it is the record's"
        attempt = 1
        while True:
            try:
                if (missing := self.missing(record)) is not None:
                    await missing
                item = self.read(record)
                return Keyed(self.key(item.value if self.feed.whole else item), item)
            except SchemaRegistryError as error:  # without its key it would run beside others of its key
                log.warning("key.retry", chainlet=self.callee.name, **place_of(record), reason=str(error))
                await asyncio.sleep(policy.backoff(attempt))
                attempt += 1
            except Exception as error:  # noqa: BLE001 - whatever user code raises
                return Keyed(fault=error)


async def _found(missing: Awaitable[None]) -> None:
    try:
        await missing
    except (InvalidArgumentError, UnknownSchemaError) as error:
        raise Unreadable from error


def _event(record: Record, value: Any, headers: dict[str, bytes]) -> Event[Any]:
    return Event(
        value=value,
        key=record.key,
        headers=headers,
        timestamp_ms=record.timestamp_ms,
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
    )


class Given:
    """What one run of an event gives: written as it comes, or held for a transaction.

    Attributes:
        held: what a transaction is to write.
        storing: what is written, and was not stored when it was last looked at, in the order in which it was given.
    """

    __slots__ = ("_bytes", "_key", "_transactional", "_written", "held", "storing")

    def __init__(self, written: Written, key: bytes | None, *, transactional: bool) -> None:
        """Take what an event gives that has this `key`."""
        self._written = written
        self._key = key
        self._transactional = transactional
        self._bytes = 0  # of what is held
        self.held: list[Unsent] = []
        self.storing: deque[Storing] = deque()

    def add(self, item: Any) -> Awaitable[None] | None:
        """Write a value or an `Output`; None is nothing. Give what must be awaited until it is written, if anything.

        That and this raise InvalidResultError, RecordTooLargeError, SchemaRegistryError, BrokerError.
        """
        if item is None:
            return None
        output = item if isinstance(item, Output) else None
        sink = self._written.sink(None if output is None else output.topic)
        if sink.needs_registry and (missing := sink.missing()) is not None:
            return self._add_after(missing, item)
        if output is None:
            record = sink.record(item, self._key)
        else:
            record = sink.record(output.value, self._key, output.key, output.headers)
        if self._transactional:
            self._hold(record)
            return None
        stored = self._written.put(record)
        if stored is None:
            return self._store(record)
        self._note(record, stored)
        return None

    async def _add_after(self, missing: Awaitable[None], item: Any) -> None:
        await missing
        if (rest := self.add(item)) is not None:
            await rest

    async def _store(self, record: Unsent) -> None:
        self._note(record, await self._written.store(record))

    def _note(self, record: Unsent, stored: asyncio.Future[int]) -> None:
        storing = self.storing
        storing.append(((record.topic, record.partition), stored))
        while storing and storing[0][1].done():
            storing.popleft()[1].result()

    def _hold(self, record: Unsent) -> None:
        self.held.append(record)
        self._bytes += record.size
        if len(self.held) > MOST_GIVEN or self._bytes > MOST_GIVEN_BYTES:
            most = f"{MOST_GIVEN:,} records or {MOST_GIVEN_BYTES >> 20} MiB"
            raise InvalidResultError(f"one event gave more than {most}, the most that exactly_once writes at once")

    async def stored(self) -> None:
        """Wait until all is stored. Raises BrokerError."""
        while self.storing:
            await self.storing.popleft()[1]
