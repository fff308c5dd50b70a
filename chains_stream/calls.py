"""The caller's side of a call over the broker: the correlation table, reply streams, cancellation.

One `Caller` a process. It reads one partition of the reply topic and hands each frame to the `Call` that waits for it.
A `Call` registers first, then publishes, then waits, and always unregisters; one that is left before its end is
cancelled where it runs.
"""

import asyncio
import os
import zlib
from collections.abc import AsyncGenerator, Coroutine
from functools import partial
from typing import Any

import msgspec

from chains_stream.balance import Balancer, Report
from chains_stream.batching import FrameBatcher
from chains_stream.broker import Broker, Reader, TopicSpec
from chains_stream.chain import Chain
from chains_stream.chainlet import ChainletBase, signature
from chains_stream.control import Cancel, Control, Credit, Message
from chains_stream.errors import (
    BrokerError,
    CallCancelledError,
    ChainsRuntimeError,
    OffsetExpiredError,
    StreamInterruptedError,
    WorkerLostError,
    from_detail,
)
from chains_stream.fold import Fold, Step
from chains_stream.log import get_logger
from chains_stream.messages import (
    Cancelled,
    Chunk,
    Done,
    Failed,
    Frame,
    Headers,
    Request,
    Started,
    Undelivered,
    decode_frames,
    new_id,
)
from chains_stream.metrics import IN_HAND
from chains_stream.policy import Scope, backoff
from chains_stream.settings import Settings
from chains_stream.store import Store, reference_in

MIN_WINDOW_BYTES = 64 << 10  # of a stream, however many there are
AT_ONCE = 4  # the part of a stream's window that its reader is given at once
CLOSE_SECONDS = 5.0  # for what is still to be said to the workers
NOTHING = msgspec.Raw()

log = get_logger(__name__)


