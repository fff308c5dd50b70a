"""Do long requests hold up short ones? Two workers on Kafka, short requests at a mean rate, a long one now and then.

    python benchmarks/head_of_line.py                 # pairs of 60 s without and 60 s with long requests
    python benchmarks/head_of_line.py --seconds 12 --pairs 1
    python benchmarks/head_of_line.py --places 1      # each long request takes a whole worker

The rival is the same load without the long requests. Latencies are open-loop: they count from when a request was due,
so that a stall shows in all requests that it held up. Client, workers and broker share this machine.
"""

import argparse
import asyncio
import os
import statistics
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from uuid import uuid4

import chains_stream as chains

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1]))  # it is loaded as a Chain file too

from benchmarks import processes  # noqa: E402 - only now it is found
from chains_stream.load import Percentiles, Samples, calls, open_loop  # noqa: E402 - as above

SHORT, LONG, LONG_EVERY = 0.01, 6.0, 10.0  # seconds
MOST = 10_000  # short requests that may be under way: as many as come
PLACES = "HEAD_OF_LINE_PLACES"  # tells the workers what --places says


class Work(chains.ChainletBase):
    """Takes as long as it is told."""

    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=int(os.environ.get(PLACES, "8"))))

    async def run_remote(self, seconds: float) -> float:
        await asyncio.sleep(seconds)
        return seconds


async def load(call: Callable[[float], Awaitable[float]], given: argparse.Namespace, *, long: bool) -> Samples:
    """Send short requests at random moments, the same ones each time, with or without long ones."""
    samples = Samples()

    async def after(moment: float) -> None:
        await asyncio.sleep(moment)
        await call(LONG)

    async with asyncio.TaskGroup() as sending:
        for number in range(int(given.seconds / LONG_EVERY) if long else 0):
            sending.create_task(after(LONG_EVERY * (number + 0.25)))
        short = calls(lambda: call(SHORT))
        result = await open_loop(short, rate=given.rate, seconds=given.seconds, in_flight=MOST, into=samples)
    if not result.faultless or result.overflow:
        raise SystemExit(f"not all short requests were answered: {result}")
    return samples


def found(samples: Samples) -> Percentiles:
    percentiles = Percentiles.of(samples.latency)
    assert percentiles is not None, "all were answered"
    return percentiles


def shown(samples: Samples) -> str:
    each = found(samples)
    figures = ", ".join(f"{name} {value * 1000:.1f} ms" for name, value in each.shares.items())
    stuck = sum(latency > 1 for latency in samples.latency)
    return f"{each.count} short requests: {figures}, {stuck} over 1 s"


async def measure(url: str, namespace: str, given: argparse.Namespace) -> None:
    ratios = []
    async with chains.connect(url, Work, namespace=namespace) as work:
        for _ in range(10):  # both workers have joined, and are warm
            await asyncio.gather(*(work.run_remote(0.0) for _ in range(20)))
        for number in range(given.pairs):
            pair = {}
            for long in (False, True) if number % 2 == 0 else (True, False):
                pair[long] = await load(work.run_remote, given, long=long)
                print(f"{'with' if long else 'without'} long ones, {shown(pair[long])}", flush=True)
            ratios.append(found(pair[True]).p99 / found(pair[False]).p99)
            print(f"p99 with / without: {ratios[-1]:.2f}", flush=True)
    if given.pairs > 1:
        print(f"median of {given.pairs} pairs: {statistics.median(ratios):.2f}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--broker", help="kafka://host:port; one of our own is started if none is named")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each half of a pair")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--rate", type=float, default=50.0, help="short requests a second")
    parser.add_argument("--places", type=int, default=8, help="predict_concurrency of the workers")
    given = parser.parse_args(arguments)
    os.environ[PLACES] = str(given.places)
    print(processes.machine())
    print(
        f"two workers of predict_concurrency {given.places}; {given.rate:g} requests/s of {SHORT * 1000:g} ms, "
        f"one of {LONG:g} s every {LONG_EVERY:g} s"
    )
    namespace = f"head-of-line-{uuid4().hex[:8]}"
    with ExitStack() as stack:
        url = stack.enter_context(processes.kafka(given.broker))
        for _ in range(2):
            stack.enter_context(processes.chains("worker", f"{HERE}:Work", "--broker", url, "--namespace", namespace))
        asyncio.run(measure(url, namespace, given))


if __name__ == "__main__":
    main()
