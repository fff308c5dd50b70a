"""Which partition a request goes to: that of a less loaded worker, or the one of its key. And how loads are reported.

A `Balancer` follows the load reports of one request topic for a caller; a `Reporter` sends those of a worker process.
A partition belongs to the worker that last reported it. Of two workers the less loaded one gets the request; whatever
is not known for certain leads to plain rotation, so a wrong or missing report costs balance, and never a request.
"""

import asyncio
import os
import random
import time
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from hashlib import blake2b
from itertools import count
from typing import NamedTuple, Protocol

from chains_stream.control import Control, Load, Message
from chains_stream.errors import BrokerError
from chains_stream.log import get_logger
from chains_stream.messages import now_ms

REPORT_VALID = 5.0  # seconds after which a report says nothing any more
REPORT_EVERY = 2.0  # seconds between the reports of a worker of which there is nothing new to say
REPORT_AT_MOST_EVERY = 0.25  # seconds
NOTICEABLE = 0.25  # of a worker's capacity, that more or less is busy
LOOKS = 8  # at further workers, when both that were drawn are full

log = get_logger(__name__)


class Report:
    """What a worker last said of itself, and how many requests this caller has under way to it since."""

    __slots__ = ("arrived", "at_ms", "busy", "capacity", "partitions", "running", "sent", "worker")

    def __init__(self, load: Load, partitions: list[int], arrived: float) -> None:
        self.worker = load.worker
        self.at_ms = load.at_ms
        self.partitions = partitions
        self.running = max(0, load.running)
        self.busy = max(0, load.running) + max(0, load.waiting)
        self.capacity = load.capacity
        self.arrived = arrived  # by this process's own clock: that of the worker may be wrong
        self.sent = 0

    def full(self) -> bool:
        return self.busy + self.sent >= self.capacity

    def overloaded(self) -> bool:
        """Tell whether at least as many requests wait for it as it runs at once; or it takes nothing more."""
        return self.busy + self.sent >= 2 * self.capacity

    def less_loaded_than(self, other: "Report") -> bool:
        if self.capacity <= 0 or other.capacity <= 0:  # one that takes nothing more
            return self.capacity > 0
        return (self.busy + self.sent) * other.capacity < (other.busy + other.sent) * self.capacity


