"""Chains of Chainlets: three hops, two hops behind HTTP, and a fan-out of 32."""

from collections.abc import Sequence
from contextlib import ExitStack

from benchmarks import processes
from benchmarks.bench import Bench, family_of, in_turn
from benchmarks.driving import Step

System = tuple[str, dict[str, str | int | float], processes.Driver, list[int], int]  # the last is how often


def hops(bench: Bench) -> None:
    """Measure three hops: over Kafka, in one process, and over HTTP."""
    with ExitStack() as stack:
        apart = stack.enter_context(bench.chain("hops.py:First", "First", "Second", "Third"))
        fused = stack.enter_context(bench.chain("hops.py:FusedFirst"))
        repeats = bench.at_most(3)
        systems: list[System] = [
            ("chains", {"placed": "apart"}, stack.enter_context(bench.caller(apart)), apart.pids, repeats),
            ("chains", {"placed": "together"}, stack.enter_context(bench.caller(fused)), fused.pids, repeats),
            fastapi(stack, 3, repeats),
        ]
        compare(bench, "hops", systems, (1, 64), repeats)


def two_hops_http(bench: Bench) -> None:
    """Measure client, gateway, A, B; and client, A, B without us."""
    with ExitStack() as stack:
        served = stack.enter_context(bench.chain("hops.py:Second", "Second", "Third"))
        gateway = stack.enter_context(served.gateway())
        systems: list[System] = [
            ("chains", {}, http_caller(stack, gateway.url, "json"), [gateway.pid, *served.pids], bench.repeats),
            fastapi(stack, 2, bench.repeats),
            ray(stack, bench.at_most(2)),
        ]
        compare(bench, "two_hops_http", systems, (1, 256), bench.repeats)


def fan_out(bench: Bench) -> None:
    """Measure a Chainlet that gathers 32 calls of another one."""
    with ExitStack() as stack:
        served = stack.enter_context(bench.chain("echo.py:FanOut", "FanOut", "Echo"))
        repeats = bench.at_most(3)
        caller = stack.enter_context(bench.caller(served))
        compare(bench, "fan_out", [("chains", {"calls": 32}, caller, served.pids, repeats)], (1, 16), repeats)


def compare(bench: Bench, workload: str, systems: Sequence[System], in_flight: Sequence[int], repeats: int) -> None:
    for repeat in range(repeats):
        for number in in_flight:
            for name, parameters, caller, pids, often in in_turn(systems, repeat):
                if repeat < often:
                    figures = caller.ask(Step(in_flight=number, seconds=bench.seconds, size=1_024, pids=pids))
                    bench.note(workload, name, repeat, {**parameters, "in_flight": number}, figures)


def http_caller(stack: ExitStack, url: str, answer: str) -> processes.Driver:
    return stack.enter_context(processes.program("benchmarks.http_caller", "calls", url, "--answer", answer))


def fastapi_services(stack: ExitStack, count: int) -> list[processes.Serving]:
    """Start services, each of which calls the next; the first of them is the one to call."""
    services: list[processes.Serving] = []
    for _ in range(count):
        following = ["--next", services[0].url] if services else []
        services.insert(0, stack.enter_context(processes.program("benchmarks.rivals.fastapi_services", *following)))
    return services


def fastapi(stack: ExitStack, count: int, repeats: int) -> System:
    services = fastapi_services(stack, count)
    caller = http_caller(stack, services[0].url, "object")
    return "fastapi", {}, caller, [service.pid for service in services], repeats


def ray(stack: ExitStack, repeats: int) -> System:
    served = stack.enter_context(processes.program("benchmarks.rivals.ray_serve"))
    return "ray", {}, http_caller(stack, served.url, "text"), family_of(served.pid), repeats
