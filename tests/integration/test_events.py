"""Chainlets fed from ordinary topics: order, concurrency, retries, dead letters, and what a host that ends leaves."""

import asyncio
import json
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any, ClassVar
from uuid import uuid4

import msgspec
import pytest

import chains_stream as chains
from chains_stream import events, policy
from chains_stream.calls import remote_target
from chains_stream.chainlet import signature
from chains_stream.checks import check_chainlet
from chains_stream.errors import ChainsUsageError, OverloadedError
from chains_stream.letters import EXCEPTION_MESSAGE, ORIGINAL_CONSUMER_GROUP, dead_letter_topic
from chains_stream.stub import Stub
from tests.sample import Seen
from tests.streams import PARTITIONS, Scored, Stream, Ticket, values

PLACES = 8
WIDE = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=PLACES))


@pytest.fixture(autouse=True)
def nothing_seen() -> Iterator[None]:
    Seen.reset()
    yield
    Seen.reset()


@pytest.fixture(params=["memory", pytest.param("kafka", marks=pytest.mark.kafka)])
def url(request: pytest.FixtureRequest) -> str:
    return "memory://" if request.param == "memory" else str(request.getfixturevalue("kafka_url"))


@pytest.fixture(params=["at_least_once", "exactly_once"])
async def stream(url: str, request: pytest.FixtureRequest) -> AsyncIterator[Stream]:
    async with AsyncExitStack() as stack:
        made = Stream(url, stack, request.param)
        await made.start()
        yield made


class Score(chains.ChainletBase):
    """Scores a ticket, or does what it says."""

    remote_config = WIDE

    async def run_remote(self, ticket: Ticket) -> Scored | None:
        Seen.note(ticket.id)
        match ticket.act:
            case "skip":
                return None
            case "fail":
                raise ValueError(f"{ticket.id} is bad")
            case "fail once" if Seen.counts[ticket.id] == 1:
                raise ValueError("once")
            case "hold":
                await Seen.until("go")
        return Scored(ticket.id, ticket.number / 2)


async def test_one_record_gives_none_or_one(stream: Stream) -> None:
    await stream.send(Ticket("a", 3), Ticket("b", act="skip"), Ticket("c", 5))
    await stream.host(stream.chainlet(Score))
    found = await stream.read(stream.scored, 2)
    assert sorted((record.key, json.loads(record.value)["score"]) for record in found) == [(b"a", 1.5), (b"c", 2.5)]
    assert all(record.partition == events.partition_of(record.key or b"", PARTITIONS) for record in found)


class Split(chains.ChainletBase):
    """Gives as many as the number says, to one sink and the other; asks for all that there is to know of a record."""

    remote_config = WIDE

    async def run_remote(self, event: chains.Event[Ticket]) -> AsyncIterator[chains.Output[Scored]]:
        assert type(self).__dict__["source"].topic == event.topic
        for number in range(event.value.number):
            yield chains.Output(Scored(event.value.id, number))
        headers = event.headers | {"at": f"{event.partition}/{event.offset}".encode()}
        topic = type(self).__dict__["sink"][1].topic
        yield chains.Output(Scored(f"{event.key!r}", event.timestamp_ms), headers=headers, topic=topic)


async def test_one_record_gives_many_to_several_sinks(stream: Stream) -> None:
    await stream.send(Ticket("a", 3), partition=2)
    await stream.host(stream.chainlet(Split))
    assert values(await stream.read(stream.scored, 3)) == [{"id": "a", "score": float(n)} for n in range(3)]
    (other,) = await stream.read(stream.urgent, 1)
    said = json.loads(other.value)
    assert (said["id"], other.key) == ("b'a'", b"b'a'"), "the key is the field that this sink names"
    assert dict(other.headers)["at"] == b"2/0"
    assert said["score"] > 1.7e12


class Slow(chains.ChainletBase):
    """Takes a while, at random; notes how many run at once, and whether two of one key do."""

    remote_config = WIDE
    running: ClassVar[set[str]] = set()
    most: ClassVar[int] = 0

    async def run_remote(self, ticket: Ticket) -> Scored:
        assert ticket.id not in self.running, "one of a key at a time"
        self.running.add(ticket.id)
        Slow.most = max(Slow.most, len(self.running))
        await asyncio.sleep(random.random() / 200)
        self.running.discard(ticket.id)
        return Scored(ticket.id, ticket.number)


