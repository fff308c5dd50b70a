"""Transactions on Kafka, while processes and brokers die."""

import asyncio
import gc
import random
import signal
import sys
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions, NewTopic

from chains_stream.broker import Broker, Committed, Record, TopicSpec
from chains_stream.brokers import kafka_watch, open_broker
from chains_stream.errors import BrokerAuthorizationError, BrokerError, ChainsUsageError, RecordTooLargeError
from chains_stream.settings import Settings
from tests.guarded import DESCRIBE, GROUP, READ, SASL, TOPIC, TRANSACTIONAL_ID, WRITE, as_user, grant
from tests.kafka import Node, node
from tests.members import HOUR_MS, Member, fill, take

pytestmark = pytest.mark.kafka

PARTITIONS = 4
RECORDS = 5_000
KILLS = 5


@pytest.fixture(autouse=True)
def dropped() -> Iterator[None]:
    """Collect the connections of what a test has dropped, as if its process had been killed: not in a later test."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
async def broker(kafka_url: str) -> AsyncIterator[Broker]:
    async with opened(kafka_url) as found:
        yield found


@asynccontextmanager
async def opened(url: str, **kafka: Any) -> AsyncIterator[Broker]:
    broker = open_broker(Settings.of(broker=url, kafka=kafka))
    try:
        await broker.start()
        yield broker
    finally:
        await broker.close()


@pytest.fixture
async def topic(broker: Broker) -> str:
    return await made(broker)


async def made(broker: Broker) -> str:
    name = f"transactions.{uuid4().hex}"
    await broker.ensure_topics([TopicSpec(name, PARTITIONS, HOUR_MS), TopicSpec(f"{name}.copy", PARTITIONS, HOUR_MS)])
    return name


class Copy:
    """A running `tests.copying`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, broker: Broker, topic: str, instance: str = "") -> "Copy":
        arguments = ("-m", "tests.copying", broker.url, topic, f"{topic}.copy", f"{topic}.group", instance)
        return cls(await asyncio.create_subprocess_exec(sys.executable, *arguments))

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    async def kill(self) -> None:
        self._process.kill()
        await self._process.wait()


class Copied:
    """What a reader of committed records has met of the copies, by partition."""

    def __init__(self, broker: Broker, topic: str) -> None:
        self.values: dict[int, list[int]] = {number: [] for number in range(PARTITIONS)}
        self._broker = broker
        self._topic = topic

    @property
    def count(self) -> int:
        return sum(map(len, self.values.values()))

    async def follow(self) -> None:
        reader = await self._broker.read(
            f"{self._topic}.copy", dict.fromkeys(range(PARTITIONS), 0), isolation="read_committed"
        )
        try:
            while True:
                for record in await reader.fetch():
                    self.values[record.partition].append(int(record.value))
        finally:
            await reader.close()

    async def until(self, count: int) -> None:
        async with asyncio.timeout(90):
            while self.count < count:  # noqa: ASYNC110 - nobody is told
                await asyncio.sleep(0.02)


@asynccontextmanager
async def followed(broker: Broker, topic: str) -> AsyncIterator[Copied]:
    copied = Copied(broker, topic)
    following = asyncio.create_task(copied.follow())
    try:
        yield copied
    finally:
        following.cancel()
        await asyncio.wait([following])


