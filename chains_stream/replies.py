"""How a worker answers one request: frames for our callers, bare values for anybody else's."""

import asyncio
import zlib
from typing import Protocol

import msgspec

from chains_stream.batching import FRAME_ROOM, FrameBatcher
from chains_stream.broker import Broker
from chains_stream.codec import Codec
from chains_stream.errors import RemoteErrorDetail, StreamInterruptedError, UnknownTopicError, fitting, to_detail
from chains_stream.messages import (
    CORRELATION_ID,
    ERROR,
    JSON,
    Cancelled,
    Chunk,
    Done,
    Failed,
    Frame,
    Headers,
    Request,
    Started,
)
from chains_stream.readback import Answered, ReadBack
from chains_stream.store import Store

ERROR_BYTES = 32_000  # of an error in a header: Kafka takes some 48,000 beside the value
NIL = msgspec.Raw(b"\xc0")
NO_HEADERS: Headers = ()


class Reply(Protocol):
    """The answer to one request. Of the last three methods exactly one is called, once, and last.

    Each of these returns when the broker has stored the whole answer: from then on the request may be committed. It
    gives the offset of the end of an answer in frames.
    """

    async def begins(self) -> None:
        """Say that the request begins to run: its caller may miss it."""

    async def sent_before(self, read_back: ReadBack) -> tuple[list[Frame], int]:
        """Have what other workers still send overtaken; give the frames sent so far, and an offset behind them.

        Raises BrokerError; OffsetExpiredError if the log no longer holds them.
        """

    async def resume(self, read_back: ReadBack) -> Answered | None:
        """Find out what other workers have sent of a stream, and have them overtaken; None if some of it is missing.

        Raises BrokerError; OffsetExpiredError if the log no longer holds it.
        """

    def go_on(self, chunks: int, size: int) -> None:
        """Send what comes after so many chunks of so many bytes."""

    async def chunk(self, value: bytes) -> None:
        """Send the next item of a stream; waits while its reader lags behind."""

    def credit(self, chunks: int, size: int) -> None:
        """Note what the reader of the stream has taken in all."""

    async def done(self, value: bytes | None) -> int | None:
        """Send the result, or the end of a stream for None."""

    async def failed(self, error: BaseException, chainlet: str) -> int | None:
        """Send the error, as raised in the named Chainlet."""

    async def cancelled(self) -> int | None:
        """Say that the request was cancelled."""


