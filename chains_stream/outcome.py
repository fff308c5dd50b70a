"""How a request ended, for its worker, and how its frames tell it."""

from collections.abc import Sequence
from typing import Literal

import msgspec

from chains_stream.deliveries import Status
from chains_stream.errors import DeadLetteredError, DeadlineExceededError, QueueExpiredError
from chains_stream.fold import Fold, Step
from chains_stream.messages import Cancelled, Done, Failed, Frame

Stop = Literal["cancelled", "lost", "drained"]
"""Why work is stopped before its end: somebody cancelled it, its partition went to another worker, or this one ends."""


class Outcome(msgspec.Struct, frozen=True, eq=False):
    """How a request ended: a result (None for a stream), an error, or its cancellation.

    `answered` says that its caller has had the end of its answer from another worker, and `ended`, if it is known, how,
    and an offset that it does not lie behind; `undecodable` says that its arguments could not be read.
    """

    value: bytes | None = None
    error: Exception | None = None
    cancelled: bool = False
    answered: bool = False
    ended: tuple[Status, int] | None = None
    undecodable: bool = False

    @property
    def kind(self) -> str:
        """In a word, for the metrics."""
        match self.error:
            case None:
                return "cancelled" if self.cancelled else "done"
            case DeadlineExceededError():
                return "expired"
            case DeadLetteredError():
                return "dead_lettered"
            case _:
                return "failed"

    @property
    def status(self) -> Status:
        """In the word that webhooks are told."""
        match self.error:
            case None:
                return "CANCELED" if self.cancelled else "SUCCEEDED"
            case QueueExpiredError():
                return "EXPIRED"
            case _:
                return "FAILED"


def status_of(frames: Sequence[Frame]) -> Status | None:
    """Tell from its frames how a request has ended, if it has."""
    fold = Fold()
    end = next((frame for frame in frames if fold.take(frame) is Step.END), None)
    match end:
        case Done():
            return "SUCCEEDED"
        case Failed(error=error):
            return "EXPIRED" if error.code == QueueExpiredError.code else "FAILED"
        case Cancelled():
            return "CANCELED"
        case _:
            return None
