"""Webhooks from the end of a request to its receiver, which answers badly, late, or not at all; on both brokers."""

import asyncio
import base64
import hashlib
import hmac
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from typing import Any, cast
from uuid import uuid4

import msgspec
import pytest
from prometheus_client import REGISTRY

import chains_stream as chains
from chains_stream import webhooks
from chains_stream.broker import Broker, TopicSpec
from chains_stream.calls import Caller
from chains_stream.chain import Chain
from chains_stream.client import open_caller, open_connected
from chains_stream.delays import Delays, Mover
from chains_stream.deliveries import Delivery, Status, send_delivery, webhooks_spec
from chains_stream.errors import CallCancelledError, QueueExpiredError, to_detail
from chains_stream.messages import (
    Cancelled,
    Chunk,
    Done,
    Failed,
    Frame,
    Headers,
    Request,
    Started,
    Undelivered,
    decode_frames,
    encode_frames,
    new_id,
    now_ms,
)
from chains_stream.posting import Answer, Poster
from chains_stream.settings import Settings
from chains_stream.webhooks import WebhookHost, open_webhooks
from tests.receiver import OK, WAIT, Post, Receiver, answer, receiving
from tests.serving import Greet, Say, serving

KEYS = (b"old" * 8, b"new" * 8)
CLASSES = (0.3, 1.0)  # of the delay queue
HOUR_MS = 3_600_000
BUSY = answer("500 Internal Server Error", body="no")


def raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.msgpack.encode(value))


class Ended:
    """Requests that have ended, and whoever tells of it."""

    def __init__(self, stack: AsyncExitStack, entrypoint: type[chains.ChainletBase], settings: Settings) -> None:
        self.settings = settings
        self.chain = Chain.of(entrypoint)
        self.results = f"{settings.namespace}.results"
        self.broker: Broker
        self.caller: Caller
        self._stack = stack

    async def start(self) -> None:
        self.broker = await open_connected(self._stack, self.settings)
        self.caller = await open_caller(self._stack, self.broker, self.settings)
        topic = self.chain.topic(self.chain.entrypoint, self.settings.namespace)
        await self.broker.ensure_topics([TopicSpec(self.results, 1, HOUR_MS), webhooks_spec(topic, self.settings)])
        mover = Mover(self.broker, self.settings, CLASSES)
        self._stack.push_async_callback(mover.drain)
        await mover.start()

    async def host(self, *schedule: float) -> WebhookHost:
        """Begin to deliver, with these delays before further tries."""
        delays = Delays(self.broker, self.settings, CLASSES)
        host = WebhookHost(
            self.chain, self.broker, self.caller, self.settings, delays=delays, schedule=schedule or (0.1, 0.1)
        )
        self._stack.push_async_callback(host.drain)
        await host.start()
        return host

    async def end(self, url: str, *frames: Frame, status: Status = "SUCCEEDED", claim: Headers = ()) -> str:
        """End a request with these frames, each in a record of its own; give its id."""
        begin = await self.broker.end_offset(self.results, 0)
        end = begin
        for frame in frames:
            end = await (await self.broker.publish(self.results, encode_frames([frame]), partition=0, headers=claim))
        delivery = Delivery(
            url=url,
            request_id=f"r{uuid4().hex}",
            correlation_id=frames[-1].correlation_id,
            topic=self.results,
            partition=0,
            begin=begin,
            end=end,
            status=status,
        )
        topic = self.chain.topic(self.chain.entrypoint, self.settings.namespace)
        await send_delivery(self.broker, topic, delivery, Request(correlation_id=delivery.correlation_id))
        return delivery.request_id

    async def undelivered(self) -> Undelivered:
        """Wait until a webhook is given up."""
        reader = await self.broker.read(self.results, {0: 0})
        try:
            async with asyncio.timeout(WAIT):
                while True:
                    for record in await reader.fetch():
                        for frame in decode_frames(record.value):
                            if isinstance(frame, Undelivered):
                                return frame
        finally:
            await reader.close()


