"""How the frames that answer one request are read: in the order of the log, whoever reads them.

Frames of a lower attempt than one already seen are dropped, and so is a repeated sequence; a gap or a wrong count is an
error, never a quiet end. A higher attempt either goes on with the stream where it stood, or begins it again.
"""

from enum import Enum, auto

from chains_stream.messages import Chunk, Done, Frame, Started


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

    def __init__(self) -> None:
        self.chunks = 0
        self.attempt = 0
        self._chunks_of = 0  # the attempt that sent the last chunk

    def take(self, frame: Frame) -> Step:
        """Say what to make of the next frame of the log. See `begins_again`, which is to be asked first."""
        if frame.attempt < self.attempt:
            return Step.DROP
        if self.begins_again(frame):
            self.chunks = 0
        self.attempt = frame.attempt
        match frame:
            case Chunk(sequence=sequence):
                self._chunks_of = frame.attempt
                if sequence == self.chunks:
                    self.chunks += 1
                    return Step.CHUNK
                return Step.DROP if sequence < self.chunks else Step.GAP
            case Done(chunks=chunks):
                return Step.END if chunks == self.chunks else Step.GAP
            case Started():
                return Step.DROP
            case _:
                return Step.END

    def begins_again(self, frame: Frame) -> bool:
        """Tell whether a frame is the first of another run: the chunks taken so far are not part of that one."""
        if not self.chunks or frame.attempt <= self._chunks_of or frame.attempt < self.attempt:
            return False
        match frame:
            case Chunk(sequence=0) | Done(chunks=0):
                return True
            case _:
                return False
