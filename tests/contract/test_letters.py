"""Dead letters on every broker: how they are stored, found, and sent again."""

import asyncio
from collections.abc import AsyncIterator
from typing import NamedTuple
from uuid import uuid4

import pytest
from aiokafka import AIOKafkaProducer

from chains_stream.broker import Broker, Record, TopicSpec
from chains_stream.brokers import open_broker
from chains_stream.errors import BrokerError, ChainsRuntimeError, UnknownTopicError, WorkerLostError
from chains_stream.letters import (
    LEFT_OUT,
    ORIGINAL_PARTITION,
    ORIGINAL_TOPIC,
    Letter,
    dead_letter_spec,
    dead_letter_topic,
    held,
    read_letters,
    send_again,
    send_letter,
)
from chains_stream.messages import (
    CONTENT_TYPE,
    CORRELATION_ID,
    DATAREF,
    DEADLINE,
    REPLY_OFFSET,
    REPLY_TOPIC,
    REQUEST_ID,
    TRACEPARENT,
    Headers,
    Request,
)
from chains_stream.settings import Settings

HOUR_MS = 3_600_000


class Place(NamedTuple):
    broker: Broker
    topic: str

    def record(self, value: bytes = b"value", headers: Headers = (), partition: int = 2) -> Record:
        return Record(self.topic, partition, 17, 1_700_000_000_000, b"key", value, headers)

    async def letters(self) -> list[Letter]:
        offsets = await held(self.broker, self.topic)
        assert offsets is not None
        return [letter async for letter in read_letters(self.broker, self.topic, offsets)]

    async def first(self, partition: int) -> Record:
        return (await self.all(partition, 1))[0]

    async def all(self, partition: int, count: int) -> list[Record]:
        reader = await self.broker.read(self.topic, {partition: 0})
        found: list[Record] = []
        try:
            while len(found) < count:
                found += await reader.fetch()
        finally:
            await reader.close()
        return found


