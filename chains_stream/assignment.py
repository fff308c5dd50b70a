"""The partitions that a worker holds: taken over, paused, committed, and given back."""

import asyncio
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

from chains_stream.broker import Broker, Committed, GroupConsumer, Isolation, Record, Start
from chains_stream.errors import BrokerError
from chains_stream.log import get_logger
from chains_stream.offsets import Ledger, Note
from chains_stream.policy import backoff
from chains_stream.settings import Settings

COMMIT_INTERVAL = 0.1  # seconds between two commits: what a crash may repeat, against requests to the broker

log = get_logger(__name__)


class Commits(Protocol):
    """Where it is stored how far the work is done, if not by the consumer alone."""

    async def take_over(self, partitions: Collection[int]) -> None:
        """Keep earlier holders of partitions from storing anything from now on. Raises BrokerError."""

    async def commit(self, positions: Mapping[int, Committed]) -> frozenset[int]:
        """Store how far the work on partitions is done; give those of which it was stored. Raises BrokerError."""

    async def lose(self, partitions: Collection[int]) -> None:
        """Let go of partitions."""

    def begin_move(self) -> None:
        """Have commits wait for nothing but what they store, as partitions may go to others."""

    def end_move(self) -> None:
        """It is known who has them."""


class Assignment:
    """The ledgers of the partitions that are held, and what of them the broker has stored.

    `lose` is told of partitions that went to others: what runs of them is no longer ours.
    """

    def __init__(
        self,
        chainlet: str,
        topic: str,
        broker: Broker,
        settings: Settings,
        lose: Callable[[Collection[int]], None],
        *,
        group: str | None = None,
        isolation: Isolation = "read_uncommitted",
        start: Start = "earliest",
        through: "Commits | None" = None,
    ) -> None:
        """Hold partitions of `topic` for the group of that name, if no other `group` is named.

        `through` commits in the consumer's place; `isolation` and `start` are those of `Broker.consume`.
        """
        self.held: frozenset[int] = frozenset()
        self.ledgers: dict[int, Ledger] = {}
        self.paused: set[int] = set()
        self._held_back: set[int] = set()  # of those that are paused: by whoever takes from them
        self._chainlet = chainlet
        self._topic = topic
        self._join = functools.partial(
            broker.consume,
            topic,
            group or topic,
            on_assigned=self._assigned,
            on_revoked=self._revoked,
            isolation=isolation,
            start=start,
        )
        self._through = through
        self._broker = broker
        self._limit = settings.max_uncommitted
        self._lose = lose
        self._consumer: GroupConsumer | None = None
        self._stored: dict[int, tuple[int, str]] = {}
        self._claims: set[int] = set()  # partitions whose stored note rules out that anything else runs
        self._generation = 0  # of the assignment: records that were fetched under another one come again
        self._changed: set[int] = set()  # partitions with something to commit
        self._due = asyncio.Event()
        self._settled = asyncio.Event()  # cleared while the group moves partitions
        self._clean = True

    async def join(self) -> GroupConsumer:
        """Join the group. Raises BrokerError."""
        self._consumer = await self._join()
        return self._consumer

    async def leave(self, *, clean: bool = True) -> None:
        """Leave the group, after a commit that says that all is in order, unless it isn't: `clean` is False."""
        self._clean = clean
        if self._consumer is not None:
            await self._consumer.close()
        if self._through is not None:
            await self._through.lose(tuple(self.ledgers))

    def of(self, record: Record) -> Ledger | None:
        """Give the ledger that a record belongs to, or None if its partition went to another worker."""
        return self.ledgers.get(record.partition)

    async def take(self, records: Sequence[Record]) -> list[tuple[Record, Ledger]]:
        """Give those of the records just fetched that are ours to run, each once, with their ledgers."""
        if any(record.partition not in self.ledgers for record in records):
            generation = self._generation
            await self._take_over(records, generation)
            if generation != self._generation:
                return []  # the partitions have moved meanwhile; what is still ours is fetched again
        taken = []
        for record in records:
            ledger = self.ledgers.get(record.partition)
            if ledger is not None and ledger.take(record.offset):
                taken.append((record, ledger))
        for partition, ledger in {record.partition: ledger for record, ledger in taken}.items():
            self._pause_if_full(partition, ledger)
        return taken

    def done(self, partition: int, offset: int) -> bool:
        """Tell whether a record at this offset, which is 0 if it is not known, is done for certain."""
        ledger = self.ledgers.get(partition)
        return ledger is not None and 0 < offset < ledger.position

    def ordinary(self, record: Record, ledger: Ledger) -> bool:
        """Tell whether a record may run at once: it is no suspect, and needs not be named."""
        return ledger.unsuspicious and record.partition not in self._claims

    def to_be_named(self, record: Record, ledger: Ledger) -> bool:
        """Tell whether a record must not run before `name` has stored that it may."""
        return ledger.watched or record.partition in self._claims

    def finish(self, record: Record, ledger: Ledger) -> None:
        """Note a record as finished, for the next commit."""
        ledger.finish(record.offset)
        if self.of(record) is not ledger:
            return
        self._changed.add(record.partition)
        self._due.set()
        if record.partition in self.paused:
            self._resume_if_free(record.partition)

    def hold_back(self, partition: int) -> None:
        """Have nothing more taken of a partition that is held, until it is let go."""
        if partition in self.ledgers:
            self._held_back.add(partition)
            self._pause(partition)

    def let_go(self, partition: int) -> None:
        self._held_back.discard(partition)
        self._resume_if_free(partition)

    def _pause(self, partition: int) -> None:
        if partition not in self.paused:
            assert self._consumer is not None, "joined"
            self._consumer.pause(partition)
            self.paused.add(partition)

    def _resume_if_free(self, partition: int) -> None:
        if partition not in self.paused or partition in self._held_back:
            return
        ledger = self.ledgers.get(partition)
        if ledger is not None and not ledger.full(self._limit // 2 + 1):
            assert self._consumer is not None, "records come from it"
            self.paused.discard(partition)
            self._consumer.resume(partition)

    def _pause_if_full(self, partition: int, ledger: Ledger) -> None:
        """Pause a partition with too many records behind an open one: what a note can tell of is limited."""
        if ledger.full(self._limit) and partition not in self.paused:
            self._pause(partition)
            log.warning("partition.paused", chainlet=self._chainlet, partition=partition, open=ledger.position)

    # --- taking over

    async def _take_over(self, records: Sequence[Record], generation: int) -> None:
        """Raise the epoch of the partitions of these records, before anything of them is run."""
        attempt = 1
        while generation == self._generation and (new := self._not_taken_over(records)):
            try:
                ledgers = await self._next_ledgers(new)
                stored = await self._store(ledgers)
            except BrokerError as error:
                log.warning("takeover.retry", chainlet=self._chainlet, partitions=sorted(new), reason=str(error))
                await asyncio.sleep(backoff(attempt))
                attempt += 1
            else:
                if generation == self._generation:
                    self.ledgers |= {number: ledgers[number] for number in stored}
                return  # the others went to other workers

    def _not_taken_over(self, records: Sequence[Record]) -> dict[int, int]:
        """Give the partitions that are new to us, each with the offset of its first record."""
        if all(record.partition in self.ledgers for record in records):
            return {}
        firsts = {record.partition: record.offset for record in reversed(records)}
        return {number: at for number, at in firsts.items() if number in self.held and number not in self.ledgers}

    async def _next_ledgers(self, firsts: Mapping[int, int]) -> dict[int, Ledger]:
        assert self._consumer is not None, "records come from it"
        if self._through is not None:
            await self._through.take_over(firsts)
        committed = await self._consumer.committed(firsts)
        ledgers = {}
        for number, first in firsts.items():
            # What another worker has done since this record was fetched is not run again.
            position, metadata = committed.get(number, Committed(first))
            note = Note.read(metadata)
            abandoned = note.epoch > 0 and not note.clean
            end = await self._broker.end_offset(self._topic, number) if abandoned else position
            ledgers[number] = Ledger.take_over(position, note, end)
            if abandoned:
                log.warning("partition.abandoned", chainlet=self._chainlet, partition=number, offset=position)
        return ledgers

    # --- committing

    async def name(self, ledgers: Mapping[int, Ledger]) -> None:
        """Store what may be running on partitions, before it is: whoever takes them over will know.

        What is stored of others, and no longer true, is stored anew with it.
        """
        waiting, attempt = {n: self.ledgers[n] for n in self._claims if n in self.ledgers} | dict(ledgers), 1
        while waiting := {number: ledger for number, ledger in waiting.items() if self.ledgers.get(number) is ledger}:
            await self._settled.wait()
            try:
                stored = await self._store(waiting)
            except BrokerError as error:
                log.warning("commit.retry", chainlet=self._chainlet, partitions=sorted(waiting), reason=str(error))
            else:
                waiting = {number: ledger for number, ledger in waiting.items() if number not in stored}
                if not waiting:
                    return
            await asyncio.sleep(backoff(attempt))
            attempt += 1

    async def commit_regularly(self) -> None:
        while True:
            await self._due.wait()
            await self._settled.wait()  # or it would take back what `_revoked` has said
            self._due.clear()
            await self._commit()
            await asyncio.sleep(COMMIT_INTERVAL)

    async def _commit(self, *, clean: bool = False) -> None:
        changed = {number: self.ledgers[number] for number in self._changed if number in self.ledgers}
        self._changed.clear()
        try:
            await self._store(changed, clean=clean)
        except BrokerError as error:
            # The next commit covers it; until then a crash repeats more.
            log.warning("commit.failed", chainlet=self._chainlet, reason=str(error))
            self._change(changed)

    async def _store(self, ledgers: Mapping[int, Ledger], *, clean: bool = False) -> frozenset[int]:
        """Commit where ledgers stand, but for those that are stored so; give those that now are. Raises BrokerError."""
        assert self._consumer is not None, "joined"
        notes = {number: ledger.note(clean=clean) for number, ledger in ledgers.items()}
        states = {number: (ledgers[number].position, note.write()) for number, note in notes.items()}
        known = frozenset(number for number, state in states.items() if self._stored.get(number) == state)
        due = {number: Committed(*state) for number, state in states.items() if number not in known}
        commits = self._through or self._consumer
        stored = await commits.commit(due) if due else frozenset[int]()
        self._stored |= {number: states[number] for number in stored}
        self._claims -= stored
        self._claims |= {number for number in stored if clean or notes[number].named or notes[number].alone is not None}
        return stored | known

    def _change(self, partitions: Collection[int]) -> None:
        self._changed.update(partitions)
        self._due.set()

    # --- as the group moves partitions

    async def _assigned(self, partitions: frozenset[int]) -> None:
        """Go on with what was kept, and stop work on partitions that went to others."""
        self._generation += 1
        kept = self.ledgers.keys() & partitions
        lost = (self.ledgers.keys() - kept) | await self._overtaken(kept)
        self._lose(lost)
        for number in lost:
            del self.ledgers[number]
        if self._through is not None:
            await self._through.lose(lost)
            self._through.end_move()
        # It is stored that they were given back in order, with what was open then: nothing else may run until it isn't.
        self._claims = set(self.ledgers)
        self.held = partitions
        self.paused.clear()
        self._held_back &= self.ledgers.keys()
        for number in self._held_back:
            self._pause(number)
        for number, ledger in self.ledgers.items():
            self._pause_if_full(number, ledger)
        # What was committed while the partitions moved may not have counted.
        self._stored.clear()
        self._change(self.ledgers.keys())
        self._settled.set()
        log.info("worker.assigned", chainlet=self._chainlet, partitions=len(partitions), lost=sorted(lost))

    async def _overtaken(self, partitions: Collection[int]) -> set[int]:
        """Give those that another worker has had meanwhile, though we seem to have kept them."""
        if not partitions:
            return set()
        assert self._consumer is not None, "there are ledgers only after the first assignment"
        try:
            committed = await self._consumer.committed(partitions)
        except BrokerError as error:
            log.warning("commit.unknown", chainlet=self._chainlet, reason=str(error))
            return set(partitions)  # what was ours all along is run once more, and nothing is answered in vain
        return {n for n, found in committed.items() if Note.read(found.metadata).epoch > self.ledgers[n].epoch}

    async def _revoked(self, partitions: frozenset[int]) -> None:  # noqa: ARG002 - the broker's callback: it is all
        """Say how far the work is, and that it is given back in order; it goes on until we know who has it next."""
        self._generation += 1
        self._settled.clear()
        if self._through is not None:
            self._through.begin_move()
        if self._consumer is not None:
            self._change(self.ledgers.keys())
            await self._commit(clean=self._clean)
