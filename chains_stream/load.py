"""How load is made and measured: closed and open loops, of calls and of streams; no HTTP here.

A *closed* loop keeps N requests in flight, each sent when one before it has been answered. It finds the most that a
server does, and hides what a stall costs: nobody sends while it lasts. An *open* loop sends at the moments of a Poisson
process, whatever the server does, and measures from the moment when a request was due, so that a stall shows in every
request that it held up (Gil Tene's "coordinated omission"). Every sample is kept, so percentiles are exact.
"""

import asyncio
import ctypes
import functools
import math
import os
import random
import struct
import sys
import time
import weakref
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from typing import Any, Literal, Protocol

import msgspec

DRAIN = 30.0  # seconds that what is still under way at the end has; then it is cancelled, and counted as unfinished
MAX_IN_FLIGHT = 512  # of an open loop, if nothing else is said: what is due beyond it is counted, and not sent
SUSTAINED = 0.95  # of what is offered: a server that answers less can't keep up
EXPLODED = 10.0  # times the lowest p99 of the steps before


Loop = Literal["closed", "open"]


class FailedError(Exception):
    """A request was answered, and with a failure. `kind` is what it is counted as: ``HTTP 503``, say."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


class Percentiles(msgspec.Struct, frozen=True):
    """Of samples in seconds. Each is one of the samples: the least that is not exceeded by that share of them."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    p999: float
    max: float

    @property
    def shares(self) -> dict[str, float]:
        """Give the percentiles and the most by the names that people use."""
        return {"p50": self.p50, "p90": self.p90, "p99": self.p99, "p99.9": self.p999, "max": self.max}

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Percentiles | None":
        """Give the percentiles, or None of no samples."""
        if not samples:
            return None
        ordered, last = sorted(samples), len(samples) - 1

        def at(share: float) -> float:
            return ordered[min(last, max(0, math.ceil(share * len(ordered)) - 1))]

        mean = math.fsum(ordered) / len(ordered)
        return cls(len(ordered), mean, at(0.5), at(0.9), at(0.99), at(0.999), ordered[-1])


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What one run measured. Times are in seconds.

    Attributes:
        in_flight: how many were kept in flight; of an open loop, how many there may be.
        offered_per_s: of an open loop, how many were due a second.
        seconds: how long was measured, the warm-up left out.
        completed: how many were sent in that time and answered without a failure; the latencies are theirs.
        failed: how many failed, by kind.
        overflow: how many were due and not sent, because too many were in flight.
        unfinished: how many had no answer long after the end, or when the run was stopped.
        rate_per_s: answers a second. In an open loop the time is moved by the median latency: that is when what was due
            in it is answered.
        latency: from the moment when a request was due until its answer was complete.
        service: of an open loop, from the moment when it was really sent; what a closed loop would have shown.
        first_token: of streams, from the moment when it was due.
        inter_token: of streams, between tokens; those that arrive together are 0 apart.
        tokens_per_s: tokens that arrived in that time, a second.
        client_cpu: cores that this process kept busy: at nearly 1, it measured itself.
    """

    loop: Loop
    in_flight: int
    offered_per_s: float | None
    seconds: float
    completed: int
    failed: dict[str, int]
    overflow: int
    unfinished: int
    rate_per_s: float
    latency: Percentiles | None
    service: Percentiles | None
    first_token: Percentiles | None
    inter_token: Percentiles | None
    tokens: int
    tokens_per_s: float
    client_cpu: float

    @property
    def faultless(self) -> bool:
        """Tell whether all that was sent has been answered."""
        return not self.failed and not self.unfinished and self.completed > 0


class Clock(Protocol):
    """Tells the time in seconds, and waits for it."""

    def now(self) -> float: ...

    async def until(self, moment: float) -> None:
        """Return at that moment; at once if it has passed."""


class WallClock:
    """The time of this machine.

    On Linux an event loop rounds its timers up to the next millisecond, as much as a whole call may take, and an open
    loop would add that to each latency. There a timer of the kernel's is waited for instead (timerfd_create(2)).
    """

    now = staticmethod(time.perf_counter)

    def __init__(self) -> None:
        self._timer: int | None = None
        if sys.platform == "linux":
            self._timer = _libc().timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
            if self._timer < 0:
                raise OSError(ctypes.get_errno(), "timerfd_create")
            weakref.finalize(self, os.close, self._timer)

    async def until(self, moment: float) -> None:
        pause = moment - self.now()
        if pause <= 0 or self._timer is None:
            await asyncio.sleep(max(0.0, pause))
            return
        loop = asyncio.get_running_loop()
        rung = asyncio.Event()
        seconds = int(pause)
        first = struct.pack("@4l", 0, 0, seconds, max(1, int((pause - seconds) * 1e9)))  # no interval, then the pause
        if _libc().timerfd_settime(self._timer, 0, first, None) < 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime")
        loop.add_reader(self._timer, rung.set)  # it stays readable until it is set anew
        try:
            await rung.wait()
        finally:
            loop.remove_reader(self._timer)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


class Samples:
    """What a run has measured so far; kept by whoever wants it even if the run is stopped."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock: Clock = clock or WallClock()
        self.latency = array("d")
        self.service = array("d")
        self.first_token = array("d")
        self.inter_token = array("d")
        self.failed: Counter[str] = Counter()
        self.due = 0
        self.overflow = 0
        self.unfinished = 0
        self.tokens = 0
        self.began = self.ended = math.inf
        self._answered = array("d")  # moments of all answers, those of the warm-up too
        self._busy = [0.0, 0.0]  # processor time at the beginning and the end

    def begin(self, moment: float) -> None:
        """End the warm-up: from here on is measured."""
        self.began = moment
        self._busy[0] = time.process_time()

    def end(self, moment: float) -> None:
        if self.ended == math.inf:
            self.ended = moment
            self._busy[1] = time.process_time()

    def measures(self, moment: float) -> bool:
        return self.began <= moment < self.ended

    def answered(self, due: float, sent: float, now: float) -> None:
        self._answered.append(now)
        if self.measures(due):
            self.latency.append(now - due)
            self.service.append(now - sent)

    def failure(self, due: float, error: Exception) -> None:
        if self.measures(due):
            self.failed[error.kind if isinstance(error, FailedError) else type(error).__name__] += 1

    def result(self, loop: Loop, in_flight: int) -> Result:
        """Sum up; a run that was stopped ends now."""
        if self.began < math.inf:
            self.end(self.clock.now())
        seconds = self.ended - self.began if self.began < math.inf else 0.0
        latency, is_open = Percentiles.of(self.latency), loop == "open"
        moved = latency.p50 if is_open and latency else 0.0
        answers = sum(self.began + moved <= moment <= self.ended + moved for moment in self._answered)
        each = 1 / seconds if seconds else 0.0
        return Result(
            loop=loop,
            in_flight=in_flight,
            offered_per_s=self.due * each if is_open else None,
            seconds=seconds,
            completed=len(self.latency),
            failed=dict(self.failed),
            overflow=self.overflow,
            unfinished=self.unfinished,
            rate_per_s=answers * each,
            latency=latency,
            service=Percentiles.of(self.service) if is_open else None,
            first_token=Percentiles.of(self.first_token),
            inter_token=Percentiles.of(self.inter_token),
            tokens=self.tokens,
            tokens_per_s=self.tokens * each,
            client_cpu=(self._busy[1] - self._busy[0]) * each,
        )


