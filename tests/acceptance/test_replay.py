"""`chains replay` on a real Kafka: a range of a topic again, into a file or another topic, and nothing else touched."""

import asyncio
import datetime as dt
import json
import re
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from chains_stream.broker import Broker, Record, TopicSpec
from chains_stream.brokers import open_broker
from chains_stream.errors import UnknownTopicError
from chains_stream.events import partition_of
from chains_stream.letters import EXCEPTION_MESSAGE, dead_letter_topic
from chains_stream.settings import Settings
from tests.acceptance.command import DEADLINE, HERE, Commands, chains, until

FILE = str(HERE / "chains" / "retold.py")
GROUP = "chains.Retell.Retell.events"
HOUR_MS = 3_600_000

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(120)]


class Log:
    """A topic of a test's own, with two partitions, and what may be asked about it."""

    def __init__(self, broker: Broker, url: str) -> None:
        self.broker = broker
        self.url = url
        self.topic = f"tickets-{uuid4().hex[:8]}"

    async def write(self, partition: int, tickets: Sequence[Mapping[str, Any]], *, committed: bool = False) -> None:
        """Write tickets, in one transaction if they are to be `committed`: a marker follows it."""
        if not committed:
            values = [json.dumps(ticket).encode() for ticket in tickets]
            await asyncio.gather(
                *[await self.broker.publish(self.topic, v, partition=partition, key=b"k") for v in values]
            )
            return
        transactor = self.broker.transactor(self.topic)
        await transactor.start()
        transactor.begin()
        for ticket in tickets:
            await transactor.publish(self.topic, json.dumps(ticket).encode(), partition=partition)
        await transactor.commit()
        await transactor.close()

    async def records(self, topic: str) -> list[Record]:
        """Give all that a topic has."""
        count = await self.broker.partitions(topic)
        ends = {number: await self.broker.end_offset(topic, number) for number in range(count)}
        reader = await self.broker.read(topic, dict.fromkeys(ends, 0))
        found: list[Record] = []
        try:
            async with asyncio.timeout(DEADLINE):
                while any(reader.position(number) < end for number, end in ends.items()):
                    found += await reader.fetch()
        finally:
            await reader.close()
        return found

    def arguments(self, *more: str) -> list[str]:
        return ["replay", FILE, "--topic", self.topic, "--broker", self.url, *more]

    async def replay(self, *more: str) -> tuple[int, list[Any], list[str]]:
        """Run the command; give its status, the results on stdout, and the lines on stderr that are no noise."""
        done = await asyncio.to_thread(chains, *self.arguments(*more))
        told = [line for line in done.stderr.splitlines() if line != "what a Chainlet prints is no result"]
        return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], told


@pytest.fixture
async def log(kafka_url: str) -> AsyncIterator[Log]:
    broker = open_broker(Settings.of(broker=kafka_url))
    await broker.start()
    try:
        made = Log(broker, kafka_url)
        await broker.ensure_topics([TopicSpec(made.topic, 2, HOUR_MS)])
        yield made
    finally:
        await broker.close()


def numbered(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"id": f"t{number}", "customer": f"c{number % 3}", **more} for number in range(count)]


async def test_a_range_ends_though_its_last_offset_holds_no_record(log: Log) -> None:
    """It goes on stdout as lines of JSON, in the order of its keys, and what fails is told."""
    await log.write(0, [*numbered(4), {"id": "bad"}, {"no": "id"}, {"id": "none"}])
    await log.write(1, numbered(3), committed=True)
    status, results, told = await log.replay("--from", "0:2,1:0", "--to", "end")
    assert status == 1
    assert sorted(result["at"] for result in results) == ["0@2", "0@3", "1@0", "1@1", "1@2"]
    assert {result["id"] for result in results} == {"T0", "T1", "T2", "T3"}
    assert told[0] == f"replaying 9 offsets of {log.topic}, partitions 0, 1, through Retell"
    assert sorted(told[1:3]) == [
        f"{log.topic}, partition 0, offset 4: ValueError: a bad ticket",
        f"{log.topic}, partition 0, offset 5: Object missing required field `id`",
    ]
    assert told[3:] == ["6 events done, 2 failed; 5 results written"]
    assert await log.broker.committed(log.topic, GROUP, [0, 1]) == {}
    assert await log.broker.members(GROUP) == 0
    with pytest.raises(UnknownTopicError):
        await log.broker.partitions(dead_letter_topic(log.topic))


