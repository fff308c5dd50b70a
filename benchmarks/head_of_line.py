"""Do long requests hold up short ones? Two workers on a real Kafka, short requests at a fixed rate, a long one now and then.

    python benchmarks/head_of_line.py                 # pairs of 60 s without and 60 s with long requests
    python benchmarks/head_of_line.py --seconds 12 --pairs 1
    python benchmarks/head_of_line.py --places 1      # each long request takes a whole worker

The rival is the same load without the long requests. Latencies are open-loop: they count from when a request was due,
so that a stall shows in all requests that it held up. Client, workers and broker share this machine.
"""

import argparse
import asyncio
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from uuid import uuid4

import chains_stream as chains
from chains_stream import Connection

HERE = Path(__file__).resolve()
KAFKA = HERE.parents[1] / "deploy" / "kafka" / "kafka"
CHAINS = Path(sys.executable).with_name("chains")
PLACES = "HEAD_OF_LINE_PLACES"  # tells the workers what --places says


class Work(chains.ChainletBase):
    """Takes as long as it is told."""

    remote_config = chains.RemoteConfig(
        compute=chains.Compute(predict_concurrency=int(os.environ.get(PLACES, "8")))
    )

    async def run_remote(self, seconds: float) -> float:
        await asyncio.sleep(seconds)
        return seconds


@contextmanager
def kafka(url: str | None) -> Iterator[str]:
    """The Kafka of that URL, or one of our own."""
    if url is not None:
        yield url
        return
    started = subprocess.run([KAFKA, "start", "--port", "0"], stdout=subprocess.PIPE, text=True, check=True)
    found = started.stdout.split()[-1]
    try:
        yield found
    finally:
        subprocess.run([KAFKA, "clean", "--port", found.rpartition(":")[2]], check=True)


@contextmanager
def worker(url: str, namespace: str) -> Iterator[None]:
    """A `chains worker`, once it is ready."""
    command = [CHAINS, "worker", f"{HERE}:Work", "--broker", url, "--namespace", namespace]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if "is ready" not in line:
                raise SystemExit(f"{command} ended, or said {line!r}")
            yield
        finally:
            process.terminate()


async def due(began: float, every: float, seconds: float) -> Sequence[float]:
    """Give the times at which requests are due."""
    return [began + number * every for number in range(int(seconds / every))]


async def at(moment: float, connection: "Connection[[float], float]", seconds: float) -> float:
    """Call when it is due, and give the seconds from then to the answer."""
    await asyncio.sleep(moment - time.perf_counter())
    await connection.run_remote(seconds)  # type: ignore[misc]
    return time.perf_counter() - moment