# --- what is sent

Act = Callable[
    [Samples, float], Awaitable[None]
]  # sends one request that is due at a moment, and notes what it measures


def calls(send: Callable[[], Awaitable[object]]) -> Act:
    """Measure calls: `send` sends one, and returns when its answer is complete. What it raises is a failure."""

    async def act(samples: Samples, due: float) -> None:
        now = samples.clock.now
        sent = now()
        try:
            await send()
        except Exception as error:  # noqa: BLE001 - whatever went wrong, it is counted
            samples.failure(due, error)
            await asyncio.sleep(0)  # `send` may not have waited for anything
        else:
            samples.answered(due, sent, now())

    return act


def streams(read: Callable[[], AsyncIterator[int]]) -> Act:
    """Measure streams: `read` opens one, and yields how many tokens have arrived, as they arrive."""

    async def act(samples: Samples, due: float) -> None:
        now = samples.clock.now
        sent = last = now()
        first: float | None = None
        gaps = array("d")
        try:
            async for count in read():
                moment = now()
                if first is None:
                    first = moment - due
                else:
                    gaps.append(moment - last)
                if count > 1:
                    gaps.extend([0.0] * (count - 1))
                last = moment
                if samples.measures(moment):
                    samples.tokens += count
        except Exception as error:  # noqa: BLE001 - whatever went wrong, it is counted
            samples.failure(due, error)
            await asyncio.sleep(0)
            return
        samples.answered(due, sent, now())
        if samples.measures(due):
            samples.inter_token.extend(gaps)
            if first is not None:
                samples.first_token.append(first)

    return act


# --- loops


async def closed_loop(
    act: Act,
    *,
    in_flight: int,
    seconds: float | None = None,
    count: int | None = None,
    warm_up: float = 0.0,
    drain: float = DRAIN,
    into: Samples | None = None,
) -> Result:
    """Keep `in_flight` requests under way: for `seconds`, or until `count` of them were sent.

    Args:
        act: made by `calls` or `streams`.
        in_flight: how many.
        seconds: how long, if no count is given.
        count: how many are sent in all, if no time is given.
        warm_up: seconds of the same load before, which are not measured.
        drain: seconds that what is under way at the end may take.
        into: where samples go, for a caller that wants them even if this is cancelled.
    """
    assert (seconds is None) != (count is None), "one of the two says when it ends"
    samples = into or Samples()
    clock = samples.clock
    left = iter(range(count)) if count is not None else _for_ever()

    async def lane() -> None:
        while samples.began == math.inf:
            await act(samples, clock.now())
        for _ in left:
            if samples.ended < math.inf:
                return
            await act(samples, clock.now())

    begins = clock.now() + warm_up
    if not warm_up:
        samples.begin(begins)
    lanes = {asyncio.create_task(lane()) for _ in range(in_flight)}
    try:
        if warm_up:
            await clock.until(begins)
            samples.begin(clock.now())
        if seconds is None:
            await asyncio.wait(lanes)
        else:
            await clock.until(samples.began + seconds)
        samples.end(clock.now())
        await asyncio.wait(lanes, timeout=drain)
    finally:
        await _leave(lanes, samples)
    return samples.result("closed", in_flight)


