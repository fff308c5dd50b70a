"""`chains worker` between ordinary topics of a real Kafka: what others write, and what they read."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from chains_stream import events
from chains_stream.broker import Broker, Record, TopicSpec
from tests.acceptance.command import DEADLINE, HERE, Commands
from tests.event_crashes import broker_at

ENRICH = HERE.parents[1] / "chainlets" / "enrich.py"
RELAY = HERE / "chains" / "relay_events.py"
PARTITIONS, HOUR = 4, 3_600_000
KEYS = 8

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(120)]


class Topics:
    """Topics of a test's own, and a worker between them."""

    def __init__(self, url: str, namespace: str, *names: str) -> None:
        self.url = url
        self._namespace = namespace
        self.names = {name: f"{name}-{uuid4().hex[:8]}" for name in names}

    def __getitem__(self, name: str) -> str:
        return self.names[name]

    async def create(self, broker: Broker) -> None:
        await broker.ensure_topics([TopicSpec(topic, PARTITIONS, HOUR) for topic in self.names.values()])

    def work(self, start: Commands, chain: Path, delivery: str) -> None:
        told = [f"--set={name}={topic}" for name, topic in self.names.items()]
        common = ["--broker", self.url, "--namespace", self._namespace, f"--set=delivery={delivery}"]
        start("worker", str(chain), *common, *told).ready()


@pytest.fixture
def kcat(kafka_url: str) -> list[str]:
    """The command of a client that is not ours, with the Kafka that it is to talk to."""
    if shutil.which("kcat") is None:
        pytest.skip("needs kcat, as a foreign producer and consumer (Debian: apt-get install kcat)")
    return ["kcat", "-b", kafka_url.removeprefix("kafka://")]


def written(kcat: list[str], topic: str, lines: list[str], *options: str) -> None:
    """Have kcat write records, each from a line with key and value."""
    # It would put keys into other partitions than Kafka's own clients do, and than we do, if it were not told.
    command = [*kcat, "-P", "-t", topic, "-K|", "-X", "topic.partitioner=murmur2_random", *options]
    subprocess.run(command, input="\n".join(lines), text=True, check=True, timeout=DEADLINE)


def read(kcat: list[str], topic: str, count: int) -> list[dict[str, Any]]:
    """Have kcat read so many records that count, and all else that is there by then."""
    command = [*kcat, "-C", "-t", topic, "-o", "beginning", "-J", "-q", "-X", "isolation.level=read_committed"]
    done = subprocess.run([*command, "-c", str(count)], capture_output=True, text=True, check=True, timeout=DEADLINE)
    more = subprocess.run([*command, "-e"], capture_output=True, text=True, check=True, timeout=DEADLINE)
    assert len(more.stdout.splitlines()) == count, f"{more.stdout}\nbeyond\n{done.stdout}"
    return [json.loads(line) for line in more.stdout.splitlines()]


@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
async def test_a_foreign_producer_and_consumer_interoperate(
    kafka_url: str, namespace: str, kcat: list[str], start: Commands, delivery: str
) -> None:
    topics = Topics(kafka_url, namespace, "source", "sink")
    async with broker_at(kafka_url) as broker:
        await topics.create(broker)
    lines = [f'sensor-{n % KEYS}|{{"sensor": "sensor-{n % KEYS}", "celsius": {n}}}' for n in range(5 * KEYS)]
    written(kcat, topics["source"], lines, "-H", "site=Görlitz", "-H", "trace=")
    topics.work(start, RELAY, delivery)
    found = read(kcat, topics["sink"], len(lines))
    by_key: dict[str, list[float]] = {}
    for record in found:
        value = json.loads(record["payload"])
        key = record["key"]
        assert key == value["sensor"]
        assert record["headers"] == ["site", "Görlitz", "trace", "", "unit", "F"]
        same = events.partition_of(key.encode(), PARTITIONS)
        assert (value["partition"], record["partition"]) == (same, same), "kcat hashed it as we do"
        by_key.setdefault(key, []).append(value["fahrenheit"])
    rising = {f"sensor-{key}": [n * 9 / 5 + 32 for n in range(key, len(lines), KEYS)] for key in range(KEYS)}
    assert by_key == rising


TICKETS = [
    ("ada", "The invoice is wrong, and nobody answers. Terrible!", -1.0, "billing"),
    ("ada", "Thanks, the refund came; your support is great and friendly.", 0.5, "billing"),
    ("grace", "I can't sign in: the password is never right, and my account is locked. It's urgent.", -1.0, "access"),
    ("grace", "Logged in again. It works.", 1.0, "other"),
    ("alan", "The parcel arrived broken and late.", -1.0, "delivery"),
    ("alan", "There is nothing wrong with the second package; the courier was quick.", 1.0, "delivery"),
    ("edsger", "Where do I find the manual?", 0.0, "other"),
]


@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
async def test_the_example_scores_tickets_and_routes_them(
    kafka_url: str, namespace: str, start: Commands, delivery: str
) -> None:
    topics = Topics(kafka_url, namespace, "source", "sink", "urgent")
    async with broker_at(kafka_url) as broker:
        await topics.create(broker)
        topics.work(start, ENRICH, delivery)
        for number, (customer, text, _, _) in enumerate(TICKETS):
            ticket = json.dumps({"id": f"t{number}", "customer": customer, "text": text}).encode()
            key = customer.encode()
            where = events.partition_of(key, PARTITIONS)
            await (await broker.publish(topics["source"], ticket, partition=where, key=key))
        urgent = [number for number, (_, _, score, _) in enumerate(TICKETS) if score <= -0.5]
        others = [number for number in range(len(TICKETS)) if number not in urgent]
        for topic, numbers in ((topics["urgent"], urgent), (topics["sink"], others)):
            records = await _all(broker, topic, len(numbers))
            found = {value["id"]: value for value in (json.loads(record.value) for record in records)}
            assert found.keys() == {f"t{number}" for number in numbers}
            for number in numbers:
                customer, text, score, about = TICKETS[number]
                value = found[f"t{number}"]
                said = {name: value[name] for name in ("customer", "text", "score", "topic")}
                assert said == {"customer": customer, "text": text, "score": score, "topic": about}
            assert {record.key for record in records} == {TICKETS[number][0].encode() for number in numbers}


async def _all(broker: Broker, topic: str, count: int) -> list[Record]:
    reader = await broker.read(topic, dict.fromkeys(range(PARTITIONS), 0), isolation="read_committed")
    found: list[Record] = []
    try:
        while len(found) < count:
            found += await reader.fetch()
    finally:
        await reader.close()
    return found