@asynccontextmanager
async def ended(entrypoint: type[Any] = Greet, **settings: Any) -> AsyncIterator[Ended]:
    secrets = ",".join(f"whsec_{base64.b64encode(key).decode()}" for key in KEYS)
    named = {
        "namespace": f"t{uuid4().hex[:10]}",
        "partitions": 2,
        "reply_partitions": 1,
        "grace_period": 0.2,
        "webhook_secrets": secrets,
        "webhook_allow_private": True,
    }
    async with AsyncExitStack() as stack:
        found = Ended(stack, entrypoint, Settings.of(**{**named, **settings}))
        await found.start()
        yield found


@pytest.fixture(params=["memory", pytest.param("kafka", marks=pytest.mark.kafka)])
def broker(request: pytest.FixtureRequest) -> str:
    return "memory://" if request.param == "memory" else str(request.getfixturevalue("kafka_url"))


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


def counted(outcome: str) -> float:
    return REGISTRY.get_sample_value("chains_webhooks_total", {"outcome": outcome}) or 0.0


async def in_turn(receiver: Receiver, *answers: bytes) -> None:
    """Have the receiver answer so, one after another, and well from then on."""
    left = list(answers)

    async def give(_post: Post) -> bytes:
        return left.pop(0) if left else OK

    receiver.answers = give


async def test_a_result_is_delivered_and_signed_with_every_secret(broker: str, receiver: Receiver) -> None:
    before, began = counted("delivered"), now_ms()
    async with ended(broker=broker) as requests:
        await requests.host()
        request_id = await requests.end(f"{receiver.url}/hook?token=1", Done(new_id(), 1, 0, raw("Hello, Ada!")))
        [post] = await receiver.wait()
    assert post.path == "/hook?token=1"
    moment = datetime.fromisoformat(post.json["timestamp"])
    assert moment.tzinfo == UTC
    assert began <= moment.timestamp() * 1000 + 1 <= now_ms() + 1
    assert post.json == {
        "type": "async_request_completed",
        "timestamp": post.json["timestamp"],
        "request_id": request_id,
        "status": "SUCCEEDED",
        "data": "Hello, Ada!",
        "errors": [],
    }
    assert post.headers["content-type"] == "application/json"
    assert post.headers["host"] == f"127.0.0.1:{receiver.port}"
    assert post.headers["webhook-id"] == request_id
    assert abs(int(post.headers["webhook-timestamp"]) - time.time()) < WAIT
    signed = f"{request_id}.{post.headers['webhook-timestamp']}.".encode() + post.body
    digests = (hmac.new(key, signed, hashlib.sha256).digest() for key in KEYS)
    assert post.headers["webhook-signature"] == " ".join(f"v1,{base64.b64encode(each).decode()}" for each in digests)
    assert counted("delivered") == before + 1


def stream(texts: Sequence[str], attempt: int) -> list[Frame]:
    call = b"s" * 16
    return [
        *(Chunk(call, attempt, number, raw(text)) for number, text in enumerate(texts)),
        Done(call, attempt, len(texts), raw(None)),
    ]


async def test_a_stream_is_the_list_of_its_chunks_that_count(broker: str, receiver: Receiver) -> None:
    async with ended(Say, broker=broker) as requests:
        await requests.host()
        first, second = stream(["lost"], 1), stream(["a", "é", ""], 2)
        await requests.end(receiver.url, first[0], Started(b"s" * 16, 2, resumes=False), *second)
        [post] = await receiver.wait()
        assert (post.json["status"], post.json["data"], post.json["errors"]) == ("SUCCEEDED", ["a", "é", ""], [])
        await requests.end(receiver.url, *stream([], 1))
        assert (await receiver.wait(2))[1].json["data"] == []


