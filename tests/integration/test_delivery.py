"""What becomes of requests that can't be read, that come too late, or that many others wait behind; on both brokers."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any
from uuid import uuid4

import msgspec
import pytest
from prometheus_client import REGISTRY

import chains_stream as chains
from chains_stream.broker import Broker, Record
from chains_stream.calls import Caller
from chains_stream.chain import Chain
from chains_stream.client import open_caller, open_connected
from chains_stream.letters import Letter, dead_letter_topic
from chains_stream.messages import CORRELATION_ID, FRAMES, REPLY_PARTITION, REPLY_TOPIC, Failed, decode_frames
from chains_stream.policy import Scope
from chains_stream.settings import Settings
from chains_stream.worker import Host
from tests.sample import Seen

WAIT = 30.0


class Count(chains.ChainletBase):
    """One of them waits; the others don't."""

    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=16))

    async def run_remote(self, number: int, wait: bool = False) -> int:  # noqa: FBT001, FBT002 - a Chainlet's argument
        Seen.note("began" if wait else "ran")
        if wait:
            await Seen.until("go", seconds=WAIT)
        return number


class Names(chains.ChainletBase):
    async def run_remote(self) -> list[str]:
        request = chains.current_request()
        return [request.id, str(request.attempt), str(len(request.emitted))]


@pytest.fixture(autouse=True)
def nothing_seen() -> Iterator[None]:
    Seen.reset()
    yield
    Seen.reset()


class Parts:
    """A caller and, once it is asked for, a host of `Count`."""

    def __init__(self, stack: AsyncExitStack, settings: Settings) -> None:
        self.chain = Chain.of(Count)
        self.topic = self.chain.topic(Count, settings.namespace)
        self.broker: Broker
        self.caller: Caller
        self._settings = settings
        self._stack = stack

    async def start(self) -> None:
        self.broker = await open_connected(self._stack, self._settings)
        self.caller = await open_caller(self._stack, self.broker, self._settings)
        await self.caller.use(self.topic)

    async def host(self) -> None:
        host = Host(self.chain, self.chain.chainlets, self.broker, self.caller, self._settings)
        self._stack.push_async_callback(host.drain)
        await host.start()

    async def send(self, value: bytes, *headers: tuple[str, bytes]) -> None:
        await (await self.broker.publish(self.topic, value, partition=0, headers=headers))

    async def letters(self, count: int) -> list[Record]:
        reader = await self.broker.read(dead_letter_topic(self.topic), {0: 0})
        found: list[Record] = []
        async with asyncio.timeout(WAIT):
            while len(found) < count:
                found += await reader.fetch()
        await reader.close()
        return found


@pytest.fixture(params=["memory", pytest.param("kafka", marks=pytest.mark.kafka)])
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    url = "memory://" if request.param == "memory" else request.getfixturevalue("kafka_url")
    return {"broker": url, "namespace": f"t{uuid4().hex[:10]}", "partitions": 2, "reply_partitions": 1}


@pytest.fixture
async def parts(settings: dict[str, Any]) -> AsyncIterator[Parts]:
    async with AsyncExitStack() as stack:
        made = Parts(stack, Settings.of(**settings, max_uncommitted=100, grace_period=1))
        await made.start()
        yield made


def total(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def test_what_can_not_be_read_is_kept_and_its_partition_moves_on(parts: Parts) -> None:
    await parts.host()
    dead = total("chains_dead_lettered_total", chainlet="Count", reason="undecodable")
    replies = f"{parts.topic.partition('.')[0]}.replies"
    reader = await parts.broker.read(replies, {0: None})
    here = ((REPLY_TOPIC, replies.encode()), (REPLY_PARTITION, b"\0\0\0\0"), (FRAMES, b"1"))
    await parts.send(b"\xc1 no msgpack", (CORRELATION_ID, b"a" * 16), *here)
    await parts.send(msgspec.msgpack.encode({"number": "none"}), (CORRELATION_ID, b"b" * 16), *here)
    await parts.send(msgspec.msgpack.encode({"number": 1}), (CORRELATION_ID, b"c" * 16), (REPLY_PARTITION, b"odd"))
    call = await parts.caller.open(parts.topic, msgspec.msgpack.encode({"number": 7}), Scope.new(WAIT))
    async with asyncio.timeout(WAIT):
        assert msgspec.msgpack.decode(await call.result()) == 7
    letters = {dict(letter.headers)[CORRELATION_ID] or b"": letter for letter in await parts.letters(3)}
    assert letters[b"a" * 16].value == b"\xc1 no msgpack"
    assert Letter.of(letters[b"b" * 16]).error == "chains_stream.errors.InvalidArgumentError"
    assert "kafka_replyPartition" in (Letter.of(letters[b"c" * 16]).message or "")
    failed: dict[bytes, Failed] = {}
    async with asyncio.timeout(WAIT):
        while len(failed) < 2:
            for record in await reader.fetch():
                frames = decode_frames(record.value)
                failed |= {frame.correlation_id: frame for frame in frames if isinstance(frame, Failed)}
    await reader.close()
    assert {frame.error.code for frame in failed.values()} == {"invalid-argument"}
    assert total("chains_dead_lettered_total", chainlet="Count", reason="undecodable") - dead == 2


async def test_a_partition_is_paused_behind_an_open_record_and_others_flow(parts: Parts) -> None:
    await parts.host()
    scope = Scope.new(WAIT)
    waiting = await parts.caller.open(parts.topic, msgspec.msgpack.encode({"number": 0, "wait": True}), scope)
    await Seen.until("began")
    value = msgspec.msgpack.encode({"number": 1})
    for number in range(1_000):
        behind = number < 500
        partition = waiting.partition if behind else 1 - waiting.partition
        await parts.broker.publish(parts.topic, value, partition=partition)
    await Seen.until("ran", times=500 + 99)
    async with asyncio.timeout(WAIT):
        while total("chains_paused_partitions", chainlet="Count") != 1:  # noqa: ASYNC110 - it is asked, and tells nobody
            await asyncio.sleep(0.01)
    ran = Seen.counts["ran"]
    assert ran <= 500 + 100 + 16, "and those that were taken with the last one"
    assert total("chains_lag", chainlet="Count", partition=str(waiting.partition)) > 0
    Seen.note("go")
    async with asyncio.timeout(WAIT):
        assert msgspec.msgpack.decode(await waiting.result()) == 0
    await Seen.until("ran", times=1_000)
    assert total("chains_paused_partitions", chainlet="Count") == 0
    assert Seen.counts["ran"] == 1_000, "each once"


async def test_late_requests_are_not_run_and_their_callers_are_told(parts: Parts) -> None:
    expired = total("chains_expired_total", chainlet="Count")
    value = msgspec.msgpack.encode({"number": 1})
    late = [await parts.caller.open(parts.topic, value, Scope.new(0.001)) for _ in range(5)]
    await asyncio.gather(*(call.stored() for call in late))
    await asyncio.sleep(0.002)  # until the deadline has passed
    await parts.host()
    async with asyncio.timeout(WAIT):
        for call in late:
            with pytest.raises(chains.DeadlineExceededError):
                await call.result()
    assert Seen.counts["ran"] == 0
    assert total("chains_expired_total", chainlet="Count") - expired == 5


async def test_a_chainlet_knows_its_request(settings: dict[str, Any]) -> None:
    async with chains.run_chain(Names, **settings) as names:
        handle = await names.submit()
        assert await handle.result() == [handle.id, "1", "0"]
    with pytest.raises(chains.ChainsUsageError, match="run_remote"):
        chains.current_request()
