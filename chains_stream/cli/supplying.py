"""Running a Chainlet on a bounded run of events, in this process: what `chains replay` and `chains run --source` share.

The Chain is hosted on an embedded broker, whose topic of events is supplied from elsewhere, and whose topics of results
go elsewhere.
"""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, redirect_stdout
from typing import Any, NamedTuple

import click

from chains_stream.broker import Record, TopicSpec
from chains_stream.brokers import open_supplied
from chains_stream.chain import Chain
from chains_stream.chainlet import ChainletBase, chainlet_name
from chains_stream.cli.process import Serving, Signals, end, run, serve
from chains_stream.cli.progress import Progress
from chains_stream.cli.report import FAILED, StoppedError, say
from chains_stream.client import open_caller
from chains_stream.errors import BrokerError, ChainsRuntimeError, ChainsUsageError, RecordTooLargeError
from chains_stream.event_worker import EventWorker
from chains_stream.events import Feed, Sink, Source, feed_of
from chains_stream.formats import named
from chains_stream.letters import Letter, dead_letter_topic
from chains_stream.messages import Headers
from chains_stream.settings import Settings
from chains_stream.supply import Outlet, Supply, SupplyConsumer
from chains_stream.worker import Host

LOOK = 0.2  # seconds between two looks at how far it is
NO_SINK = "output"  # what a sink is called where the Chainlet has none


# --- the Chainlet


class Wanted(NamedTuple):
    """What the command line says of the Chainlet and its topics, in the place of its class."""

    chainlet: str | None = None
    topic: str | None = None
    sinks: Sequence[str] = ()
    style: str | None = None  # of the topics' values
    lines: bool = False  # whether what it gives goes to lines of JSON


def chosen(chain: Chain, name: str | None) -> type[ChainletBase]:
    """Give the Chainlet of that name, else the entrypoint or the only other one that has a source.

    Raises ChainsUsageError.
    """
    if name is not None:
        return chain.find(name)
    fed = [cls for cls in chain.chainlets if getattr(cls, "source", None) is not None]
    if chain.entrypoint in fed or not fed:
        return chain.entrypoint
    if len(fed) > 1:
        names = ", ".join(map(chainlet_name, fed))
        raise ChainsUsageError(f"several Chainlets have a source: name one of {names} with --chainlet")
    return fed[0]


def fed_alone(chain: Chain, cls: Any, wanted: Wanted, otherwise: str | None = None) -> Feed:
    """Have one Chainlet be fed, as its class and the command line say, and no other one of the Chain.

    `otherwise` is the topic if neither names one. Raises ChainsUsageError.
    """
    source: Source | None = getattr(cls, "source", None)
    declared = feed_of(cls)
    topic = wanted.topic or (source.topic if source is not None else otherwise)
    if topic is None:
        raise ChainsUsageError(f"{chainlet_name(cls)} has no source: name a topic with --topic")
    if wanted.style is not None:
        named(wanted.style)
    kept = declared.source if declared is not None else Source(topic)
    # What is delivered twice or once is a matter of groups, and of those who are killed; here there is neither.
    cls.source = Source(topic, format=wanted.style or kept.format, key=kept.key, retries=kept.retries)
    sinks = declared.sinks if declared is not None else ()
    if not sinks:
        sinks = tuple(Sink(name) for name in wanted.sinks or [NO_SINK])
    style = "json" if wanted.lines else wanted.style
    cls.sink = tuple(Sink(sink.topic, format=style or sink.format, key=sink.key) for sink in sinks)
    for other in chain.chainlets:
        if other is not cls and getattr(other, "source", None) is not None:
            other.source = None  # type: ignore[attr-defined] # it is
    feed = feed_of(cls)
    assert feed is not None, "it has a source now"
    return feed


# --- what it fails of


class Failures:
    """Takes the dead letters of a run: each is told, and counted, and goes to another outlet `also` if there is one."""

    def __init__(self, place: Callable[[int, int], str], say: Callable[[str], None]) -> None:
        """Tell of each with `say`; `place` says where an event of a partition and an offset lay."""
        self.count = 0
        self.untaken = 0  # of these, those that were no events
        self.also: Outlet | None = None
        self.unsent: BrokerError | None = None  # what keeps letters from going there
        self._place = place
        self._say = say

    async def ensure(self, spec: TopicSpec) -> None:
        if self.also is not None:
            await self.also.ensure(spec)

    async def partitions(self) -> int:
        return 1 if self.also is None else await self.also.partitions()

    async def record_limit(self) -> int | None:
        return None if self.also is None else await self.also.record_limit()

    async def publish(
        self, value: bytes, *, partition: int, key: bytes | None, headers: Headers
    ) -> "asyncio.Future[int]":
        stored: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        stored.set_result(self.count)
        if self.also is not None:
            try:
                stored = await self.also.publish(value, partition=partition, key=key, headers=headers)
                await stored
            except BrokerError as error:
                # The worker leaves the event to others, and there are none here.
                if not error.retryable and not isinstance(error, RecordTooLargeError):
                    self.unsent = error
                raise
        letter = Letter.of(Record("", partition, 0, 0, key, value, headers))
        self._tell(letter.partition or 0, letter.offset or 0, _reason(letter))
        return stored

    def refuse(self, partition: int, offset: int, reason: str) -> None:
        """Tell of what can't even be taken, and count it."""
        self.untaken += 1
        self._tell(partition, offset, reason)

    def _tell(self, partition: int, offset: int, reason: str) -> None:
        self.count += 1
        self._say(f"{self._place(partition, offset)}: {reason}")