@pytest.mark.parametrize(
    ("frame", "status", "code", "message"),
    [
        (Failed(b"f" * 16, 1, to_detail(ValueError("too loud"))), "FAILED", "remote", "too loud"),
        (Failed(b"f" * 16, 1, to_detail(QueueExpiredError("too late"))), "EXPIRED", "queue-expired", "too late"),
        (Failed(b"f" * 16, 1, to_detail(CallCancelledError("gone"))), "CANCELED", "cancelled", "gone"),
        (Cancelled(b"f" * 16, 1), "CANCELED", "cancelled", "the request was cancelled"),
        (Done(b"f" * 16, 1, 3, raw(None)), "FAILED", "stream-interrupted", "some of the answer is missing in the log"),
        (Done(b"f" * 16, 1, 0, raw(7)), "SUCCEEDED", "invalid-result", None),
    ],
)
async def test_what_has_no_result_says_why(
    receiver: Receiver, frame: Frame, status: Status, code: str, message: str | None
) -> None:
    async with ended() as requests:
        await requests.host()
        await requests.end(receiver.url, frame, status="FAILED")
        [post] = await receiver.wait()
    assert (post.json["status"], post.json["data"]) == (status, None)
    [error] = post.json["errors"]
    assert error["code"] == code
    assert message is None or error["message"] == message


async def test_a_failed_try_is_repeated_under_the_same_id(broker: str, receiver: Receiver) -> None:
    before = counted("failed")
    await in_turn(receiver, BUSY, BUSY)
    async with ended(broker=broker) as requests:
        await requests.host()
        request_id = await requests.end(receiver.url, Done(new_id(), 1, 0, raw("x")))
        posts = await receiver.wait(3)
    assert {post.headers["webhook-id"] for post in posts} == {request_id}
    assert len({post.body for post in posts}) == 1  # the moment too is that of the request, and not of the try
    assert counted("failed") == before + 2


async def test_a_receiver_that_is_gone_is_not_asked_again(broker: str, receiver: Receiver) -> None:
    before = counted("undelivered")
    await in_turn(receiver, answer("410 Gone"))
    async with ended(broker=broker) as requests:
        await requests.host()
        call = new_id()
        await requests.end(receiver.url, Done(call, 7, 0, raw("x")))
        assert await requests.undelivered() == Undelivered(call, 1, "410 Gone")
    assert len(receiver.posts) == 1
    assert counted("undelivered") == before + 1


async def test_a_redirect_is_not_followed(broker: str, receiver: Receiver) -> None:
    redirect = answer("302 Found", f"location: {receiver.url}/elsewhere")
    await in_turn(receiver, redirect, redirect)
    async with ended(broker=broker) as requests:
        await requests.host(0.1)
        await requests.end(f"{receiver.url}/hook", Done(new_id(), 1, 0, raw("x")))
        assert (await requests.undelivered()).reason == "302 Found"
    assert [post.path for post in receiver.posts] == ["/hook", "/hook"]


async def test_retry_after_puts_the_next_try_off(receiver: Receiver) -> None:
    await in_turn(receiver, answer("503 Service Unavailable", "retry-after: 1"))
    async with ended() as requests:
        await requests.host(0.1)
        began = time.monotonic()
        await requests.end(receiver.url, Done(new_id(), 1, 0, raw("x")))
        await receiver.wait(2)
    assert time.monotonic() - began >= 1