class FrameReply:
    """Answers with frames: see `messages`. A value too large for its record goes to the store."""

    __slots__ = (
        "_attempt",
        "_begin",
        "_credited",
        "_frames",
        "_id",
        "_largest",
        "_lost",
        "_partition",
        "_sent",
        "_sent_size",
        "_store",
        "_taken",
        "_taken_size",
        "_topic",
        "_unstored",
        "_window",
    )

    def __init__(self, frames: FrameBatcher, request: Request, attempt: int, store: Store, *, largest: int) -> None:
        assert request.reply_topic is not None, "somebody waits for the answer"
        self._frames = frames
        self._topic = request.reply_topic
        self._partition = request.reply_partition or 0
        self._id = request.correlation_id
        self._attempt = attempt
        self._begin = request.reply_offset
        self._window = request.window
        self._sent = self._sent_size = 0
        self._taken = self._taken_size = 0
        self._credited: asyncio.Event | None = None  # while the reader lags behind
        self._unstored: set[asyncio.Future[int]] | None = None  # records with chunks, once there are some
        self._lost: StreamInterruptedError | None = None
        self._store = store
        self._largest = largest

    async def begins(self) -> None:
        await self._frames.send(self._topic, self._partition, self._started(), 0, durable=False)

    async def sent_before(self, read_back: ReadBack) -> tuple[list[Frame], int]:
        fence = await self._send_durably(self._started(), 0)
        if self._begin is None:
            return [], fence
        found = await read_back.frames(self._topic, self._partition, self._begin, fence, self._id)
        return [frame for frame, _ in found], fence

    def _started(self) -> Started:
        return Started(self._id, self._attempt, resumes=False)

    async def resume(self, read_back: ReadBack) -> Answered | None:
        if self._begin is None:
            return Answered([], ended=False)
        # From this record on, readers drop what another worker may still send.
        fence = await self._send_durably(Started(self._id, self._attempt), 0)
        return Answered.of(await read_back.frames(self._topic, self._partition, self._begin, fence, self._id))

    def go_on(self, chunks: int, size: int) -> None:
        # How much of it its reader has taken is not known: it gets a window more than it otherwise might.
        self._sent = self._taken = chunks
        self._sent_size = self._taken_size = size

    async def chunk(self, value: bytes) -> None:
        if self._window is not None:
            chunks, size = self._window
            while self._sent - self._taken >= chunks or self._sent_size - self._taken_size >= size:
                self._credited = asyncio.Event()
                await self._credited.wait()
        if self._lost is not None:
            raise self._lost
        raw, claim = await self._claimed(value) if len(value) > self._largest else (msgspec.Raw(value), ())
        frame = Chunk(self._id, self._attempt, self._sent, raw)
        stored = await self._frames.send(self._topic, self._partition, frame, len(raw), claim, durable=False)
        self._sent += 1
        self._sent_size += len(value)
        if stored.done():
            self._stored(stored)
            return
        if self._unstored is None:
            self._unstored = set()
        if stored not in self._unstored:
            self._unstored.add(stored)
            stored.add_done_callback(self._stored)

    def credit(self, chunks: int, size: int) -> None:
        self._taken = max(self._taken, chunks)
        self._taken_size = max(self._taken_size, size)
        if self._credited is not None:
            self._credited.set()

    async def done(self, value: bytes | None) -> int:
        if not value:
            raw, claim = NIL, NO_HEADERS
        elif len(value) > self._largest:
            raw, claim = await self._claimed(value)
        else:
            raw, claim = msgspec.Raw(value), NO_HEADERS
        frame = Done(self._id, self._attempt, self._sent, raw)
        if self._sent:
            return await self._end(frame, len(raw), claim)
        return await self._send_durably(frame, len(raw), claim)

    async def failed(self, error: BaseException, chainlet: str | None) -> int:
        detail = fitting(to_detail(error, chainlet), self._largest)
        return await self._end(Failed(self._id, self._attempt, detail, self._sent), len(msgspec.msgpack.encode(detail)))

    async def cancelled(self) -> int:
        return await self._end(Cancelled(self._id, self._attempt, self._sent), 0)

    def _stored(self, stored: asyncio.Future[int]) -> None:
        if self._unstored is not None:
            self._unstored.discard(stored)
            if not self._unstored:
                self._unstored = None  # most of a stream's life it waits for its next chunk
        if stored.cancelled() or stored.exception() is not None:
            self._lost = StreamInterruptedError("a chunk could not be stored by the broker", chunks=self._sent)

    async def _claimed(self, value: bytes) -> tuple[msgspec.Raw, Headers]:
        """Put a value into the store; give what stands for it in its frame, and the headers for the record."""
        return NIL, await self._store.put_answer(value)

    async def _end(self, frame: Frame, size: int, claim: Headers = ()) -> int:
        # Chunks go out by another producer than the end does: it may follow only when all of them are stored.
        if unstored := tuple(self._unstored or ()):
            await asyncio.wait(unstored)
            for stored in unstored:
                self._stored(stored)
        if self._lost is not None and isinstance(frame, Done):
            return await self.failed(self._lost, None)
        return await self._send_durably(frame, size, claim)

    async def _send_durably(self, frame: Frame, size: int, claim: Headers = ()) -> int:
        """Send a frame, wait until it is stored, and give its record's offset."""
        return await (await self._frames.send(self._topic, self._partition, frame, size, claim, durable=True))