def _reason(letter: Letter) -> str:
    kind = (letter.error or "").rpartition(".")[2]
    message = " ".join((letter.message or "").split())
    if (letter.error or "").startswith("chains_stream."):  # written to be read
        return message.removeprefix(f"{letter.topic}: ") or kind
    return f"{kind}: {message}" if message else kind


# --- the run


class Fed(NamedTuple):
    """What a run reads and writes, once it is open.

    Attributes:
        total: offsets, if that is known.
        unit: what is counted: lines, or records.
        outlets: by topic; dead letters have none of their own.
        letters: where dead letters go besides, if anywhere.
        ends: what fails with what keeps it from going on.
    """

    supply: Supply
    total: int | None
    unit: str
    ready: str
    outlets: Mapping[str, Outlet]
    letters: Outlet | None = None
    ends: Sequence[Awaitable[None]] = ()


class Told(NamedTuple):
    """How a run tells of itself: where an event lay; how to go on from positions; what it gave."""

    place: Callable[[int, int], str]
    go_on: Callable[[Mapping[int, int]], str]
    gave: Callable[[], str]


class Run:
    """One run of a Chainlet on events, until there are no more."""

    def __init__(
        self,
        chain: Chain,
        feed: Feed,
        settings: Settings,
        told: Told,
        open_: Callable[[AsyncExitStack, Failures], Awaitable[Fed]],
        *,
        patience: float,
        bar: bool = False,
    ) -> None:
        """Run what `open_` gives; give up once no event has succeeded for `patience` seconds.

        If no more come, and some have succeeded, those that are left have failed by then, and it ends in order.
        """
        self._chain = chain
        self._feed = feed
        self._settings = settings.model_copy(update={"broker": "memory://"})
        self._told = told
        self._open = open_
        self._patience = patience
        self._bar = bar
        self._progress: Progress | None = None
        self._consumer: SupplyConsumer | None = None
        self.failures = Failures(told.place, self._say)

    def to_the_end(self) -> None:
        """Run it, and exit with a status of 1 if some events failed. Raises StoppedError, ChainsError."""

        async def work(signals: Signals) -> None:
            # What Chainlets print in this process is not what they give.
            with redirect_stdout(sys.stderr):
                try:
                    await serve(self._start, signals, lambda _: None)
                except Exception as error:
                    if not isinstance(error, BrokenPipeError):  # whoever reads has seen enough
                        self._tell_how_far()
                    raise
                if signals.received is not None and not self._is_done():
                    self._tell_how_far()
                    raise StoppedError(signals.received)

        run(work)
        self._sum_up()

    def _is_done(self) -> bool:
        return self._consumer is not None and self._consumer.done.is_set()

    async def _start(self, stack: AsyncExitStack) -> Serving:
        chain, settings, topic = self._chain, self._settings, self._feed.source.topic
        fed = await self._open(stack, self.failures)
        say(fed.ready)
        self._progress = stack.enter_context(Progress(fed.unit, fed.total, bar=self._bar))
        self.failures.also = fed.letters
        if fed.total == 0:
            return Serving("", _nothing)
        consumer = self._consumer = SupplyConsumer(fed.supply)
        outlets = {**fed.outlets, dead_letter_topic(topic): self.failures}
        broker = open_supplied(settings, topic, consumer, outlets)
        stack.push_async_callback(broker.close)
        await broker.start()
        caller = await open_caller(stack, broker, settings)
        host = Host(chain, chain.chainlets, broker, caller, settings)
        stack.push_async_callback(host.drain)
        await host.start()
        return Serving("", lambda: self._ended(host, consumer, fed))

    async def _ended(self, host: Host, consumer: SupplyConsumer, fed: Fed) -> None:
        """Wait until all is done. Raises what keeps it from that."""
        (worker,) = host.feeds
        waiting = [
            asyncio.ensure_future(each)
            for each in (consumer.done.wait(), host.failed(), self._watch(worker, consumer), *fed.ends)
        ]
        try:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for each in done:
                each.result()
            if self._progress is not None and fed.total is not None:
                self._progress.show(fed.total)  # the last offsets may hold no record
        finally:
            await end(*waiting)

    async def _watch(self, worker: EventWorker, consumer: SupplyConsumer) -> None:
        """Show how far it is. Raises ChainsRuntimeError once no event has succeeded for too long, BrokerError."""
        since: float | None = None
        while True:
            await asyncio.sleep(LOOK)
            self._show(consumer)
            if self.failures.unsent is not None:
                raise self.failures.unsent
            reason = worker.held_back
            if reason is None:
                since = None
            elif since is None:
                since = time.monotonic()
                self._say(f"waiting, as no event succeeds: {reason}")
            elif time.monotonic() - since >= self._patience and not (consumer.exhausted and worker.breaker.end()):
                raise ChainsRuntimeError(f"no event has succeeded for {self._patience:g} s: {reason}")

    def _show(self, consumer: SupplyConsumer) -> None:
        if self._progress is not None:
            self._progress.show(consumer.passed)

    def _say(self, text: str) -> None:
        if self._progress is None:
            say(text)
        else:
            self._progress.say(text)

    def _tell_how_far(self) -> None:
        if self._consumer is not None:
            say(self._told.go_on(self._consumer.positions))

    def _sum_up(self) -> None:
        given = self._consumer.given if self._consumer is not None else 0
        failed = self.failures.count
        done = given + self.failures.untaken - failed
        say(f"{done:,} event{'s' if done != 1 else ''} done, {failed:,} failed; {self._told.gave()}")
        if failed:
            raise click.exceptions.Exit(FAILED)


async def _nothing() -> None:
    """Nothing is to be done."""
