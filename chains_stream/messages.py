"""The wire: header names, request headers, and the frames that answer a request.

Everything here is what another program may meet in a Kafka topic. New fields get defaults; a type that shipped never
changes.
"""

import functools
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from chains_stream.errors import RemoteErrorDetail

Headers = tuple[tuple[str, bytes | None], ...]  # a stranger may leave out a value, which is not an empty one

# Names that Spring Kafka's request/reply uses, so that its clients can call a Chainlet.
CORRELATION_ID = "kafka_correlationId"  # 16 bytes
REPLY_TOPIC = "kafka_replyTopic"  # UTF-8
REPLY_PARTITION = "kafka_replyPartition"  # 4 bytes, big-endian
CONTENT_TYPE = "content-type"  # absent means MSGPACK
TRACEPARENT = "traceparent"  # W3C Trace Context
TRACESTATE = "tracestate"
DEADLINE = "chains-deadline"  # 8 bytes, big-endian: Unix time in ms
REQUEST_ID = "chains-request-id"  # UTF-8; the same through all hops and retries of one request
ATTEMPT = "chains-attempt"  # 4 bytes, big-endian: which try of the caller's retries this is, from 1
FRAMES = "chains-frames"  # b"1": the caller reads frames
WINDOW = "chains-window"  # 4 + 4 bytes, big-endian: chunks and bytes of a stream that may be under way
REPLY_OFFSET = "chains-reply-offset"  # 8 bytes, big-endian: no answer lies before it in the reply partition
DATAREF = "ce_dataref"  # UTF-8 (CloudEvents' claim check): where the value lies that was too large for its record
ERROR = "chains-error"  # on a reply without frames: the failure as JSON
START_BY = "chains-start-by"  # 8 bytes, big-endian: Unix time in ms after which the request is not begun any more
RETRY = "chains-retry"  # 4 + 4 + 4 bytes, big-endian: tries in all, ms before the second, most ms before any
WEBHOOK = "chains-webhook"  # UTF-8: a URL that is told when the request has ended
PROGRESS = "chains-progress"  # b"1": the caller is told when the request begins to run

ID_BYTES = 16  # of a correlation id of ours; a stranger that wants no frames may use any
MSGPACK = "application/msgpack"
JSON = "application/json"


