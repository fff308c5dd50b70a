"""What became of asynchronous requests: an index of the results log, filled from further back as it is needed."""

import asyncio
import zlib
from collections import OrderedDict
from enum import StrEnum

from chains_stream.answers import Waited
from chains_stream.broker import Broker, Reader, TopicSpec
from chains_stream.errors import BrokerError, CallCancelledError, OffsetExpiredError, QueueExpiredError
from chains_stream.fold import Fold, Step
from chains_stream.gateway.ids import RequestId
from chains_stream.log import get_logger
from chains_stream.messages import Cancelled, Failed, Frame, Undelivered
from chains_stream.readback import found_in
from chains_stream.settings import Settings

MOST_KNOWN = 100_000  # requests that are followed
SCANS = 8  # at once, of what lies back in the log
LAST_ATTEMPT = 2**31 - 1  # of a frame that no worker's may follow

log = get_logger(__name__)


class Status(StrEnum):
    """Where an asynchronous request is; the words are Baseten's."""

    QUEUED = "QUEUED"
    IN_PROGRESS = "IN_PROGRESS"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    EXPIRED = "EXPIRED"
    CANCELED = "CANCELED"
    WEBHOOK_FAILED = "WEBHOOK_FAILED"

    @property
    def final(self) -> bool:
        return self not in (Status.QUEUED, Status.IN_PROGRESS)


class Known(Waited):
    """What is known of one request.

    Attributes:
        end: the offset of the record with the end of its answer.
        run: where the run of its stream begins that counts: the offset of that record, and the attempt.
        chunks: of a stream, as far as it has come.
    """

    __slots__ = ("_fold", "_held", "chunks", "end", "run", "status")

    def __init__(self) -> None:
        super().__init__()
        self.status = Status.QUEUED
        self.end: int | None = None
        self.run: tuple[int, int] | None = None
        self.chunks = 0
        self._fold: Fold | None = Fold()
        self._held: list[tuple[Frame, int]] | None = None  # that came while what lies before them was looked up

    @property
    def watched(self) -> bool:
        return bool(self._waiters) or self._held is not None

    def hold(self) -> None:
        """Take frames of the live log only after those before them, which are fed."""
        self._held = []

    def release(self) -> None:
        held, self._held = self._held or (), None
        for frame, offset in held:
            self.feed(frame, offset)
        self._wake()

    def take(self, frame: Frame, offset: int) -> None:
        """Take a frame of the live log."""
        if self._held is not None:
            self._held.append((frame, offset))
        else:
            self.feed(frame, offset)

    def feed(self, frame: Frame, offset: int) -> None:
        """Take the next frame of the log."""
        fold = self._fold
        if fold is None:
            if isinstance(frame, Undelivered) and self.status.final:
                self.status = Status.WEBHOOK_FAILED
            return
        begins_again = fold.begins_again(frame)
        step = fold.take(frame)
        self.chunks = fold.chunks
        if begins_again or (step is Step.CHUNK and self.run is None):
            self.run = offset, frame.attempt
        if step is Step.END or step is Step.GAP:
            self.end, self._fold = offset, None
            self.status = _ended(frame) if step is Step.END else Status.FAILED
            self._wake()
        elif self.status is Status.QUEUED:
            self.status = Status.IN_PROGRESS

    async def ready(self) -> None:
        """Wait until what lies back in the log was looked up."""
        while self._held is not None:
            await self._wait()

    async def final(self) -> None:
        """Wait until the answer has ended."""
        while not self.status.final:
            await self._wait()


def _ended(frame: Frame) -> Status:
    match frame:
        case Cancelled():
            return Status.CANCELED
        case Failed(error=error):
            return {QueueExpiredError.code: Status.EXPIRED, CallCancelledError.code: Status.CANCELED}.get(
                error.code, Status.FAILED
            )
        case _:
            return Status.SUCCEEDED


