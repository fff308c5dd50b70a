"""Dead letters: what is written is what is read, under the names that Spring Kafka uses."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chains_stream.broker import Record
from chains_stream.errors import ChainsUsageError, WorkerLostError, from_detail, to_detail
from chains_stream.letters import (
    MESSAGE_BYTES,
    TRACE_BYTES,
    Letter,
    dead_letter_spec,
    dead_letter_topic,
    letter_headers,
    own_headers,
)
from chains_stream.messages import CONTENT_TYPE, CORRELATION_ID, DATAREF, Headers, Request
from chains_stream.settings import Settings
from chains_stream.signature import Signature

names = st.text(max_size=30).filter(lambda name: own_headers(((name, b""),)))  # not those of letters
headers = st.lists(st.tuples(names, st.none() | st.binary(max_size=30)), max_size=8).map(tuple)
records = st.builds(
    Record,
    topic=st.text("abcXYZ._-", min_size=1, max_size=40),
    partition=st.integers(0, 2**31 - 1),
    offset=st.integers(0, 2**63 - 1),
    timestamp_ms=st.integers(-1, 2**53),
    key=st.none() | st.binary(max_size=9),
    value=st.binary(max_size=99),
    headers=headers,
)


def record_of(*own: tuple[str, bytes | None]) -> Record:
    return Record("ns.C.A.run_remote.01234567", 3, 2**40, 1_700_000_000_000, b"key", b"value", own)


def fail(message: str) -> None:
    cause = KeyError("the cause")
    raise ValueError(message) from cause


def raised(message: str = "no luck") -> Exception:
    """Give an error that has a stack trace."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - any text
        fail(message)
    return caught.value


def letter_of(record: Record, added: Headers) -> Letter:
    lies = Record(dead_letter_topic(record.topic), 0, 7, 1_700_000_000_001, record.key, record.value, added)
    return Letter.of(lies)


@given(
    record=records, group=st.text(max_size=20), message=st.text(max_size=50), deliveries=st.none() | st.integers(0, 9)
)
def test_a_letter_is_read_as_it_was_written(record: Record, group: str, message: str, deliveries: int | None) -> None:
    error = WorkerLostError(message)
    letter = letter_of(record, letter_headers(record, group, error, deliveries))
    assert letter.headers == record.headers
    assert (letter.topic, letter.partition, letter.offset) == (record.topic, record.partition, record.offset)
    assert (letter.timestamp_ms, letter.group, letter.deliveries) == (record.timestamp_ms, group, deliveries)
    assert (letter.error, letter.message) == ("chains_stream.errors.WorkerLostError", message)
    assert (letter.stack_trace, letter.left_out) == (None, None)  # it was made, and never raised


@given(first=records, own=headers)
def test_a_letter_of_one_that_was_sent_again_tells_of_the_last_time(first: Record, own: Headers) -> None:
    before = letter_headers(first, "old", raised("old"), 9)
    letter = letter_of(record_of(*own), letter_headers(record_of(*own, *before), "new", WorkerLostError("new")))
    assert letter.headers == (*own, *first.headers)
    assert (letter.group, letter.message, letter.deliveries, letter.stack_trace) == ("new", "new", None, None)
    names = [name for name, _ in letter.record.headers if name.startswith("kafka_dlt-")]
    assert len(names) == len(set(names))


def test_the_names_and_the_encodings_are_those_of_spring_kafka() -> None:
    """KafkaHeaders, and DeadLetterPublishingRecoverer, which writes numbers with a ByteBuffer."""
    found = dict(letter_headers(record_of(), "workers", raised(), 3))
    stack = (found.pop("kafka_dlt-exception-stacktrace") or b"").decode()
    assert "in fail\n" in stack
    assert stack.endswith("ValueError: no luck\n")
    assert found == {
        "kafka_dlt-original-topic": b"ns.C.A.run_remote.01234567",
        "kafka_dlt-original-partition": struct.pack(">i", 3),
        "kafka_dlt-original-offset": struct.pack(">q", 2**40),
        "kafka_dlt-original-timestamp": struct.pack(">q", 1_700_000_000_000),
        "kafka_dlt-original-timestamp-type": b"CreateTime",
        "kafka_dlt-original-consumer-group": b"workers",
        "kafka_dlt-exception-fqcn": b"builtins.ValueError",
        "kafka_dlt-exception-cause-fqcn": b"builtins.KeyError",
        "kafka_dlt-exception-message": b"no luck",
        "chains-deliveries": struct.pack(">i", 3),
    }


