"""Deadlines, timeouts, and retries with backoff: the same for local, colocated and remote calls.

`Scope` is what one request carries through all its hops: its id, its deadline, its trace. It lives in a context
variable, so that a call made anywhere inside `run_remote`, in a task of its own too, belongs to the request that it
serves.
"""

import asyncio
import base64
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

import msgspec

from chains_stream.errors import (
    CallTimeoutError,
    ChainsError,
    ChainsUsageError,
    DeadlineExceededError,
    OverloadedError,
    is_retryable,
)
from chains_stream.log import get_logger
from chains_stream.messages import new_id, now_ms
from chains_stream.options import RPCOptions
from chains_stream.timeouts import Timeout

T = TypeVar("T")

BACKOFF_BASE = 0.05  # seconds before the second try, doubled for each further one
BACKOFF_CAP = 5.0  # seconds
MAX_AFFINITY_BYTES = 256

log = get_logger(__name__)


class Abandonable(Protocol):
    """Work started for a request, to be given up when the request ends first."""

    def close(self) -> None: ...


class Scope(msgspec.Struct, eq=False):
    """One request as it passes through this process. `deadline_ms` is Unix time.

    `emitted` are the chunks of a stream that other workers have sent, in the `attempt` before this one or earlier ones.
    Requests of one `affinity` go to one partition of each topic, and so to one worker, while it isn't overloaded.
    """

    request_id: str
    deadline_ms: int
    traceparent: bytes | None = None
    tracestate: bytes | None = None
    affinity: bytes | None = None
    attempt: int = 1
    emitted: tuple[Any, ...] = ()
    calls: set[Abandonable] = msgspec.field(default_factory=set)

    @classmethod
    def new(cls, seconds: float) -> "Scope":
        """Begin a request that has `seconds` until its deadline."""
        return cls(request_id=new_request_id(), deadline_ms=now_ms() + int(seconds * 1000))

    @property
    def remaining(self) -> float:
        """Seconds until the deadline; negative once it has passed."""
        return (self.deadline_ms - now_ms()) / 1000

    def of_a_call(self) -> "Scope":
        """Give the scope of a call made for this request that is served in this process too: it is no continuation."""
        return msgspec.structs.replace(self, attempt=1, emitted=()) if self.attempt > 1 else self

    def close(self) -> None:
        """Give up the calls that were started for this request and are still open."""
        for call in tuple(self.calls):
            call.close()


class Limit:
    """At most `size` at once, the others in line; usable from one event loop after another, as `run_local` is."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._semaphores: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()
        self._last: tuple[asyncio.AbstractEventLoop | None, asyncio.Semaphore] = (None, asyncio.Semaphore(0))

    def here(self) -> asyncio.Semaphore:
        """Give the semaphore of the running event loop."""
        loop = asyncio.get_running_loop()
        if self._last[0] is loop:
            return self._last[1]
        semaphore = self._semaphores.get(loop)
        if semaphore is None:
            semaphore = self._semaphores[loop] = asyncio.Semaphore(self._size)
        self._last = (loop, semaphore)
        return semaphore


current: ContextVar[Scope | None] = ContextVar("current", default=None)
# With the request in which it was asked for: a worker that was started inside of an `affinity` block inherits its
# context, and serves requests that have nothing to do with it.
_asked: ContextVar[tuple[Scope | None, bytes] | None] = ContextVar("asked", default=None)


class CurrentRequest(msgspec.Struct, frozen=True):
    """What `run_remote` may know of the request that it serves.

    Attributes:
        id: the same through all hops; the ``x-request-id`` of a gateway's answer.
        deadline: Unix time, in seconds, after which nobody waits for the answer.
        attempt: counts the workers that got this request, from 1.
        emitted: of a stream that is declared `resumable`: the chunks that earlier workers have sent. The reader has
            them, or will have: yield what comes after them.
    """

    id: str
    deadline: float
    attempt: int
    emitted: tuple[Any, ...]


def current_request() -> CurrentRequest:
    """Give the request that is being served; only inside `run_remote`. Raises ChainsUsageError anywhere else."""
    scope = current.get()
    if scope is None:
        raise ChainsUsageError("current_request() is for run_remote: no request is being served here")
    return CurrentRequest(scope.request_id, scope.deadline_ms / 1000, scope.attempt, scope.emitted)


def new_request_id() -> str:
    """Give an id that can't be guessed."""
    return base64.urlsafe_b64encode(new_id())[:22].decode()


def scope_or_new(seconds: float) -> Scope:
    """Give the scope for a call: of the request being served, or a new one with `seconds` until its deadline."""
    served, asked = current.get(), _asked.get()
    scope = served or Scope.new(seconds)
    if asked is None or asked[0] is not served:
        return scope
    return msgspec.structs.replace(scope, affinity=asked[1])  # it shares `calls`, and so ends with the request


