"""What a call costs in one process: over the embedded broker, through three fused hops, and without us.

python -m benchmarks.chains.embedded
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator

import msgspec

import chains_stream as chains
from benchmarks import driving
from benchmarks.chains.echo import Echo
from benchmarks.chains.hops import FusedFirst
from benchmarks.driving import WrongAnswerError
from benchmarks.rivals import loop


class Plain:
    """What a hop does, without us."""

    def __init__(self, following: "Plain | None" = None) -> None:
        self._following = following

    async def run_remote(self, text: str) -> str:
        return text if self._following is None else await self._following.run_remote(text)


class EmbeddedStep(msgspec.Struct):
    """So many calls, so many at once, of one of ``chain``, ``fused``, ``plain``, ``plain hops``."""

    what: str
    in_flight: int
    calls: int
    size: int = 1_000


async def measure(call: Callable[[str], Awaitable[str]], step: EmbeddedStep) -> dict[str, float]:
    async def lane(left: Iterator[int]) -> None:
        for number in left:
            text = driving.text_payload(number, step.size)
            if await call(text) != text:
                raise WrongAnswerError

    async def calls(count: int) -> None:
        left = iter(range(count))
        await asyncio.gather(*(lane(left) for _ in range(step.in_flight)))

    await calls(step.calls // 10)
    busy, began = time.process_time(), time.perf_counter()
    await calls(step.calls)
    busy, seconds = time.process_time() - busy, time.perf_counter() - began
    return {"cpu_s_per_call": busy / step.calls, "rate_per_s": step.calls / seconds}


async def work() -> None:
    plain, plain_hops = Plain(), Plain(Plain(Plain()))
    async with chains.run_chain(Echo) as chain, chains.run_chain(FusedFirst) as fused:
        kinds: dict[str, Callable[[str], Awaitable[str]]] = {
            "chain": chain.run_remote,
            "fused": fused.run_remote,
            "plain": plain.run_remote,
            "plain hops": plain_hops.run_remote,
        }

        async def do(step: EmbeddedStep) -> dict[str, float]:
            return await measure(kinds[step.what], step)

        await driving.obey(do, EmbeddedStep)


if __name__ == "__main__":
    loop.run(work())
