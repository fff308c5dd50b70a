"""Feeding a Chainlet from a topic: events in order for each key, many at once across keys; what it gives is written.

An event is finished once all that its Chainlet gave for it is stored, so that nothing is lost. One that fails is tried
again where it stands: others of its key wait, those of other keys go on. If whatever fails is not the event's fault, as
no other succeeds either, all wait until something does.
"""

import asyncio
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import aclosing
from typing import Any

from structlog.contextvars import bind_contextvars

from chains_stream import metrics, policy
from chains_stream.assignment import Assignment
from chains_stream.breaker import Breaker
from chains_stream.broker import Broker, Record, TopicSpec
from chains_stream.errors import (
    BrokerError,
    ChainsRuntimeError,
    DeadLetteredError,
    InvalidArgumentError,
    InvalidResultError,
    RecordTooLargeError,
    SchemaRegistryError,
    UnknownSchemaError,
    is_retryable,
    message_of,
    user_frames,
)
from chains_stream.events import Event, Feed, Output, Sink, partition_of, takes_none
from chains_stream.formats import Registry, keying, named
from chains_stream.letters import dead_letter_spec, send_letter
from chains_stream.local import Callee
from chains_stream.log import get_logger
from chains_stream.offsets import Ledger
from chains_stream.outcome import Stop
from chains_stream.patience import persist, place_of
from chains_stream.policy import Scope
from chains_stream.quarantine import Quarantine
from chains_stream.settings import Settings
from chains_stream.taking import Places, Taker
from chains_stream.transactions import Transactions, Unsent

WAITING = 1_000  # events that are taken, running or in the line of their key: as many as a ledger can tell of

Lane = tuple[int, bytes]  # a partition, and a key in it

log = get_logger(__name__)


class Written:
    """Where what a Chainlet gives goes: its sinks, by their topics."""

    def __init__(self, broker: Broker, feed: Feed, registry: Registry) -> None:
        self._broker = broker
        self._sinks: dict[str, _SinkWriter] = {
            sink.topic: _SinkWriter(sink, feed.gives, registry) for sink in feed.sinks
        }
        self._first = feed.sinks[0].topic if feed.sinks else ""

    async def start(self) -> None:
        """Find out how many partitions the topics have. Raises BrokerError."""
        for topic, sink in self._sinks.items():
            sink.partitions = await self._broker.partitions(topic)

    async def record(self, given: Any, event: Event[Any]) -> Unsent:
        """Make a record of what was given. Raises InvalidResultError for what can't be written, SchemaRegistryError."""
        output: Output[Any] = given if isinstance(given, Output) else Output(given)
        topic = output.topic or self._first
        if topic not in self._sinks:
            known = ", ".join(self._sinks) or "none"
            raise InvalidResultError(f"an Output names the topic `{topic}`, which is no sink: there are {known}")
        return await self._sinks[topic].record(output, event)

    def check(self, record: Unsent) -> None:
        """Raise RecordTooLargeError for a record that no transaction could hold: it would never be committed."""
        size, most = len(record.value), self._broker.max_record_bytes
        if size > most:
            raise RecordTooLargeError(f"a record of {size} bytes for {record.topic} is over the limit of {most}")

    async def store(self, record: Unsent) -> asyncio.Future[int]:
        """Write a record, in the order of these calls; the future is done once it is stored. Raises BrokerError."""
        return await self._broker.publish(
            record.topic, record.value, partition=record.partition, key=record.key, headers=record.headers
        )