async def test_a_range_of_time_goes_to_a_topic_and_its_failures_to_the_dead_letters(log: Log) -> None:
    await log.write(0, [{"id": "early"}])
    await asyncio.sleep(0.01)  # a later millisecond
    await log.write(0, [{"id": "first", "customer": "ada"}, {"id": "quiet"}, {"id": "bad"}])
    await asyncio.sleep(0.01)  # as above
    await log.write(0, [{"id": "late"}])
    times = [record.timestamp_ms for record in await log.records(log.topic)]

    begin, end = (_iso(at) for at in (times[1], times[4]))
    told, quiet = f"{log.topic}.told", f"{log.topic}.quiet"
    status, results, _ = await log.replay(
        "--from", begin, "--to", end, "--sink", told, "--sink", quiet, "--dead-letters"
    )
    assert (status, results) == (1, [])
    (first,), (hushed,) = await log.records(told), await log.records(quiet)
    assert json.loads(first.value) == {"id": "FIRST", "customer": "ada", "at": "0@1"}
    assert (first.key, first.partition) == (b"ada", partition_of(b"ada", await log.broker.partitions(told)))
    assert (json.loads(hushed.value)["at"], hushed.key) == ("0@2", b"k")
    (letter,) = await log.records(dead_letter_topic(log.topic))
    assert dict(letter.headers)[EXCEPTION_MESSAGE] == b"a bad\nticket"


async def test_one_that_is_stopped_says_how_to_go_on(log: Log, start: Commands, tmp_path: Path) -> None:
    await log.write(0, [*numbered(300, seconds=0.01)])
    await log.write(1, [*numbered(20, seconds=0.01)])
    output = tmp_path / "results.jsonl"
    command = start(*log.arguments("--from", "earliest", "--output", str(output)))
    await asyncio.to_thread(_until, output, 30)
    await log.write(1, [{"id": "after"}])  # the range was fixed at the start
    command.send(signal.SIGINT)
    assert await asyncio.to_thread(command.wait) == 128 + signal.SIGINT
    told = command.stderr.text().splitlines()[-1]
    found = re.fullmatch(r"to go on from here: (--from \S+ --to 0:300,1:20) --output \S+ --append", told)
    assert found is not None, told
    before = _ats(output)
    assert len(before) < 320
    status, _, _ = await log.replay(*found[1].split(), "--output", str(output), "--append")
    assert status == 0
    assert set(_ats(output)) == {f"0@{n}" for n in range(300)} | {f"1@{n}" for n in range(20)}
    assert len(_ats(output)) - 320 <= 64, "what ran beside the first one that was not done comes again"


def _iso(ms: int) -> str:
    return dt.datetime.fromtimestamp(ms / 1000, dt.UTC).isoformat(timespec="milliseconds")


def _ats(output: Path) -> list[str]:
    return [json.loads(line)["at"] for line in output.read_text(encoding="utf-8").splitlines()]


def _until(output: Path, lines: int) -> None:
    until(lambda: output.exists() and output.read_text(encoding="utf-8").count("\n") >= lines)


async def test_a_topic_that_is_not_there_is_a_mistake(log: Log) -> None:
    status, _, told = await log.replay("--topic", "no-such-topic", "--from", "0")
    assert (status, told) == (2, [f"error: there is no topic no-such-topic on {log.url}"])
    with pytest.raises(UnknownTopicError):
        await log.broker.partitions("no-such-topic")
