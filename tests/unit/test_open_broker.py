"""The URL of a broker: what it opens, and what is said about a wrong one."""

import subprocess
import sys

import pytest

from chains_stream.brokers import open_broker
from chains_stream.errors import ChainsUsageError
from chains_stream.settings import Settings


@pytest.mark.parametrize(
    ("url", "opened"),
    [
        ("memory://", "memory://"),
        ("kafka://localhost", "kafka://localhost:9092"),
        ("kafka://localhost:9093/", "kafka://localhost:9093"),
        ("kafka://one:1,two,three_3.example:65535", "kafka://one:1,two:9092,three_3.example:65535"),
        ("kafka://[::1]:9092,[::1]", "kafka://[::1]:9092,[::1]:9092"),
    ],
)
async def test_urls_that_open_a_broker(url: str, opened: str) -> None:
    assert open_broker(Settings(broker=url)).url == opened


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:9092",
        "kafka:localhost",
        "KAFKA://localhost",
        "amqp://localhost",
        "memory://disk",
        "kafka://",
        "kafka://localhost:",
        "kafka://localhost:0",
        "kafka://localhost:65536",
        "kafka://localhost:\uff19",  # a digit, and none of a port's
        "kafka://localhost:9092,",
        "kafka://localhost:9092/topic",
        "kafka:///localhost",
        "kafka://::1",
        "kafka://two words",
    ],
)
def test_urls_that_do_not(url: str) -> None:
    with pytest.raises(ChainsUsageError, match=r"the broker's URL is `.*`: .*(host:port|memory://)"):
        open_broker(Settings(broker=url))


@pytest.mark.parametrize("scheme", ["kafka://", "amqp://", "memory://"])
def test_credentials_in_a_url_are_not_repeated(scheme: str) -> None:
    with pytest.raises(ChainsUsageError, match="CHAINS_KAFKA_SASL_PASSWORD") as caught:
        open_broker(Settings(broker=f"{scheme}ada:lovelace@localhost:9092"))
    assert "lovelace" not in str(caught.value)


def test_the_embedded_broker_loads_no_kafka_client() -> None:
    code = (
        "import sys; from chains_stream.brokers import open_broker; from chains_stream.settings import Settings; "
        "open_broker(Settings()); print('aiokafka' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
