"""A command as a process: its event loop, its signals, and an orderly end."""

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from types import FrameType, TracebackType
from typing import Any, NamedTuple, Self

from chains_stream.broker import Broker
from chains_stream.brokers import open_broker
from chains_stream.calls import Caller
from chains_stream.cli.lag import watch_loop
from chains_stream.cli.report import StoppedError, report
from chains_stream.client import open_caller
from chains_stream.errors import BrokerError, ChainsRuntimeError
from chains_stream.log import get_logger
from chains_stream.settings import Settings
from chains_stream.store import place_of

BROKER_TIMEOUT = 30.0  # seconds to reach the broker and make the topics that every process needs
MAX_THREADS = 1000  # for `asyncio.to_thread` in Chainlets; started as needed, and bounded by `predict_concurrency`
_THREADS = "chains-thread"
_THREADS_GRACE = 1.0  # seconds for a synchronous Chainlet's thread, after everything else has ended

log = get_logger(__name__)


class Signals:
    """Turns the first SIGINT or SIGTERM into a request to stop; a second one ends the process at once.

    Attributes:
        received: the number of the first signal.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._stopped = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> Self:
        # Not the event loop's own handlers: these also run while a Chainlet's `__init__` keeps the loop from turning.
        self._before = {number: signal.signal(number, self._take) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def name(self) -> str:
        return signal.Signals(self.received).name if self.received is not None else "none"

    async def wait(self) -> None:
        await self._stopped.wait()

    def stop(self, number: int) -> None:
        """Do as if the signal had come, unless one has."""
        if self.received is None:
            self.received = number
            self._stopped.set()

    def _take(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = number
        self._loop.call_soon_threadsafe(self._stopped.set)


def run(work: Callable[[Signals], Coroutine[Any, Any, None]]) -> None:
    """Run `work` in an event loop, with the signals in its hands. Raises what it raises.

    A thread that is still busy when all else has ended, with a synchronous Chainlet that nothing can stop, does not
    keep the process alive.
    """

    async def main() -> None:
        with Signals() as signals:
            await work(signals)

    threads = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix=_THREADS)
    with asyncio.Runner(loop_factory=_event_loop) as runner:
        runner.get_loop().set_default_executor(threads)
        try:
            runner.run(_uncancelled(main()))
        except Exception as error:
            if _busy(threads):
                _leave(report(error))
            raise
        if _busy(threads):
            _leave(0)


def _event_loop() -> asyncio.AbstractEventLoop:
    """Make the faster event loop, where there is one for this platform."""
    try:
        import uvloop  # late, as it is heavy, and not there on every platform
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


async def _uncancelled(work: Coroutine[Any, Any, None]) -> None:
    """Run `work`, which nobody cancels: what comes out of it as a cancellation is a mistake in something below."""
    try:
        await work
    except asyncio.CancelledError as error:
        raise ChainsRuntimeError("the command was cancelled from within") from error


def _busy(threads: ThreadPoolExecutor) -> bool:
    """Let the threads end, and tell whether one has not."""
    threads.shutdown(wait=False, cancel_futures=True)
    end = time.monotonic() + _THREADS_GRACE
    ours = [thread for thread in threading.enumerate() if thread.name.startswith(_THREADS)]
    for thread in ours:
        thread.join(max(0.0, end - time.monotonic()))
    return any(thread.is_alive() for thread in ours)


def _leave(status: int) -> None:
    """Exit without waiting for threads, which the interpreter would do."""
    log.warning("thread.abandoned", reason="a synchronous run_remote was still running")
    sys.stdout.flush()
    os._exit(status)


async def until_stopped(work: Coroutine[Any, Any, None], signals: Signals) -> None:
    """Run `work`; the first signal cancels it, and StoppedError tells so."""
    task, stopped = asyncio.create_task(work), asyncio.create_task(signals.wait())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            assert signals.received is not None, "one of the two is done"
            raise StoppedError(signals.received)
        task.result()
    finally:
        await end(task, stopped)


class Serving(NamedTuple):
    """What a server hands to `serve` once it is ready: the lines to print, and a wait for what ends it from within."""

    ready: str
    failed: Callable[[], Awaitable[None]]


def print_line(text: str) -> None:
    """Write to stdout at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


async def serve(
    start: Callable[[AsyncExitStack], Coroutine[Any, Any, Serving]],
    signals: Signals,
    announce: Callable[[str], None] = print_line,
) -> None:
    """Start a server, say that it is ready, and keep it until a signal; then end it in order, through its stack.

    Raises what kept it from starting, or from going on.
    """
    stopped = asyncio.create_task(signals.wait())
    failed: asyncio.Task[None] | None = None
    watch: asyncio.Task[None] | None = None
    try:
        async with AsyncExitStack() as stack:
            serving = await _started(start(stack), stopped, signals)
            if serving is None:
                return
            announce(serving.ready)
            failed = asyncio.ensure_future(serving.failed())
            watch = asyncio.create_task(watch_loop(), name="loop lag")  # not before: models may load for minutes
            await asyncio.wait({failed, watch, stopped}, return_when=asyncio.FIRST_COMPLETED)
            for ended in (failed, watch):
                if ended.done():
                    ended.result()
            log.info("stopping", signal=signals.name, reason="what runs may finish; a second signal ends it at once")
        log.info("stopped")
    finally:
        # Only now: workers that lose their watcher stop, and answers that the gateway still waits for come from them.
        await end(stopped, failed, watch)


async def _started(
    start: Coroutine[Any, Any, Serving], stopped: "asyncio.Task[None]", signals: Signals
) -> Serving | None:
    """Wait for the start to be complete; None if it was given up for a signal."""
    starting = asyncio.create_task(start)
    try:
        await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            return starting.result()
        # Now, as a model that is being loaded may take its time to stop.
        log.info("stopping", signal=signals.name, reason="before all was ready; a second signal ends it at once")
        return None
    finally:
        await end(starting)


async def end(*tasks: "asyncio.Future[Any] | None") -> None:
    """Cancel tasks and wait for their end; what they raise no longer matters to anybody."""
    ending = [task for task in tasks if task is not None]
    for task in ending:
        task.cancel()
    await asyncio.gather(*ending, return_exceptions=True)


async def connect(stack: AsyncExitStack, settings: Settings) -> tuple[Broker, Caller]:
    """Connect to the broker, and start this process's caller. Raises BrokerError, within `BROKER_TIMEOUT`."""
    broker = open_broker(settings)
    place_of(settings)  # a mistake is told before the broker is waited for
    stack.push_async_callback(broker.close)
    async with patience(broker):
        await broker.start()
        caller = await open_caller(stack, broker, settings)
    return broker, caller


@asynccontextmanager
async def connected(settings: Settings) -> AsyncIterator[Broker]:
    """Connect to the broker, for the length of the block. Raises BrokerError, within `BROKER_TIMEOUT`."""
    broker = open_broker(settings)
    try:
        async with patience(broker):
            await broker.start()
        yield broker
    finally:
        await broker.close()


@asynccontextmanager
async def patience(broker: Broker) -> AsyncIterator[None]:
    """Let the block wait for the broker at most `BROKER_TIMEOUT`, then raise BrokerError."""
    limit = asyncio.timeout(BROKER_TIMEOUT)
    try:
        async with limit:
            yield
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise BrokerError(f"{broker.url}: the broker was not ready within {BROKER_TIMEOUT:g} s") from error
