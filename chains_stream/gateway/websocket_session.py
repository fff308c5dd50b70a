"""One open WebSocket in a gateway: frames of RFC 6455 on the side of the client, chunks on the side of the worker.

Both directions are bounded. What the client sends waits here until the worker has room for it, and beyond `HIGH_WATER`
nothing more is read from the socket; what the worker sends is taken only as fast as the client takes it.
"""

import asyncio
import math
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import msgspec
from wsproto.connection import Connection, ConnectionState, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Ping, TextMessage

from chains_stream.batching import FRAME_ROOM
from chains_stream.calls import Call, Caller
from chains_stream.errors import BrokerError, ChainsRuntimeError, OverloadedError
from chains_stream.gateway.exchange import FAREWELL, PIECE, Tunnel
from chains_stream.log import get_logger
from chains_stream.messages import Chunk, Done, Headers, Started
from chains_stream.sessions import BEAT
from chains_stream.websocket import (
    ABNORMAL,
    Binary,
    Close,
    Message,
    Opened,
    Text,
    decode_from_worker,
    encode,
    shortened,
)

HIGH_WATER = 64 << 10  # bytes that wait for the worker, until no more are read
COST = 64  # bytes that each message counts for beyond its own
SILENCE = 2 * BEAT  # seconds without a byte of a client, which is asked for one after half of that, until it is lost
LINGER = 5.0  # seconds for what still waits for the worker, once the client has left
TURN = 0.01  # seconds in which frames of one client are read, until others have their turn of the event loop
SLICE = 4 << 10  # bytes of them, from one look at that to the next
ATTEMPT = 1  # of the client's stream: there is no other

log = get_logger(__name__)


class EndedError(Exception):
    """The conversation is over: the client has closed it, or is to be told so."""

    def __init__(self, close: Close) -> None:
        super().__init__(close.reason)
        self.close = close


class Outbox:
    """A client's messages on their way to its worker, no more of them than it says that it has room for.

    Attributes:
        size: bytes that wait here.
    """

    def __init__(self, caller: Caller, opened: Opened, largest: int, on_room: Callable[[], None]) -> None:
        self.size = 0
        self._caller = caller
        self._opened = opened
        self._largest = largest  # bytes that a record takes
        self._on_room = on_room
        self._values: deque[bytes] = deque()
        self._close: Close | None = None
        self._news = asyncio.Event()
        self._sent = self._sent_size = 0
        self._taken = self._taken_size = 0
        self._last: asyncio.Future[int] | None = None
        self._broken: BaseException | None = None

    def put(self, message: Message) -> None:
        value = encode(message)
        self._values.append(value)
        self.size += len(value) + COST
        self._news.set()

    def credit(self, chunks: int, size: int) -> None:
        """Note what the worker has taken in all."""
        self._taken, self._taken_size = max(self._taken, chunks), max(self._taken_size, size)
        self._news.set()

    def finish(self, close: Close) -> None:
        """Have `run` return once all is sent that waits, and the end."""
        self._close = close
        self._news.set()

    def hurry(self) -> None:
        """Drop what waits."""
        self._values.clear()
        self.size = 0
        self._news.set()

    async def run(self) -> None:
        """Send what is put here, until it is finished. Raises BrokerError, StoreError, RecordTooLargeError."""
        while self._values or self._close is None:
            if self._broken is not None:
                raise self._broken
            if not self._values or not self._has_room:
                self._news.clear()
                await self._news.wait()
                continue
            await self._send(self._values[0])
        await self._publish(Done(self._opened.correlation_id, ATTEMPT, self._sent, msgspec.Raw(encode(self._close))), 0)

    async def beat(self) -> None:
        """Tell the worker that somebody is still here."""
        await self._publish(Started(self._opened.correlation_id, ATTEMPT), 0)

    @property
    def _has_room(self) -> bool:
        opened = self._opened
        return self._sent - self._taken < opened.chunks and self._sent_size - self._taken_size < opened.size

    async def _send(self, value: bytes) -> None:
        raw = msgspec.Raw(value)
        claim: Headers = ()
        if len(value) > self._largest:
            raw, claim = msgspec.Raw(b"\xc0"), await self._caller.store.put_answer(value)
        await self._publish(Chunk(self._opened.correlation_id, ATTEMPT, self._sent, raw), len(memoryview(raw)), claim)
        self._sent += 1
        self._sent_size += len(value)
        if self._values and self._values[0] is value:  # else it was dropped meanwhile
            self._values.popleft()
            self.size -= len(value) + COST
            if self.size <= HIGH_WATER // 2:
                self._on_room()

    async def _publish(self, frame: Chunk | Done | Started, size: int, claim: Headers = ()) -> None:
        # All of one kind, which is what keeps their order; a chunk that gets lost is seen by the gap that it leaves.
        opened = self._opened
        stored = await self._caller.frames.send(opened.topic, opened.partition, frame, size, claim, durable=False)
        if stored is not self._last:
            self._last = stored
            stored.add_done_callback(self._stored)

    def _stored(self, stored: asyncio.Future[int]) -> None:
        if stored.cancelled():
            self._broken = BrokerError("the broker was closed before a message was stored")
        elif (error := stored.exception()) is not None:
            self._broken = error
        self._news.set()


