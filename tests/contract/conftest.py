"""Every broker there is: the embedded one and a real Apache Kafka."""

from collections.abc import AsyncIterator
from uuid import uuid4

import pytest

from chains_stream.broker import Broker, TopicSpec
from chains_stream.brokers import open_broker
from chains_stream.settings import Settings
from tests.members import HOUR_MS


@pytest.fixture(params=["memory", pytest.param("kafka", marks=pytest.mark.kafka)])
async def broker(request: pytest.FixtureRequest) -> AsyncIterator[Broker]:
    url = "memory://" if request.param == "memory" else request.getfixturevalue("kafka_url")
    opened = open_broker(Settings.of(broker=url))
    try:
        await opened.start()
        yield opened
    finally:
        await opened.close()


@pytest.fixture
async def topic(broker: Broker) -> str:
    name = f"contract.{uuid4().hex}"
    await broker.ensure_topics([TopicSpec(name, 4, HOUR_MS)])
    return name
