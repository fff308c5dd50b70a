"""Two workers and their callers: by load, by key, and never more at once than was said. On both brokers."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any
from uuid import uuid4

import pytest
from prometheus_client import REGISTRY

import chains_stream as chains
from chains_stream import balance, policy
from chains_stream.broker import Broker
from chains_stream.chain import Chain
from chains_stream.client import Connection, _connection, open_caller, open_connected
from chains_stream.control import Load, Message
from chains_stream.settings import Settings
from chains_stream.worker import Host
from tests.sample import Seen

PLACES = 4


class Serve(chains.ChainletBase):
    """Says which instance it is."""

    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=PLACES))

    def __init__(self) -> None:
        self.id = uuid4().hex

    async def run_remote(self, *, hold: bool = False) -> str:
        if hold:
            Seen.note("held")
            await asyncio.Event().wait()
        return self.id


@chains.mark_entrypoint
class Front(chains.ChainletBase):
    """Says which instances it and its dependency are; asks for affinity itself if it is given a key."""

    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=PLACES))

    def __init__(self, serve: Serve = chains.depends(Serve)) -> None:
        self.id = uuid4().hex
        self._serve = serve

    async def run_remote(self, key: str = "") -> tuple[str, str]:
        if not key:
            return self.id, await self._serve.run_remote()
        with chains.affinity(key):
            return self.id, await self._serve.run_remote()


def served_key() -> bytes | None:
    scope = policy.current.get()
    return scope.affinity if scope is not None else None


class Here(chains.ChainletBase):
    async def run_remote(self) -> bytes | None:
        return served_key()


class Elsewhere(chains.ChainletBase):
    async def run_remote(self) -> bytes | None:
        return served_key()


@chains.mark_entrypoint
class Keys(chains.ChainletBase):
    """Asks one in this process, and one over the broker, of which affinity the request is that they serve."""

    def __init__(
        self, here: Here = chains.depends(Here, colocated=True), elsewhere: Elsewhere = chains.depends(Elsewhere)
    ) -> None:
        self._here = here
        self._elsewhere = elsewhere

    async def run_remote(self, key: bytes = b"") -> list[bytes | None]:
        if not key:
            return [await self._here.run_remote(), await self._elsewhere.run_remote()]
        with chains.affinity(key):
            return [await self._here.run_remote(), await self._elsewhere.run_remote()]


class AtOnce:
    """Counts how many are inside at once."""

    def __init__(self) -> None:
        self.inside = self.most = 0

    async def stay(self) -> None:
        self.inside += 1
        self.most = max(self.most, self.inside)
        await asyncio.sleep(0.002)
        self.inside -= 1


class Narrow(chains.ChainletBase):
    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=5))
    at_once = AtOnce()

    async def run_remote(self) -> None:
        await self.at_once.stay()


class Wide(chains.ChainletBase):
    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=256))
    at_once = AtOnce()

    async def run_remote(self) -> None:
        await self.at_once.stay()


class WideStream(chains.ChainletBase):
    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=256))
    at_once = AtOnce()

    async def run_remote(self) -> AsyncIterator[int]:
        await self.at_once.stay()
        yield 1


@chains.mark_entrypoint
class Limited(chains.ChainletBase):
    """Calls two Chainlets that could do more, no more than 3 and 2 at once."""

    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=256))
    at_once = AtOnce()

    def __init__(
        self,
        wide: Wide = chains.depends(Wide, concurrency_limit=3),
        stream: WideStream = chains.depends(WideStream, concurrency_limit=2),
    ) -> None:
        self._wide = wide
        self._stream = stream

    async def run_remote(self) -> None:
        await self.at_once.stay()
        await self._wide.run_remote()
        assert [number async for number in self._stream.run_remote()] == [1]


@pytest.fixture(params=["memory", pytest.param("kafka", marks=pytest.mark.kafka)])
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    broker = "memory://" if request.param == "memory" else str(request.getfixturevalue("kafka_url"))
    return {
        "broker": broker,
        "namespace": f"t{uuid4().hex[:10]}",
        "partitions": 4,
        "reply_partitions": 2,
        "grace_period": 20,
    }


@pytest.fixture(autouse=True)
def nothing_seen() -> Iterator[None]:
    Seen.reset()
    yield
    Seen.reset()


class Pair:
    """Two hosts of one Chain, and callers of it."""

    def __init__(self, chain: Chain, settings: Settings, broker: Broker, stack: AsyncExitStack) -> None:
        self._chain = chain
        self._settings = settings
        self._broker = broker
        self._stack = stack
        self.hosts: list[Host] = []

    async def start(self) -> None:
        for _ in range(2):
            caller = await open_caller(self._stack, self._broker, self._settings)
            host = Host(self._chain, self._chain.chainlets, self._broker, caller, self._settings)
            await host.start()
            self.hosts.append(host)

    async def drain(self) -> None:
        for host in self.hosts:
            await host.drain()

    async def connect(self) -> Connection[..., Any]:
        """Give a caller of its own, which knows of the workers only what they report."""
        caller = await open_caller(self._stack, self._broker, self._settings)
        return await _connection(self._chain, caller, self._settings)

    async def reported(self, holds: Callable[[Load], bool], then: Callable[[], Awaitable[None]]) -> None:
        """Do something, and wait until a worker has reported what holds."""
        met = asyncio.Event()

        def see(message: Message) -> None:
            if isinstance(message, Load) and holds(message):
                met.set()

        caller = await open_caller(self._stack, self._broker, self._settings)
        await caller.control.follow({self.hosts[0].workers[-1].topic: see})
        await then()
        async with asyncio.timeout(20):
            await met.wait()

    def ids(self) -> list[str]:
        return [str(getattr(host.workers[-1].callee.instance, "id", "")) for host in self.hosts]


@pytest.fixture
async def pair(request: pytest.FixtureRequest, settings: dict[str, Any]) -> AsyncIterator[Pair]:
    async with AsyncExitStack() as stack:
        checked = Settings.of(**settings)
        pair = Pair(Chain.of(request.param), checked, await open_connected(stack, checked), stack)
        stack.push_async_callback(pair.drain)  # those that a test has not drained itself, before their callers close
        await pair.start()
        yield pair


async def fill(pair: Pair, connection: Connection[..., Any]) -> tuple[str, list[chains.Handle]]:
    """Have all places of one worker taken by requests that do not end; give its id, and the requests."""
    with chains.affinity("all at one"):
        full: str = await connection.run_remote()
        handles: list[chains.Handle] = []

        async def hold() -> None:
            handles.extend([await connection.submit(hold=True) for _ in range(PLACES)])

        await pair.reported(lambda load: load.running == PLACES, hold)
    return full, handles


@pytest.mark.parametrize("pair", [Serve], indirect=True)
async def test_short_requests_go_where_no_long_ones_take_all_places(pair: Pair) -> None:
    full, handles = await fill(pair, await pair.connect())
    assert full in pair.ids()
    other = await pair.connect()
    first = await pair.connect()
    with chains.affinity("all at one"):  # a key is kept, also when it means to wait for a while
        waiting = await first.submit()
    # A new caller knows a worker by its next report.
    async with asyncio.timeout(20):
        await until_avoided(other, full)
        served = [
            await asyncio.gather(*(other.run_remote() for _ in range(PLACES - 1)), return_exceptions=False)
            for _ in range(60)
        ]
    assert {id_ for ids in served for id_ in ids} == set(pair.ids()) - {full}
    for handle in handles:
        await handle.cancel()
    async with asyncio.timeout(20):
        assert await waiting.result() == full


async def until_avoided(connection: Connection[..., Any], full: str) -> None:
    """Call until the caller has learnt enough: what goes to the full worker before hangs, and is given up."""
    quick = 0
    async with asyncio.timeout(20):
        while quick < 20:
            handle = await connection.submit()
            try:
                async with asyncio.timeout(0.5):
                    quick = quick + 1 if await handle.result() != full else 0
            except TimeoutError:
                await handle.cancel()
                quick = 0


@pytest.mark.parametrize("pair", [Serve], indirect=True)
async def test_a_worker_of_which_nothing_is_heard_is_called_in_turn_again(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = await pair.connect()
    full, handles = await fill(pair, connection)
    await until_avoided(connection, full)
    silent = pair.hosts[pair.ids().index(full)]
    await silent._reporter.close()
    for handle in handles:
        await handle.cancel()
    # It has places again, but nobody says so.
    served = {await connection.run_remote() for _ in range(8)}
    assert served == set(pair.ids()) - {full}
    monkeypatch.setattr(balance, "REPORT_VALID", 2.5)
    async with asyncio.timeout(20):
        while await connection.run_remote() != full:
            pass


@pytest.mark.parametrize("pair", [Serve], indirect=True)
async def test_a_worker_that_drains_gets_nothing_more_and_is_then_forgotten(pair: Pair) -> None:
    connection = await pair.connect()
    full, handles = await fill(pair, connection)
    leaving = pair.hosts[pair.ids().index(full)]
    pair.hosts.remove(leaving)
    async with asyncio.TaskGroup() as tasks:

        async def drain() -> None:
            tasks.create_task(leaving.drain())

        await pair.reported(lambda load: load.capacity == 0 and bool(load.partitions), drain)
        for handle in handles[1:]:  # so that it has places, by number
            await handle.cancel()
        async with asyncio.timeout(20):
            await until_avoided(connection, full)
            assert {await connection.run_remote() for _ in range(20)} == set(pair.ids())
        await pair.reported(lambda load: not load.partitions, handles[0].cancel)


@pytest.mark.parametrize("pair", [Front], indirect=True)
async def test_requests_of_one_key_meet_one_worker_of_each_chainlet(pair: Pair) -> None:
    first, second = await pair.connect(), await pair.connect()
    met = set()
    for number in range(24):
        with chains.affinity(f"session-{number}"):
            ways = [await connection.run_remote() for connection in (first, second) for _ in range(3)]
            ways.append(await (await first.submit()).result())
        assert len(set(ways)) == 1, "through both hops"
        met.add(ways[0])
    assert len({front for front, _ in met}) == 2
    assert len({serve for _, serve in met}) == 2


@pytest.mark.parametrize("pair", [Front], indirect=True)
async def test_a_chainlet_may_ask_for_affinity_itself(pair: Pair) -> None:
    connection = await pair.connect()
    served = {}
    for number in range(12):
        ways = [await connection.run_remote(f"user-{number}") for _ in range(6)]
        assert len({serve for _, serve in ways}) == 1
        served[number] = ways[0][1]
    assert len(set(served.values())) == 2


async def test_a_key_goes_through_every_hop_and_no_further_than_its_block(settings: dict[str, Any]) -> None:
    async with chains.run_chain(Keys, **settings) as keys:
        assert await keys.run_remote() == [None, None]
        with chains.affinity("a"):
            assert await keys.run_remote() == [b"a", b"a"]
            assert await keys.run_remote(b"b") == [b"b", b"b"]
            assert await (await keys.submit()).result() == [b"a", b"a"]
        assert await keys.run_remote() == [None, None]


async def test_what_is_hosted_inside_of_a_block_serves_others_without_its_key(settings: dict[str, Any]) -> None:
    with chains.affinity("of this block"):
        async with chains.run_chain(Keys, **settings) as keys:
            assert await keys.run_remote() == [b"of this block"] * 2
            with chains.affinity("another"):
                assert await keys.run_remote() == [b"another"] * 2


def calls_in_flight() -> float:
    return REGISTRY.get_sample_value("chains_calls_in_flight") or 0.0


async def test_no_more_run_at_once_than_predict_concurrency_says(settings: dict[str, Any]) -> None:
    Narrow.at_once = AtOnce()
    async with chains.run_chain(Narrow, **settings) as narrow:
        await asyncio.gather(*(narrow.run_remote() for _ in range(200)))
    assert Narrow.at_once.most == 5


async def test_the_gauge_of_calls_shows_those_that_wait(settings: dict[str, Any]) -> None:
    before = calls_in_flight()
    async with chains.run_chain(Serve, **settings | {"grace_period": 0.1}) as serve:
        for _ in range(3):
            await serve.run_remote()
        assert calls_in_flight() == before
        handles = [await serve.submit(hold=True) for _ in range(3)]
        assert calls_in_flight() == before + 3
        await handles[0].cancel()
        assert calls_in_flight() == before + 2
    assert calls_in_flight() == before


async def test_no_more_are_called_at_once_than_concurrency_limit_says(settings: dict[str, Any]) -> None:
    Limited.at_once, Wide.at_once, WideStream.at_once = AtOnce(), AtOnce(), AtOnce()
    async with chains.run_chain(Limited, **settings) as limited:
        await asyncio.gather(*(limited.run_remote() for _ in range(200)))
    assert Limited.at_once.most > 3, "more would have come"
    assert Wide.at_once.most == 3
    assert WideStream.at_once.most == 2
