"""Accounts for every request, from what its client saw and from what lies in the topics."""

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import msgspec
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient

from chains_stream.messages import Cancelled, Chunk, Done, Failed, Frame, Request, decode_frames
from tests.chaos import driver
from tests.chaos.driver import KINDS, Outcome
from tests.chaos.faults import FEW, Fault, Struck
from tests.chaos.world import ENTRYPOINTS, World

QUIET_SECONDS = 60.0  # after the last client has its outcome, until the last record has its own

NOTICEABLE = 2.0  # seconds of delay: a busy machine makes one by itself


@dataclass
class Asked:
    """A record of a request topic: which of the client's requests it is of, and where it lies."""

    request: str
    chainlet: str
    place: str
    frames: list[tuple[int, Frame]] = field(default_factory=list)  # with their offsets
    dead: bool = False  # in the dead letters

    def ending(self) -> Frame | None:
        """Give the frame that ends the call for who reads all of them: those of an overtaken attempt don't count."""
        attempt = 0
        for _, frame in self.frames:
            if frame.attempt < attempt:
                continue
            attempt = frame.attempt
            if isinstance(frame, Done | Failed | Cancelled):
                return frame
        return None

    def whole(self) -> bool:
        """Whether the log holds a good end, and all that belongs before it."""
        ending = self.ending()
        sequences = {frame.sequence for _, frame in self.frames if isinstance(frame, Chunk)}
        return isinstance(ending, Done) and sequences >= set(range(ending.chunks))


