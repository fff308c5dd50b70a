"""Calls of an echo: caller, Kafka, callee. Closed loops; open ones at rising rates, up to the knee."""

from contextlib import ExitStack
from itertools import product
from typing import NamedTuple

from benchmarks import processes
from benchmarks.bench import Bench, family_of, in_turn
from benchmarks.driving import Step
from chains_stream.load import SUSTAINED

SMALL, LARGE = 1_000, 10_000  # bytes
IN_FLIGHT = (1, 16, 64, 256)
QUICK_IN_FLIGHT = (1, 256)
RATES = (250, 500, 1000, 1500, 2000, 3000, 4000, 6000, 8000, 12000, 16000, 24000)
OPEN_IN_FLIGHT = 4096


class System(NamedTuple):
    """Who answers, and how often that is measured."""

    name: str
    caller: processes.Driver
    pids: list[int]
    repeats: int
    large: int  # how often with large payloads, at most


def warm_up(bench: Bench) -> None:
    """Load Kafka until its own compiler is done: in its first half minute a call costs it up to four times as much."""
    with ExitStack() as stack:
        for system in (floor(bench, stack), chains(bench, stack)):
            system.caller.ask(Step(in_flight=256, seconds=4.0 if bench.quick else 20.0, pids=system.pids))


def measure(bench: Bench) -> None:
    with ExitStack() as stack:
        systems = [floor(bench, stack), chains(bench, stack)]
        if not bench.quick:
            systems += [floor(bench, stack, by="send"), ray(bench, stack), faststream(bench, stack)]
        loads = product((SMALL,), QUICK_IN_FLIGHT) if bench.quick else product((SMALL, LARGE), IN_FLIGHT)
        steps = list(loads)
        for repeat in range(bench.repeats):
            for size, in_flight in steps:
                for system in in_turn(systems, repeat):
                    if repeat < (system.repeats if size == SMALL else min(system.repeats, system.large)):
                        closed(bench, system, repeat, size, in_flight)
            if not bench.quick and repeat < bench.at_most(2):
                for system in systems[:2]:
                    to_the_knee(bench, system, repeat)


def closed(bench: Bench, system: System, repeat: int, size: int, in_flight: int) -> None:
    figures = system.caller.ask(Step(in_flight=in_flight, seconds=bench.seconds, size=size, pids=system.pids))
    bench.note("unary", system.name, repeat, {"bytes": size, "in_flight": in_flight}, figures)


def to_the_knee(bench: Bench, system: System, repeat: int) -> None:
    for rate in RATES:
        step = Step(in_flight=OPEN_IN_FLIGHT, size=SMALL, rate=rate, seconds=1.5, seed=repeat, pids=system.pids)
        figures = system.caller.ask(step)
        bench.note("unary", system.name, repeat, {"loop": "open", "bytes": SMALL, "rate_per_s": rate}, figures)
        if figures["rate_per_s"] < SUSTAINED * figures["offered_per_s"]:
            return


def floor(bench: Bench, stack: ExitStack, by: str = "batches") -> System:
    given = (bench.address, bench.name(), "--by", by)
    echo = stack.enter_context(processes.program("benchmarks.rivals.floor", "echo", *given))
    caller = stack.enter_context(processes.program("benchmarks.rivals.floor", "caller", *given))
    return System("floor" if by == "batches" else "floor_send", caller, [echo.pid], bench.repeats, large=3)


def chains(bench: Bench, stack: ExitStack) -> System:
    served = stack.enter_context(bench.chain("echo.py:Echo"))
    return System("chains", stack.enter_context(bench.caller(served)), served.pids, bench.repeats, large=3)


def ray(bench: Bench, stack: ExitStack) -> System:
    driver = stack.enter_context(processes.program("benchmarks.rivals.ray_serve"))
    return System("ray", driver, family_of(driver.pid)[1:], bench.repeats, large=0)


def faststream(bench: Bench, stack: ExitStack) -> System:
    given = (bench.address, bench.name())
    echo = stack.enter_context(processes.program("benchmarks.rivals.faststream_pair", "echo", *given))
    caller = stack.enter_context(processes.program("benchmarks.rivals.faststream_pair", "caller", *given))
    return System("faststream", caller, [echo.pid], bench.at_most(2), large=1)
