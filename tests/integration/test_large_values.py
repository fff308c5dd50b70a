"""Values that are too large for a record: there and back through the store, on both brokers."""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import pytest

import chains_stream as chains
from chains_stream.broker import Broker, Record, TopicSpec
from chains_stream.calls import Call, Caller, RemoteTarget, remote_target
from chains_stream.chain import Chain
from chains_stream.client import open_caller, open_connected
from chains_stream.errors import CallCancelledError, RecordTooLargeError, StoredValueMissingError, StoreError
from chains_stream.messages import (
    CONTENT_TYPE,
    CORRELATION_ID,
    DATAREF,
    ERROR,
    JSON,
    REPLY_TOPIC,
    Chunk,
    Done,
    encode_frames,
)
from chains_stream.policy import Scope
from chains_stream.settings import Settings
from chains_stream.store import reference_in
from chains_stream.worker import Host
from tests.sample import Seen
from tests.serving import problem_of, serving

LARGE = 5_000_000
MIXED = [10, 3_000_000, 20, 0, 3_000_001, 3_000_002, 5]  # characters of the chunks of a stream
ANSWERS = "answers.of.a.stranger"


class Repeat(chains.ChainletBase):
    """Gives a text so many times; `mode` says what else is to happen."""

    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=16))

    async def run_remote(self, text: str, times: int = 1, mode: str = "") -> str:
        if mode == "fail":
            raise ValueError(text * times)
        if mode == "hang once":
            Seen.note("began")
            if Seen.counts["began"] == 1:
                await asyncio.Event().wait()
        return text * times


@chains.mark_entrypoint
class Through(chains.ChainletBase):
    """A dependency that takes and gives large values."""

    def __init__(self, repeat: Repeat = chains.depends(Repeat)) -> None:
        self._repeat = repeat

    async def run_remote(self, text: str, times: int = 1) -> str:
        return await self._repeat.run_remote(text, times)


class Chunks(chains.ChainletBase):
    """Streams texts of these lengths, each of a letter of its own."""

    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=16))

    async def run_remote(self, sizes: list[int]) -> AsyncIterator[str]:
        try:
            for number, size in enumerate(sizes):
                yield chunk(number, size)
        finally:
            Seen.note("closed")


class Resuming(chains.ChainletBase):
    """Streams as `Chunks` does, and goes on where a worker was lost, which the first is after two chunks."""

    remote_config = chains.RemoteConfig(options=chains.ChainletOptions(resumable=True))

    async def run_remote(self, sizes: list[int]) -> AsyncIterator[str]:
        emitted = chains.current_request().emitted
        assert list(emitted) == [chunk(number, size) for number, size in enumerate(sizes[: len(emitted)])]
        Seen.note(f"from {len(emitted)}")
        for number, size in enumerate(sizes):
            if number >= len(emitted):
                yield chunk(number, size)
            if number == 1 and not emitted:
                Seen.note("waits")
                await asyncio.Event().wait()


def chunk(number: int, size: int) -> str:
    return chr(ord("a") + number % 26) * size


CHUNKS = [chunk(number, size) for number, size in enumerate(MIXED)]


@pytest.fixture(autouse=True)
def nothing_seen() -> Iterator[None]:
    Seen.reset()
    yield
    Seen.reset()


@pytest.fixture(params=["memory", pytest.param("kafka", marks=pytest.mark.kafka)])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    broker = "memory://" if request.param == "memory" else str(request.getfixturevalue("kafka_url"))
    return {
        "broker": broker,
        "store": str(tmp_path),
        "namespace": f"t{uuid4().hex[:10]}",
        "partitions": 2,
        "reply_partitions": 1,
    }


