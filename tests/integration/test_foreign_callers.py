"""Callers that are not ours: what they must send, what they get, and what they can't break."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import msgspec
import pytest

from chains_stream.broker import Broker, Reader, Record, TopicSpec
from chains_stream.calls import Caller
from chains_stream.chain import Chain
from chains_stream.chainlet import ChainletBase
from chains_stream.client import open_caller, open_connected
from chains_stream.messages import CONTENT_TYPE, CORRELATION_ID, ERROR, FRAMES, JSON, REPLY_PARTITION, REPLY_TOPIC
from chains_stream.policy import Scope
from chains_stream.settings import Settings
from chains_stream.worker import Host
from tests.sample import Counting, Item, Leaf

ANSWERS = "answers.of.a.stranger"


class Stranger:
    """Publishes requests with bare headers, as Spring's ReplyingKafkaTemplate does, beside a Chain in this process."""

    def __init__(self, broker: Broker, caller: Caller, answers: Reader) -> None:
        self.broker = broker
        self.caller = caller
        self._answers = answers

    async def ask(self, topic: str, value: bytes, *headers: tuple[str, bytes | None]) -> None:
        await (await self.broker.publish(topic, value, partition=0, headers=headers))

    async def answer(self, count: int = 1) -> list[Record]:
        records: list[Record] = []
        async with asyncio.timeout(20):
            while len(records) < count:
                records += await self._answers.fetch()
        return records


@pytest.fixture
async def stranger() -> AsyncIterator[Stranger]:
    settings = Settings.of(partitions=1, deadline=5)
    async with AsyncExitStack() as stack:
        broker = await open_connected(stack, settings)
        caller = await open_caller(stack, broker, settings)
        await broker.ensure_topics([TopicSpec(ANSWERS, 2, 60_000, ring=True)])
        # One process reads one control partition set: a host a Chain, each with its own caller.
        for chainlet in (Leaf, Counting):
            own = await open_caller(stack, broker, settings)
            host = Host(Chain.of(chainlet), [chainlet], broker, own, settings)
            stack.push_async_callback(host.drain)
            await host.start()
        answers = await broker.read(ANSWERS, {0: None, 1: None})
        stack.push_async_callback(answers.close)
        yield Stranger(broker, caller, answers)


def topic_of(chainlet: type[ChainletBase]) -> str:
    return Chain.of(chainlet).topic(chainlet, "chains")


def headers(number: int, *more: tuple[str, bytes]) -> list[tuple[str, bytes]]:
    return [(CORRELATION_ID, bytes([number]) * 16), (REPLY_TOPIC, ANSWERS.encode()), *more]


async def test_json_in_json_out(stranger: Stranger) -> None:
    await stranger.ask(topic_of(Leaf), b'{"item": {"name": "a"}}', *headers(1, (CONTENT_TYPE, JSON.encode())))
    (answer,) = await stranger.answer()
    assert dict(answer.headers) == {CORRELATION_ID: b"\x01" * 16}
    assert msgspec.json.decode(answer.value) == {"name": "A", "count": 2}


async def test_msgpack_by_default_and_a_partition_of_their_choice(stranger: Stranger) -> None:
    value = msgspec.msgpack.encode({"item": {"name": "a"}})
    await stranger.ask(topic_of(Leaf), value, *headers(1, (REPLY_PARTITION, b"\x00\x00\x00\x01")))
    (answer,) = await stranger.answer()
    assert answer.partition == 1
    assert msgspec.msgpack.decode(answer.value, type=Item) == Item("A", 2)


async def test_a_stream_is_a_record_a_chunk_and_an_empty_one(stranger: Stranger) -> None:
    await stranger.ask(topic_of(Counting), b'{"upto": 3}', *headers(1, (CONTENT_TYPE, JSON.encode())))
    assert [record.value for record in await stranger.answer(4)] == [b"0", b"1", b"2", b""]


async def test_failures_are_a_header(stranger: Stranger) -> None:
    await stranger.ask(topic_of(Leaf), b'{"item": {}}', *headers(1, (CONTENT_TYPE, JSON.encode())))
    (answer,) = await stranger.answer()
    assert answer.value == b""
    detail = msgspec.json.decode(dict(answer.headers)[ERROR] or b"")
    assert detail["code"] == "invalid-argument"
    assert detail["fields"] == {"path": "$.item.name"}


async def test_a_result_that_json_cannot_hold_is_an_answer_too(stranger: Stranger) -> None:
    request = b'{"item": {"name": "x"}, "mode": "wrong"}'
    await stranger.ask(topic_of(Leaf), request, *headers(1, (CONTENT_TYPE, JSON.encode())))
    (answer,) = await stranger.answer()
    assert msgspec.json.decode(dict(answer.headers)[ERROR] or b"")["code"] == "invalid-result"


@pytest.mark.parametrize(
    "bad",
    [
        [(CORRELATION_ID, None), (REPLY_TOPIC, ANSWERS.encode())],
        [(CORRELATION_ID, b"x"), (REPLY_TOPIC, b"\xff")],
        [(CORRELATION_ID, b"x"), (REPLY_TOPIC, b"no.such.topic")],
        [(CORRELATION_ID, b"x"), (REPLY_TOPIC, b"no.such.topic"), (FRAMES, b"1")],
        [(CORRELATION_ID, b"x"), (REPLY_TOPIC, ANSWERS.encode()), (REPLY_PARTITION, b"\x00\x00\x00\x09")],
        [(CORRELATION_ID, b"x"), (REPLY_TOPIC, ANSWERS.encode()), (REPLY_PARTITION, b"9")],
        [],
    ],
    ids=[
        "null id",
        "no UTF-8",
        "no such topic",
        "frames to no topic",
        "no such partition",
        "short header",
        "no headers",
    ],
)
async def test_a_request_that_cannot_be_answered_holds_nobody_up(stranger: Stranger, bad: list[Any]) -> None:
    topic = topic_of(Leaf)
    await stranger.ask(topic, b"\xc1 not even msgpack", *bad)
    await stranger.ask(topic, b'{"item": {"name": "next"}}', *headers(2, (CONTENT_TYPE, JSON.encode())))
    answers = await stranger.answer()
    while answers[-1].headers[0][1] != b"\x02" * 16:
        answers += await stranger.answer()
    assert msgspec.json.decode(answers[-1].value)["name"] == "NEXT"


async def test_garbage_on_the_reply_topic_is_skipped(stranger: Stranger) -> None:
    topic = topic_of(Leaf)
    await stranger.caller.use(topic)
    deep = b"\x91" * 5_000 + b"\xc0"
    for partition in range(await stranger.broker.partitions("chains.replies")):
        for garbage in (b"", b"\xc1", deep, b"\x91\x95\x01\xa3abc"):
            await stranger.broker.publish("chains.replies", garbage, partition=partition)
    call = await stranger.caller.open(topic, msgspec.msgpack.encode({"item": {"name": "a"}}), Scope.new(5))
    async with asyncio.timeout(5):
        assert msgspec.msgpack.decode(await call.result(), type=Item) == Item("A", 2)