async def test_events_of_a_key_keep_their_order_and_those_of_others_run_beside(stream: Stream) -> None:
    sent = [Ticket(f"key-{number % 12}", number) for number in range(600)]
    await stream.send(*sent)
    Slow.most = 0
    await stream.host(stream.chainlet(Slow))
    by_key = defaultdict(list)
    for said in values(await stream.read(stream.scored, len(sent))):
        by_key[said["id"]].append(said["score"])
    assert by_key == {f"key-{key}": [float(n) for n in range(key, 600, 12)] for key in range(12)}
    assert Slow.most == PLACES


async def test_order_may_be_kept_by_a_field(stream: Stream) -> None:
    sent = [Ticket(f"key-{number % 3}", number) for number in range(60)]
    for number, ticket in enumerate(sent):
        await stream.send(ticket, key=b"%d" % number, partition=0)
    chainlet: Any = stream.chainlet(Slow, key="id")
    chainlet.sink = chains.Sink(stream.scored, key="id")
    await stream.host(chainlet)
    by_key = defaultdict(list)
    for said in values(await stream.read(stream.scored, len(sent))):
        by_key[said["id"]].append(said["score"])
    assert by_key == {f"key-{key}": [float(n) for n in range(key, 60, 3)] for key in range(3)}


async def test_a_failing_event_is_tried_again_and_then_put_aside_while_others_go_on(stream: Stream) -> None:
    await stream.send(Ticket("bad", act="fail"), Ticket("once", act="fail once"), b"{", partition=1)
    await stream.send(*(Ticket(f"{number}") for number in range(40)), partition=1)
    chainlet = stream.chainlet(Score)
    await stream.host(chainlet)
    assert len(await stream.read(stream.scored, 41)) == 41
    letters = await stream.read(dead_letter_topic(stream.tickets), 2)
    by_value = {record.value: dict(record.headers) for record in letters}
    said = {value: headers[EXCEPTION_MESSAGE] for value, headers in by_value.items()}
    assert said[b"{"] == f"{stream.tickets}: the data is malformed: Input data was truncated".encode()
    bad = msgspec.json.encode(Ticket("bad", act="fail"))
    assert said[bad] == b"bad is bad"
    assert by_value[bad][ORIGINAL_CONSUMER_GROUP] == f"{stream.settings.namespace}.Score.Score.events".encode()
    assert (Seen.counts["bad"], Seen.counts["once"]) == (3, 2)


async def test_an_event_that_waits_does_not_hold_up_those_behind_it_nor_is_it_lost(stream: Stream) -> None:
    await stream.send(Ticket("held", act="hold"), *(Ticket(f"{number}") for number in range(20)), partition=0)
    chainlet = stream.chainlet(Score)
    first = await stream.host(chainlet)
    assert len(await stream.read(stream.scored, 20)) == 20
    await first.drain()
    assert Seen.counts["held"] == 1
    Seen.note("go")
    await stream.host(chainlet)
    found = values(await stream.read(stream.scored, 21))
    assert len(found) == 21, "and what was done is not run again"
    assert [said["id"] for said in found].count("held") == 1
    assert [Seen.counts[f"{number}"] for number in range(20)] == [1] * 20


async def test_at_most_once_runs_nothing_again(url: str) -> None:
    async with AsyncExitStack() as stack:
        stream = Stream(url, stack, "at_most_once")
        await stream.start()
        await stream.send(Ticket("held", act="hold"), Ticket("bad", act="fail"), Ticket("a", 3), partition=0)
        chainlet = stream.chainlet(Score)
        first = await stream.host(chainlet)
        assert values(await stream.read(stream.scored, 1)) == [{"id": "a", "score": 1.5}]
        (letter,) = await stream.read(dead_letter_topic(stream.tickets), 1)
        assert letter.key == b"bad"
        await Seen.until("held")
        await first.drain()
        Seen.note("go")
        await stream.host(chainlet)
        await stream.send(Ticket("b", 5))
        found = values(await stream.read(stream.scored, 2))
        assert sorted(said["id"] for said in found) == ["a", "b"]
        assert Seen.counts["held"] == 1


async def test_a_group_begins_where_its_source_says(url: str) -> None:
    async with AsyncExitStack() as stack:
        stream = Stream(url, stack, "at_least_once")
        await stream.start()
        await stream.send(Ticket("old"))
        await stream.host(stream.chainlet(Score, start="latest"))
        await stream.send(Ticket("new"))
        assert [said["id"] for said in values(await stream.read(stream.scored, 1))] == ["new"]


