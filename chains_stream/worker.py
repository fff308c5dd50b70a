"""The callee's side: take requests from a Chainlet's topic, have them served, acknowledge; and drain.

A `Worker` serves one Chainlet, a `Host` all those of one process. A request is committed only after the broker has
stored its whole answer, and only when all requests before it on its partition are finished.
"""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack

from chains_stream import metrics
from chains_stream.assignment import Assignment
from chains_stream.balance import Busy, Reporter
from chains_stream.batching import FrameBatcher
from chains_stream.broker import Broker, Record, TopicSpec
from chains_stream.calls import Caller, remote_target
from chains_stream.chain import Chain
from chains_stream.chainlet import ChainletBase, chainlet_name, dependencies, instantiate, signature
from chains_stream.control import Cancel, CancelRequest, Credit, Message
from chains_stream.delays import Delays
from chains_stream.deliveries import webhooks_spec
from chains_stream.errors import ChainsError, ChainsRuntimeError, ChainsUsageError, message_of, user_frames
from chains_stream.event_service import EventService
from chains_stream.event_worker import EventWorker
from chains_stream.events import feed_of, group_of
from chains_stream.letters import dead_letter_spec
from chains_stream.local import FAILED, Callee, LocalTarget
from chains_stream.log import get_logger
from chains_stream.offsets import Ledger
from chains_stream.options import DeploymentContext, RPCOptions
from chains_stream.outcome import Outcome
from chains_stream.quarantine import Quarantine
from chains_stream.serving import Job, Service, request_id_of
from chains_stream.settings import Settings
from chains_stream.signature import background_topic
from chains_stream.stub import Stub
from chains_stream.taking import Places, Taker

MAX_UNSTORED_ANSWERS = 1024  # a worker: answers that the broker has not acknowledged yet
CALLERS_SHARE = 0.75  # of the grace period that is left, for a Chainlet that calls others of the process

log = get_logger(__name__)


class Worker(Taker[Job]):
    """Serves one Chainlet from its topic, up to its `predict_concurrency` requests at once."""

    def __init__(self, service: Service, quarantine: Quarantine, behind: "Worker | None" = None) -> None:
        callee, settings = service.callee, service.settings
        assignment = Assignment(callee.name, service.topic, service.broker, settings, self._lose)
        places = Places(callee.concurrency) if behind is None else behind.places
        super().__init__(service.name, assignment, settings, quarantine, places=places, behind=behind)
        self.topic = service.topic
        self.callee = callee
        self._service = service
        self._fed = False  # whether events have places of it
        self._by_id: dict[bytes, Job] = {}  # a stranger's requests may have no id, or repeat one
        self._cancellations = service.async_requests.cancellations
        self._metrics = metrics.OfWorker(self.name)

    def share(self) -> None:
        """Leave places to events too, each of the two in its turn while both have work."""
        self._fed = self._shared = True

    async def start(self) -> None:
        """Join the group and begin to take requests.

        The control topic must have been read back by now, for as long as `settings.deadline`.
        """
        self._cancellations.heard_back(min(self._settings.deadline, self._settings.reply_retention_ms / 1000))
        await super().start()
        log.info("worker.started", chainlet=self.name, topic=self.topic)

    async def drain(self, grace: float) -> None:
        await super().drain(grace)
        await self._service.read_back.close()

    async def _orderly(self) -> bool:
        # Where its Chainlet died, a request may have killed it, and is to be found as if the process had been killed.
        return not await self.callee.dead()

    def handle(self, message: Message) -> None:
        """Take a control message about a request on this worker's topic, which may be another worker's."""
        match message:
            case Cancel(correlation_id=correlation_id, partition=partition, offset=offset):
                if (job := self._by_id.get(correlation_id)) is not None:
                    job.cancel("cancelled")
                elif not self._assignment.done(partition, offset):
                    self._cancellations.add(correlation_id)
            case CancelRequest(request_id=request_id):
                self._cancellations.add(request_id)
                for job in self._jobs.values():
                    if job.request is not None and job.request.request_id == request_id:
                        job.cancel("cancelled")
            case Credit(correlation_id=correlation_id, chunks=chunks, size=size):
                if (job := self._by_id.get(correlation_id)) is not None:
                    job.credit(chunks, size)
            case _:
                pass  # for callers

    def busy(self) -> Busy:
        """Say how busy it is, for callers to choose by: the places that are taken, by whomever, are no longer free."""
        return Busy(sorted(self._assignment.held), self.places.taken, sum(self.lag().values()), self.places.size)

    def _free(self) -> int:
        unstored = len(self._jobs) - self.in_flight
        # One is taken to wait for its turn while all places are: else no place would ever be seen to be free.
        free = max(int(self._fed), self.places.size - self.places.taken)
        return min(free, MAX_UNSTORED_ANSWERS - unstored)

    def _may_take(self) -> bool:
        return self._fed or self._may_begin()

    async def _room(self, record: Record) -> None:
        if not self._fed or self._may_begin():
            return await super()._room(record)
        self.places.asking += 1
        try:
            await super()._room(record)
        finally:
            self.places.asking -= 1

    def _id(self, record: Record) -> str:
        return request_id_of(record)

    # --- serving

    def _begin(self, record: Record, ledger: Ledger) -> "asyncio.Task[None]":
        self.in_flight += 1
        self.places.taken += 1
        self.places.begun += 1
        job = Job(record, ledger, self._service)
        task = job.task = self._loop.create_task(self._serve(job, ledger))
        self._jobs[task] = job
        if job.redelivered:
            self._metrics.redelivered.inc()
        return task

    async def _serve(self, job: Job, ledger: Ledger) -> None:
        try:
            outcome = await self._run(job)
            if job.stop in ("lost", "drained") or await self._left_behind(outcome):
                return  # it is not finished: another worker takes it up
            if outcome is not None and not (outcome.error is not None and await job.put_off(outcome.error)):
                await job.answer(outcome)
                self._metrics.finished[outcome.kind].inc()
        except Exception as error:
            # A defect of ours. Left open, the record would hold up its partition for ever.
            log.exception("worker.defect", chainlet=self.name, offset=job.record.offset)
            await job.apologize(error)
        finally:
            del self._jobs[job.task]
            self.places.changed.set()
        self._assignment.finish(job.record, ledger)

    async def _left_behind(self, outcome: Outcome | None) -> bool:
        """Tell whether a request failed as its Chainlet is dead here, and another process may run it."""
        if outcome is None or outcome.error is None or self._settings.embedded or not await self.callee.dead():
            return False
        log.warning("request.left", chainlet=self.name, reason=message_of(outcome.error))
        return True

    async def _run(self, job: Job) -> Outcome | None:
        """Have a request run, in one of the places that `predict_concurrency` gives."""
        try:
            request = await job.read()
            if request is None:
                return None
            if job.deaths >= self._settings.max_deliveries:
                return await job.refuse()
            if self._cancellations.meet(request):
                self._metrics.cancelled["queued"].inc()
                return Outcome(cancelled=True)
            if request.retry is not None and request.correlation_id in self._by_id:
                # Published again by a worker that was killed before it could commit: the one that runs ends it.
                log.info(
                    "request.repeated", chainlet=self.name, partition=job.record.partition, offset=job.record.offset
                )
                return None
            self._by_id[request.correlation_id] = job
            try:
                outcome = await job.run()
            finally:
                if self._by_id.get(request.correlation_id) is job:
                    del self._by_id[request.correlation_id]
            if outcome is not None and outcome.cancelled:
                self._metrics.cancelled["running"].inc()
            return outcome
        finally:
            self.in_flight -= 1
            self.places.taken -= 1
            self.places.changed.set()