async def open_loop(
    act: Act,
    *,
    rate: float,
    seconds: float,
    in_flight: int = MAX_IN_FLIGHT,
    seed: int = 0,
    warm_up: float = 0.0,
    drain: float = DRAIN,
    into: Samples | None = None,
) -> Result:
    """Send `rate` requests a second for `seconds`, at the moments of a Poisson process that `seed` determines.

    Args:
        act: made by `calls` or `streams`.
        rate: how many are due a second.
        seconds: how long.
        in_flight: how many there may be at once; what is due beyond that is counted as overflow.
        seed: the same one gives the same moments.
        warm_up: seconds of the same load before, which are not measured.
        drain: seconds that what is under way at the end may take.
        into: where samples go, for a caller that wants them even if this is cancelled.
    """
    samples = into or Samples()
    clock = samples.clock
    running: set[asyncio.Future[None]] = set()
    due = clock.now()
    begins = due + warm_up
    ends = begins + seconds
    chance = random.Random(seed)  # noqa: S311 - no secret
    try:
        while (due := due + chance.expovariate(rate)) < ends:
            await clock.until(due)
            if samples.began == math.inf and due >= begins:
                samples.begin(begins)
            measured = due >= begins
            samples.due += measured
            if len(running) >= in_flight:
                samples.overflow += measured
                continue
            task = asyncio.ensure_future(act(samples, due))
            running.add(task)
            task.add_done_callback(running.discard)
        if samples.began == math.inf:
            samples.begin(begins)
        await clock.until(ends)
        samples.end(ends)
        if running:
            await asyncio.wait(running, timeout=drain)
    finally:
        await _leave(running, samples)
    return samples.result("open", in_flight)


def _for_ever() -> Iterator[int]:
    while True:
        yield 0


async def _leave(running: set[Any], samples: Samples) -> None:
    """Cancel what is still under way, count it, and wait for its end."""
    left = [task for task in running if not task.done()]
    samples.unfinished += len(left)
    for task in left:
        task.cancel()
    ended = await asyncio.gather(*running, return_exceptions=True)
    for error in ended:
        if isinstance(error, Exception):
            raise error  # ours: what requests raise has been counted


# --- the knee


class Sweep(msgspec.Struct, frozen=True):
    """An open loop at rising rates.

    Attributes:
        steps: what each rate gave, in the order of the runs.
        knee_per_s: the highest rate that was sustained; None if not even the first was.
        found: False if every rate that was tried was sustained.
    """

    steps: list[Result]
    knee_per_s: float | None
    found: bool


async def sweep(
    run: Callable[[float], Coroutine[Any, Any, Result]],
    *,
    start: float,
    factor: float = 1.5,
    refine: int = 2,
    most: int = 20,
    each: Callable[[Result], None] | None = None,
) -> Sweep:
    """Raise the rate until the server can't keep up, then look more closely between the last two rates.

    A rate is sustained if at least `SUSTAINED` of what is offered is answered in time, nothing fails or overflows, and
    p99 is no more than `EXPLODED` times the lowest p99 before.

    Args:
        run: makes an open-loop run at a rate.
        start: the first rate.
        factor: by which it rises.
        refine: how often the interval that holds the knee is halved.
        most: how many rates are tried at most.
        each: is told of every step.
    """
    steps: list[Result] = []
    low, high, rate = None, None, start
    while len(steps) < most:
        result = await run(rate)
        if each is not None:
            each(result)
        held = sustained(result, steps)
        steps.append(result)
        if held:
            low = rate
        else:
            high = rate
        if high is None:
            rate *= factor
        elif low is None or refine == 0:
            break
        else:
            refine -= 1
            rate = math.sqrt(low * high)
    return Sweep(steps, low, found=high is not None)


def sustained(result: Result, before: Sequence[Result]) -> bool:
    """Tell whether a server kept up with an open loop, compared with the steps `before`."""
    if not result.faultless or result.overflow or result.latency is None:
        return False
    assert result.offered_per_s is not None, "an open loop"
    lowest = min((step.latency.p99 for step in before if step.latency), default=math.inf)
    return result.rate_per_s >= SUSTAINED * result.offered_per_s and result.latency.p99 <= EXPLODED * lowest
