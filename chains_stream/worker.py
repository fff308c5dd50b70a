"""The callee's side: take requests from a Chainlet's topic, run them, answer, acknowledge; and drain.

A `Worker` serves one Chainlet, a `Host` all those of one process. A request is committed only after the broker has
stored its whole answer, and only when all requests before it on its partition are finished.
"""

import asyncio
import inspect
from collections.abc import Sequence
from contextlib import aclosing
from typing import Literal

import msgspec
from structlog.contextvars import bind_contextvars

from chains_stream import policy
from chains_stream.broker import Broker, Committed, GroupConsumer, Record, TopicSpec
from chains_stream.calls import Caller, remote_target
from chains_stream.chain import Chain
from chains_stream.chainlet import ChainletBase, chainlet_name, dependencies, instantiate, signature
from chains_stream.control import Cancel, Credit, Message
from chains_stream.errors import (
    BrokerError,
    ChainsRuntimeError,
    ChainsUsageError,
    DeadlineExceededError,
    RecordTooLargeError,
    http_status,
    user_frames,
)
from chains_stream.local import Callee, LocalTarget
from chains_stream.log import get_logger
from chains_stream.messages import JSON, Request
from chains_stream.offsets import Ledger
from chains_stream.options import DeploymentContext, RPCOptions
from chains_stream.policy import Scope
from chains_stream.replies import Reply, reply_to
from chains_stream.settings import Settings
from chains_stream.stub import Stub

COMMIT_INTERVAL = 0.1  # seconds between two commits: what a crash may repeat, against requests to the broker
MAX_UNSTORED_ANSWERS = 1024  # a worker: answers that the broker has not acknowledged yet
MAX_CANCELLED = 10_000  # a worker: cancelled requests remembered until they are met in the queue

log = get_logger(__name__)

Stop = Literal["cancelled", "lost", "drained"]


class Job(msgspec.Struct, eq=False):
    """One request that is being served. `stop` is why it was told to stop, if it was."""

    record: Record
    request: Request
    reply: Reply
    task: asyncio.Task[None] | None = None
    stop: Stop | None = None

    def cancel(self, stop: Stop) -> None:
        if self.stop is None and self.task is not None:
            self.stop = stop
            self.task.cancel()


