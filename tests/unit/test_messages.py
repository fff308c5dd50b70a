"""The wire: what is written is what is read, and what a stranger writes is read or refused by name."""

import os
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chains_stream import messages
from chains_stream.errors import RemoteErrorDetail
from chains_stream.messages import (
    CORRELATION_ID,
    DEADLINE,
    REPLY_PARTITION,
    REPLY_TOPIC,
    REQUEST_ID,
    RETRY,
    Cancelled,
    Chunk,
    Done,
    Failed,
    Frame,
    Request,
    Retry,
    Started,
    Undelivered,
    decode_frames,
    encode_frames,
)

ids = st.binary(min_size=16, max_size=16)
attempts = st.integers(1, 2**31)
raws = st.one_of(st.none(), st.integers(0, 2**40), st.text(max_size=50)).map(
    lambda value: msgspec.Raw(msgspec.msgpack.encode(value))
)
frames = st.one_of(
    st.builds(Started, ids, attempts, st.booleans()),
    st.builds(Chunk, ids, attempts, st.integers(0, 2**40), raws),
    st.builds(Done, ids, attempts, st.integers(0, 2**40), raws),
    st.builds(Failed, ids, attempts, st.builds(RemoteErrorDetail, st.text(), st.none(), st.text()), st.integers(0, 9)),
    st.builds(Cancelled, ids, attempts, st.integers(0, 2**40)),
    st.builds(Undelivered, ids, attempts, st.text(max_size=50)),
)
asynchronous = st.fixed_dictionaries(
    {"start_by_ms": st.integers(0, 2**53)},
    optional={
        "retry": st.builds(Retry, st.integers(1, 2**31), st.integers(0, 2**31), st.integers(0, 2**31)),
        "webhook": st.text(min_size=1, max_size=40),
        "progress": st.booleans(),
    },
)
requests = st.builds(
    Request,
    correlation_id=ids,
    reply_topic=st.none() | st.text(min_size=1, max_size=40),
    reply_partition=st.none() | st.integers(0, 2**31 - 1),
    deadline_ms=st.none() | st.integers(0, 2**53),
    request_id=st.text(max_size=40),
    attempt=attempts,
    content_type=st.sampled_from(["application/msgpack", "application/json"]),
    frames=st.booleans(),
    window=st.none() | st.tuples(st.integers(1, 2**31), st.integers(1, 2**31)),
    traceparent=st.none() | st.binary(min_size=1, max_size=55),
    tracestate=st.none() | st.binary(min_size=1, max_size=55),
)


def plain(frame: Frame) -> object:
    return (
        msgspec.to_builtins(frame, enc_hook=bytes)
        if not hasattr(frame, "value")
        else (
            type(frame),
            [bytes(field) if isinstance(field, msgspec.Raw) else field for field in msgspec.structs.astuple(frame)],
        )
    )


@given(st.lists(frames, max_size=5))
def test_frames_round_trip_many_to_a_record(many: list[Frame]) -> None:
    assert [plain(frame) for frame in decode_frames(encode_frames(many))] == [plain(frame) for frame in many]


@given(requests, st.just({}) | asynchronous)
def test_request_headers_round_trip(request: Request, more: dict[str, Any]) -> None:
    request = msgspec.structs.replace(request, **more)
    assert Request.from_headers(request.to_headers()) == request


def test_the_bytes_on_the_wire_are_these() -> None:
    """A type that shipped never changes: these bytes are what other versions have in their topics."""
    assert (
        encode_frames([Chunk(b"c" * 16, 1, 2, msgspec.Raw(b"\x03"))])
        == b"\x91\x95\x01\xc4\x10" + b"c" * 16 + b"\x01\x02\x03"
    )
    assert (
        encode_frames([Done(b"c" * 16, 1, 0, msgspec.Raw(b"\xc0"))])
        == b"\x91\x95\x02\xc4\x10" + b"c" * 16 + b"\x01\x00\xc0"
    )
    headers = dict(Request(correlation_id=b"i" * 16, reply_topic="r", reply_partition=7, deadline_ms=256).to_headers())
    assert headers == {
        CORRELATION_ID: b"i" * 16,
        REPLY_TOPIC: b"r",
        REPLY_PARTITION: b"\x00\x00\x00\x07",
        DEADLINE: b"\x00\x00\x00\x00\x00\x00\x01\x00",
    }


def test_a_retry_is_three_numbers() -> None:
    headers = dict(Request(correlation_id=b"i" * 16, start_by_ms=1, retry=Retry(3, 256, 65536)).to_headers())
    assert headers[RETRY] == b"\x00\x00\x00\x03\x00\x00\x01\x00\x00\x01\x00\x00"


def test_a_begin_of_an_earlier_version_goes_on_with_its_stream() -> None:
    assert decode_frames(msgspec.msgpack.encode([[0, b"c" * 16, 2]])) == [Started(b"c" * 16, 2, resumes=True)]


def test_a_later_version_may_add_fields() -> None:
    later = msgspec.msgpack.encode([[4, b"c" * 16, 1, 0, "a field of the future"]])
    assert decode_frames(later) == [Cancelled(b"c" * 16, 1, 0)]


def test_a_strangers_headers_suffice() -> None:
    request = Request.from_headers(
        [(CORRELATION_ID, b"1"), (REPLY_TOPIC, b"answers"), ("content-type", b"Application/JSON; charset=utf-8")]
    )
    assert (request.reply_topic, request.reply_partition, request.content_type) == ("answers", None, "application/json")
    assert not request.frames
    assert request.window is None


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (DEADLINE, b"soon", "the header chains-deadline must be 8 bytes long, and is 4"),
        (REPLY_PARTITION, b"3", "the header kafka_replyPartition must be 4 bytes long, and is 1"),
        (REQUEST_ID, b"\xff", "the header chains-request-id must be UTF-8"),
    ],
)
def test_a_malformed_header_is_named(name: str, value: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Request.from_headers([(name, value)])


@given(st.binary(max_size=60))
def test_foreign_bytes_are_decoded_or_refused(data: bytes) -> None:
    with suppress(msgspec.DecodeError):
        decode_frames(data)


def test_ids_are_never_given_twice_nor_by_a_child_too() -> None:
    given = {messages.new_id() for _ in range(1_000)}
    assert len(given) == 1_000
    assert {len(one) for one in given} == {16}
    messages.new_id()  # some are drawn, and not given yet
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, messages.new_id())
        os._exit(0)
    os.waitpid(child, 0)
    with os.fdopen(read, "rb") as pipe:
        os.close(write)
        theirs = pipe.read()
    assert len(theirs) == 16
    assert theirs not in given | {messages.new_id() for _ in range(1_000)}
