"""Calls within one process, in processor time: over the embedded broker, through three fused hops, and without us."""

from benchmarks import processes
from benchmarks.bench import Bench, in_turn
from benchmarks.chains.embedded import EmbeddedStep

SYSTEMS = (  # workload, system, what, calls
    ("embedded", "chains", "chain", 4_000),
    ("embedded", "floor", "plain", 40_000),
    ("fused", "chains", "fused", 4_000),
    ("fused", "floor", "plain hops", 40_000),
)


def measure(bench: Bench) -> None:
    with processes.program("benchmarks.chains.embedded") as driver:
        for repeat in range(bench.repeats):
            for in_flight in (1, 64):
                for workload, system, what, calls in in_turn(SYSTEMS, repeat):
                    figures = driver.ask(EmbeddedStep(what, in_flight, calls))
                    bench.note(workload, system, repeat, {"in_flight": in_flight}, figures)