async def test_a_slow_receiver_does_not_hold_up_others(
    broker: str, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if more is for it than there are places."""
    monkeypatch.setattr(webhooks, "PATIENCE", 0.2)
    never = asyncio.Event()

    async def hang(post: Post) -> bytes:
        if post.path == "/slow":
            await never.wait()
        return OK

    receiver.answers = hang
    async with ended(broker=broker) as requests:
        for _ in range(webhooks.PLACES + 10):
            await requests.end(f"{receiver.url}/slow", Done(new_id(), 1, 0, raw("x")))
        await requests.host()
        await receiver.wait(webhooks.A_RECEIVERS_PLACES, path="/slow")
        # Another host, at the same address.
        await requests.end(f"http://localhost:{receiver.port}/quick", Done(new_id(), 1, 0, raw("x")))
        await receiver.wait(path="/quick")
        assert len(await receiver.wait(0, path="/slow")) == webhooks.A_RECEIVERS_PLACES


async def test_a_crowd_for_a_slow_receiver_does_not_hold_up_others(receiver: Receiver) -> None:
    """Each that waits for a place at its receiver would take one that others could have, for all of its patience."""
    never = asyncio.Event()

    async def hang(post: Post) -> bytes:
        if post.path == "/slow":
            await never.wait()
        return OK

    receiver.answers = hang
    async with ended() as requests:
        for _ in range(10 * webhooks.PLACES):
            await requests.end(f"{receiver.url}/slow", Done(new_id(), 1, 0, raw("x")))
        await requests.end(f"http://localhost:{receiver.port}/quick", Done(new_id(), 1, 0, raw("x")))
        await requests.host()
        began = time.monotonic()
        await receiver.wait(path="/quick")
        assert time.monotonic() - began < 5


async def test_a_delivery_that_meets_a_defect_is_tried_again(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    post, failures = Poster.post, [RuntimeError("a defect")]

    async def fail_once(poster: Poster, url: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        if failures:
            raise failures.pop()
        return await post(poster, url, body, headers)

    monkeypatch.setattr(Poster, "post", fail_once)
    async with ended() as requests:
        await requests.host()
        request_id = await requests.end(receiver.url, Done(new_id(), 1, 0, raw("x")))
        [told] = await receiver.wait()
        assert told.headers["webhook-id"] == request_id


async def test_what_waits_for_a_place_comes_in_its_turn(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "A_RECEIVERS_PLACES", 1)
    monkeypatch.setattr(webhooks, "PATIENCE", 0.0)
    go = asyncio.Event()

    async def hold(_post: Post) -> bytes:
        await go.wait()
        return OK

    receiver.answers = hold
    async with ended() as requests:
        await requests.host()
        ids = {await requests.end(receiver.url, Done(new_id(), 1, 0, raw("x"))) for _ in range(3)}
        await receiver.wait()
        go.set()
        assert {post.headers["webhook-id"] for post in await receiver.wait(3)} == ids


async def test_a_delivery_that_a_restart_cuts_off_comes_again(broker: str, receiver: Receiver) -> None:
    never = asyncio.Event()

    async def hang(_post: Post) -> bytes:
        await never.wait()
        return OK

    receiver.answers = hang
    async with ended(broker=broker) as requests:
        first = await requests.host()
        request_id = await requests.end(receiver.url, Done(new_id(), 1, 0, raw("x")))
        await receiver.wait()
        await first.drain()
        await in_turn(receiver)
        await requests.host()
        posts = await receiver.wait(2)
    assert [post.headers["webhook-id"] for post in posts] == [request_id] * 2


async def test_a_delivery_waits_for_as_long_as_nobody_delivers(broker: str, receiver: Receiver) -> None:
    """Longer than requests wait whose callers do."""
    async with ended(broker=broker, deadline=0.001) as requests:
        await requests.end(receiver.url, Done(new_id(), 1, 0, raw("x")))
        await requests.host()
        await receiver.wait()


async def test_a_large_result_comes_from_the_store(receiver: Receiver, tmp_path: Any) -> None:
    async with ended(store=str(tmp_path)) as requests:
        await requests.host()
        text = "large" * 300_000
        claim = await requests.caller.store.put_answer(msgspec.msgpack.encode(text))
        await requests.end(receiver.url, Done(new_id(), 1, 0, raw(None)), claim=claim)
        [post] = await receiver.wait()
        assert post.json["data"] == text


@pytest.mark.parametrize("entrypoint", [Greet, Say])
async def test_what_is_too_large_for_a_body_is_named(receiver: Receiver, entrypoint: type[Any]) -> None:
    frames = stream(["x" * 300] * 4, 1) if entrypoint is Say else [Done(new_id(), 1, 0, raw("x" * 1000))]
    async with ended(entrypoint, max_body_bytes=1000) as requests:
        await requests.host()
        request_id = await requests.end(receiver.url, *frames)
        [post] = await receiver.wait()
    assert (post.json["data"], post.json["status"]) == (None, "SUCCEEDED")
    assert post.json["location"] == f"/async_request/{request_id}"


async def test_an_answer_that_the_log_has_dropped_takes_no_other_with_it(receiver: Receiver) -> None:
    async with ended() as requests:
        old = await requests.end(receiver.url, Done(new_id(), 1, 0, raw("old")))
        await requests.broker.delete_before(requests.results, {0: 1})
        new = await requests.end(receiver.url, Done(new_id(), 1, 0, raw("new")))
        await requests.host()
        found = {post.headers["webhook-id"]: post.json for post in await receiver.wait(2)}
    assert (found[old]["data"], found[old]["errors"][0]["code"]) == (None, "offset-expired")
    assert (found[new]["data"], found[new]["errors"]) == ("new", [])


async def test_a_private_address_is_given_up_at_once(receiver: Receiver) -> None:
    async with ended(webhook_allow_private=False) as requests:
        await requests.host()
        await requests.end(f"http://localhost:{receiver.port}/", Done(new_id(), 1, 0, raw("x")))
        assert "public internet" in (await requests.undelivered()).reason
    assert receiver.posts == []


async def test_logs_tell_the_host_and_the_request_and_no_secrets(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    await in_turn(receiver, BUSY)
    with caplog.at_level(logging.INFO):
        async with ended() as requests:
            await requests.host(0.1)
            await requests.end(f"{receiver.url}/hunter2?hunter2", Done(new_id(), 1, 0, raw("x")))
            await receiver.wait(2)
    lines = [cast("dict[str, Any]", r.msg) for r in caplog.records if isinstance(r.msg, dict)]
    assert [line["event"] for line in lines if line["event"].startswith("webhook.")] == [
        "webhook.failed",
        "webhook.delivered",
    ]
    assert {line["host"] for line in lines if line["event"].startswith("webhook.")} == {"127.0.0.1"}
    assert "hunter2" not in caplog.text
    assert not [key for key in KEYS if base64.b64encode(key).decode() in caplog.text]


@pytest.mark.parametrize(("endpoint", "status"), [("", "SUCCEEDED"), ("/gone", "WEBHOOK_FAILED")])
async def test_a_request_that_nobody_waits_for_ends_with_its_webhook(
    broker: str, receiver: Receiver, endpoint: str, status: str
) -> None:
    """From the gateway, through a worker, to the receiver, with the parts as a process puts them together."""

    async def give(post: Post) -> bytes:
        return answer("410 Gone") if post.path == "/gone" else OK

    receiver.answers = give
    async with serving(Greet, broker=broker, webhook_allow_private=True) as served, AsyncExitStack() as stack:
        await open_webhooks(stack, served.chain, served.broker, served.caller, served.settings)
        body = {"model_input": {"name": "Ada"}, "webhook_endpoint": receiver.url + endpoint}
        accepted = await served.http.post("/async_run_remote", json=body)
        assert accepted.status_code == 202, accepted.text
        [post] = await receiver.wait()
        assert post.json["request_id"] == post.headers["webhook-id"] == accepted.json()["request_id"]
        assert (post.json["status"], post.json["data"]) == ("SUCCEEDED", "Hello, Ada!")
        assert "webhook-signature" not in post.headers  # there is no secret to sign with
        report: dict[str, Any] = {"status": ""}
        async with asyncio.timeout(WAIT):
            while report["status"] != status:
                report = (await served.http.get(accepted.headers["location"])).json()
        assert report["result"] == "Hello, Ada!"