class Below(chains.ChainletBase):
    """Is away until a test says so."""

    remote_config = WIDE

    async def run_remote(self, ticket: Ticket) -> float:
        if ticket.act == "poison":
            Seen.note("poison")
            raise OverloadedError("always too much", retry_after=0.01)
        if not Seen.counts["back"]:
            Seen.note("away")
            raise OverloadedError("not now", retry_after=0.01)
        return ticket.number


class Calling(chains.ChainletBase):
    """Has another one score."""

    remote_config = WIDE

    def __init__(self, below: Below = chains.depends(Below)) -> None:
        self._below = below

    async def run_remote(self, ticket: Ticket) -> Scored:
        return Scored(ticket.id, await self._below.run_remote(ticket))


async def test_while_what_it_depends_on_is_away_nothing_is_put_aside(stream: Stream) -> None:
    await stream.send(*(Ticket(f"{number}", number) for number in range(50)))
    await stream.host(stream.chainlet(Calling, retries=2))
    await Seen.until("away", times=12)
    before = await stream.broker.end_offset(dead_letter_topic(stream.tickets), 0)
    Seen.note("back")
    found = values(await stream.read(stream.scored, 50))
    assert sorted(said["score"] for said in found) == [float(number) for number in range(50)]
    assert before == await stream.broker.end_offset(dead_letter_topic(stream.tickets), 0) == 0


async def test_one_that_alone_fails_so_is_put_aside(stream: Stream) -> None:
    Seen.note("back")
    await stream.send(Ticket("p", act="poison"))
    await stream.host(stream.chainlet(Calling, retries=2))
    await Seen.until("poison", times=2)  # its first try has failed: what begins now shows that it is to blame
    await stream.send(*(Ticket(f"{number}", number) for number in range(30)))
    assert len(await stream.read(stream.scored, 30)) == 30
    (letter,) = await stream.read(dead_letter_topic(stream.tickets), 1)
    assert dict(letter.headers)[EXCEPTION_MESSAGE] == b"always too much"


class Fragile(chains.ChainletBase):
    """Runs one at a time; needs what is away until a test says so, but for tickets that say otherwise."""

    running: ClassVar[int] = 0

    async def run_remote(self, ticket: Ticket) -> Scored:
        Seen.note(ticket.id)
        assert Fragile.running == 0, "one at a time"
        Fragile.running += 1
        try:
            await asyncio.sleep(0)
            await self._act(ticket)
        finally:
            Fragile.running -= 1
        return Scored(ticket.id, ticket.number)

    async def _act(self, ticket: Ticket) -> None:
        match ticket.act:
            case "away":
                raise ConnectionError("nobody there")
            case "away, then bad" if Seen.counts[ticket.id] < 4:
                raise ConnectionError("nobody there")
            case "away, then bad":
                raise ValueError("it was the ticket")
            case "away, then back" if not Seen.counts["back"]:
                await Seen.until("beside")
                raise ConnectionError("nobody there")
            case "once" if Seen.counts[ticket.id] == 1:
                raise ValueError("once")
            case "cancelled" if Seen.counts[ticket.id] == 1:
                raise asyncio.CancelledError


async def test_one_that_fails_while_there_are_no_others_holds_up_nobody_who_comes_later(stream: Stream) -> None:
    await stream.host(stream.chainlet(Fragile, retries=2))
    await stream.send(Ticket("alone", act="away"))
    await Seen.until("alone", times=3)
    await stream.send(*(Ticket(f"{number}") for number in range(20)))
    assert len(await stream.read(stream.scored, 20)) == 20
    (letter,) = await stream.read(dead_letter_topic(stream.tickets), 1)
    assert letter.key == b"alone"


async def test_after_the_last_one_that_waited_was_put_aside_others_are_taken(stream: Stream) -> None:
    await stream.host(stream.chainlet(Fragile, retries=2))
    for number in range(2):
        await stream.send(Ticket(f"alone {number}", act="away, then bad"))
        await stream.read(dead_letter_topic(stream.tickets), number + 1)
    await stream.send(Ticket("next"))
    assert len(await stream.read(stream.scored, 1)) == 1


class Wide(Fragile):
    """Runs as many at once as there are places."""

    remote_config = WIDE

    async def run_remote(self, ticket: Ticket) -> Scored:
        Seen.note(ticket.id)
        await self._act(ticket)
        return Scored(ticket.id, ticket.number)


async def test_what_succeeded_before_the_first_failure_blames_nobody(stream: Stream) -> None:
    await stream.host(stream.chainlet(Wide, retries=2))
    await stream.send(Ticket("held", act="away, then back"))
    await Seen.until("held")
    await stream.send(Ticket("beside"))
    await Seen.until("held", times=3)
    Seen.note("back")
    assert len(await stream.read(stream.scored, 2)) == 2
    assert await stream.broker.end_offset(dead_letter_topic(stream.tickets), 0) == 0


