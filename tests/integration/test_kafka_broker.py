"""What is Kafka's alone: brokers that are missing, restart, or refuse us."""

import asyncio
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.structs import TopicPartition

from chains_stream.broker import Broker, Committed, TopicSpec
from chains_stream.brokers import kafka_group, kafka_reading, kafka_sending, open_broker
from chains_stream.brokers.kafka import BATCH_BYTES, GROUP_FETCH_BYTES, KafkaBroker
from chains_stream.brokers.kafka_group import KafkaGroupConsumer
from chains_stream.brokers.kafka_reading import BUFFER_BYTES, BUFFER_RECORDS
from chains_stream.errors import BrokerAuthorizationError, BrokerError, ChainsUsageError, RecordTooLargeError
from chains_stream.settings import Settings
from tests.guarded import DESCRIBE, GROUP, READ, SASL, TOPIC, WRITE, as_user, grant
from tests.kafka import Node, node

pytestmark = pytest.mark.kafka

HOUR_MS = 3_600_000


@asynccontextmanager
async def opened(url: str, **kafka: Any) -> AsyncIterator[Broker]:
    broker = open_broker(Settings.of(broker=url, kafka=kafka))
    try:
        await broker.start()
        yield broker
    finally:
        await broker.close()


@pytest.fixture
def own(kafka_url: str) -> Iterator[Node]:
    """A broker that this test may stop; `kafka_url` says whether there is a Kafka at all."""
    with node() as started:
        yield started


async def nothing(_partitions: frozenset[int]) -> None: ...


async def test_a_broker_that_is_missing_is_one_error_in_time() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"kafka://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(BrokerError) as caught:
            async with opened(url, connect_timeout=0.5):
                pass
    assert "within 0.5 s" in str(caught.value)
    assert url in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_a_server_that_never_answers_is_one_error_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"kafka://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(BrokerError, match=r"within 0\.5 s"):
            async with opened(url, connect_timeout=0.5):
                pass


async def test_a_reader_whose_closing_is_cancelled_is_closed_all_the_same(kafka_url: str) -> None:
    """Else its connections would be left open, by whoever ends while it closes a reader."""
    topic = f"cut.{uuid4().hex}"
    async with opened(kafka_url) as broker:
        await broker.ensure_topics([TopicSpec(topic, 1, HOUR_MS)])
        reader = await broker.read(topic, {0: 0})
        assert isinstance(reader, kafka_reading.KafkaReader)
        client = reader._client
        closing = asyncio.create_task(reader.close())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert client is not None
        assert client._closed
        assert reader._client is None


@pytest.mark.timeout(180)
async def test_a_restart_loses_nothing_that_was_stored(own: Node) -> None:
    """Producer, reader and group go on by themselves when the broker comes back."""
    topic = f"restart.{uuid4().hex}"

    async with opened(own.url) as broker:
        await broker.ensure_topics([TopicSpec(topic, 1, HOUR_MS)])
        reader = await broker.read(topic, {0: None})
        consumer = await broker.consume(topic, topic, on_assigned=nothing, on_revoked=nothing)
        await (await broker.publish(topic, b"before", partition=0))
        assert [record.value for record in await reader.fetch()] == [b"before"]
        assert [record.value for record in await consumer.fetch(1)] == [b"before"]
        await consumer.commit({0: Committed(1)})
        await asyncio.to_thread(own.kill)
        during = await broker.publish(topic, b"during", partition=0)
        await asyncio.to_thread(own.start)
        assert await during == 1
        await (await broker.publish(topic, b"after", partition=0))
        assert await values(reader.fetch, 2) == [b"during", b"after"]
        assert await values(lambda: consumer.fetch(10), 2) == [b"during", b"after"]
        await reader.close()
        await consumer.close()


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGSTOP])
async def test_closing_ends_while_the_broker_is_away_or_silent(
    own: Node, monkeypatch: pytest.MonkeyPatch, way: signal.Signals
) -> None:
    """A record that could not be sent, a commit that could not be stored, a fetch under way: none holds up the end."""
    before = asyncio.all_tasks()
    monkeypatch.setattr(kafka_sending, "FLUSH_SECONDS", 0.5)
    monkeypatch.setattr(kafka_group, "COMMIT_SECONDS", 1)
    topic = f"away.{uuid4().hex}"
    broker = open_broker(Settings.of(broker=own.url, kafka={"connect_timeout": 5}))
    await broker.start()
    await broker.ensure_topics([TopicSpec(topic, 1, HOUR_MS)])

    async def commit(_partitions: frozenset[int]) -> None:
        with pytest.raises(BrokerError, match="within 1 s"):
            await consumer.commit({0: Committed(1)})

    consumer = await broker.consume(topic, topic, on_assigned=nothing, on_revoked=commit)
    reader = await broker.read(topic, {0: 0})
    await (await broker.publish(topic, b"stored", partition=0))
    assert len(await consumer.fetch(1)) == len(await reader.fetch()) == 1
    own.signal(way)
    try:
        unsent = await broker.publish(topic, b"unsent", partition=0)
        waiting = asyncio.ensure_future(reader.fetch())
        async with asyncio.timeout(60):
            await asyncio.wait([waiting], timeout=1)  # time for the fetch to fail, and to be about to be tried again
            await reader.close()
            await consumer.close()
            await broker.close()
        assert asyncio.all_tasks() - before <= {waiting}
    finally:
        if way == signal.SIGSTOP:
            own.signal(signal.SIGCONT)
    with pytest.raises(BrokerError, match="closed"):
        await waiting
    with pytest.raises(BrokerError, match="closed before the record was stored"):
        await unsent