class Results:
    """Follows `{namespace}.results` for the requests that were asked for; what lies back in it is looked up once."""

    def __init__(self, broker: Broker, settings: Settings) -> None:
        self.topic = f"{settings.namespace}.results"
        self._broker = broker
        self._settings = settings
        self._reader: Reader | None = None
        self._known: OrderedDict[bytes, Known] = OrderedDict()  # the one that was not asked for the longest comes first
        self._scans = asyncio.Semaphore(SCANS)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        settings = self._settings
        await self._broker.ensure_topics(
            [TopicSpec(self.topic, settings.reply_partitions, settings.results_retention_ms, ring=True)]
        )
        self.partitions = await self._broker.partitions(self.topic)
        await self._open()
        self._task = asyncio.create_task(self._read(), name="results")

    async def failed(self) -> None:
        """Wait until the log can't be followed any more. Raises what stopped it."""
        if self._task is not None:
            await asyncio.shield(self._task)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)  # `failed` tells what it died of
        if self._reader is not None:
            await self._reader.close()

    def place(self, correlation_id: bytes) -> RequestId:
        """Choose where the answer to a new request will lie."""
        assert self._reader is not None, "started"
        partition = zlib.crc32(correlation_id) % self.partitions
        return RequestId("results", partition, self._reader.position(partition), correlation_id)

    def expect(self, correlation_id: bytes) -> None:
        """Follow a request that was not sent yet."""
        self._remember(correlation_id, Known())

    async def find(self, request_id: RequestId) -> Known:
        """Give what is known of a request; it changes as the log grows. Raises OffsetExpiredError, BrokerError."""
        if self._task is not None and self._task.done():
            raise BrokerError("what became of requests can't be followed any more")
        while (found := self._known.get(request_id.correlation_id)) is not None:
            await found.ready()
            if self._known.get(request_id.correlation_id) is found:  # else looking it up has failed
                self._known.move_to_end(request_id.correlation_id)
                return found
        assert self._reader is not None, "started"
        if request_id.partition >= self.partitions:
            raise OffsetExpiredError("the log has no such partition any more")
        found = Known()
        found.hold()
        self._remember(request_id.correlation_id, found)
        try:
            await self.scan(self.topic, request_id, self._reader.position(request_id.partition), found)
        except BaseException:
            self._known.pop(request_id.correlation_id, None)
            raise
        finally:
            found.release()
        return found

    async def scan(self, topic: str, request_id: RequestId, end: int, found: Known) -> None:
        """Feed what the log has of a request before `end`. Raises OffsetExpiredError, BrokerError."""
        partition, begin = request_id.partition, request_id.offset
        async with self._scans:
            if begin < await self._broker.begin_offset(topic, partition):
                raise OffsetExpiredError("the log no longer holds the answer to this request")
            if begin >= end:
                if begin > end and begin > await self._broker.end_offset(topic, partition):
                    raise OffsetExpiredError("the log is not the one that the request was made with")
                return
            webhooks = topic == self.topic  # of which more may be told after the end
            reader = await self._broker.read(topic, {partition: begin})
            try:
                while reader.position(partition) < end and (webhooks or not found.status.final):
                    for record in await reader.fetch():
                        for frame, _ in found_in(record):
                            if frame.correlation_id == request_id.correlation_id:
                                found.feed(frame, record.offset)
            finally:
                await reader.close()

    def _remember(self, correlation_id: bytes, found: Known) -> None:
        self._known[correlation_id] = found
        if len(self._known) > MOST_KNOWN:
            oldest = next((each for each, known in self._known.items() if not known.watched), None)
            if oldest is not None:
                del self._known[oldest]

    async def _open(self) -> None:
        self._reader = await self._broker.read(self.topic, dict.fromkeys(range(self.partitions)))

    async def _read(self) -> None:
        while True:
            assert self._reader is not None, "opened before"
            try:
                for record in await self._reader.fetch():
                    for frame, _ in found_in(record):
                        if (found := self._known.get(frame.correlation_id)) is not None:
                            found.take(frame, record.offset)
            except OffsetExpiredError as error:
                log.warning("results.skipped", reason=str(error))
                self._known.clear()  # what was missed is looked up when it is asked for
                await self._reader.close()
                await self._open()
