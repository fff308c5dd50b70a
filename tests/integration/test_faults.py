"""What must not hold anybody up: odd errors, work that will not stop, readers that die, workers that go."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, aclosing, suppress
from typing import Any
from uuid import uuid4

import pytest

import chains_stream as chains
from chains_stream import taking
from chains_stream.batching import FrameBatcher
from chains_stream.broker import TopicSpec
from chains_stream.brokers.memory import MemoryBroker
from chains_stream.chain import Chain
from chains_stream.client import open_caller, open_connected
from chains_stream.errors import (
    BrokerError,
    CallCancelledError,
    ChainsRuntimeError,
    StreamInterruptedError,
    from_detail,
    to_detail,
)
from chains_stream.messages import Headers, Request
from chains_stream.replies import FrameReply
from chains_stream.settings import Settings
from chains_stream.store import Store
from chains_stream.worker import Host
from tests.sample import Counting, Item, Leaf, Relay, Seen


@pytest.fixture(autouse=True)
def nothing_seen() -> Iterator[None]:
    Seen.reset()
    yield
    Seen.reset()


class OwnError(ChainsRuntimeError):
    """A user's own class under the library's root."""

    retryable = True
    status = 503


class Unshowable(Exception):  # noqa: N818 - a user's name
    def __str__(self) -> str:
        raise RuntimeError("no")


class Odd(chains.ChainletBase):
    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=4))

    async def run_remote(self, what: str) -> str:
        match what:
            case "big number":
                raise ValueError(2**70)
            case "surrogate":
                raise FileNotFoundError("odd name \udcff")
            case "unshowable":
                raise Unshowable
            case "exit":
                raise SystemExit(3)
            case "own":
                raise OwnError("of ours")
            case "cancels":
                raise asyncio.CancelledError
            case "deep":
                deep: Any = []
                for _ in range(5_000):
                    deep = [deep]
                return deep  # type: ignore[no-any-return] # the mistake under test
            case _:
                return what


class Solo(chains.ChainletBase):
    """One at a time."""

    async def run_remote(self, name: str) -> None:
        Seen.note(f"{name} began")
        await asyncio.Event().wait()


class Threaded(chains.ChainletBase):
    def run_remote(self, seconds: float) -> int:
        with Running() as at_once:
            time.sleep(seconds)
            return at_once


class Running:
    """Counts how many threads are inside at once."""

    inside = most = 0
    lock = threading.Lock()
    entered = threading.Event()

    def __enter__(self) -> int:
        with Running.lock:
            Running.inside += 1
            Running.most = max(Running.most, Running.inside)
            Running.entered.set()
            return Running.inside

    def __exit__(self, *_: object) -> None:
        with Running.lock:
            Running.inside -= 1


class Stubborn(chains.ChainletBase):
    """Makes something else of its cancellation, as clients of engines do."""

    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=4))

    async def run_remote(self, how: str) -> str:
        Seen.note(how)
        if Seen.counts[how] > 1:
            return "done by another"
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if how == "raises":
                raise RuntimeError("engine aborted") from None
            await asyncio.Event().wait()  # ignores the first
        return ""


class Busy(chains.ChainletBase):
    """A generator that never waits."""

    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=4))

    async def run_remote(self) -> AsyncIterator[int]:
        number = 0
        while True:
            yield number
            number += 1


@pytest.mark.parametrize("what", ["big number", "surrogate", "unshowable", "exit", "own", "cancels", "deep"])
async def test_an_odd_end_is_an_error_and_the_next_request_is_served(what: str) -> None:
    async with chains.run_chain(Odd, deadline=20) as odd:
        with pytest.raises(Exception) as caught:  # noqa: PT011 - which one is looked at below
            await odd.run_remote(what)
        assert not isinstance(caught.value, chains.DeadlineExceededError)
        if what == "own":
            assert isinstance(caught.value, OwnError)
            assert caught.value.retryable
        assert await odd.run_remote("fine") == "fine"


async def test_our_errors_come_back_as_the_class_they_were() -> None:
    for error in (ChainsRuntimeError("x"), CallCancelledError("x"), StreamInterruptedError("x", chunks=3)):
        again = from_detail(to_detail(error))
        assert type(again) is type(error)
        assert again.args == error.args
    assert isinstance(again, StreamInterruptedError)
    assert again.chunks == 3


async def test_a_queued_request_is_skipped_on_whatever_partition_it_waits() -> None:
    async with chains.run_chain(Solo) as solo:
        first = await solo.submit("first")
        await Seen.until("first began")
        queued = [await solo.submit(f"queued {n}") for n in range(5)]
        for handle in queued:
            await handle.cancel()
        last = await solo.submit("last")
        await first.cancel()
        await Seen.until("last began")
        await last.cancel()
    assert not [name for name in Seen.counts if name.startswith("queued")]


async def test_two_may_wait_for_one_result() -> None:
    async with chains.run_chain(Odd) as odd:
        handle = await odd.submit("fine")
        assert list(await asyncio.gather(handle.result(), handle.result())) == ["fine", "fine"]


async def test_closing_a_connection_cancels_what_waits_and_not_what_was_submitted() -> None:
    async with chains.run_chain(Leaf, grace_period=0.1) as leaf:
        submitted = await leaf.submit(Item("submitted"), mode="hang")
        waiting = asyncio.ensure_future(leaf.run_remote(Item("waiting"), mode="hang"))
        await Seen.until("waiting began")
        await Seen.until("submitted began")
        leaf_caller: Any = submitted._call._caller
        await leaf_caller.close()
        await Seen.until("waiting stopped")
        assert Seen.counts["submitted stopped"] == 0
        with pytest.raises(CallCancelledError):
            await waiting


async def test_a_thread_that_was_given_up_still_takes_its_place() -> None:
    """Nothing can stop it: the next one must wait, or two would be in a Chainlet that asked for one."""
    threaded: Any
    Running.most = 0
    Running.entered.clear()
    async with chains.run_chain(Threaded) as threaded:
        tasks = [asyncio.ensure_future(threaded.run_remote(0.3)) for _ in range(3)]
        await asyncio.to_thread(Running.entered.wait, 20)
        tasks[0].cancel()
        assert [await tasks[1], await tasks[2]] == [1, 1]
    assert Running.most == 1


async def test_sync_chainlets_run_as_many_at_once_as_they_say() -> None:
    class Wide(chains.ChainletBase):
        remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=20))

        def run_remote(self) -> int:
            return together.wait(20)

    together = threading.Barrier(20)
    async with chains.run_chain(Wide) as connected:
        wide: Any = connected
        async with asyncio.timeout(30):
            assert sorted(await asyncio.gather(*(wide.run_remote() for _ in range(20)))) == list(range(20))


async def test_a_generator_that_never_waits_lets_others_run() -> None:
    async with chains.run_chain(Busy, stream_window=1_000_000, stream_window_bytes=1 << 30) as busy:
        endless: Any = busy.run_remote()
        async with aclosing(endless) as numbers:
            assert await anext(numbers) == 0
            assert await anext(numbers) == 1


async def test_a_reader_that_dies_fails_the_calls_and_is_told() -> None:
    async with AsyncExitStack() as stack:
        settings = Settings.of(grace_period=0.1)
        broker = await open_connected(stack, settings)
        caller = await open_caller(stack, broker, settings)
        chain = Chain.of(Leaf)
        host = Host(chain, chain.chainlets, broker, caller, settings)
        stack.push_async_callback(host.drain)
        await host.start()
        reader: Any = caller.control._reader
        reader.fail(BrokerError("the control topic is gone"))
        with pytest.raises(BrokerError, match="control topic"):
            async with asyncio.timeout(5):
                await host.failed()
        replies: Any = caller._reader
        replies.fail(BrokerError("the reply topic is gone"))
        with pytest.raises(BrokerError, match="reply topic"):
            async with asyncio.timeout(5):
                await caller.failed()


async def test_work_that_ignores_its_cancellation_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taking, "CANCEL_PATIENCE", 0.2)
    async with asyncio.timeout(60):  # it would be for ever
        async with chains.run_chain(Stubborn, grace_period=0.1) as stubborn:
            handle = await stubborn.submit("ignores")
            await Seen.until("ignores")
    with suppress(BrokerError):
        await handle.result()
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()  # what was abandoned


class LosingBroker(MemoryBroker):
    """The embedded broker, which stores no second chunk: a Kafka that was away for too long."""

    async def publish(
        self,
        topic: str,
        value: bytes,
        *,
        partition: int,
        key: bytes | None = None,
        headers: Headers = (),
        durable: bool = True,
    ) -> asyncio.Future[int]:
        stored = await super().publish(topic, value, partition=partition, key=key, headers=headers, durable=durable)
        if not durable and stored.result() == 1:
            stored = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_soon(stored.set_exception, BrokerError("expired"))
        return stored


async def test_a_chunk_that_was_not_stored_ends_the_stream_with_an_error() -> None:
    broker = LosingBroker(Settings())
    await broker.ensure_topics([TopicSpec("replies", 1, 1000, ring=True)])
    request = Request(correlation_id=b"1" * 16, reply_topic="replies", reply_partition=0)
    reply = FrameReply(FrameBatcher(broker), request, 1, Store(Settings()), largest=1_000_000)
    await reply.chunk(b"\x00")
    await reply.chunk(b"\x01")
    async with asyncio.timeout(5):
        await reply.done(None)
    with pytest.raises(StreamInterruptedError):
        await reply.chunk(b"\x02")
    reader = await broker.read("replies", {0: 0})
    kinds = Counter(record.value[2] for record in await reader.fetch())
    assert kinds == {1: 2, 3: 1}, "two chunks, and then Failed, not Done"


@pytest.mark.kafka
@pytest.mark.timeout(180)
async def test_a_stream_whose_worker_goes_ends_with_an_error_once_something_was_shown(kafka_url: str) -> None:
    """Another worker runs it again, and might say something else: the two must not be mixed."""
    settings: dict[str, Any] = {"namespace": f"t{uuid4().hex[:10]}", "partitions": 2, "stream_window": 64}
    async with chains.connect(kafka_url, Counting, **settings) as counting:
        async with chains.run_chain(Counting, kafka_url, **settings, grace_period=0.1):
            numbers: Any = counting.run_remote(2_000)
            got = [await anext(numbers) for _ in range(300)]
        async with chains.run_chain(Counting, kafka_url, **settings):
            with pytest.raises(StreamInterruptedError, match="its worker was lost") as caught:
                async for number in numbers:
                    got.append(number)  # noqa: PERF401 - what came before the error
            assert got == list(range(caught.value.chunks or 0))
            assert [number async for number in counting.run_remote(20)] == list(range(20))


@pytest.mark.kafka
@pytest.mark.timeout(180)
async def test_a_stream_whose_worker_goes_begins_again_while_nothing_was_shown(kafka_url: str) -> None:
    settings: dict[str, Any] = {"namespace": f"t{uuid4().hex[:10]}", "partitions": 2, "stream_window": 64}
    async with chains.connect(kafka_url, Counting, **settings) as counting:
        async with chains.run_chain(Counting, kafka_url, **settings, grace_period=0.1):
            handle = await counting.submit(500, name="unread")
            await Seen.until("unread", times=64)
        async with chains.run_chain(Counting, kafka_url, **settings):
            async with asyncio.timeout(30):
                while handle._call._fold.attempt < 2:
                    await handle._call._wait()
            assert await handle.result() == list(range(500))


@pytest.mark.kafka
@pytest.mark.timeout(180)
async def test_what_a_drained_worker_makes_of_its_cancellation_is_not_the_answer(kafka_url: str) -> None:
    settings: dict[str, Any] = {"namespace": f"t{uuid4().hex[:10]}", "partitions": 2}
    async with chains.connect(kafka_url, Stubborn, **settings) as stubborn:
        async with chains.run_chain(Stubborn, kafka_url, **settings, grace_period=0.1):
            handle = await stubborn.submit("raises")
            await Seen.until("raises")
        async with chains.run_chain(Stubborn, kafka_url, **settings):
            assert await handle.result() == "done by another"


@pytest.mark.kafka
@pytest.mark.timeout(180)
async def test_a_second_worker_takes_over_partitions_and_every_call_is_answered(kafka_url: str) -> None:
    settings: dict[str, Any] = {"namespace": f"t{uuid4().hex[:10]}", "partitions": 4}
    connected = chains.connect(kafka_url, Relay, **settings)
    async with connected as relay, chains.run_chain(Relay, kafka_url, **settings):
        steady = asyncio.ensure_future(answered(relay, 150))
        async with chains.run_chain(Relay, kafka_url, **settings):
            await answered(relay, 50)
        await steady


async def answered(relay: Any, times: int) -> None:
    for _ in range(times):
        assert [chunk async for chunk in relay.run_remote(3)] == ["0;", "1;", "2;"]
