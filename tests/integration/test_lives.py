"""Chainlets that have something to begin and to end: entered and exited by whoever hosts them, and dying in order."""

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import pytest

import chains_stream as chains
from chains_stream.client import Connection
from chains_stream.errors import ChainsRuntimeError, ChainsUsageError, DeadLetteredError
from tests.sample import Seen

WIDE = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=8))


@pytest.fixture(params=["memory", pytest.param("kafka", marks=pytest.mark.kafka)])
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    broker = "memory://" if request.param == "memory" else str(request.getfixturevalue("kafka_url"))
    return {"broker": broker, "namespace": f"t{uuid4().hex[:10]}", "partitions": 2, "reply_partitions": 2}


@pytest.fixture(autouse=True)
def nothing_seen() -> Iterator[None]:
    Seen.reset()
    yield
    Seen.reset()


class Engine(chains.ChainletBase):
    """Notes when it is entered and exited; dies when it is asked to."""

    remote_config = WIDE
    made = 0

    def __init__(self) -> None:
        type(self).made += 1
        self._number = type(self).made
        self._open = False
        self._dead = asyncio.Event()

    async def __aenter__(self) -> Self:
        await asyncio.sleep(0)
        self._open = True
        Seen.note("entered")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.sleep(0)
        self._open = False
        Seen.note("exited")

    async def failed(self) -> None:
        await self._dead.wait()
        raise RuntimeError("the engine core is gone")

    async def run_remote(self, command: str = "", *, first: int = 0) -> int:
        assert self._open
        if command == "hold":
            Seen.note("holds")
            await Seen.until("go")
        if command == "die" and first in (0, self._number):
            self._dead.set()
            Seen.note("died")
            raise ConnectionError("no answer from the engine core")
        return self._number


class Front(chains.ChainletBase):
    """Calls the one that has a life."""

    remote_config = WIDE

    def __init__(self, engine: Engine = chains.depends(Engine, colocated=True)) -> None:
        self._engine = engine

    async def run_remote(self, command: str = "", *, first: int = 0) -> int:
        return await self._engine.run_remote(command, first=first)


@pytest.mark.parametrize("entrypoint", [Engine, Front])
async def test_it_is_entered_before_the_first_request_and_exited_after_the_last(
    settings: dict[str, Any], entrypoint: type[Any]
) -> None:
    chain: Connection[..., Any]
    async with chains.run_chain(entrypoint, **settings) as chain:
        assert Seen.counts["entered"] == 1
        await asyncio.gather(*(chain.run_remote() for _ in range(5)))
        held = await chain.submit("hold")  # type: ignore[arg-type] # of a class that a parameter names
        await Seen.until("holds")
        assert (Seen.counts["entered"], Seen.counts["exited"]) == (1, 0)
        Seen.note("go")
        await held.result()
    assert (Seen.counts["entered"], Seen.counts["exited"]) == (1, 1)


def test_run_local_enters_it_once_a_loop() -> None:
    with chains.run_local():
        front = Front()
        for times in (1, 2):

            async def ask() -> None:
                await asyncio.gather(*(front.run_remote() for _ in range(5)))

            asyncio.run(ask())
            assert (Seen.counts["entered"], Seen.counts["exited"]) == (times, times)


async def test_one_that_is_never_called_locally_is_not_entered() -> None:
    with chains.run_local():
        Front()
    assert Seen.counts["entered"] == 0


class Broken(Engine):
    """Can't be entered."""

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        await self.__aexit__(None, None, None)
        raise ChainsUsageError("/models/llama: no such folder")


class Unreachable(Engine):
    """Can't be entered, which is nobody's mistake here."""

    async def __aenter__(self) -> Self:
        raise ChainsRuntimeError("no answer from its server")


async def test_what_a_start_fails_of_is_told_from_a_mistake(settings: dict[str, Any]) -> None:
    chain: type[Any] = Unreachable
    with pytest.raises(ChainsRuntimeError, match=r"^Unreachable can't start: no answer from its server$"):
        async with chains.run_chain(chain, **settings):
            pass


class Above(chains.ChainletBase):
    """Is built after two others, of which one can't be entered."""

    def __init__(self, engine: Engine = chains.depends(Engine), broken: Broken = chains.depends(Broken)) -> None: ...

    async def run_remote(self) -> None: ...


