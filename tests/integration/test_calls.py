"""Calls from end to end, caller to callee and back: the same on the embedded broker and on a real Kafka."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any
from uuid import uuid4

import pytest

import chains_stream as chains
from chains_stream.client import Connection
from chains_stream.errors import (
    CallCancelledError,
    CallTimeoutError,
    DeadlineExceededError,
    InvalidArgumentError,
    InvalidResultError,
    remote_detail,
)
from tests.sample import Counting, Item, Leaf, Middle, Relay, Sample, SampleError, Seen


@pytest.fixture(params=["memory", pytest.param("kafka", marks=pytest.mark.kafka)])
def broker(request: pytest.FixtureRequest) -> str:
    return "memory://" if request.param == "memory" else str(request.getfixturevalue("kafka_url"))


@pytest.fixture
def settings(broker: str) -> dict[str, Any]:
    return {"broker": broker, "namespace": f"t{uuid4().hex[:10]}", "partitions": 4, "reply_partitions": 2}


@pytest.fixture(autouse=True)
def nothing_seen() -> Iterator[None]:
    Seen.reset()
    yield
    Seen.reset()


@pytest.fixture
async def sample(settings: dict[str, Any]) -> AsyncIterator[Connection[..., Any]]:
    async with chains.run_chain(Sample, **settings) as connection:
        yield connection


@pytest.fixture
async def relay(settings: dict[str, Any]) -> AsyncIterator[Connection[..., Any]]:
    async with chains.run_chain(Relay, **settings) as connection:
        yield connection


async def test_unary_through_three_levels_with_fan_out(sample: Connection[..., Any]) -> None:
    items = [Item(f"n{number}", number) for number in range(50)]
    answer = await sample.run_remote(items, count=3)
    assert answer[:50] == [Item(f"N{number}", number + 1) for number in range(50)]
    assert answer[50:] == [Item("counted", number) for number in range(3)]


async def test_defaults_hold_remotely(sample: Connection[..., Any]) -> None:
    assert await sample.run_remote([Item("a")]) == [Item("A", 2)]


async def test_a_stream_through_a_stream_is_complete_and_in_order(relay: Connection[..., Any]) -> None:
    assert [chunk async for chunk in relay.run_remote(3_000)] == [f"{number};" for number in range(3_000)]


async def test_an_empty_stream_ends(relay: Connection[..., Any]) -> None:
    assert [chunk async for chunk in relay.run_remote(0)] == []


async def test_many_calls_at_once(sample: Connection[..., Any]) -> None:
    answers = await asyncio.gather(*(sample.run_remote([Item(str(n), n)]) for n in range(300)))
    assert answers == [[Item(str(n), n + 1)] for n in range(300)]


async def test_many_streams_at_once(relay: Connection[..., Any]) -> None:
    async def read(upto: int) -> list[str]:
        return [chunk async for chunk in relay.run_remote(upto)]

    streams = await asyncio.gather(*(read(100 + n) for n in range(30)))
    assert streams == [[f"{number};" for number in range(100 + n)] for n in range(30)]


async def test_an_error_crosses_every_hop_with_its_class_and_its_way(sample: Connection[..., Any]) -> None:
    with pytest.raises(SampleError) as caught:
        await sample.run_remote([Item("x", 7)], mode="fail")
    assert caught.value.number == 7
    detail = remote_detail(caught.value)
    assert detail is not None
    assert [hop.chainlet for hop in detail.hops] == ["Sample", "Middle", "Leaf"]
    assert all(frame.filename.endswith("sample.py") for hop in detail.hops for frame in hop.frames)
    assert detail.hops[-1].frames[-1].line == 'raise SampleError("no such item", item.count)'


async def test_a_stream_that_fails_half_way_raises_after_its_chunks(relay: Connection[..., Any]) -> None:
    got = []
    with pytest.raises(SampleError, match="broke off"):
        async for chunk in relay.run_remote(10, fail_at=4):
            got.append(chunk)  # noqa: PERF401 - what arrived before the error is what counts
    assert got == ["0;", "1;", "2;", "3;"]


async def test_wrong_arguments_name_the_field(sample: Connection[..., Any]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        await sample.run_remote([{"name": "a", "count": "many"}])
    assert caught.value.path == "$.items[0].count"
    with pytest.raises(InvalidArgumentError, match="itms"):
        await sample.run_remote(itms=[])


async def test_a_wrong_result_is_the_callee_s_fault(settings: dict[str, Any]) -> None:
    async with chains.run_chain(Leaf, **settings) as leaf:
        with pytest.raises(InvalidResultError, match="Leaf"):
            await leaf.run_remote(Item("x"), mode="wrong")


async def test_retries_repeat_until_it_works(sample: Connection[..., Any]) -> None:
    assert await sample.run_remote([Item("third time", 3)], mode="flaky") == [Item("THIRD TIME", 4)]
    assert Seen.counts["third time"] == 3


async def test_retries_end(sample: Connection[..., Any]) -> None:
    with pytest.raises(SampleError, match="not yet"):
        await sample.run_remote([Item("never", 10)], mode="flaky")
    assert Seen.counts["never"] == 3


async def test_a_stream_is_retried_only_before_its_first_chunk(relay: Connection[..., Any]) -> None:
    with pytest.raises(SampleError):
        _ = [chunk async for chunk in relay.run_remote(5, fail_at=0, name="early")]
    assert Seen.counts["early closed"] == 2
    with pytest.raises(SampleError):
        _ = [chunk async for chunk in relay.run_remote(5, fail_at=1, name="late")]
    assert Seen.counts["late closed"] == 1


async def test_timeout_bounds_each_try_and_stops_what_it_gave_up(settings: dict[str, Any]) -> None:
    async with chains.run_chain(Middle, **settings) as middle:
        with pytest.raises(CallTimeoutError, match="timeout_sec=2"):
            await middle.run_remote([Item("slow")], mode="hang")
        await Seen.until("slow stopped", times=3)
    assert Seen.counts["slow began"] == 3


async def test_the_deadline_bounds_everything(settings: dict[str, Any]) -> None:
    async with chains.run_chain(Leaf, **settings, deadline=1) as leaf:
        with pytest.raises(DeadlineExceededError):
            await leaf.run_remote(Item("late"), mode="hang")
        await Seen.until("late stopped")


async def test_cancelling_the_caller_stops_the_task_below(sample: Connection[..., Any]) -> None:
    task = asyncio.ensure_future(sample.run_remote([Item("deep")], mode="hang"))
    await Seen.until("deep began")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await Seen.until("deep stopped")


async def test_leaving_a_stream_stops_its_generator(relay: Connection[..., Any]) -> None:
    async with aclosing(relay.run_remote(1_000_000_000, name="endless")) as chunks:
        async for chunk in chunks:
            if chunk == "10;":
                break
    await Seen.until("endless closed")


async def test_a_slow_reader_holds_its_stream_back_and_no_other(settings: dict[str, Any]) -> None:
    window = 64
    async with chains.run_chain(Relay, **settings, stream_window=window) as relay:
        endless: Any = relay.run_remote(1_000_000_000, name="held back")
        async with aclosing(endless) as chunks:
            assert await anext(chunks) == "0;"
            # Others run to their end meanwhile, so time enough has passed for the endless one to overrun.
            for _ in range(3):
                assert len([chunk async for chunk in relay.run_remote(2_000)]) == 2_000
            # Two hops, each with its window, its buffers of one item, and the reader's own first chunk.
            assert Seen.counts["held back"] <= 2 * window + 10
            for expected in range(1, 1_000):
                assert await anext(chunks) == f"{expected};"
        await Seen.until("held back closed")


async def test_chunks_larger_than_the_window_pass(settings: dict[str, Any]) -> None:
    async with chains.run_chain(Relay, **settings, stream_window=1, stream_window_bytes=1) as relay:
        assert len([chunk async for chunk in relay.run_remote(20)]) == 20


async def test_concurrency_is_what_the_chainlet_says(settings: dict[str, Any]) -> None:
    async with chains.run_chain(Leaf, **settings) as leaf:
        tasks = [asyncio.ensure_future(leaf.run_remote(Item("busy"), mode="hang")) for _ in range(20)]
        await Seen.until("busy began", times=16)
        assert await asyncio.wait(tasks, timeout=0.3) == (set(), set(tasks))
        assert Seen.counts["busy began"] == 16
        for task in tasks[:8]:
            task.cancel()
        await Seen.until("busy stopped", times=4)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await Seen.until("busy stopped", times=Seen.counts["busy began"])


async def test_submit_gives_a_handle(sample: Connection[..., Any]) -> None:
    handle = await sample.submit([Item("a")])
    assert handle.id
    assert await handle.result() == [Item("A", 2)]


async def test_a_submitted_stream(relay: Connection[..., Any]) -> None:
    assert await (await relay.submit(3)).result() == ["0;", "1;", "2;"]
    assert [chunk async for chunk in await relay.submit(2)] == ["0;", "1;"]


async def test_a_reader_of_a_submitted_stream_may_stop_and_come_back(relay: Connection[..., Any]) -> None:
    handle = await relay.submit(20)
    async for chunk in handle:
        assert chunk == "0;"
        break
    assert await handle.result() == [f"{number};" for number in range(1, 20)]


async def test_a_submitted_call_can_be_cancelled(sample: Connection[..., Any]) -> None:
    handle = await sample.submit([Item("given up")], mode="hang")
    await Seen.until("given up began")
    await handle.cancel()
    with pytest.raises(CallCancelledError):
        await handle.result()
    await Seen.until("given up stopped")


async def test_a_queued_request_that_is_cancelled_is_skipped(settings: dict[str, Any]) -> None:
    async with chains.run_chain(Leaf, **settings) as leaf:
        blockers = [await leaf.submit(Item("blocker"), mode="hang") for _ in range(16)]
        await Seen.until("blocker began", times=16)
        queued = await leaf.submit(Item("queued"), mode="hang")
        await queued.cancel()
        for blocker in blockers:
            await blocker.cancel()
        assert await leaf.run_remote(Item("next")) == Item("NEXT", 2)
        await Seen.until("blocker stopped", times=16)
    assert Seen.counts["queued began"] == 0


@pytest.mark.kafka  # the embedded broker lives in one process, where callers and workers start together
async def test_requests_sent_before_the_first_worker_are_served(kafka_url: str) -> None:
    namespace = f"t{uuid4().hex[:10]}"
    async with chains.connect(kafka_url, Counting, namespace=namespace) as early:
        handle = await early.submit(3)
        async with chains.run_chain(Counting, broker=kafka_url, namespace=namespace):
            assert await handle.result() == [0, 1, 2]


async def test_connect_calls_a_chain_hosted_elsewhere(settings: dict[str, Any]) -> None:
    if settings["broker"] == "memory://":
        with pytest.raises(chains.ChainsUsageError, match="run_chain"):
            async with chains.connect("memory://", Sample):
                pass
        return
    url = settings.pop("broker")
    async with (
        chains.run_chain(Sample, broker=url, **settings),
        chains.connect(url, Sample, **settings) as first,
        chains.connect(url, Sample, **settings) as second,
    ):
        answers = await asyncio.gather(
            *(connection.run_remote([Item(str(n))]) for n in range(20) for connection in (first, second))
        )
    assert answers == [[Item(str(n), 2)] for n in range(20) for _ in range(2)]


async def test_chunks_of_many_streams_keep_their_order(settings: dict[str, Any]) -> None:
    async with asyncio.timeout(60), chains.run_chain(Counting, **settings | {"reply_partitions": 1}) as counting:

        async def read(count: int) -> list[int]:
            return [number async for number in counting.run_remote(count)]

        counts = range(60, 160)
        assert await asyncio.gather(*map(read, counts)) == [list(range(count)) for count in counts]


async def test_a_connection_has_more_calls_in_flight_than_a_dependency_may(settings: dict[str, Any]) -> None:
    arrived: set[int] = set()
    everybody = asyncio.Event()
    count = 400

    class Gather(chains.ChainletBase):
        remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=count))

        async def run_remote(self, number: int) -> int:
            arrived.add(number)
            if len(arrived) == count:
                everybody.set()
            await everybody.wait()
            return number

    async with asyncio.timeout(60), chains.run_chain(Gather, **settings) as chain:
        assert await asyncio.gather(*map(chain.run_remote, range(count))) == list(range(count))
