"""Holding all events of a Chainlet back while none succeeds, and telling whose fault a failure is."""

import asyncio
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager, suppress

from chains_stream.errors import (
    BrokerError,
    ChainsRuntimeError,
    InvalidArgumentError,
    InvalidResultError,
    RecordTooLargeError,
    SchemaRegistryError,
    UnknownSchemaError,
    causes,
    message_of,
)
from chains_stream.log import get_logger
from chains_stream.metrics import EVENTS_PAUSED

SHORTEST_PAUSE, LONGEST_PAUSE = 0.1, 30.0  # seconds between two tries while all events fail: twice as long each time
MOST_FAILING = 16  # events that are tried before it counts as certain that all fail

log = get_logger(__name__)


class Breaker:
    """A circuit breaker (M. Nygard, Release It!, 2007).

    Attributes:
        begun: runs of events so far: each is known by its number.
        open: whether it holds back.
        reason: what the last event failed of that it holds back.
        waiting: events that have failed, and wait for their next try.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.begun = 0
        self.open = False
        self.reason = ""
        self.waiting = 0
        self._succeeded = 0  # the last run to begin of those that succeeded
        self._opened = 0  # what had begun by then
        self._tries = 0
        self._aside = 0  # events that were put aside in a row
        self._next_aside = 0.0  # by `time.monotonic`: when another one may be
        self._closed = asyncio.Event()
        self._ended = False  # nothing comes after what has begun, or waits to
        self._metric = EVENTS_PAUSED.labels(name)

    def begin(self) -> int:
        """Count a run; give its number."""
        self.begun += 1
        return self.begun

    def succeeded(self, run: int) -> None:
        self._succeeded = max(self._succeeded, run)
        if self.open:
            self._close()
            log.info("events.go_on", chainlet=self._name)
        self._tries = self._aside = 0

    def blames(self, failed: int) -> bool:
        """Tell whether an event is itself to blame for its failures, the first of them when `failed` runs had begun.

        What had begun before may have had what they all depend on when it was still there, and tells nothing.
        """
        return self._ended or self._succeeded > max(failed, self._opened)

    def end(self) -> bool:
        """Have those that wait, after which nothing comes, tried once more, and blame each for what it fails of then.

        False if none has ever succeeded, which would show that what they depend on was there.
        """
        if self._succeeded:
            self._ended = True
            self._close()
        return self._ended

    def may_put_aside(self) -> bool:
        """Tell whether one more event may be put aside whose error does not tell whose fault it is; it counts as such.

        Once many in a row were, and none succeeded, what they depend on may be away, or their code be wrong: from then
        on one may be after a pause. So few are put aside in vain, and bad ones in a row hold nobody up for ever.
        """
        beyond = self._aside + 1 - MOST_FAILING
        if beyond > 0 and time.monotonic() < self._next_aside:
            return False
        self._aside += 1
        self._next_aside = time.monotonic() + _pause(beyond)
        return True

    def may_try(self, running: int) -> bool:
        """While it is open: tell whether one more event may begin, as a trial, of which there is one at a time.

        If it succeeds, those that wait are themselves to blame. Once enough have failed, none is needed.
        """
        return running <= self.waiting < MOST_FAILING

    @contextmanager
    def pause(self, error: BaseException) -> Iterator[Awaitable[None]]:
        """Count an event that failed for no fault of its own as waiting; give what it has to wait for."""
        if not self.open:
            self.open = True
            self._metric.set(1)
            self._closed.clear()
            self._opened = self.begun
            then = {}
            if self._aside >= MOST_FAILING:
                then = {"aside": self._aside, "then": f"one is put aside every {LONGEST_PAUSE:g} s until one succeeds"}
            log.warning("events.paused", chainlet=self._name, reason=message_of(error), **then)
        self._tries += 1
        self.waiting += 1
        self.reason = message_of(error)
        try:
            yield self._goes_on(_pause(self._tries))
        finally:
            self.waiting -= 1

    def _close(self) -> None:
        self.open = False
        self._metric.set(0)
        self._closed.set()

    async def _goes_on(self, seconds: float) -> None:
        """Wait until one succeeds, for so long at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._closed.wait()


def _pause(number: int) -> float:
    return min(LONGEST_PAUSE, SHORTEST_PAUSE * 2.0 ** max(0, min(number, 10)))


# What these say of a file, they say of one that the event names, far more often than of a disk that is gone.
_OF_FILES = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


def of_others(error: BaseException) -> bool:
    """Tell whether an error is, or came of, one of something that the Chainlet depends on, and not of the event.

    A library's own class of errors mostly came of an OSError, that of a connection say.
    """
    return any(
        isinstance(each, OSError | TimeoutError | ChainsRuntimeError)
        and not isinstance(each, (InvalidArgumentError, InvalidResultError, RecordTooLargeError, *_OF_FILES))
        for each in causes(error)
    )


def of_the_topics(error: BaseException) -> bool:
    """Tell whether what is written can't be written by anybody, until a right or a topic, say, is there."""
    return isinstance(error, BrokerError | SchemaRegistryError) and not isinstance(
        error, RecordTooLargeError | UnknownSchemaError
    )
