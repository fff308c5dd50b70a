"""How the frames that answer one request are read: in the order of the log, whoever reads them.

Frames of a lower attempt than one already seen are dropped, and so is a repeated sequence; a gap or a wrong count is an
error, never a quiet end. A higher attempt begins the stream again, or goes on where it stood if `Started` has said so:
two runs are never mixed because chunks of the second got lost.
"""

from enum import Enum, auto

from chains_stream.messages import Chunk, Done, Frame, Started, Undelivered


class Step(Enum):
    """What a frame is to its reader."""

    DROP = auto()
    CHUNK = auto()  # the next one
    END = auto()
    GAP = auto()  # chunks are missing before it


class Fold:
    """The frames of one call, as far as they were taken.

    Attributes:
        chunks: how many chunks of the stream count.
        attempt: the highest one seen.
    """

    __slots__ = ("_run", "attempt", "chunks")

    def __init__(self) -> None:
        self.chunks = 0
        self.attempt = 0
        self._run = 0  # the attempt that the chunks are of, or that goes on with them

    def take(self, frame: Frame) -> Step:
        """Say what to make of the next frame of the log. See `begins_again`, which is to be asked first."""
        if frame.attempt < self.attempt:
            return Step.DROP
        if self.begins_again(frame):
            self.chunks = 0
            self._run = frame.attempt
        self.attempt = frame.attempt
        match frame:
            case Started(resumes=resumes):
                if resumes:
                    self._run = frame.attempt
                return Step.DROP
            case Undelivered():
                return Step.DROP
            case Chunk(sequence=sequence):
                return self._chunk(sequence)
            case Done(chunks=chunks):
                return Step.END if chunks == self.chunks and self._of_this_run() else Step.GAP
            case _:
                return Step.END

    def _chunk(self, sequence: int) -> Step:
        if not self._of_this_run() or sequence > self.chunks:
            return Step.GAP
        if sequence < self.chunks:
            return Step.DROP
        self._run = self.attempt
        self.chunks += 1
        return Step.CHUNK

    def _of_this_run(self) -> bool:
        """Tell whether the chunks taken so far are part of what the latest attempt sends."""
        return not self.chunks or self._run == self.attempt

    def begins_again(self, frame: Frame) -> bool:
        """Tell whether a frame is the first of another run: the chunks taken so far are not part of that one."""
        if not self.chunks or frame.attempt <= self._run or frame.attempt < self.attempt:
            return False
        match frame:
            case Chunk(sequence=0) | Done(chunks=0):
                return True
            case _:
                return False
