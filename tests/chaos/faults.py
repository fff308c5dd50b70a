"""The faults, each from breaking something to having mended it, and which failures of requests tell the truth then."""

import asyncio
import random
import signal
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from tests.acceptance.command import Command
from tests.chaos.driver import KINDS, Kind, Outcome
from tests.chaos.world import SESSION_SECONDS, World

if TYPE_CHECKING:
    from tests.chaos.checker import Account

BEYOND_SESSION = SESSION_SECONDS + 3.0  # seconds: the group has moved on, whenever it was last heard of
WAIT_SECONDS = 60.0  # for something to happen in another process
NOTICED = 1.0  # seconds in which what was already under way may go on
FEW = 3  # requests, of which a share means nothing

INTERRUPTED = "stream-interrupted"
TAKEN_OVER = "chunks were shown, and another worker can't go on from them: the client is told to repeat the call"
CHUNKS_LOST = "chunks were lost with a leader that alone had stored them, or by a takeover: the client is told as well"
CONNECTION = "the gateway that had the connection was killed, and its client sees that"
ABSENT = "no gateway listens until the next one is started"


@dataclass(frozen=True)
class Struck:
    """What a fault did: from when until when (Unix time), and to which workers (their processes)."""

    at: float
    until: float
    workers: frozenset[int] = frozenset()


Break = Callable[[World, random.Random], Awaitable[Struck]]
Effect = Callable[["Account"], str]  # what is missing of it; nothing if all is there


@dataclass(frozen=True)
class Fault:
    """A fault.

    `breaks` breaks something, mends it, and tells of it. `effect` looks whether requests met it. `truthful` holds the
    failures that requests may have meanwhile, with the reason why each tells the truth, and `share` how many of those
    of a kind that met the fault may fail at most.
    """

    name: str
    breaks: Break
    effect: Effect
    truthful: Mapping[tuple[Kind, str], str] = field(default_factory=dict)
    share: float = 0.6  # one of two workers is struck on each level: three of four streams that run at that moment


async def kill_workers(world: World, choice: random.Random) -> Struck:
    """One of each Chain."""
    victims = {kind: choice.choice(world.workers[kind]) for kind in KINDS}
    for kind, victim in victims.items():
        victim.send(signal.SIGKILL)
        world.workers[kind].remove(victim)
    struck = time.time()
    await asyncio.gather(*(world.add_worker(kind) for kind in KINDS))
    return Struck(struck, time.time(), _processes(victims.values()))


async def kill_gateways(world: World, choice: random.Random) -> Struck:
    """Of each Chain, one after the other."""
    struck = time.time()
    for kind in choice.sample(KINDS, len(KINDS)):
        world.gateways[kind].send(signal.SIGKILL)
        assert await asyncio.to_thread(world.gateways[kind].wait) == -signal.SIGKILL
        await world.open_gateway(kind)
    return Struck(struck, time.time())


async def pause_workers(world: World, choice: random.Random) -> Struck:
    """One of each Chain."""
    victims = [choice.choice(world.workers[kind]) for kind in KINDS]
    struck = time.time()
    for victim in victims:
        victim.send(signal.SIGSTOP)
    try:
        await asyncio.sleep(BEYOND_SESSION + choice.uniform(0, 3))
        until = time.time()
    finally:
        for victim in victims:
            victim.send(signal.SIGCONT)
    return Struck(struck, until, _processes(victims))


async def change_workers(world: World, choice: random.Random) -> Struck:
    """One more, then one less."""
    struck = time.time()
    kind = choice.choice(KINDS)
    leaver = choice.choice(world.workers[kind])
    added = await world.add_worker(kind)
    await asyncio.sleep(choice.uniform(0, 1))
    world.workers[kind].remove(leaver)
    status = await asyncio.to_thread(leaver.stop)
    assert status == 0, leaver.report()
    left = time.time()
    await _until_it_runs(world, added)
    return Struck(struck, left, _processes([leaver]))


async def cut_network(world: World, choice: random.Random) -> Struck:
    """Between one worker and its broker: by reset connections, or by silence."""
    assert world.proxy is not None, "of one broker"
    kind = choice.choice(KINDS)
    worker = await world.add_worker(kind, world.proxied)
    await _until_it_runs(world, worker)
    choice.choice((world.proxy.cut, world.proxy.silence))()
    struck = time.time()
    try:
        await asyncio.sleep(BEYOND_SESSION + choice.uniform(0, 3))
        until = time.time()
    finally:
        world.proxy.heal()
    await _until_it_runs(world, worker)
    world.workers[kind].remove(worker)
    status = await asyncio.to_thread(worker.stop)
    assert status == 0, worker.report()
    return Struck(struck, until, _processes([worker]))


