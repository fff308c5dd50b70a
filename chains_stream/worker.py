"""The callee's side: take requests from a Chainlet's topic, have them served, acknowledge; and drain.

A `Worker` serves one Chainlet, a `Host` all those of one process. A request is committed only after the broker has
stored its whole answer, and only when all requests before it on its partition are finished.
"""

import asyncio
import inspect
from collections.abc import Sequence

from chains_stream.broker import Broker, Committed, GroupConsumer, Record, TopicSpec
from chains_stream.calls import Caller, remote_target
from chains_stream.chain import Chain
from chains_stream.chainlet import ChainletBase, chainlet_name, dependencies, instantiate, signature
from chains_stream.control import Cancel, Credit, Message
from chains_stream.errors import BrokerError, ChainsUsageError, user_frames
from chains_stream.local import Callee, LocalTarget
from chains_stream.log import get_logger
from chains_stream.offsets import Ledger, Note
from chains_stream.options import DeploymentContext, RPCOptions
from chains_stream.policy import backoff
from chains_stream.serving import Job, Outcome
from chains_stream.settings import Settings
from chains_stream.stub import Stub

COMMIT_INTERVAL = 0.1  # seconds between two commits: what a crash may repeat, against requests to the broker
MAX_UNSTORED_ANSWERS = 1024  # a worker: answers that the broker has not acknowledged yet
MAX_CANCELLED = 10_000  # a worker: cancelled requests remembered until they are met in the queue
CANCEL_PATIENCE = 5.0  # seconds for cancelled work to end, when the process does

log = get_logger(__name__)


