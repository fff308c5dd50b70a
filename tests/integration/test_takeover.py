"""What one worker leaves to another: partitions that move while work is in hand, and requests that may be deadly."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any

import msgspec
import pytest

import chains_stream as chains
from chains_stream import quarantine as quarantine_module
from chains_stream.broker import Broker, Committed
from chains_stream.calls import Call, Caller
from chains_stream.chain import Chain
from chains_stream.client import open_caller, open_connected
from chains_stream.offsets import Note
from chains_stream.policy import Scope
from chains_stream.settings import Settings
from chains_stream.worker import Host
from tests.sample import Seen

WAIT = 30.0


class Below(chains.ChainletBase):
    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=16))

    async def run_remote(self, name: str) -> str:
        Seen.note(f"below {name}")
        return name


@chains.mark_entrypoint
class Work(chains.ChainletBase):
    """Waits for ``go NAME`` if it is told to, and may ask the one below first."""

    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=16))

    def __init__(self, below: Below = chains.depends(Below)) -> None:
        self._below = below

    async def run_remote(self, name: str, wait: bool = False, ask: bool = False) -> str:  # noqa: FBT001, FBT002 - a Chainlet's arguments
        Seen.note(name)
        if ask:
            await self._below.run_remote(name)
        if wait:
            await Seen.until(f"go {name}", seconds=WAIT)
        return name


CHAIN = Chain.of(Work)


@pytest.fixture(autouse=True)
def nothing_seen() -> Iterator[None]:
    Seen.reset()
    yield
    Seen.reset()


class Parts:
    """A caller that names partitions, and hosts that come and go, on one embedded broker."""

    def __init__(self, stack: AsyncExitStack, **settings: Any) -> None:
        self.settings = Settings.of(reply_partitions=1, grace_period=0.1, **settings)
        self.topic = CHAIN.topic(Work, self.settings.namespace)
        self.below = CHAIN.topic(Below, self.settings.namespace)
        self.broker: Broker
        self.caller: Caller
        self._stack = stack

    async def start(self) -> None:
        self.broker = await open_connected(self._stack, self.settings)
        self.caller = await open_caller(self._stack, self.broker, self.settings)
        await self.caller.use(self.topic, self.below)

    async def host(self, *served: type[chains.ChainletBase]) -> Host:
        host = Host(CHAIN, served or CHAIN.chainlets, self.broker, self.caller, self.settings)
        await host.start()
        return host

    async def send(self, name: str, partition: int = 0, topic: str = "", **arguments: Any) -> Call:
        """Send a request to a partition."""
        balancer: Any = self.caller._balancers[topic or self.topic]
        balancer.choose = lambda _affinity: partition
        call = await self.caller.open(
            topic or self.topic, msgspec.msgpack.encode({"name": name, **arguments}), Scope.new(WAIT)
        )
        await call.stored()
        return call

    async def leave(self, note: Note, offset: int = 0) -> None:
        """Leave behind what a worker that was killed would have committed."""
        consumer = await self.broker.consume(self.topic, self.topic, on_assigned=nothing, on_revoked=nothing)
        await consumer.commit({0: Committed(offset, note.write())})
        await consumer.close()


async def nothing(_partitions: frozenset[int]) -> None:
    """A callback that does nothing."""


def alone(host: Host) -> int | None:
    """Give the offset of the request of partition 0 of `Work` that runs alone."""
    return host.workers[-1]._assignment.ledgers[0].alone


async def result(call: Call) -> Any:
    async with asyncio.timeout(WAIT):
        return msgspec.msgpack.decode(await call.result())


@pytest.fixture
async def parts() -> AsyncIterator[Parts]:
    async with AsyncExitStack() as stack:
        made = Parts(stack, partitions=2, max_uncommitted=10)
        await made.start()
        yield made


async def test_what_was_fetched_before_a_partition_moved_is_not_taken_afterwards(parts: Parts) -> None:
    """A batch waits while a suspect runs; its partition goes meanwhile, and comes back with an older record open."""
    await parts.leave(Note(epoch=2, named=True, runs=[1]))
    first = await parts.host(Work)
    calls = [await parts.send("long", 1, wait=True)]
    await Seen.until("long")
    calls.append(await parts.send("suspect", 0, wait=True))
    worker = first.workers[0]
    async with asyncio.timeout(WAIT):
        while not worker._quarantine.busy:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0)
    calls += [await parts.send(name, 1) for name in ("one", "two")]
    second = await parts.host(Work)  # partition 1 goes to it, and back with "long" unfinished
    await Seen.until("two")
    await second.drain()
    for name in ("long", "suspect"):
        Seen.note(f"go {name}")
    assert [await result(call) for call in calls] == ["long", "suspect", "one", "two"]
    await first.drain()


async def test_a_partition_that_was_handed_over_full_is_not_left_paused(parts: Parts) -> None:
    """Two long requests are open, far apart: what lies between is done, and the second is still to be fetched."""
    first = await parts.host(Work)
    calls = []
    for number in range(25):
        waits = number in (0, 5)
        calls.append(await parts.send(f"long {number}" if waits else f"{number}", wait=waits))
    async with asyncio.timeout(WAIT):
        while not first.workers[0].paused:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0)
    await first.drain()
    second = await parts.host(Work)
    Seen.note("go long 0")
    Seen.note("go long 5")
    assert len([await result(call) for call in calls]) == 25
    await second.drain()


async def test_a_suspect_is_alone_in_its_process_but_for_its_own_calls(parts: Parts) -> None:
    await parts.leave(Note(epoch=2, named=True, runs=[1]))
    host = await parts.host()
    suspect = await parts.send("suspect", wait=True, ask=True)
    await Seen.until("below suspect")
    assert alone(host) == 0
    other = await parts.send("other", topic=parts.below)
    own = await parts.send("beside", 1)
    for _ in range(100):  # of the loop's turns: both have been fetched long since
        await asyncio.sleep(0)
    assert (Seen.counts["below other"], Seen.counts["beside"]) == (0, 0)
    Seen.note("go suspect")
    assert [await result(call) for call in (suspect, other, own)] == ["suspect", "other", "beside"]
    await host.drain()


async def test_nobody_stands_aside_for_ever_and_the_claim_is_taken_back_first(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine_module, "STAND_ASIDE", 0.2)
    await parts.leave(Note(epoch=2, named=True, runs=[1]))
    host = await parts.host()
    suspect = await parts.send("suspect", wait=True)
    await Seen.until("suspect")
    assert alone(host) == 0
    other = await parts.send("other", topic=parts.below)
    assert await result(other) == "other"
    assert alone(host) is None
    assert await result(await parts.send("beside", 1)) == "beside", "its own Chainlet goes on too"
    Seen.note("go suspect")
    assert await result(suspect) == "suspect"
    await host.drain()


async def test_a_suspect_that_can_not_be_alone_is_run_all_the_same(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine_module, "CLEAR", 0.2)
    await parts.leave(Note(epoch=2, named=True, runs=[1]))
    host = await parts.host(Work)
    long = await parts.send("long", 1, wait=True)
    await Seen.until("long")
    suspect = await parts.send("suspect")
    assert await result(suspect) == "suspect"
    Seen.note("go long")
    assert await result(long) == "long"
    await host.drain()


async def test_a_request_that_many_died_of_is_put_aside_unrun(parts: Parts) -> None:
    await parts.leave(Note(epoch=5, named=True, runs=[1], suspects=1, alone=0, deaths={0: 2}))
    host = await parts.host(Work)
    deadly = await parts.send("deadly")
    with pytest.raises(chains.DeadLetteredError, match="3 workers died"):
        await result(deadly)
    assert Seen.counts["deadly"] == 0
    assert await result(await parts.send("next")) == "next"
    await host.drain()


async def test_what_was_kept_is_not_run_under_a_note_that_it_was_given_back(parts: Parts) -> None:
    """Should the next rebalance leave no time to say what runs, whoever comes then must know that something may."""
    first = await parts.host(Work)
    await result(await parts.send("before"))
    second = await parts.host(Work)  # the first one keeps partition 0
    call = await parts.send("during", wait=True)
    await Seen.until("during")
    consumer: Any = first.workers[0]._consumer
    assert not Note.read((await consumer.committed([0]))[0].metadata).clean
    Seen.note("go during")
    assert await result(call) == "during"
    await second.drain()
    await first.drain()
