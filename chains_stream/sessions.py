"""A WebSocket on its worker's side: the client's messages in, the worker's out, and what becomes of both at the end."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import parse_qsl

import msgspec

from chains_stream import foreign
from chains_stream.calls import Call, Caller
from chains_stream.errors import (
    ChainsUsageError,
    InvalidArgumentError,
    StreamInterruptedError,
    WebSocketClosedError,
)
from chains_stream.log import get_logger
from chains_stream.messages import Frame, new_id
from chains_stream.policy import Scope
from chains_stream.replies import Reply
from chains_stream.websocket import (
    ABNORMAL,
    NORMAL,
    Binary,
    Close,
    Fields,
    FromWorker,
    Handshake,
    Opened,
    Text,
    WebSocketProtocol,
    code_fault,
    decode_close,
    decode_message,
    encode,
)

BEAT = 20.0  # seconds between two signs of life that a gateway sends for each WebSocket
SILENCE = 75.0  # seconds without one, until its gateway counts as lost
LEAVE_SECONDS = 5.0  # that `run_remote` may take once its client has left, for each message still to come, and to end

log = get_logger(__name__)


class Inbox(Call):
    """The messages of a client, as a stream that its gateway sends. A `Started` frame is a sign of life."""

    def __init__(self, caller: Caller, topic: str, scope: Scope) -> None:
        super().__init__(caller, topic, scope, (), new_id())
        self.silent = False  # was ended because nothing was heard of the gateway
        self.on_end: Callable[[], None] | None = None
        self._loop = asyncio.get_running_loop()
        self._heard = self._loop.time()
        self._timer = self._loop.call_later(SILENCE, self._look)

    def feed(self, frame: Frame, reference: str | None = None) -> None:
        self._heard = self._loop.time()
        super().feed(frame, reference)

    def close(self) -> None:
        self.answered = True  # there is no request that could be cancelled
        super().close()

    async def left(self) -> WebSocketClosedError:
        """Say how the client has left."""
        close = decode_close(await self.result())
        said = f": {close.reason}" if close.reason else ""
        return WebSocketClosedError(
            f"the client has closed the WebSocket ({close.code}){said}", close_code=close.code, reason=close.reason
        )

    def _look(self) -> None:
        due = self._heard + SILENCE
        if due > self._loop.time():
            self._timer = self._loop.call_at(due, self._look)
            return
        self.silent = True
        self._value = msgspec.Raw(encode(Close(ABNORMAL)))
        self._answer(None)

    def _end(self, error: Exception | None) -> None:
        self._timer.cancel()
        super()._end(error)
        if self.on_end is not None:
            self.on_end()


class Session:
    """What `run_remote` gets as its WebSocket: see `WebSocketProtocol`."""

    def __init__(self, handshake: Handshake, inbox: Inbox, reply: Reply) -> None:
        self.headers = Fields(handshake.headers)
        self.query_params = dict(reversed(parse_qsl(handshake.query, keep_blank_values=True)))
        self.on_take: Callable[[], None] | None = None  # called for each message that is taken
        self._inbox = inbox
        self._reply = reply
        self._pending: deque[msgspec.Raw] = deque()
        self._closed: WebSocketClosedError | None = None  # by this side
        self._turn = asyncio.Lock()
        self._sending: set[asyncio.Task[None]] = set()

    @property
    def closed(self) -> bool:
        """Whether this side has closed it."""
        return self._closed is not None

    # --- for the user

    def is_connected(self) -> bool:
        return self._closed is None and not self._inbox.ended

    async def receive(self) -> str | bytes:
        while not self._pending:
            if self._closed is not None:
                raise self._closed
            chunks = await self._inbox.next()
            if chunks is None:
                raise await self._inbox.left()
            self._pending.extend(chunks)
        if self.on_take is not None:
            self.on_take()
        return decode_message(self._pending.popleft()).data

    async def receive_text(self) -> str:
        data = await self.receive()
        if not isinstance(data, str):
            raise InvalidArgumentError("a message of text was expected, and one of bytes came")
        return data

    async def receive_bytes(self) -> bytes:
        data = await self.receive()
        if not isinstance(data, bytes):
            raise InvalidArgumentError("a message of bytes was expected, and one of text came")
        return data

    async def receive_json(self) -> Any:
        data = await self.receive()
        try:
            return msgspec.json.decode(data)
        except (msgspec.DecodeError, UnicodeError) as error:
            raise InvalidArgumentError(f"a message is no JSON: {error}") from error

    async def send(self, data: str | bytes) -> None:
        await self._send(Text(data) if isinstance(data, str) else Binary(bytes(data)))

    async def send_text(self, data: str) -> None:
        await self._send(Text(data))

    async def send_bytes(self, data: bytes) -> None:
        await self._send(Binary(bytes(data)))

    async def send_json(self, data: Any) -> None:
        await self._send(Text(msgspec.json.encode(data, enc_hook=foreign.encode_json_hook).decode()))

    async def iter_text(self) -> AsyncIterator[str]:
        try:
            while True:
                yield await self.receive_text()
        except WebSocketClosedError:
            return

    async def iter_bytes(self) -> AsyncIterator[bytes]:
        try:
            while True:
                yield await self.receive_bytes()
        except WebSocketClosedError:
            return

    async def iter_json(self) -> AsyncIterator[Any]:
        try:
            while True:
                yield await self.receive_json()
        except WebSocketClosedError:
            return

    async def close(self, code: int = NORMAL, reason: str | None = None) -> None:
        if (fault := code_fault(code, reason or "")) is not None:
            raise ChainsUsageError(fault)
        if not self.is_connected():
            return
        sending = self._send(Close(code, reason or ""))
        self._closed = WebSocketClosedError(
            f"run_remote has closed the WebSocket ({code})", close_code=code, reason=reason or ""
        )
        self._inbox.nudge()  # whoever waits for a message
        await sending

    # --- for the worker

    async def open(self, opened: Opened) -> None:
        await self._reply.chunk(encode(opened))

    async def flush(self) -> None:
        """Wait for what is still being sent."""
        while self._sending:
            await asyncio.wait(self._sending)

    def drop(self) -> None:
        """Send no more of what waits to be sent."""
        for task in self._sending:
            task.cancel()

    def _send(self, message: FromWorker) -> Awaitable[None]:
        """Send a message in its turn. Whoever is cancelled while it waits leaves no hole: what began goes out."""
        return self._sent(self._begin(message))

    def _begin(self, message: FromWorker) -> "asyncio.Task[None]":
        if self._closed is not None:
            raise self._closed
        value = encode(message)  # a mistake is told at once
        task = asyncio.get_running_loop().create_task(self._publish(value), name="websocket send")
        self._sending.add(task)
        task.add_done_callback(self._done)
        if self._inbox.ended:
            task.cancel()
        return task

    async def _sent(self, task: "asyncio.Task[None]") -> None:
        await asyncio.wait((task,))
        if task.cancelled():
            raise await self._inbox.left()
        task.result()

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._sending.discard(task)
        if not task.cancelled():
            task.exception()  # whoever sent it may have stopped waiting

    async def _publish(self, value: bytes) -> None:
        async with self._turn:
            await self._reply.chunk(value)


async def converse(
    run: Callable[[WebSocketProtocol], Awaitable[None]],
    handshake: Handshake,
    caller: Caller,
    *,
    topic: str,
    scope: Scope,
    reply: Reply,
) -> None:
    """Open the WebSocket of a request on `topic`, and have `run` talk through it.

    Returns when `run` does, or when the client has left and it did not end soon. Raises what it raises, and
    StreamInterruptedError if nothing was heard of the gateway any more.
    """
    inbox = Inbox(caller, topic, scope)
    session = Session(handshake, inbox, reply)
    loop, limit = asyncio.get_running_loop(), asyncio.timeout(None)

    def leave() -> None:
        if not (session.closed or limit.expired()):  # closed, it is for `run_remote` to say when it is done
            session.drop()
            limit.reschedule(loop.time() + LEAVE_SECONDS)
            session.on_take = leave  # what it sent before it left is still given

    try:
        where, partition, chunks, size = caller.expect(inbox)
        await session.open(Opened(where, partition, inbox.id, chunks, size))
        async with limit:
            inbox.on_end = leave
            if inbox.ended:
                leave()
            await run(session)
            await session.flush()
            inbox.on_end = session.on_take = None
    except TimeoutError:
        if not limit.expired():
            raise
        log.warning("websocket.abandoned", reason=f"run_remote did not end within {LEAVE_SECONDS:g} s of its client")
    finally:
        inbox.on_end = session.on_take = None
        session.drop()
        inbox.close()
        await session.flush()
    if inbox.silent:
        raise StreamInterruptedError(f"nothing was heard of the gateway for {SILENCE:g} s")