async def test_those_that_were_put_off_come_back_to_places_of_their_own(stream: Stream) -> None:
    await stream.send(*(Ticket(f"{number}", act="once") for number in range(40)))
    await stream.host(stream.chainlet(Fragile))
    assert len(await stream.read(stream.scored, 40)) == 40
    assert {Seen.counts[f"{number}"] for number in range(40)} == {2}


async def test_one_that_ends_in_a_cancellation_of_its_own_has_failed(stream: Stream) -> None:
    await stream.send(Ticket("a", act="cancelled"), Ticket("b"), key=b"k")
    await stream.host(stream.chainlet(Fragile))
    assert [said["id"] for said in values(await stream.read(stream.scored, 2))] == ["a", "b"]


async def test_those_behind_one_that_is_left_to_others_are_left_too(stream: Stream) -> None:
    stream.settings = stream.settings.model_copy(update={"grace_period": 0.1})
    await stream.send(Ticket("held", act="hold"), Ticket("behind"), Ticket("last"), key=b"k")
    chainlet = stream.chainlet(Score)
    first = await stream.host(chainlet)
    await Seen.until("held")
    await first.drain()
    Seen.note("go")
    await stream.host(chainlet)
    assert [said["id"] for said in values(await stream.read(stream.scored, 3))] == ["held", "behind", "last"]


class Deleted(chains.ChainletBase):
    """Passes on which keys were deleted."""

    remote_config = WIDE

    async def run_remote(self, event: chains.Event[Ticket | None]) -> Scored | None:
        return Scored((event.key or b"").decode(), 0) if event.value is None else None


async def test_a_record_without_a_value_is_none_where_the_type_allows_it(stream: Stream) -> None:
    await stream.send(Ticket("kept"), partition=0)
    await stream.send(b"", key=b"deleted")
    await stream.host(stream.chainlet(Deleted))
    assert [said["id"] for said in values(await stream.read(stream.scored, 1))] == ["deleted"]
    assert await stream.broker.end_offset(dead_letter_topic(stream.tickets), 0) == 0


class Large(chains.ChainletBase):
    """Gives as many characters as the number says."""

    remote_config = WIDE

    async def run_remote(self, ticket: Ticket) -> Scored:
        return Scored(ticket.id + "x" * ticket.number, 0)


async def test_what_is_too_large_to_be_written_is_put_aside(stream: Stream) -> None:
    await stream.host(stream.chainlet(Large))
    await stream.send(Ticket("large", stream.settings.max_record_bytes), Ticket("a"), partition=0)
    assert len(await stream.read(stream.scored, 1)) == 1
    (letter,) = await stream.read(dead_letter_topic(stream.tickets), 1)
    assert letter.key == b"large"


class Traced(chains.ChainletBase):
    """Gives what it knows of the request that its event is."""

    async def run_remote(self, ticket: Ticket) -> Scored:
        served = policy.current.get()
        assert served is not None
        trace, state = ((each or b"").decode() for each in (served.traceparent, served.tracestate))
        Seen.note(f"{ticket.id} {chains.current_request().id} {trace} {state}")
        return Scored(ticket.id, 1.0)


async def test_an_event_brings_its_trace_along() -> None:
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    async with AsyncExitStack() as stack:
        stream = Stream("memory://", stack, "at_least_once")
        await stream.start()
        await stream.host(stream.chainlet(Traced))
        headers = (("other", b"x"), ("traceparent", trace.encode()), ("tracestate", b"k=v"))
        await (await stream.broker.publish(stream.tickets, b'{"id":"a"}', partition=0, headers=headers))
        await (await stream.broker.publish(stream.tickets, b'{"id":"b"}', partition=0))
        await stream.read(stream.scored, 2)
    assert set(Seen.counts) == {f"a {stream.tickets}/0/0 {trace} k=v", f"b {stream.tickets}/0/1  "}


class Together(chains.ChainletBase):
    """Scores many tickets at once; notes how many."""

    remote_config = WIDE
    batch = chains.Batch(max_size=4, max_wait_ms=500)

    async def run_remote(self, tickets: list[Ticket]) -> list[Scored | None]:
        Seen.note(f"batch of {len(tickets)}")
        if any(ticket.act == "fail" for ticket in tickets):
            raise ValueError("a bad one is among them")
        return [None if ticket.act == "skip" else Scored(ticket.id, ticket.number) for ticket in tickets]