class _SinkWriter:
    """One sink, and how its records are made."""

    def __init__(self, sink: Sink, kind: Any, registry: Registry) -> None:
        self.partitions = 1
        self._topic = sink.topic
        self._writer = named(sink.format).writer(kind, registry)
        self._key = None if sink.key is None else keying(sink.key, kind)
        self._rotation = 0

    async def record(self, output: Output[Any], event: Event[Any]) -> Unsent:
        if (missing := self._writer.missing(self._topic)) is not None:
            await missing
        value, headers = self._writer.write(output.value, self._topic, output.headers)
        key = output.key
        if key is None:
            key = event.key if self._key is None else self._key(output.value)
        return Unsent(self._topic, self._partition(key), key, value, headers)

    def _partition(self, key: bytes | None) -> int:
        if key is not None:
            return partition_of(key, self.partitions)
        self._rotation += 1
        return self._rotation % self.partitions


class _Unreadable(Exception):  # noqa: N818 - it says of its cause what it is of
    """A record can't be read, as its cause says, and never will be."""


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

    async def event(self, record: Record) -> Event[Any]:
        """Read a record. Raises _Unreadable, SchemaRegistryError."""
        headers = {name: value or b"" for name, value in record.headers}
        if not record.value and self._optional:
            return _event(record, None, headers)
        try:
            if (missing := self._reader.missing(record.value)) is not None:
                await missing
            value = self._reader.read(record.value, headers, record.topic)
        except (InvalidArgumentError, UnknownSchemaError) as error:
            raise _Unreadable from error
        return _event(record, value, headers)


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


class EventJob:
    """One event that is taken, until all that it gives is stored."""

    def __init__(self, record: Record, ledger: Ledger, lane: Lane | None) -> None:
        self.record = record
        self.ledger = ledger
        self.lane = lane
        self.task: asyncio.Task[None] | None = None
        self.stop: Stop | None = None
        self.unsent: list[Unsent] = []  # that the transaction of its offset is to hold

    def cancel(self, stop: Stop) -> None:
        if self.stop is None:
            self.stop = stop
            if self.task is not None:
                self.task.cancel()


class _Given:
    """What one run of an event gives: written as it comes, or held for a transaction."""

    def __init__(self, written: Written, event: Event[Any], *, transactional: bool) -> None:
        self._written = written
        self._event = event
        self._held: list[Unsent] | None = [] if transactional else None
        self._storing: deque[asyncio.Future[int]] = deque()

    async def add(self, item: Any) -> None:
        if item is None:
            return
        record = await self._written.record(item, self._event)
        if self._held is not None:
            self._written.check(record)
            self._held.append(record)
            return
        self._storing.append(await self._written.store(record))
        while self._storing and self._storing[0].done():
            self._storing.popleft().result()

    async def stored(self) -> list[Unsent]:
        """Wait until all is stored; give what is held instead. Raises BrokerError."""
        while self._storing:
            await self._storing.popleft()
        return self._held or []


