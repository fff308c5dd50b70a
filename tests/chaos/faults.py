"""The faults, each from breaking something to having mended it, and which failures of requests tell the truth then."""

import asyncio
import random
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from tests.acceptance.command import Command
from tests.chaos.driver import KINDS, Kind, Outcome
from tests.chaos.world import SESSION_SECONDS, World

BEYOND_SESSION = SESSION_SECONDS + 3.0  # seconds: the group has moved on, whenever it was last heard of
WAIT_SECONDS = 60.0  # for something to happen in another process

INTERRUPTED = "stream-interrupted"
TAKEN_OVER = "chunks were shown, and another worker can't go on from them: the client is told to repeat the call"
CHUNKS_LOST = "chunks were lost with a leader that alone had stored them, or by a takeover: the client is told as well"
UNREACHED = "no broker took the request for longer than a process waits for one"
CONNECTION = "the gateway that had the connection was killed, and its client sees that"
ABSENT = "no gateway listens until the next one is started"

Break = Callable[[World, random.Random], Awaitable[float]]


@dataclass(frozen=True)
class Fault:
    """A fault.

    `breaks` breaks something, mends it, and gives the moment at which it was broken. `truthful` holds the failures that
    requests may have meanwhile, with the reason why each tells the truth.
    """

    name: str
    breaks: Break
    truthful: Mapping[tuple[Kind, str], str] = field(default_factory=dict)


async def kill_workers(world: World, choice: random.Random) -> float:
    """One of each Chain."""
    victims = {kind: choice.choice(world.workers[kind]) for kind in KINDS}
    for kind, victim in victims.items():
        victim.send(signal.SIGKILL)
        world.workers[kind].remove(victim)
    struck = time.time()
    await asyncio.gather(*(world.add_worker(kind) for kind in KINDS))
    return struck


async def kill_gateways(world: World, choice: random.Random) -> float:
    """Of each Chain, one after the other."""
    struck = time.time()
    for kind in choice.sample(KINDS, len(KINDS)):
        world.gateways[kind].send(signal.SIGKILL)
        await asyncio.to_thread(world.gateways[kind].wait)
        await world.open_gateway(kind)
    return struck


async def pause_workers(world: World, choice: random.Random) -> float:
    """One of each Chain."""
    victims = [choice.choice(world.workers[kind]) for kind in KINDS]
    struck = time.time()
    for victim in victims:
        victim.send(signal.SIGSTOP)
    try:
        await asyncio.sleep(BEYOND_SESSION + choice.uniform(0, 3))
    finally:
        for victim in victims:
            victim.send(signal.SIGCONT)
    return struck


async def change_workers(world: World, choice: random.Random) -> float:
    """One more, then one less."""
    struck = time.time()
    kind = choice.choice(KINDS)
    leaver = choice.choice(world.workers[kind])
    added = await world.add_worker(kind)
    await asyncio.sleep(choice.uniform(0, 1))
    world.workers[kind].remove(leaver)
    status = await asyncio.to_thread(leaver.stop)
    assert status == 0, leaver.report()
    await _until_it_runs(world, added)
    return struck


async def cut_network(world: World, choice: random.Random) -> float:
    """Between one worker and its broker: by reset connections, or by silence."""
    assert world.proxy is not None, "of one broker"
    kind = choice.choice(KINDS)
    worker = await world.add_worker(kind, world.proxied)
    await _until_it_runs(world, worker)
    choice.choice((world.proxy.cut, world.proxy.silence))()
    struck = time.time()
    try:
        await asyncio.sleep(BEYOND_SESSION + choice.uniform(0, 3))
    finally:
        world.proxy.heal()
    await _until_it_runs(world, worker)
    world.workers[kind].remove(worker)
    status = await asyncio.to_thread(worker.stop)
    assert status == 0, worker.report()
    return struck


async def restart_broker(world: World, choice: random.Random) -> float:
    broker = choice.choice(world.nodes)
    await asyncio.to_thread(broker.stop)
    struck = time.time()
    await asyncio.to_thread(broker.start)
    return struck


async def crash_broker(world: World, choice: random.Random) -> float:
    """On a cluster, any node leads a third of all partitions, and all of them are busy."""
    broker = choice.choice(world.nodes)
    await asyncio.to_thread(broker.kill)
    struck = time.time()
    if len(world.nodes) > 1:
        await asyncio.sleep(choice.uniform(5, 8))  # others are elected after 3 s
    await asyncio.to_thread(broker.start)
    return struck


async def _until_it_runs(world: World, worker: Command) -> None:
    """Wait until a worker takes requests, from now on."""
    since = len(world.notes())
    async with asyncio.timeout(WAIT_SECONDS):
        while not any(process == str(worker.pid) for _, _, process, _ in world.notes()[since:]):  # noqa: ASYNC110 - it can't tell us
            await asyncio.sleep(0.1)


_STREAMS_TAKEN_OVER: Mapping[tuple[Kind, str], str] = {("stream", INTERRUPTED): TAKEN_OVER}
_BROKER_AWAY: Mapping[tuple[Kind, str], str] = {
    ("stream", INTERRUPTED): CHUNKS_LOST,
    ("unary", "broker"): UNREACHED,
    ("stream", "broker"): UNREACHED,
}
_GATEWAY_GONE: Mapping[tuple[Kind, str], str] = {
    **{(kind, Outcome.RESET.value): CONNECTION for kind in KINDS},
    **{(kind, Outcome.REFUSED.value): ABSENT for kind in KINDS},
}

FAULTS = (
    Fault("kill -9 workers", kill_workers, _STREAMS_TAKEN_OVER),
    Fault("kill -9 gateways", kill_gateways, _GATEWAY_GONE),
    Fault("pause workers", pause_workers, _STREAMS_TAKEN_OVER),
    Fault("add and remove workers", change_workers, _STREAMS_TAKEN_OVER),
    Fault("cut a worker's network", cut_network, _STREAMS_TAKEN_OVER),
    Fault("restart the broker", restart_broker, _BROKER_AWAY),
    Fault("crash the broker", crash_broker, _BROKER_AWAY),
)
FAIL_OVER = Fault("crash a leader of three", crash_broker, _BROKER_AWAY)
