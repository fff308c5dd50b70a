"""Taking the records of a topic as a member of a group: no more than may be worked on at once, and back in order.

What becomes of a record is for those who derive from `Taker`: a `Worker` serves requests, an `EventWorker` events.
"""

import asyncio
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from typing import Generic, Protocol, TypeVar

from chains_stream import metrics
from chains_stream.assignment import Assignment
from chains_stream.broker import GroupConsumer, Record
from chains_stream.log import get_logger
from chains_stream.offsets import Ledger
from chains_stream.outcome import Stop
from chains_stream.quarantine import Quarantine
from chains_stream.settings import Settings

MAX_TAKEN = 256  # records at once: see `offsets.MOST_OPEN`
IDLE_SECONDS = 0.5  # without a record, after which a worker is idle though the broker seems to hold more for it
LOOK_SECONDS = 0.1  # from one look at that to the next
CANCEL_PATIENCE = 5.0  # seconds for cancelled work to end, when the process does

log = get_logger(__name__)


class Places:
    """The places of one Chainlet in this process, as many as its `predict_concurrency`: its workers share them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.taken = 0
        self.asking = 0  # requests that are taken, and wait for one that events have
        self.begun = 0  # requests, in all
        self.changed = asyncio.Event()  # some place was freed, or a worker has nothing more to take

    async def change(self, seconds: float | None = None) -> None:
        """Wait until something has changed; for so long at most."""
        self.changed.clear()
        if seconds is None:
            await self.changed.wait()
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.changed.wait()


class Taken(Protocol):
    """A record that is worked on."""

    record: Record

    def cancel(self, stop: Stop) -> None:
        """Stop the work, be it under way or still to come."""


JobT = TypeVar("JobT", bound=Taken)


class Taker(Generic[JobT]):
    """Takes the records of one topic for one Chainlet, as a member of the group that `assignment` is of.

    `quarantine` is that of its process. One that stands `behind` another takes only while that one is idle, and shares
    its places: the Chainlet is the same.
    """

    def __init__(
        self,
        name: str,
        assignment: Assignment,
        settings: Settings,
        quarantine: Quarantine,
        *,
        places: Places,
        behind: "Taker[JobT] | None" = None,
    ) -> None:
        self.name = name  # of metrics and in logs
        self.in_flight = 0  # records whose work runs
        self._assignment = assignment
        self._behind = behind
        self.places = places
        self._shared = False  # places
        self._most = MAX_TAKEN
        self._waits_since: float | None = None  # in `fetch`
        self._settings = settings
        self._consumer: GroupConsumer | None = None
        self._jobs: dict[asyncio.Task[None], JobT] = {}
        self._quarantine = quarantine
        quarantine.join(self._running)
        self._tasks: list[asyncio.Task[None]] = []
        if behind is not None:
            behind._shared = self._shared = True  # noqa: SLF001 - of its kind

    async def start(self) -> None:
        """Join the group and begin to take records."""
        self._loop = asyncio.get_running_loop()
        self._consumer = await self._assignment.join()
        self._tasks = [
            asyncio.create_task(self._take(self._consumer), name=f"take {self.name}"),
            asyncio.create_task(self._assignment.commit_regularly(), name=f"commit {self.name}"),
        ]
        metrics.IN_HAND.workers.add(self)

    async def failed(self) -> None:
        """Wait until it can't go on. Raises what stopped it."""
        await asyncio.gather(*map(asyncio.shield, self._tasks))

    async def drain(self, grace: float) -> None:
        """Stop taking, give what runs `grace` seconds, commit, and leave; the unfinished is left to others."""
        metrics.IN_HAND.workers.discard(self)
        await _end(*self._tasks[:1])
        await self._finish_up(grace)
        if self._jobs:
            log.warning("worker.unfinished", chainlet=self.name, requests=len(self._jobs))
            for task, job in self._jobs.items():
                job.cancel("drained")
                task.cancel()
            _, ignoring = await asyncio.wait(self._jobs, timeout=CANCEL_PATIENCE)
            if ignoring:
                log.warning("worker.abandoned", chainlet=self.name, requests=len(ignoring))
        await _end(*self._tasks[1:])
        await self._assignment.leave(clean=await self._orderly())
        log.info("worker.stopped", chainlet=self.name)

    @property
    def idle(self) -> bool:
        """Whether it has room, waits for something to take, and there is nothing, as far as is known."""
        if self._waits_since is None:
            return False
        paused = self.paused
        if not any(records for partition, records in self.lag().items() if partition not in paused):
            return True
        # What the broker holds is given in no time, or is nothing to give: the marker at a transaction's end.
        return self._loop.time() - self._waits_since >= IDLE_SECONDS

    @property
    def paused(self) -> Collection[int]:
        """The partitions of which nothing is taken until an open record of theirs is done."""
        return self._assignment.paused

    def lag(self) -> dict[int, int]:
        """Give how many records of each partition wait to be taken, as far as is known."""
        return self._consumer.lag() if self._consumer is not None else {}

    async def _take(self, consumer: GroupConsumer) -> None:
        while True:
            free = min(self._free(), self._most)
            if free <= 0 or not self._may_take():
                await self._change()
                continue
            self._waits_since = self._loop.time()
            if self._shared:
                self.places.changed.set()  # the one behind it may go on, if nothing is there
            try:
                records = await consumer.fetch(free)
            finally:
                self._waits_since = None
            await self._start(await self._assignment.take(records))

    async def _finish_up(self, grace: float) -> None:
        """Wait for what runs, for so many seconds at most, once nothing is taken any more."""
        if self._jobs:
            await asyncio.wait(self._jobs, timeout=grace)

    async def _orderly(self) -> bool:
        """Tell whether what is left unfinished is left for no fault of its own."""
        return True

    def _free(self) -> int:
        """Give how many records there is room for."""
        raise NotImplementedError

    def _begin(self, record: Record, ledger: Ledger) -> "asyncio.Task[None] | None":
        """Begin the work on a record, in a task; None if it has to wait for that on another one."""
        raise NotImplementedError

    def _id(self, record: Record) -> str:
        """Give what a record and all the calls that are made for it are known by."""
        raise NotImplementedError

    def _may_begin(self) -> bool:
        """Tell whether there is a place for one more record of ours."""
        return self.places.taken < self.places.size and (self._behind is None or self._behind.idle)

    def _may_take(self) -> bool:
        """Tell whether there is, or will be, a place for what is taken."""
        return self._may_begin()

    async def _change(self) -> None:
        """Wait for something that `_may_begin` depends on."""
        # That the one before it has waited for long enough is not told, and must be looked at.
        look = self._behind is not None and self._behind._waits_since is not None  # noqa: SLF001 - of its kind
        await self.places.change(LOOK_SECONDS if look and self.places.taken < self.places.size else None)

    async def _room(self, record: Record) -> None:
        """Wait for a place that others have taken since there was one, and for a suspect that needs to be alone."""
        while not self._may_begin():
            await self._change()
            if self._quarantine.busy:
                await self._quarantine.stand_aside([self._id(record)])

    async def _start(self, taken: Sequence[tuple[Record, Ledger]]) -> None:
        """Begin what was taken; what may have killed a worker goes first, and alone."""
        ledgers = {ledger: record for record, ledger in taken}
        if not self._quarantine.busy and all(self._assignment.ordinary(record, of) for of, record in ledgers.items()):
            if self._behind is None and self.places.taken + len(taken) <= self.places.size:
                for record, ledger in taken:
                    self._begin(record, ledger)
            else:
                await self._begin_all(taken)
            return
        suspects = [(record, ledger) for record, ledger in taken if self._is_suspect(record, ledger)]
        for record, ledger in suspects:
            await self._run_suspect(record, ledger)
        others = [each for each in taken if each not in suspects] if suspects else taken
        if self._quarantine.busy:
            await self._quarantine.stand_aside([self._id(record) for record, _ in others])
        named = {record.partition: ledger for record, ledger in others if self._assignment.to_be_named(record, ledger)}
        if named:
            await self._assignment.name(named)
        await self._begin_all(others)

    async def _begin_all(self, taken: Sequence[tuple[Record, Ledger]]) -> None:
        for record, ledger in taken:
            if self._shared:
                await self._room(record)
            if self._assignment.of(record) is ledger:  # else its partition went to another worker
                self._begin(record, ledger)

    def _is_suspect(self, record: Record, ledger: Ledger) -> bool:
        return ledger.suspect(record.offset) and ledger.deaths(record.offset) < self._settings.max_deliveries

    async def _run_suspect(self, record: Record, ledger: Ledger) -> None:
        """Work on a record with nothing beside it, if that can be had, to its end: a death tells who it was."""

        async def take_back() -> None:
            ledger.alone = None
            await self._assignment.name({record.partition: ledger})

        await self._room(record)
        async with self._quarantine.alone(self._id(record), take_back) as claim:
            if self._assignment.of(record) is not ledger:
                return
            ledger.alone = record.offset if claim is not None else None
            where = {"partition": record.partition, "offset": record.offset}
            log.warning("suspect.begun", chainlet=self.name, **where, alone=claim is not None)
            await self._assignment.name({record.partition: ledger})
            if self._assignment.of(record) is not ledger:
                return
            task = self._begin(record, ledger)
            if claim is not None and task is not None:
                over = asyncio.create_task(claim.over.wait())
                try:
                    await asyncio.wait({task, over}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    over.cancel()
                    await asyncio.wait([over])

    def _running(self) -> Iterator[tuple[str, "asyncio.Future[None]"]]:
        return ((self._id(job.record), task) for task, job in self._jobs.items())

    def _lose(self, partitions: Collection[int]) -> None:
        for job in self._jobs.values():
            if job.record.partition in partitions:
                job.cancel("lost")


async def _end(*tasks: "asyncio.Task[None]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)  # `failed` tells what they died of