class Parts:
    """A process's parts one by one, so that workers come and go, and the store can be looked at."""

    def __init__(self, stack: AsyncExitStack, settings: Settings) -> None:
        self.settings = settings
        self.broker: Broker
        self.caller: Caller
        self._stack = stack

    async def start(self) -> None:
        self.broker = await open_connected(self._stack, self.settings)
        self.caller = await open_caller(self._stack, self.broker, self.settings)

    async def host(self, chainlet: type[chains.ChainletBase]) -> Host:
        """Have a Chainlet served; with a caller of its own, as in a process of its own."""
        caller = await open_caller(self._stack, self.broker, self.settings)
        host = Host(Chain.of(chainlet), [chainlet], self.broker, caller, self.settings)
        self._stack.push_async_callback(host.drain)
        await host.start()
        return host

    async def target(self, chainlet: type[chains.ChainletBase]) -> RemoteTarget:
        return await remote_target(Chain.of(chainlet), chainlet, self.caller, self.settings)

    async def open(self, chainlet: type[chains.ChainletBase], **arguments: Any) -> Call:
        """Send a request, and wait until it is stored."""
        target = await self.target(chainlet)
        call = await target.open(msgspec.msgpack.encode(arguments), Scope.new(30), 1)
        await call.stored()
        return call

    def objects(self) -> list[Path]:
        """Give the files of the values that are in the store, and complete."""
        files = [path for path in Path(self.settings.store or "").rglob("*") if path.is_file()]
        return [path for path in files if path.suffix != ".part"]

    def lose(self) -> None:
        for path in self.objects():
            path.unlink()


@pytest.fixture
async def parts(settings: dict[str, Any]) -> AsyncIterator[Parts]:
    async with AsyncExitStack() as stack:
        made = Parts(stack, Settings.of(**settings, grace_period=0.1))
        await made.start()
        yield made


def text_of(value: msgspec.Raw | None) -> str:
    assert value is not None
    return msgspec.msgpack.decode(value, type=str)


async def read(call: Call, count: int) -> list[str]:
    """Read so many chunks of a stream, which are all that are there then."""
    texts: list[str] = []
    while len(texts) < count:
        texts += map(text_of, await call.next() or [])
    assert len(texts) == count
    return texts


