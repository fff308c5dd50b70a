"""`run_local`: the same objects in one process, under the rules of the remote path."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

import chains_stream as chains
from chains_stream.errors import CallTimeoutError, InvalidArgumentError, InvalidResultError, MissingDependencyError
from tests.sample import Item, Leaf, Middle, Relay, Sample, SampleError, Seen


@pytest.fixture(autouse=True)
def nothing_seen() -> Iterator[None]:
    Seen.reset()
    yield
    Seen.reset()


async def test_dependencies_are_built_and_called() -> None:
    with chains.run_local():
        sample = Sample()
    assert await sample.run_remote([Item("a")], count=2) == [Item("A", 2), Item("counted", 0), Item("counted", 1)]


async def test_streams_run_too() -> None:
    with chains.run_local():
        relay = Relay()
    assert [chunk async for chunk in relay.run_remote(3)] == ["0;", "1;", "2;"]


def test_one_asyncio_run_after_another() -> None:
    with chains.run_local():
        sample = Sample()
        for _ in range(2):
            answer = asyncio.run(sample.run_remote([Item(str(n)) for n in range(40)]))
            assert len(answer) == 40


async def test_a_fake_is_used_as_it_is() -> None:
    class Fake:
        async def run_remote(self, items: list[Item], mode: str = "echo") -> list[Item]:
            return [Item(f"fake {mode}", len(items))]

    with chains.run_local():
        sample = Sample(middle=Fake())  # type: ignore[arg-type] # a fake need not be a Middle
    assert await sample.run_remote([Item("a"), Item("b")]) == [Item("fake echo", 2)]


async def test_types_are_those_of_the_remote_path() -> None:
    with chains.run_local():
        sample, leaf = Sample(), Leaf()
    with pytest.raises(InvalidArgumentError) as caught:
        await sample.run_remote([{"name": "a", "count": "many"}])  # type: ignore[list-item] # the mistake under test
    assert caught.value.path == "$.items[0].count"
    with pytest.raises(InvalidResultError):
        await leaf.run_remote(Item("a"), mode="wrong")


async def test_values_are_not_shared_between_caller_and_callee() -> None:
    class Changing(chains.ChainletBase):
        async def run_remote(self, numbers: list[int], more: list[int] = [1]) -> list[int]:  # noqa: B006 - under test
            numbers.append(0)
            more.append(2)
            return more

    mine = [5]
    with chains.run_local():
        changing = Changing()
    assert await changing.run_remote(mine) == [1, 2]
    assert await changing.run_remote(mine) == [1, 2]
    assert mine == [5]


async def test_retries_and_timeouts_hold() -> None:
    with chains.run_local():
        sample, middle = Sample(), Middle()
    assert await sample.run_remote([Item("twice", 2)], mode="flaky") == [Item("TWICE", 3)]
    with pytest.raises(CallTimeoutError):
        await middle.run_remote([Item("slow")], mode="hang")
    assert Seen.counts["slow stopped"] == 3


async def test_errors_keep_their_class() -> None:
    with chains.run_local():
        relay = Relay()
    with pytest.raises(SampleError):
        _ = [chunk async for chunk in relay.run_remote(2, fail_at=1)]


async def test_concurrency_is_what_the_chainlet_says() -> None:
    with chains.run_local():
        leaf = Leaf()
    tasks = [asyncio.ensure_future(leaf.run_remote(Item("busy"), mode="hang")) for _ in range(20)]
    await Seen.until("busy began", times=16)
    assert Seen.counts["busy began"] == 16
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def test_outside_of_run_local_a_dependency_says_how_to_run_it() -> None:
    relay = Relay()
    with pytest.raises(MissingDependencyError, match="run_local"):
        relay._counting.run_remote(1)


async def test_a_dependency_has_nothing_but_run_remote() -> None:
    """What would work here and fail remotely fails here."""
    with chains.run_local():
        relay = Relay()
    with pytest.raises(AttributeError, match="by `run_remote` alone"):
        relay._counting.remote_config  # noqa: B018 - the access is under test


def test_the_context_holds_what_run_local_was_given() -> None:
    class NeedsSecret(chains.ChainletBase):
        def __init__(self, context: chains.DeploymentContext = chains.depends_context()) -> None:
            self.token = context.secrets["token"]

        async def run_remote(self) -> str:
            return self.token

    with chains.run_local(secrets={"token": "s3cret"}):
        assert asyncio.run(NeedsSecret().run_remote()) == "s3cret"
    assert "s3cret" not in repr(chains.DeploymentContext(secrets={"token": "s3cret"}))


async def test_a_sync_run_remote_runs_in_a_thread() -> None:
    class Blocking(chains.ChainletBase):
        def run_remote(self, number: int) -> int:
            return number + 1

    with chains.run_local():
        blocking = Blocking()
    assert await blocking.run_remote(1) == 2  # type: ignore[misc] # a stub is always awaited


def test_mistakes_are_reported_when_the_chain_is_built() -> None:
    class Untyped(chains.ChainletBase):
        async def run_remote(self, value) -> str:  # type: ignore[no-untyped-def] # noqa: ANN001 - the mistake under test
            return str(value)

    class Above(chains.ChainletBase):
        def __init__(self, untyped: Untyped = chains.depends(Untyped), number: int = 1) -> None: ...

        async def run_remote(self) -> AsyncIterator[str]:
            return iter(())  # type: ignore[return-value] # the mistake under test

    with chains.run_local(), pytest.raises(chains.InvalidChainError) as caught:
        Above()
    assert len(caught.value.problems) == 3


async def test_a_shared_dependency_is_built_once() -> None:
    class Shared(chains.ChainletBase):
        def __init__(self) -> None:
            Seen.note("built")

        async def run_remote(self) -> int:
            return 1

    class Left(chains.ChainletBase):
        def __init__(self, shared: Shared = chains.depends(Shared)) -> None:
            self._shared = shared

        async def run_remote(self) -> int:
            return await self._shared.run_remote()

    class Both(chains.ChainletBase):
        def __init__(self, left: Left = chains.depends(Left), shared: Shared = chains.depends(Shared)) -> None:
            self._left, self._shared = left, shared

        async def run_remote(self) -> int:
            return await self._left.run_remote() + await self._shared.run_remote()

    with chains.run_local():
        both = Both()
    assert await both.run_remote() == 2
    assert Seen.counts["built"] == 1