class Retry(NamedTuple):
    """How a request that nobody waits for is tried again: `attempts` in all, with delays that double, in ms."""

    attempts: int
    initial_delay_ms: int
    max_delay_ms: int


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """The headers of a request record. Its value is a map of argument names, in `content_type`.

    `reply_offset` is where a worker that takes the request over begins to look for what was answered before it.
    `reply_topic` is None for a request that wants no answer, `reply_partition` for one that leaves it to the worker.
    `deadline_ms` is Unix time. `window` is (chunks, bytes), or None for a caller that does not return credit: its
    streams are not held back. `start_by_ms`, Unix time too, bounds the time in the queue. `retry`, `webhook` and
    `progress` are for requests that nobody waits for.
    """

    correlation_id: bytes
    reply_topic: str | None = None
    reply_partition: int | None = None
    reply_offset: int | None = None
    deadline_ms: int | None = None
    request_id: str = ""
    attempt: int = 1
    content_type: str = MSGPACK
    frames: bool = False
    window: tuple[int, int] | None = None
    traceparent: bytes | None = None
    tracestate: bytes | None = None
    start_by_ms: int | None = None
    retry: Retry | None = None
    webhook: str | None = None
    progress: bool = False

    def to_headers(self) -> Headers:
        headers = [
            (CORRELATION_ID, self.correlation_id),
            *_reply_headers(self.reply_topic, self.reply_partition, self.frames),
        ]
        if self.deadline_ms is not None:
            headers.append((DEADLINE, self.deadline_ms.to_bytes(8, "big")))
        if self.request_id:
            headers.append((REQUEST_ID, self.request_id.encode()))
        if self.attempt != 1:
            headers.append((ATTEMPT, self.attempt.to_bytes(4, "big")))
        if self.content_type != MSGPACK:
            headers.append((CONTENT_TYPE, self.content_type.encode()))
        if self.reply_offset is not None:
            headers.append((REPLY_OFFSET, self.reply_offset.to_bytes(8, "big")))
        if self.window is not None:
            chunks, size = self.window
            headers.append((WINDOW, chunks.to_bytes(4, "big") + size.to_bytes(4, "big")))
        if self.traceparent is not None:
            headers.append((TRACEPARENT, self.traceparent))
        if self.tracestate is not None:
            headers.append((TRACESTATE, self.tracestate))
        if self.asynchronous:
            headers += self._async_headers()
        return tuple(headers)

    @property
    def asynchronous(self) -> bool:
        """Whether nobody waits for it, as far as that makes a difference to a worker."""
        return self.progress or self.start_by_ms is not None or self.retry is not None or self.webhook is not None

    def _async_headers(self) -> list[tuple[str, bytes]]:
        headers = []
        if self.start_by_ms is not None:
            headers.append((START_BY, self.start_by_ms.to_bytes(8, "big")))
        if self.retry is not None:
            headers.append((RETRY, b"".join([number.to_bytes(4, "big") for number in self.retry])))
        if self.webhook is not None:
            headers.append((WEBHOOK, self.webhook.encode()))
        if self.progress:
            headers.append((PROGRESS, b"1"))
        return headers

    @classmethod
    def from_headers(cls, headers: Sequence[tuple[str, bytes | None]]) -> "Request":
        """Read the headers of a request that may be a stranger's; raise ValueError that names a malformed one.

        One without a value is as if it were not there.
        """
        found = dict(headers)
        frames = found.get(FRAMES) == b"1"
        if frames and len(found.get(CORRELATION_ID) or b"") != ID_BYTES:
            msg = f"the header {CORRELATION_ID} of a request for frames must be {ID_BYTES} bytes long"
            raise ValueError(msg)
        content_type, window = found.get(CONTENT_TYPE), found.get(WINDOW)
        offset, attempt = found.get(REPLY_OFFSET), found.get(ATTEMPT)
        return cls(
            correlation_id=found.get(CORRELATION_ID) or b"",
            reply_topic=_text(found, REPLY_TOPIC),
            reply_partition=_number(found, REPLY_PARTITION, 4),
            reply_offset=None if offset is None else _number(found, REPLY_OFFSET, 8),
            deadline_ms=_number(found, DEADLINE, 8),
            request_id=_text(found, REQUEST_ID) or "",
            attempt=1 if attempt is None else _number(found, ATTEMPT, 4) or 1,
            content_type=MSGPACK if content_type is None else _media_type(found),
            frames=frames,
            window=None if window is None else _window(found),
            traceparent=found.get(TRACEPARENT),
            tracestate=found.get(TRACESTATE),
            **_NOT_ASYNC if found.keys().isdisjoint(_ASYNC) else _async_fields(found),
        )


@functools.lru_cache(maxsize=64)
def _reply_headers(topic: str | None, partition: int | None, frames: bool) -> tuple[tuple[str, bytes], ...]:  # noqa: FBT001 - a field
    """Give the headers that are the same for all requests of one caller."""
    named = (
        (REPLY_TOPIC, None if topic is None else topic.encode()),
        (REPLY_PARTITION, None if partition is None else partition.to_bytes(4, "big")),
        (FRAMES, b"1" if frames else None),
    )
    return tuple([(name, value) for name, value in named if value is not None])


class Started(msgspec.Struct, tag=0, array_like=True, frozen=True):
    """A worker begins: frames of lower attempts no longer count.

    If it `resumes`, it goes on with the stream that another one began; else the stream begins anew.
    """

    correlation_id: bytes
    attempt: int
    resumes: bool = True


class Chunk(msgspec.Struct, tag=1, array_like=True, frozen=True):
    """One item of a stream; `sequence` counts from 0."""

    correlation_id: bytes
    attempt: int
    sequence: int
    value: msgspec.Raw