class Host:
    """The Chainlets that this process serves, each with its dependencies in place."""

    def __init__(
        self,
        chain: Chain,
        served: Sequence[type[ChainletBase]],
        broker: Broker,
        caller: Caller,
        settings: Settings,
        *,
        delays: Delays | None = None,
    ) -> None:
        """Host the `served` Chainlets; `delays` are those of requests that are tried again."""
        self._chain = chain
        self._served = [cls for cls in chain.chainlets if cls in served]
        self._broker = broker
        self._caller = caller
        self._settings = settings
        self._frames = FrameBatcher(broker)
        self._callees: dict[type[ChainletBase], Callee] = {}
        self._entered = AsyncExitStack()  # Chainlets that are context managers
        self._delays = delays or Delays(broker, settings)
        self.workers: list[Worker] = []
        self._all: list[Worker] = []
        self.background: Worker | None = None  # of the entrypoint
        self.feeds: list[EventWorker] = []
        self._reporter = Reporter(caller.control, self._all)

    async def start(self) -> None:
        """Create the topics, build the Chainlets, dependencies first, then take requests."""
        settings, entrypoint = self._settings, self._chain.entrypoint
        topics = {cls: self._chain.topic(cls, settings.namespace) for cls in self._served}
        await self._ensure(topics)
        called = {each.chainlet for cls in self._served for each in dependencies(cls).values()}
        await self._caller.use(*(self._chain.topic(cls, settings.namespace) for cls in called))
        quarantine = Quarantine()
        sources = [found.source.topic for cls in self._served if (found := feed_of(cls)) is not None]
        for cls, topic in topics.items():
            callee = self._callees[cls] = await self._build(cls)
            worker = Worker(self._service(callee, topic), quarantine)
            self.workers.append(worker)
            if (fed := feed_of(cls)) is not None:
                worker.share()
                group = group_of(fed.source, settings.namespace, self._chain.name, chainlet_name(cls))
                events = EventService(callee, fed, group, self._broker, settings, read=sources)
                self.feeds.append(EventWorker(events, quarantine, worker.places))
            if cls is entrypoint:
                self.background = Worker(self._service(callee, background_topic(topic)), quarantine, behind=worker)
        self._all += self.workers if self.background is None else [*self.workers, self.background]
        # As far back as work can have waited: what was cancelled while nobody was there is not run.
        await self._caller.control.follow({w.topic: w.handle for w in self._all}, since=settings.deadline)
        try:
            async with asyncio.TaskGroup() as joining:
                for worker in self._all:
                    joining.create_task(worker.start())
                for feed in self.feeds:
                    joining.create_task(feed.start())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None  # one is enough to know, and the others follow from it
        self._reporter.start()

    async def failed(self) -> None:
        """Wait until a worker can't go on. Raises what stopped it."""
        control = self._caller.control
        await asyncio.gather(
            *(worker.failed() for worker in self._all),
            *(feed.failed() for feed in self.feeds),
            control.failed(),
            self._caller.failed(),
            self._reporter.failed(),
            *map(_death, self._callees.values()),
        )

    async def drain(self) -> None:
        """Stop, callers before those they call: what still runs may need an answer from below.

        Before them come those that are dead: what needs an answer of theirs has it from other processes.
        """
        try:
            await self._stop()
        finally:  # an engine may have processes, which nobody else ends
            try:
                await self._entered.aclose()
            finally:
                for callee in self._callees.values():
                    callee.close()

    async def _stop(self) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + self._settings.grace_period
        # Nobody waits for events: what does not end soon is run again by whoever takes their partitions over.
        grace = self._settings.grace_period * (CALLERS_SHARE if self.workers else 1)
        await asyncio.gather(*(feed.drain(grace) for feed in self.feeds))
        workers = self.workers[::-1]
        dead = [worker for worker in workers if await worker.callee.dead()]
        order = [*dead, *(worker for worker in workers if worker not in dead)]
        for left, worker in zip(reversed(range(len(order))), order, strict=True):
            remaining = max(0.0, end - loop.time())
            # What is called by other processes too goes on meanwhile, and needs some of it for itself.
            both = [worker]
            if self.background is not None and self.background.callee is worker.callee:
                both.append(self.background)
            async with AsyncExitStack() as stack:
                for one in both:
                    await stack.enter_async_context(self._reporter.leaving(one))
                grace = remaining * CALLERS_SHARE if left else remaining
                await asyncio.gather(*(one.drain(grace) for one in both))
        await self._frames.close()
        await self._reporter.close()

    async def _ensure(self, topics: Mapping[type[ChainletBase], str]) -> None:
        """Create the topics that are taken from, and those that workers publish to."""
        settings, topic = self._settings, topics.get(self._chain.entrypoint)
        taken = [*topics.values(), *([] if topic is None else [background_topic(topic)])]
        specs = [TopicSpec(name, settings.partitions, settings.request_retention_ms) for name in taken]
        specs += [dead_letter_spec(name, settings) for name in taken]
        await self._broker.ensure_topics([*specs, *([] if topic is None else [webhooks_spec(topic, settings)])])
        await self._delays.ensure()

    def _service(self, callee: Callee, topic: str) -> Service:
        frames, store = self._frames, self._caller.store
        return Service(
            callee,
            topic,
            self._broker,
            frames=frames,
            store=store,
            settings=self._settings,
            delays=self._delays,
            caller=self._caller,
        )

    async def _build(self, cls: type[ChainletBase]) -> Callee:
        """Build a Chainlet, and enter it if it is a context manager. Raises ChainsUsageError, ChainsRuntimeError."""
        stubs = {
            name: await self._stub(dependency.chainlet, dependency.options)
            for name, dependency in dependencies(cls).items()
        }
        assets = cls.remote_config.assets
        context = DeploymentContext.from_environment(assets.secret_keys)
        name = chainlet_name(cls)
        log.info("chainlet.loading", chainlet=name)
        doing = "__init__"
        try:
            callee = Callee(cls, instantiate(cls, stubs, context))
            doing = "__aenter__"
            await callee.enter(self._entered)
        except ChainsError as error:  # which was written to be read
            kind = ChainsUsageError if isinstance(error, ChainsUsageError) else ChainsRuntimeError
            raise kind(f"{name} can't start: {message_of(error)}") from error
        except Exception as error:
            frames = user_frames(error.__traceback__)
            place = f"{frames[-1].filename}:{frames[-1].lineno}: " if frames else ""
            raise ChainsUsageError(f"{place}{name}.{doing} failed: {type(error).__name__}: {error}") from error
        here = [each.chainlet for each in dependencies(cls).values() if each.options.colocated]
        callee.beneath = [self._callees[other] for other in here if other in self._callees]
        return callee

    async def _stub(self, cls: type[ChainletBase], options: RPCOptions) -> Stub:
        callee = self._callees.get(cls)
        if options.colocated and callee is not None:
            callee.colocated = True
            return Stub(callee.signature, LocalTarget(callee), options, self._settings.deadline)
        target = await remote_target(self._chain, cls, self._caller, self._settings)
        return Stub(signature(cls), target, options, self._settings.deadline)


async def _death(callee: Callee) -> None:
    """Wait until a Chainlet that tells it can't serve any more. Raises ChainsRuntimeError, which says why."""
    failed = getattr(callee.instance, FAILED, None)
    if failed is None:
        return
    try:
        await failed()
    except Exception as error:
        raise ChainsRuntimeError(f"{callee.name} can't serve any more: {message_of(error)}") from error
