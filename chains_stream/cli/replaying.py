"""What `chains replay` runs again, and `chains run --source` tries out: where events come from, and results go."""

import asyncio
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import NamedTuple

from chains_stream.broker import Broker
from chains_stream.chain import Chain
from chains_stream.chainlet import chainlet_name
from chains_stream.cli.lines import LONGEST_LINE, STANDARD, LineOutlet, LineSupply, same_file
from chains_stream.cli.process import connected
from chains_stream.cli.supplying import Failures, Fed, Run, Told, Wanted, chosen, fed_alone
from chains_stream.errors import ChainsUsageError
from chains_stream.events import Feed, check_topic
from chains_stream.letters import dead_letter_topic
from chains_stream.log_range import LogRange, Point, by_partition, partitions_named
from chains_stream.settings import Settings
from chains_stream.supply import Outlet, RangeSupply, TopicOutlet

REPLAY_PATIENCE, LINES_PATIENCE = 60.0, 10.0  # seconds without an event that succeeds, while there are some that fail
LINES = "lines"  # the topic of a file's lines, where the Chainlet names none


class Results(NamedTuple):
    """Where what a Chainlet gives goes: to topics, or to a file."""

    sinks: tuple[str, ...]
    output: str | None
    append: bool = False

    @property
    def file(self) -> str | None:
        return None if self.sinks else self.output or STANDARD


class Writing:
    """Where results go, once it is open."""

    def __init__(self, results: Results) -> None:
        self._results = results
        self._stdout = sys.stdout.buffer
        self._file: LineOutlet | None = None

    def open(self, stack: AsyncExitStack, feed: Feed, broker: Broker | None = None) -> Mapping[str, Outlet]:
        """Give the outlets of a Chainlet's sinks. Raises ChainsUsageError."""
        topics = [sink.topic for sink in feed.sinks]
        if self._results.file is None:
            assert broker is not None, "topics are on one"
            named = self._results.sinks * (len(topics) if len(self._results.sinks) == 1 else 1)
            return {topic: TopicOutlet(broker, name) for topic, name in zip(topics, named, strict=True)}
        self._file = LineOutlet(self._results.file, self._stdout, append=self._results.append)
        stack.callback(self._file.close)
        return dict.fromkeys(topics, self._file)

    @property
    def ends(self) -> "list[asyncio.Future[None]]":
        return [] if self._file is None else [self._file.broken]

    def gave(self) -> str:
        """Say what came of it."""
        if self._file is None:
            return f"results are in {', '.join(self._results.sinks)}"
        where = "written" if self._results.file == STANDARD else f"written to {self._results.file}"
        return f"{self._file.count:,} results {where}"


# --- a range of a topic


class Replay(NamedTuple):
    """What `chains replay` is told."""

    wanted: Wanted
    begin: Point
    end: Point
    partitions: tuple[int, ...]
    results: Results
    dead_letters: bool


def replay(chain: Chain, told: Replay, settings: Settings) -> None:
    """Run a range of a topic again. Raises ChainsUsageError, BrokerError, StoppedError."""
    results = told.results
    if results.sinks and results.output is not None:
        raise ChainsUsageError("results go to topics or to a file: say --sink or --output, not both")
    if results.append and results.output in (None, STANDARD):
        raise ChainsUsageError("--append goes with the name of a file, --output FILE")
    for name in results.sinks:
        check_topic("--sink", name)
    cls = chosen(chain, told.wanted.chainlet)
    feed = fed_alone(chain, cls, told.wanted)
    if results.sinks and len(results.sinks) not in (1, len(feed.sinks)):
        theirs = ", ".join(sink.topic for sink in feed.sinks)
        raise ChainsUsageError(f"--sink names {len(results.sinks)} topics for the {len(feed.sinks)} sinks {theirs}")
    topic, writing = feed.source.topic, Writing(results)
    stops: dict[int, int] = {}

    async def open_(stack: AsyncExitStack, _failures: Failures) -> Fed:
        broker = await stack.enter_async_context(connected(settings))
        ranges = await LogRange(topic, told.begin, told.end, told.partitions).fix(broker)
        stops.update({partition: offsets.stop for partition, offsets in ranges.items()})
        supply = RangeSupply(broker, topic, ranges)
        stack.push_async_callback(supply.close)
        total = sum(map(len, ranges.values()))
        ready = f"replaying {total:,} offsets of {topic}, {partitions_named(ranges)}, through {chainlet_name(cls)}"
        letters = TopicOutlet(broker, dead_letter_topic(topic)) if told.dead_letters else None
        outlets = writing.open(stack, feed, broker)
        return Fed(supply, total, "offsets", ready, outlets, letters, writing.ends)

    def place(partition: int, offset: int) -> str:
        return f"{topic}, partition {partition}, offset {offset}"

    def go_on(positions: Mapping[int, int]) -> str:
        more = f" --output {results.output} --append" if results.output not in (None, STANDARD) else ""
        return f"to go on from here: --from {by_partition(positions)} --to {by_partition(stops)}{more}"

    about = Told(place, go_on, writing.gave)
    Run(chain, feed, settings, about, open_, patience=REPLAY_PATIENCE, bar=True).to_the_end()


# --- a file of lines


def run_lines(chain: Chain, file: str, chainlet: str | None, output: str | None, settings: Settings) -> None:
    """Run a Chainlet on each line of a file. Raises ChainsUsageError, StoppedError."""
    results = Results((), output)
    if output is not None and same_file(file, output):
        raise ChainsUsageError(f"--output {output} is the --source itself")
    cls = chosen(chain, chainlet)
    feed = fed_alone(chain, cls, Wanted(chainlet, style="json", lines=True), LINES)
    writing = Writing(results)
    name = "stdin" if file == STANDARD else file

    async def open_(stack: AsyncExitStack, failures: Failures) -> Fed:
        def too_long(number: int) -> None:
            failures.refuse(0, number, f"the line is over {LONGEST_LINE >> 20} MiB long")

        supply = LineSupply(file, feed.source.topic, too_long)
        stack.callback(supply.close)
        ready = f"running {chainlet_name(cls)} on the lines of {name}"
        return Fed(supply, None, "lines", ready, writing.open(stack, feed), None, writing.ends)

    def place(_partition: int, offset: int) -> str:
        return f"{name}:{offset + 1}"

    def go_on(positions: Mapping[int, int]) -> str:
        return f"all lines before {name}:{positions[0] + 1} are done"

    about = Told(place, go_on, writing.gave)
    Run(chain, feed, settings, about, open_, patience=LINES_PATIENCE).to_the_end()
