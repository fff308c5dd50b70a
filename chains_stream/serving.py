"""One request in the hands of a worker: read, run, answered; or put aside."""

import asyncio
import time
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any

import msgspec
from structlog.contextvars import bind_contextvars

from chains_stream import metrics, policy
from chains_stream.async_requests import AsyncRequest, AsyncRequests
from chains_stream.batching import FrameBatcher
from chains_stream.broker import Broker, Record
from chains_stream.calls import Caller
from chains_stream.delays import Delays
from chains_stream.errors import (
    BrokerError,
    ChainsError,
    ChainsRuntimeError,
    DeadLetteredError,
    DeadlineExceededError,
    InvalidArgumentError,
    OffsetExpiredError,
    RecordTooLargeError,
    StoredValueMissingError,
    StreamInterruptedError,
    http_status,
    message_of,
    user_frames,
)
from chains_stream.letters import send_letter
from chains_stream.local import Callee
from chains_stream.log import get_logger
from chains_stream.messages import JSON, MSGPACK, REQUEST_ID, Request, now_ms
from chains_stream.offsets import Ledger
from chains_stream.outcome import Outcome, Stop
from chains_stream.patience import persist, place_of
from chains_stream.policy import Scope
from chains_stream.readback import ReadBack
from chains_stream.replies import Reply, reply_to
from chains_stream.sessions import converse
from chains_stream.settings import Settings
from chains_stream.signature import BACKGROUND
from chains_stream.store import Store, reference_in
from chains_stream.timeouts import Timeout

ANSWER_GRACE = 60.0  # seconds after a request's deadline in which its answer is still tried to be stored
TRY_BITS = 20  # of the attempt of a frame, for workers that die; above them is which try of the request it is of
CHUNKS_A_TURN = 32  # of a generator that never waits, until others have their turn of the event loop

log = get_logger(__name__)


def request_id_of(record: Record) -> str:
    """Give the id of the request that a record is of; of a stranger's without one, where it lies."""
    value = dict(record.headers).get(REQUEST_ID)
    return value.decode("utf-8", "replace") if value else f"{record.topic}/{record.partition}/{record.offset}"


class Service:
    """What all requests to a Chainlet have in common."""

    def __init__(
        self,
        callee: Callee,
        topic: str,
        broker: Broker,
        *,
        frames: FrameBatcher,
        store: Store,
        settings: Settings,
        delays: Delays | None = None,
        caller: Caller | None = None,
    ) -> None:
        """Serve `topic`; `delays` are of requests that are tried again, and a `caller` takes what WebSockets bring."""
        self.name = callee.name + (BACKGROUND if topic.endswith(BACKGROUND) else "")  # of metrics and in logs
        self.callee = callee
        self.caller = caller
        self.topic = topic
        self.broker = broker
        self.frames = frames
        self.store = store
        self.settings = settings
        self.read_back = ReadBack(broker)
        delays = delays or Delays(broker, settings)
        self.async_requests = AsyncRequests(
            self.name, topic, broker, delays=delays, read_back=self.read_back, settings=settings
        )
        self.resumable = callee.signature.streaming and callee.resumable
        self.queue_wait = metrics.QUEUE_WAIT.labels(self.name)
        self.run_time = metrics.RUN_TIME.labels(self.name)
        self.expired = metrics.EXPIRED.labels(self.name)
        self.partitions: dict[str | None, int] = {None: 0}  # of the reply topics met so far

    def reply_to(self, request: Request, attempt: int) -> Reply:
        """Choose how to answer a request whose reply topic is in `partitions`. Raises UnknownTopicError."""
        count = self.partitions[request.reply_topic]
        codec, store = self.callee.codec, self.store
        return reply_to(self.broker, self.frames, request, codec, attempt=attempt, store=store, partitions=count)