class Worker:
    """Serves one Chainlet from its topic, up to its `predict_concurrency` requests at once."""

    def __init__(self, callee: Callee, topic: str, broker: Broker, settings: Settings) -> None:
        self.topic = topic
        self.callee = callee
        self._broker = broker
        self._settings = settings
        self._consumer: GroupConsumer | None = None
        self._held: frozenset[int] = frozenset()
        self._ledgers: dict[int, Ledger] = {}
        self._committed: dict[int, int] = {}
        self._notes: dict[int, Note] = {}  # of the partitions that were taken over
        self._running = 0
        self._jobs: dict[asyncio.Task[None], Job] = {}
        self._by_id: dict[bytes, Job] = {}  # a stranger's requests may have no id, or repeat one
        self._cancelled: dict[bytes, tuple[int, int]] = {}  # partition and offset, from which on they may be met
        self._freed = asyncio.Event()
        self._finished = asyncio.Event()
        self._taking: asyncio.Task[None] | None = None
        self._committing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Join the group and begin to take requests."""
        self._consumer = await self._broker.consume(
            self.topic, self.topic, on_assigned=self._assigned, on_revoked=self._revoked
        )
        name = self.callee.name
        self._taking = asyncio.create_task(self._take(self._consumer), name=f"take {name}")
        self._committing = asyncio.create_task(self._commit_regularly(), name=f"commit {name}")
        log.info("worker.started", chainlet=name, topic=self.topic)

    async def failed(self) -> None:
        """Wait until the worker can't go on. Raises what stopped it."""
        await asyncio.gather(*(asyncio.shield(task) for task in (self._taking, self._committing) if task is not None))

    async def drain(self, grace: float) -> None:
        """Stop taking, give running requests `grace` seconds, commit, and leave; the unfinished are left to others."""
        await _end(self._taking)
        if self._jobs:
            await asyncio.wait(self._jobs, timeout=grace)
        if self._jobs:
            log.warning("worker.unfinished", chainlet=self.callee.name, requests=len(self._jobs))
            for task, job in self._jobs.items():
                job.cancel("drained")
                task.cancel()
            _, ignoring = await asyncio.wait(self._jobs, timeout=CANCEL_PATIENCE)
            if ignoring:
                log.warning("worker.abandoned", chainlet=self.callee.name, requests=len(ignoring))
        await _end(self._committing)
        if self._consumer is not None:
            await self._consumer.close()  # which commits, when the partitions are revoked
        log.info("worker.stopped", chainlet=self.callee.name)

    def handle(self, message: Message) -> None:
        """Take a control message about a request on this worker's topic, which may be another worker's."""
        job = self._by_id.get(message.correlation_id)
        match message:
            case Cancel(correlation_id=correlation_id, partition=partition, offset=offset):
                if job is not None:
                    job.cancel("cancelled")
                elif partition in self._held:
                    self._cancelled[correlation_id] = (partition, offset)
                    if len(self._cancelled) > MAX_CANCELLED:
                        del self._cancelled[next(iter(self._cancelled))]
            case Credit(chunks=chunks, size=size):
                if job is not None:
                    job.credit(chunks, size)

    async def healthy(self) -> bool:
        """Ask the Chainlet's own `is_healthy`, if it has one."""
        check = getattr(self.callee.instance, "is_healthy", None)
        if check is None:
            return True
        answer = check()
        return bool(await answer if inspect.isawaitable(answer) else answer)

    # --- taking and serving

    async def _take(self, consumer: GroupConsumer) -> None:
        concurrency = self.callee.concurrency
        while True:
            unstored = len(self._jobs) - self._running
            free = min(concurrency - self._running, MAX_UNSTORED_ANSWERS - unstored)
            if free <= 0:
                self._freed.clear()
                await self._freed.wait()
                continue
            for record in await consumer.fetch(free):
                note = self._notes.get(record.partition) or await self._take_over(consumer, record)
                if note is not None and self._ledgers[record.partition].take(record.offset):
                    self._begin(record, self._ledgers[record.partition], note.epoch)

    async def _take_over(self, consumer: GroupConsumer, first: Record) -> Note | None:
        """Raise the epoch of a partition before anything of it is run; None if it is lost meanwhile."""
        partition = first.partition
        attempt = 1
        while partition in self._held:
            try:
                committed = (await consumer.committed([partition])).get(partition)
                note = Note(Note.read(committed.metadata if committed else "").epoch + 1)
                position = Committed(committed.offset if committed else first.offset, note.write())
                if partition in await consumer.commit({partition: position}) and partition in self._held:
                    self._notes[partition] = note
                    # What another worker has done since this record was fetched is not run again.
                    self._ledgers[partition] = Ledger(position.offset)
                    return note
            except BrokerError as error:
                log.warning("takeover.retry", chainlet=self.callee.name, partition=partition, reason=str(error))
                await asyncio.sleep(backoff(attempt))
                attempt += 1
            else:
                return None  # it went to another worker
        return None

    def _begin(self, record: Record, ledger: Ledger, epoch: int) -> None:
        self._running += 1
        job = Job(record, epoch, self.callee, self._broker, self._settings)
        task = asyncio.create_task(self._serve(job, ledger))
        self._jobs[task] = job
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._jobs[task]
        self._freed.set()

    async def _serve(self, job: Job, ledger: Ledger) -> None:
        try:
            outcome = await self._run(job)
            if job.stop in ("lost", "drained"):
                return  # it is not finished: another worker takes it up
            if outcome is not None:
                await job.answer(outcome)
        except Exception:
            # A defect of ours. Left open, the record would hold up its partition for ever.
            log.exception("worker.defect", chainlet=self.callee.name, offset=job.record.offset)
        ledger.finish(job.record.offset)
        self._finished.set()

    async def _run(self, job: Job) -> Outcome | None:
        """Have a request run, in one of the places that `predict_concurrency` gives."""
        try:
            request = await job.read()
            return await self._outcome(job, request.correlation_id) if request is not None else None
        finally:
            self._running -= 1
            self._freed.set()

    async def _outcome(self, job: Job, correlation_id: bytes) -> Outcome | None:
        if self._cancelled.pop(correlation_id, None) is not None:
            return Outcome(cancelled=True)
        self._by_id[correlation_id] = job
        try:
            return await job.run()
        finally:
            if self._by_id.get(correlation_id) is job:
                del self._by_id[correlation_id]

    # --- committing

    async def _commit_regularly(self) -> None:
        while True:
            await self._finished.wait()
            self._finished.clear()
            await self._commit()
            await asyncio.sleep(COMMIT_INTERVAL)

    async def _commit(self) -> None:
        assert self._consumer is not None, "started"
        due = {
            partition: position
            for partition, ledger in self._ledgers.items()
            if (position := ledger.position) is not None and position > self._committed.get(partition, -1)
        }
        if not due:
            return
        try:
            stored = await self._consumer.commit(
                {partition: Committed(position, self._notes[partition].write()) for partition, position in due.items()}
            )
        except BrokerError as error:
            # The next commit covers it; until then a crash repeats more.
            log.warning("commit.failed", chainlet=self.callee.name, reason=str(error))
            self._finished.set()
            return
        self._committed.update({partition: due[partition] for partition in stored})
        self._forget_cancelled()

    def _forget_cancelled(self) -> None:
        """Drop the cancellations of requests that were finished long since."""
        done = [
            correlation_id
            for correlation_id, (partition, offset) in self._cancelled.items()
            if 0 < offset < self._committed.get(partition, 0)
        ]
        for correlation_id in done:
            del self._cancelled[correlation_id]

    async def _assigned(self, partitions: frozenset[int]) -> None:
        """Go on with what was kept, and stop work on partitions that went to others."""
        lost = {partition for partition in self._ledgers if partition not in partitions}
        for partition in self._ledgers.keys() - lost:
            if await self._overtaken(partition):
                lost.add(partition)
        for job in self._jobs.values():
            if job.record.partition in lost:
                job.cancel("lost")
        for partition in lost:
            del self._ledgers[partition]
        self._notes = {partition: note for partition, note in self._notes.items() if partition in self._ledgers}
        self._held = partitions
        # What was committed while the partitions moved may not have counted: say it again.
        self._committed.clear()
        self._finished.set()
        log.info("worker.assigned", chainlet=self.callee.name, partitions=len(partitions), lost=sorted(lost))

    async def _overtaken(self, partition: int) -> bool:
        """Tell whether another worker has had a partition since, which we seem to have kept."""
        assert self._consumer is not None, "there are ledgers only after the first assignment"
        try:
            committed = (await self._consumer.committed([partition])).get(partition)
        except BrokerError as error:
            log.warning("commit.unknown", chainlet=self.callee.name, partition=partition, reason=str(error))
            return False
        return committed is not None and Note.read(committed.metadata).epoch > self._notes[partition].epoch

    async def _revoked(self, partitions: frozenset[int]) -> None:  # noqa: ARG002 - the broker's callback
        if self._consumer is not None:
            await self._commit()


