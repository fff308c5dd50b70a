"""Dead letters: requests that were put aside, since workers died of them or could not read them.

Each request topic has a dead-letter topic of one partition. A letter is the request's record, its headers as they were,
with headers that say where it lay and what went wrong. Those are the ones that Spring Kafka's
DeadLetterPublishingRecoverer writes, so that tools made for it can read ours, and we can read its.
"""

import traceback
from collections.abc import AsyncGenerator, AsyncIterator

import msgspec

from chains_stream.broker import Broker, Record, TopicSpec
from chains_stream.errors import ChainsRuntimeError, RecordTooLargeError, UnknownTopicError, remote_detail, to_detail
from chains_stream.messages import CORRELATION_ID, DEADLINE, REPLY_OFFSET, REQUEST_ID, Headers, Request
from chains_stream.settings import Settings

SUFFIX = ".dlq"
PARTITION = 0  # the one that letters go to

DLT = "kafka_dlt-"
ORIGINAL_TOPIC = f"{DLT}original-topic"  # UTF-8
ORIGINAL_PARTITION = f"{DLT}original-partition"  # 4 bytes, big-endian
ORIGINAL_OFFSET = f"{DLT}original-offset"  # 8 bytes, big-endian
ORIGINAL_TIMESTAMP = f"{DLT}original-timestamp"  # 8 bytes, big-endian: Unix time in ms
ORIGINAL_TIMESTAMP_TYPE = f"{DLT}original-timestamp-type"  # CreateTime or LogAppendTime
ORIGINAL_CONSUMER_GROUP = f"{DLT}original-consumer-group"  # UTF-8
EXCEPTION_FQCN = f"{DLT}exception-fqcn"  # UTF-8, as those below: the name of the class, with its module
EXCEPTION_CAUSE_FQCN = f"{DLT}exception-cause-fqcn"
EXCEPTION_MESSAGE = f"{DLT}exception-message"
EXCEPTION_STACKTRACE = f"{DLT}exception-stacktrace"
DELIVERIES = "chains-deliveries"  # 4 bytes, big-endian: of how many workers it is known that they died of it
LEFT_OUT = "chains-left-out"  # 8 bytes, big-endian: the size of a value that did not fit into its letter

MESSAGE_BYTES = 4_000  # of an error's message that a letter holds
TRACE_BYTES = 16_000  # of its stack trace
_KEPT_BYTES = 200  # of an id, in a letter that has no room for its record


def dead_letter_topic(request_topic: str) -> str:
    """Name the topic that the dead letters of a request topic go to."""
    return request_topic + SUFFIX


def dead_letter_spec(request_topic: str, settings: Settings) -> TopicSpec:
    """Describe that topic. It keeps letters as long as requests are kept."""
    return TopicSpec(dead_letter_topic(request_topic), 1, settings.request_retention_ms)


# --- writing


def letter_headers(record: Record, group: str, error: BaseException, deliveries: int | None = None) -> Headers:
    """Give the headers of the letter that a record becomes: its own, and why and where it was given up.

    What an earlier letter said, of which the record was sent again, is left out.
    """
    return own_headers(record.headers) + _added(record, group, error, deliveries, trace=_trace(error))


async def send_letter(
    broker: Broker, record: Record, group: str, error: BaseException, deliveries: int | None = None
) -> tuple[str, int]:
    """Put a record into the dead-letter topic of its own topic, which must exist; give that topic and the offset there.

    Returns once it is stored. A letter that is too large goes without its stack trace and, if that is not enough,
    without the record's headers and value: it then says where they are. Raises BrokerError.
    """
    topic = dead_letter_topic(record.topic)
    bare = _added(record, group, error, deliveries, trace=None)
    own = own_headers(record.headers)
    ids = tuple((n, v) for n, v in own if n in (CORRELATION_ID, REQUEST_ID) and len(v or b"") <= _KEPT_BYTES)
    left_out = (LEFT_OUT, len(record.value).to_bytes(8, "big"))
    forms = (
        (record.key, record.value, letter_headers(record, group, error, deliveries)),
        (record.key, record.value, own + bare),
        (None, b"", (*ids, *bare, left_out)),
    )
    too_large: RecordTooLargeError | None = None
    for key, value, headers in forms:
        try:
            return topic, await (
                await broker.publish(topic, value, partition=PARTITION, key=key, headers=headers, durable=True)
            )
        except RecordTooLargeError as fault:
            too_large = fault
    assert too_large is not None, "else it was stored"
    raise too_large


def own_headers(headers: Headers) -> Headers:
    """Give the headers that a record had before it became a letter."""
    return tuple((name, value) for name, value in headers if not _is_of_letter(name))


def _is_of_letter(name: str) -> bool:
    return name.startswith(DLT) or name in (DELIVERIES, LEFT_OUT)


def _added(record: Record, group: str, error: BaseException, deliveries: int | None, *, trace: bytes | None) -> Headers:
    detail = to_detail(error)
    module = detail.exception_module_name
    cause = error.__cause__
    named = (
        (ORIGINAL_TOPIC, record.topic.encode()),
        (ORIGINAL_PARTITION, record.partition.to_bytes(4, "big")),
        (ORIGINAL_OFFSET, record.offset.to_bytes(8, "big")),
        (ORIGINAL_TIMESTAMP, record.timestamp_ms.to_bytes(8, "big", signed=True)),  # Kafka has -1 for none
        (ORIGINAL_TIMESTAMP_TYPE, b"CreateTime"),
        (ORIGINAL_CONSUMER_GROUP, group.encode()),
        (
            EXCEPTION_FQCN,
            f"{module}.{detail.exception_cls_name}".encode() if module else _utf8(detail.exception_cls_name),
        ),
        (EXCEPTION_CAUSE_FQCN, f"{type(cause).__module__}.{type(cause).__qualname__}".encode() if cause else None),
        (EXCEPTION_MESSAGE, _whole(_utf8(detail.exception_message)[:MESSAGE_BYTES])),
        (EXCEPTION_STACKTRACE, trace),
        (DELIVERIES, None if deliveries is None else deliveries.to_bytes(4, "big")),
    )
    return tuple((name, value) for name, value in named if value is not None)