async def test_a_broker_that_names_an_address_nobody_reaches(kafka_url: str) -> None:
    said = r"127\.0\.0\.1:1\) do not: check its advertised\.listeners"
    with node("advertised.listeners=PLAINTEXT://127.0.0.1:1") as lost, pytest.raises(BrokerError, match=said):
        async with asyncio.timeout(10), opened(lost.url, connect_timeout=2):
            pass


async def test_the_first_server_of_several_may_be_away(kafka_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = kafka_url.replace("kafka://", f"kafka://127.0.0.1:{silent.getsockname()[1]},")
        async with opened(url, connect_timeout=6) as broker:
            assert broker.url == url
            assert await broker.members(f"nobody.{uuid4().hex}") == 0


async def test_what_a_full_worker_has_fetched_is_bounded_in_bytes(kafka_url: str) -> None:
    topic = f"large.{uuid4().hex}"
    async with opened(kafka_url) as broker:
        await broker.ensure_topics([TopicSpec(topic, 1, HOUR_MS)])
        await asyncio.gather(*[await broker.publish(topic, b"x" * 900_000, partition=0) for _ in range(60)])
        consumer = await broker.consume(topic, topic, on_assigned=nothing, on_revoked=nothing)
        assert isinstance(consumer, KafkaGroupConsumer)
        buffer = consumer._buffer
        async with asyncio.timeout(30):
            while not buffer.full:  # noqa: ASYNC110 - nobody but the buffer's own consumer is told
                await asyncio.sleep(0.05)
        # One fetch may lie beyond the bound.
        assert buffer._size <= BUFFER_BYTES + GROUP_FETCH_BYTES
        assert len(await values(lambda: consumer.fetch(1), 60)) == 60
        await consumer.close()


async def test_what_a_full_worker_has_fetched_is_bounded_in_records(kafka_url: str) -> None:
    topic = f"small.{uuid4().hex}"
    async with opened(kafka_url) as broker:
        await broker.ensure_topics([TopicSpec(topic, 2, HOUR_MS)])
        for partition in range(2):
            await asyncio.gather(*[await broker.publish(topic, b"x", partition=partition) for _ in range(5_000)])
        consumer = await broker.consume(topic, topic, on_assigned=nothing, on_revoked=nothing)
        assert isinstance(consumer, KafkaGroupConsumer)
        buffer = consumer._buffer
        async with asyncio.timeout(30):
            while not buffer.full:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.05)
        assert buffer._count == BUFFER_RECORDS
        assert len(await values(lambda: consumer.fetch(100), 10_000)) == 10_000
        assert consumer.lag() == {0: 0, 1: 0}
        await consumer.close()