async def test_a_processor_that_is_killed_again_and_again_copies_each_record_once(broker: Broker, topic: str) -> None:
    for number in range(PARTITIONS):
        await fill(broker, topic, RECORDS // PARTITIONS, partition=number)
    async with followed(broker, topic) as copied:
        for kill in range(KILLS):
            # Of one instance id: what is killed is followed at once, and not when its session has ended.
            copy = await Copy.start(broker, topic, instance=f"copy.{topic}")
            await copied.until(copied.count + random.randint(1, RECORDS // (KILLS + 3)))
            await asyncio.sleep(random.uniform(0, 0.02))
            await copy.kill()
            assert copied.count < RECORDS, f"it was done before kill {kill + 1}"
        copy = await Copy.start(broker, topic, instance=f"copy.{topic}")
        await copied.until(RECORDS)
        await broker_is_quiet(broker, topic, copied)
        await copy.kill()
    assert copied.values == {number: list(range(RECORDS // PARTITIONS)) for number in range(PARTITIONS)}


async def broker_is_quiet(broker: Broker, topic: str, copied: Copied) -> None:
    """Wait until the copier has committed all, so that nothing more can come."""
    async with asyncio.timeout(60):
        while await broker.backlog(topic, f"{topic}.group"):  # noqa: ASYNC110 - nobody is told
            await asyncio.sleep(0.05)
    assert copied.count == RECORDS


async def test_a_processor_that_was_stopped_for_too_long_is_fenced(broker: Broker, topic: str) -> None:
    """Its session ends, another takes over, and it goes on in the midst of what it was about."""
    for number in range(PARTITIONS):
        await fill(broker, topic, RECORDS // PARTITIONS, partition=number)
    async with followed(broker, topic) as copied:
        zombie = await Copy.start(broker, topic)
        await copied.until(100)
        zombie.signal(signal.SIGSTOP)
        try:
            heir = await Copy.start(broker, topic)
            await copied.until(RECORDS // 2)
        finally:
            zombie.signal(signal.SIGCONT)
        await copied.until(RECORDS)
        await broker_is_quiet(broker, topic, copied)
        await zombie.kill()
        await heir.kill()
    assert copied.values == {number: list(range(RECORDS // PARTITIONS)) for number in range(PARTITIONS)}


@pytest.fixture(scope="module")
def own(kafka_url: str) -> Iterator[Node]:
    """A broker that these tests may stop; `kafka_url` says whether there is a Kafka at all."""
    with node() as started:
        yield started


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_transactions_outlive_their_coordinator(own: Node, how: str) -> None:
    async with opened(own.url) as broker:
        topic = await made(broker)
        transactor = broker.transactor(topic)
        await transactor.start()
        transactor.begin()
        await asyncio.gather(*[await transactor.publish(topic, str(n).encode(), partition=n % 2) for n in range(10)])
        await asyncio.to_thread(getattr(own, how))
        transactor.add_offsets(topic, f"{topic}.group", {0: Committed(7, "note")})
        for n in range(10, 20):
            await transactor.publish(topic, str(n).encode(), partition=n % 2)
        ending = asyncio.ensure_future(transactor.commit())
        await asyncio.wait([ending], timeout=0.5)
        assert not ending.done()
        await asyncio.to_thread(own.start)
        await ending
        transactor.begin()
        await transactor.publish(topic, b"20", partition=0)
        await transactor.commit()
        reader = await broker.read(topic, {0: 0, 1: 0}, isolation="read_committed")
        records = await take(reader, 21)
        assert [int(record.value) for record in records if record.partition == 0] == list(range(0, 21, 2))
        assert [int(record.value) for record in records if record.partition == 1] == list(range(1, 20, 2))
        member = await Member(broker, topic).join(f"{topic}.group")
        assert await member.consumer.committed([0]) == {0: Committed(7, "note")}
        await member.consumer.close()
        await reader.close()
        await transactor.close()


async def test_closing_ends_a_commit_that_the_broker_does_not_answer(own: Node) -> None:
    """As when a partition is revoked: the group waits until its transactor is closed."""
    async with opened(own.url) as broker:
        topic = await made(broker)
        transactor = broker.transactor(topic)
        await transactor.start()
        transactor.begin()
        await (await transactor.publish(topic, b"record", partition=0))
        own.signal(signal.SIGSTOP)
        try:
            ending = asyncio.ensure_future(transactor.commit())
            await asyncio.wait([ending], timeout=0.3)
            await asyncio.wait_for(transactor.close(), 15)
            with pytest.raises(BrokerError, match="closed"):
                await asyncio.wait_for(ending, 1)
        finally:
            own.signal(signal.SIGCONT)


async def test_starting_at_a_broker_that_is_away_fails_in_time(own: Node) -> None:
    async with opened(own.url) as broker:
        assert hasattr(broker, "_cluster")
        broker._cluster.patience = 1.0
        await asyncio.to_thread(own.stop)
        try:
            transactor = broker.transactor("any")
            with pytest.raises(BrokerError, match="within 1 s"):
                await asyncio.wait_for(transactor.start(), 20)
            await transactor.close()
        finally:
            await asyncio.to_thread(own.start)


async def test_a_timeout_that_the_broker_does_not_allow_is_told(broker: Broker) -> None:
    transactor = broker.transactor("any", timeout_ms=10**9)
    with pytest.raises(ChainsUsageError, match=r"a timeout of 1e\+06 s"):
        await transactor.start()
    await transactor.close()


async def test_a_record_that_the_broker_does_not_take_spoils_its_transaction(broker: Broker, topic: str) -> None:
    """Committed all the same, it would be lost: others of the transaction were stored, and so would its offset be."""
    narrow = f"{topic}.narrow"
    admin = AIOKafkaAdminClient(bootstrap_servers=broker.url.removeprefix("kafka://"))
    await admin.start()
    await admin.create_topics([NewTopic(narrow, 1, 1, topic_configs={"max.message.bytes": "1000"})])
    await admin.close()
    await broker.ensure_topics([TopicSpec(narrow, 1, HOUR_MS)])  # waits until the broker has heard of it
    transactor = broker.transactor(topic)
    await transactor.start()
    transactor.begin()
    await (await transactor.publish(topic, b"never", partition=0))
    stored = await transactor.publish(narrow, bytes(5_000), partition=0)
    transactor.add_offsets(topic, f"{topic}.group", {0: Committed(1)})
    with pytest.raises(RecordTooLargeError):
        await transactor.commit()
    with pytest.raises(RecordTooLargeError):
        await stored
    await transactor.close()
    again = broker.transactor(topic)
    await again.start()
    again.begin()
    await again.publish(topic, b"counts", partition=0)
    await again.publish(narrow, b"fits", partition=0)
    await again.commit()
    for name, value in ((topic, b"counts"), (narrow, b"fits")):
        reader = await broker.read(name, {0: 0}, isolation="read_committed")
        assert [record.value for record in await take(reader, 1)] == [value]
        await reader.close()
    member = await Member(broker, topic).join(f"{topic}.group")
    assert await member.consumer.committed([0]) == {}
    await member.consumer.close()
    await again.close()


async def test_a_commit_that_is_given_up_spends_the_transactor(broker: Broker, topic: str) -> None:
    """What became of it is told by the offsets, once another one was started."""
    given_up = broker.transactor(topic)
    await given_up.start()
    given_up.begin()
    await given_up.publish(topic, b"record", partition=0)
    given_up.add_offsets(topic, f"{topic}.group", {0: Committed(1)})
    ending = asyncio.ensure_future(given_up.commit())
    await asyncio.sleep(0)
    ending.cancel()
    await asyncio.wait([ending])
    with pytest.raises(BrokerError, match="given up"):
        given_up.begin()
    again = broker.transactor(topic)
    await again.start()
    member = await Member(broker, topic).join(f"{topic}.group")
    counts = 0 in await member.consumer.committed([0])
    again.begin()
    await again.publish(topic, b"last", partition=0)
    await again.commit()
    reader = await broker.read(topic, {0: 0}, isolation="read_committed")
    assert [record.value for record in await take(reader, 1 + counts)] == [b"record", b"last"][1 - counts :]
    for each in (reader, member.consumer, again, given_up):
        await each.close()


async def test_a_group_that_began_at_the_end_takes_all_of_partitions_that_are_added(broker: Broker, topic: str) -> None:
    await fill(broker, topic, 3)
    first = await Member(broker, topic).join(f"{topic}.group", start="latest")
    await first.consumer.close()
    admin = AIOKafkaAdminClient(bootstrap_servers=broker.url.removeprefix("kafka://"))
    await admin.start()
    await admin.create_partitions({topic: NewPartitions(PARTITIONS + 1)})
    async with asyncio.timeout(30):
        while len((await admin.describe_topics([topic]))[0]["partitions"]) == PARTITIONS:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.02)  # the controller knows before the broker does, and nobody is told
    await admin.close()
    await fill(broker, topic, 2, partition=PARTITIONS)
    second = await Member(broker, topic).join(f"{topic}.group", start="latest")
    assert place(await second.take(2)) == [(PARTITIONS, 0), (PARTITIONS, 1)]
    await second.consumer.close()


def place(records: list[Record]) -> list[tuple[int, int]]:
    return [(record.partition, record.offset) for record in records]


async def test_a_transaction_that_stays_open_is_no_trouble_for_whoever_waits(
    broker: Broker, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka_watch, "STALLED_SECONDS", 0.6)
    monkeypatch.setattr(kafka_watch, "WATCH_SECONDS", 0.1)
    transactor = broker.transactor(topic)
    await transactor.start()
    transactor.begin()
    await asyncio.gather(await transactor.publish(topic, b"open", partition=0))
    reader = await broker.read(topic, {0: 0}, isolation="read_committed")
    member = await Member(broker, topic).join(f"{topic}.group", isolation="read_committed")
    waiting = [asyncio.ensure_future(reader.fetch()), asyncio.ensure_future(member.consumer.fetch(1))]
    await asyncio.wait(waiting, timeout=2)
    assert broker.trouble() is None
    assert not any(fetching.done() for fetching in waiting)
    await transactor.commit()
    assert [(await fetching)[0].value for fetching in waiting] == [b"open", b"open"]
    await reader.close()
    await member.consumer.close()
    await transactor.close()


async def test_each_right_that_a_transaction_is_missing_is_named(kafka_url: str) -> None:
    mine, other = f"mine.{uuid4().hex}", f"other.{uuid4().hex}"
    with node(*SASL) as guarded:
        async with opened(guarded.url, **as_user("admin")) as broker:
            await broker.ensure_topics([TopicSpec(name, 1, HOUR_MS) for name in (mine, other)])
        await grant(guarded, "bob", TOPIC, mine, WRITE, READ, DESCRIBE)
        await grant(guarded, "bob", TOPIC, other, DESCRIBE)
        await grant(guarded, "bob", TRANSACTIONAL_ID, mine, WRITE, DESCRIBE)
        async with opened(guarded.url, **as_user("bob")) as broker:
            with pytest.raises(BrokerAuthorizationError, match=f"the transactional id {other}: the right WRITE is"):
                await broker.transactor(other).start()
            for topic, said in (
                (other, f"write to {other}: the right WRITE is missing"),
                (mine, f"commit for {other}: the right READ is missing"),
            ):
                transactor = broker.transactor(mine)
                await transactor.start()
                transactor.begin()
                await transactor.publish(topic, b"never", partition=0)
                transactor.add_offsets(mine, other, {0: Committed(1)})
                with pytest.raises(BrokerAuthorizationError, match=said):
                    await transactor.commit()
                await transactor.close()
            await grant(guarded, "bob", GROUP, other, READ)
            transactor = broker.transactor(mine)
            await transactor.start()
            transactor.begin()
            await transactor.publish(mine, b"record", partition=0)
            transactor.add_offsets(mine, other, {0: Committed(1)})
            await transactor.commit()
            await transactor.close()
            reader = await broker.read(mine, {0: 0}, isolation="read_committed")
            assert [record.value for record in await take(reader, 1)] == [b"record"]
            await reader.close()