async def test_one_that_cannot_be_entered_says_why_and_the_others_are_exited(settings: dict[str, Any]) -> None:
    with pytest.raises(ChainsUsageError, match=r"^Broken can't start: /models/llama: no such folder$"):
        async with chains.run_chain(Above, **settings):
            pass
    assert (Seen.counts["entered"], Seen.counts["exited"]) == (2, 2)


class Clinging(Engine):
    """Can't be exited."""

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await super().__aexit__(kind, error, trace)
        raise ValueError("still in use")


@pytest.mark.parametrize("entrypoint", [Engine, Clinging])
async def test_a_dead_one_ends_its_host_even_if_it_cannot_be_exited(
    settings: dict[str, Any], entrypoint: type[Any]
) -> None:
    chain: Connection[..., Any]
    async with chains.run_chain(entrypoint, **settings) as chain, asyncio.timeout(10):
        while True:
            with pytest.raises((ChainsRuntimeError, ConnectionError), match="engine core") as caught:
                await chain.run_remote("die")  # type: ignore[arg-type] # of a class that a parameter names
            if str(caught.value) == f"{entrypoint.__name__} can't serve any more: the engine core is gone":
                break
    assert Seen.counts["exited"] == 1


class Over(chains.ChainletBase):
    """Stands over two that are exited, one of which fails at it."""

    def __init__(self, engine: Engine = chains.depends(Engine), last: Clinging = chains.depends(Clinging)) -> None: ...

    async def run_remote(self) -> None: ...


async def test_one_that_cannot_be_exited_is_named_and_the_others_are_exited(settings: dict[str, Any]) -> None:
    with pytest.raises(ChainsRuntimeError, match=r"^Clinging\.__aexit__ failed: ValueError: still in use$"):
        async with chains.run_chain(Over, **settings) as chain:
            await chain.run_remote()
    assert (Seen.counts["entered"], Seen.counts["exited"]) == (2, 2)


async def test_a_local_call_of_one_that_cannot_be_entered_says_why() -> None:
    with chains.run_local():
        broken = Broken()
    for _ in range(2):
        with pytest.raises(ChainsUsageError, match="no such folder"):
            await broken.run_remote()


async def test_a_dead_one_ends_its_host(settings: dict[str, Any]) -> None:
    async with chains.run_chain(Front, **settings) as chain:
        with pytest.raises((ChainsRuntimeError, ConnectionError), match=r"engine core"):
            await chain.run_remote("die")
        async with asyncio.timeout(10):
            while True:
                with pytest.raises((ChainsRuntimeError, ConnectionError), match="engine core") as caught:
                    await chain.run_remote("die")
                if "can't serve any more" in str(caught.value):
                    break
    assert Seen.counts["exited"] == 1


@pytest.mark.kafka
@pytest.mark.parametrize("entrypoint", [Engine, Front])
async def test_what_fails_with_a_dead_one_is_run_by_another(kafka_url: str, entrypoint: type[Any]) -> None:
    settings: dict[str, Any] = {"broker": kafka_url, "namespace": f"t{uuid4().hex[:10]}", "partitions": 2}
    first = Engine.made + 1
    client: Connection[..., Any]
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(
            chains.connect(kafka_url, entrypoint, namespace=settings["namespace"], partitions=2)
        )
        async with chains.run_chain(entrypoint, **settings):
            handles = [await client.submit("die", first=first) for _ in range(6)]
            await Seen.until("died", times=6)
        await stack.enter_async_context(chains.run_chain(entrypoint, **settings))
        async with asyncio.timeout(60):
            assert {await handle.result() for handle in handles} == {first + 1}


@pytest.mark.kafka
async def test_a_request_that_kills_every_engine_is_put_aside(kafka_url: str) -> None:
    settings: dict[str, Any] = {"broker": kafka_url, "namespace": f"t{uuid4().hex[:10]}", "partitions": 1}
    async with chains.connect(kafka_url, Engine, namespace=settings["namespace"], partitions=1) as client:
        deadly = asyncio.create_task((await client.submit("die")).result())
        for killed in range(1, 6):  # two until it is suspected, and as many as `max_deliveries` by default alone
            async with chains.run_chain(Engine, **settings), asyncio.timeout(30):
                await Seen.until("died", times=killed)
        async with chains.run_chain(Engine, **settings), asyncio.timeout(30):
            with pytest.raises(DeadLetteredError, match="3 workers died"):
                await deadly
            assert await client.run_remote() == Engine.made
    assert Seen.counts["died"] == 5
