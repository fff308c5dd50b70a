"""The caller's side of a call over the broker: the correlation table, reply streams, cancellation.

One `Caller` a process. It reads one partition of the reply topic and hands each frame to the `Call` that waits for it.
A `Call` registers first, then publishes, then waits, and always unregisters; one that is left before its end is
cancelled where it runs.
"""

import asyncio
import os
import zlib
from collections.abc import AsyncGenerator, Awaitable, Coroutine
from functools import partial
from typing import Any, Protocol

import msgspec

from chains_stream.answers import Answer
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
    WorkerLostError,
)
from chains_stream.log import get_logger
from chains_stream.messages import Headers, Request, decode_frames, new_id
from chains_stream.metrics import IN_HAND
from chains_stream.policy import Scope, backoff
from chains_stream.settings import Settings
from chains_stream.store import Store, reference_in

MIN_WINDOW_BYTES = 64 << 10  # of a stream, however many there are
HELD_WINDOWS = 4  # of a stream that a call holds, where what it misses can be had from the log
LOOK = 64  # chunks until it is looked at again how much that is
AT_ONCE = 4  # the part of a stream's window that its reader is given at once
CLOSE_SECONDS = 5.0  # for what is still to be said to the workers

log = get_logger(__name__)


class FellBehindError(Exception):
    """A call held more of its stream than its window, and let go of what came then: it is to be read from the log."""


class Told(Protocol):
    """What messages are about: a request on a topic, for as long as its scope lasts."""

    topic: str
    scope: Scope


class Call(Answer):
    """One request under way, and its answer.

    Attributes:
        can_fall_behind: whether its reader can do with FellBehindError: the worker sends more than the reader takes
            where another reader of the same stream, which is quicker, says what it has taken.
    """

    __slots__ = (
        "_awaits_stored",
        "_caller",
        "_granted",
        "_granted_size",
        "can_fall_behind",
        "offset",
        "partition",
        "scope",
        "sent_to",
        "topic",
        "window_bytes",
    )

    def __init__(
        self, caller: "Caller", topic: str, scope: Scope, modules: tuple[str, ...], correlation_id: bytes
    ) -> None:
        super().__init__(correlation_id, modules)
        self.topic = topic
        self.partition = 0
        self.sent_to: Report | None = None  # the worker that counts it as under way
        self.offset: int | None = None  # known once the broker has stored the request
        self.window_bytes = 0  # of a stream that may be on their way
        self.scope = scope
        self.can_fall_behind = False
        self._caller = caller
        self._awaits_stored = False
        self._granted = self._granted_size = 0  # of what its reader has taken, what the worker was told

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

    def let_run(self) -> None:
        """Forget the call; it runs on, to its deadline."""
        self.answered = True
        self.close()

    def _add(self, value: msgspec.Raw, reference: str | None) -> None:
        super()._add(value, reference)
        if self.can_fall_behind and len(self._chunks) % LOOK == 0:
            held = sum(len(memoryview(chunk)) for chunk in self._chunks if not isinstance(chunk, str))
            if self._caller.is_too_much(len(self._chunks), held, self.window_bytes):
                self.fail(FellBehindError())

    def _fetch(self, reference: str) -> Awaitable[msgspec.Raw]:
        return self._caller.fetch(reference)

    def _at_once(self) -> tuple[int, int]:
        return self._caller.at_once(self.window_bytes)

    def _credit(self) -> None:
        if not self._caller.wants_credit(self, self._taken - self._granted, self._taken_size - self._granted_size):
            return
        self._granted, self._granted_size = self._taken, self._taken_size
        if not self.ended:
            self._caller.tell(self, Credit(self.id, self._taken, self._taken_size))

    def _over(self) -> None:
        self._caller.forget(self)


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
        self._broken: ChainsRuntimeError | None = None

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
        correlation_id: bytes | None = None,
    ) -> Call:
        """Publish a request on a topic that `use` has prepared, and give its call. Close it, whatever happens.

        The correlation id may be one that `new_id` gave, after `reply_position` was asked.
        """
        if self._broken is not None:
            raise self._broken
        claim: Headers = ()
        if len(arguments) > self._broker.max_record_bytes:
            arguments, claim = b"", await self.store.put_arguments(arguments)
        call = Call(self, topic, scope, modules, correlation_id or new_id())
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

    async def post(self, topic: str, arguments: bytes, request: Request, key: bytes | None) -> asyncio.Future[int]:
        """Publish a request that this process does not wait for. The future is done once the broker has stored it.

        If this raises, the request is not made; after that it may be, even where nobody waits for the future. The topic
        is one that `use` has prepared. Raises BrokerError, StoreError.
        """
        if self._broken is not None:
            raise self._broken
        claim: Headers = ()
        if len(arguments) > self._broker.max_record_bytes:
            arguments, claim = b"", await self.store.put_arguments(arguments)
        partition = self._balancers[topic].choose(key)
        headers = request.to_headers() + claim
        return await self._broker.publish(topic, arguments, partition=partition, key=key, headers=headers)

    def running(self, topic: str) -> int:
        """Count the requests on a topic, which `use` has prepared, that run now, as far as is known."""
        return self._balancers[topic].running()

    async def fetch(self, reference: str) -> msgspec.Raw:
        """Fetch a result or a chunk that was too large for its record. Raises StoreError."""
        return msgspec.Raw(await self.store.get(reference))

    def wants_credit(self, call: Call, chunks: int, size: int) -> bool:
        """Tell whether a reader that took this much since it last said so should say so again."""
        return chunks * 2 >= self._settings.stream_window or size * 2 >= call.window_bytes

    def is_too_much(self, chunks: int, size: int, window_bytes: int) -> bool:
        """Tell whether a call that holds this much holds more than its worker sends on its own."""
        return chunks >= HELD_WINDOWS * self._settings.stream_window or size >= HELD_WINDOWS * window_bytes

    def at_once(self, window_bytes: int) -> tuple[int, int]:
        """Give how many chunks, and how many bytes, of a stream its reader is given at once."""
        return max(1, self._settings.stream_window // AT_ONCE), window_bytes // AT_ONCE

    def reply_position(self) -> tuple[int, int]:
        """Give the partition of our answers, and an offset of it before which no answer to a later request lies."""
        assert self._reader is not None, "started"
        return self._reply_partition, self._reader.position(self._reply_partition)

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

    def tell(self, call: "Told", message: Message) -> None:
        """Send those that have to do with a call a message about it, without waiting for it."""
        task = asyncio.get_running_loop().create_task(self._send(call, message), name="tell")
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def _send(self, call: "Told", message: Message) -> None:
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

    def fail(self, error: ChainsRuntimeError) -> None:
        """Fail all calls, and those to come."""
        if self._broken is None:
            self._broken = error
        for call in tuple(self._calls.values()):
            call.fail(error)


class RemoteTarget:
    """Calls a Chainlet over the broker; `modules` are where the user's exceptions may be found."""

    def __init__(self, caller: Caller, topic: str, modules: tuple[str, ...] = (), *, streaming: bool = True) -> None:
        self.topic = topic
        self.modules = modules
        self._caller = caller
        self._streaming = streaming

    def open(
        self, arguments: bytes, scope: Scope, attempt: int, correlation_id: bytes | None = None
    ) -> Coroutine[Any, Any, Call]:
        """Publish a request; whoever asked for the call closes it."""
        caller, topic, modules = self._caller, self.topic, self.modules
        return caller.open(
            topic, arguments, scope, attempt, modules, streaming=self._streaming, correlation_id=correlation_id
        )

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
