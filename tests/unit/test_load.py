"""How load is made and measured, in a time that stands still unless somebody waits: no test here takes a while."""

import asyncio
import math
import selectors
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import msgspec
import pytest

from chains_stream import load
from chains_stream.load import Percentiles, Result, Samples, calls, closed_loop, open_loop, streams


class _Loop(asyncio.SelectorEventLoop):
    """An event loop whose time is that of its next timer: whoever sleeps is woken at once, in order."""

    def __init__(self) -> None:
        self.moment = 1000.0
        super().__init__(_Selector(self))

    def time(self) -> float:
        return self.moment


class _Selector(selectors.SelectSelector):
    def __init__(self, loop: _Loop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "somebody waits for a timer"
        self._loop.moment += timeout
        return super().select(0)


class _Clock:
    """The time of that loop."""

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    async def until(self, moment: float) -> None:
        await asyncio.sleep(max(0.0, moment - self.now()))


def run(work: Coroutine[Any, Any, Result]) -> Result:
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(work)


class Server:
    """Takes `seconds` for a request, `places` of them at once, and answers nothing while it stalls."""

    def __init__(self, seconds: float, places: int, *, stalls: tuple[float, float] = (0.0, 0.0)) -> None:
        self.seconds = seconds
        self.places = asyncio.Semaphore(places)
        self.stalls = stalls
        self.most = 0
        self._running = 0
        self._began: float | None = None

    async def send(self) -> None:
        loop = asyncio.get_running_loop()
        if self._began is None:
            self._began = loop.time()
        self._running += 1
        self.most = max(self.most, self._running)
        try:
            async with self.places:
                await asyncio.sleep(self.seconds)
                begin, end = self.stalls
                if begin <= (now := loop.time() - self._began) < end:
                    await asyncio.sleep(end - now)
        finally:
            self._running -= 1


def latency(result: Result) -> Percentiles:
    assert result.latency is not None
    return result.latency


def test_percentiles_are_samples() -> None:
    found = Percentiles.of([float(number) for number in range(1000, 0, -1)])
    assert found == Percentiles(1000, 500.5, 500, 900, 990, 999, 1000)
    assert Percentiles.of([7.0]) == Percentiles(1, 7, 7, 7, 7, 7, 7)
    assert Percentiles.of([1.0, 2.0, 3.0]) == Percentiles(3, 2, 2, 3, 3, 3, 3)
    assert Percentiles.of([]) is None


def test_a_closed_loop_keeps_so_many_in_flight() -> None:
    server = Server(0.1, 100)
    result = run(closed_loop(calls(server.send), in_flight=7, seconds=10, into=Samples(_Clock())))
    assert server.most == 7
    assert result.rate_per_s == pytest.approx(70, rel=0.03)
    assert latency(result).p50 == pytest.approx(0.1)
    assert latency(result).count == result.completed == pytest.approx(700, abs=7)
    assert (result.failed, result.overflow, result.unfinished) == ({}, 0, 0)
    assert result.faultless


def test_a_closed_loop_of_so_many_requests_sends_them_and_no_more() -> None:
    sent: list[None] = []

    async def send() -> None:
        sent.append(None)
        await asyncio.sleep(0.25)

    result = run(closed_loop(calls(send), in_flight=4, count=10, into=Samples(_Clock())))
    assert len(sent) == result.completed == 10
    assert result.seconds == pytest.approx(0.75)
    assert result.rate_per_s == pytest.approx(10 / 0.75)


@pytest.mark.parametrize("kind", ["closed", "open"])
def test_the_warm_up_is_not_measured(kind: str) -> None:
    """The first second is slow, as with a server that has yet to load something."""
    server = Server(0.01, 1000, stalls=(0.0, 1.0))
    act, samples = calls(server.send), Samples(_Clock())
    if kind == "closed":
        result = run(closed_loop(act, in_flight=2, seconds=5, warm_up=2, into=samples))
    else:
        result = run(open_loop(act, rate=100, seconds=5, warm_up=2, into=samples))
    assert result.seconds == pytest.approx(5)
    assert latency(result).max == pytest.approx(0.01)


def test_an_open_loop_sends_at_its_rate_and_by_its_seed() -> None:
    def once(seed: int) -> Result:
        act = calls(Server(0.02, 1000).send)
        return run(open_loop(act, rate=200, seconds=20, seed=seed, into=Samples(_Clock())))

    first, again, other = once(1), once(1), once(2)
    assert first.offered_per_s == pytest.approx(200, rel=0.1)
    assert first.rate_per_s == pytest.approx(first.offered_per_s, rel=0.01)
    assert first.completed == again.completed
    assert first.completed != other.completed


def test_an_open_loop_shows_the_stall_that_a_closed_loop_and_service_times_hide() -> None:
    """A server of 1 ms stands still for 2 of 10 s: a fifth of those who came had to wait for it."""
    stalls = (4.0, 6.0)
    closed = run(closed_loop(calls(Server(0.001, 1, stalls=stalls).send), in_flight=1, seconds=10, into=_samples()))
    assert latency(closed).p99 == pytest.approx(0.001)  # one request of thousands noticed
    opened = run(open_loop(calls(Server(0.001, 1, stalls=stalls).send), rate=100, seconds=10, into=_samples()))
    assert latency(opened).p50 < 0.01
    assert latency(opened).p90 > 0.5
    assert latency(opened).p99 > 1.5


def test_an_open_loop_measures_from_when_a_request_was_due() -> None:
    """Here it is the client that stands still: the service times know nothing of it."""

    class Late(_Clock):
        async def until(self, moment: float) -> None:
            await super().until(moment if moment < 1005 else max(moment, 1007))

    result = run(open_loop(calls(Server(0.001, 1000).send), rate=100, seconds=10, into=Samples(Late())))
    assert result.service is not None
    assert result.service.max == pytest.approx(0.001)
    assert latency(result).p90 > 0.5
    assert latency(result).max == pytest.approx(2, rel=0.1)


def test_what_is_due_beyond_the_bound_is_counted() -> None:
    server = Server(1.0, 5)
    result = run(open_loop(calls(server.send), rate=100, seconds=10, in_flight=20, into=_samples()))
    assert server.most == 20
    assert result.offered_per_s is not None
    assert result.overflow + result.completed == round(result.offered_per_s * result.seconds)
    assert result.overflow > 800


def test_what_has_no_answer_long_after_the_end_is_counted() -> None:
    ended: list[None] = []

    async def send() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(None)

    result = run(closed_loop(calls(send), in_flight=3, seconds=1, drain=5, into=_samples()))
    assert (result.completed, result.unfinished, len(ended)) == (0, 3, 3)
    assert result.latency is None
    assert not result.faultless


def test_failures_are_counted_by_kind_and_have_no_latency() -> None:
    number = 0

    async def send() -> None:
        nonlocal number
        number += 1
        await asyncio.sleep(0.5)
        if number % 4 == 0:
            raise load.FailedError("HTTP 503")
        if number % 4 == 1:
            raise ConnectionResetError

    result = run(closed_loop(calls(send), in_flight=1, count=8, into=_samples()))
    assert result.failed == {"HTTP 503": 2, "ConnectionResetError": 2}
    assert result.completed == latency(result).count == 4
    assert not result.faultless


def test_what_fails_at_once_does_not_keep_the_loop_from_ending() -> None:
    async def send() -> None:
        raise ConnectionRefusedError

    class Ticking(_Clock):
        """Time passes while nobody waits."""

        def now(self) -> float:
            loop = asyncio.get_running_loop()
            assert isinstance(loop, _Loop)
            loop.moment += 0.001
            return loop.moment

    result = run(closed_loop(calls(send), in_flight=2, seconds=1, into=Samples(Ticking())))
    assert result.failed["ConnectionRefusedError"] > 100


async def tokens() -> AsyncIterator[int]:
    """Two after 100 ms, three more 20 ms later, and an end that takes 5 ms."""
    await asyncio.sleep(0.1)
    yield 2
    await asyncio.sleep(0.02)
    yield 3
    await asyncio.sleep(0.005)


def test_streams_are_measured_by_their_tokens() -> None:
    result = run(closed_loop(streams(tokens), in_flight=2, count=4, into=_samples()))
    assert result.tokens == 20
    assert result.tokens_per_s == pytest.approx(20 / 0.25)
    assert result.first_token is not None
    assert result.first_token.count == 4
    assert result.first_token.max == pytest.approx(0.1)
    assert result.inter_token is not None
    assert result.inter_token.count == 4 * 4  # the gaps between 5 tokens
    assert result.inter_token.p50 == 0
    assert result.inter_token.max == pytest.approx(0.02)
    assert latency(result).max == pytest.approx(0.125)


def test_a_stream_that_breaks_off_is_a_failure() -> None:
    async def broken() -> AsyncIterator[int]:
        yield 1
        raise load.FailedError("error in the stream")

    result = run(closed_loop(streams(broken), in_flight=1, count=3, into=_samples()))
    assert result.failed == {"error in the stream": 3}
    assert (result.tokens, result.completed, result.first_token) == (3, 0, None)


async def test_a_run_that_is_stopped_leaves_what_it_measured() -> None:
    """In real time: it is stopped by somebody else."""
    samples, answered = Samples(), asyncio.Event()

    async def send() -> None:
        if answered.is_set():
            await asyncio.Event().wait()
        answered.set()

    run = asyncio.create_task(closed_loop(calls(send), in_flight=2, seconds=3600, into=samples))
    await answered.wait()
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    result = samples.result("closed", 2)
    assert result.completed >= 1
    assert 0 < result.seconds < 3600


async def test_the_clock_of_the_machine_waits_for_a_moment() -> None:
    clock = load.WallClock()
    for pause in (0.01, 0.0003, -1.0):
        moment = clock.now() + pause
        await clock.until(moment)
        assert clock.now() >= moment


def test_a_sweep_finds_the_knee() -> None:
    """One place of 10 ms: 100 a second, and a queue that grows without end beyond."""
    told: list[Result] = []

    async def once(rate: float) -> Result:
        return await open_loop(calls(Server(0.01, 1).send), rate=rate, seconds=30, in_flight=10_000, into=_samples())

    async def all_of_it() -> load.Sweep:
        return await load.sweep(once, start=10, factor=2, refine=2, each=told.append)

    with asyncio.Runner(loop_factory=_Loop) as runner:
        found = runner.run(all_of_it())
    assert found.found
    assert found.knee_per_s is not None
    assert 40 <= found.knee_per_s <= 110
    assert found.steps == told
    offered = [step.offered_per_s or 0.0 for step in found.steps]
    assert max(offered) > 100
    assert len(offered) >= 4 + 2


def test_a_sweep_of_what_never_fails_ends_and_says_so() -> None:
    async def all_of_it() -> load.Sweep:
        async def once(rate: float) -> Result:
            return await open_loop(calls(Server(0.0, 1).send), rate=rate, seconds=2, into=_samples())

        return await load.sweep(once, start=10, most=3)

    with asyncio.Runner(loop_factory=_Loop) as runner:
        found = runner.run(all_of_it())
    assert (found.found, found.knee_per_s, len(found.steps)) == (False, 22.5, 3)


def test_results_are_json() -> None:
    result = run(open_loop(streams(tokens), rate=10, seconds=2, into=_samples()))
    assert msgspec.json.decode(msgspec.json.encode(result), type=Result) == result
    assert math.isfinite(result.client_cpu)


def _samples() -> Samples:
    return Samples(_Clock())
