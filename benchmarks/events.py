"""What does a worker of events cost? Events a second, and CPU an event, beside a bare loop of aiokafka's.

    python -m benchmarks.events                                   # all three guarantees, 6 rounds each: some minutes
    python -m benchmarks.events --guarantees exactly_once --rounds 10 --count 200000

JSON of some 300 bytes is written to a topic first. Then `chains worker` and the bare loop (`benchmarks.rivals.events`)
read it all in turn, each in a process and a group of its own, run the same function on it, and write what it gives to a
topic of their own: ours first in one round, the bare loop in the next. The rate is that between the first outputs
that are seen and the last: of what is committed, or stored, where the commit comes first. Then all outputs are checked.
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import msgspec

from benchmarks import processes
from benchmarks.chains.score import Scored, Ticket
from benchmarks.driving import WrongAnswerError, cpu_seconds
from benchmarks.report import commit, table
from chains_stream.broker import Broker, TopicSpec
from chains_stream.brokers import open_broker
from chains_stream.cli.figures import PACKAGES, Machine, duration, number
from chains_stream.events import partition_of
from chains_stream.settings import Settings

GUARANTEES = ("at_least_once", "exactly_once", "at_most_once")
SYSTEMS = ("ours", "bare")
TARGET = 0.6
PARTITIONS, KEYS, HOUR_MS = 6, 1_000, 3_600_000
LOOK_SECONDS = 0.02
STALLED = 60.0  # seconds without progress
RESULTS = Path(__file__).with_name("results")
CAVEATS = (
    "Worker or bare loop, never both at once, share one machine with Kafka and with whoever looks at them.",
    "The function waits for nothing, so all that is measured is what lies around it.",
    "The bare loop has no retries, dead letters, deadlines, concurrency or metrics, and does not check what it writes.",
    "CPU is that of the worker, or the bare loop; Kafka's is not counted.",
)


class Sample(msgspec.Struct, frozen=True):
    """What one of the two did, once."""

    guarantee: str
    system: str
    round: int
    events_per_s: float
    cpu_s_per_event: float


class Row(msgspec.Struct, frozen=True):
    """A guarantee: the ratio of each round's rates, and medians."""

    guarantee: str
    ratio: float
    spread: float
    ours_per_s: float
    bare_per_s: float
    ours_cpu_s: float
    bare_cpu_s: float

    @classmethod
    def of(cls, guarantee: str, samples: Sequence[Sample]) -> "Row":
        ours, bare = ([one for one in samples if (one.guarantee, one.system) == (guarantee, name)] for name in SYSTEMS)
        ratios = [one.events_per_s / other.events_per_s for one, other in zip(ours, bare, strict=True)]
        rates = [statistics.median(one.events_per_s for one in system) for system in (ours, bare)]
        costs = [statistics.median(one.cpu_s_per_event for one in system) for system in (ours, bare)]
        return cls(guarantee, statistics.median(ratios), (max(ratios) - min(ratios)) / 2, *rates, *costs)


class Report(msgspec.Struct, frozen=True):
    """All that one run gave."""

    commit: str
    dirty: bool
    machine: Machine
    workload: str
    rows: list[Row]
    caveats: list[str]
    samples: list[Sample]

    def markdown(self) -> str:
        lines = [["", "ours of bare", "noise", "target", "", "ours", "bare", "CPU an event, ours", "bare"]]
        for row in self.rows:
            verdict = "met" if row.ratio >= TARGET else "**NOT met**"
            rates = [f"{number(rate)} events/s" for rate in (row.ours_per_s, row.bare_per_s)]
            costs = [duration(cost) for cost in (row.ours_cpu_s, row.bare_cpu_s)]
            ratio = [f"{row.ratio:.2f}", f"± {row.spread:.2f}", f"≥ {TARGET}", verdict]
            lines.append([row.guarantee, *ratio, *rates, *costs])
        head = f"Commit {self.commit}{', with changes' if self.dirty else ''}; {self.machine}".replace("\n", "  \n")
        caveats = "\n".join(f"- {caveat}" for caveat in self.caveats)
        return "\n\n".join(["# Events beside a bare loop", head, self.workload, table(lines), caveats]) + "\n"


