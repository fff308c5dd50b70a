"""The events that a worker has taken, in the order of their keys."""

import asyncio
import contextvars
import functools
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence

from chains_stream.assignment import Assignment
from chains_stream.broker import Record
from chains_stream.errors import BrokerError
from chains_stream.event_service import Keyed, Storing
from chains_stream.offsets import Ledger
from chains_stream.outcome import Stop
from chains_stream.transactions import Unsent

WAITING = 1_000  # events that are taken, running or in the line of their key: as many as a ledger can tell of
SHORTEST_LINE = 16  # of those that may stand in the line of one key, however many partitions there are

Lane = tuple[int, bytes]  # a partition, and a key in it


class EventJob:
    """One event that is taken, until all that it gives is stored."""

    # What most events keep, in the class: to set it for each would cost more than all else here.
    task: "asyncio.Task[None] | None" = None  # that runs it now
    stop: Stop | None = None
    attempt = 1
    number = 0  # of its last run
    failed = 0  # how many runs had begun when it failed first
    storing = 0  # of what it gave, in its last run
    error: BaseException | None = None  # met in storing it
    stored: "asyncio.Future[None] | None" = None  # for who waits until that is over
    placed = False  # it has one of the places
    put_off = False  # to be tried again later
    unsent: Sequence[Unsent] = ()  # that the transaction of its offset is to hold

    def __init__(self, record: Record, ledger: Ledger, keyed: Keyed | None = None) -> None:
        key = record.key if keyed is None else keyed.key
        self.record = record
        self.ledger = ledger
        self.lane: Lane | None = None if key is None else (record.partition, key)
        self.keyed = keyed  # until it is run
        self.id = f"{record.topic}/{record.partition}/{record.offset}"

    def cancel(self, stop: Stop) -> None:
        if self.stop is None:
            self.stop = stop
            if self.task is not None:
                self.task.cancel()


class Lines:
    """A line for each key of a partition: the first of it runs, or is ready to; others wait until it is done.

    A long one has no more taken of its partition, so that others have room.

    Attributes:
        ready: those that may run, in the order in which they came to be.
        taken: how many there are in all.
    """

    def __init__(self, assignment: Assignment) -> None:
        self.ready: deque[EventJob] = deque()
        self.taken = 0
        self._assignment = assignment
        self._lines: dict[Lane, deque[EventJob]] = {}
        self._long: set[Lane] = set()

    def __iter__(self) -> Iterator[EventJob]:
        """Give those that are ready, and those in lines: some of them twice."""
        yield from tuple(self.ready)
        for line in tuple(self._lines.values()):
            yield from tuple(line)

    def join(self, job: EventJob) -> bool:
        """Put one at the end of its line; tell whether nobody is before it."""
        self.taken += 1
        if job.lane is None:
            return True
        line = self._lines.get(job.lane)
        if line is None:
            self._lines[job.lane] = deque((job,))
            return True
        line.append(job)
        if len(line) > SHORTEST_LINE and len(line) > self._longest and job.lane not in self._long:
            self._long.add(job.lane)
            self._assignment.hold_back(job.record.partition)
        return False

    def leave(self, job: EventJob) -> None:
        """Let the next one of its line go ahead."""
        self.taken -= 1
        if job.lane is None:
            return
        line = self._lines[job.lane]
        line.popleft()
        if self._long and job.lane in self._long and len(line) <= self._longest // 2:
            self._long.discard(job.lane)
            if not any(partition == job.record.partition for partition, _ in self._long):
                self._assignment.let_go(job.record.partition)
        if line:
            self.ready.append(line[0])
        else:
            del self._lines[job.lane]

    @property
    def _longest(self) -> int:
        """How many of one key are taken, so that one that is slow in each partition leaves room for others."""
        return max(SHORTEST_LINE, WAITING // (1 + len(self._assignment.held)))


class Unstored:
    """Events that don't run any more, and are not done before all is stored that they gave.

    What goes to one partition is stored in order, much of it at once: so the first that is not stored yet is waited
    for, and those behind it are looked at when it is.
    """

    def __init__(self, over: Callable[[EventJob], None], context: contextvars.Context) -> None:
        """Call `over`, in a context, with each event of which all is stored, or not: see its `error`."""
        self._over = over
        self._context = context
        self._jobs: set[EventJob] = set()
        self._waiting: dict[tuple[str, int], deque[tuple[asyncio.Future[int], EventJob]]] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[EventJob]:
        return iter(tuple(self._jobs))

    def add(self, job: EventJob, storing: Collection[Storing]) -> None:
        job.storing, job.error = len(storing), None
        self._jobs.add(job)
        for place, stored in storing:
            waiting = self._waiting.get(place)
            if waiting is None:
                waiting = self._waiting[place] = deque()
            waiting.append((stored, job))
            if len(waiting) == 1:
                self._wait(waiting)

    def _wait(self, waiting: "deque[tuple[asyncio.Future[int], EventJob]]") -> None:
        waiting[0][0].add_done_callback(functools.partial(self._look, waiting), context=self._context)

    def _look(self, waiting: "deque[tuple[asyncio.Future[int], EventJob]]", _: "asyncio.Future[int]") -> None:
        try:
            while waiting and waiting[0][0].done():
                stored, job = waiting.popleft()
                job.storing -= 1
                job.error = job.error or _error_of(stored)
                if not job.storing:
                    self._jobs.discard(job)
                    self._over(job)
        finally:  # else those behind one with a defect would wait for ever
            if waiting:
                self._wait(waiting)


def _error_of(stored: "asyncio.Future[int]") -> BaseException | None:
    return BrokerError("the record was given up before it was stored") if stored.cancelled() else stored.exception()