class Job:
    """One record that is being served; `request` is there once its headers are read.

    `stop` is why it was told to stop: somebody cancelled the request, its partition went to another worker, or this one
    ends. In the last two cases it is not answered, and another worker runs it.
    """

    __slots__ = (
        "_async",
        "_attempt",
        "_callee",
        "_deadline_ms",
        "_epoch",
        "_reply",
        "_running",
        "_service",
        "deaths",
        "record",
        "redelivered",
        "request",
        "stop",
        "task",
    )

    def __init__(self, record: Record, ledger: Ledger, service: Service) -> None:
        self.record = record
        self.request: Request | None = None
        self.stop: Stop | None = None
        self.redelivered = record.offset < ledger.redelivered_to
        self.deaths = ledger.deaths(record.offset)
        self._epoch = self._attempt = ledger.epoch
        self._service = service
        self._callee = service.callee
        self._reply: Reply | None = None
        self._async: AsyncRequest | None = None  # if nobody waits for it
        self.task: asyncio.Task[None]  # that serves it
        self._running = False  # user code, which `cancel` may stop
        self._deadline_ms = record.timestamp_ms + int(service.settings.deadline * 1000)

    def cancel(self, stop: Stop) -> None:
        """Stop `run`, be it under way or still to come."""
        if self.stop is None:
            self.stop = stop
            if self._running:
                self.task.cancel()

    def credit(self, chunks: int, size: int) -> None:
        if self._reply is not None:
            self._reply.credit(chunks, size)

    async def read(self) -> Request | None:
        """Read the request's headers; None if there is no way to answer it: it is a dead letter then."""
        try:
            request = Request.from_headers(self.record.headers)
            self._deadline_ms = request.deadline_ms or self._deadline_ms
            if request.reply_topic not in self._service.partitions:
                await self._find(request.reply_topic)
            if request.attempt > 1:  # later tries overtake earlier ones, wherever they run
                self._attempt = self._epoch + ((request.attempt - 1) << TRY_BITS)
            self._reply = self._service.reply_to(request, self._attempt)
        except (ValueError, BrokerError) as error:
            log.error("request.refused", **self._place, reason=str(error))  # noqa: TRY400 - a stranger's has no stack
            if not isinstance(error, BrokerError) or not error.retryable:  # else it is sound, and came too late
                await self.bury(error, "unreadable")
            return None
        if not request.request_id:
            request = msgspec.structs.replace(request, request_id=policy.new_request_id())
        self.request = request
        if request.asynchronous:
            self._async = AsyncRequest(
                self.record, request, self._reply, self._service.async_requests, redelivered=self.redelivered
            )
        bind_contextvars(request_id=request.request_id, correlation_id=request.correlation_id.hex())
        return request

    async def run(self) -> Outcome | None:
        """Run the request; None if it is for another worker to answer."""
        self._running = True
        outcome: Outcome | None = None
        try:
            if self.stop is None:
                outcome = await self._async.begin() if self._async is not None else None
                outcome = outcome or await self._run_in_time()
        except asyncio.CancelledError as error:
            if self.stop is None:
                if self.task.cancelling():
                    raise
                reason = f"{self._name} ended in the cancellation of something that it waited for"
                outcome = Outcome(error=ChainsRuntimeError(reason))
                outcome.error.__cause__ = error  # type: ignore[union-attr] # just set
            else:
                self.task.uncancel()
        finally:
            self._running = False
        # Whatever user code made of a cancellation: who asked for it decides.
        if self.stop is None:
            return outcome
        return Outcome(cancelled=True) if self.stop == "cancelled" else None

    async def refuse(self) -> Outcome:
        """Put aside a request that too many workers have died of."""
        reason = f"{self.deaths} workers died while they ran this request of {self._name}, and nothing else"
        error = DeadLetteredError(reason)
        letter = await self.bury(error, "deaths")
        if letter is not None:
            error = DeadLetteredError(f"{reason}; it is kept in {letter[0]}", topic=letter[0], offset=letter[1])
        return Outcome(error=error)

    async def apologize(self, error: Exception) -> None:
        """Tell the caller of a defect of ours, if that can be done."""
        try:
            if self._reply is not None:
                apology = ChainsRuntimeError(f"the worker failed: {error!r}")
                end = await self._reply.failed(apology, self._callee.name)
                if self._async is not None:
                    await self._async.tell(Outcome(error=apology), end)
        except Exception as unsent:  # noqa: BLE001 - it is logged, and the caller has a deadline
            log.error("answer.unsent", **self._place, reason=repr(unsent))  # noqa: TRY400 - `error` has the stack

    async def bury(self, error: Exception, reason: str) -> tuple[str, int] | None:
        """Put the record into the dead-letter topic, and say where; None if that can't be done."""
        group = self._service.topic
        metrics.DEAD_LETTERED.labels(self._service.name, reason).inc()
        deaths = self.deaths or None
        try:
            place = await persist(
                lambda: send_letter(self._service.broker, self.record, group, error, deaths), self.record
            )
        except BrokerError as unsent:
            log.error("letter.unsent", **self._place, reason=str(unsent))  # noqa: TRY400 - the message says it all
            return None
        log.warning("request.dead_lettered", **self._place, letter=f"{place[0]}@{place[1]}", reason=message_of(error))
        return place

    async def put_off(self, error: Exception) -> bool:
        """Have a request that nobody waits for tried again later, instead of answered, if that may be."""
        delay = await self._async.put_off(error) if self._async is not None else None
        if delay is not None:
            self._log(error, again_in=delay)
        return delay is not None

    async def answer(self, outcome: Outcome) -> None:
        """Send the answer, and return when it is stored, or cannot be; what could not be read is put aside first.

        The webhook is told next, if there is one.
        """
        if outcome.undecodable and outcome.error is not None:
            await self.bury(outcome.error, "undecodable")
        attempt = 1
        while True:
            try:
                await self._send(outcome)
            except RecordTooLargeError as error:
                outcome = Outcome(error=error)
            except BrokerError as error:
                # What nobody waits for is asked for later, and its webhook is yet to be told.
                late = self._async is None and now_ms() > self._deadline_ms + ANSWER_GRACE * 1000
                if late or not error.retryable:
                    log.error("answer.unsent", reason=str(error))  # noqa: TRY400 - the message says it all
                    return
                log.warning("answer.retry", attempt=attempt, reason=str(error))
                await asyncio.sleep(policy.backoff(attempt))
                attempt += 1
            except Exception as error:
                if attempt < 0:
                    log.exception("answer.unsendable")
                    return
                attempt = -1  # once: an error of ours can be
                ours = isinstance(error, ChainsError)
                outcome = Outcome(error=error if ours else ChainsRuntimeError(f"the answer can't be sent: {error!r}"))
            else:
                return

    @property
    def _name(self) -> str:
        return f"{self._callee.name}.run_remote"

    @property
    def _place(self) -> dict[str, Any]:
        return place_of(self.record)

    async def _find(self, topic: str | None) -> None:
        """Find out how many partitions a reply topic has."""
        if topic is not None:
            broker = self._service.broker
            self._service.partitions[topic] = await persist(
                lambda: broker.partitions(topic), self.record, self._deadline_ms + ANSWER_GRACE * 1000
            )

    async def _run_in_time(self) -> Outcome:
        request = self.request
        assert request is not None, "read before it is run"
        scope = Scope(
            request_id=request.request_id,
            deadline_ms=self._deadline_ms,
            traceparent=request.traceparent,
            tracestate=request.tracestate,
            affinity=self.record.key,
            attempt=self._epoch,
        )
        now = now_ms()
        remaining = (self._deadline_ms - now) / 1000
        if remaining <= 0:
            self._service.expired.inc()
            return Outcome(error=self._expired("before it was run"))
        policy.current.set(scope)  # this task's own context
        limit = Timeout(remaining, self.task)
        self._service.queue_wait.observe(max(0.0, (now - self.record.timestamp_ms) / 1000))
        try:
            with limit:
                if not self._callee.colocated:  # the worker takes no more than there are places
                    return await self._run(request, scope)
                async with self._callee.slots.here():
                    return await self._run(request, scope)
        except TimeoutError as error:
            return Outcome(error=self._expired("while it ran") if limit.expired() else error)
        except SystemExit as error:
            # Let through, it would end the process, and then the next one that runs the request.
            return Outcome(error=ChainsRuntimeError(f"{self._name} called sys.exit({error.code!r})"))
        except Exception as error:  # noqa: BLE001 - whatever user code raises is the caller's to see
            return Outcome(error=error)
        finally:
            if scope.calls:
                scope.close()

    async def _run(self, request: Request, scope: Scope) -> Outcome:
        try:
            if self.record.value and request.content_type == MSGPACK:
                arguments: Mapping[str, Any] = self._callee.codec.decode_arguments(self.record.value)
            else:
                arguments = await self._arguments(request)
        except (InvalidArgumentError, StoredValueMissingError) as error:
            return Outcome(error=error, undecodable=True)
        began = time.perf_counter()
        try:
            if self._callee.signature.websocket:
                return await self._converse(request, arguments, scope)
            if self._callee.signature.streaming:
                return await self._stream(arguments, scope)
            return Outcome(value=await self._callee.call(arguments))
        finally:
            self._service.run_time.observe(time.perf_counter() - began)

    async def _stream(self, arguments: Mapping[str, Any], scope: Scope) -> Outcome:
        reply = self._reply
        assert reply is not None, "read before it is run"
        if self._service.resumable and self.redelivered and await self._resume(reply, scope):
            return Outcome(answered=True)
        sent, encode = 0, self._callee.codec.encode_result
        async with aclosing(self._callee.stream(arguments)) as items:
            async for item in items:
                await reply.chunk(encode(item))
                sent += 1
                if sent % CHUNKS_A_TURN == 0:
                    await asyncio.sleep(0)
        return Outcome()

    async def _converse(self, request: Request, arguments: Mapping[str, Any], scope: Scope) -> Outcome:
        service, reply = self._service, self._reply
        assert reply is not None, "read before it is run"
        assert service.caller is not None, "a host has one"
        if not request.frames:
            raise InvalidArgumentError(f"{self._name} takes a WebSocket, which a gateway opens and no record can")
        if self.redelivered:
            if await self._resume(reply, scope):
                return Outcome(answered=True)
            if scope.emitted:  # it was open, and what the client has sent since is lost
                raise StreamInterruptedError("the WebSocket broke off: its worker was lost", chunks=len(scope.emitted))
        (handshake,) = arguments.values()
        run = self._callee.converse
        await converse(run, handshake, service.caller, topic=service.topic, scope=scope, reply=reply)
        return Outcome()

    async def _arguments(self, request: Request) -> Mapping[str, Any]:
        """Decode arguments that are JSON, or that lie in the store. Raises InvalidArgumentError, StoreError."""
        value = self.record.value
        if not value and (reference := reference_in(self.record.headers)) is not None:
            value = await self._service.store.get(reference)
        if request.content_type == JSON:
            value = self._callee.codec.arguments_from_json(value)
        return self._callee.codec.decode_arguments(value)

    async def _resume(self, reply: Reply, scope: Scope) -> bool:
        """Find out what the reader of a stream has of it; True if it has it all."""
        try:
            answered = await persist(lambda: reply.resume(self._service.read_back), self.record, self._deadline_ms)
        except OffsetExpiredError as error:
            raise StreamInterruptedError(f"what was sent of the stream is no longer in the log: {error}") from error
        if answered is None:
            raise StreamInterruptedError("some of what was sent of the stream is missing in the log")
        values = [
            await self._service.store.get(chunk) if isinstance(chunk, str) else chunk for chunk in answered.chunks
        ]
        reply.go_on(len(values), sum(len(memoryview(value)) for value in values))
        scope.emitted = tuple(map(self._callee.codec.decode_result, values))
        if answered.chunks:
            log.info("stream.resumed", chainlet=self._callee.name, chunks=len(answered.chunks), attempt=self._attempt)
        return answered.ended

    async def _send(self, outcome: Outcome) -> None:
        reply, end = self._reply, None
        assert reply is not None, "read before it is answered"
        if outcome.cancelled:
            log.info("request.cancelled", chainlet=self._callee.name)
            end = await reply.cancelled()
        elif outcome.error is not None:
            self._log(outcome.error)
            end = await reply.failed(outcome.error, self._callee.name)
        elif not outcome.answered:
            end = await reply.done(outcome.value)
        if self._async is not None:
            await self._async.tell(outcome, end)

    def _log(self, error: Exception, again_in: float | None = None) -> None:
        frames = user_frames(error.__traceback__)
        log.warning(
            "request.failed",
            chainlet=self._callee.name,
            error=type(error).__name__,
            status=http_status(error),
            message=message_of(error),
            at=f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None,
            **({} if again_in is None else {"again_in": again_in}),
        )

    def _expired(self, when: str) -> DeadlineExceededError:
        return DeadlineExceededError(f"{self._name}: the deadline of the request passed {when}")