class Session:
    """A WebSocket from its 101 to its end.

    Args:
        call: whose first chunk, `opened`, was taken; the `rest` of those that came with it was not passed on yet.
        limit: bytes of a message.
        hold: counts the bytes that are held for it, and raises OverloadedError for too many.
        end: has the conversation end with an error.
    """

    def __init__(
        self,
        caller: Caller,
        call: Call,
        opened: Opened,
        rest: list[msgspec.Raw],
        *,
        limit: int,
        largest: int,
        hold: Callable[[int], None],
        end: Callable[[Exception], None],
    ) -> None:
        self.outbox = Outbox(caller, opened, largest - FRAME_ROOM, self._resume)
        self._call = call
        self._rest = rest
        self._limit = limit
        self._hold = hold
        self._end = end
        self._frames = Connection(ConnectionType.SERVER)
        self._tunnel: Tunnel
        self._arrived = bytearray()  # and was not read yet; meanwhile no more is taken from the socket
        self._reading: asyncio.Handle | None = None
        self._parts = bytearray()  # of a message that is not complete
        self._paused = False
        self._deaf = False  # what comes after a bad frame can't be read
        self._over = False  # nothing more is taken from the client
        self._parted = asyncio.Event()  # the client has said that it leaves, or is gone
        self._pong: Ping | None = None  # to be answered once there is room
        self._ping = False  # is to be sent once there is room
        self._unsent = 0  # bytes for the client that were buffered when it was last looked
        self._loop = asyncio.get_running_loop()
        self._heard = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._beating: asyncio.Task[None] | None = None
        self._forwarding: asyncio.Task[None] | None = None

    def start(self, tunnel: Tunnel) -> None:
        """Begin; `close` ends what this starts."""
        self._tunnel = tunnel
        self._forwarding = asyncio.create_task(self.outbox.run(), name="websocket forward")
        self._forwarding.add_done_callback(self._forwarded)
        self._timer = self._loop.call_later(BEAT, self._tick)

    # --- from the client

    def receive(self, data: bytes) -> None:
        """Take what arrives on the socket."""
        self._heard = self._loop.time()
        self._arrived += data
        if self._reading is None:
            self._read(self._heard + TURN)

    def _read(self, until: float | None = None) -> None:
        """Read what has arrived: thousands of empty frames fit in what a socket gives at once, and take a second."""
        self._reading = None
        end = self._loop.time() + TURN if until is None else until
        while self._arrived and self._loop.time() < end:
            data = bytes(self._arrived[:SLICE])
            del self._arrived[:SLICE]
            self._take(data)
        if self._arrived:
            self._tunnel.pause_reading()
            self._reading = self._loop.call_soon(self._read)
        elif not self._paused:
            self._tunnel.resume_reading()

    def _take(self, data: bytes) -> None:
        frames = self._frames
        if self._deaf or frames.state in (ConnectionState.CLOSED, ConnectionState.REMOTE_CLOSING):
            return
        frames.receive_data(data)
        for event in frames.events():
            match event:
                case TextMessage(data=text):
                    self._part(text, text.encode(), complete=event.message_finished)
                case BytesMessage(data=part):
                    self._part(bytes(part), part, complete=event.message_finished)
                case Ping():
                    self._answer(event)
                case CloseConnection(code=code, reason=reason):
                    self._leave(Close(int(code), reason or ""))
                case _:  # a pong: to have heard of the client is all
                    pass
        if not self._over:
            self._count()

    def lost(self) -> None:
        """The connection is gone."""
        self._stop_reading()
        self._read(math.inf)
        self._over = True
        self._parted.set()

    def _stop_reading(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _part(self, value: str | bytes, part: bytes | bytearray, *, complete: bool) -> None:
        if self._over:
            return
        if len(self._parts) + len(part) > self._limit:
            self._fail(Close(1009, f"a message is larger than the {self._limit} bytes that this gateway takes"))
            return
        if complete and not self._parts:
            self.outbox.put(Text(value) if isinstance(value, str) else Binary(value))
            return
        self._parts += part
        if complete:
            whole, self._parts = bytes(self._parts), bytearray()
            self.outbox.put(Text(whole.decode()) if isinstance(value, str) else Binary(whole))

    def _count(self) -> None:
        """Keep what is held for this client within bounds."""
        try:
            self._hold(self._held)
        except OverloadedError as error:
            self._fail(Close(1013, shortened(str(error))))
        if self.outbox.size > HIGH_WATER and not self._paused:
            self._paused = True
            self._tunnel.pause_reading()

    @property
    def _held(self) -> int:
        """Bytes that count as held: the largest message that is allowed fits, if nobody else holds any."""
        return min(self.outbox.size + len(self._parts), self._limit)

    def _resume(self) -> None:
        self._hold(self._held)
        if self._paused:
            self._paused = False
            self._heard = self._loop.time()  # what it sent meanwhile was not read
            if self._reading is None:
                self._tunnel.resume_reading()

    def _answer(self, ping: Ping) -> None:
        """Answer a ping; while the client reads nothing, only the latest is kept (RFC 6455, section 5.5.3)."""
        self._pong = ping
        if not self._tunnel.buffers:
            self._tunnel.transport.write(self._controls())

    def _controls(self) -> bytes:
        """Give the frames of our own that wait to be sent: there is room for them."""
        ping, pong, self._ping, self._pong = self._ping, self._pong, False, None
        if self._frames.state is not ConnectionState.OPEN:
            return b""
        return b"".join(
            [self._frames.send(pong.response()) if pong else b"", self._frames.send(Ping()) if ping else b""]
        )

    def _leave(self, close: Close) -> None:
        """The client has closed it, or has sent what is none of the protocol."""
        if self._frames.state in (ConnectionState.REMOTE_CLOSING, ConnectionState.CLOSED):
            self._parted.set()
        else:
            self._deaf = True
        self._fail(close)

    def _fail(self, close: Close) -> None:
        if not self._over:
            self._over = True
            self._parts.clear()
            self._end(EndedError(close))

    def _tick(self) -> None:
        """See whether the client is still there, and tell the worker that we are."""
        self._timer = self._loop.call_later(BEAT, self._tick)
        now = self._loop.time()
        before, self._unsent = self._unsent, self._tunnel.transport.get_write_buffer_size()
        if self._paused or self._unsent < before:  # the client can't be heard, or is taking what it was sent
            self._heard = now
        elif now - self._heard >= SILENCE:
            self._fail(Close(ABNORMAL, "the client answered no ping"))
            return
        self._ping = True
        transport = self._tunnel.transport
        if not (self._over or self._tunnel.buffers or transport.is_closing()):  # nothing comes after a close frame
            transport.write(self._controls())
        if self._beating is None or self._beating.done():
            self._beating = asyncio.create_task(self._beat(), name="websocket beat")

    async def _beat(self) -> None:
        try:
            await self.outbox.beat()
        except BrokerError as error:
            self._call.fail(error)

    def _forwarded(self, task: "asyncio.Task[None]") -> None:
        """Whoever waits for the worker learns that it can't be reached."""
        if not task.cancelled() and (error := task.exception()) is not None:
            if not isinstance(error, Exception):
                error = ChainsRuntimeError(f"forwarding messages stopped: {error!r}")
            self._call.fail(error)

    # --- from the worker

    async def deliver(self) -> Close:
        """Pass the worker's messages on, until it closes the WebSocket or has ended. Raises what it failed with."""
        chunks: list[msgspec.Raw] | None = self._rest
        while chunks is not None:
            data: list[bytes] = []
            size = 0
            for chunk in chunks:
                match decode_from_worker(chunk):
                    case Text(data=text):
                        data.append(self._frames.send(TextMessage(text)))
                    case Binary(data=value):
                        data.append(self._frames.send(BytesMessage(value)))
                    case Close() as close:
                        await self._write(data)
                        # What `run_remote` does now is its own affair: it is not to be cancelled.
                        self._call.answered = True
                        return close
                    case Opened():
                        raise ChainsRuntimeError("the worker has opened a WebSocket that is open")
                size += len(data[-1])
                if size >= PIECE:
                    await self._write(data)
                    data.clear()
                    size = 0
            await self._write(data)
            chunks = await self._call.next()
        return Close()

    async def _write(self, data: list[bytes]) -> None:
        data.append(self._controls())
        while any(data) and not self._tunnel.transport.is_closing():  # else the client has left, which ends this
            self._tunnel.transport.write(b"".join(data))
            if not self._tunnel.buffers:
                return
            await self._tunnel.taken()
            data = [self._controls()]  # what has come up meanwhile: it may be long until the worker sends more

    # --- the end

    async def part(self, close: Close, *, told: Close, patience: float) -> None:
        """Close it: the client is told `close`, and the worker `told`, after what the client has sent before.

        The worker has so many seconds of `patience` to take that.
        """
        self._over = True
        self.outbox.finish(told)
        transport = self._tunnel.transport
        by_client = self._frames.state is ConnectionState.REMOTE_CLOSING
        end = self._loop.time() + patience
        if (by_client or self._frames.state is ConnectionState.OPEN) and not transport.is_closing():
            transport.write(self._frames.send(CloseConnection(close.code, close.reason or None)))
            if not by_client:  # it answers: closed before, the connection would be reset by what the client sends
                self._resume()
                if self._deaf and transport.can_write_eof():  # in TLS there is none
                    transport.write_eof()
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(min(end, self._loop.time() + FAREWELL) if self._deaf else end):
                        await self._parted.wait()
        transport.close()
        if not self._call.ended:
            await self._see_off(max(0.0, end - self._loop.time()))

    async def close(self) -> None:
        """End what was started."""
        self._stop_reading()
        if self._timer is not None:
            self._timer.cancel()
        tasks = [task for task in (self._forwarding, self._beating) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _see_off(self, patience: float) -> None:
        """Wait until the worker knows all."""
        forwarding = self._forwarding
        assert forwarding is not None, "started"
        await asyncio.wait((forwarding,), timeout=patience)
        if not forwarding.done():
            self.outbox.hurry()
            await asyncio.wait((forwarding,), timeout=FAREWELL)
        if forwarding.done() and forwarding.exception() is None:
            self._call.answered = True  # the worker ends it by itself: there is nothing to cancel
