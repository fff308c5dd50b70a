"""One run of the benchmarks: what workloads are given, and where their measurements go."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import TypeVar
from uuid import uuid4

from benchmarks import processes
from benchmarks.measurement import Measurement, Parameters

T = TypeVar("T")


class Bench:
    """What a workload is given.

    Attributes:
        url: of the Kafka that ours and the rivals share.
        repeats: how often a target's systems are measured; others may be measured less often.
        quick: measure no more than the rows of a quick run take.
        seconds: how long one measurement takes.
    """

    def __init__(self, url: str, repeats: int, *, quick: bool, seconds: float | None = None) -> None:
        self.url = url
        self.repeats = repeats
        self.quick = quick
        self.seconds = seconds or 1.5
        self.measurements: list[Measurement] = []
        self._names = count()
        self._run = uuid4().hex[:6]
        self._began = time.monotonic()

    @property
    def address(self) -> str:
        return self.url.removeprefix("kafka://")

    def name(self) -> str:
        """Give a name for topics that nobody else has."""
        return f"bench-{self._run}-{next(self._names)}"

    def at_most(self, repeats: int) -> int:
        """Give how often something is measured that no target needs."""
        return min(self.repeats, repeats)

    def note(self, workload: str, system: str, repeat: int, parameters: Parameters, figures: dict[str, float]) -> None:
        """Keep a measurement, and show it."""
        self.measurements.append(Measurement(workload, system, repeat, parameters, figures))
        named = " ".join(f"{name}={value}" for name, value in parameters.items())
        shown = ", ".join(f"{name} {shown_as(name, figures[name])}" for name in SHOWN if name in figures)
        say(f"[{time.monotonic() - self._began:5.0f} s] {workload} {repeat + 1} {system:10} {named}: {shown}")

    @contextmanager
    def chain(self, chain: str, *served: str, workers: int = 1) -> Iterator["Served"]:
        """Serve a Chain by workers of it all, or by one for each of the Chainlets named."""
        namespace = self.name()
        common = (f"benchmarks/chains/{chain}", "--broker", self.url, "--namespace", namespace, "--log-level", "error")
        named: list[tuple[str, ...]] = [("--chainlet", name) for name in served] or [()] * workers
        with ExitStack() as stack:
            yield Served(common, [stack.enter_context(processes.chains("worker", *common, *one)) for one in named])

    @contextmanager
    def caller(self, served: "Served", *, submits: bool = False) -> Iterator[processes.Driver]:
        """A script that calls a Chain over Kafka."""
        how = ["--submit"] if submits else []
        with processes.program(
            "benchmarks.chains.caller", served.common[0], self.url, served.namespace, *how
        ) as driver:
            yield driver


class Served:
    """A Chain that is served by workers."""

    def __init__(self, common: tuple[str, ...], workers: Sequence[processes.Serving]) -> None:
        self.common = common
        self.workers = workers

    @property
    def namespace(self) -> str:
        return self.common[4]

    @property
    def pids(self) -> list[int]:
        return [worker.pid for worker in self.workers]

    @contextmanager
    def gateway(self) -> Iterator[processes.Serving]:
        with processes.chains("gateway", *self.common, "--port", "0") as gateway:
            yield gateway


def in_turn(systems: Sequence[T], repeat: int) -> Sequence[T]:
    """Give all, another one first each time: so none is always measured after the same other one."""
    first = repeat % len(systems)
    return [*systems[first:], *systems[:first]]


SHOWN = (
    "p50_s",
    "p99_s",
    "ttft_p50_s",
    "ttft_p99_s",
    "added_itl_p50_s",
    "added_itl_p99_s",
    "rate_per_s",
    "tokens_per_s",
    "cpu_s_per_call",
    "cpu_s_per_token",
    "seconds_s",
    "rss_bytes",
    "bytes_per_stream",
)


def shown_as(name: str, value: float) -> str:
    """Write a figure for the eye."""
    if name.endswith("_per_s"):
        return f"{value:,.0f}/s"
    if name.startswith("cpu_s"):
        return f"{value * 1e6:,.0f} µs"
    if name.endswith("_s"):
        return f"{value * 1e3:,.2f} ms" if value < 1 else f"{value:,.2f} s"
    return f"{value / 1e6:,.1f} MB" if value > 1e6 else f"{value / 1e3:,.1f} KB"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def family_of(pid: int) -> list[int]:
    """Give a process and all that descend from it."""
    listing = subprocess.run(["ps", "-eo", "pid=,ppid="], stdout=subprocess.PIPE, text=True, check=True).stdout
    parents = {int(one): int(parent) for one, parent in map(str.split, listing.splitlines())}
    found = [pid]
    for one in found:  # it grows meanwhile
        found += [child for child, parent in parents.items() if parent == one]
    return found


Workload = Callable[[Bench], None]
