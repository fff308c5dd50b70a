"""What serving costs: the start, the memory, a second worker, a heap of asynchronous requests."""

import time
from collections.abc import Callable
from contextlib import ExitStack

from benchmarks import driving, processes
from benchmarks.bench import Bench, in_turn
from benchmarks.driving import Step
from benchmarks.http_caller import Hold
from benchmarks.workloads.composed import fastapi_services, http_caller
from benchmarks.workloads.streaming import client
from benchmarks.workloads.unary import floor

ONE = Step(in_flight=1, count=1, size=16, warm_up=0.0)
STREAMS = 500
REQUESTS, QUICK_REQUESTS = 100_000, 10_000


def ingest(bench: Bench) -> None:
    """Measure how fast requests are taken that nobody waits for, and until all are done."""
    total = QUICK_REQUESTS if bench.quick else REQUESTS
    with ExitStack() as stack:
        served = stack.enter_context(bench.chain("echo.py:Echo"))
        submitter = stack.enter_context(bench.caller(served, submits=True))
        bare = floor(bench, stack)
        systems = [("chains", submitter, served.pids), ("floor", bare.caller, bare.pids)]
        for repeat in range(bench.at_most(2)):
            for name, caller, pids in in_turn(systems, repeat):
                step = driving.Step(in_flight=1_000, count=total, size=256, warm_up=0.0, pids=pids)
                figures = caller.ask(step, limit=300.0)
                bench.note("ingest", name, repeat, {"requests": total, "bytes": 256}, figures)


def cold_start(bench: Bench) -> None:
    """Measure from starting the processes to the first answer over HTTP."""

    def run(stack: ExitStack) -> str:
        given = ("benchmarks/chains/echo.py:Echo", "--port", "0", "--log-level", "error")
        return stack.enter_context(processes.chains("run", *given)).url

    def cluster(stack: ExitStack) -> str:
        served = stack.enter_context(bench.chain("echo.py:Echo"))
        return stack.enter_context(served.gateway()).url

    def services(stack: ExitStack) -> str:
        return fastapi_services(stack, 2)[0].url

    def ray(stack: ExitStack) -> str:
        return stack.enter_context(processes.program("benchmarks.rivals.ray_serve")).url

    systems: list[tuple[str, str, Callable[[ExitStack], str], str, int]] = [
        ("chains", "embedded", run, "json", 3),
        ("chains", "worker and gateway", cluster, "json", 3),
        ("fastapi", "two services", services, "object", 2),
        ("ray", "cluster", ray, "text", 1),
    ]
    for repeat in range(bench.at_most(3)):
        for name, what, start, answer, often in in_turn(systems, repeat):
            if repeat < often:
                with ExitStack() as stack:
                    began = time.monotonic()
                    url = start(stack)
                    started = time.monotonic() - began
                    # The client's own start does not count.
                    caller = http_caller(stack, url, answer)
                    figures = caller.ask(ONE)
                    bench.note("cold_start", name, repeat, {"what": what}, {"seconds_s": started + figures["max_s"]})


def memory(bench: Bench) -> None:
    """Measure the resident memory of processes at rest, and what a stream adds that waits."""
    for repeat in range(bench.at_most(3)):  # it is nearly the same each time
        with ExitStack() as stack:
            served = stack.enter_context(bench.chain("echo.py:Echo"))
            gateway = stack.enter_context(served.gateway())
            bench.note("memory", "chains", repeat, {"process": "gateway"}, {"rss_bytes": gateway.rss()})
            bench.note("memory", "chains", repeat, {"process": "worker"}, {"rss_bytes": served.workers[0].rss()})
        with ExitStack() as stack:
            served = stack.enter_context(bench.chain("tokens.py:Wait"))
            gateway = stack.enter_context(served.gateway())
            holder = client(stack, gateway.url, kind="held")
            holder.ask(Hold(streams=20))  # what is made with the first is not of each
            before = (gateway.rss(), served.workers[0].rss())
            holder.ask(Hold(streams=STREAMS))
            grown = [after - one for after, one in zip((gateway.rss(), served.workers[0].rss()), before, strict=True)]
            figures = {
                "bytes_per_stream": sum(grown) / STREAMS,
                "gateway_bytes_per_stream": grown[0] / STREAMS,
                "worker_bytes_per_stream": grown[1] / STREAMS,
            }
            bench.note("memory", "chains", repeat, {"process": "stream", "streams": STREAMS}, figures)


def scaling(bench: Bench) -> None:
    """Measure one worker and two, of a Chainlet that waits for 20 ms and runs eight at once."""
    with ExitStack() as stack:
        systems: list[tuple[int, processes.Driver, list[int]]] = []
        for workers in (1, 2):
            served = stack.enter_context(bench.chain("echo.py:Sleep", workers=workers))
            systems.append((workers, stack.enter_context(bench.caller(served)), served.pids))
        for repeat in range(bench.at_most(3)):
            for workers, caller, pids in in_turn(systems, repeat):
                figures = caller.ask(Step(in_flight=64, seconds=3.0, warm_up=1.5, size=256, pids=pids))
                bench.note("scaling", "chains", repeat, {"workers": workers, "in_flight": 64}, figures)
