"""How far the work on one partition is done: out-of-order completion to contiguous commit, and who died of what.

Kafka counts no deliveries, and a worker that was killed can't say what it held. So what the next worker must know is
kept beside the committed offset, in its note: the epoch of the assignment, which records behind that offset are done,
and, where a worker was killed before, which ones may be running now.

- Handed over in order, a partition's note says `clean`: nobody died, and nothing counts.
- Else the records that the dead worker may have had are *watched*: they are run as ever, but only after a commit that
  names them. Should this worker die too, it died of one that was named, and only these are *suspects*.
- A suspect runs with nothing else in its process (`quarantine`), after a commit that says so. Only a worker's death in
  which a record was alone counts as a death of it; one that has had as many as `max_deliveries` is never run again.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Self

import msgspec

# The most offsets from the committed one on of which a worker has begun records: `max_uncommitted` allows no more than
# 1,500, and of those that it took at once up to 256 lie beyond. (Of an `EventWorker` they may be more, where they are
# finished before they are run.)
MOST_OPEN = 1_500 + 256


class Note(msgspec.Struct, array_like=True, frozen=True):
    """What is committed beside an offset. Offsets in it count from the committed one.

    Attributes:
        epoch: of the assignment, raised at every takeover. It is the `attempt` of the answers.
        clean: whether the partition was handed over in order.
        runs: how many records from the committed one on are open, then how many are done, then open, and so on.
        named: whether `runs` tells of all that may be running.
        suspects: the open records below this one are suspects, and don't run.
        alone: the suspect that runs.
        deaths: how many workers died while a record was alone, by its offset.
        watched: the records below this one are to be named before they are run.
    """

    epoch: int = 0
    clean: bool = False
    runs: list[int] = []
    named: bool = False
    suspects: int = 0
    alone: int | None = None
    deaths: dict[int, int] = {}
    watched: int = 0

    @classmethod
    def read(cls, metadata: str) -> "Note":
        """Read a note; what is none of ours counts as none."""
        try:
            return msgspec.json.decode(metadata, type=cls) if metadata else cls()
        except (msgspec.DecodeError, RecursionError):
            return cls()

    def write(self) -> str:
        return msgspec.json.encode(self).decode()


class Ledger:
    """The records of one partition that this process has taken, and which of them are finished.

    Records are taken in offset order and finish in any. What may be committed is the offset below which all are
    finished: after a crash the group goes on from there, so that no record is lost.

    Attributes:
        epoch: of the assignment that this is about.
        redelivered_to: records below this offset may have been begun by another worker.
        watched_to: until all records below this offset are done, each is named before it is run.
        alone: the suspect that runs now.
    """

    def __init__(self, start: int = 0, epoch: int = 1) -> None:
        """Begin at the offset `start`: what lies before it is done."""
        self.epoch = epoch
        self.redelivered_to = self.watched_to = start
        self.alone: int | None = None
        self._suspects_to = start
        self._deaths: dict[int, int] = {}
        self._open: deque[int] = deque()  # in order; finished ones leave when they reach the head
        self._finished: set[int] = set()  # those still behind an open one
        self._expected: deque[int] = deque()  # open ones that this process has yet to get
        self._highest = start - 1

    @classmethod
    def take_over(cls, position: int, note: Note, end: int) -> Self:
        """Go on where the note of the last worker says; the partition ends at the offset `end`."""
        ledger = cls(position, note.epoch + 1)
        opened = list(_open_offsets(position, note.runs))
        taken = position + sum(note.runs)
        ledger._expect(opened, taken)
        ledger.redelivered_to = taken
        ledger._suspects_to = position + note.suspects
        ledger._deaths = {position + at: count for at, count in note.deaths.items()}
        ledger.watched_to = position + note.watched
        if note.clean or not note.epoch:
            return ledger
        if note.alone is not None:
            alone = position + note.alone
            ledger._deaths[alone] = ledger.deaths(alone) + 1
        elif note.named:
            if opened and opened[-1] >= ledger._suspects_to:
                ledger._suspects_to = taken  # what is below it did not run
        else:
            ledger.redelivered_to = ledger.watched_to = max(taken, min(end, position + MOST_OPEN))
        return ledger

    def take(self, offset: int) -> bool:
        """Note a record as begun. False if it was done or taken before: it came again after a rebalance."""
        while self._expected and self._expected[0] < offset:
            self.finish(self._expected.popleft())  # it is no longer in the log
        if self._expected and self._expected[0] == offset:
            self._expected.popleft()
            return True
        if offset <= self._highest:
            return False
        self._highest = offset
        self._open.append(offset)
        return True

    def finish(self, offset: int) -> None:
        """Note a record as finished."""
        self._finished.add(offset)
        self._deaths.pop(offset, None)
        if self.alone == offset:
            self.alone = None
        while self._open and self._open[0] in self._finished:
            self._finished.remove(self._open.popleft())

    def suspect(self, offset: int) -> bool:
        """Tell whether a record may have killed a worker, and is to be run alone."""
        return offset < self._suspects_to

    def deaths(self, offset: int) -> int:
        """Give how many workers have died while they ran this record alone."""
        return self._deaths.get(offset, 0)

    @property
    def unsuspicious(self) -> bool:
        """Whether nobody died of what is open here, as far as is known."""
        position = self.position
        return position >= self._suspects_to and position >= self.watched_to

    @property
    def watched(self) -> bool:
        """Whether records are to be named before they are run."""
        return self.position < self.watched_to

    def full(self, limit: int) -> bool:
        """Tell whether no more should be taken until what is open here is done: a note can tell of so much only."""
        return self.span >= limit and not self._expected

    @property
    def position(self) -> int:
        """The offset that may be committed: the first one not finished."""
        return self._open[0] if self._open else self._highest + 1

    @property
    def span(self) -> int:
        """How many offsets the records from `position` on take up that are taken: what a note has to tell of."""
        return self._highest + 1 - self.position

    def note(self, *, clean: bool = False) -> Note:
        """Say what the next worker must know, if `position` is committed with it."""
        position = self.position
        return Note(
            epoch=self.epoch,
            clean=clean,
            runs=self._runs(),
            named=self.watched,
            suspects=max(0, self._suspects_to - position),
            alone=None if self.alone is None else self.alone - position,
            deaths={offset - position: count for offset, count in self._deaths.items()},
            watched=max(0, self.watched_to - position),
        )

    def __len__(self) -> int:
        """How many records are taken and not yet covered by `position`."""
        return len(self._open)

    def _expect(self, opened: Sequence[int], taken: int) -> None:
        self._open += opened
        self._expected += opened
        self._highest = max(self._highest, taken - 1)

    def _runs(self) -> list[int]:
        runs: list[int] = []
        edge = self.position
        for offset in self._open:
            if offset in self._finished:
                continue
            if runs and offset > edge:
                runs += (offset - edge, 1)  # offsets that no record has count as done
            elif runs:
                runs[-1] += 1
            else:
                runs.append(1)
            edge = offset + 1
        if runs and edge <= self._highest:
            runs.append(self._highest + 1 - edge)
        return runs


def _open_offsets(position: int, runs: Iterable[int]) -> Iterator[int]:
    """Give the open offsets that the runs of a note tell of."""
    opened = True
    for length in runs:
        if opened:
            yield from range(position, position + length)
        position += length
        opened = not opened
