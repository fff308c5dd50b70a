"""What a webhook says of a request that has ended: its answer as JSON, read from the log of results."""

import asyncio
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

import msgspec

from chains_stream.codec import Buffer, Codec
from chains_stream.deliveries import Delivery, Status
from chains_stream.errors import (
    CallCancelledError,
    ChainsError,
    OffsetExpiredError,
    QueueExpiredError,
    StreamInterruptedError,
)
from chains_stream.fold import Fold, Step
from chains_stream.messages import Cancelled, Chunk, Done, Failed, Frame
from chains_stream.readback import Found, ReadBack
from chains_stream.settings import Settings
from chains_stream.store import Store

TYPE = "async_request_completed"
CHUNKS_A_TURN = 256  # that are written, until others have their turn of the event loop

_OF_CODE: Mapping[str, Status] = {QueueExpiredError.code: "EXPIRED", CallCancelledError.code: "CANCELED"}

Value = msgspec.Raw | str  # what a frame carries, or where it lies in the store


class Fault(msgspec.Struct, frozen=True):
    """Why a request has no result, or why a notice does not hold it: a stable word, and a sentence."""

    code: str
    message: str

    @classmethod
    def of(cls, error: ChainsError) -> "Fault":
        return cls(error.code, error.message)


class Notice(msgspec.Struct, frozen=True, kw_only=True):
    """The body of a webhook. `location` is where the answer can be fetched that is too large for it."""

    type: str = TYPE
    timestamp: str
    request_id: str
    status: Status
    data: msgspec.Raw | None = None
    errors: Sequence[Fault] = ()
    location: str | msgspec.UnsetType = msgspec.UNSET


class _Ended(NamedTuple):
    """The answer of a request: its chunks, and the frame that ended it."""

    chunks: list[Value]
    end: Frame
    reference: str | None


class _TooLargeError(Exception):
    """It does not fit into a notice."""


class Notices:
    """Writes what webhooks say."""

    def __init__(self, read_back: ReadBack, store: Store, codec: Codec, settings: Settings) -> None:
        self._read_back = read_back
        self._store = store
        self._codec = codec
        self._largest = settings.max_body_bytes

    async def body(self, delivery: Delivery) -> bytes:
        """Write what is said of a request. Raises BrokerError and StoreError, where reading again can help."""
        moment = datetime.fromtimestamp(delivery.ended_ms / 1000, UTC)
        notice = Notice(
            timestamp=moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            request_id=delivery.request_id,
            status=delivery.status,
        )
        try:
            said = await self._said(notice, delivery)
            body = msgspec.json.encode(said)
            if len(body) <= self._largest:
                return body
        except _TooLargeError:
            pass
        return msgspec.json.encode(msgspec.structs.replace(notice, location=f"/async_request/{delivery.request_id}"))

    async def _frames(self, delivery: Delivery) -> list[Found]:
        topic, partition, end = delivery.topic, delivery.partition, delivery.end + 1
        return await self._read_back.frames(topic, partition, delivery.begin, end, delivery.correlation_id)

    async def _said(self, notice: Notice, delivery: Delivery) -> Notice:
        """Add how the request ended. Raises _TooLargeError, and what `body` raises."""
        replace = msgspec.structs.replace
        try:
            ended = _fold(await self._frames(delivery))
        except OffsetExpiredError as error:
            return replace(notice, errors=[Fault.of(error)])
        except StreamInterruptedError as error:
            return replace(notice, status="FAILED", errors=[Fault.of(error)])
        match ended.end:
            case Failed(error=detail):
                return replace(
                    notice,
                    status=_OF_CODE.get(detail.code, "FAILED"),
                    errors=[Fault(detail.code, detail.exception_message)],
                )
            case Cancelled():
                fault = Fault(CallCancelledError.code, "the request was cancelled")
                return replace(notice, status="CANCELED", errors=[fault])
            case _:
                notice = replace(notice, status="SUCCEEDED")
        try:
            return replace(notice, data=await self._data(ended))
        except ChainsError as error:
            if error.retryable:
                raise
            return replace(notice, errors=[Fault.of(error)])

    async def _data(self, ended: _Ended) -> msgspec.Raw:
        """Give the result, or the list of a stream's chunks, as JSON."""
        if self._codec.signature.streaming:
            return await self._list(ended.chunks)
        assert isinstance(ended.end, Done), "no other end has a result"
        return msgspec.Raw(self._codec.result_to_json(await self._fetch(ended.reference or ended.end.value)))

    async def _list(self, chunks: Sequence[Value]) -> msgspec.Raw:
        parts, size = list[bytes](), 0
        for number, chunk in enumerate(chunks, 1):
            parts.append(self._codec.result_to_json(await self._fetch(chunk)))
            size += len(parts[-1]) + 1
            if size > self._largest:
                raise _TooLargeError
            if number % CHUNKS_A_TURN == 0:
                await asyncio.sleep(0)
        return msgspec.Raw(b"[%s]" % b",".join(parts))

    async def _fetch(self, value: Value) -> Buffer:
        return await self._store.get(value) if isinstance(value, str) else value


def _fold(frames: Sequence[Found]) -> _Ended:
    """Put an answer together. Raises StreamInterruptedError if some of it is missing."""
    fold, chunks = Fold(), list[Value]()
    for frame, reference in frames:
        if fold.begins_again(frame):
            chunks.clear()
        match fold.take(frame):
            case Step.CHUNK:
                assert isinstance(frame, Chunk), "no other frame is one"
                chunks.append(reference or frame.value)
            case Step.END:
                return _Ended(chunks, frame, reference)
            case Step.GAP:
                break
            case Step.DROP:
                pass
    raise StreamInterruptedError("some of the answer is missing in the log", chunks=len(chunks))
