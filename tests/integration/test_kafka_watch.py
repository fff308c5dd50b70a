"""What stops moving on, and does not say so itself, is noticed, told and got over."""

import asyncio
import functools
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from uuid import uuid4

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions, NewTopic
from aiokafka.errors import LeaderNotAvailableError

from chains_stream.broker import Broker, TopicSpec
from chains_stream.brokers import kafka_watch, open_broker
from chains_stream.brokers.kafka_group import KafkaGroupConsumer
from chains_stream.brokers.kafka_reading import KafkaReader
from chains_stream.errors import BrokerError
from chains_stream.settings import Settings
from tests.kafka import Node, node
from tests.members import HOUR_MS, fill

pytestmark = pytest.mark.kafka


async def nothing(_partitions: frozenset[int]) -> None: ...


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kafka_watch, "STALLED_SECONDS", 1.0)
    monkeypatch.setattr(kafka_watch, "WATCH_SECONDS", 0.2)


@pytest.fixture(scope="module")
def own(kafka_url: str) -> Iterator[Node]:
    """A broker that these tests may stop; `kafka_url` says whether there is a Kafka at all."""
    with node("group.min.session.timeout.ms=100") as started:
        yield started


@pytest.fixture
async def broker(own: Node) -> AsyncIterator[Broker]:
    opened = open_broker(Settings.of(broker=own.url))
    try:
        await opened.start()
        yield opened
    finally:
        await opened.close()


@pytest.fixture
async def topic(broker: Broker) -> str:
    name = f"watched.{uuid4().hex}"
    await broker.ensure_topics([TopicSpec(name, 4, HOUR_MS)])
    return name


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(45):
        while not condition():  # noqa: ASYNC110 - nobody is told
            await asyncio.sleep(0.02)


async def test_a_broker_that_stops_answering_is_trouble_until_it_goes_on(broker: Broker, topic: str, own: Node) -> None:
    consumer = await broker.consume(topic, topic, on_assigned=nothing, on_revoked=nothing)
    reader = await broker.read(topic, {0: None})
    assert broker.trouble() is None
    own.signal(signal.SIGSTOP)
    try:
        await until(lambda: broker.trouble() is not None)
        said = broker.trouble() or ""
    finally:
        own.signal(signal.SIGCONT)
    assert own.url in said
    assert "has not answered since" in said
    assert "\n" not in said
    await until(lambda: broker.trouble() is None)
    await fill(broker, topic, 1)
    async with asyncio.timeout(30):
        assert len(await consumer.fetch(1)) == len(await reader.fetch()) == 1
    await consumer.close()
    await reader.close()


async def hang(*_: object) -> bool:
    return await asyncio.Event().wait()


def hangs(feed: KafkaGroupConsumer | KafkaReader) -> bool:
    return feed._client is not None and "hang" in str(feed._client._fetcher._pending_tasks)


async def test_fetching_that_hangs_in_silence_is_told_and_begun_anew(broker: Broker, topic: str) -> None:
    """The real thing can't be provoked."""
    told: list[str] = []
    consumer = await broker.consume(topic, topic, on_assigned=nothing, on_revoked=nothing)
    reader = await broker.read(topic, {1: None})
    for feed, partition in ((consumer, 0), (reader, 1)):
        assert isinstance(feed, KafkaGroupConsumer | KafkaReader)
        assert feed._client is not None
        feed._client._fetcher._proc_fetch_request = hang
        await until(functools.partial(hangs, feed))
        await fill(broker, topic, 3, partition=partition)
        await until(lambda: broker.trouble() is not None)
        told.append(broker.trouble() or "")
        fetched = 0
        async with asyncio.timeout(30):
            while fetched < 3:
                records = await (feed.fetch(3) if isinstance(feed, KafkaGroupConsumer) else feed.fetch())
                fetched += sum(record.partition == partition for record in records)
        await until(lambda: broker.trouble() is None)
    assert [f"nothing of {topic}[{n}] was fetched since" in text for n, text in enumerate(told)] == [True, True], told
    await consumer.close()
    await reader.close()


async def test_what_has_a_reason_to_stand_still_is_no_trouble(broker: Broker, topic: str) -> None:
    """Nothing to fetch, a partition that is paused, a buffer that nobody empties, partitions that change hands."""
    idle = await broker.read(topic, {3: None})
    full = await broker.consume(topic, f"{topic}.full", on_assigned=nothing, on_revoked=nothing)
    paused = await broker.consume(topic, f"{topic}.paused", on_assigned=nothing, on_revoked=nothing)
    for partition in range(3):
        paused.pause(partition)
    await fill(broker, topic, 5_000)
    holds, go_on = asyncio.Event(), asyncio.Event()

    async def hold_on(_partitions: frozenset[int]) -> None:
        holds.set()
        await go_on.wait()

    moving = await broker.consume(topic, f"{topic}.moving", on_assigned=nothing, on_revoked=hold_on)
    joining = asyncio.ensure_future(broker.consume(topic, f"{topic}.moving", on_assigned=nothing, on_revoked=nothing))
    await asyncio.wait_for(holds.wait(), 30)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(3):  # three times as long as what would be trouble
            await until(lambda: broker.trouble() is not None)
    go_on.set()
    for opened in (await joining, moving, paused, full, idle):
        await opened.close()