async def _end(task: asyncio.Task[None] | None) -> None:
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)  # `failed` tells what it died of


class Host:
    """The Chainlets that this process serves, each with its dependencies in place."""

    def __init__(
        self,
        chain: Chain,
        served: Sequence[type[ChainletBase]],
        broker: Broker,
        caller: Caller,
        settings: Settings,
    ) -> None:
        self._chain = chain
        self._served = [cls for cls in chain.chainlets if cls in served]
        self._broker = broker
        self._caller = caller
        self._settings = settings
        self._callees: dict[type[ChainletBase], Callee] = {}
        self.workers: list[Worker] = []

    async def start(self) -> None:
        """Create the topics, build the Chainlets, dependencies first, then take requests."""
        settings = self._settings
        topics = {cls: self._chain.topic(cls, settings.namespace) for cls in self._served}
        await self._broker.ensure_topics(
            [TopicSpec(topic, settings.partitions, settings.request_retention_ms) for topic in topics.values()]
        )
        for cls, topic in topics.items():
            self._callees[cls] = Callee(cls, await self._build(cls))
            self.workers.append(Worker(self._callees[cls], topic, self._broker, settings))
        await self._caller.control.follow({worker.topic: worker.handle for worker in self.workers})
        try:
            async with asyncio.TaskGroup() as joining:
                for worker in self.workers:
                    joining.create_task(worker.start())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None  # one is enough to know, and the others follow from it

    async def failed(self) -> None:
        """Wait until a worker can't go on. Raises what stopped it."""
        control = self._caller.control
        await asyncio.gather(*(worker.failed() for worker in self.workers), control.failed(), self._caller.failed())

    async def drain(self) -> None:
        """Stop, callers before those they call: what still runs may need an answer from below."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self._settings.grace_period
        for worker in reversed(self.workers):
            await worker.drain(max(0.0, end - loop.time()))
        for callee in self._callees.values():
            callee.close()

    async def healthy(self) -> bool:
        """Ask every Chainlet that has an `is_healthy`."""
        return all([await worker.healthy() for worker in self.workers])

    async def _build(self, cls: type[ChainletBase]) -> ChainletBase:
        stubs = {
            name: await self._stub(dependency.chainlet, dependency.options)
            for name, dependency in dependencies(cls).items()
        }
        assets = cls.remote_config.assets
        context = DeploymentContext.from_environment(assets.secret_keys)
        name = chainlet_name(cls)
        log.info("chainlet.loading", chainlet=name)
        try:
            return instantiate(cls, stubs, context)
        except Exception as error:
            frames = user_frames(error.__traceback__)
            place = f"{frames[-1].filename}:{frames[-1].lineno}: " if frames else ""
            raise ChainsUsageError(f"{place}{name}.__init__ failed: {type(error).__name__}: {error}") from error

    async def _stub(self, cls: type[ChainletBase], options: RPCOptions) -> Stub:
        callee = self._callees.get(cls)
        if options.colocated and callee is not None:
            return Stub(callee.signature, LocalTarget(callee), options, self._settings.deadline)
        target = await remote_target(self._chain, cls, self._caller, self._settings)
        return Stub(signature(cls), target, options, self._settings.deadline)
