"""What is Kafka's alone: brokers that are missing, restart, or refuse us."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import pytest

from chains_stream.broker import Broker, Committed, TopicSpec
from chains_stream.brokers import open_broker
from chains_stream.errors import BrokerAuthorizationError, BrokerError, ChainsUsageError
from chains_stream.settings import Settings
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


@pytest.mark.timeout(180)
async def test_a_restart_loses_nothing_that_was_stored(own: Node) -> None:
    """Producer, reader and group go on by themselves when the broker comes back."""
    topic = f"restart.{uuid4().hex}"

    async def nothing(_partitions: frozenset[int]) -> None: ...

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


async def values(fetch: Any, count: int) -> list[bytes]:
    got: list[bytes] = []
    async with asyncio.timeout(90):
        while len(got) < count:
            got += [record.value for record in await fetch()]
    return got


LOGIN = (
    "org.apache.kafka.common.security.plain.PlainLoginModule required "
    'username="admin" password="admin-secret" user_admin="admin-secret" user_alice="alice-secret";'
)
SASL = (
    "listeners=SASL_PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}",
    "advertised.listeners=SASL_PLAINTEXT://127.0.0.1:{port}",
    "inter.broker.listener.name=SASL_PLAINTEXT",
    "sasl.mechanism.inter.broker.protocol=PLAIN",
    "listener.security.protocol.map=PLAINTEXT:PLAINTEXT,SASL_PLAINTEXT:SASL_PLAINTEXT,CONTROLLER:PLAINTEXT",
    "sasl.enabled.mechanisms=PLAIN",
    f"listener.name.sasl_plaintext.plain.sasl.jaas.config={LOGIN}",
    "authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer",
    "super.users=User:admin;User:ANONYMOUS",
)


@pytest.fixture(scope="module")
def guarded(kafka_url: str) -> Iterator[Node]:
    """A broker with SASL/PLAIN: `admin` may do everything, `alice` nothing."""
    with node(*SASL) as started:
        yield started


def as_user(name: str, password: str | None = None) -> dict[str, Any]:
    return {
        "security_protocol": "SASL_PLAINTEXT",
        "sasl_username": name,
        "sasl_password": password or f"{name}-secret",
        "connect_timeout": 10,
    }


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
