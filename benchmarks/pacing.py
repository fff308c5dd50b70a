"""A synthetic engine that paces its tokens as a model does, and how streams of it are measured.

Each token tells when the engine gave it, by the clock that all processes of a machine share: so what a reader sees can
be compared with what the engine did, token by token.
"""

import asyncio
import time
from array import array
from collections.abc import AsyncIterator, Callable, Sequence

import msgspec

from benchmarks import driving
from benchmarks.driving import WrongAnswerError
from chains_stream.load import Percentiles


class Engine(msgspec.Struct, frozen=True):
    """The request: `count` tokens, the first after `first` seconds, the others `interval` seconds apart."""

    count: int
    first: float
    interval: float


async def generate(engine: Engine) -> AsyncIterator[str]:
    """Give tokens at their moments. One that is late makes none of the others late."""
    due = time.monotonic() + engine.first
    for number in range(engine.count):
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        yield f"{time.monotonic():.7f} {number}"
        due += engine.interval


class PacedStep(msgspec.Struct, kw_only=True):
    """So many readers that read one stream after the other; what happens from `ramp` seconds on is measured."""

    readers: int
    engine: Engine
    ramp: float
    seconds: float
    pids: Sequence[int] = ()


Read = Callable[[Engine], AsyncIterator[tuple[float, list[str]]]]  # gives tokens with the moment when they arrived


class Times:
    """What readers measured between two moments, in seconds."""

    def __init__(self, began: float, ended: float) -> None:
        self.began = began
        self.ended = ended
        self.first = array("d")  # from the request to the first token
        self.between = array("d")  # from token to token at the reader
        self.added = array("d")  # how far that is from what it was at the engine
        self.transit = array("d")  # from the engine to the reader
        self.tokens = 0

    async def follow(self, read: Read, engine: Engine) -> None:
        """Read one stream. Raises WrongAnswerError if it is not complete and in order."""
        asked = time.monotonic()
        number, last, last_given = 0, 0.0, 0.0
        async for moment, texts in read(engine):
            for text in texts:
                stamp, _, told = text.partition(" ")
                if int(told) != number:
                    raise WrongAnswerError(f"token {number} is {text!r}")
                given = float(stamp)
                if self.began <= moment < self.ended:
                    self._note(moment - asked, moment - last, given - last_given, moment - given, number)
                number, last, last_given = number + 1, moment, given
        if number != engine.count:
            raise WrongAnswerError(f"{number} tokens instead of {engine.count}")

    def _note(self, since: float, between: float, at_engine: float, transit: float, number: int) -> None:
        self.tokens += 1
        self.transit.append(transit)
        if number == 0:
            self.first.append(since)
        else:
            self.between.append(between)
            self.added.append(abs(between - at_engine))

    def figures(self) -> dict[str, float]:
        found = {"tokens_per_s": self.tokens / (self.ended - self.began)}
        named = {"ttft": self.first, "itl": self.between, "added_itl": self.added, "transit": self.transit}
        for name, samples in named.items():
            summed = Percentiles.of(samples)
            if summed is None:
                raise WrongAnswerError(f"nothing was measured: {name}")
            found |= {f"{name}_p50_s": summed.p50, f"{name}_p99_s": summed.p99, f"{name}_max_s": summed.max}
        return found


async def measure(read: Read, step: PacedStep) -> dict[str, float]:
    """Have the readers read, each from a moment of its own on, until all has been measured."""
    began = time.monotonic()
    times = Times(began + step.ramp, began + step.ramp + step.seconds)
    spread = step.engine.first + step.engine.count * step.engine.interval

    async def follow(number: int) -> None:
        await asyncio.sleep(spread * number / step.readers)
        while time.monotonic() < times.ended:
            await times.follow(read, step.engine)

    async with asyncio.TaskGroup() as tasks:
        for number in range(step.readers):
            tasks.create_task(follow(number))
        await asyncio.sleep(step.ramp)
        busy, own = driving.cpu_seconds(step.pids), time.process_time()
        await asyncio.sleep(step.seconds)
        busy, own = driving.cpu_seconds(step.pids) - busy, time.process_time() - own
    return times.figures() | {"cpu_s_per_token": busy / max(1, times.tokens), "client_cpu": own / step.seconds}


async def drive(read: Read) -> None:
    """Do the steps that come on stdin."""

    async def do(step: PacedStep) -> dict[str, float]:
        return await measure(read, step)

    await driving.obey(do, PacedStep)
