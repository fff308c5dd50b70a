"""What workers do with requests that nobody waits for; on both brokers."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any
from uuid import uuid4

import msgspec
import pytest
from prometheus_client import REGISTRY

import chains_stream as chains
from chains_stream import serving
from chains_stream.broker import Broker, Committed, TopicSpec
from chains_stream.calls import Caller
from chains_stream.chain import Chain
from chains_stream.client import open_caller, open_connected
from chains_stream.control import Cancel
from chains_stream.delays import Delays, Mover
from chains_stream.deliveries import Delivery, webhooks_topic
from chains_stream.errors import BrokerError, UnknownTopicError
from chains_stream.letters import dead_letter_topic
from chains_stream.messages import (
    Cancelled,
    Chunk,
    Done,
    Failed,
    Frame,
    Request,
    Retry,
    Started,
    decode_frames,
    encode_frames,
    new_id,
    now_ms,
)
from chains_stream.offsets import Note
from chains_stream.settings import Settings
from chains_stream.signature import background_topic
from chains_stream.worker import Host
from tests.members import HOUR_MS
from tests.sample import Seen

WAIT = 40.0
CLASSES = (0.3, 1.0)
HOOK = "https://example.org/hook"
RAN: list[str] = []  # in order
RUNNING: set[str] = set()


class Work(chains.ChainletBase):
    """One at a time; fails as often as it is told to, and waits for ``go NAME`` if it is told to."""

    async def run_remote(self, name: str, fails: int = 0, wait: bool = False) -> str:  # noqa: FBT001, FBT002 - a Chainlet's arguments
        Seen.note("too many" if RUNNING else "alone")
        RUNNING.add(name)
        RAN.append(name)
        Seen.note("began")
        Seen.note(name)
        try:
            await (Seen.until(f"go {name}", seconds=WAIT) if wait else asyncio.sleep(0))
            if Seen.counts[name] <= fails:
                raise RuntimeError(name)
        finally:
            RUNNING.discard(name)
        return name


class Above(chains.ChainletBase):
    def __init__(self, work: Work = chains.depends(Work)) -> None:
        self._work = work

    async def run_remote(self, name: str) -> str:
        return await self._work.run_remote(name)


class Spell(chains.ChainletBase):
    """Streams a name, and fails in the middle of it as often as it is told to."""

    async def run_remote(self, name: str, fails: int = 0) -> AsyncIterator[str]:
        Seen.note(name)
        for number, letter in enumerate(name):
            if number == 2 and Seen.counts[name] <= fails:
                raise RuntimeError(name)
            yield letter


@pytest.fixture(autouse=True)
def nothing_seen() -> Iterator[None]:
    for seen in (Seen.reset, RAN.clear, RUNNING.clear):
        seen()
    yield
    Seen.reset()


class Parts:
    """What publishes requests and reads what becomes of them, and hosts that come and go."""

    def __init__(self, stack: AsyncExitStack, settings: Settings, entrypoint: type[chains.ChainletBase] = Work) -> None:
        self.settings = settings
        self.chain = Chain.of(entrypoint)
        self.topic = self.chain.topic(entrypoint, settings.namespace)
        self.background = background_topic(self.topic)
        self.results = f"{settings.namespace}.results"
        self.frames: dict[bytes, list[tuple[int, Frame]]] = {}
        self.deliveries: dict[bytes, list[Delivery]] = {}
        self.broker: Broker
        self.caller: Caller
        self._stack = stack

    async def start(self) -> None:
        self.broker = await open_connected(self._stack, self.settings)
        self.caller = await open_caller(self._stack, self.broker, self.settings)
        topics = (self.topic, self.background, webhooks_topic(self.topic))
        await self.broker.ensure_topics(
            [TopicSpec(self.results, 1, HOUR_MS), *(TopicSpec(topic, 2, HOUR_MS) for topic in topics)]
        )
        self._results = await self.broker.read(self.results, {0: 0})
        self._told = await self.broker.read(topics[-1], {0: 0, 1: 0})
        for reader in (self._results, self._told):
            self._stack.push_async_callback(reader.close)

    async def host(self) -> Host:
        delays = Delays(self.broker, self.settings, CLASSES)
        host = Host(self.chain, self.chain.chainlets, self.broker, self.caller, self.settings, delays=delays)
        self._stack.push_async_callback(host.drain)
        await host.start()
        return host

    async def move(self) -> None:
        mover = Mover(self.broker, self.settings, CLASSES)
        self._stack.push_async_callback(mover.drain)
        await mover.start()

    async def send(self, name: str, topic: str = "", partition: int = 0, **more: Any) -> bytes:
        """Publish a request as a gateway does; give its correlation id."""
        named = ("start_by_ms", "retry", "webhook", "progress", "deadline_ms", "request_id")
        headers = {key: more.pop(key) for key in named if key in more}
        correlation_id = new_id()
        request = Request(
            correlation_id=correlation_id,
            reply_topic=self.results,
            reply_partition=0,
            reply_offset=await self.broker.end_offset(self.results, 0),
            frames=True,
            **{"progress": True, **headers},
        )
        value = msgspec.msgpack.encode({"name": name, **more})
        topic = topic or self.topic
        await (await self.broker.publish(topic, value, partition=partition, headers=request.to_headers()))
        return correlation_id

    async def end(self, correlation_id: bytes) -> tuple[int, Frame]:
        """Wait for the end of an answer; give it, and where it lies."""
        async with asyncio.timeout(WAIT):
            while True:
                for at, frame in self.frames.get(correlation_id, ()):
                    if isinstance(frame, Done | Failed | Cancelled):
                        return at, frame
                for record in await self._results.fetch():
                    for frame in decode_frames(record.value):
                        self.frames.setdefault(frame.correlation_id, []).append((record.offset, frame))

    async def delivery(self, correlation_id: bytes, count: int = 1) -> Delivery:
        async with asyncio.timeout(WAIT):
            while len(self.deliveries.get(correlation_id, ())) < count:
                for record in await self._told.fetch():
                    found = msgspec.msgpack.decode(record.value, type=dict[str, Delivery])["delivery"]
                    self.deliveries.setdefault(found.correlation_id, []).append(found)
        return self.deliveries[correlation_id][count - 1]

    async def done(self, topic: str) -> None:
        """Wait until all of a topic is committed."""
        async with asyncio.timeout(WAIT):
            while await self.broker.backlog(topic, topic):  # noqa: ASYNC110 - it is asked, and tells nobody
                await asyncio.sleep(0.02)

    def kinds(self, correlation_id: bytes) -> list[str]:
        return [type(frame).__name__ for _, frame in self.frames[correlation_id]]


def made(request: pytest.FixtureRequest) -> Settings:
    url = "memory://" if request.param == "memory" else request.getfixturevalue("kafka_url")
    namespace = f"t{uuid4().hex[:10]}"
    return Settings.of(broker=url, namespace=namespace, partitions=2, reply_partitions=1, grace_period=1, deadline=60)


BROKERS = ["memory", pytest.param("kafka", marks=pytest.mark.kafka)]


@pytest.fixture(params=BROKERS)
async def parts(request: pytest.FixtureRequest) -> AsyncIterator[Parts]:
    async with AsyncExitStack() as stack:
        parts = Parts(stack, made(request))
        await parts.start()
        yield parts


@pytest.fixture(params=BROKERS)
async def spelling(request: pytest.FixtureRequest) -> AsyncIterator[Parts]:
    async with AsyncExitStack() as stack:
        parts = Parts(stack, made(request), Spell)
        await parts.start()
        yield parts


async def began(count: int) -> None:
    """Wait until so many requests have begun."""
    await Seen.until("began", times=count, seconds=WAIT)


def total(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


# --- begun, or not


async def test_it_is_told_of_its_beginning_and_of_its_end(parts: Parts) -> None:
    await parts.host()
    sent = await parts.send("one", webhook=HOOK, request_id="request-one")
    at, end = await parts.end(sent)
    assert isinstance(end, Done)
    assert msgspec.msgpack.decode(end.value) == "one"
    started = parts.frames[sent][0][1]
    assert isinstance(started, Started)
    assert not started.resumes
    told = await parts.delivery(sent)
    assert told == Delivery(
        url=HOOK,
        request_id="request-one",
        correlation_id=sent,
        topic=parts.results,
        partition=0,
        begin=0,
        end=at,
        status="SUCCEEDED",
    )


async def test_one_that_waited_too_long_is_not_begun(parts: Parts) -> None:
    late = await parts.send("late", start_by_ms=now_ms() - 1, webhook=HOOK)
    early = await parts.send("early", start_by_ms=now_ms() + 30_000, webhook=HOOK)
    await parts.host()
    _, end = await parts.end(late)
    assert isinstance(end, Failed)
    assert (end.error.code, end.error.status) == ("queue-expired", 504)
    assert isinstance((await parts.end(early))[1], Done)
    assert parts.kinds(late) == ["Failed"], "it never began"
    assert Seen.counts["late"] == 0
    assert (await parts.delivery(late)).status == "EXPIRED"
    assert (await parts.delivery(early)).status == "SUCCEEDED"


async def test_what_was_cancelled_before_the_control_topic_is_read_back_does_not_run(parts: Parts) -> None:
    parts.settings = parts.settings.model_copy(update={"deadline": 0.05})
    deadline = now_ms() + 60_000
    gone = await parts.send("gone", deadline_ms=deadline, webhook=HOOK)
    stays = await parts.send("stays", deadline_ms=deadline)
    frame = encode_frames([Cancelled(gone, 0)])
    await (await parts.broker.publish(parts.results, frame, partition=0))
    await asyncio.sleep(0.1)  # longer than a worker reads back
    await parts.host()
    assert isinstance((await parts.end(stays))[1], Done)
    assert (await parts.delivery(gone)).status == "CANCELED"
    await parts.done(parts.topic)
    assert Seen.counts["gone"] == 0


async def test_one_that_has_ended_does_not_run_again_and_its_webhook_is_told(parts: Parts) -> None:
    """Its worker died between its answer and the webhook."""
    sent = await parts.send("one", webhook=HOOK, start_by_ms=now_ms() - 1)
    begun = await parts.send("begun", start_by_ms=now_ms() - 1)
    frames: list[Frame] = [
        Started(sent, 1, resumes=False),
        Done(sent, 1, value=msgspec.Raw(b"\xc0")),
        Started(begun, 1, resumes=False),
    ]
    await (await parts.broker.publish(parts.results, encode_frames(frames), partition=0))

    async def nothing(_partitions: frozenset[int]) -> None:
        pass

    consumer = await parts.broker.consume(parts.topic, parts.topic, on_assigned=nothing, on_revoked=nothing)
    await consumer.commit({0: Committed(0, Note(epoch=1, runs=[2]).write())})
    await consumer.close()
    await parts.host()
    told = await parts.delivery(sent)
    assert told.status == "SUCCEEDED"
    assert told.end >= 0
    assert isinstance((await parts.end(begun))[1], Done), "it had begun in time"
    await parts.done(parts.topic)
    assert (Seen.counts["one"], Seen.counts["begun"]) == (0, 1)


# --- tried again


async def test_a_failure_is_tried_again_later_and_then_answered(parts: Parts) -> None:
    await parts.host()
    await parts.move()
    retried = total("chains_retried_total", chainlet="Work")
    began = now_ms()
    sent = await parts.send(
        "one", fails=2, retry=Retry(3, 100, 500), webhook=HOOK, start_by_ms=now_ms() + 250, request_id="r"
    )
    _, end = await parts.end(sent)
    assert isinstance(end, Done)
    assert Seen.counts["one"] == 3
    assert now_ms() - began >= 600, "each delay was rounded up to a class"
    assert end.attempt > 2 << 20
    assert parts.kinds(sent) == ["Started"] * 3 + ["Done"], "a failure that is tried again is no answer"
    assert (await parts.delivery(sent)).status == "SUCCEEDED"
    assert total("chains_retried_total", chainlet="Work") - retried == 2


async def test_the_last_try_that_fails_is_the_answer(parts: Parts) -> None:
    await parts.host()
    sent = await parts.send("one", fails=9, retry=Retry(3, 0, 0), webhook=HOOK)
    _, end = await parts.end(sent)
    assert isinstance(end, Failed)
    assert end.error.exception_cls_name == "RuntimeError"
    assert Seen.counts["one"] == 3, "without a delay it needs nobody who moves it"
    assert (await parts.delivery(sent)).status == "FAILED"


async def test_what_can_not_succeed_is_not_tried_again(parts: Parts) -> None:
    await parts.host()
    wrong = await parts.send("one", fails="many", retry=Retry(3, 0, 0))
    late = await parts.send("two", fails=9, retry=Retry(3, 60_000, 60_000), deadline_ms=now_ms() + 900)
    _, end = await parts.end(wrong)
    assert isinstance(end, Failed)
    assert end.error.code == "invalid-argument"
    _, end = await parts.end(late)
    assert isinstance(end, Failed)
    assert end.error.exception_cls_name == "RuntimeError", "the deadline comes before the next try"
    assert Seen.counts["two"] == 1


async def test_an_answer_that_nobody_waits_for_outlasts_a_broker_that_is_away(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long that is: a caller that waits would have left by then, and this one asks later."""
    monkeypatch.setattr(serving, "ANSWER_GRACE", 0.0)
    publish, refused = parts.broker.publish, asyncio.Semaphore(0)

    async def away(topic: str, value: bytes, **more: Any) -> asyncio.Future[int]:
        if topic == parts.results and b"one" in value:
            refused.release()
            raise BrokerError("no connection")
        return await publish(topic, value, **more)

    monkeypatch.setattr(parts.broker, "publish", away)
    await parts.host()
    deadline_ms = now_ms() + 1_000
    sent = await parts.send("one", webhook=HOOK, deadline_ms=deadline_ms)
    async with asyncio.timeout(WAIT):
        while now_ms() < deadline_ms:
            await refused.acquire()
        await refused.acquire()
    monkeypatch.setattr(parts.broker, "publish", publish)
    assert isinstance((await parts.end(sent))[1], Done)
    assert (await parts.delivery(sent)).status == "SUCCEEDED"


