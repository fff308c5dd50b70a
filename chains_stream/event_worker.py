"""Feeding a Chainlet from a topic: events in order for each key, many at once across keys; what it gives is written.

An event is finished once all that its Chainlet gave for it is stored, so that nothing is lost. One that fails is tried
again where it stands: others of its key wait, those of other keys go on. If whatever fails is not the event's fault, as
no other succeeds either, all wait until something does.
"""

import asyncio
import contextvars
import functools
import time
from collections import deque
from collections.abc import Awaitable, Collection, Iterator, Sequence
from contextlib import aclosing
from typing import Any

from chains_stream import metrics, policy
from chains_stream.assignment import Assignment
from chains_stream.breaker import Breaker, of_others, of_the_topics
from chains_stream.broker import Record
from chains_stream.errors import BrokerError, DeadLetteredError, is_retryable
from chains_stream.event_lines import WAITING, EventJob, Lines, Unstored
from chains_stream.event_service import EventService, Given, Keyed, Storing, Unreadable
from chains_stream.log import get_logger
from chains_stream.messages import now_ms
from chains_stream.offsets import Ledger
from chains_stream.patience import place_of
from chains_stream.policy import Scope
from chains_stream.quarantine import Quarantine
from chains_stream.taking import Places, Taker
from chains_stream.timeouts import Timeout
from chains_stream.transactions import Transactions
from chains_stream.turns import Turns

LEAST = 128  # records that are taken at once, if they are there: each time costs
COMMITTED = WAITING // 2  # records that are with `at_most_once`, as each time takes a commit

log = get_logger(__name__)