async def test_a_publisher_that_is_faster_than_kafka_waits_and_keeps_its_order(kafka_url: str) -> None:
    topic = f"fast.{uuid4().hex}"
    async with opened(kafka_url) as broker:
        await broker.ensure_topics([TopicSpec(topic, 1, HOUR_MS)])
        values = [b"%06d" % number + bytes(BATCH_BYTES // 8) for number in range(100)]  # a dozen batches
        stored = [await broker.publish(topic, value, partition=0) for value in values]
        assert sum(future.done() for future in stored) > len(stored) // 2
        assert await asyncio.gather(*stored) == list(range(100))
        reader = await broker.read(topic, {0: 0})
        got: list[bytes] = []
        async with asyncio.timeout(30):
            while len(got) < len(values):
                got += [record.value for record in await reader.fetch()]
        assert got == values
        await reader.close()


async def test_headers_that_kafka_would_not_take_are_refused_at_once(kafka_url: str) -> None:
    topic = f"headers.{uuid4().hex}"
    async with opened(kafka_url) as broker:
        await broker.ensure_topics([TopicSpec(topic, 1, HOUR_MS)])
        with pytest.raises(RecordTooLargeError, match="1500"):
            await broker.publish(topic, b"", partition=0, headers=(("large", bytes(1_500_000)),))
        assert await (await broker.publish(topic, b"small", partition=0)) == 0


async def test_a_producer_whose_numbers_have_a_gap_is_replaced(kafka_url: str) -> None:
    """As after a leader lost its log's end: without a new producer every later record would be refused."""
    topic = f"gap.{uuid4().hex}"
    async with opened(kafka_url) as broker:
        assert isinstance(broker, KafkaBroker)
        await broker.ensure_topics([TopicSpec(topic, 1, HOUR_MS)])
        assert await (await broker.publish(topic, b"before", partition=0)) == 0
        producer = broker._durable.producer
        assert producer is not None
        producer._txn_manager.increment_sequence_number(TopicPartition(topic, 0), 5)
        with pytest.raises(BrokerError, match="OutOfOrderSequenceNumber"):
            await (await broker.publish(topic, b"refused", partition=0))
        assert await (await broker.publish(topic, b"after", partition=0)) == 1


async def test_topics_are_created_as_the_retention_needs(kafka_url: str) -> None:
    topic = f"settings.{uuid4().hex}"
    async with opened(kafka_url) as broker:
        await broker.ensure_topics([TopicSpec(topic, 3, HOUR_MS)])
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka_url.removeprefix("kafka://"))
    await admin.start()
    try:
        (response,) = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)])
        configuration = {entry[0]: entry[1] for entry in response.resources[0][4]}
    finally:
        await admin.close()
    assert configuration["retention.ms"] == str(HOUR_MS)
    assert int(configuration["segment.ms"]) <= HOUR_MS / 4


async def values(fetch: Any, count: int) -> list[bytes]:
    got: list[bytes] = []
    async with asyncio.timeout(90):
        while len(got) < count:
            got += [record.value for record in await fetch()]
    return got


@pytest.fixture(scope="module")
def guarded(kafka_url: str) -> Iterator[Node]:
    """A broker with SASL/PLAIN: `admin` may do everything, `alice` nothing, `bob` what he is granted."""
    with node(*SASL) as started:
        yield started


async def test_the_right_credentials_are_let_in(guarded: Node) -> None:
    topic = f"guarded.{uuid4().hex}"
    async with opened(guarded.url, **as_user("admin")) as broker:
        await broker.ensure_topics([TopicSpec(topic, 1, HOUR_MS)])
        assert await (await broker.publish(topic, b"x", partition=0)) == 0


async def test_wrong_credentials_are_refused_in_one_line(guarded: Node) -> None:
    with pytest.raises(BrokerAuthorizationError) as caught:
        async with opened(guarded.url, **as_user("admin", "a-wrong-secret")):
            pass
    assert "credentials of admin" in str(caught.value)
    assert "a-wrong-secret" not in str(caught.value)


async def test_a_missing_right_is_named(guarded: Node) -> None:
    with pytest.raises(BrokerAuthorizationError, match="WRITE on a topic"):
        async with opened(guarded.url, **as_user("alice")):
            pass


async def test_each_right_that_is_missing_is_named_with_what_it_is_missing_on(guarded: Node) -> None:
    mine, other = f"mine.{uuid4().hex}", f"other.{uuid4().hex}"
    async with opened(guarded.url, **as_user("admin")) as broker:
        await broker.ensure_topics([TopicSpec(name, 1, HOUR_MS) for name in (mine, other)])
    await grant(guarded, "bob", TOPIC, mine, WRITE, READ, DESCRIBE)
    await grant(guarded, "bob", TOPIC, other, DESCRIBE)
    await grant(guarded, "bob", GROUP, mine, READ)
    async with opened(guarded.url, **as_user("bob")) as broker:
        await broker.ensure_topics([TopicSpec(mine, 1, HOUR_MS)])  # it exists: no right to create is needed
        assert await (await broker.publish(mine, b"x", partition=0)) == 0
        consumer = await broker.consume(mine, mine, on_assigned=nothing, on_revoked=nothing)
        assert len(await consumer.fetch(1)) == 1
        await consumer.close()
        with pytest.raises(BrokerAuthorizationError, match=f"write {other}: the right WRITE is missing"):
            await (await broker.publish(other, b"x", partition=0))
        reader = await broker.read(other, {0: 0})
        with pytest.raises(BrokerAuthorizationError, match=f"read {other}: the right READ is missing"):
            await asyncio.wait_for(reader.fetch(), 20)
        await reader.close()
        with pytest.raises(BrokerAuthorizationError, match=f"group {other}: the right READ is missing"):
            await broker.consume(mine, other, on_assigned=nothing, on_revoked=nothing)
        with pytest.raises(BrokerAuthorizationError, match=f"{other}: the right DESCRIBE is missing"):
            await broker.members(other)
        assert isinstance(broker, KafkaBroker)
        with pytest.raises(BrokerAuthorizationError, match=f"group {other}: the right DESCRIBE is missing"):
            await broker._cluster.committed(other, mine, [0])
        with pytest.raises(BrokerAuthorizationError, match="create the topic new: the right CREATE"):
            await broker.ensure_topics([TopicSpec("new", 1, HOUR_MS)])