class Bench:
    """A topic of events, and who reads it."""

    def __init__(self, broker: Broker, count: int) -> None:
        self._broker = broker
        self._count = count
        self._source = f"tickets.{uuid4().hex[:8]}"

    async def fill(self) -> int:
        """Write the events; give how many bytes one has."""
        await self._broker.ensure_topics([TopicSpec(self._source, PARTITIONS, HOUR_MS)])
        stored, size = [], 0
        for count in range(self._count):
            key = f"customer-{count * 7919 % KEYS}"
            text = f"Since this morning order {count} is shown twice, and nobody can change it. " * 2
            ticket = Ticket(count, key, "An order is shown twice", text.strip(), ["orders", "web"], 1.7e9 + count)
            value, partition = msgspec.json.encode(ticket), partition_of(key.encode(), PARTITIONS)
            stored.append(await self._broker.publish(self._source, value, partition=partition, key=key.encode()))
            size += len(value)
        await asyncio.gather(*stored)
        return round(size / self._count)

    async def measure(self, guarantee: str, system: str, of_round: int) -> Sample:
        """Have all events read once."""
        group = sink = f"{system}-{uuid4().hex[:8]}"
        await self._broker.ensure_topics([TopicSpec(sink, PARTITIONS, HOUR_MS)])
        with self._started(system, guarantee, sink, group) as process:
            first, began = await self._seen(guarantee, sink, group, 1)
            used = cpu_seconds([process.pid])
            last, ended = await self._seen(guarantee, sink, group, self._count)
            used = cpu_seconds([process.pid]) - used
        await self._check(sink)
        return Sample(guarantee, system, of_round, (last - first) / (ended - began), used / (last - first))

    @contextmanager
    def _started(self, system: str, guarantee: str, sink: str, group: str) -> Iterator[processes.Serving]:
        if system == "bare":
            where = (self._broker.url.removeprefix("kafka://"), self._source, sink, group, guarantee)
            with processes.program("benchmarks.rivals.events", *where) as process:
                yield process
            return
        told = [f"--set={name}={value}" for name, value in (("source", self._source), ("sink", sink), ("group", group))]
        common = ["--broker", self._broker.url, "--namespace", group, "--log-level", "error"]
        with processes.chains(
            "worker", "benchmarks/chains/score.py", *common, *told, f"--set=delivery={guarantee}"
        ) as process:
            yield process

    async def _seen(self, guarantee: str, sink: str, group: str, count: int) -> tuple[int, float]:
        """Wait until so many events are done; give how many are, and when that was seen."""
        done, changed = 0, time.monotonic()
        while done < count:
            before = done
            done = await (self._stored(sink) if guarantee == "at_most_once" else self._committed(group))
            now = time.monotonic()
            changed = now if done != before else changed
            if now - changed > STALLED:
                raise WrongAnswerError(f"{guarantee}: nothing more than {done} of {count} events came")
            if done < count:
                await asyncio.sleep(LOOK_SECONDS)
        return done, now

    async def _committed(self, group: str) -> int:
        found = await self._broker.committed(self._source, group, range(PARTITIONS))
        return sum(each.offset for each in found.values())

    async def _stored(self, sink: str) -> int:
        return sum(await asyncio.gather(*(self._broker.end_offset(sink, number) for number in range(PARTITIONS))))

    async def _check(self, sink: str) -> None:
        """Raise WrongAnswerError if an output is missing, or there twice, or not where its key belongs."""
        ends = {number: await self._broker.end_offset(sink, number) for number in range(PARTITIONS)}
        reader = await self._broker.read(sink, dict.fromkeys(ends, 0), isolation="read_committed")
        found: list[int] = []
        try:
            async with asyncio.timeout(STALLED):
                while any(reader.position(number) < end for number, end in ends.items()):
                    for record in await reader.fetch():
                        scored = msgspec.json.decode(record.value, type=Scored)
                        if partition_of(scored.customer.encode(), PARTITIONS) != record.partition:
                            raise WrongAnswerError(f"event {scored.number} was written to partition {record.partition}")
                        found.append(scored.number)
        finally:
            await reader.close()
        if sorted(found) != list(range(self._count)):
            raise WrongAnswerError(f"{len(found)} outputs, {len(set(found))} different ones, of {self._count} events")


async def measure(url: str, given: argparse.Namespace) -> Report:
    broker = open_broker(Settings.of(broker=url))
    await broker.start()
    samples: list[Sample] = []
    try:
        bench = Bench(broker, given.count)
        size = await bench.fill()
        for of_round in range(-1, given.rounds):  # the first warms up Kafka, and counts for nothing
            order = SYSTEMS if of_round % 2 else SYSTEMS[::-1]
            for guarantee in given.guarantees:
                pair = {system: await bench.measure(guarantee, system, of_round) for system in order}
                ours, bare = (pair[system] for system in SYSTEMS)
                print(
                    f"{of_round + 1:2} {guarantee:13} {ours.events_per_s / bare.events_per_s:.2f}: "
                    f"ours {ours.events_per_s:7,.0f}/s, {ours.cpu_s_per_event * 1e6:4.1f} µs; "
                    f"bare {bare.events_per_s:7,.0f}/s, {bare.cpu_s_per_event * 1e6:4.1f} µs",
                    flush=True,
                )
                samples += [ours, bare] if of_round >= 0 else []
    finally:
        await broker.close()
    workload = (
        f"{given.count:,} events of {size} bytes of JSON and {KEYS:,} keys, on {PARTITIONS} partitions; "
        f"{given.rounds} rounds, ours first in every second one; `predict_concurrency` of ours is 64."
    )
    rows = [Row.of(guarantee, samples) for guarantee in given.guarantees]
    return Report(*commit(), Machine.here(PACKAGES), workload, rows, list(CAVEATS), samples)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--broker", help="kafka://host:port; one of our own is started if none is named")
    parser.add_argument("--guarantees", nargs="+", choices=GUARANTEES, default=GUARANTEES)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--count", type=int, default=100_000, help="events")
    parser.add_argument("--write", action="store_true", help="the report, into benchmarks/results")
    given = parser.parse_args(arguments)
    processes.end_what_was_started()
    with processes.kafka(given.broker) as url:
        report = asyncio.run(measure(url, given))
    if given.write:
        (RESULTS / "events.md").write_text(report.markdown(), encoding="utf-8")
        (RESULTS / "events.json").write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    print(report.markdown())


if __name__ == "__main__":
    main()