class EventWorker(Taker[EventJob]):
    """Feeds one Chainlet from its source, as many events at once as it has places."""

    def __init__(self, service: EventService, quarantine: Quarantine, places: Places) -> None:
        source, settings = service.feed.source, service.settings
        self._transactions: Transactions | None = None
        if source.delivery == "exactly_once":
            bury = functools.partial(self._put_aside, reason="failed")  # late, as what it gave can't be stored
            self._transactions = Transactions(service.broker, source.topic, service.group, places.changed.set, bury)
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
        self._least = LEAST
        if source.delivery == "at_most_once":
            self._least = self._most = COMMITTED
        self.callee = service.callee
        self._service = service
        self._lines = Lines(assignment)
        self._ready = self._lines.ready
        self._returning: deque[asyncio.Future[None]] = deque()  # events that were put off, and need a place again
        self._context = contextvars.copy_context()  # that each event begins with
        self._storing = Unstored(self._stored, self._context)
        self._due = False  # one more of those that are ready is about to begin
        self._turns = Turns(functools.partial(metrics.IN_HAND.beside, self))
        self._left: list[EventJob] = []  # to others: those behind them in their lines don't run either
        self._keyed: dict[tuple[int, int], Keyed] = {}  # what is about to begin, where values have the keys
        self._begun_before = -1  # requests, by the time when the last event began
        self._leaving = False  # what it has not done to others
        self.breaker = self._breaker = Breaker(service.name)
        self._metrics = metrics.OfWorker(service.name)

    async def failed(self) -> None:
        await asyncio.gather(super().failed(), asyncio.shield(self._stuck))

    async def drain(self, grace: float) -> None:
        await super().drain(grace)
        self._stuck.cancel()
        await self._service.registry.close()

    async def start(self) -> None:
        """Join the group and begin to take events."""
        self._stuck: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stuck.add_done_callback(_retrieved)
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
            while (self._jobs or self._ready or self._storing) and (left := end - self._loop.time()) > 0:
                await self.places.change(left)
        else:
            self._leaving = True
        for job in self._waiting():
            # What has not begun would begin as the one before it is cancelled, and overtake it.
            if (job.task is None and not job.storing) or (job.put_off and self._leaving):
                job.cancel("drained")
        await super()._finish_up(max(0.0, end - self._loop.time()))
        while self._storing and (left := end - self._loop.time()) > 0:
            await self.places.change(left)
        for job in self._storing:
            job.cancel("drained")

    def _free(self) -> int:
        if self._breaker.open:
            return int(self._may_begin())
        if self._transactions is not None and self._transactions.full:
            return 0
        free = WAITING - self._lines.taken
        return free if free >= self._least else 0

    def _may_begin(self) -> bool:
        if self._breaker.open and (self._ready or not self._breaker.may_try(self.in_flight)):
            return False
        return self._lines.taken < WAITING

    def _id(self, record: Record) -> str:
        return f"{record.topic}/{record.partition}/{record.offset}"

    def _begin(self, record: Record, ledger: Ledger) -> "asyncio.Task[None] | None":
        job = EventJob(record, ledger, self._keyed.pop((record.partition, record.offset), None))
        if ledger.redelivered_to > record.offset:
            self._metrics.redelivered.inc()
        if not self._lines.join(job):
            return None
        if self._quarantine.busy and self.places.taken - self._turns.aside < self.places.size:
            self.in_flight += 1
            self._begin_task(job)  # whoever has it run alone waits for its task
            return job.task
        self._ready.append(job)
        if not self._due:
            self._run_ready()
        return None

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
        yield from self._storing
        yield from self._lines

    def _running(self) -> Iterator[tuple[str, "asyncio.Future[None]"]]:
        yield from super()._running()
        for job in self._storing:
            job.stored = job.stored or self._loop.create_future()
            yield job.id, job.stored

    # --- in the order of their keys

    async def _start(self, taken: Sequence[tuple[Record, Ledger]]) -> None:
        at_most_once = self._service.feed.source.delivery == "at_most_once"
        if at_most_once:
            for record, ledger in taken:
                self._assignment.finish(record, ledger)
            await self._assignment.name({record.partition: ledger for record, ledger in taken})
        if self._service.key is not None:
            for record, _ in taken:
                self._keyed[record.partition, record.offset] = await self._service.keyed(record)
        if at_most_once or self._service.key is not None:  # meanwhile partitions may have gone to others
            taken = [(record, ledger) for record, ledger in taken if self._assignment.of(record) is ledger]
        try:
            await super()._start(taken)
        finally:
            self._keyed.clear()  # of those too that went to others before they could begin

    async def _dispatch(self) -> None:
        """Run what is ready whenever a place is freed, by whomever."""
        while True:
            await self.places.change()
            self._run_ready()

    def _run_ready(self) -> None:
        self._take_back()
        if self._ready and not self._due:
            self._due = True
            self._loop.call_soon(self._begin_one, context=self._context)

    def _take_back(self) -> None:
        """Give those a place that were put off, and are to be tried again."""
        while self._returning and self.places.taken < self.places.size:
            turn = self._returning.popleft()
            if not turn.done():
                self.places.taken += 1
                turn.set_result(None)

    def _begin_one(self) -> None:
        """Run what is ready beside what runs: it has come to where it waits, or would itself go on with it."""
        self._due = False
        if self._turns.aside or self._returning or self.places.taken >= self.places.size:
            return
        if (job := self._next_ready()) is not None:
            self._begin_task(job)

    def _begin_task(self, job: EventJob) -> None:
        """Run an event in a place of its own, and then others in it."""
        self.places.taken += 1
        job.placed = True
        self._begin_work(job)

    def _begin_work(self, job: EventJob, error: BaseException | None = None) -> None:
        work = self._work(job, error)
        job.task = self._loop.create_task(work, context=self._context.copy())
        self._jobs[job.task] = job

    def _next_ready(self) -> EventJob | None:
        """Take one that is ready, for which there is a place."""
        while self._ready:
            job = self._ready[0]
            if job.stop is not None:
                self._ready.popleft()
                self._next(job)
                continue
            if (self.places.asking and self._gives_way()) or (
                self._breaker.open and not self._breaker.may_try(self.in_flight)
            ):
                return None
            self._begun_before = self.places.begun
            self.in_flight += 1
            return self._ready.popleft()
        return None

    def _gives_way(self) -> bool:
        """While there are requests, leave every second place that is freed to them."""
        return self.places.begun == self._begun_before

    def _give_place_back(self, job: EventJob) -> None:
        """Let others have the place of an event that does not run any more, or not now."""
        if job.placed:
            job.placed = False
            self.places.taken -= 1
            self.places.changed.set()

    def _next(self, job: EventJob) -> None:
        """Let the next one of its line go ahead."""
        self._lines.leave(job)
        self.places.changed.set()  # there is room for another

    # --- one event

    async def _work(self, job: EventJob, error: BaseException | None) -> None:
        """Run an event, or go on with it after an error in storing, and then others that are ready, in its place.

        A task for each would cost as much as all else that is done to run it.
        """
        task, context = job.task, contextvars.copy_context()
        assert task is not None, "this one"
        try:
            while True:
                await self._serve(job, error)
                # The next one must find all as if the task were its own.
                used = job.stop is not None or task.cancelling() or contextvars.copy_context() != context
                if used or not job.placed or self._returning:
                    return
                if time.perf_counter() > self._turns.end:
                    await self._turns.give_way()
                if self._quarantine.busy:
                    return
                following = self._next_ready()
                if following is None:
                    return
                job.placed, following.placed = False, True
                job, error = following, None
                job.task = task
                self._jobs[task] = job
        finally:
            self._give_place_back(job)
            self._take_back()  # before what has not begun, which `_dispatch` sees to

    async def _serve(self, job: EventJob, error: BaseException | None) -> None:
        if not self._due:
            self._run_ready()  # others, as soon as this one waits
        over = left = False
        try:
            over = await self._finish(job, error)
            left = job.stop is None
            if over:
                self._end(job)
        except asyncio.CancelledError:
            if job.stop is None:
                raise
        except Exception:
            log.exception("worker.defect", chainlet=self.name, **place_of(job.record))
            over = True
            self._end(job)
        finally:
            assert job.task is not None, "this one"
            del self._jobs[job.task]
            job.task = None
            if not job.storing:
                self._over(job, left=left and not over)

    def _over(self, job: EventJob, *, left: bool = False) -> None:
        """Go on without an event that is done, or stopped, or `left` to others."""
        self.in_flight -= 1
        if left:
            self._left.append(job)
            self.places.changed.set()
        else:
            self._next(job)

    def _stored(self, job: EventJob) -> None:
        """Go on with an event of which nothing is yet to be stored: there may have been an error in that."""
        if job.error is None:
            self._succeeded(job)
            self._end(job)
            self._over(job)
        elif job.stop is not None:
            self._over(job)
        else:
            self._begin_work(job, job.error)  # which has no place until it is tried again
        if job.stored is not None:
            job.stored.set_result(None)
            job.stored = None

    def _end(self, job: EventJob) -> None:
        """Note an event as finished, with what is yet to be stored of it."""
        if self._service.feed.source.delivery == "at_most_once":
            return  # it is committed already
        if self._transactions is not None and self._assignment.of(job.record) is job.ledger:
            self._transactions.add(job.record, job.unsent)
        self._assignment.finish(job.record, job.ledger)

    async def _finish(self, job: EventJob, error: BaseException | None) -> bool:
        """Try an event until it succeeds, or is put aside; False if it is left to others, or yet to be stored."""
        record = job.record
        if job.ledger.deaths(record.offset) >= self._settings.max_deliveries:
            reason = f"{job.ledger.deaths(record.offset)} workers died while they ran this event, and nothing else"
            return await self._bury(job, DeadLetteredError(reason), "deaths")
        while True:
            if error is not None and (over := await self._failed(job, error)) is not None:
                return over
            job.number = self._breaker.begin()
            try:
                if self._service.needs_registry and (missing := self._service.missing(record)) is not None:
                    await missing
                storing = await self._run(job, self._item(job))
            except Unreadable as unreadable:
                return await self._bury(job, unreadable.__cause__ or unreadable, "undecodable")
            except Exception as raised:  # noqa: BLE001 - whatever user code raises
                error = raised
                continue
            if storing:
                self._storing.add(job, storing)
                return False
            self._succeeded(job)
            return True

    async def _failed(self, job: EventJob, error: BaseException) -> bool | None:
        """Wait until an event is to be tried again, and give None; else whether it is put aside, or left to others."""
        if job.stop is not None:
            return False  # and what it made of its cancellation is no failure
        if not self._settings.embedded and await self.callee.dead():
            return False
        self._service.tell(job.record, error, job.attempt)
        job.failed = job.failed or self._breaker.begun
        if not await self._again(job, error):
            return await self._bury(job, error, "failed")
        job.attempt += 1
        return None

    def _succeeded(self, job: EventJob) -> None:
        self._breaker.succeeded(job.number)
        self._metrics.finished["done"].inc()

    async def _again(self, job: EventJob, error: BaseException) -> bool:
        """Wait until an event that failed is to be tried again; False if it is not."""
        if not is_retryable(error) and not of_the_topics(error):
            return False
        if job.attempt < self._service.feed.source.retries:
            await self._put_off(job, asyncio.sleep(policy.backoff(job.attempt)))
            return True
        # Had it been the event's own fault, others would have succeeded meanwhile.
        if self._breaker.blames(job.failed):
            return False
        if not of_others(error) and self._breaker.may_put_aside():
            return False
        await self._quarantine.give_up(job.id)
        with self._breaker.pause(error) as over:
            await self._put_off(job, over)
        return True

    async def _put_off(self, job: EventJob, over: Awaitable[None]) -> None:
        """Wait without a place, which others may use, until something is over, and then for a place."""
        turn: asyncio.Future[None] = self._loop.create_future()
        self._give_place_back(job)
        self.places.changed.set()  # the breaker may let one begin, if this had no place
        job.put_off = True
        if self._leaving:
            job.cancel("drained")
        try:
            await over
            self._returning.append(turn)
            self._run_ready()
            await turn
            job.put_off = False
        finally:
            job.placed = turn.done() and not turn.cancelled()
            turn.cancel()

    def _item(self, job: EventJob) -> Any:
        """Give what a run gets, which may have been read for its key. Raises what was wrong with either, Unreadable."""
        keyed = job.keyed
        if keyed is None:
            return self._service.read(job.record)
        if keyed.fault is not None:
            raise keyed.fault
        job.keyed = None  # what a run has made of it is for no other
        return keyed.item

    async def _run(self, job: EventJob, item: Any) -> Collection[Storing]:
        """Run an event once; give what is yet to be stored of what it gives. Raises what its run does."""
        service, feed, record, callee = self._service, self._service.feed, job.record, self.callee
        at_ms, deadline = now_ms(), self._settings.deadline
        scope = Scope(job.id, at_ms + int(deadline * 1000))
        if record.headers:
            scope.traceparent, scope.tracestate = map(dict(record.headers).get, ("traceparent", "tracestate"))
        service.queue_wait.observe(max(0, at_ms - record.timestamp_ms) / 1000)
        arguments = {feed.argument: [item] if feed.batched else item}
        given = Given(service.written, record.key, transactional=self._transactions is not None)
        began = time.perf_counter()
        token = policy.current.set(scope)
        try:
            with Timeout(deadline, job.task, brief=True):
                if callee.signature.streaming:
                    await self._stream(arguments, given)
                else:
                    one = callee.invoke(arguments) if callee.signature.is_async else self._in_thread(job, arguments)
                    result = await one
                    if (rest := given.add(result[0] if feed.batched else result)) is not None:
                        await rest
                if self._quarantine.busy:
                    await given.stored()  # else its task would end, and others begin, before it is done
        except asyncio.CancelledError as error:
            if job.stop is not None or (job.task is not None and job.task.cancelling()):
                raise
            raise RuntimeError("run_remote ended in the cancellation of something that it waited for") from error
        finally:
            policy.current.reset(token)
            if scope.calls:
                scope.close()
            service.run_time.observe(time.perf_counter() - began)
        job.unsent = given.held
        return given.storing

    async def _stream(self, arguments: dict[str, Any], given: Given) -> None:
        async with aclosing(self.callee.stream(arguments)) as items:
            async for item in items:
                if (rest := given.add(item)) is not None:
                    await rest

    async def _in_thread(self, job: EventJob, arguments: dict[str, Any]) -> Any:
        """Run a sync `run_remote`, to its end even if it takes too long: it would run beside its next try."""
        running = asyncio.ensure_future(self.callee.invoke(arguments))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            if job.stop is None:
                await asyncio.wait({running})
            else:
                running.cancel()
            raise

    async def _bury(self, job: EventJob, error: BaseException, reason: str) -> bool:
        """Put an event aside. False if that can't be done."""
        job.unsent = ()
        return await self._put_aside(job.record, error, reason)

    async def _put_aside(self, record: Record, error: BaseException, reason: str) -> bool:
        """Put an event into the dead-letter topic. False if that can't be done, which ends this worker."""
        try:
            await self._service.put_aside(record, error, reason)
        except BrokerError as unsent:
            log.error("letter.unsent", **place_of(record), reason=str(unsent))  # noqa: TRY400 - it says it all
            if not self._stuck.done():
                self._stuck.set_exception(unsent)
            return False
        self._metrics.finished["dead_lettered"].inc()
        return True


def _retrieved(stuck: "asyncio.Future[None]") -> None:
    """Nobody may wait for it any more: asyncio should not complain that nobody did."""
    if not stuck.cancelled():
        stuck.exception()