async def test_no_credentials_are_a_clear_error(guarded: Node) -> None:
    with pytest.raises(BrokerError, match="if it wants TLS or SASL, set CHAINS_KAFKA_SECURITY_PROTOCOL"):
        async with opened(guarded.url, connect_timeout=1):
            pass


@pytest.mark.parametrize(
    ("kafka", "said"),
    [
        ({"security_protocol": "SASL_SSL"}, "CHAINS_KAFKA_SASL_USERNAME"),
        ({"sasl_username": "ada", "sasl_password": "x"}, "CHAINS_KAFKA_SECURITY_PROTOCOL"),
        ({"security_protocol": "SSL", "ssl_cafile": "/nowhere/ca.pem"}, "TLS files"),
    ],
)
def test_settings_that_do_not_fit_are_named(kafka: dict[str, Any], said: str) -> None:
    with pytest.raises(ChainsUsageError, match=said):
        open_broker(Settings.of(broker="kafka://localhost", kafka=kafka))


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a certificate authority, and what it signed: `server` for 127.0.0.1, `client` for nothing."""
    folder = tmp_path_factory.mktemp("tls")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for name in ("ca", "stranger"):
        files = ("-keyout", f"{name}.key", "-out", f"{name}.pem")
        openssl(folder, "req", "-x509", *curve, *files, "-subj", f"/CN={name}", "-days", "2")
    for name in ("server", "client"):
        openssl(folder, "req", *curve, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        (folder / "extensions").write_text("subjectAltName=IP:127.0.0.1\n")
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "extensions")
        openssl(folder, "x509", "-req", "-in", f"{name}.csr", *signed, "-out", f"{name}.pem", "-days", "2")
    store = (folder / "server.key").read_text() + (folder / "server.pem").read_text()
    (folder / "keystore.pem").write_text(store)
    return folder


@pytest.fixture(scope="module")
def encrypted(kafka_url: str, authority: Path) -> Iterator[str]:
    """The URL of a listener with TLS that wants a certificate of its clients too."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own, controller = "PLAINTEXT://127.0.0.1:{port}", "CONTROLLER://127.0.0.1:{controller}"
    tls = f"SSL://127.0.0.1:{port}"
    with node(
        f"listeners={own},{controller},{tls}",
        f"advertised.listeners={own},{tls}",
        "listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SSL:SSL",
        "ssl.keystore.type=PEM",
        f"ssl.keystore.location={authority / 'keystore.pem'}",
        "ssl.truststore.type=PEM",
        f"ssl.truststore.location={authority / 'ca.pem'}",
        "ssl.client.auth=required",
    ):
        yield f"kafka://127.0.0.1:{port}"


async def test_tls_with_a_certificate_on_both_sides(encrypted: str, authority: Path) -> None:
    topic = f"encrypted.{uuid4().hex}"
    files = {"ssl_certfile": str(authority / "client.pem"), "ssl_keyfile": str(authority / "client.key")}
    tls = {"security_protocol": "SSL", "ssl_cafile": str(authority / "ca.pem"), **files}
    async with opened(encrypted, **tls) as broker:
        await broker.ensure_topics([TopicSpec(topic, 1, HOUR_MS)])
        reader = await broker.read(topic, {0: 0})
        await (await broker.publish(topic, b"x", partition=0))
        assert len(await reader.fetch()) == 1
        await reader.close()


async def test_a_server_that_our_authority_does_not_know_is_refused(encrypted: str, authority: Path) -> None:
    with pytest.raises(BrokerError, match="certificate verify failed") as caught:
        async with opened(encrypted, security_protocol="SSL", ssl_cafile=str(authority / "stranger.pem")):
            pass
    assert "\n" not in str(caught.value)


async def test_plaintext_to_a_listener_with_tls_says_what_to_set(encrypted: str) -> None:
    with pytest.raises(BrokerError, match="CHAINS_KAFKA_SECURITY_PROTOCOL"):
        async with opened(encrypted, connect_timeout=1):
            pass
