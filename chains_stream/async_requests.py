"""Requests that nobody waits for: begun in time or not at all, tried again later, and told of when they have ended."""

from chains_stream import metrics
from chains_stream.broker import Broker, Record
from chains_stream.cancellations import Cancellations, CancelledLog
from chains_stream.delays import Delays
from chains_stream.deliveries import Delivery, send_delivery
from chains_stream.errors import BrokerError, OffsetExpiredError, OverloadedError, QueueExpiredError, is_retryable
from chains_stream.log import get_logger
from chains_stream.messages import ATTEMPT, START_BY, Headers, Request, Retry, now_ms
from chains_stream.outcome import Outcome, status_of
from chains_stream.patience import persist, place_of
from chains_stream.readback import ReadBack
from chains_stream.replies import Reply
from chains_stream.settings import Settings

log = get_logger(__name__)


class AsyncRequests:
    """What all of them on one topic have in common; `name` is that of metrics."""

    def __init__(
        self, name: str, topic: str, broker: Broker, *, delays: Delays, read_back: ReadBack, settings: Settings
    ) -> None:
        self.topic = topic
        self.broker = broker
        self.delays = delays
        self.read_back = read_back
        # Those that the control topic tells of, and those of before.
        self.cancellations = Cancellations(settings.deadline)
        self.cancelled_log = CancelledLog(broker)
        self.expired = metrics.EXPIRED.labels(name)
        self.retried = metrics.RETRIED.labels(name)


class AsyncRequest:
    """One of them, in the hands of a worker; `redelivered` if another one may have begun it."""

    __slots__ = ("_all", "_record", "_redelivered", "_reply", "_request")

    def __init__(
        self, record: Record, request: Request, reply: Reply, common: AsyncRequests, *, redelivered: bool
    ) -> None:
        self._record = record
        self._request = request
        self._reply = reply
        self._all = common
        self._redelivered = redelivered

    async def begin(self) -> Outcome | None:
        """Say that it begins; or give how it has ended without being run: it is over already, or late."""
        request, begun = self._request, self._request.attempt > 1
        try:
            if self._redelivered:
                frames, fence = await persist(lambda: self._reply.sent_before(self._all.read_back), self._record)
                if (status := status_of(frames)) is not None:
                    return Outcome(answered=True, ended=(status, fence))
                begun = begun or bool(frames)
            elif await self._was_cancelled():
                return Outcome(cancelled=True)
        except OffsetExpiredError as error:
            log.warning("answers.unknown", **place_of(self._record), reason=str(error))
        except BrokerError as error:
            return Outcome(error=error)
        if not begun and request.start_by_ms is not None and now_ms() > request.start_by_ms:
            self._all.expired.inc()
            return Outcome(error=QueueExpiredError("the request waited in its queue for longer than it was given"))
        if request.progress and not self._redelivered:  # else `sent_before` has said so
            await self._reply.begins()
        return None

    async def put_off(self, error: Exception) -> float | None:
        """Publish it once more, to be run after a while, if it may be and that can help; give the seconds until then.

        It goes first as one more record, then this one is committed: if its worker dies in between, both are run.
        """
        request, record, delays = self._request, self._record, self._all.delays
        retry = request.retry
        if retry is None or request.attempt >= retry.attempts or not is_retryable(error):
            return None
        asked = error.retry_after or 0.0 if isinstance(error, OverloadedError) else 0.0
        delay = delays.rounded(max(delay_after(retry, request.attempt), asked))
        if request.deadline_ms is not None and now_ms() + delay * 1000 >= request.deadline_ms:
            return None
        headers = _next_headers(record.headers, request.attempt + 1)
        try:
            await persist(
                lambda: delays.send(record.topic, record.value, delay_seconds=delay, key=record.key, headers=headers),
                record,
            )
        except BrokerError as unsent:
            log.error("retry.unsent", **place_of(record), reason=str(unsent))  # noqa: TRY400 - the message says it all
            return None
        self._all.retried.inc()
        return delay

    async def tell(self, outcome: Outcome, end: int | None) -> None:
        """Have its webhook, if there is one, told that it has ended, with the end of its answer at an offset."""
        request = self._request
        if request.webhook is None or request.reply_topic is None or not request.frames:
            return
        status = outcome.status
        try:
            if outcome.answered and outcome.ended is None:
                frames, end = await persist(lambda: self._reply.sent_before(self._all.read_back), self._record)
                status = status_of(frames) or "FAILED"
            elif outcome.ended is not None:
                status, end = outcome.ended
            assert end is not None, "frames have offsets"
            delivery = Delivery(
                url=request.webhook,
                request_id=request.request_id,
                correlation_id=request.correlation_id,
                topic=request.reply_topic,
                partition=request.reply_partition or 0,
                begin=end if request.reply_offset is None else request.reply_offset,
                end=end,
                status=status,
            )
            await persist(lambda: send_delivery(self._all.broker, self._all.topic, delivery, request), self._record)
        except BrokerError as error:
            log.error("delivery.unsent", **place_of(self._record), reason=str(error))  # noqa: TRY400 - as above

    async def _was_cancelled(self) -> bool:
        """Look into the reply log, if it may have been cancelled before this process could hear of it."""
        request, known_ms = self._request, self._all.cancellations.known_since_ms
        topic, begin, partition = request.reply_topic, request.reply_offset, request.reply_partition or 0
        if topic is None or begin is None or not request.frames:
            return False
        if request.attempt == 1 and self._record.timestamp_ms >= known_ms:
            return False
        look = self._all.cancelled_log.tells_of
        return await persist(lambda: look(topic, partition, begin, request.correlation_id, known_ms), self._record)


def delay_after(retry: Retry, attempt: int) -> float:
    """Give the seconds from the end of a try to the next one."""
    return min(retry.max_delay_ms, retry.initial_delay_ms << min(attempt - 1, 32)) / 1000


def _next_headers(headers: Headers, attempt: int) -> Headers:
    """Give the headers of the next try. The time by which it was to begin has been kept."""
    kept = tuple((name, value) for name, value in headers if name not in (ATTEMPT, START_BY))
    return (*kept, (ATTEMPT, attempt.to_bytes(4, "big")))
