"""Retries, timeouts and deadlines, on work that needs no broker."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from chains_stream import policy
from chains_stream.errors import (
    CallTimeoutError,
    ChainsUsageError,
    DeadlineExceededError,
    InvalidArgumentError,
    OverloadedError,
    WorkerLostError,
)
from chains_stream.options import RPCOptions
from chains_stream.policy import Scope


class HttpError(Exception):
    def __init__(self, status_code: int) -> None:
        super().__init__(status_code)
        self.status_code = status_code


class DoNotRepeat(Exception):  # noqa: N818 - a user's name
    retryable = False


async def tries_of(error: Exception, retries: int = 3) -> int:
    """Count the tries of a call that always raises `error`."""
    tries = 0

    async def one_try(attempt: int) -> None:
        nonlocal tries
        tries += 1
        assert attempt == tries
        raise error

    with pytest.raises(type(error)) as caught:
        await policy.call(one_try, RPCOptions(retries=retries), Scope.new(60), "it")
    assert caught.value is error
    return tries


@pytest.mark.parametrize(
    "error", [ValueError("the user's own"), WorkerLostError("gone"), HttpError(503), HttpError(429), HttpError(408)]
)
async def test_what_may_pass_is_tried_again(error: Exception) -> None:
    assert await tries_of(error) == 3


@pytest.mark.parametrize("error", [InvalidArgumentError("no"), HttpError(404), HttpError(422), DoNotRepeat()])
async def test_what_cannot_succeed_is_tried_once(error: Exception) -> None:
    assert await tries_of(error) == 1


async def test_retries_count_attempts_in_all() -> None:
    assert await tries_of(ValueError(), retries=1) == 1


async def test_cancellation_is_never_retried() -> None:
    tries = 0

    async def one_try(_attempt: int) -> None:
        nonlocal tries
        tries += 1
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await policy.call(one_try, RPCOptions(retries=3), Scope.new(60), "it")
    assert tries == 1


async def test_a_timeout_bounds_one_try() -> None:
    attempts: list[int] = []

    async def one_try(attempt: int) -> str:
        attempts.append(attempt)
        if attempt < 3:
            await asyncio.Event().wait()
        return "at last"

    assert await policy.call(one_try, RPCOptions(retries=3, timeout_sec=0.02), Scope.new(60), "it") == "at last"
    assert attempts == [1, 2, 3]


async def test_the_users_own_timeout_error_stays_theirs() -> None:
    assert await tries_of(TimeoutError("their database"), retries=2) == 2


async def test_the_deadline_ends_all_tries() -> None:
    async def one_try(_attempt: int) -> None:
        await asyncio.Event().wait()

    with pytest.raises(DeadlineExceededError):
        await policy.call(one_try, RPCOptions(retries=100, timeout_sec=600), Scope.new(0.05), "it")


async def test_a_timeout_is_told_from_the_deadline() -> None:
    async def one_try(_attempt: int) -> None:
        await asyncio.Event().wait()

    with pytest.raises(CallTimeoutError, match=r"it: no answer within timeout_sec=0\.02"):
        await policy.call(one_try, RPCOptions(timeout_sec=0.02), Scope.new(60), "it")


async def test_no_try_begins_when_the_deadline_would_pass_before_it() -> None:
    tries = 0

    async def one_try(_attempt: int) -> None:
        nonlocal tries
        tries += 1
        raise OverloadedError("full", retry_after=30)

    with pytest.raises(OverloadedError):
        await policy.call(one_try, RPCOptions(retries=5), Scope.new(10), "it")
    assert tries == 1


async def test_a_stream_gap_is_bounded_and_the_generator_closed() -> None:
    closed = asyncio.Event()

    async def one_try(_attempt: int) -> AsyncGenerator[int, None]:
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            closed.set()

    got = []
    with pytest.raises(CallTimeoutError):
        async for item in policy.stream(one_try, RPCOptions(retries=3, timeout_sec=0.02), Scope.new(60), "it"):
            got.append(item)  # noqa: PERF401 - what came before the error
    assert got == [1]
    assert closed.is_set()


def test_backoff_grows_and_is_bounded() -> None:
    for attempt in range(1, 40):
        ceiling = min(policy.BACKOFF_CAP, policy.BACKOFF_BASE * 2 ** (attempt - 1))
        assert all(0 <= policy.backoff(attempt) <= ceiling for _ in range(50))


def test_affinity_is_of_the_calls_in_its_block() -> None:
    assert policy.scope_or_new(60).affinity is None
    with policy.affinity("session-42"):
        assert policy.scope_or_new(60).affinity == b"session-42"
        with policy.affinity(b"\xff" * 256):
            assert policy.scope_or_new(60).affinity == b"\xff" * 256
        assert policy.scope_or_new(60).affinity == b"session-42"
    assert policy.scope_or_new(60).affinity is None


def test_affinity_leaves_the_request_that_is_served_as_it_is() -> None:
    served = Scope.new(60)
    token = policy.current.set(served)
    try:
        with policy.affinity("k"):
            scope = policy.scope_or_new(5)
            assert (scope.request_id, scope.deadline_ms, scope.affinity) == (
                served.request_id,
                served.deadline_ms,
                b"k",
            )
            assert scope.calls is served.calls, "the call is given up when the request ends"
        assert policy.scope_or_new(5) is served
        assert served.affinity is None
    finally:
        policy.current.reset(token)


@pytest.mark.parametrize("key", ["", b"", "x" * 257, "\N{EURO SIGN}" * 86, "\udcff", 42, None])
def test_a_wrong_affinity_key_is_refused(key: Any) -> None:
    with pytest.raises(ChainsUsageError, match="an affinity key"), policy.affinity(key):
        pass
