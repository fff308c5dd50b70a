"""One request in the hands of a worker: read, run, answered."""

import asyncio
from contextlib import aclosing
from typing import Literal

import msgspec
from structlog.contextvars import bind_contextvars

from chains_stream import policy
from chains_stream.broker import Broker, Record
from chains_stream.errors import (
    BrokerError,
    ChainsError,
    ChainsRuntimeError,
    DeadlineExceededError,
    RecordTooLargeError,
    UnknownTopicError,
    http_status,
    message_of,
    user_frames,
)
from chains_stream.local import Callee
from chains_stream.log import get_logger
from chains_stream.messages import JSON, Request, now_ms
from chains_stream.policy import Scope
from chains_stream.replies import Reply, reply_to
from chains_stream.settings import Settings

ANSWER_GRACE = 60.0  # seconds after a request's deadline in which its answer is still tried to be stored
CHUNKS_A_TURN = 32  # of a generator that never waits, until others have their turn of the event loop

log = get_logger(__name__)

Stop = Literal["cancelled", "lost", "drained"]


class Outcome(msgspec.Struct, frozen=True, eq=False):
    """How a request ended: a result (None for a stream), an error, or its cancellation."""

    value: bytes | None = None
    error: Exception | None = None
    cancelled: bool = False


class Job:
    """One record that is being served; `request` is there once its headers are read.

    `stop` is why it was told to stop: somebody cancelled the request, its partition went to another worker, or this one
    ends. In the last two cases it is not answered, and another worker runs it.
    """

    def __init__(self, record: Record, attempt: int, callee: Callee, broker: Broker, settings: Settings) -> None:
        self.record = record
        self._attempt = attempt
        self.request: Request | None = None
        self.stop: Stop | None = None
        self._callee = callee
        self._broker = broker
        self._settings = settings
        self._reply: Reply | None = None
        self._task: asyncio.Task[None] | None = None
        self._deadline_ms = record.timestamp_ms + int(settings.deadline * 1000)

    def cancel(self, stop: Stop) -> None:
        """Stop `run`, be it under way or still to come."""
        if self.stop is None:
            self.stop = stop
            if self._task is not None:
                self._task.cancel()

    def credit(self, chunks: int, size: int) -> None:
        if self._reply is not None:
            self._reply.credit(chunks, size)

    async def read(self) -> Request | None:
        """Read the request's headers; None if there is no way to answer it."""
        try:
            self.request = Request.from_headers(self.record.headers)
            self._deadline_ms = self.request.deadline_ms or self._deadline_ms
            self._reply = await self._find_reply(self.request)
        except (ValueError, BrokerError) as error:
            where = {"topic": self.record.topic, "partition": self.record.partition, "offset": self.record.offset}
            log.error("request.refused", **where, reason=str(error))  # noqa: TRY400 - a stranger's mistake has no stack
            return None
        request_id = self.request.request_id or policy.new_request_id()
        self.request = msgspec.structs.replace(self.request, request_id=request_id, deadline_ms=self._deadline_ms)
        bind_contextvars(request_id=request_id, correlation_id=self.request.correlation_id.hex())
        return self.request

    async def run(self) -> Outcome | None:
        """Run the request; None if it is for another worker to answer."""
        self._task = asyncio.current_task()
        outcome: Outcome | None = None
        try:
            if self.stop is None:
                outcome = await self._run_in_time()
        except asyncio.CancelledError as error:
            if self.stop is None:
                if self._task is not None and self._task.cancelling():
                    raise
                reason = f"{self._name} ended in the cancellation of something that it waited for"
                outcome = Outcome(error=ChainsRuntimeError(reason))
                outcome.error.__cause__ = error  # type: ignore[union-attr] # just set
            elif self._task is not None:
                self._task.uncancel()
        finally:
            self._task = None
        # Whatever user code made of a cancellation: who asked for it decides.
        if self.stop is None:
            return outcome
        return Outcome(cancelled=True) if self.stop == "cancelled" else None

    async def answer(self, outcome: Outcome) -> None:
        """Send the answer, and return when it is stored, or cannot be."""
        attempt = 1
        while True:
            try:
                await self._send(outcome)
            except RecordTooLargeError as error:
                outcome = Outcome(error=error)
            except BrokerError as error:
                late = now_ms() > self._deadline_ms + ANSWER_GRACE * 1000
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

    async def _find_reply(self, request: Request) -> Reply:
        attempt = 1
        while True:
            try:
                return await reply_to(self._broker, request, self._callee.codec, self._attempt)
            except UnknownTopicError:
                raise
            except BrokerError as error:
                if not error.retryable or now_ms() > self._deadline_ms + ANSWER_GRACE * 1000:
                    raise
                await asyncio.sleep(policy.backoff(attempt))
                attempt += 1

    async def _run_in_time(self) -> Outcome:
        request = self.request
        assert request is not None, "read before it is run"
        scope = Scope(request.request_id, self._deadline_ms, request.traceparent, request.tracestate)
        if scope.remaining <= 0:
            return Outcome(error=self._expired("before it was run"))
        policy.current.set(scope)  # this task's own context
        limit = asyncio.timeout(scope.remaining)
        try:
            async with limit, self._callee.slots.here():
                return await self._run(request)
        except TimeoutError as error:
            return Outcome(error=self._expired("while it ran") if limit.expired() else error)
        except SystemExit as error:
            # Let through, it would end the process, and then the next one that runs the request.
            return Outcome(error=ChainsRuntimeError(f"{self._name} called sys.exit({error.code!r})"))
        except Exception as error:  # noqa: BLE001 - whatever user code raises is the caller's to see
            return Outcome(error=error)
        finally:
            scope.close()

    async def _run(self, request: Request) -> Outcome:
        arguments = self.record.value
        if request.content_type == JSON:
            arguments = self._callee.codec.arguments_from_json(arguments)
        if not self._callee.signature.streaming:
            return Outcome(value=await self._callee.call(arguments))
        assert self._reply is not None, "read before it is run"
        sent = 0
        async with aclosing(self._callee.stream(arguments)) as chunks:
            async for chunk in chunks:
                await self._reply.chunk(chunk)
                sent += 1
                if sent % CHUNKS_A_TURN == 0:
                    await asyncio.sleep(0)
        return Outcome()

    async def _send(self, outcome: Outcome) -> None:
        assert self._reply is not None, "read before it is answered"
        if outcome.cancelled:
            log.info("request.cancelled", chainlet=self._callee.name)
            await self._reply.cancelled()
        elif outcome.error is not None:
            self._log(outcome.error)
            await self._reply.failed(outcome.error, self._callee.name)
        else:
            await self._reply.done(outcome.value)

    def _log(self, error: Exception) -> None:
        frames = user_frames(error.__traceback__)
        log.warning(
            "request.failed",
            chainlet=self._callee.name,
            error=type(error).__name__,
            status=http_status(error),
            message=message_of(error),
            at=f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None,
        )

    def _expired(self, when: str) -> DeadlineExceededError:
        return DeadlineExceededError(f"{self._name}: the deadline of the request passed {when}")