async def test_a_stream_begins_anew_with_the_next_try(spelling: Parts) -> None:
    await spelling.host()
    sent = await spelling.send("word", fails=1, retry=Retry(2, 0, 0))
    _, end = await spelling.end(sent)
    assert isinstance(end, Done)
    assert end.chunks == 4
    chunks = [frame for _, frame in spelling.frames[sent] if isinstance(frame, Chunk)]
    assert [(chunk.attempt >> 20, chunk.sequence) for chunk in chunks] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        (1, 2),
        (1, 3),
    ]


async def test_one_that_is_cancelled_between_two_tries_does_not_run_again(parts: Parts) -> None:
    await parts.host()
    sent = await parts.send("one", fails=9, retry=Retry(5, 500, 500), webhook=HOOK)
    await Seen.until("one")
    await parts.done(parts.topic)
    await parts.caller.control.send(parts.topic, Cancel(sent))
    await parts.move()
    _, end = await parts.end(sent)
    assert isinstance(end, Cancelled)
    assert Seen.counts["one"] == 1
    assert (await parts.delivery(sent)).status == "CANCELED"


async def test_a_running_one_that_is_cancelled_tells_its_webhook(parts: Parts) -> None:
    await parts.host()
    sent = await parts.send("one", wait=True, retry=Retry(5, 0, 0), webhook=HOOK)
    await Seen.until("one")
    await parts.caller.control.send(parts.topic, Cancel(sent))
    assert isinstance((await parts.end(sent))[1], Cancelled)
    assert (await parts.delivery(sent)).status == "CANCELED"