class Done(msgspec.Struct, tag=2, array_like=True, frozen=True):
    """The end of a call: its result, or the number of `chunks` of the stream that ends here."""

    correlation_id: bytes
    attempt: int
    chunks: int = 0
    value: msgspec.Raw = msgspec.Raw()


class Failed(msgspec.Struct, tag=3, array_like=True, frozen=True):
    """The call failed, after `chunks` chunks."""

    correlation_id: bytes
    attempt: int
    error: RemoteErrorDetail
    chunks: int = 0


class Cancelled(msgspec.Struct, tag=4, array_like=True, frozen=True):
    """The call was cancelled, after `chunks` chunks."""

    correlation_id: bytes
    attempt: int
    chunks: int = 0


class Undelivered(msgspec.Struct, tag=5, array_like=True, frozen=True):
    """The call has ended, and its webhook could not be told."""

    correlation_id: bytes
    attempt: int
    reason: str


Frame = Started | Chunk | Done | Failed | Cancelled | Undelivered

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[Frame])


def encode_frames(frames: Sequence[Frame]) -> bytes:
    """Encode frames, of any calls, as the value of one reply record."""
    return _encoder.encode(frames)


def decode_frames(value: bytes) -> list[Frame]:
    """Decode the value of a reply record; raise msgspec.DecodeError if it is none of ours."""
    return _decoder.decode(value)


def new_id() -> bytes:
    """Give `ID_BYTES` random bytes that can't be guessed: a correlation id.

    The system is asked for many at once: it takes longer to ask it than all else that a call begins with.
    """
    try:
        return _ids.pop()
    except IndexError:
        drawn = os.urandom(ID_BYTES * _IDS_DRAWN)
        _ids.extend([drawn[at : at + ID_BYTES] for at in range(0, len(drawn), ID_BYTES)])
        return _ids.pop()


_IDS_DRAWN = 256
_ids: list[bytes] = []
os.register_at_fork(after_in_child=_ids.clear)  # else both processes would give the same


def now_ms() -> int:
    """Unix time in ms: the clock of deadlines, which cross machines."""
    return time.time_ns() // 1_000_000


def _number(found: Mapping[str, bytes | None], name: str, size: int) -> int | None:
    value = found.get(name)
    if value is None:
        return None
    if len(value) != size:
        msg = f"the header {name} must be {size} bytes long, and is {len(value)}"
        raise ValueError(msg)
    return int.from_bytes(value, "big")


_ASYNC = frozenset((START_BY, RETRY, WEBHOOK, PROGRESS))
_NOT_ASYNC: dict[str, Any] = {}  # of most requests: looked for at once


def _async_fields(found: Mapping[str, bytes | None]) -> dict[str, Any]:
    return {
        "start_by_ms": _number(found, START_BY, 8),
        "retry": _retry(found),
        "webhook": _text(found, WEBHOOK),
        "progress": found.get(PROGRESS) == b"1",
    }


def _retry(found: Mapping[str, bytes | None]) -> Retry | None:
    packed = _number(found, RETRY, 12)
    if packed is None:
        return None
    return Retry(max(1, packed >> 64), packed >> 32 & 0xFFFFFFFF, packed & 0xFFFFFFFF)


def _window(found: Mapping[str, bytes | None]) -> tuple[int, int]:
    both = _number(found, WINDOW, 8) or 0
    # A stream for which nothing may be under way could not move.
    return max(1, both >> 32), max(1, both & 0xFFFFFFFF)


def _media_type(found: Mapping[str, bytes | None]) -> str:
    return (_text(found, CONTENT_TYPE) or MSGPACK).partition(";")[0].strip().lower()


def _text(found: Mapping[str, bytes | None], name: str) -> str | None:
    value = found.get(name)
    if value is None:
        return None
    try:
        return value.decode()
    except UnicodeDecodeError:
        msg = f"the header {name} must be UTF-8"
        raise ValueError(msg) from None