@contextmanager
def affinity(key: str | bytes) -> Iterator[None]:
    """Send the calls made inside the block, and those made for them, to one worker of each Chainlet.

    Calls of one key meet the same worker for as long as the same workers are there; what it holds of a session, a cache
    say, is found again. It is a preference: a worker that goes, or one that comes, may move the key; and if as many
    requests wait for a worker as it runs at once, further ones go to another that has room.

    Args:
        key: 1 to 256 bytes, or a text of that length in UTF-8.

    Raises:
        ChainsUsageError: for another key.

    Example::

        with chains.affinity("session-42"):
            answer = await chain.run_remote("And then?")
    """
    token = _asked.set((current.get(), _checked(key)))
    try:
        yield
    finally:
        _asked.reset(token)


def _checked(key: str | bytes) -> bytes:
    if not isinstance(key, str | bytes):
        raise ChainsUsageError(f"an affinity key is text or bytes, and not {type(key).__name__}")
    try:
        found = key.encode() if isinstance(key, str) else key
    except UnicodeEncodeError:
        raise ChainsUsageError("an affinity key can be written in UTF-8, and this one can't") from None
    if not 0 < len(found) <= MAX_AFFINITY_BYTES:
        raise ChainsUsageError(f"an affinity key is 1 to {MAX_AFFINITY_BYTES} bytes long, and this one is {len(found)}")
    return found


async def call(one_try: Callable[[int], Awaitable[T]], options: RPCOptions, scope: Scope, name: str) -> T:
    """Run `one_try`, given the number of the try from 1, until it succeeds or trying again can't help.

    Raises what the last try raised, CallTimeoutError or DeadlineExceededError.
    """
    attempt = 1
    while True:
        try:
            with _Bound(options, scope, name):
                return await one_try(attempt)
        except Exception as error:  # noqa: BLE001 - raised again, unless the call is to be repeated
            await _backoff_or_raise(error, attempt, options, scope, name)
        attempt += 1


async def stream(
    one_try: Callable[[int], AsyncGenerator[T, None]], options: RPCOptions, scope: Scope, name: str
) -> AsyncGenerator[T, None]:
    """Yield the items of `one_try`; try again only while none has been handed on."""
    attempt = 1
    while True:
        handed_on = False
        try:
            async with aclosing(one_try(attempt)) as items:
                while True:
                    try:
                        with _Bound(options, scope, name):
                            item = await anext(items)
                    except StopAsyncIteration:
                        return
                    handed_on = True
                    yield item
        except Exception as error:
            if handed_on:
                raise
            await _backoff_or_raise(error, attempt, options, scope, name)
        attempt += 1


class _Bound(Timeout):
    """Bounds the wait for an answer, by what is left of the request's time and by `timeout_sec`.

    Raises CallTimeoutError and DeadlineExceededError; a TimeoutError of the user's own passes.
    """

    __slots__ = ("_name", "_options", "_remaining")

    def __init__(self, options: RPCOptions, scope: Scope, name: str) -> None:
        self._options = options
        self._name = name
        remaining = self._remaining = scope.remaining
        if remaining <= 0:
            raise self._late()
        super().__init__(min(options.timeout_sec, remaining))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            super().__exit__(kind, error, trace)
        except TimeoutError as over:
            timeout = self._options.timeout_sec
            if self._remaining <= timeout:
                raise self._late() from over
            raise CallTimeoutError(f"{self._name}: no answer within timeout_sec={timeout:g}") from over

    def _late(self) -> DeadlineExceededError:
        return DeadlineExceededError(f"{self._name}: the deadline of the request passed")


async def _backoff_or_raise(error: Exception, attempt: int, options: RPCOptions, scope: Scope, name: str) -> None:
    """Wait before the next try, or raise `error` if there is to be none."""
    if attempt >= options.retries or not is_retryable(error):
        raise error
    delay = backoff(attempt)
    if isinstance(error, OverloadedError) and error.retry_after is not None:
        delay = max(delay, error.retry_after)
    if delay >= scope.remaining:
        raise error
    log.info("retry", call=name, attempt=attempt, of=options.retries, delay=round(delay, 3), error=_brief(error))
    await asyncio.sleep(delay)


def backoff(attempt: int) -> float:
    """Seconds to wait after try number `attempt`: exponential with full jitter.

    Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """
    return random.uniform(0, min(BACKOFF_CAP, BACKOFF_BASE * 2 ** (attempt - 1)))  # noqa: S311 - spreads load, no secret


def _brief(error: Exception) -> str:
    return error.code if isinstance(error, ChainsError) else type(error).__name__