# --- in the background


async def test_ordinary_requests_go_before_the_next_of_a_full_background(parts: Parts) -> None:
    for number in range(6):
        await parts.send(f"back {number}", parts.background, number % 2, wait=True)
    host = await parts.host()
    await began(1)
    front = [await parts.send(f"front {number}", partition=number % 2, wait=True) for number in range(3)]
    async with asyncio.timeout(WAIT):
        while host.workers[0].idle:  # noqa: ASYNC110 - until it has got some
            await asyncio.sleep(0.01)
    for count in range(1, 10):
        await began(count)
        assert len(RAN) == count, "they share the one place"
        Seen.note(f"go {RAN[-1]}")
    for correlation_id in front:
        await parts.end(correlation_id)
    assert [name.partition(" ")[0] for name in RAN] == ["back", *["front"] * 3, *["back"] * 5]
    await parts.done(parts.background)
    await parts.done(parts.topic)


async def test_many_of_both_run_each_once_and_never_more_than_there_are_places(parts: Parts) -> None:
    await parts.host()
    sent = []
    for number in range(60):
        topic = parts.background if number % 3 else parts.topic
        sent.append(await parts.send(f"{number}", topic, number % 2))
    for correlation_id in sent:
        assert isinstance((await parts.end(correlation_id))[1], Done)
    assert sorted(map(int, RAN)) == list(range(60))
    assert Seen.counts["too many"] == 0