async def test_events_are_joined_for_one_that_takes_many_at_once(stream: Stream) -> None:
    tickets = [Ticket(f"{number}", number) for number in range(12)]
    await stream.send(*tickets, Ticket("bad", act="fail"), Ticket("none", act="skip"))
    await stream.host(stream.chainlet(Together))
    found = values(await stream.read(stream.scored, 12))
    assert sorted(said["score"] for said in found) == [float(number) for number in range(12)]
    assert Seen.counts["batch of 4"] >= 2
    (letter,) = await stream.read(dead_letter_topic(stream.tickets), 1)
    assert letter.key == b"bad"


async def test_the_same_chainlet_serves_requests(url: str) -> None:
    name = f"tickets-{uuid4().hex[:8]}"
    fed = type(
        "Score", (Score,), {"__module__": __name__, "source": chains.Source(name), "sink": chains.Sink(f"{name}-out")}
    )
    chain: Any
    async with chains.run_chain(fed, broker=url, namespace=f"t{uuid4().hex[:8]}", partitions=2) as chain:
        assert await chain.run_remote(Ticket("a", 4)) == Scored("a", 2)


class Busy(chains.ChainletBase):
    """Runs one at a time, and takes a while."""

    running: ClassVar[int] = 0

    async def run_remote(self, ticket: Ticket) -> Scored:
        assert Busy.running == 0, "one at a time"
        Busy.running += 1
        await asyncio.sleep(0.01)
        Busy.running -= 1
        return Scored(ticket.id, ticket.number)


async def test_requests_and_events_share_the_places_of_a_chainlet() -> None:
    async with AsyncExitStack() as stack:
        stream = Stream("memory://", stack, "at_least_once")
        await stream.start()
        fed: Any = stream.chainlet(Busy)
        await stream.send(*(Ticket(f"{number}") for number in range(200)))
        host = await stream.host(fed)
        caller = host._caller
        target = await remote_target(host._chain, fed, caller, stream.settings)
        stub = Stub(signature(fed), target, chains.RPCOptions(), 60)
        for number in range(8):
            await stub.run_remote(Ticket(f"asked {number}"))
        ends = [await stream.broker.end_offset(stream.scored, number) for number in range(PARTITIONS)]
        assert sum(ends) < 100, "it was not their end that was waited for"
        assert len(await stream.read(stream.scored, 200)) == 200
        assert await stream.broker.end_offset(dead_letter_topic(stream.tickets), 0) == 0


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"source": "tickets"}, r"Score\.source is a `str`; write `source = Source\(…\)`"),
        ({"source": chains.Source("t")}, r"Score\.run_remote gives what goes nowhere: name a topic with `sink = Sink"),
        ({"source": chains.Source("t"), "sink": "u"}, r"Score\.sink holds a `str`"),
        (
            {"source": chains.Source("t"), "sink": [chains.Sink("u"), chains.Sink("u")]},
            r"Score\.sink names a topic twice",
        ),
        (
            {"source": chains.Source("t", format="xml"), "sink": chains.Sink("u")},
            r"Score, topic t: there is no format `xml`",
        ),
        (
            {"source": chains.Source("t"), "sink": chains.Sink("u", key="nmae")},
            r"Score, topic u: the key `nmae` is no field of",
        ),
    ],
)
async def test_wrong_declarations_are_told(more: dict[str, Any], line: str) -> None:
    fed = type("Score", (Score,), {"__module__": __name__, **more})
    with pytest.raises(ChainsUsageError, match=line):
        async with chains.run_chain(fed):
            pass
    assert [problem.kind for problem in check_chainlet(fed)] == ["EVENTS"]


@pytest.mark.parametrize("topic", ["", "a b", "ä", "x" * 250, ".."])
def test_wrong_names_of_topics_are_told(topic: str) -> None:
    with pytest.raises(ChainsUsageError, match="1 to 245 letters"):
        chains.Source(topic)
    with pytest.raises(ChainsUsageError, match="1 to 249 letters"):
        chains.Sink(topic)


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ({"delivery": "exactly-once"}, "delivery='exactly-once'.*: use at_least_once, exactly_once or at_most_once"),
        ({"start": "lates"}, "start='lates'.*: use 'earliest', 'latest' or a datetime"),
        ({"retries": 0}, "there is at least one attempt"),
    ],
)
def test_wrong_options_of_a_source_are_told(option: dict[str, Any], line: str) -> None:
    with pytest.raises(ChainsUsageError, match=line):
        chains.Source("t", **option)
