"""Webhooks, by the Standard Webhooks specification (standardwebhooks.com): signed, and tried again for a day.

A `Delivery` is a request like others: a worker takes it from its topic, and commits it once it is delivered, put off
into the delay queue, or given up. So none is lost with a process; and a receiver that is told twice knows by
`webhook-id`, the request's id.
"""

import asyncio
import base64
import hashlib
import hmac
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from datetime import UTC
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import TypeVar

import msgspec
from structlog.contextvars import bind_contextvars

from chains_stream import metrics
from chains_stream.batching import FrameBatcher
from chains_stream.broker import Broker
from chains_stream.calls import Caller
from chains_stream.chain import Chain
from chains_stream.chainlet import ChainletBase, signature
from chains_stream.codec import Codec, codec_of
from chains_stream.delays import Delays, ensure_delayed
from chains_stream.deliveries import Delivery, webhooks_spec
from chains_stream.errors import BrokerError, InvalidArgumentError, StoreError
from chains_stream.letters import dead_letter_spec
from chains_stream.local import Callee
from chains_stream.log import get_logger
from chains_stream.messages import Request, Undelivered, encode_frames, new_id, now_ms
from chains_stream.notices import Notices
from chains_stream.options import Compute, RemoteConfig
from chains_stream.policy import backoff
from chains_stream.posting import Answer, Poster, host_of
from chains_stream.quarantine import Quarantine
from chains_stream.readback import ReadBack
from chains_stream.serving import Service
from chains_stream.settings import Settings
from chains_stream.worker import Worker

# Seconds before each further try: the specification's, as far as a day. They are classes of the delay queue.
SCHEDULE = (5.0, 300.0, 1800.0, 7200.0, 18_000.0, 36_000.0, 36_000.0)
MOST_PUT_OFF = 36_000.0  # seconds, whatever a receiver asks for
PLACES = 64  # deliveries of a process at once
A_RECEIVERS_PLACES = 32  # of them that go to one host, which may be slow
PATIENCE, CROWDED = 1.0, 5.0  # seconds to wait for such a place; until it is looked for again
MOST_WAITING = 8  # deliveries that wait so for one host; each takes a place that others could have
SMALL = 1 << 20  # bytes of a body, up to which as many are held as there are places
READINGS = 8  # answers that are read at once, each of any size

T = TypeVar("T")

log = get_logger(__name__)


def sign(keys: Sequence[bytes], message_id: str, timestamp: int, body: bytes) -> str:
    """Give the header `webhook-signature`: one signature a key, so that receivers change theirs when they like."""
    signed = b"%s.%d.%s" % (message_id.encode(), timestamp, body)
    digests = (hmac.digest(key, signed, hashlib.sha256) for key in keys)
    return " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)


