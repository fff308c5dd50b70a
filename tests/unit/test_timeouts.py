"""Bounds on waiting: what `asyncio.timeout` promises, without its timer."""

import asyncio

import pytest

from chains_stream.timeouts import FAR, Timeout, _far_of


@pytest.mark.parametrize("seconds", [0.02, 0.0, -1.0])
async def test_a_block_that_waits_too_long_is_ended(seconds: float) -> None:
    bound = Timeout(seconds)
    with pytest.raises(TimeoutError), bound:
        await asyncio.Event().wait()
    assert bound.expired()


@pytest.mark.parametrize("brief", [False, True])
async def test_one_that_is_far_ends_at_its_time_and_not_with_its_second(*, brief: bool) -> None:
    clock = asyncio.get_running_loop().time
    began = clock()
    with pytest.raises(TimeoutError), Timeout(FAR + 0.3, brief=brief):
        await asyncio.Event().wait()
    assert clock() - began >= FAR + 0.3


async def test_many_that_are_far_end_each_at_its_own_time() -> None:
    clock = asyncio.get_running_loop().time
    ended: list[tuple[float, float]] = []

    async def wait(seconds: float) -> None:
        due = clock() + seconds
        try:
            with Timeout(seconds):
                await asyncio.Event().wait()
        except TimeoutError:
            ended.append((due, clock()))

    # The later ones first: an earlier second than the one that is waited for must be noticed.
    await asyncio.gather(*[wait(FAR + 0.1 * at) for at in reversed(range(1, 16))])
    assert [due for due, _ in ended] == sorted(due for due, _ in ended)
    assert all(due <= at for due, at in ended)


async def test_a_block_that_ends_in_time_is_left_alone() -> None:
    for seconds in (0.05, FAR + 1, float("inf")):
        bound = Timeout(seconds)
        with bound:
            await asyncio.sleep(0)
        assert not bound.expired()
    await asyncio.sleep(0.1)  # nothing is cancelled afterwards
    assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr] # a test is a task


async def test_it_can_be_ended_before_its_time() -> None:
    bound = Timeout(600)
    asyncio.get_running_loop().call_soon(bound.expire)
    with pytest.raises(TimeoutError), bound:
        await asyncio.Event().wait()


async def test_a_cancellation_from_outside_stays_one() -> None:
    async def bounded() -> None:
        with Timeout(600):
            await asyncio.Event().wait()

    task = asyncio.create_task(bounded())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancellation_from_outside_wins_over_the_end_of_the_time() -> None:
    async def bounded() -> None:
        bound = Timeout(600)
        with bound:
            asyncio.get_running_loop().call_soon(bound.expire)
            await asyncio.Event().wait()

    task = asyncio.create_task(bounded())
    await asyncio.sleep(0)  # it waits, and its end is due with the next turn
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_the_inner_of_two_ends_first_and_the_outer_goes_on() -> None:
    with Timeout(600):
        with pytest.raises(TimeoutError), Timeout(0.01):
            await asyncio.Event().wait()
        await asyncio.sleep(0)


async def test_a_timeout_error_of_the_block_itself_passes() -> None:
    bound = Timeout(600)
    with pytest.raises(TimeoutError, match="its own"), bound:
        raise TimeoutError("its own")
    assert not bound.expired()


@pytest.mark.parametrize("brief", [False, True])
async def test_nothing_is_kept_of_those_that_ended(*, brief: bool) -> None:
    bounds = [Timeout(FAR + at, brief=brief) for at in range(1, 50)]
    for bound in bounds:
        with bound:
            await asyncio.sleep(0)
    with Timeout(FAR + 5, brief=brief):
        await asyncio.sleep(0)
        assert sum(map(len, _far_of(asyncio.get_running_loop())._seconds.values())) == 1


async def test_a_brief_block_that_waits_for_nothing_has_a_place_nowhere() -> None:
    bound = Timeout(FAR + 1, brief=True)
    for _ in range(2):  # it may be used again
        with bound:
            pass
        with Timeout(FAR + 1, brief=True) as other:
            await asyncio.sleep(0)
            assert bound._far is None
            assert other._far is not None
        with bound:
            await asyncio.sleep(0)
            assert bound._far is not None


def test_one_loop_after_another() -> None:
    async def wait() -> None:
        with pytest.raises(TimeoutError), Timeout(0.01):
            await asyncio.Event().wait()
        with Timeout(FAR + 1):
            await asyncio.sleep(0)

    for _ in range(3):
        asyncio.run(wait())
