"""Workers that are killed while they process events, and an account of every event: `python -m tests.event_crashes`."""

import argparse
import asyncio
import random
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import msgspec

from chains_stream import events
from chains_stream.broker import Broker, TopicSpec
from chains_stream.brokers import open_broker
from chains_stream.settings import Settings
from tests.acceptance.command import Command, Commands, commands

COPY = str(Path(__file__).parent / "acceptance" / "chains" / "copy_events.py")
KEYS, PARTITIONS, HOUR = 50, 6, 3_600_000
STALLED = 120.0  # seconds without a new output, after which nothing more is expected


class Account(NamedTuple):
    """What became of the events, as a reader of committed records sees it.

    Attributes:
        missing, repeated: how many of them.
        disordered: keys whose events were first seen in another order than they were sent in.
        workers: processes that wrote something.
        seconds: from the first kill on until all was there.
    """

    missing: int
    repeated: int
    disordered: int
    workers: int
    seconds: float


class Numbered(msgspec.Struct):
    key: str
    number: int
    by: int = 0


async def crash(url: str, delivery: str, *, count: int, kills: int, seed: int = 0, workers: int = 2) -> Account:
    """Have so many events copied by workers of which one after another is killed; give the account."""
    chance = random.Random(seed)
    source, sink = (f"{name}-{uuid4().hex[:8]}" for name in ("source", "sink"))
    async with broker_at(url) as broker:
        await broker.ensure_topics([TopicSpec(topic, PARTITIONS, HOUR) for topic in (source, sink)])
        told = [f"--set={name}={value}" for name, value in (("source", source), ("sink", sink), ("delivery", delivery))]
        common = ["--broker", url, "--namespace", f"t{uuid4().hex[:8]}", *told]
        with commands() as start:
            fleet = [_worker(start, common) for _ in range(workers)]
            for each in fleet:
                await asyncio.to_thread(each.ready)
            sending = asyncio.create_task(_send(broker, source, count))
            began = time.monotonic()
            reading = asyncio.create_task(_read(broker, sink, count))
            for number in range(kills):
                goal = int((number + chance.random()) * count / (kills + 1))
                await _until(broker, sink, goal, reading)
                victim = fleet.pop(chance.randrange(len(fleet)))
                victim.end()
                fleet.append(_worker(start, common))
            await sending
            found = await reading
            return _account(found, count, time.monotonic() - began)


@asynccontextmanager
async def broker_at(url: str) -> AsyncIterator[Broker]:
    broker = open_broker(Settings.of(broker=url))
    try:
        await broker.start()
        yield broker
    finally:
        await broker.close()


def _worker(start: Commands, common: list[str]) -> Command:
    variables = {"CHAINS_KAFKA_SESSION_TIMEOUT_MS": "6000"}
    return start("worker", COPY, "--log-level", "info", *common, variables=variables)


async def _send(broker: Broker, topic: str, count: int) -> None:
    encode = msgspec.json.Encoder().encode
    stored = None
    for number in range(count):
        key = f"key-{number % KEYS}"
        partition = events.partition_of(key.encode(), PARTITIONS)
        stored = await broker.publish(topic, encode(Numbered(key, number)), partition=partition, key=key.encode())
        if number % 500 == 0:
            await stored
    if stored is not None:
        await stored


async def _until(broker: Broker, topic: str, goal: int, reading: "asyncio.Task[list[Numbered]]") -> None:
    """Wait until so much has been written, by whomever."""
    while not reading.done():
        ends = [await broker.end_offset(topic, number) for number in range(PARTITIONS)]
        if sum(ends) >= goal:
            return
        await asyncio.sleep(0.05)


async def _read(broker: Broker, topic: str, count: int) -> list[Numbered]:
    """Read until all are there, or nothing new comes any more; and then a little longer, for what should not come."""
    decode = msgspec.json.Decoder(Numbered).decode
    reader = await broker.read(topic, dict.fromkeys(range(PARTITIONS), 0), isolation="read_committed")
    found: list[Numbered] = []
    seen: set[int] = set()
    try:
        while True:
            try:
                async with asyncio.timeout(STALLED if len(seen) < count else 3.0):
                    records = await reader.fetch()
            except TimeoutError:
                return found
            found += [decode(record.value) for record in records]
            seen.update(each.number for each in found[-len(records) :])
    finally:
        await reader.close()


def _account(found: list[Numbered], count: int, seconds: float) -> Account:
    times = Counter(each.number for each in found)
    by_key: dict[str, list[int]] = defaultdict(list)
    for each in found:
        if times[each.number] == 1 or each.number not in by_key[each.key]:
            by_key[each.key].append(each.number)
    return Account(
        missing=count - len(times),
        repeated=sum(times.values()) - len(times),
        disordered=sum(numbers != sorted(numbers) for numbers in by_key.values()),
        workers=len({each.by for each in found}),
        seconds=seconds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--broker", required=True, help="kafka://host:port")
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for delivery in ("exactly_once", "at_least_once"):
        account = asyncio.run(crash(given.broker, delivery, count=given.events, kills=given.kills, seed=given.seed))
        print(f"{delivery}: {account}", flush=True)  # noqa: T201 - a program that prints


if __name__ == "__main__":
    main()
