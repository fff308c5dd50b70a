"""Word of how a request has ended, on its way to the webhook that its caller named.

A delivery is the argument of an ordinary request on a topic of its own, so that it is as safe as any other: it is
published before the request that it tells of is committed. One may come more than once.
"""

import zlib
from typing import Literal

import msgspec

from chains_stream.broker import Broker, TopicSpec
from chains_stream.messages import Request, new_id
from chains_stream.settings import Settings
from chains_stream.signature import BACKGROUND

SUFFIX = ".webhooks"

Status = Literal["SUCCEEDED", "FAILED", "EXPIRED", "CANCELED"]


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """A request that has ended, and where its answer lies.

    Attributes:
        url: that is to be told.
        request_id: the request's own.
        correlation_id: of the frames that answer it.
        topic: that they lie on.
        partition: of that topic.
        begin: no frame lies before this offset.
        end: the end of the answer lies in the record at this offset, or before it.
        status: how it ended. Where frames tell otherwise, they count: it may have ended before, in another way.
        attempt: to tell the webhook, from 1.
        ended_ms: when it ended, in Unix time; 0 until whoever first tells the webhook has noted the time.
    """

    url: str
    request_id: str
    correlation_id: bytes
    topic: str
    partition: int
    begin: int
    end: int
    status: Status
    attempt: int = 1
    ended_ms: int = 0


def webhooks_topic(request_topic: str) -> str:
    """Name the topic of the deliveries for a request topic, be it the ordinary one or that of the background."""
    return request_topic.removesuffix(BACKGROUND) + SUFFIX


def webhooks_spec(request_topic: str, settings: Settings) -> TopicSpec:
    """Describe that topic, which whoever publishes to it ensures."""
    return TopicSpec(webhooks_topic(request_topic), settings.partitions, settings.request_retention_ms)


async def send_delivery(broker: Broker, request_topic: str, delivery: Delivery, request: Request) -> None:
    """Publish a delivery, and return when it is stored. Raises BrokerError.

    It is a request with ids of its own: whoever cancels the one that it tells of does not cancel it. Its trace is the
    same.
    """
    topic = webhooks_topic(request_topic)
    headers = Request(
        correlation_id=new_id(), traceparent=request.traceparent, tracestate=request.tracestate
    ).to_headers()
    partition = zlib.crc32(delivery.correlation_id) % await broker.partitions(topic)
    value = msgspec.msgpack.encode({"delivery": delivery})
    await (await broker.publish(topic, value, partition=partition, headers=headers))