class BareReply:
    """Answers a caller that knows no frames: one record a value, in the content type of its request.

    A failure is a record with an empty value and the header `chains-error`; a stream ends in a record with an empty
    value. So is a value too large for its record, with the header `ce_dataref`.
    """

    def __init__(self, broker: Broker, request: Request, codec: Codec, partitions: int, store: Store) -> None:
        assert request.reply_topic is not None, "somebody waits for the answer"
        self._broker = broker
        self._topic = request.reply_topic
        self._id = request.correlation_id
        self._partition = (
            zlib.crc32(self._id) % partitions if request.reply_partition is None else request.reply_partition
        )
        self._json = request.content_type == JSON
        self._codec = codec
        self._store = store

    async def begins(self) -> None:
        """Nothing: such a caller waits for a value."""

    async def sent_before(self, read_back: ReadBack) -> tuple[list[Frame], int]:  # noqa: ARG002 - Reply's
        return [], 0

    async def resume(self, read_back: ReadBack) -> Answered | None:  # noqa: ARG002 - Reply's
        return Answered([], ended=False)  # such a caller can't tell one run from another

    def go_on(self, chunks: int, size: int) -> None:
        """Nothing is known to have been sent."""

    async def chunk(self, value: bytes) -> None:
        value = self._codec.result_to_json(value) if self._json else value
        if len(value) <= self._broker.max_record_bytes:
            await self._publish(value)
        else:
            await self._publish(b"", *await self._store.put_answer(value))

    def credit(self, chunks: int, size: int) -> None:
        """Nothing to note: such a caller gives none."""

    async def done(self, value: bytes | None) -> None:
        if value is not None:
            await self.chunk(value)
        else:
            await self._publish(b"")

    async def failed(self, error: BaseException, chainlet: str) -> None:
        detail = fitting(to_detail(error, chainlet), ERROR_BYTES)
        await self._publish(b"", (ERROR, msgspec.json.encode(detail)))

    async def cancelled(self) -> None:
        detail = RemoteErrorDetail(
            "CallCancelledError", None, "the request was cancelled", code="cancelled", status=499
        )
        await self._publish(b"", (ERROR, msgspec.json.encode(detail)))

    async def _publish(self, value: bytes, *headers: tuple[str, bytes | None]) -> None:
        tagged: Headers = ((CORRELATION_ID, self._id), *headers)
        await (await self._broker.publish(self._topic, value, partition=self._partition, headers=tagged))


class NoReply:
    """For a request that named no reply topic: it is run for its effect."""

    async def begins(self) -> None: ...

    async def sent_before(self, read_back: ReadBack) -> tuple[list[Frame], int]:  # noqa: ARG002 - Reply's
        return [], 0

    async def resume(self, read_back: ReadBack) -> Answered | None:  # noqa: ARG002 - Reply's
        return Answered([], ended=False)

    def go_on(self, chunks: int, size: int) -> None: ...

    async def chunk(self, value: bytes) -> None: ...

    def credit(self, chunks: int, size: int) -> None: ...

    async def done(self, value: bytes | None) -> None: ...

    async def failed(self, error: BaseException, chainlet: str) -> None: ...

    async def cancelled(self) -> None: ...


def reply_to(
    broker: Broker, frames: FrameBatcher, request: Request, codec: Codec, *, attempt: int, store: Store, partitions: int
) -> Reply:
    """Choose how to answer a request whose reply topic, if it names one, has so many partitions.

    Raises UnknownTopicError if there is no such place.
    """
    topic = request.reply_topic
    if topic is None:
        return NoReply()
    if request.reply_partition is not None and request.reply_partition >= partitions:
        raise UnknownTopicError(f"the reply topic {topic} has no partition {request.reply_partition}")
    if request.frames:
        return FrameReply(frames, request, attempt, store, largest=broker.max_record_bytes - FRAME_ROOM)
    return BareReply(broker, request, codec, partitions, store)
