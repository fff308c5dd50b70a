"""Out-of-order completion to contiguous commit: how far the work on one partition is done."""

from collections import deque

import msgspec


class Note(msgspec.Struct, array_like=True, frozen=True):
    """What is committed beside an offset: the epoch of the partition's assignment, raised at every takeover.

    It is the `attempt` of the answers: a caller tells by it that another worker runs its request again.
    """

    epoch: int = 0

    @classmethod
    def read(cls, metadata: str) -> "Note":
        """Read a note; what is none of ours counts as none."""
        try:
            return msgspec.json.decode(metadata, type=cls) if metadata else cls()
        except msgspec.DecodeError:
            return cls()

    def write(self) -> str:
        return msgspec.json.encode(self).decode()


class Ledger:
    """The records of one partition that this process has taken, and which of them are finished.

    Records are taken in offset order and finish in any. What may be committed is the offset below which all are
    finished: after a crash the group goes on from there, so that no record is lost.
    """

    def __init__(self, start: int = 0) -> None:
        """Begin at the offset `start`: what lies before it is done."""
        self._open: deque[int] = deque()  # in order; finished ones leave when they reach the head
        self._finished: set[int] = set()  # those still behind an open one
        self._highest = start - 1

    def take(self, offset: int) -> bool:
        """Note a record as begun. False if it was done or taken before: it came again after a rebalance."""
        if offset <= self._highest:
            return False
        self._highest = offset
        self._open.append(offset)
        return True

    def finish(self, offset: int) -> None:
        """Note a record as finished."""
        self._finished.add(offset)
        while self._open and self._open[0] in self._finished:
            self._finished.remove(self._open.popleft())

    @property
    def position(self) -> int | None:
        """The offset that may be committed: the first one not finished. None if nothing was taken."""
        if self._open:
            return self._open[0]
        return self._highest + 1 if self._highest >= 0 else None

    def __len__(self) -> int:
        """How many records are taken and not yet covered by `position`."""
        return len(self._open)