class Balancer:
    """Chooses the partitions of one request topic for a caller. Keeps at most one report a partition."""

    def __init__(self, partitions: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._partitions = partitions
        self._clock = clock
        self._rotation = count(int.from_bytes(os.urandom(2), "big"))
        self._owners: list[Report | None] = [None] * partitions
        self._reports: dict[bytes, Report] = {}  # of the workers that own partitions
        self._known: tuple[Report, ...] = ()  # the same, to draw from

    def choose(self, affinity: bytes | None) -> int:
        """Give the partition for a request; those of one `affinity` get the same, if its worker isn't overloaded."""
        if affinity is not None:
            return self._of_key(affinity)
        partition = next(self._rotation) % self._partitions
        first, known = self._owners[partition], self._known
        if first is None or len(known) < 2:  # noqa: PLR2004 - there is a choice between two
            return partition
        oldest = self._clock() - REPORT_VALID
        if first.arrived < oldest:
            return partition
        best, start = first, int(random.random() * len(known))  # noqa: S311 - spreads load, no secret
        for look in range(min(len(known), 2 + LOOKS)):
            other = known[(start + look) % len(known)]
            if other is first or other.arrived < oldest:
                continue
            if other.less_loaded_than(best):
                best = other
            if not best.full():
                break
        return partition if best is first else random.choice(best.partitions)  # noqa: S311 - as above

    def _of_key(self, key: bytes) -> int:
        """Give the partition of a key: its own, or one of the worker that is the next for this key and has room."""
        partition = zlib.crc32(key) % self._partitions
        home, oldest = self._owners[partition], self._clock() - REPORT_VALID
        if home is None or home.arrived < oldest or not home.overloaded():
            return partition
        others = [each for each in self._known if each is not home and each.arrived >= oldest and not each.full()]
        if not others:
            return partition
        # The same one each time, whoever comes and goes beside it (rendezvous hashing): what it caches is met again.
        # Not by a CRC, which is linear: of three workers one would come first for half of the keys.
        other = max(others, key=lambda each: blake2b(key, digest_size=8, key=each.worker[:64]).digest())
        return other.partitions[partition % len(other.partitions)]

    def running(self) -> int:
        """Count the requests that run, by what workers have reported lately."""
        oldest = self._clock() - REPORT_VALID
        return sum(report.running for report in self._known if report.arrived >= oldest)

    def sent(self, partition: int) -> Report | None:
        """Count a request that is sent to a partition; once it has ended, one less is `sent` in what is returned."""
        report = self._owners[partition]
        if report is not None:
            report.sent += 1
        return report

    def handle(self, message: Message) -> None:
        """Take a load report; other control messages are not for callers."""
        if not isinstance(message, Load):
            return
        now = self._clock()
        before = self._reports.get(message.worker)
        if before is not None:
            replayed = message.at_ms < before.at_ms - REPORT_VALID * 1000
            if replayed and before.arrived >= now - REPORT_VALID:
                return
            self._forget(before)
        report = Report(message, sorted({p for p in message.partitions if 0 <= p < self._partitions}), now)
        for partition in report.partitions:
            owner = self._owners[partition]
            if owner is not None:
                self._take_away(owner, partition)
            self._owners[partition] = report
        if report.partitions:
            self._reports[report.worker] = report
        self._known = tuple(self._reports.values())

    def _take_away(self, owner: Report, partition: int) -> None:
        """A partition went to another worker: one that is left with none is forgotten."""
        owner.partitions.remove(partition)
        if not owner.partitions:
            del self._reports[owner.worker]

    def _forget(self, report: Report) -> None:
        for partition in report.partitions:
            self._owners[partition] = None
        del self._reports[report.worker]


class Busy(NamedTuple):
    """How busy a worker is, and the partitions that it holds, in order: see `control.Load`."""

    partitions: list[int]
    running: int
    waiting: int
    capacity: int

    def noticeably_other_than(self, said: "Busy") -> bool:
        """Tell whether callers should hear of it before the next regular report."""
        if (self.partitions, self.capacity) != (said.partitions, said.capacity):
            return True
        now, before = self.running + self.waiting, said.running + said.waiting
        return abs(now - before) >= max(1, NOTICEABLE * self.capacity) or (
            (now >= self.capacity) != (before >= self.capacity)
        )


class Reporting(Protocol):
    """A worker, as far as its load reports go."""

    topic: str

    def busy(self) -> Busy:
        """Say how busy it is now."""


class Reporter:
    """Tells the callers of this process's workers how busy these are.

    A report is a hint: one that can't be sent is logged, and stops nothing.
    """

    def __init__(self, control: Control, workers: Sequence[Reporting]) -> None:
        self._control = control
        self._workers = workers
        self._id = os.urandom(8)
        self._said: dict[str, tuple[float, Busy]] = {}  # by topic
        self._leaving: set[str] = set()
        self._left: set[str] = set()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._report_regularly(), name="load reports")

    async def failed(self) -> None:
        """Wait until reporting can't go on. Raises what stopped it."""
        if self._task is not None:
            await asyncio.shield(self._task)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)  # `failed` tells what it died of

    @asynccontextmanager
    async def leaving(self, worker: Reporting) -> AsyncIterator[None]:
        """Tell callers at once that a worker takes nothing more, while it drains, and then that it has gone."""
        self._leaving.add(worker.topic)
        await self._report(worker)
        try:
            yield
        finally:
            self._left.add(worker.topic)
            await self._report(worker)

    async def _report_regularly(self) -> None:
        while True:
            for worker in self._workers:
                await self._report(worker)
            await asyncio.sleep(REPORT_AT_MOST_EVERY)

    async def _report(self, worker: Reporting) -> None:
        """Report a worker's load, if there is something to say."""
        now = asyncio.get_running_loop().time()
        busy = self._busy(worker)
        at, said = self._said.get(worker.topic, (0.0, NOTHING))
        if not busy.partitions and not said.partitions:
            return
        if now < at + REPORT_EVERY and not busy.noticeably_other_than(said):
            return
        self._said[worker.topic] = (now, busy)
        try:
            async with asyncio.timeout(REPORT_VALID):
                await self._control.hint(worker.topic, Load(self._id, now_ms(), *busy))
        except (BrokerError, TimeoutError) as error:
            log.warning("load.unsent", topic=worker.topic, reason=str(error) or type(error).__name__)

    def _busy(self, worker: Reporting) -> Busy:
        if worker.topic in self._left:
            return NOTHING
        busy = worker.busy()
        return busy._replace(capacity=0) if worker.topic in self._leaving else busy


NOTHING = Busy([], 0, 0, 0)
