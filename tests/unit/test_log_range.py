"""Ranges of a log as a person names them, and what they are on a broker."""

import asyncio
from typing import Any

import pytest

from chains_stream.broker import TopicSpec
from chains_stream.brokers import memory_log
from chains_stream.brokers.memory import MemoryBroker
from chains_stream.errors import ChainsUsageError
from chains_stream.log_range import LogRange, Offset, Offsets, Point, Time, by_partition, parse_point
from chains_stream.settings import Settings
from chains_stream.supply import RangeSupply

HOUR_MS = 3_600_000
NOON_MS = 1_777_636_800_000  # 2026-05-01T12:00:00Z


@pytest.mark.parametrize(
    ("text", "point"),
    [
        ("earliest", "earliest"),
        ("latest", "latest"),
        ("end", "latest"),
        ("0", Offset(0)),
        ("12345678901", Offset(12_345_678_901)),
        ("3:120", Offsets({3: 120})),
        ("0:120,11:80", Offsets({0: 120, 11: 80})),
        ("2026-05-01T12:00:00Z", Time(NOON_MS)),
        ("2026-05-01T14:00:00.250+02:00", Time(NOON_MS + 250)),
        ("2026-05-01 12:00", Time(NOON_MS)),
        ("2026-05-01", Time(NOON_MS - 12 * HOUR_MS)),
        ("1960-01-01", Time(0)),
    ],
)
def test_a_point_is_an_offset_a_time_or_an_end(text: str, point: Point) -> None:
    assert parse_point("--from", text) == point


@pytest.mark.parametrize("text", ["", "-1", "1.5", "soon", "0:1,", "0:1,x", "2026-13-01", "1" * 19, "0:-1"])
def test_what_is_none_is_told_with_what_is_allowed(text: str) -> None:
    with pytest.raises(ChainsUsageError, match=r"^--to should be an offset, a time such as .+ \(got '"):
        parse_point("--to", text)


def test_a_partition_has_one_offset() -> None:
    with pytest.raises(ChainsUsageError, match="names a partition twice"):
        parse_point("--from", "0:1,0:2")


def test_offsets_are_written_as_they_are_read() -> None:
    assert parse_point("--from", by_partition({10: 7, 2: 120})) == Offsets({2: 120, 10: 7})


@pytest.fixture
async def broker(monkeypatch: pytest.MonkeyPatch) -> MemoryBroker:
    """One with a topic of two partitions: offsets 2 to 9, and 0 to 4. Each record is a millisecond later."""
    now = iter(range(NOON_MS, NOON_MS + 1_000))
    monkeypatch.setattr(memory_log, "now_ms", lambda: next(now))
    made = MemoryBroker(Settings())
    await made.ensure_topics([TopicSpec("log", 2, HOUR_MS)])
    for partition, count in ((0, 10), (1, 5)):
        for number in range(count):
            await made.publish("log", str(number).encode(), partition=partition)
    await made.delete_before("log", {0: 2})
    return made


@pytest.mark.parametrize(
    ("begin", "end", "partitions", "ranges"),
    [
        ("earliest", "end", (), {0: range(2, 10), 1: range(5)}),
        ("0", "3", (), {0: range(2, 3), 1: range(3)}),
        ("4", "100", (), {0: range(4, 10), 1: range(4, 5)}),
        ("3", "1", (1,), {1: range(3, 3)}),
        ("end", "end", (), {0: range(10, 10), 1: range(5, 5)}),
        ("0:8", "end", (), {0: range(8, 10)}),
        ("0:8,1:1", "1:3", (), {1: range(1, 3)}),
        ("2026-05-01T12:00:00.004Z", "2026-05-01T12:00:00.012Z", (), {0: range(4, 10), 1: range(2)}),
    ],
)
async def test_a_range_is_what_the_partitions_hold(
    broker: MemoryBroker, begin: str, end: str, partitions: tuple[int, ...], ranges: dict[int, range]
) -> None:
    meant = LogRange("log", parse_point("--from", begin), parse_point("--to", end), partitions)
    assert await meant.fix(broker) == ranges


@pytest.mark.parametrize(
    ("topic", "begin", "partitions", "told"),
    [
        ("none", "0", (), "there is no topic none on memory://"),
        ("log", "0", (2,), "log has no partition 2: there are 0 to 1"),
        ("log", "5:1", (), "log has no partition 5: there are 0 to 1"),
        ("log", "0:1", (1,), "no partition is in all that was named by --partition, --from and --to"),
    ],
)
async def test_partitions_that_are_not_there_are_a_mistake(
    broker: MemoryBroker, topic: str, begin: str, partitions: tuple[int, ...], told: str
) -> None:
    with pytest.raises(ChainsUsageError) as raised:
        await LogRange(topic, parse_point("--from", begin), "latest", partitions).fix(broker)
    assert str(raised.value) == told


async def taken(supply: RangeSupply, at_once: int = 3) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    async with asyncio.timeout(10):
        while records := await supply.fetch(at_once):
            assert len(records) <= at_once
            found += [(record.partition, record.offset) for record in records]
    return found


async def test_records_beyond_the_range_are_not_given_and_soon_not_read(
    broker: MemoryBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chains_stream.supply.OVERSHOOT", 5)
    opened: list[Any] = []
    read = broker.read

    async def noted(topic: str, positions: Any, **more: Any) -> Any:
        opened.append(dict(positions))
        return await read(topic, positions, **more)

    monkeypatch.setattr(broker, "read", noted)
    monkeypatch.setattr("chains_stream.brokers.memory_reading.FETCH_RECORDS", 4)
    supply = RangeSupply(broker, "log", {0: range(2, 3), 1: range(5)})
    for number in range(30):
        await broker.publish("log", str(number).encode(), partition=0)
    assert sorted(await taken(supply)) == [(0, 2), *((1, number) for number in range(5))]
    assert await supply.fetch(1) == []
    assert opened[0] == {0: 2, 1: 0}
    assert all(0 not in positions for positions in opened[1:])


async def test_the_last_offset_of_a_range_may_have_been_aborted(broker: MemoryBroker) -> None:
    transactor = broker.transactor("t")
    await transactor.start()
    transactor.begin()
    await transactor.publish("log", b"", partition=1)
    await transactor.abort()
    assert await taken(RangeSupply(broker, "log", {0: range(10, 10), 1: range(3, 6)})) == [(1, 3), (1, 4)]
