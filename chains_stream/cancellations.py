"""Which requests were cancelled before they were met in their queue.

Workers hear of it by the control topic; of what was cancelled before that is read back, a gateway's frame in the reply
log tells.
"""

import asyncio
import time
from collections import defaultdict

import msgspec

from chains_stream.broker import Broker
from chains_stream.errors import OffsetExpiredError
from chains_stream.log import get_logger
from chains_stream.messages import Cancelled, Request, decode_frames, now_ms

MAX_CANCELLED = 50_000  # a worker, or a reply partition: cancelled requests remembered until they are met in the queue
FURTHER_BACK = 10_000  # records of a reply partition that are read at least, where it must be read further back

log = get_logger(__name__)


class Cancellations:
    """Requests that were cancelled before this process met them, as it has heard by the control topic.

    Bounded: beyond `MAX_CANCELLED` the oldest is forgotten. Its request runs to its deadline, or, if nobody waits for
    it, is looked for in the reply log.

    Attributes:
        known_since_ms: what was cancelled since then, in Unix time, is known.
    """

    def __init__(self, seconds: float) -> None:
        """Keep what was heard of a request for which somebody waits for so long."""
        self._seconds = seconds
        self._known: dict[bytes | str, float] = {}  # when each was heard of, the oldest first
        self.known_since_ms = now_ms()

    def heard_back(self, seconds: float) -> None:
        """Note that what was cancelled in the last `seconds` has been heard of."""
        self.known_since_ms = now_ms() - int(seconds * 1000)

    def add(self, request: bytes | str) -> None:
        """Note a correlation id, or the id of a request and all that belongs to it."""
        self._known.pop(request, None)
        if len(self._known) >= MAX_CANCELLED:
            oldest = next(iter(self._known))
            age = time.monotonic() - self._known.pop(oldest)
            self.known_since_ms = max(self.known_since_ms, now_ms() - int(age * 1000) + 1)
        self._known[request] = time.monotonic()

    def meet(self, request: Request) -> bool:
        """Tell whether a request was cancelled."""
        if not self._known:
            return False
        # By its own id it comes once; by the request's it may come again: a retry, or another Chainlet's part of it.
        heard = (self._known.pop(request.correlation_id, None), self._known.get(request.request_id))
        # Nobody waits for longer than the deadline, unless it is long to be begun. A letter may be sent again later.
        patient = request.start_by_ms is not None or request.retry is not None
        oldest = time.monotonic() - self._seconds
        return any(at is not None and (patient or at >= oldest) for at in heard)


class _Log:
    """The cancellations of one reply partition, as far as it was read."""

    def __init__(self) -> None:
        self.reading = asyncio.Lock()
        self.begin: int | None = None
        self.end = 0
        self.until_ms = 0  # what was cancelled by then was read
        self.cancelled: dict[bytes, None] = {}


class CancelledLog:
    """Cancellations in reply logs, each read once: for requests older than what the control topic tells of."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._logs: defaultdict[tuple[str, int], _Log] = defaultdict(_Log)

    async def tells_of(
        self, topic: str, partition: int, begin: int, correlation_id: bytes, known_since_ms: int
    ) -> bool:
        """Tell whether a request, whose frames lie from `begin` on, was cancelled before the given time.

        Raises BrokerError.
        """
        found = self._logs[topic, partition]
        async with found.reading:
            if found.begin is None or found.until_ms < known_since_ms:
                now, end = now_ms(), await self._broker.end_offset(topic, partition)
                await self._read(topic, partition, begin if found.begin is None else found.end, end)
                found.begin, found.end, found.until_ms = begin if found.begin is None else found.begin, end, now
            if begin < found.begin:
                further = min(begin, found.begin - FURTHER_BACK)
                await self._read(topic, partition, max(0, further), found.begin)
                found.begin = further
        return correlation_id in found.cancelled

    async def _read(self, topic: str, partition: int, begin: int, end: int) -> None:
        begin = max(begin, await self._broker.begin_offset(topic, partition))
        if begin >= end:
            return
        log.info("cancelled.reading_back", topic=topic, partition=partition, records=end - begin)
        reader = await self._broker.read(topic, {partition: begin})
        try:
            while reader.position(partition) < end:
                for record in await reader.fetch():
                    self._note(self._logs[topic, partition], record.value)
        except OffsetExpiredError as error:  # it went meanwhile, and is told of no more
            log.warning("cancelled.unknown", topic=topic, partition=partition, reason=str(error))
        finally:
            await reader.close()

    def _note(self, found: _Log, value: bytes) -> None:
        try:
            frames = decode_frames(value)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):  # a stranger's, or an answer to one
            return
        for frame in frames:
            if isinstance(frame, Cancelled):
                found.cancelled[frame.correlation_id] = None
                if len(found.cancelled) > MAX_CANCELLED:
                    del found.cancelled[next(iter(found.cancelled))]