class Topics:
    """What a namespace's topics hold about requests, read on from where the last reading ended."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._positions: dict[TopicPartition, int] = {}
        self.asked: dict[bytes, Asked] = {}
        self._early: defaultdict[bytes, list[tuple[int, Frame]]] = defaultdict(list)
        self._dead: set[bytes] = set()  # partitions are read in any order: a letter may come before its request

    async def read(self) -> None:
        """Read all that is there."""
        places = await self._places()
        consumer = AIOKafkaConsumer(bootstrap_servers=self._world.servers, enable_auto_commit=False)
        await consumer.start()
        try:
            consumer.assign(places)
            ends = await consumer.end_offsets(places)
            for place in places:
                consumer.seek(place, self._positions.setdefault(place, 0))
            while any(self._positions[place] < end for place, end in ends.items()):
                for place, records in (await consumer.getmany(timeout_ms=1000)).items():
                    for record in records:
                        self.take(record)
                    self._positions[place] = records[-1].offset + 1
        finally:
            await consumer.stop()
        self.merge()

    def merge(self) -> None:
        """Give each request what was read about it, now that all is."""
        for asked_id in self._early.keys() & self.asked.keys():
            self.asked[asked_id].frames += self._early.pop(asked_id)
        for asked_id in self._dead & self.asked.keys():
            self.asked[asked_id].dead = True

    async def _places(self) -> list[TopicPartition]:
        """Find the partitions of all topics of requests, dead letters and replies."""
        admin = AIOKafkaAdminClient(bootstrap_servers=self._world.servers)
        await admin.start()
        try:
            ours = [name for name in await admin.list_topics() if name.startswith(f"{self._world.namespace}.")]
            wanted = [name for name in ours if ".run_remote." in name or name.endswith(".replies")]
            return [
                TopicPartition(topic["topic"], partition["partition"])
                for topic in await admin.describe_topics(wanted)
                for partition in topic["partitions"]
            ]
        finally:
            await admin.close()

    def forget(self) -> None:
        """Drop what is accounted for."""
        self.asked.clear()
        self._early.clear()
        self._dead.clear()

    def take(self, record: ConsumerRecord) -> None:
        """Note what a record says."""
        if record.topic.endswith(".replies"):
            for frame in decode_frames(record.value):
                self._early[frame.correlation_id].append((record.offset, frame))
            return
        correlation_id = Request.from_headers(record.headers).correlation_id
        if record.topic.endswith(".dlq"):
            self._dead.add(correlation_id)
            return
        place = f"{record.topic}/{record.partition}/{record.offset}"
        request = msgspec.msgpack.decode(record.value)["request"]
        self.asked[correlation_id] = Asked(request, record.topic.split(".")[2], place)


@dataclass
class Account:
    """What one fault did to its requests; the moments are Unix time."""

    fault: Fault
    requests: Sequence[driver.Request]
    struck: Struck = field(default_factory=lambda: Struck(time.time(), time.time()))
    mended: float = field(default_factory=time.time)
    open: list[Asked] = field(default_factory=list)  # records that nobody answered, or not as their client says
    runs: list[tuple[int, float]] = field(default_factory=list)  # the process and the moment of each run of a Chainlet
    run_again: int = 0  # runs beyond the first of a request in a Chainlet

    @property
    def broken(self) -> float:
        return self.struck.at

    def amiss(self) -> Iterator[str]:
        """Say what shows that the fault was none, or that it hit more requests than it may."""
        if missing := self.fault.effect(self):
            yield f"the fault had no effect: {missing}"
        for kind in KINDS:
            failed = sum(each.failure is not None for each in self.requests if each.kind == kind)
            met = sum(each.kind == kind and self._met(each) for each in self.requests)
            if failed > max(FEW, self.fault.share * met):
                yield f"{failed} {kind} requests failed, of {met} that met the fault"

    def untruthful(self) -> list[driver.Request]:
        """Give the requests that failed in a way for which this fault is no reason."""
        return [each for each in self.requests if each.failure and (each.kind, each.failure) not in self.fault.truthful]

    def delays(self) -> list[float]:
        """Give the delays, in order, of the answered requests that met the fault."""
        return sorted(each.delay for each in self.requests if each.outcome is Outcome.ANSWERED and self._met(each))

    def _met(self, each: driver.Request) -> bool:
        return each.ended > self.broken and each.sent < self.mended

    def first_answer(self) -> float:
        """Give the seconds from the fault until something was answered that was sent after it."""
        return min(
            each.ended - self.broken
            for each in self.requests
            if each.sent > self.broken and each.outcome is Outcome.ANSWERED
        )

    def settled(self) -> float:
        """Give the seconds from the fault until the last request ended that it slowed or failed."""
        return max(
            (each.ended - self.broken for each in self.requests if each.failure or each.delay > NOTICEABLE),
            default=0.0,
        )


async def account(world: World, topics: Topics, found: Account) -> None:
    """Fill in what the topics tell, once every record that was asked has its end."""
    end = time.monotonic() + QUIET_SECONDS
    while True:
        await topics.read()
        found.open = [asked for asked in topics.asked.values() if asked.ending() is None and not asked.dead]
        if not found.open or time.monotonic() > end:
            break
        await asyncio.sleep(0.2)
    entered = defaultdict(list)
    for asked in topics.asked.values():
        if asked.chainlet in ENTRYPOINTS.values():
            entered[asked.request].append(asked)
    for each in found.requests:
        if each.outcome is Outcome.ANSWERED and [asked.whole() for asked in entered[each.id]] != [True]:
            found.open += entered[each.id] or [Asked(each.id, ENTRYPOINTS[each.kind], "no topic")]
    names = {each.id for each in found.requests}
    notes = [note for note in world.notes() if note[0] in names]
    found.runs = [(int(process), float(moment)) for _, _, process, moment in notes]
    runs = Counter((name, chainlet) for name, chainlet, *_ in notes)
    found.run_again = runs.total() - len(runs)


def complaints(world: World, topics: Topics, found: Account, limit: int = 5) -> Iterator[str]:
    """Tell the whole story of requests that are not accounted for."""
    by_name = {each.id: each for each in found.requests}
    names = [each.id for each in found.untruthful()] + [asked.request for asked in found.open]
    for name in list(dict.fromkeys(names))[:limit]:
        yield "\n".join(_story(world, topics, found, by_name.get(name), name))
    if len(names) > limit:
        yield f"... and {len(names) - limit} more: {', '.join(names[limit:])[:2000]}"


def _story(world: World, topics: Topics, found: Account, request: driver.Request | None, name: str) -> Iterator[str]:
    yield f"{name} (fault at 0, mended at {found.mended - found.broken:.3f})"
    if request is not None:
        yield f"  client: sent at {request.sent - found.broken:.3f}, {dict(request.arguments)}"
        yield (
            f"  client: {request.failure or 'answered'} at {request.ended - found.broken:.3f}"
            f" after {request.chunks} chunks: {request.detail}"
        )
    for correlation_id, asked in topics.asked.items():
        if asked.request != name:
            continue
        yield f"  asked: {correlation_id.hex()} in {asked.place}{', dead letter' if asked.dead else ''}"
        for (attempt, kind), same in groupby(asked.frames, key=lambda each: (each[1].attempt, type(each[1]))):
            (first, began), *others = same
            last, ended = others[-1] if others else (first, began)
            text = f"    attempt {attempt}, offset {first}: {kind.__name__}"
            if isinstance(began, Chunk) and isinstance(ended, Chunk):
                yield f"{text} {began.sequence}, and {len(others)} up to {ended.sequence} at offset {last}"
            else:
                yield f"{text} {began.error if isinstance(began, Failed) else ''}"
    for of, chainlet, process, moment in world.notes():
        if of == name:
            yield f"  run: {chainlet} in process {process} at {float(moment) - found.broken:.3f}"
