"""Holding all events of a Chainlet back while none succeeds, and telling whose fault a failure is."""

from collections.abc import Iterator
from contextlib import contextmanager

from chains_stream.errors import message_of
from chains_stream.log import get_logger

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

    def begin(self) -> int:
        """Count a run; give its number."""
        self.begun += 1
        return self.begun

    def succeeded(self, run: int) -> None:
        self._succeeded = max(self._succeeded, run)
        if self.open:
            self.open = False
            log.info("events.go_on", chainlet=self._name)
        self._tries = 0

    def blames(self, failed: int) -> bool:
        """Tell whether an event is itself to blame for its failures, the first of them when `failed` runs had begun.

        What had begun before may have had what they all depend on when it was still there, and tells nothing.
        """
        return self._succeeded > max(failed, self._opened)

    def may_try(self, running: int) -> bool:
        """While it is open: tell whether one more event may begin, as a trial, of which there is one at a time.

        If it succeeds, those that wait are themselves to blame. Once enough have failed, none is needed.
        """
        return running <= self.waiting < MOST_FAILING

    @contextmanager
    def pause(self, error: Exception) -> Iterator[float]:
        """Count an event that failed for no fault of its own as waiting; give for how long, in seconds."""
        if not self.open:
            self.open = True
            self._opened = self.begun
            log.warning("events.paused", chainlet=self._name, reason=message_of(error))
        self._tries += 1
        self.waiting += 1
        self.reason = message_of(error)
        try:
            yield min(LONGEST_PAUSE, SHORTEST_PAUSE * 2 ** min(self._tries, 10))
        finally:
            self.waiting -= 1
