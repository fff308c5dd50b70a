"""Streams of tokens as server-sent events: as fast as they are taken, and at an engine's pace."""

from contextlib import ExitStack
from typing import NamedTuple

from benchmarks import processes
from benchmarks.bench import Bench, family_of, in_turn
from benchmarks.http_caller import StreamStep
from benchmarks.pacing import Engine, PacedStep
from benchmarks.workloads.composed import fastapi_services

READERS = (1, 8, 64, 256, 512)
QUICK_READERS = (64,)
TARGET_READERS = 64
MOST_OF_RAY = 64  # with 512 readers it takes minutes for one stream each
PACES = (  # readers, seconds between two tokens
    (256, 0.02),
    (64, 0.02),
    (16, 0.02),
    (16, 0.005),
)
TARGET_PACE = (256, 0.02)
FIRST = 0.02  # seconds to the first token


class System(NamedTuple):
    """Who streams, and how often that is measured."""

    name: str
    client: processes.Driver
    pids: list[int]
    repeats: int


def fast(bench: Bench) -> None:
    with ExitStack() as stack:
        served = stack.enter_context(bench.chain("tokens.py:Tokens"))
        gateway = stack.enter_context(served.gateway())
        bare = stack.enter_context(processes.program("benchmarks.rivals.asgi"))
        systems = [
            System("chains", client(stack, gateway.url), [gateway.pid, *served.pids], bench.repeats),
            System("asgi", client(stack, bare.url), [bare.pid], bench.repeats),
        ]
        if not bench.quick:
            services = fastapi_services(stack, 2)
            pids = [service.pid for service in services]
            cluster = stack.enter_context(processes.program("benchmarks.rivals.ray_serve"))
            systems += [
                System("fastapi", client(stack, services[0].url, "/stream"), pids, bench.at_most(2)),
                System("ray", client(stack, cluster.url, "/stream"), family_of(cluster.pid), bench.at_most(2)),
            ]
        for repeat in range(bench.repeats):
            for readers in QUICK_READERS if bench.quick else READERS:
                for system in in_turn(systems, repeat):
                    often = system.repeats if readers == TARGET_READERS else min(system.repeats, 2)
                    if repeat < often and not (system.name == "ray" and readers > MOST_OF_RAY):
                        step = StreamStep(readers=readers, seconds=bench.seconds, pids=system.pids)
                        bench.note("streams", system.name, repeat, {"readers": readers}, system.client.ask(step))


def client(stack: ExitStack, url: str, path: str = "/run_remote", kind: str = "streams") -> processes.Driver:
    return stack.enter_context(processes.program("benchmarks.http_caller", kind, url, "--path", path))


def paced(bench: Bench) -> None:
    with ExitStack() as stack:
        served = stack.enter_context(bench.chain("tokens.py:Paced"))
        gateway = stack.enter_context(served.gateway())
        inside, outside = (relay(bench, stack, part) for part in ("reader", "server"))
        alone = stack.enter_context(processes.program("benchmarks.rivals.engine"))
        systems = [
            System("engine", alone, [], bench.repeats),
            System("relay", inside[0], inside[1], bench.repeats),
            System("relay_http", client(stack, outside[0].url, kind="paced"), outside[1], bench.at_most(2)),
            System("chains", client(stack, gateway.url, kind="paced"), [gateway.pid, *served.pids], bench.repeats),
        ]
        for repeat in range(bench.repeats):
            for readers, interval in PACES:
                for system in in_turn(systems, repeat):
                    if repeat < system.repeats and ((readers, interval) == TARGET_PACE or repeat < bench.at_most(2)):
                        pace(bench, system, repeat, readers, interval)


def pace(bench: Bench, system: System, repeat: int, readers: int, interval: float) -> None:
    """Measure streams of 100 tokens, for a while that starts when all readers read."""
    ramp = FIRST + 100 * interval
    step = PacedStep(readers=readers, engine=Engine(100, FIRST, interval), ramp=ramp, seconds=2.5, pids=system.pids)
    parameters: dict[str, str | int | float] = {"readers": readers, "tokens_per_s": round(1 / interval)}
    bench.note("paced", system.name, repeat, parameters, system.client.ask(step))


def relay(bench: Bench, stack: ExitStack, part: str) -> tuple[processes.Driver, list[int]]:
    given = (bench.address, bench.name())
    engine = stack.enter_context(processes.program("benchmarks.rivals.relay", "engine", *given))
    other = stack.enter_context(processes.program("benchmarks.rivals.relay", part, *given))
    return other, [engine.pid] if part == "reader" else [engine.pid, other.pid]