async def test_arguments_and_results_through_two_hops(settings: dict[str, Any]) -> None:
    async with chains.run_chain(Through, **settings) as through:
        text = "é" * (LARGE // 2)
        assert await through.run_remote(text) == text
        assert await through.run_remote("ab", LARGE) == "ab" * LARGE
        many = await asyncio.gather(*(through.run_remote(letter * 2_000_000) for letter in "abcdefgh"))
        assert many == [letter * 2_000_000 for letter in "abcdefgh"]


async def test_a_stream_of_small_and_large_chunks_keeps_its_order(settings: dict[str, Any]) -> None:
    async with chains.run_chain(Chunks, **settings) as chunks:
        assert [text async for text in chunks.run_remote(MIXED)] == CHUNKS
        handle = await chunks.submit(MIXED)
        assert await handle.result() == CHUNKS


@pytest.mark.kafka
async def test_a_client_with_a_connection_of_its_own(kafka_url: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"store": str(tmp_path), "namespace": f"t{uuid4().hex[:10]}", "partitions": 2}
    async with (
        chains.run_chain(Through, broker=kafka_url, **settings),
        chains.connect(kafka_url, Through, **settings) as through,
    ):
        text = "x" * LARGE
        assert await through.run_remote(text, times=2) == text * 2


async def test_through_the_gateway(settings: dict[str, Any]) -> None:
    async with serving(Through, **settings) as served:
        answer = await served.call(text="x" * LARGE)
        assert answer.json() == "x" * LARGE
        async with chains.connect(served.url, Through) as through:
            assert await through.run_remote("y" * LARGE, times=2) == "y" * LARGE * 2


async def test_a_stream_through_the_gateway(settings: dict[str, Any]) -> None:
    async with serving(Chunks, **settings) as served, chains.connect(served.url, Chunks) as chunks:
        assert [text async for text in chunks.run_remote(MIXED)] == CHUNKS


async def test_values_over_the_largest_are_refused(settings: dict[str, Any]) -> None:
    async with serving(Chunks, **settings, max_value_bytes=2_000_000) as served:
        answer = await served.http.post("/run_remote", json={"sizes": [1] * 2_500_000})
        assert problem_of(answer, 413)["code"] == "record-too-large"
    async with chains.run_chain(Repeat, **settings, max_value_bytes=2_000_000) as repeat:
        with pytest.raises(RecordTooLargeError, match="CHAINS_MAX_VALUE_BYTES"):
            await repeat.run_remote("x" * 2_000_001)
        with pytest.raises(RecordTooLargeError, match="CHAINS_MAX_VALUE_BYTES"):
            await repeat.run_remote("x", times=2_000_001)
        assert await repeat.run_remote("x") == "x"


@pytest.mark.parametrize("size", [-200, -70, -64, -40, -5, 0, 1])
async def test_around_the_limit_of_a_record(settings: dict[str, Any], size: int) -> None:
    limit = 2_000
    async with chains.run_chain(Repeat, **settings, max_record_bytes=limit) as repeat:
        assert await repeat.run_remote("x" * (limit + size)) == "x" * (limit + size)
        assert await repeat.run_remote("x", limit + size) == "x" * (limit + size)


async def test_a_redelivered_request_still_finds_its_arguments(parts: Parts) -> None:
    first = await parts.host(Repeat)
    call = await parts.open(Repeat, text="x" * LARGE, mode="hang once")
    await Seen.until("began")
    await first.drain()
    await parts.host(Repeat)
    async with asyncio.timeout(30):
        assert text_of(await call.result()) == "x" * LARGE
    assert Seen.counts["began"] == 2


async def test_a_resumed_stream_finds_its_large_chunks(parts: Parts) -> None:
    first = await parts.host(Resuming)
    call = await parts.open(Resuming, sizes=[3, 3_000_000, 2, 3_000_000])
    async with asyncio.timeout(60):
        await Seen.until("waits")
        got = await read(call, 2)
        await first.drain()
        await parts.host(Resuming)
        got += await read(call, 2)
        assert await call.next() is None
    assert got == ["aaa", "b" * 3_000_000, "cc", "d" * 3_000_000]
    assert Seen.counts["from 2"] == 1


async def test_arguments_that_are_gone_are_an_error_for_their_caller_alone(parts: Parts) -> None:
    lost, other = await parts.open(Repeat, text="x" * LARGE), await parts.open(Repeat, text="small")
    assert [path.stat().st_size for path in parts.objects()] == [LARGE + 11]
    parts.lose()
    await parts.host(Repeat)
    async with asyncio.timeout(30):
        assert text_of(await other.result()) == "small"
        with pytest.raises(StoredValueMissingError):
            await lost.result()


async def test_a_result_that_is_gone_is_an_error_for_its_caller_alone(parts: Parts) -> None:
    await parts.host(Repeat)
    lost = await parts.open(Repeat, text="x", times=LARGE)
    other = await parts.open(Repeat, text="small")
    async with asyncio.timeout(30):
        while not lost.ended:
            await lost._wait()
        parts.lose()
        with pytest.raises(StoredValueMissingError):
            await lost.result()
        assert text_of(await other.result()) == "small"


async def test_a_chunk_that_is_gone_ends_its_stream_and_no_other(parts: Parts) -> None:
    await parts.host(Chunks)
    sizes = [10, LARGE, *[10] * 100_000]
    target = await parts.target(Chunks)
    stream = target.stream(msgspec.msgpack.encode({"sizes": sizes}), Scope.new(30), 1)
    async with asyncio.timeout(30), aclosing(stream):
        first, *_ = await anext(stream)
        assert text_of(first) == "a" * 10
        while not parts.objects():  # noqa: ASYNC110 - of what a thread does to files nobody is told
            await asyncio.sleep(0.01)
        other = await parts.open(Chunks, sizes=[1, 2])
        await Seen.until("closed")
        parts.lose()
        with pytest.raises(StoredValueMissingError):
            await anext(stream)
        assert await read(other, 2) == ["a", "bb"]
        assert await other.next() is None
        await Seen.until("closed", times=2)  # nobody works for a reader that was sent away


async def test_a_reader_that_gives_up_on_a_large_chunk_can_come_back(parts: Parts) -> None:
    await parts.host(Chunks)
    call = await parts.open(Chunks, sizes=[3_000_000, 1])
    async with asyncio.timeout(30):
        while not call.ended:
            await call._wait()
        reading = asyncio.ensure_future(call.next())
        await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait([reading])
        assert await read(call, 2) == ["a" * 3_000_000, "b"]
        assert await call.next() is None


async def test_a_chunk_of_a_lost_worker_is_not_shown_if_it_was_still_being_fetched(parts: Parts) -> None:
    call = await parts.open(Chunks, sizes=[])
    reference = await parts.caller.store.put(msgspec.msgpack.encode("first"), 1000)
    call.feed(Chunk(call.id, 1, 0, msgspec.Raw(b"\xc0")), reference)
    reading = asyncio.ensure_future(call.next())
    await asyncio.sleep(0)  # it waits for the store
    call.feed(Chunk(call.id, 2, 0, msgspec.Raw(msgspec.msgpack.encode("second"))))
    assert list(map(text_of, await reading or [])) == ["second"]


async def test_a_call_that_was_closed_has_no_value(parts: Parts) -> None:
    call = await parts.open(Repeat, text="x" * LARGE)
    call.close()
    with pytest.raises(CallCancelledError):
        await call.result()


async def test_an_error_with_a_huge_message_is_still_that_error(settings: dict[str, Any]) -> None:
    async with chains.run_chain(Repeat, **settings) as repeat:
        with pytest.raises(ValueError, match="xxxx") as caught:
            await repeat.run_remote("x", LARGE, mode="fail")
        assert re.fullmatch(r"x{10000,99999}\.\.\. \(5000000 characters\)", str(caught.value))


# --- strangers


async def ask(parts: Parts, value: bytes, *headers: tuple[str, bytes]) -> Record:
    """Send a request as a stranger does, and give the answer."""
    await parts.broker.ensure_topics([TopicSpec(ANSWERS, 1, 3_600_000, ring=True)])
    answers = await parts.broker.read(ANSWERS, {0: None})
    try:
        topic = Chain.of(Repeat).topic(Repeat, parts.settings.namespace)
        named = ((CORRELATION_ID, b"1" * 16), (REPLY_TOPIC, ANSWERS.encode()), *headers)
        await (await parts.broker.publish(topic, value, partition=0, headers=named))
        async with asyncio.timeout(30):
            return (await answers.fetch())[0]
    finally:
        await answers.close()


async def test_a_stranger_gets_a_reference(parts: Parts) -> None:
    await parts.host(Repeat)
    request = msgspec.json.encode({"text": "x", "times": LARGE})
    answer = await ask(parts, request, (CONTENT_TYPE, JSON.encode()))
    assert answer.value == b""
    path = str(reference_in(answer.headers)).removeprefix("file://")
    assert path in map(str, parts.objects())
    assert msgspec.json.decode(await asyncio.to_thread(Path(path).read_bytes)) == "x" * LARGE


async def test_a_stranger_s_claim_is_served(parts: Parts) -> None:
    await parts.host(Repeat)
    reference = await parts.caller.store.put(b'{"text": "hello"}', 1000)
    answer = await ask(parts, b"", (CONTENT_TYPE, JSON.encode()), (DATAREF, reference.encode()))
    assert answer.value == b'"hello"'


@pytest.mark.parametrize("wrong", [b"file:///etc/passwd", b"\xff", b"http://127.0.0.1:1/x", b""])
async def test_a_wrong_reference_is_refused(parts: Parts, wrong: bytes) -> None:
    await parts.host(Repeat)
    answer = await ask(parts, b"", (DATAREF, wrong))
    error = msgspec.json.decode(dict(answer.headers)[ERROR] or b"")
    assert error["code"] == "store"
    assert "is no value in this process's store" in error["exception_message"]


async def test_a_stranger_s_error_fits_its_header(parts: Parts) -> None:
    await parts.host(Repeat)
    request = {"text": "\x01", "times": LARGE, "mode": "fail"}
    answer = await ask(parts, msgspec.msgpack.encode(request))
    error = msgspec.json.decode(dict(answer.headers)[ERROR] or b"")
    assert error["exception_cls_name"] == "ValueError"
    assert error["exception_message"].endswith("(5000000 characters)")


async def test_a_wrong_reference_in_a_reply_fails_its_call_alone(parts: Parts) -> None:
    call, other = await parts.open(Repeat, text="small"), await parts.open(Repeat, text="other")
    replies = f"{parts.settings.namespace}.replies"
    done = Done(call.id, 0, value=msgspec.Raw(b"\xc0"))
    wrong = ((DATAREF, b"file:///etc/passwd"),)
    # Of two frames in one record nobody knows whose the value is.
    await (await parts.broker.publish(replies, encode_frames((done, done)), partition=0, headers=wrong))
    await (await parts.broker.publish(replies, encode_frames((done,)), partition=0, headers=wrong))
    async with asyncio.timeout(30):
        with pytest.raises(StoreError, match="is no value in this process's store"):
            await call.result()
        await parts.host(Repeat)
        assert text_of(await other.result()) == "other"