class Worker:
    """Serves one Chainlet from its topic, up to its `predict_concurrency` requests at once."""

    def __init__(self, callee: Callee, topic: str, broker: Broker, settings: Settings) -> None:
        self.topic = topic
        self.callee = callee
        self._broker = broker
        self._settings = settings
        self._consumer: GroupConsumer | None = None
        self._ledgers: dict[int, Ledger] = {}
        self._committed: dict[int, int] = {}
        self._running = 0
        self._jobs: set[Job] = set()
        self._by_id: dict[bytes, Job] = {}  # a stranger's requests may have no id, or repeat one
        self._tasks: set[asyncio.Task[None]] = set()
        self._cancelled: dict[bytes, None] = {}
        self._freed = asyncio.Event()
        self._finished = asyncio.Event()
        self._loops: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Join the group and begin to take requests."""
        self._consumer = await self._broker.consume(
            self.topic, self.topic, on_assigned=self._assigned, on_revoked=self._revoked
        )
        name = self.callee.name
        self._loops = [
            asyncio.create_task(self._take(self._consumer), name=f"take {name}"),
            asyncio.create_task(self._commit_regularly(), name=f"commit {name}"),
        ]
        log.info("worker.started", chainlet=name, topic=self.topic)

    async def failed(self) -> None:
        """Wait until the worker can't go on. Raises what stopped it."""
        await asyncio.gather(*self._loops)

    async def drain(self, grace: float) -> None:
        """Stop taking, give running requests `grace` seconds, commit, and leave; the unfinished are left to others."""
        for loop in self._loops:
            loop.cancel()
        if self._loops:
            await asyncio.wait(self._loops)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=grace)
        for job in tuple(self._jobs):
            job.cancel("drained")
        if self._tasks:
            log.warning("worker.unfinished", chainlet=self.callee.name, requests=len(self._tasks))
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)
        if self._consumer is not None:
            await self._consumer.close()
        log.info("worker.stopped", chainlet=self.callee.name)

    def handle(self, message: Message) -> None:
        """Take a control message about a request on this worker's topic, which may be another worker's."""
        job = self._by_id.get(message.correlation_id)
        match message:
            case Cancel(correlation_id=correlation_id, partition=partition):
                if job is not None:
                    job.cancel("cancelled")
                elif partition in self._ledgers:
                    self._cancelled[correlation_id] = None
                    if len(self._cancelled) > MAX_CANCELLED:
                        del self._cancelled[next(iter(self._cancelled))]
            case Credit(chunks=chunks, size=size):
                if job is not None:
                    job.reply.credit(chunks, size)

    async def healthy(self) -> bool:
        """Ask the Chainlet's own `is_healthy`, if it has one."""
        check = getattr(self.callee.instance, "is_healthy", None)
        if check is None:
            return True
        answer = check()
        return bool(await answer if inspect.isawaitable(answer) else answer)

    # --- taking and committing

    async def _take(self, consumer: GroupConsumer) -> None:
        concurrency = self.callee.concurrency
        while True:
            unstored = len(self._tasks) - self._running
            free = min(concurrency - self._running, MAX_UNSTORED_ANSWERS - unstored)
            if free <= 0:
                self._freed.clear()
                await self._freed.wait()
                continue
            for record in await consumer.fetch(free):
                ledger = self._ledgers.setdefault(record.partition, Ledger())
                if ledger.take(record.offset):
                    self._begin(record, ledger)

    def _begin(self, record: Record, ledger: Ledger) -> None:
        self._running += 1
        task = asyncio.create_task(self._serve(record, ledger))
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._freed.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("worker.defect", chainlet=self.callee.name, exc_info=error)

    def _finish(self, record: Record, ledger: Ledger) -> None:
        ledger.finish(record.offset)
        self._finished.set()

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
            await self._consumer.commit({partition: Committed(position) for partition, position in due.items()})
        except BrokerError as error:
            # The next commit covers it; until then a crash repeats more.
            log.warning("commit.failed", chainlet=self.callee.name, reason=str(error))
        else:
            self._committed.update(due)

    async def _assigned(self, partitions: frozenset[int]) -> None:
        """Go on with what was kept, and stop work on partitions that went to others."""
        lost = self._ledgers.keys() - partitions
        for job in tuple(self._jobs):
            if job.record.partition in lost:
                job.cancel("lost")
        for partition in lost:
            del self._ledgers[partition]
            self._committed.pop(partition, None)
        log.info("worker.assigned", chainlet=self.callee.name, partitions=sorted(partitions), lost=sorted(lost))

    async def _revoked(self, partitions: frozenset[int]) -> None:  # noqa: ARG002 - the broker's callback
        await self._commit()

    # --- serving one request

    async def _serve(self, record: Record, ledger: Ledger) -> None:
        try:
            job = await self._open(record)
            outcome = await self._outcome(job) if job is not None else None
        finally:
            self._running -= 1
            self._freed.set()
        if job is not None:
            if outcome is None:
                return  # another worker takes the request up: it is not finished
            await self._answer(job, outcome)
        self._finish(record, ledger)

    async def _open(self, record: Record) -> Job | None:
        """Read a request's headers; None if there is no way to answer it."""
        try:
            request = Request.from_headers(record.headers)
            reply = await reply_to(self._broker, request, self.callee.codec, attempt=1)
        except (ValueError, BrokerError) as error:
            log.error(  # noqa: TRY400 - what a stranger wrote has no stack of ours
                "request.refused",
                topic=record.topic,
                partition=record.partition,
                offset=record.offset,
                reason=str(error),
            )
            return None
        return Job(record, request, reply, task=asyncio.current_task())

    async def _outcome(self, job: Job) -> "Outcome | None":
        """Run a request; None if its answer is left to another worker."""
        request = job.request
        deadline = request.deadline_ms or job.record.timestamp_ms + int(self._settings.deadline * 1000)
        scope = Scope(request.request_id or policy.new_request_id(), deadline, request.traceparent, request.tracestate)
        bind_contextvars(request_id=scope.request_id, correlation_id=request.correlation_id.hex())
        if request.correlation_id in self._cancelled:
            del self._cancelled[request.correlation_id]
            return Outcome(cancelled=True)
        if scope.remaining <= 0:
            return Outcome(error=self._expired("before it was run"))
        self._jobs.add(job)
        self._by_id[request.correlation_id] = job
        policy.current.set(scope)  # this task's own context
        limit = asyncio.timeout(scope.remaining)
        try:
            async with limit, self.callee.slots.here():
                return await self._run(job)
        except asyncio.CancelledError as error:
            return self._stopped(job, error)
        except TimeoutError as error:
            return Outcome(error=self._expired("while it ran") if limit.expired() else error)
        except Exception as error:  # noqa: BLE001 - whatever user code raises is the caller's to see
            return Outcome(error=error)
        finally:
            self._jobs.discard(job)
            if self._by_id.get(request.correlation_id) is job:
                del self._by_id[request.correlation_id]
            scope.close()

    def _stopped(self, job: Job, error: asyncio.CancelledError) -> "Outcome | None":
        """Tell why a request was cancelled: by `Job.cancel`, by our own end, or by the user's code itself."""
        task = asyncio.current_task()
        assert task is not None, "requests run in tasks"
        if job.stop is not None:
            task.uncancel()
            return Outcome(cancelled=True) if job.stop == "cancelled" else None
        if task.cancelling():
            raise error
        reason = f"{self.callee.name}.run_remote ended in the cancellation of something that it waited for"
        return Outcome(error=ChainsRuntimeError(reason))

    async def _run(self, job: Job) -> "Outcome":
        arguments = job.record.value
        if job.request.content_type == JSON:
            arguments = self.callee.codec.arguments_from_json(arguments)
        if not self.callee.signature.streaming:
            return Outcome(value=await self.callee.call(arguments))
        async with aclosing(self.callee.stream(arguments)) as chunks:
            async for chunk in chunks:
                await job.reply.chunk(chunk)
        return Outcome()

    async def _answer(self, job: Job, outcome: "Outcome") -> None:
        """Send the answer, for as long as it takes to have it stored."""
        attempt = 1
        while True:
            try:
                await self._send(job.reply, outcome)
            except RecordTooLargeError as error:
                outcome = Outcome(error=error)
            except BrokerError as error:
                if not error.retryable:
                    log.error("answer.unsent", reason=str(error))  # noqa: TRY400 - the message says it all
                    return
                log.warning("answer.retry", attempt=attempt, reason=str(error))
                await asyncio.sleep(policy.backoff(attempt))
                attempt += 1
            else:
                return

    async def _send(self, reply: Reply, outcome: "Outcome") -> None:
        if outcome.cancelled:
            log.info("request.cancelled", chainlet=self.callee.name)
            await reply.cancelled()
        elif outcome.error is not None:
            self._log_error(outcome.error)
            await reply.failed(outcome.error, self.callee.name)
        else:
            await reply.done(outcome.value)

    def _log_error(self, error: Exception) -> None:
        frames = user_frames(error.__traceback__)
        log.warning(
            "request.failed",
            chainlet=self.callee.name,
            error=type(error).__name__,
            status=http_status(error),
            message=str(error),
            at=f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None,
        )

    def _expired(self, when: str) -> DeadlineExceededError:
        return DeadlineExceededError(f"{self.callee.name}.run_remote: the deadline of the request passed {when}")


class Outcome(msgspec.Struct, frozen=True, eq=False):
    """How a request ended: a result (None for a stream), an error, or its cancellation."""

    value: bytes | None = None
    error: Exception | None = None
    cancelled: bool = False


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
        await asyncio.gather(*(worker.start() for worker in self.workers))

    async def failed(self) -> None:
        """Wait until a worker can't go on. Raises what stopped it."""
        await asyncio.gather(*(worker.failed() for worker in self.workers))

    async def drain(self) -> None:
        """Stop, callers before those they call: what still runs may need an answer from below."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self._settings.grace_period
        for worker in reversed(self.workers):
            await worker.drain(max(0.0, end - loop.time()))

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