async def restart_broker(world: World, choice: random.Random) -> Struck:
    broker = choice.choice(world.nodes)
    await asyncio.to_thread(broker.stop)
    struck = time.time()
    await asyncio.to_thread(broker.start)
    return Struck(struck, time.time())


async def crash_broker(world: World, choice: random.Random) -> Struck:
    """On a cluster, any node leads a third of all partitions, and all of them are busy."""
    broker = choice.choice(world.nodes)
    await asyncio.to_thread(broker.kill)
    struck = time.time()
    if len(world.nodes) > 1:
        await asyncio.sleep(choice.uniform(5, 8))  # others are elected after 3 s
    await asyncio.to_thread(broker.start)
    return Struck(struck, time.time())


async def _until_it_runs(world: World, worker: Command) -> None:
    """Wait until a worker takes requests, from now on."""
    since = len(world.notes())
    async with asyncio.timeout(WAIT_SECONDS):
        while not any(process == str(worker.pid) for _, _, process, _ in world.notes()[since:]):  # noqa: ASYNC110 - it can't tell us
            await asyncio.sleep(0.1)


def _processes(workers: Iterable[Command]) -> frozenset[int]:
    return frozenset(worker.pid for worker in workers)


def _others_went_on(account: "Account") -> str:
    """While the workers were broken, they took nothing, and others did."""
    struck = account.struck
    meanwhile = {process for process, at in account.runs if struck.at + NOTICED < at < struck.until}
    if not struck.workers or struck.workers & meanwhile:
        return f"of the workers {sorted(struck.workers)} that were broken, {sorted(struck.workers & meanwhile)} went on"
    return "" if meanwhile else "nobody went on while the workers were broken"


def _taken_over(account: "Account") -> str:
    return _others_went_on(account) or ("" if account.run_again else "no request of a broken worker was run again")


def _replaced(account: "Account") -> str:
    """A worker came, and another one left."""
    struck = account.struck
    came = {process for process, at in account.runs if at > struck.at}
    came -= {process for process, at in account.runs if at < struck.at}
    stayed = struck.workers & {process for process, at in account.runs if at > struck.until}
    return "" if came and struck.workers and not stayed else f"{len(came)} workers came, and {sorted(stayed)} stayed"


def _gateways_gone(account: "Account") -> str:
    gone = any(each.outcome in (Outcome.RESET, Outcome.REFUSED) for each in account.requests)
    return "" if gone else "no connection was reset or refused"


def _silence(account: "Account") -> str:
    """For a while nothing was answered."""
    struck = account.struck
    moments = sorted(each.ended for each in account.requests if each.outcome is Outcome.ANSWERED)
    meanwhile = [pair for pair in pairwise(moments) if pair[1] > struck.at and pair[0] < struck.until]
    longest = max((late - soon for soon, late in meanwhile), default=0)
    return "" if longest > NOTICED else f"there were answers all the time, the longest pause was of {longest:.3f} s"


def _delay(account: "Account") -> str:
    """Of a cluster, the rest goes on; what the lost one led has to wait."""
    longest = max(account.delays(), default=0)
    return "" if longest > NOTICED else f"no request had to wait, the longest one for {longest:.3f} s"


_STREAMS_TAKEN_OVER: Mapping[tuple[Kind, str], str] = {("stream", INTERRUPTED): TAKEN_OVER}
_BROKER_AWAY: Mapping[tuple[Kind, str], str] = {
    ("stream", INTERRUPTED): CHUNKS_LOST,
    ("resumable", INTERRUPTED): CHUNKS_LOST,
}
_GATEWAY_GONE: Mapping[tuple[Kind, str], str] = {
    **{(kind, Outcome.RESET.value): CONNECTION for kind in KINDS},
    **{(kind, Outcome.REFUSED.value): ABSENT for kind in KINDS},
}

FAULTS = (
    Fault("kill -9 workers", kill_workers, _taken_over, _STREAMS_TAKEN_OVER),
    # While a gateway starts, all that its clients send is refused; how long that takes is up to the machine.
    Fault("kill -9 gateways", kill_gateways, _gateways_gone, _GATEWAY_GONE, share=1.0),
    Fault("pause workers", pause_workers, _taken_over, _STREAMS_TAKEN_OVER),
    Fault("add and remove workers", change_workers, _replaced, _STREAMS_TAKEN_OVER),
    Fault("cut a worker's network", cut_network, _others_went_on, _STREAMS_TAKEN_OVER),
    Fault("restart the broker", restart_broker, _silence, _BROKER_AWAY),
    Fault("crash the broker", crash_broker, _silence, _BROKER_AWAY),
)
FAIL_OVER = Fault("crash a leader of three", crash_broker, _delay, _BROKER_AWAY)