def test_an_error_of_another_process_keeps_its_name_and_its_trace() -> None:
    remote = from_detail(to_detail(raised(), "Leaf"))
    letter = letter_of(record_of(), letter_headers(record_of(), "workers", remote))
    assert (letter.error, letter.message) == ("builtins.ValueError", "no luck")
    assert letter.stack_trace is not None
    assert "Leaf" in letter.stack_trace


def test_what_an_error_says_is_bounded() -> None:
    letter = letter_of(record_of(), letter_headers(record_of(), "workers", raised("é" * 100_000)))
    assert letter.message is not None
    assert letter.stack_trace is not None
    assert len(letter.message) == MESSAGE_BYTES // 2
    assert len(letter.stack_trace.encode()) <= TRACE_BYTES
    assert letter.stack_trace.endswith("é\n")


def test_text_that_utf_8_can_t_hold_is_escaped() -> None:
    letter = letter_of(record_of(), letter_headers(record_of(), "workers", raised("\udcff")))
    assert letter.message == "\\udcff"


def test_the_request_of_a_letter_can_be_read() -> None:
    request = Request(correlation_id=b"i" * 16, request_id="r", deadline_ms=5, frames=True)
    own = (*request.to_headers(), (DATAREF, b"s3://bucket/key"))
    letter = letter_of(record_of(*own), letter_headers(record_of(*own), "workers", raised()))
    assert letter.request == request
    assert letter.headers == own, "a value in the store stays there"


@pytest.mark.parametrize(
    "own",
    [
        (),
        (("kafka_dlt-original-partition", b"3"), ("kafka_dlt-original-offset", b"")),
        (("kafka_dlt-original-topic", b"\xff"), ("kafka_dlt-exception-message", b"\xff")),
        ((CONTENT_TYPE, b"\xff"), (CORRELATION_ID, b"short")),
    ],
)
def test_a_stranger_s_letter_is_read_as_far_as_it_goes(own: Headers) -> None:
    letter = Letter.of(record_of(*own))
    assert (letter.partition, letter.offset, letter.timestamp_ms, letter.deliveries) == (None,) * 4
    assert letter.topic in (None, "�")
    assert letter.message in (None, "�")
    assert (letter.request is None) == (CONTENT_TYPE in dict(own))


def test_of_several_headers_of_a_name_the_last_counts() -> None:
    """Spring appends where it does not strip."""
    letter = Letter.of(record_of(("kafka_dlt-exception-message", b"old"), ("kafka_dlt-exception-message", b"new")))
    assert letter.message == "new"


def test_the_topic_of_letters() -> None:
    spec = dead_letter_spec("ns.C.A.run_remote.01234567", Settings(request_retention_ms=5))
    assert (spec.name, spec.partitions, spec.retention_ms) == ("ns.C.A.run_remote.01234567.dlq", 1, 5)


def test_the_longest_request_topic_has_room_for_the_suffix() -> None:
    async def run_remote(self: object) -> None: ...

    signature = Signature.of(run_remote, "C")
    fits = max(n for n in range(1, 250) if _has_topic(signature, "x" * n))
    assert len(dead_letter_topic(signature.topic("ns", "x" * fits))) <= 249
    assert fits > 200


def _has_topic(signature: Signature, chain: str) -> bool:
    try:
        return bool(signature.topic("ns", chain))
    except ChainsUsageError:
        return False
