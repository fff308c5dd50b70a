"""The events that a worker has taken, in the order of their keys."""

import asyncio
from collections import deque
from collections.abc import Iterator

from chains_stream.assignment import Assignment
from chains_stream.broker import Record
from chains_stream.event_service import Keyed
from chains_stream.offsets import Ledger
from chains_stream.outcome import Stop
from chains_stream.transactions import Unsent

WAITING = 1_000  # events that are taken, running or in the line of their key: as many as a ledger can tell of
SHORTEST_LINE = 16  # of those that may stand in the line of one key, however many partitions there are

Lane = tuple[int, bytes]  # a partition, and a key in it


class EventJob:
    """One event that is taken, until all that it gives is stored."""

    def __init__(self, record: Record, ledger: Ledger, keyed: Keyed | None = None) -> None:
        key = record.key if keyed is None else keyed.key
        self.record = record
        self.ledger = ledger
        self.lane: Lane | None = None if key is None else (record.partition, key)
        self.keyed = keyed  # until it is run
        self.id = f"{record.topic}/{record.partition}/{record.offset}"
        self.task: asyncio.Task[None] | None = None  # that runs it now
        self.stop: Stop | None = None
        self.attempt = 1
        self.number = 0  # of its last run
        self.failed = 0  # how many runs had begun when it failed first
        self.storing = 0  # of what it gave, in its last run
        self.error: BaseException | None = None  # met in storing it
        self.stored: asyncio.Future[None] | None = None  # for who waits until that is over
        self.placed = False  # it has one of the places
        self.put_off = False  # to be tried again later
        self.unsent: list[Unsent] = []  # that the transaction of its offset is to hold

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
        line = self._lines.setdefault(job.lane, deque())
        line.append(job)
        if len(line) > self._longest and job.lane not in self._long:
            self._long.add(job.lane)
            self._assignment.hold_back(job.record.partition)
        return len(line) == 1

    def leave(self, job: EventJob) -> None:
        """Let the next one of its line go ahead."""
        self.taken -= 1
        if job.lane is None:
            return
        line = self._lines[job.lane]
        line.popleft()
        if job.lane in self._long and len(line) <= self._longest // 2:
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