async def test_a_background_moves_between_workers_and_nothing_is_lost(parts: Parts) -> None:
    first = await parts.host()
    sent = [await parts.send(f"{number}", parts.background, number % 2) for number in range(100)]
    await began(5)
    second = await parts.host()
    sent += [await parts.send(f"{number}", parts.background, number % 2) for number in range(100, 150)]
    await began(40)
    await first.drain()
    for correlation_id in sent:
        assert isinstance((await parts.end(correlation_id))[1], Done)
    assert set(map(int, RAN)) == set(range(150))
    await second.drain()
    assert await parts.broker.backlog(parts.background, parts.background) == 0


async def test_what_waits_in_the_background_can_be_cancelled_and_put_aside(parts: Parts) -> None:
    host = await parts.host()
    running = await parts.send("one", parts.background, wait=True, webhook=HOOK)
    waiting = await parts.send("two", parts.background, webhook=HOOK)
    await began(1)
    await parts.caller.control.send(parts.background, Cancel(waiting))
    await parts.caller.control.send(parts.background, Cancel(running))
    for correlation_id in (running, waiting):
        assert isinstance((await parts.end(correlation_id))[1], Cancelled)
        assert (await parts.delivery(correlation_id)).status == "CANCELED", "the topic of deliveries is the same"
    assert Seen.counts["two"] == 0
    await (await parts.broker.publish(parts.background, b"\xc1", partition=0))
    await parts.done(parts.background)
    assert await parts.broker.end_offset(dead_letter_topic(parts.background), 0) == 1
    assert host.background is not None
    assert host.background.busy().capacity == 1
    assert total("chains_requests_in_flight", chainlet="Work.background") == 0
    assert REGISTRY.get_sample_value("chains_lag", {"chainlet": "Work.background", "partition": "0"}) == 0


async def test_what_the_broker_seems_to_hold_and_never_gives_does_not_hold_up_the_background(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The marker at the end of a transaction is counted, and is no record."""
    host = await parts.host()
    monkeypatch.setattr(host.workers[0]._consumer, "lag", lambda: {0: 1})
    sent = await parts.send("one", parts.background)
    assert isinstance((await parts.end(sent))[1], Done)


async def test_only_the_entrypoint_has_a_background(parts: Parts) -> None:
    chain = Chain.of(Above)
    host = Host(chain, [Work], parts.broker, parts.caller, parts.settings)
    await host.start()
    try:
        assert host.background is None
        with pytest.raises(UnknownTopicError):
            await parts.broker.partitions(background_topic(chain.topic(Work, parts.settings.namespace)))
    finally:
        await host.drain()
