"""Many requests and many streams at once, through real processes and a real Kafka: all answered, complete, in order."""

import asyncio

import msgspec
import pytest

from tests.acceptance.command import HERE, Commands
from tests.acceptance.loading import load, shown

FILE = str(HERE / "chains" / "load.py")

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(300)]


def test_ten_thousand_requests_at_256_in_flight(start: Commands, kafka_url: str, namespace: str) -> None:
    common = ("--broker", kafka_url, "--namespace", namespace)
    started = [
        start("worker", f"{FILE}:Above", "--chainlet", "Above", *common),
        start("worker", f"{FILE}:Above", "--chainlet", "Below", *common),
        start("gateway", f"{FILE}:Above", "--port", "0", *common),
    ]
    url = [command.ready() for command in started][-1]
    bodies = [msgspec.json.encode({"number": number}) for number in range(10_000)]

    def expected(body: bytes, answer: bytes) -> bool:
        return bool(int(answer) == msgspec.json.decode(body)["number"] + 1)

    result = asyncio.run(load(url, bodies, 256, accept="application/json", expected=expected))
    print(shown(result))  # noqa: T201 - figures for who runs this with -s
    assert (result.completed, result.failed, result.unfinished) == (10_000, {}, 0)


def test_a_hundred_streams_of_500_chunks(start: Commands, kafka_url: str, namespace: str) -> None:
    common = ("--broker", kafka_url, "--namespace", namespace)
    started = [start("worker", f"{FILE}:Count", *common), start("gateway", f"{FILE}:Count", "--port", "0", *common)]
    url = [command.ready() for command in started][-1]
    complete = "".join(f"{number}\n" for number in range(500)).encode()

    def expected(_body: bytes, answer: bytes) -> bool:
        return answer == complete

    bodies = [b'{"upto": 500}'] * 100
    result = asyncio.run(load(url, bodies, 100, accept="application/x-ndjson", expected=expected))
    print(shown(result))  # noqa: T201 - figures for who runs this with -s
    assert (result.completed, result.failed, result.unfinished) == (100, {}, 0)
