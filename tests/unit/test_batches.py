"""Calls that are joined into one, and come apart again."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

import chains_stream as chains
from chains_stream import policy
from chains_stream.batches import Batcher
from chains_stream.checks import check_chainlet
from chains_stream.errors import InvalidResultError
from chains_stream.options import Batch
from chains_stream.policy import Scope
from tests.sample import Seen


@pytest.fixture(autouse=True)
def nothing_seen() -> Iterator[None]:
    Seen.reset()
    yield
    Seen.reset()


class Model:
    """Doubles numbers; notes the batches that it is given."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    async def run(self, items: list[int]) -> Any:
        self.batches.append(items)
        if -1 in items:
            raise ValueError("a bad number")
        if -2 in items:
            Seen.note("begun")
            await Seen.until("go")
        if -3 in items:
            return items[1:]
        return [KeyError("no such number") if item == -4 else 2 * item for item in items]


async def test_calls_are_joined_and_each_gets_its_own() -> None:
    model = Model()
    batcher = Batcher(model.run, Batch(max_size=8, max_wait_ms=10_000))
    answers = await asyncio.gather(*(batcher.call(items) for items in ([1], [2, 3], [], [4, 5, 6, 7, 8])))
    assert answers == [[2], [4, 6], [], [8, 10, 12, 14, 16]]
    assert model.batches == [[1, 2, 3, 4, 5, 6, 7, 8]]


async def test_one_that_is_alone_waits_no_longer_than_it_may() -> None:
    model = Model()
    assert await Batcher(model.run, Batch(max_size=8, max_wait_ms=1)).call([1]) == [2]


async def test_what_one_caller_gave_is_not_divided() -> None:
    model = Model()
    batcher = Batcher(model.run, Batch(max_size=4, max_wait_ms=10_000))
    answers = await asyncio.gather(*(batcher.call([*range(size)]) for size in (3, 3, 6)))
    assert [len(answer) for answer in answers] == [3, 3, 6]
    assert sorted(map(len, model.batches)) == [3, 3, 6]


async def test_nobody_gets_the_error_of_others() -> None:
    model = Model()
    batcher = Batcher(model.run, Batch(max_size=4, max_wait_ms=10_000))
    answers = await asyncio.gather(*(batcher.call([number]) for number in (1, -1, 2, -4)), return_exceptions=True)
    assert (answers[0], answers[2]) == ([2], [4])
    assert isinstance(answers[1], ValueError)
    assert isinstance(answers[3], KeyError)
    assert model.batches == [[1, -1, 2, -4], [1], [-1], [2], [-4]]


async def test_too_few_results_are_an_error() -> None:
    with pytest.raises(InvalidResultError, match="a batch of 2 gave 1 results"):
        await Batcher(Model().run, Batch(max_size=2)).call([-3, 1])


async def test_who_leaves_is_left_out_and_others_stay() -> None:
    model = Model()
    batcher = Batcher(model.run, Batch(max_size=2, max_wait_ms=10_000))
    leaving = asyncio.ensure_future(batcher.call([9]))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.wait([leaving])
    running = [asyncio.ensure_future(batcher.call([number])) for number in (-2, 3)]
    await Seen.until("begun")
    running[0].cancel()
    Seen.note("go")
    assert await running[1] == [6]
    assert model.batches == [[-2, 3]]


async def test_a_batch_ends_once_all_have_left() -> None:
    ended = asyncio.Event()

    async def run(items: list[int]) -> list[int]:
        try:
            Seen.note("begun")
            await asyncio.Event().wait()
        finally:
            ended.set()
        return items

    batcher = Batcher(run, Batch(max_size=2, max_wait_ms=10_000))
    callers = [asyncio.ensure_future(batcher.call([number])) for number in range(2)]
    await Seen.until("begun")
    callers[0].cancel()
    await asyncio.wait(callers[:1])
    assert not ended.is_set()
    callers[1].cancel()
    async with asyncio.timeout(5):
        await ended.wait()


async def test_a_batch_that_ends_in_a_cancellation_leaves_nobody_waiting() -> None:
    async def run(_: list[int]) -> list[int]:
        raise asyncio.CancelledError

    batcher = Batcher(run, Batch(max_size=2, max_wait_ms=10_000))
    async with asyncio.timeout(5):
        found = await asyncio.gather(batcher.call([1]), batcher.call([2]), return_exceptions=True)
    assert [type(each) for each in found] == [asyncio.CancelledError] * 2


class Open:
    """A call that is open."""

    closed = False

    def close(self) -> None:
        self.closed = True


async def test_the_calls_of_a_batch_do_not_end_with_the_request_of_one_who_leaves() -> None:
    call = Open()

    async def run(items: list[int]) -> list[int]:
        scope = policy.current.get()
        assert scope is not None
        scope.calls.add(call)
        Seen.note("begun")
        await Seen.until("go")
        assert not call.closed
        return items

    async def ask(number: int) -> list[int]:
        scope = Scope.new(60 + number)
        policy.current.set(scope)
        try:
            return await batcher.call([number])
        finally:
            scope.close()

    batcher = Batcher(run, Batch(max_size=2, max_wait_ms=10_000))
    callers = [asyncio.ensure_future(ask(number)) for number in range(2)]
    await Seen.until("begun")
    callers[1].cancel()
    await asyncio.wait(callers[1:])
    Seen.note("go")
    assert await callers[0] == [0]
    assert (call.closed, Seen.counts["begun"]) == (True, 1)


class Embed(chains.ChainletBase):
    """Measures texts, many at once; notes how many."""

    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=64))
    batch = chains.Batch(max_size=16, max_wait_ms=200)

    async def run_remote(self, texts: list[str]) -> list[int]:
        Seen.note(f"batch of {len(texts)}")
        if "bad" in texts:
            raise ValueError("bad text")
        return [len(text) for text in texts]


async def test_a_chainlet_that_says_so_is_given_joined_calls() -> None:
    async with chains.run_chain(Embed) as chain:
        answers = await asyncio.gather(*(chain.run_remote(["x" * number]) for number in range(32)))
        assert answers == [[number] for number in range(32)]
        assert Seen.counts["batch of 16"] == 2
        found = await asyncio.gather(chain.run_remote(["bad"]), chain.run_remote(["good"]), return_exceptions=True)
    assert isinstance(found[0], ValueError)
    assert found[1] == [4]


def test_what_cannot_be_joined_is_told() -> None:
    class Single(chains.ChainletBase):
        batch = chains.Batch()

        async def run_remote(self, text: str) -> list[int]:
            return [len(text)]

    class Odd(chains.ChainletBase):
        batch = 7  # type: ignore[assignment] # the mistake under test

        async def run_remote(self, texts: list[str]) -> list[int]:
            return [*map(len, texts)]

    assert [problem.kind for cls in (Single, Odd, Embed) for problem in check_chainlet(cls)] == ["BATCH", "BATCH"]