def _trace(error: BaseException) -> bytes | None:
    """Give the stack trace of an error that was raised, here or in another process; of a long one its end."""
    if error.__traceback__ is not None:
        return _whole(_utf8("".join(traceback.format_exception(error)))[-TRACE_BYTES:])
    detail = remote_detail(error)
    return _whole(_utf8(detail.format())[-TRACE_BYTES:]) if detail is not None else None


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


def _whole(text: bytes) -> bytes:
    """Drop the parts of characters that were cut through."""
    return text.decode("utf-8", "ignore").encode()


# --- reading


class Letter(msgspec.Struct, frozen=True, kw_only=True):
    """A letter as it was found. Anything but its `record` may be missing from one that a stranger wrote.

    `topic`, `partition`, `offset` and `timestamp_ms` say where and when the request lay, `record` where the letter
    lies. `error` is the name of a class, `request` None if the request's headers can't be read. `left_out` is the size
    of a value that the letter had no room for.
    """

    record: Record
    topic: str | None
    partition: int | None
    offset: int | None
    timestamp_ms: int | None
    group: str | None
    error: str | None
    message: str | None
    stack_trace: str | None
    deliveries: int | None
    left_out: int | None
    request: Request | None

    @classmethod
    def of(cls, record: Record) -> "Letter":
        """Read a record of a dead-letter topic."""
        found = dict(record.headers)  # of several, the last: the newest, where a stranger appends
        try:
            request = Request.from_headers(record.headers)
        except ValueError:
            request = None
        return cls(
            record=record,
            topic=_text(found.get(ORIGINAL_TOPIC)),
            partition=_number(found.get(ORIGINAL_PARTITION), 4),
            offset=_number(found.get(ORIGINAL_OFFSET), 8),
            timestamp_ms=_number(found.get(ORIGINAL_TIMESTAMP), 8),
            group=_text(found.get(ORIGINAL_CONSUMER_GROUP)),
            error=_text(found.get(EXCEPTION_FQCN)),
            message=_text(found.get(EXCEPTION_MESSAGE)),
            stack_trace=_text(found.get(EXCEPTION_STACKTRACE)),
            deliveries=_number(found.get(DELIVERIES), 4),
            left_out=_number(found.get(LEFT_OUT), 8),
            request=request,
        )

    @property
    def headers(self) -> Headers:
        """The request's own headers."""
        return own_headers(self.record.headers)


async def held(broker: Broker, request_topic: str) -> range | None:
    """Give the offsets of the letters that there are; None if there is no dead-letter topic yet. Raises BrokerError."""
    topic = dead_letter_topic(request_topic)
    try:
        await broker.partitions(topic)
    except UnknownTopicError:
        return None
    begin = await broker.begin_offset(topic, PARTITION)
    return range(begin, await broker.end_offset(topic, PARTITION))


async def read_letters(broker: Broker, request_topic: str, offsets: range) -> AsyncGenerator[Letter, None]:
    """Give the letters at these offsets, which must be `held`. Raises BrokerError, OffsetExpiredError."""
    if not offsets:
        return
    reader = await broker.read(dead_letter_topic(request_topic), {PARTITION: offsets.start})
    try:
        while reader.position(PARTITION) < offsets.stop:
            for record in await reader.fetch():
                if record.offset < offsets.stop:
                    yield Letter.of(record)
    finally:
        await reader.close()


# --- sending again


async def send_again(broker: Broker, letter: Letter) -> tuple[int, int]:
    """Send the request of a letter once more, to where it lay; give the partition, and its new offset there.

    It goes without its deadline, which has passed. The letter stays. Raises ChainsRuntimeError if the letter does not
    hold the request, BrokerError.
    """
    topic = letter.record.topic.removesuffix(SUFFIX)
    place = f"{letter.topic} partition {letter.partition} offset {letter.offset}"
    if letter.left_out is not None:
        reason = f"its value of {letter.left_out} bytes did not fit into the letter; it lay in {place}"
        raise ChainsRuntimeError(reason)
    if letter.partition is None:
        raise ChainsRuntimeError("it does not say which partition it came from")
    if letter.topic not in (topic, None):
        raise ChainsRuntimeError(f"it came from {letter.topic}, whose letters these are not")
    headers = tuple([header async for header in _headers_again(broker, letter)])
    record = letter.record
    sent = await broker.publish(topic, record.value, partition=letter.partition, key=record.key, headers=headers)
    return letter.partition, await sent


async def _headers_again(broker: Broker, letter: Letter) -> AsyncIterator[tuple[str, bytes | None]]:
    for name, value in letter.headers:
        if name == REPLY_OFFSET:
            # A worker that takes the request over looks from there on for answers, and must not find the one that
            # told of this letter.
            if (end := await _end_of_replies(broker, letter.request)) is not None:
                yield name, end.to_bytes(8, "big")
        elif name != DEADLINE:
            yield name, value


async def _end_of_replies(broker: Broker, request: Request | None) -> int | None:
    if request is None or request.reply_topic is None or request.reply_partition is None:
        return None
    try:
        return await broker.end_offset(request.reply_topic, request.reply_partition)
    except UnknownTopicError:
        return None


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8", "replace")


def _number(value: bytes | None, size: int) -> int | None:
    return int.from_bytes(value, "big", signed=True) if value is not None and len(value) == size else None