def retry_after(text: str | None, now: float) -> float:
    """Give the seconds that `Retry-After` asks for, at the Unix time `now`; 0 if it is not there, or can't be read."""
    if text is None:
        return 0.0
    if re.fullmatch("[0-9]{1,10}", text.strip(), re.ASCII):
        return float(text)
    try:
        moment = parsedate_to_datetime(text)
        return max(0.0, (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() - now)
    except (ValueError, OverflowError):
        return 0.0


class DeliverWebhook(ChainletBase):
    """Tells a receiver how a request ended. Its caller is nobody: what it makes of a delivery, it publishes."""

    remote_config = RemoteConfig(compute=Compute(predict_concurrency=PLACES))

    def __init__(
        self, notices: Notices, poster: Poster, putting_off: "PuttingOff", broker: Broker, settings: Settings
    ) -> None:
        self._notices = notices
        self._poster = poster
        self._putting_off = putting_off
        self._broker = broker
        self._keys = settings.webhook_keys
        self._receivers = _Receivers()
        self._reading = asyncio.Semaphore(READINGS)
        self._large = asyncio.Semaphore(max(1, settings.max_buffered_bytes // settings.max_body_bytes))

    async def run_remote(self, delivery: Delivery) -> None:
        bind_contextvars(request_id=delivery.request_id)
        if not delivery.ended_ms:
            delivery = msgspec.structs.replace(delivery, ended_ms=now_ms())  # all tries tell of one moment
        host, attempt = host_of(delivery.url), delivery.attempt
        async with self._receivers.place(host) as free:
            if not free:
                await _stored(lambda: self._putting_off.again(delivery, CROWDED))
                return
            try:
                answer = await self._try(delivery)
            except InvalidArgumentError as error:
                await self._give_up(delivery, str(error))
                return
            except Exception as error:
                # A defect of ours. Raised, it would end the delivery, and nobody would ever hear of it.
                log.exception("webhook.defect", host=host, attempt=attempt)
                answer = Answer(None, f"the gateway failed: {error!r}")
        if answer.status is not None and HTTPStatus.OK <= answer.status < HTTPStatus.MULTIPLE_CHOICES:
            log.info("webhook.delivered", host=host, attempt=attempt, status=answer.status)
            metrics.WEBHOOKS.labels("delivered").inc()
            return
        delay = self._putting_off.delay(delivery, answer)
        if delay is None:
            await self._give_up(delivery, answer.said)
            return
        log.warning("webhook.failed", host=host, attempt=attempt, reason=answer.said, again_in=delay)
        following = msgspec.structs.replace(delivery, attempt=attempt + 1)
        await _stored(lambda: self._putting_off.again(following, delay))
        metrics.WEBHOOKS.labels("failed").inc()

    async def _try(self, delivery: Delivery) -> Answer:
        """Post once. Raises InvalidArgumentError for a URL that is refused."""
        large = False
        while True:
            async with self._large if large else nullcontext():
                try:
                    async with self._reading:
                        body = await self._notices.body(delivery)
                except (BrokerError, StoreError) as error:
                    return Answer(None, f"the answer of the request can't be read: {error}")
                if large or len(body) <= SMALL:
                    return await self._poster.post(delivery.url, body, self._headers(delivery, body))
            # Read again once there is a place for it: what waits for one is not held.
            large = True

    def _headers(self, delivery: Delivery, body: bytes) -> dict[str, str]:
        timestamp = int(time.time())
        headers = {
            "content-type": "application/json",
            "user-agent": "chains_stream",
            "webhook-id": delivery.request_id,
            "webhook-timestamp": str(timestamp),
        }
        if self._keys:
            headers["webhook-signature"] = sign(self._keys, delivery.request_id, timestamp, body)
        return headers

    async def _give_up(self, delivery: Delivery, reason: str) -> None:
        """Tell whoever asks for the request that its receiver could not be told."""
        log.warning("webhook.given_up", host=host_of(delivery.url), attempt=delivery.attempt, reason=reason)
        metrics.WEBHOOKS.labels("undelivered").inc()
        value = encode_frames([Undelivered(delivery.correlation_id, delivery.attempt, reason)])

        async def publish() -> None:
            await (await self._broker.publish(delivery.topic, value, partition=delivery.partition))

        await _stored(publish)


async def _stored(action: Callable[[], Awaitable[T]]) -> T:
    """Do something with the broker, again for as long as it is away. Raises BrokerError if that would not help."""
    attempt = 1
    while True:
        try:
            return await action()
        except BrokerError as error:
            if not error.retryable:
                raise
            log.warning("broker.retry", attempt=attempt, reason=str(error))
        await asyncio.sleep(backoff(attempt))
        attempt += 1


class PuttingOff:
    """When a delivery is tried again, and how it gets there."""

    def __init__(self, delays: Delays, topic: str, codec: Codec, schedule: Sequence[float]) -> None:
        self._delays = delays
        self._topic = topic
        self._codec = codec
        self._schedule = schedule

    def delay(self, delivery: Delivery, answer: Answer) -> float | None:
        """Give the seconds until the next try; None if there is to be none."""
        if answer.status == HTTPStatus.GONE or delivery.attempt > len(self._schedule):
            return None
        delay = self._schedule[delivery.attempt - 1]
        if answer.status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
            delay = max(delay, min(retry_after(answer.retry_after, time.time()), MOST_PUT_OFF))
        return delay

    async def again(self, delivery: Delivery, delay: float) -> None:
        """Have it come again. Raises BrokerError."""
        value = self._codec.encode_arguments((delivery,), {})
        headers = Request(correlation_id=new_id()).to_headers()
        await self._delays.send(self._topic, value, delay_seconds=delay, headers=headers)


class _Receivers:
    """Which hosts are posted to: a slow one may take half of the places, and others have theirs."""

    def __init__(self) -> None:
        self._places: dict[str, asyncio.Semaphore] = {}
        self._users: dict[str, int] = {}

    @asynccontextmanager
    async def place(self, host: str) -> AsyncIterator[bool]:
        """Hold a place for a host; False if none was free for some time."""
        if self._users.get(host, 0) >= A_RECEIVERS_PLACES + MOST_WAITING:
            yield False
            return
        free = self._places.setdefault(host, asyncio.Semaphore(A_RECEIVERS_PLACES))
        self._users[host] = self._users.get(host, 0) + 1
        held = False
        try:
            try:
                async with asyncio.timeout(PATIENCE):
                    held = await free.acquire()
            except TimeoutError:
                held = False
            yield held
        finally:
            if held:
                free.release()
            self._users[host] -= 1
            if not self._users[host]:
                del self._users[host], self._places[host]


class WebhookHost:
    """Delivers the webhooks of a Chain's entrypoint, as one of any number of processes that do.

    `schedule` are the seconds before each further try.
    """

    def __init__(
        self,
        chain: Chain,
        broker: Broker,
        caller: Caller,
        settings: Settings,
        *,
        delays: Delays,
        schedule: Sequence[float] = SCHEDULE,
        poster: Poster | None = None,
    ) -> None:
        self._spec = webhooks_spec(chain.topic(chain.entrypoint, settings.namespace), settings)
        self.topic = self._spec.name
        self._broker = broker
        self._settings = settings
        self._poster = poster or Poster(allow_private=settings.webhook_allow_private)
        self._read_back = ReadBack(broker)
        self._frames = FrameBatcher(broker)
        notices = Notices(self._read_back, caller.store, codec_of(signature(chain.entrypoint)), settings)
        putting_off = PuttingOff(delays, self.topic, codec_of(signature(DeliverWebhook)), schedule)
        self._callee = Callee(DeliverWebhook, DeliverWebhook(notices, self._poster, putting_off, broker, settings))
        # No caller waits for a delivery: it may lie in its topic for as long as that keeps it.
        lasting = settings.model_copy(update={"deadline": settings.request_retention_ms / 1000})
        service = Service(self._callee, self.topic, broker, frames=self._frames, store=caller.store, settings=lasting)
        self.worker = Worker(service, Quarantine())

    async def start(self) -> None:
        """Create the topic, and begin to take deliveries. Raises BrokerError."""
        await self._broker.ensure_topics([self._spec, dead_letter_spec(self.topic, self._settings)])
        await self.worker.start()

    async def failed(self) -> None:
        """Wait until it can't go on. Raises what stopped it."""
        await self.worker.failed()

    async def drain(self) -> None:
        """Stop taking deliveries, and let those on their way end; what the grace period cuts off comes again."""
        await self.worker.drain(self._settings.grace_period)
        await self._read_back.close()
        await self._frames.close()
        await self._poster.close()
        self._callee.close()


async def open_webhooks(
    stack: AsyncExitStack, chain: Chain, broker: Broker, caller: Caller, settings: Settings
) -> WebhookHost:
    """Deliver the webhooks of a Chain, until `stack` is closed; a `Mover` brings those back that were put off.

    Raises ChainsUsageError, BrokerError.
    """
    await ensure_delayed(broker, settings)
    host = WebhookHost(chain, broker, caller, settings, delays=Delays(broker, settings))
    stack.push_async_callback(host.drain)
    await host.start()
    if not settings.webhook_keys:
        log.debug("webhooks.unsigned", hint="set CHAINS_WEBHOOK_SECRETS to have them signed")
    return host