class EventWorker(Taker[EventJob]):
    """Feeds one Chainlet from its source, as many events at once as it has places."""

    def __init__(self, service: EventService, quarantine: Quarantine, places: Places) -> None:
        source, settings = service.feed.source, service.settings
        self._transactions: Transactions | None = None
        if source.delivery == "exactly_once":
            self._transactions = Transactions(service.broker, source.topic, service.group, places.changed.set)
        start = source.start if isinstance(source.start, str) else int(source.start.timestamp() * 1000)
        assignment = Assignment(
            service.name,
            source.topic,
            service.broker,
            settings,
            self._lose,
            group=service.group,
            isolation="read_committed",
            start=start,
            through=self._transactions,
        )
        super().__init__(service.name, assignment, settings, quarantine, places=places)
        self.callee = service.callee
        self._service = service
        self._lanes: dict[Lane, deque[EventJob]] = {}  # the first of each runs, or is ready to
        self._ready: deque[EventJob] = deque()
        self._returning: deque[asyncio.Future[None]] = deque()  # events that were put off, and need a place again
        self._left: list[EventJob] = []  # to others: those behind them in their lines don't run either
        self._keys: dict[tuple[int, int], bytes | None] = {}  # of what is about to begin, where values have them
        self._taken = 0
        self._gave_way = False  # to a request, with the last place
        self._breaker = Breaker(service.name)
        self._metrics = metrics.OfWorker(service.name)

    async def drain(self, grace: float) -> None:
        await super().drain(grace)
        await self._service.registry.close()

    async def start(self) -> None:
        """Join the group and begin to take events."""
        await self._service.start()
        await super().start()
        self._tasks.append(asyncio.create_task(self._dispatch(), name=f"dispatch {self.name}"))
        log.info("events.started", chainlet=self.callee.name, topic=self._service.feed.source.topic)

    @property
    def held_back(self) -> str | None:
        """Why all events wait, as none succeeds; None while that is not so."""
        return self._breaker.reason if self._breaker.open else None

    # --- Taker's

    async def _orderly(self) -> bool:
        return not await self.callee.dead()  # else an event may have killed it

    async def _finish_up(self, grace: float) -> None:
        end = self._loop.time() + grace
        if self._service.feed.source.delivery == "at_most_once":
            # All that is taken is committed, and runs now or never.
            while (self._jobs or self._ready) and (left := end - self._loop.time()) > 0:
                await self.places.change(left)
        for job in self._waiting():
            if job.task is None:
                job.cancel("drained")  # or it would begin as the one before it is cancelled, and overtake it
        await super()._finish_up(max(0.0, end - self._loop.time()))

    def _free(self) -> int:
        if self._breaker.open:
            return int(self._may_begin())
        if self._transactions is not None and self._transactions.full:
            return 0
        return WAITING - self._taken

    def _may_begin(self) -> bool:
        if self._breaker.open and (self._ready or not self._breaker.may_try(self.in_flight)):
            return False
        return self._taken < WAITING

    def _id(self, record: Record) -> str:
        return f"{record.topic}/{record.partition}/{record.offset}"

    def _begin(self, record: Record, ledger: Ledger) -> "asyncio.Task[None] | None":
        job = EventJob(record, ledger, self._lane(record))
        self._taken += 1
        if ledger.redelivered_to > record.offset:
            self._metrics.redelivered.inc()
        if job.lane is not None:
            line = self._lanes.setdefault(job.lane, deque())
            line.append(job)
            if len(line) > 1:
                return None
        self._ready.append(job)
        self._run_ready()
        return job.task

    def _lose(self, partitions: Collection[int]) -> None:
        for job in self._waiting():
            if job.record.partition in partitions:
                job.cancel("lost")
        for job in [job for job in self._left if job.record.partition in partitions]:
            self._left.remove(job)
            self._next(job)
        self._run_ready()

    def _waiting(self) -> Iterator[EventJob]:
        yield from tuple(self._jobs.values())
        yield from tuple(self._ready)
        for line in tuple(self._lanes.values()):
            yield from tuple(line)

    # --- in the order of their keys

    async def _start(self, taken: Sequence[tuple[Record, Ledger]]) -> None:
        if self._service.feed.source.delivery == "at_most_once":
            for record, ledger in taken:
                self._assignment.finish(record, ledger)
            await self._assignment.name({record.partition: ledger for record, ledger in taken})
        if self._service.key is not None:
            for record, _ in taken:
                self._keys[record.partition, record.offset] = await self._key(record)
        try:
            await super()._start(taken)
        finally:
            self._keys.clear()  # of those too that went to others before they could begin

    async def _key(self, record: Record) -> bytes | None:
        """Give what an event is kept in order by, where that is in its value."""
        assert self._service.key is not None, "else it is the record's"
        attempt = 1
        while True:
            try:
                return self._service.key((await self._service.event(record)).value)
            except SchemaRegistryError as error:  # without its key it would run beside others of its key
                log.warning("key.retry", chainlet=self.callee.name, **place_of(record), reason=str(error))
                await asyncio.sleep(policy.backoff(attempt))
                attempt += 1
            except Exception:  # noqa: BLE001 - the run of the event meets it again, and says so
                return None

    def _lane(self, record: Record) -> Lane | None:
        """Give the line that an event stands in; None for one that waits for nobody."""
        by_value = self._service.key is not None
        key = self._keys.pop((record.partition, record.offset), None) if by_value else record.key
        return None if key is None else (record.partition, key)

    async def _dispatch(self) -> None:
        """Run what is ready whenever a place is freed, by whomever."""
        while True:
            await self.places.change()
            self._run_ready()

    def _run_ready(self) -> None:
        while self._returning and self.places.taken < self.places.size:
            turn = self._returning.popleft()
            if not turn.done():
                self.places.taken += 1
                turn.set_result(None)
        while self._ready:
            job = self._ready[0]
            if job.stop is not None:
                self._ready.popleft()
                self._next(job)
                continue
            if self.places.taken >= self.places.size or self._gives_way():
                return
            if self._breaker.open and not self._breaker.may_try(self.in_flight):
                return
            self._ready.popleft()
            self.in_flight += 1
            self.places.taken += 1
            task = job.task = self._loop.create_task(self._serve(job))
            self._jobs[task] = job

    def _gives_way(self) -> bool:
        """Leave every second place that is freed to requests, while there are any."""
        self._gave_way = self.places.asking > 0 and not self._gave_way
        return self._gave_way

    def _next(self, job: EventJob) -> None:
        """Let the next one of its line go ahead."""
        self._taken -= 1
        self.places.changed.set()  # there is room for another
        if job.lane is None:
            return
        line = self._lanes[job.lane]
        line.popleft()
        if line:
            self._ready.append(line[0])
        else:
            del self._lanes[job.lane]

    # --- one event

    async def _serve(self, job: EventJob) -> None:
        left = False
        try:
            if await self._finish(job):
                self._end(job)
            else:
                left = job.stop is None
        except asyncio.CancelledError:
            if job.stop is None:
                raise
        except Exception:
            log.exception("worker.defect", chainlet=self.name, **place_of(job.record))
            self._end(job)
        finally:
            if job.task is not None:
                del self._jobs[job.task]
            self.in_flight -= 1
            self.places.taken -= 1
            if left:
                self._left.append(job)
            else:
                self._next(job)
            self.places.changed.set()

    def _end(self, job: EventJob) -> None:
        """Note an event as finished, with what is yet to be stored of it."""
        if self._service.feed.source.delivery == "at_most_once":
            return  # it is committed already
        if self._transactions is not None and self._assignment.of(job.record) is job.ledger:
            self._transactions.add(job.record.partition, job.unsent)
        self._assignment.finish(job.record, job.ledger)

    async def _finish(self, job: EventJob) -> bool:
        """Try an event until it succeeds, or is put aside; False if it is left to others."""
        service, record = self._service, job.record
        bind_contextvars(event=self._id(record))
        if job.ledger.deaths(record.offset) >= self._settings.max_deliveries:
            reason = f"{job.ledger.deaths(record.offset)} workers died while they ran this event, and nothing else"
            return await self._bury(job, DeadLetteredError(reason), "deaths")
        attempt, failed = 1, 0
        while True:
            number = self._breaker.begin()
            try:
                await self._run(job, await service.event(record))
            except _Unreadable as error:
                return await self._bury(job, error.__cause__ or error, "undecodable")
            except Exception as error:  # noqa: BLE001 - whatever user code raises
                if job.stop is not None:
                    return False  # and what it made of its cancellation is no failure
                if not self._settings.embedded and await service.callee.dead():
                    return False
                self._log(error, attempt)
                failed = failed or self._breaker.begun
                if not await self._again(error, attempt, failed):
                    return await self._bury(job, error, "failed")
                attempt += 1
            else:
                self._breaker.succeeded(number)
                self._metrics.finished["done"].inc()
                return True

    async def _again(self, error: Exception, attempt: int, failed: int) -> bool:
        """Wait until an event that failed is to be tried again; False if it is not."""
        if not is_retryable(error) and not _of_the_topics(error):
            return False
        if attempt < self._service.feed.source.retries:
            await self._put_off(policy.backoff(attempt))
            return True
        # Had it been the event's own fault, others would have succeeded meanwhile.
        if not _of_others(error) or self._breaker.blames(failed):
            return False
        with self._breaker.pause(error) as seconds:
            await self._put_off(seconds)
        return True

    async def _put_off(self, seconds: float) -> None:
        """Wait without a place, which others may use, and then for one."""
        turn: asyncio.Future[None] = self._loop.create_future()
        self.places.taken -= 1
        self.places.changed.set()
        try:
            await asyncio.sleep(seconds)
            self._returning.append(turn)
            self._run_ready()
            await turn
        finally:
            if turn.cancelled() or not turn.done():
                turn.cancel()
                self.places.taken += 1  # which its end gives back

    async def _run(self, job: EventJob, event: Event[Any]) -> None:
        """Run an event once, and have stored all that it gives."""
        service, callee = self._service, self._service.callee
        scope = Scope.new(self._settings.deadline)
        scope.request_id = f"{event.topic}/{event.partition}/{event.offset}"
        scope.traceparent, scope.tracestate = event.headers.get("traceparent"), event.headers.get("tracestate")
        policy.current.set(scope)
        feed, item = service.feed, event if service.feed.whole else event.value
        arguments = {feed.argument: [item] if feed.batched else item}
        service.queue_wait.observe(max(0.0, time.time() - event.timestamp_ms / 1000))
        began = time.perf_counter()
        given = _Given(service.written, event, transactional=self._transactions is not None)
        try:
            async with asyncio.timeout(self._settings.deadline):
                if callee.signature.streaming:
                    async with aclosing(callee.stream(arguments)) as items:
                        async for item in items:
                            await given.add(item)
                else:
                    result = await callee.invoke(arguments)
                    await given.add(result[0] if feed.batched else result)
                job.unsent = await given.stored()
        except asyncio.CancelledError as error:
            if job.stop is not None or (job.task is not None and job.task.cancelling()):
                raise
            raise RuntimeError("run_remote ended in the cancellation of something that it waited for") from error
        finally:
            scope.close()
            service.run_time.observe(time.perf_counter() - began)

    async def _bury(self, job: EventJob, error: BaseException, reason: str) -> bool:
        """Put an event into the dead-letter topic. False if that can't be done."""
        job.unsent = []
        metrics.DEAD_LETTERED.labels(self._service.name, reason).inc()
        group = self._service.group
        try:
            topic, offset = await persist(
                lambda: send_letter(self._service.broker, job.record, group, error), job.record
            )
        except BrokerError as unsent:
            log.error("letter.unsent", **place_of(job.record), reason=str(unsent))  # noqa: TRY400 - it says it all
            return False
        self._metrics.finished["dead_lettered"].inc()
        log.warning("event.dead_lettered", letter=f"{topic}@{offset}", reason=message_of(error), **place_of(job.record))
        return True

    def _log(self, error: Exception, attempt: int) -> None:
        frames = user_frames(error.__traceback__)
        log.warning(
            "event.failed",
            chainlet=self.callee.name,
            attempt=attempt,
            error=type(error).__name__,
            message=message_of(error),
            at=f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None,
        )


def _of_others(error: Exception) -> bool:
    """Tell whether an error may be that of something that the Chainlet depends on, and not of the event."""
    return isinstance(error, OSError | TimeoutError | ChainsRuntimeError) and not isinstance(
        error, InvalidArgumentError | InvalidResultError | RecordTooLargeError
    )


def _of_the_topics(error: Exception) -> bool:
    """Tell whether what is written can't be written by anybody, until a right or a topic, say, is there."""
    return isinstance(error, BrokerError | SchemaRegistryError) and not isinstance(
        error, RecordTooLargeError | UnknownSchemaError
    )
