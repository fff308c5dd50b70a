"""A range of a topic's log, as a person names it: by offsets, by times, or from one end."""

import re
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from typing import Literal

import msgspec

from chains_stream.broker import Broker
from chains_stream.errors import ChainsUsageError, UnknownTopicError

_BY_PARTITION = re.compile(r"[0-9]{1,9}:[0-9]{1,18}(,[0-9]{1,9}:[0-9]{1,18})*")
_OFFSET = re.compile(r"[0-9]{1,18}")


class Offset(msgspec.Struct, frozen=True):
    """The same offset in each partition."""

    offset: int


class Offsets(msgspec.Struct, frozen=True):
    """An offset of its own for each partition; others are not meant."""

    by_partition: dict[int, int]


class Time(msgspec.Struct, frozen=True):
    """The first record of each partition that is not older. Unix time."""

    ms: int


Point = Offset | Offsets | Time | Literal["earliest", "latest"]


def parse_point(flag: str, text: str) -> Point:
    """Read what a flag says: an offset, an ISO 8601 time (UTC where it names no zone), or an end of the log.

    ``0:120,1:80`` are offsets by partition. Raises ChainsUsageError.
    """
    text = text.strip()
    if text == "earliest":
        return "earliest"
    if text in ("latest", "end"):
        return "latest"
    if _OFFSET.fullmatch(text):
        return Offset(int(text))
    if _BY_PARTITION.fullmatch(text):
        pairs = [pair.split(":") for pair in text.split(",")]
        found = {int(partition): int(offset) for partition, offset in pairs}
        if len(found) < len(pairs):
            raise ChainsUsageError(f"{flag} {text}: it names a partition twice")
        return Offsets(found)
    moment = _moment(text)
    if moment is None:
        allowed = "an offset, a time such as 2026-05-01T12:00:00Z, `earliest`, `end`, or PARTITION:OFFSET,…"
        raise ChainsUsageError(f"{flag} should be {allowed} (got {text!r})")
    zoned = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    return Time(max(0, round(zoned.timestamp() * 1000)))


def _moment(text: str) -> datetime | None:
    if text.isdigit():  # an offset that is too large, and yet a time to the standard library
        return None
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None


class LogRange(msgspec.Struct, frozen=True):
    """What of a topic is meant: from one point to before another one, of some partitions; of all if none is named."""

    topic: str
    begin: Point
    end: Point
    partitions: tuple[int, ...] = ()

    async def fix(self, broker: Broker) -> dict[int, range]:
        """Give the offsets that these are now, within what each partition holds.

        Raises ChainsUsageError for partitions that don't exist, UnknownTopicError, BrokerError.
        """
        meant = await self._meant(broker)
        first = {number: await broker.begin_offset(self.topic, number) for number in meant}
        last = {number: await broker.end_offset(self.topic, number, isolation="read_committed") for number in meant}
        begins = await self._offsets(broker, self.begin, first, last)
        ends = await self._offsets(broker, self.end, first, last)
        return {number: range(begins[number], max(begins[number], ends[number])) for number in meant}

    async def _meant(self, broker: Broker) -> list[int]:
        try:
            count = await broker.partitions(self.topic)
        except UnknownTopicError:
            raise ChainsUsageError(f"there is no topic {self.topic} on {broker.url}") from None
        named = [set(point.by_partition) for point in (self.begin, self.end) if isinstance(point, Offsets)]
        meant = set(self.partitions or range(count)).intersection(*named)
        unknown = sorted(number for number in set(self.partitions).union(*named) if number >= count)
        if unknown:
            raise ChainsUsageError(f"{self.topic} has no partition {unknown[0]}: there are 0 to {count - 1}")
        if not meant:
            raise ChainsUsageError("no partition is in all that was named by --partition, --from and --to")
        return sorted(meant)

    async def _offsets(
        self, broker: Broker, point: Point, first: Mapping[int, int], last: Mapping[int, int]
    ) -> dict[int, int]:
        match point:
            case "earliest":
                return dict(first)
            case "latest":
                return dict(last)
            case Offset(offset):
                found: Mapping[int, int] = dict.fromkeys(first, offset)
            case Offsets(by_partition):
                found = by_partition
            case Time(ms):
                found = await broker.offsets_at(self.topic, first.keys(), ms)
        return {number: min(max(found[number], begin), last[number]) for number, begin in first.items()}


def by_partition(offsets: Mapping[int, int]) -> str:
    """Write offsets as `parse_point` reads them."""
    return ",".join(f"{partition}:{offset}" for partition, offset in sorted(offsets.items()))


def partitions_named(numbers: Collection[int]) -> str:
    """Name partitions for a person."""
    return f"partition{'s' if len(numbers) != 1 else ''} {', '.join(map(str, sorted(numbers)))}"