@pytest.fixture
async def hasty(own: Node) -> AsyncIterator[Broker]:
    """A broker whose consumers may be without partitions for 4 s, its readers for 1 s."""
    opened = open_broker(Settings.of(broker=own.url, kafka={"connect_timeout": 1, "session_timeout_ms": 1_000}))
    try:
        await opened.start()
        yield opened
    finally:
        await opened.close()


async def test_a_member_that_waits_for_partitions_for_too_long_is_trouble(hasty: Broker, topic: str) -> None:
    holds, go_on = asyncio.Event(), asyncio.Event()

    async def hold_on(_partitions: frozenset[int]) -> None:
        holds.set()
        await go_on.wait()

    first = await hasty.consume(topic, topic, on_assigned=nothing, on_revoked=hold_on)
    joining = asyncio.ensure_future(hasty.consume(topic, topic, on_assigned=nothing, on_revoked=nothing))
    await asyncio.wait_for(holds.wait(), 30)
    assert hasty.trouble() is None
    await until(lambda: hasty.trouble() is not None)
    assert f"a consumer has had no partitions of {topic} since" in (hasty.trouble() or "")
    go_on.set()
    await until(lambda: hasty.trouble() is None)
    for opened in (first, *await asyncio.gather(joining, return_exceptions=True)):  # it may have given up by now
        if isinstance(opened, KafkaGroupConsumer):
            await opened.close()


async def refuse(*_: object) -> None:
    raise BrokerError("the coordinator is not available")


def refuse_to_make() -> None:
    raise BrokerError("no socket is left")


async def test_consumers_that_are_replaced_for_ever_are_trouble(
    hasty: Broker, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a group's coordinator is away while the leaders of partitions answer, which can't be had quickly."""
    consumer = await hasty.consume(topic, topic, on_assigned=nothing, on_revoked=nothing)
    assert isinstance(consumer, KafkaGroupConsumer)
    with monkeypatch.context() as patched:
        patched.setattr(consumer, "_positions", refuse)
        consumer._broken = BrokerError("once")
        await until(lambda: hasty.trouble() is not None)
        assert f"no partitions of {topic} since" in (hasty.trouble() or "")
        assert (hasty.trouble() or "").endswith(" UTC: the coordinator is not available")
    await until(lambda: hasty.trouble() is None)
    await consumer.close()

    reader = await hasty.read(topic, {1: 0})
    assert isinstance(reader, KafkaReader)
    with monkeypatch.context() as patched:
        patched.setattr(reader, "_make", refuse_to_make)
        reader._broken = BrokerError("once")
        await until(lambda: hasty.trouble() is not None)
        assert (hasty.trouble() or "").endswith(" UTC: no socket is left")
    await until(lambda: hasty.trouble() is None)
    await reader.close()


async def test_a_topic_that_lost_partitions_is_trouble_until_it_has_them_again(
    broker: Broker, topic: str, own: Node
) -> None:
    reader = await broker.read(topic, {3: None})
    assert isinstance(reader, KafkaReader)
    admin = AIOKafkaAdminClient(bootstrap_servers=own.url.removeprefix("kafka://"))
    await admin.start()
    await admin.delete_topics([topic])
    while topic in await admin.list_topics():  # noqa: ASYNC110 - nobody is told
        await asyncio.sleep(0.02)
    await admin.create_topics([NewTopic(topic, 1, 1)])
    await until(lambda: broker.trouble() is not None)
    assert "LeaderNotAvailable" in (broker.trouble() or "")
    with pytest.raises(LeaderNotAvailableError):
        await reader._cluster.ends(topic, [0, 3], "read_uncommitted")
    await admin.create_partitions({topic: NewPartitions(4)})
    await until(lambda: broker.trouble() is None)
    await admin.close()
    await reader.close()


def break_down() -> None:
    raise KeyError("out of order")


async def test_that_watching_ended_is_trouble(broker: Broker, topic: str) -> None:
    reader = await broker.read(topic, {0: None})
    assert isinstance(reader, KafkaReader)
    assert reader._watch is not None
    reader._watch._positions = break_down  # type: ignore[assignment]
    await until(lambda: broker.trouble() is not None)
    assert f"nobody watches over {topic} any more: KeyError('out of order')" in (broker.trouble() or "")
    await reader.close()
    assert broker.trouble() is None


async def test_lag_grows_while_a_partition_is_paused(broker: Broker, topic: str) -> None:
    consumer = await broker.consume(topic, topic, on_assigned=nothing, on_revoked=nothing)
    consumer.pause(0)
    await fill(broker, topic, 7)
    await until(lambda: consumer.lag()[0] == 7)
    await consumer.close()