@pytest.fixture(params=["memory", pytest.param("kafka", marks=pytest.mark.kafka)])
async def place(request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    url = "memory://" if request.param == "memory" else request.getfixturevalue("kafka_url")
    settings = Settings.of(broker=url)
    broker = open_broker(settings)
    topic = f"letters.{uuid4().hex}"
    try:
        await broker.start()
        await broker.ensure_topics([TopicSpec(topic, 4, HOUR_MS), dead_letter_spec(topic, settings)])
        yield Place(broker, topic)
    finally:
        await broker.close()


def fail(message: str) -> None:
    raise ValueError(message)


def raised(message: str = "no luck") -> Exception:
    """Give an error that has a stack trace."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - any text
        fail(message)
    return caught.value


async def test_a_letter_is_stored_as_the_record_was(place: Place) -> None:
    own = (("a", b"1"), ("a", b"2"), ("b", b""))
    assert await send_letter(place.broker, place.record(headers=own), "workers", raised(), 3) == (
        dead_letter_topic(place.topic),
        0,
    )
    assert (await send_letter(place.broker, place.record(b""), "workers", raised()))[1] == 1
    first, second = await place.letters()
    assert (first.record.key, first.record.value, first.headers) == (b"key", b"value", own)
    assert (first.topic, first.partition, first.offset, first.deliveries) == (place.topic, 2, 17, 3)
    assert (second.record.value, second.deliveries) == (b"", None)
    assert first.stack_trace is not None


async def test_headers_without_a_value_stay_so(place: Place) -> None:
    """As a stranger may send them, also with our names: in the letter, and in what is sent again."""
    names = (CORRELATION_ID, REPLY_TOPIC, REQUEST_ID, CONTENT_TYPE, DATAREF, TRACEPARENT, "theirs")
    own = tuple((name, None) for name in names)
    sent = await place.broker.publish(place.topic, b"", partition=1, headers=own)
    assert (await sent, (await place.first(1)).headers) == (0, own)
    await send_letter(place.broker, await place.first(1), "workers", raised(), 3)
    (letter,) = await place.letters()
    assert letter.headers == own
    assert await send_again(place.broker, letter) == (1, 1)
    assert [record.headers for record in await place.all(1, 2)] == [own, own]


async def test_a_topic_without_letters_or_that_is_not_there(place: Place) -> None:
    assert await held(place.broker, place.topic) == range(0)
    assert await place.letters() == []
    assert await held(place.broker, "nobody.made.this") is None
    with pytest.raises(UnknownTopicError):
        await send_letter(place.broker, Record("nobody.made.this", 0, 0, 0, None, b"", ()), "workers", raised())


async def test_letters_that_were_deleted_are_not_held(place: Place) -> None:
    for _ in range(3):
        await send_letter(place.broker, place.record(), "workers", raised())
    await place.broker.delete_before(dead_letter_topic(place.topic), {0: 2})
    assert await held(place.broker, place.topic) == range(2, 3)
    assert [letter.record.offset for letter in await place.letters()] == [2]


async def test_a_record_that_has_no_room_in_a_letter_is_told_of(place: Place) -> None:
    """Another program's limit may be higher than ours; its partition has to move on all the same."""
    large = bytes(place.broker.max_record_bytes + 1)
    request = Request(correlation_id=b"i" * 16, request_id="r", deadline_ms=5)
    await send_letter(place.broker, place.record(large, request.to_headers()), "workers", raised())
    (letter,) = await place.letters()
    assert (letter.left_out, letter.record.value, letter.record.key) == (len(large), b"", None)
    assert (letter.offset, letter.message) == (17, "no luck")
    assert letter.request is not None
    assert letter.request.request_id == "r"
    with pytest.raises(ChainsRuntimeError, match=rf"{len(large)} bytes did not fit .* partition 2 offset 17"):
        await send_again(place.broker, letter)


@pytest.mark.parametrize("place", [pytest.param("kafka", marks=pytest.mark.kafka)], indirect=True)
async def test_a_letter_that_is_too_large_goes_without_its_trace(place: Place) -> None:
    own = (("large", b"x" * 40_000),)
    value = bytes(place.broker.max_record_bytes)
    await send_letter(place.broker, place.record(value, own), "workers", raised("é" * 10_000))  # a long trace, too
    (letter,) = await place.letters()
    assert (letter.record.value, letter.headers) == (value, own)
    assert letter.stack_trace is None
    assert letter.message is not None


async def test_a_request_is_sent_again_where_it_lay(place: Place) -> None:
    replies = f"replies.{uuid4().hex}"
    await place.broker.ensure_topics([TopicSpec(replies, 2, HOUR_MS)])
    for _ in range(5):
        await (await place.broker.publish(replies, b"", partition=1))
    request = Request(
        correlation_id=b"i" * 16, reply_topic=replies, reply_partition=1, reply_offset=3, deadline_ms=5, request_id="r"
    )
    own = (*request.to_headers(), ("theirs", b"x"))
    await send_letter(place.broker, place.record(headers=own), "workers", raised(), 3)
    (letter,) = await place.letters()
    assert await send_again(place.broker, letter) == (2, 0)
    record = await place.first(2)
    assert (record.key, record.value) == (b"key", b"value")
    # Without its deadline; and the answer that told of the letter lies before the place where answers are looked for.
    left = tuple((n, (5).to_bytes(8, "big") if n == REPLY_OFFSET else v) for n, v in own if n != DEADLINE)
    assert record.headers == left
    assert len(await place.letters()) == 1


async def test_a_request_whose_replies_have_no_place_any_more(place: Place) -> None:
    request = Request(correlation_id=b"i" * 16, reply_topic="gone", reply_partition=1, reply_offset=3)
    await send_letter(place.broker, place.record(headers=request.to_headers()), "workers", raised())
    await send_again(place.broker, (await place.letters())[0])
    assert REPLY_OFFSET not in dict((await place.first(2)).headers)


async def test_what_can_t_be_sent_again_says_why(place: Place) -> None:
    topic = dead_letter_topic(place.topic)
    for headers in (
        (),
        ((ORIGINAL_TOPIC, b"elsewhere"), (ORIGINAL_PARTITION, bytes(4))),
        ((ORIGINAL_PARTITION, b"\x00\x00\x00\x09"),),
        ((ORIGINAL_PARTITION, bytes(4)), (LEFT_OUT, bytes(8))),
    ):
        await (await place.broker.publish(topic, b"v", partition=0, headers=headers))
    silent, foreign, beyond, empty = await place.letters()
    with pytest.raises(ChainsRuntimeError, match="does not say which partition"):
        await send_again(place.broker, silent)
    with pytest.raises(ChainsRuntimeError, match="it came from elsewhere"):
        await send_again(place.broker, foreign)
    with pytest.raises(BrokerError, match=r"partition"):
        await send_again(place.broker, beyond)
    with pytest.raises(ChainsRuntimeError, match="0 bytes did not fit"):
        await send_again(place.broker, empty)


async def test_a_letter_of_a_letter_replaces_what_it_said(place: Place) -> None:
    await send_letter(place.broker, place.record(), "workers", raised(), 3)
    (letter,) = await place.letters()
    partition, offset = await send_again(place.broker, letter)
    again = await place.first(partition)
    assert again.offset == offset
    await send_letter(place.broker, again, "workers", WorkerLostError("again"), 1)
    _, second = await place.letters()
    assert (second.message, second.deliveries, second.stack_trace) == ("again", 1, None)


@pytest.mark.kafka
async def test_letters_of_a_transaction_are_read_to_their_end(kafka_url: str) -> None:
    """A transaction ends with a marker, which has an offset and is no record."""
    topic, settings = f"letters.{uuid4().hex}", Settings.of(broker=kafka_url)
    broker = open_broker(settings)
    producer = AIOKafkaProducer(bootstrap_servers=kafka_url.removeprefix("kafka://"), transactional_id=topic)
    try:
        await broker.start()
        await broker.ensure_topics([dead_letter_spec(topic, settings)])
        await producer.start()
        async with producer.transaction():
            await producer.send_and_wait(dead_letter_topic(topic), b"value", partition=0)
        async with asyncio.timeout(30):
            while (await held(broker, topic)) != range(2):  # noqa: ASYNC110 - nobody is told
                await asyncio.sleep(0.02)
            found = [letter.record.value async for letter in read_letters(broker, topic, range(2))]
            assert found == [b"value"]
            reader = await broker.read(dead_letter_topic(topic), {0: 1})
            assert (await reader.fetch(), reader.position(0)) == ([], 2)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3):
                await reader.fetch()  # it is told of the marker once
        await reader.close()
    finally:
        await producer.stop()
        await broker.close()