class Call:
    """One request under way: makes a result or a stream of its frames (`fold`)."""

    __slots__ = (
        "_awaits_stored",
        "_caller",
        "_chunks",
        "_error",
        "_fold",
        "_granted",
        "_granted_size",
        "_modules",
        "_nudged",
        "_taken",
        "_taken_size",
        "_value",
        "_waiters",
        "answered",
        "ended",
        "id",
        "offset",
        "partition",
        "scope",
        "sent_to",
        "topic",
        "window_bytes",
    )

    def __init__(self, caller: "Caller", topic: str, scope: Scope, modules: tuple[str, ...]) -> None:
        self.id = new_id()
        self.topic = topic
        self.partition = 0
        self.sent_to: Report | None = None  # the worker that counts it as under way
        self.offset: int | None = None  # known once the broker has stored the request
        self.window_bytes = 0  # of a stream that may be on their way
        self.scope = scope
        self.ended = False
        self.answered = False  # by the callee: there is nothing left to cancel
        self._caller = caller
        self._modules = modules
        self._fold = Fold()
        self._chunks: list[msgspec.Raw | str] = []  # a str is where one lies in the store
        self._value: msgspec.Raw | str = NOTHING
        self._error: Exception | None = None
        self._waiters: list[asyncio.Future[None]] = []
        self._awaits_stored = self._nudged = False
        self._taken = self._taken_size = 0  # by the reader of the stream
        self._granted = self._granted_size = 0  # of these, what the worker was told

    async def result(self) -> msgspec.Raw:
        """Wait for the end of a unary call."""
        while not self.ended:
            await self._wait()
        if self._error is not None:
            raise self._error
        if isinstance(self._value, str):
            self._value = await self._caller.fetch(self._value)
        return self._value

    async def next(self) -> list[msgspec.Raw] | None:
        """Wait for a chunk of a stream, and give all that are there, up to a part of the window; None at the end.

        Whoever comes back is done with those of the time before: only then the worker may send as many more.
        """
        if self._caller.wants_credit(self, self._taken - self._granted, self._taken_size - self._granted_size):
            self._grant()
        self._nudged = False
        while True:
            while not self._chunks:
                if self._nudged:
                    return []
                if self.ended:
                    if self._error is not None:
                        raise self._error
                    return None
                await self._wait()
            head = self._chunks[0]
            if not isinstance(head, str):
                return self._take(self._caller.at_once(self))
            chunk = await self._caller.fetch(head)
            if self._chunks and self._chunks[0] is head:  # else another worker has begun it again meanwhile
                self._chunks[0] = chunk
                return self._take((1, 0))

    def nudge(self) -> None:
        """Have whoever waits for a chunk now be given none."""
        self._nudged = True
        self._wake()

    def _take(self, limits: tuple[int, int]) -> list[msgspec.Raw]:
        """Take chunks from the head, one at least, until there are so many, or so many bytes."""
        most, size = limits
        taken: list[msgspec.Raw] = []
        before = self._taken_size
        for chunk in self._chunks:
            if isinstance(chunk, str) or len(taken) >= most or (taken and self._taken_size - before >= size):
                break
            taken.append(chunk)
            self._taken_size += len(memoryview(chunk))
        self._taken += len(taken)
        del self._chunks[: len(taken)]
        return taken

    def _grant(self) -> None:
        self._granted, self._granted_size = self._taken, self._taken_size
        if not self.ended:
            self._caller.tell(self, Credit(self.id, self._taken, self._taken_size))

    async def stored(self) -> None:
        """Wait until the broker has stored the request, or the call ended without."""
        self._awaits_stored = True
        while self.offset is None and not self.ended:
            await self._wait()
        if self.offset is None and self._error is not None:
            raise self._error

    def stored_at(self, offset: int) -> None:
        self.offset = offset
        if self._awaits_stored:
            self._wake()

    def close(self) -> None:
        """Forget the call; if it has not ended, have it cancelled where it runs. May be called again."""
        self._caller.forget(self)

    def fail(self, error: Exception) -> None:
        """End the call with an error of this side."""
        if not self.ended:
            self._end(error)

    def feed(self, frame: Frame, reference: str | None = None) -> None:
        """Take one frame from the log; `reference` is where its value lies if that is in the store."""
        if self.ended:
            return
        if self._fold.begins_again(frame) and not self._begin_again():
            return
        step = self._fold.take(frame)
        if step is Step.GAP:
            self._end(self._interrupted("chunks of it are missing"))
            return
        if step is Step.DROP:
            return
        match frame:
            case Chunk(value=value):
                self._chunks.append(reference or value)
                self._wake()
            case Done(value=value):
                self._value = reference or value
                self._answer(None)
            case Failed(error=detail):
                self._answer(from_detail(detail, modules=self._modules))
            case Cancelled():
                self._answer(CallCancelledError("the request was cancelled"))
            case Started() | Undelivered():
                pass

    def _answer(self, error: Exception | None) -> None:
        self.answered = True
        self._end(error)

    def _begin_again(self) -> bool:
        """Another worker runs a stream from its beginning: False if something of it was shown, and must not change."""
        if self._taken:
            self._end(self._interrupted("its worker was lost"))
            return False
        self._chunks.clear()
        return True

    def _interrupted(self, reason: str) -> StreamInterruptedError:
        received = self._fold.chunks
        return StreamInterruptedError(f"the stream broke off after {received} chunks: {reason}", chunks=received)

    def _end(self, error: Exception | None) -> None:
        self.ended = True
        self._error = error
        if self.answered:
            self._caller.forget(self)
        self._wake()

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def _wait(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        finally:
            self._waiters.remove(waiter)


class Caller:
    """Sends requests and receives their answers, thousands at once, for a whole process."""

    def __init__(self, broker: Broker, control: Control, settings: Settings, store: Store) -> None:
        self.control = control
        self.store = store
        self.frames = FrameBatcher(broker)  # for what is sent to those that answer: the messages of a WebSocket
        self._broker = broker
        self._settings = settings
        self._replies = f"{settings.namespace}.replies"
        self._reply_partition = 0
        self._calls: dict[bytes, Call] = {}
        self._balancers: dict[str, Balancer] = {}  # by request topic
        self._preparing = asyncio.Lock()
        self._reader: Reader | None = None
        self._task: asyncio.Task[None] | None = None
        self._telling: set[asyncio.Task[None]] = set()
        self._broken: BrokerError | None = None

    async def start(self) -> None:
        """Find the reply partition, and be at its end before anything is published."""
        settings = self._settings
        await self._broker.ensure_topics(
            [TopicSpec(self._replies, settings.reply_partitions, settings.reply_retention_ms, ring=True)]
        )
        partitions = await self._broker.partitions(self._replies)
        self._reply_partition = zlib.crc32(os.urandom(16)) % partitions
        await self._open_reader()
        self._task = asyncio.create_task(self._read(), name="replies")
        IN_HAND.calls[id(self)] = self._calls

    async def close(self) -> None:
        """Cancel the calls that somebody waits in, leave what was submitted to run on, and stop reading."""
        for call in tuple(self._calls.values()):
            if call in call.scope.calls:
                call.close()
        self.fail(BrokerError("the connection was closed"))
        for call in tuple(self._calls.values()):
            self.forget(call)
        IN_HAND.calls.pop(id(self), None)
        await self.frames.close()
        if self._telling:
            await asyncio.wait(self._telling, timeout=CLOSE_SECONDS)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)  # `failed` tells what it died of
        if self._reader is not None:
            await self._reader.close()

    async def failed(self) -> None:
        """Wait until reading answers can't go on. Raises what stopped it."""
        if self._task is not None:
            await asyncio.shield(self._task)

    async def use(self, *topics: str) -> None:
        """Prepare to call over some request topics; to name many at once is quicker.

        A topic is made sure to exist, as a request sent before the first worker joins must not be lost, and from now on
        it is known how busy its workers are.
        """
        async with self._preparing:
            new = [topic for topic in dict.fromkeys(topics) if topic not in self._balancers]
            if not new:
                return
            settings = self._settings
            await self._broker.ensure_topics(
                [TopicSpec(topic, settings.partitions, settings.request_retention_ms) for topic in new]
            )
            balancers = {topic: Balancer(await self._broker.partitions(topic)) for topic in new}
            await self.control.follow({topic: balancer.handle for topic, balancer in balancers.items()})
            self._balancers |= balancers

    async def open(
        self,
        topic: str,
        arguments: bytes,
        scope: Scope,
        attempt: int = 1,
        modules: tuple[str, ...] = (),
        *,
        streaming: bool = True,
    ) -> Call:
        """Publish a request on a topic that `use` has prepared, and give its call. Close it, whatever happens."""
        if self._broken is not None:
            raise self._broken
        claim: Headers = ()
        if len(arguments) > self._broker.max_record_bytes:
            arguments, claim = b"", await self.store.put_arguments(arguments)
        call = Call(self, topic, scope, modules)
        window = offset = None
        if streaming:
            call.window_bytes = self._window_bytes()
            window = (self._settings.stream_window, call.window_bytes)
            offset = self._reader.position(self._reply_partition) if self._reader is not None else None
        balancer = self._balancers[topic]
        call.partition = balancer.choose(scope.affinity)
        call.sent_to = balancer.sent(call.partition)
        self._calls[call.id] = call
        request = Request(
            correlation_id=call.id,
            reply_topic=self._replies,
            reply_partition=self._reply_partition,
            reply_offset=offset,
            deadline_ms=scope.deadline_ms,
            request_id=scope.request_id,
            attempt=attempt,
            frames=True,
            window=window,
            traceparent=scope.traceparent,
            tracestate=scope.tracestate,
        )
        try:
            stored = await self._broker.publish(
                topic, arguments, partition=call.partition, key=scope.affinity, headers=request.to_headers() + claim
            )
        except BaseException:
            call.ended = call.answered = True  # nothing was sent that could be cancelled
            call.close()
            raise
        if stored.done():
            _stored(call, stored)
        else:
            stored.add_done_callback(partial(_stored, call))
        return call

    def expect(self, call: Call) -> tuple[str, int, int, int]:
        """Take what others send under the id of a call that has no request, until it is closed.

        Gives where that is read, a topic and a partition, and how many chunks, and how many bytes, may be on their way.
        Raises BrokerError.
        """
        if self._broken is not None:
            raise self._broken
        call.window_bytes = self._window_bytes()
        self._calls[call.id] = call
        return self._replies, self._reply_partition, self._settings.stream_window, call.window_bytes

    async def fetch(self, reference: str) -> msgspec.Raw:
        """Fetch a result or a chunk that was too large for its record. Raises StoreError."""
        return msgspec.Raw(await self.store.get(reference))

    def wants_credit(self, call: Call, chunks: int, size: int) -> bool:
        """Tell whether a reader that took this much since it last said so should say so again."""
        return chunks * 2 >= self._settings.stream_window or size * 2 >= call.window_bytes

    def at_once(self, call: Call) -> tuple[int, int]:
        """Give how many chunks, and how many bytes, of a stream its reader is given at once."""
        return max(1, self._settings.stream_window // AT_ONCE), call.window_bytes // AT_ONCE

    def _window_bytes(self) -> int:
        """Give how much of a stream may be on its way to us: the more streams, the less, down to a minimum."""
        share = self._settings.max_buffered_bytes // (len(self._calls) + 1)
        return min(self._settings.stream_window_bytes, max(share, MIN_WINDOW_BYTES))

    def forget(self, call: Call) -> None:
        """Unregister a call, and have it cancelled if no answer of the callee has ended it."""
        if self._calls.pop(call.id, None) is None:
            return
        if call.sent_to is not None:
            call.sent_to.sent -= 1
        call.scope.calls.discard(call)
        call.fail(CallCancelledError("the request was cancelled by its caller"))
        if not call.answered and self._broken is None:
            self.tell(call, Cancel(call.id, call.partition, call.offset or 0))

    def tell(self, call: Call, message: Message) -> None:
        """Send the workers a message about a call, without waiting for it."""
        task = asyncio.get_running_loop().create_task(self._send(call, message), name="tell")
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def _send(self, call: Call, message: Message) -> None:
        attempt = 1
        while True:
            try:
                await self.control.send(call.topic, message)
            except BrokerError as error:
                if not error.retryable or call.scope.remaining <= 0 or self._broken is not None:
                    # A request that is not cancelled runs to its deadline, which it carries with it.
                    log.warning("control.unsent", request_id=call.scope.request_id, reason=str(error))
                    return
            else:
                return
            await asyncio.sleep(backoff(attempt))
            attempt += 1

    async def _open_reader(self) -> Reader:
        if self._reader is not None:
            await self._reader.close()
        self._reader = await self._broker.read(self._replies, {self._reply_partition: None})
        return self._reader

    async def _read(self) -> None:
        try:
            while True:
                await self._follow()
        except BrokerError as error:
            self.fail(error)
            raise
        except Exception as error:
            # A defect, here or in aiokafka: whoever waits must not wait for ever.
            log.exception("replies.stopped")
            self.fail(BrokerError(f"reading answers stopped: {error!r}"))
            raise

    async def _follow(self) -> None:
        """Read answers for as long as the log holds them."""
        reader = self._reader
        assert reader is not None, "opened by start"
        try:
            while True:
                for record in await reader.fetch():
                    self._dispatch(record.value, reference_in(record.headers) if record.headers else None)
        except OffsetExpiredError as error:
            for call in tuple(self._calls.values()):
                call.fail(WorkerLostError(f"answers were lost before they were read: {error}"))
            await self._open_reader()

    def _dispatch(self, value: bytes, reference: str | None) -> None:
        try:
            frames = decode_frames(value)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:  # a stranger's record
            log.warning("reply.undecodable", reason=str(error))
            return
        if reference is not None and len(frames) != 1:  # a stranger's too: it does not say whose value it is
            log.warning("reply.undecodable", reason="one value in the store, and not one frame")
            return
        for frame in frames:
            call = self._calls.get(frame.correlation_id)
            if call is None:
                continue
            try:
                call.feed(frame, reference)
            except Exception as error:
                log.exception("reply.defect", request_id=call.scope.request_id)
                call.fail(ChainsRuntimeError(f"the answer can't be read: {error!r}"))

    def fail(self, error: BrokerError) -> None:
        """Fail all calls, and those to come."""
        if self._broken is None:
            self._broken = error
        for call in tuple(self._calls.values()):
            call.fail(error)


class RemoteTarget:
    """Calls a Chainlet over the broker; `modules` are where the user's exceptions may be found."""

    def __init__(self, caller: Caller, topic: str, modules: tuple[str, ...] = (), *, streaming: bool = True) -> None:
        self._caller = caller
        self._topic = topic
        self._modules = modules
        self._streaming = streaming

    def open(self, arguments: bytes, scope: Scope, attempt: int) -> Coroutine[Any, Any, Call]:
        """Publish a request; whoever asked for the call closes it."""
        caller, streaming = self._caller, self._streaming
        return caller.open(self._topic, arguments, scope, attempt, self._modules, streaming=streaming)

    async def call(self, arguments: bytes, scope: Scope, attempt: int) -> msgspec.Raw:
        call = await self.open(arguments, scope, attempt)
        scope.calls.add(call)
        try:
            return await call.result()
        finally:
            call.close()

    async def stream(self, arguments: bytes, scope: Scope, attempt: int) -> AsyncGenerator[list[msgspec.Raw], None]:
        call = await self.open(arguments, scope, attempt)
        scope.calls.add(call)
        try:
            while (chunks := await call.next()) is not None:
                yield chunks
        finally:
            call.close()


async def remote_target(chain: Chain, cls: type[ChainletBase], caller: Caller, settings: Settings) -> RemoteTarget:
    """Give the way to a Chainlet of a Chain over the broker."""
    topic = chain.topic(cls, settings.namespace)
    await caller.use(topic)
    modules = tuple(dict.fromkeys((cls.__module__, chain.entrypoint.__module__)))
    return RemoteTarget(caller, topic, modules, streaming=signature(cls).streaming)


def _stored(call: Call, stored: asyncio.Future[int]) -> None:
    """Learn where the request lies in the log, or that it never got there."""
    if stored.cancelled():
        call.fail(BrokerError("the broker was closed before the request was stored"))
    elif (error := stored.exception()) is not None:
        call.fail(error if isinstance(error, Exception) else BrokerError(str(error)))
    else:
        call.stored_at(stored.result())
