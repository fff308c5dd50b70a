"""Events that fail: whose fault it is, what is put aside, and what a worker that ends does with them."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any, ClassVar

import msgspec
import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from prometheus_client import REGISTRY

import chains_stream as chains
from chains_stream.breaker import MOST_FAILING
from chains_stream.broker import Committed
from chains_stream.errors import BrokerAuthorizationError, BrokerError
from chains_stream.letters import EXCEPTION_MESSAGE, dead_letter_topic
from chains_stream.offsets import Note
from tests.sample import Seen
from tests.streams import PARTITIONS, Scored, Stream, Ticket, values

WIDE = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=8))


@pytest.fixture(autouse=True)
def nothing_seen() -> Iterator[None]:
    Seen.reset()
    yield
    Seen.reset()


@pytest.fixture(params=["at_least_once", "exactly_once"])
async def stream(request: pytest.FixtureRequest) -> AsyncIterator[Stream]:
    async with AsyncExitStack() as stack:
        made = Stream("memory://", stack, request.param)
        await made.start()
        yield made


async def letters(stream: Stream) -> int:
    return await stream.broker.end_offset(dead_letter_topic(stream.tickets), 0)


class DriverError(Exception):
    """What a client library makes of whatever keeps it from its server."""


class Needy(chains.ChainletBase):
    """Needs a server that is away until a test says so; the ticket says what its client makes of that."""

    remote_config = WIDE

    async def run_remote(self, ticket: Ticket) -> Scored:
        Seen.note(ticket.id)
        if not Seen.counts["back"] and ticket.act:
            Seen.note("away")
            self._fail(ticket.act)
        if ticket.number < 0:
            raise ValueError("it is the ticket")
        return Scored(ticket.id, ticket.number)

    def _fail(self, how: str) -> None:
        match how:
            case "cause":
                try:
                    raise ConnectionRefusedError("nobody there")
                except OSError as error:
                    raise DriverError("can't connect") from error
            case "group":
                raise ExceptionGroup("several", [ValueError("of no use"), ConnectionRefusedError("nobody there")])
            case "alone":
                raise DriverError("can't connect")


@pytest.mark.parametrize("how", ["cause", "group"])
async def test_what_came_of_a_lost_connection_puts_nothing_aside(stream: Stream, how: str) -> None:
    await stream.send(*(Ticket(f"{number}", number, how) for number in range(50)))
    await stream.host(stream.chainlet(Needy, retries=1))
    await Seen.until("away", times=20)
    assert _paused() == 1
    Seen.note("back")
    assert len(await stream.read(stream.scored, 50)) == 50
    assert await letters(stream) == 0
    assert _paused() == 0


def _paused() -> float | None:
    return REGISTRY.get_sample_value("chains_events_paused", {"chainlet": "Needy.events"})


async def test_few_are_put_aside_while_all_fail_whatever_the_error_is(stream: Stream) -> None:
    await stream.send(*(Ticket(f"{number}", number, "alone") for number in range(300)))
    await stream.host(stream.chainlet(Needy, retries=1))
    await Seen.until("away", times=MOST_FAILING + 16)  # tried, and tried again
    Seen.note("back")
    found = await stream.read(stream.scored, 300 - await letters(stream))
    assert len(found) >= 300 - MOST_FAILING - 8
    assert len(found) + await letters(stream) == 300


async def test_bad_ones_in_a_row_hold_up_nobody_for_ever(stream: Stream) -> None:
    bad = MOST_FAILING + 3
    await stream.send(*(Ticket(f"{number}", -1) for number in range(bad)), Ticket("good"), key=b"k")
    await stream.host(stream.chainlet(Needy, retries=1))
    assert [said["id"] for said in values(await stream.read(stream.scored, 1))] == ["good"]
    assert await letters(stream) == bad


async def test_those_that_waited_for_one_that_succeeds_go_on_at_once(stream: Stream) -> None:
    await stream.send(*(Ticket(f"{number}", number, "cause") for number in range(200)))
    await stream.host(stream.chainlet(Needy, retries=1))
    await Seen.until("away", times=MOST_FAILING + 4)
    Seen.note("back")
    async with asyncio.timeout(20):  # while each of them, by itself, would wait for half a minute
        await stream.read(stream.scored, 200)


async def test_a_worker_that_ends_does_not_wait_for_those_that_wait(stream: Stream) -> None:
    stream.settings = stream.settings.model_copy(update={"grace_period": 60})
    await stream.send(*(Ticket(f"{number}", number, "cause") for number in range(10)), key=b"k")
    chainlet = stream.chainlet(Needy, retries=1)
    host = await stream.host(chainlet)
    await Seen.until("away", times=5)
    async with asyncio.timeout(20):
        await host.drain()
    Seen.note("back")
    await stream.host(chainlet)
    found = values(await stream.read(stream.scored, 10))
    assert [said["id"] for said in found] == [f"{number}" for number in range(10)]
    assert await letters(stream) == 0


class Copy(chains.ChainletBase):
    """Gives the ticket's id, with as many characters more as its number says."""

    remote_config = WIDE

    async def run_remote(self, ticket: Ticket) -> Scored:
        return Scored(ticket.id + "x" * ticket.number, 0)


class Burst(chains.ChainletBase):
    """Gives 30 at once."""

    remote_config = WIDE

    async def run_remote(self, ticket: Ticket) -> AsyncIterator[Scored]:
        for number in range(30):
            yield Scored(ticket.id + "x" * ticket.number, number)


@pytest.mark.kafka
@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
async def test_what_a_topic_takes_no_record_of_is_put_aside(kafka_url: str, delivery: str) -> None:
    async with AsyncExitStack() as stack:
        stream = Stream(kafka_url, stack, delivery)
        await _narrow(kafka_url, stream.scored)
        await stream.start()
        sizes = [0, 5_000, 0, 0, 9_000, 0]
        await stream.send(*(Ticket(f"{n}", size) for n, size in enumerate(sizes)), partition=0)
        await stream.host(stream.chainlet(Copy))
        assert sorted(said["id"] for said in values(await stream.read(stream.scored, 4))) == ["0", "2", "3", "5"]
        found = await stream.read(dead_letter_topic(stream.tickets), 2)
        assert {record.key for record in found} == {b"1", b"4"}
        for record in found:
            assert b"takes no record of this size" in (dict(record.headers)[EXCEPTION_MESSAGE] or b"")
        await stream.send(Ticket("6"), partition=0)
        assert len(await stream.read(stream.scored, 5)) == 5


@pytest.mark.kafka
async def test_what_fits_is_not_put_aside_with_what_it_goes_out_with(kafka_url: str) -> None:
    async with AsyncExitStack() as stack:
        stream = Stream(kafka_url, stack, "at_least_once")
        await _narrow(kafka_url, stream.scored)
        await stream.start()
        await stream.send(*(Ticket(f"{n}", 300) for n in range(10)), key=b"k")
        await stream.host(stream.chainlet(Burst))
        assert len(await stream.read(stream.scored, 10 * 30)) == 10 * 30
        assert await letters(stream) == 0


async def _narrow(url: str, topic: str) -> None:
    """Create a topic that takes only small records."""
    admin = AIOKafkaAdminClient(bootstrap_servers=url.removeprefix("kafka://"))
    await admin.start()
    await admin.create_topics([NewTopic(topic, PARTITIONS, 1, topic_configs={"max.message.bytes": "2000"})])
    await admin.close()


class Endless(chains.ChainletBase):
    """Gives without end, unless the ticket says how many."""

    remote_config = WIDE

    async def run_remote(self, ticket: Ticket) -> AsyncIterator[Scored]:
        number = 0
        while ticket.number != number:
            yield Scored(ticket.id, number)
            number += 1


async def test_one_that_gives_more_than_a_transaction_may_hold_is_put_aside() -> None:
    async with AsyncExitStack() as stack:
        stream = Stream("memory://", stack, "exactly_once")
        await stream.start()
        await stream.send(Ticket("endless", -1), Ticket("next", 2), key=b"k")
        await stream.host(stream.chainlet(Endless))
        assert [said["id"] for said in values(await stream.read(stream.scored, 2))] == ["next", "next"]
        (letter,) = await stream.read(dead_letter_topic(stream.tickets), 1)
        said = dict(letter.headers)[EXCEPTION_MESSAGE] or b""
        assert said == b"one event gave more than 10,000 records or 32 MiB, the most that exactly_once writes at once"


async def test_a_worker_that_may_not_put_an_event_aside_ends(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    publish = stream.broker.publish

    async def guarded(topic: str, value: bytes, **rest: Any) -> asyncio.Future[int]:
        if topic == dead_letter_topic(stream.tickets):
            raise BrokerAuthorizationError(f"does not let us write to {topic}: the right WRITE is missing")
        return await publish(topic, value, **rest)

    await stream.send(b"{")
    chainlet = stream.chainlet(Needy)
    with monkeypatch.context() as patch:
        patch.setattr(stream.broker, "publish", guarded)
        host = await stream.host(chainlet)
        with pytest.raises(BrokerAuthorizationError, match="the right WRITE is missing"):
            async with asyncio.timeout(20):
                await host.failed()
        await host.drain()
    await stream.host(chainlet)
    (letter,) = await stream.read(dead_letter_topic(stream.tickets), 1)
    assert letter.value == b"{"


class Spelled(msgspec.Struct):
    """A ticket, and how often one was read."""

    id: str
    reads: ClassVar[int] = 0

    def __post_init__(self) -> None:
        Spelled.reads += 1


class Shout(chains.ChainletBase):
    remote_config = WIDE

    async def run_remote(self, ticket: Spelled) -> Scored:
        return Scored(ticket.id, 0)


async def test_a_key_that_can_t_be_found_is_a_failure_of_its_event(stream: Stream) -> None:
    def key(ticket: Any) -> str:
        if ticket.id == "bad":
            raise ValueError("it has no key")
        return str(ticket.id)

    Spelled.reads = 0
    await stream.send(Ticket("bad"), Ticket("good"))
    chainlet: Any = stream.chainlet(Shout, key=key)
    await stream.host(chainlet)
    assert [said["id"] for said in values(await stream.read(stream.scored, 1))] == ["good"]
    (letter,) = await stream.read(dead_letter_topic(stream.tickets), 1)
    assert dict(letter.headers)[EXCEPTION_MESSAGE] == b"it has no key"
    assert Spelled.reads == 2, "each was read once, for its key and for its run"


class Held(chains.ChainletBase):
    """Holds one ticket until a test says so."""

    remote_config = WIDE

    async def run_remote(self, ticket: Ticket) -> Scored:
        if ticket.act == "hold":
            await Seen.until("go", seconds=60)
        return Scored(ticket.id, ticket.number)


async def test_a_slow_key_with_many_events_does_not_stop_other_partitions(stream: Stream) -> None:
    slow, others = 1_500, 30
    await stream.send(Ticket("held", act="hold"), *(Ticket(f"{n}") for n in range(slow)), key=b"slow", partition=0)
    await stream.host(stream.chainlet(Held))
    for partition in (1, 2, 3):
        await stream.send(*(Ticket(f"{n}") for n in range(others)), partition=partition)
    assert len(await stream.read(stream.scored, 3 * others)) == 3 * others
    Seen.note("go")
    found = await stream.read(stream.scored, 1 + slow + 3 * others)
    ids = [said["id"] for said in values([record for record in found if record.key == b"slow"])]
    assert ids == ["held", *(f"{n}" for n in range(slow))]


async def test_a_suspect_that_fails_does_not_keep_others_from_being_tried(stream: Stream) -> None:
    """Another worker died while it ran alone; now what it depends on is away, or seems to be."""
    await stream.send(Ticket("suspect", act="cause"), *(Ticket(f"{number}") for number in range(20)), partition=0)
    group = f"{stream.settings.namespace}.Needy.Needy.events"
    await _leave(stream, group, Note(epoch=5, named=True, runs=[1], suspects=1, alone=0, deaths={0: 1}))
    await stream.host(stream.chainlet(Needy, retries=1))
    assert len(await stream.read(stream.scored, 20)) == 20
    (letter,) = await stream.read(dead_letter_topic(stream.tickets), 1)
    assert letter.key == b"suspect"


async def _leave(stream: Stream, group: str, note: Note) -> None:
    """Leave behind what a worker that was killed would have committed of partition 0."""

    async def nothing(_partitions: frozenset[int]) -> None:
        pass

    consumer = await stream.broker.consume(stream.tickets, group, on_assigned=nothing, on_revoked=nothing)
    await consumer.commit({0: Committed(0, note.write())})
    await consumer.close()


class Blocking(chains.ChainletBase):
    """Blocks its thread for longer than it is given, when it runs for the first time."""

    remote_config = WIDE
    running: ClassVar[int] = 0
    most: ClassVar[int] = 0
    runs: ClassVar[int] = 0

    def run_remote(self, ticket: Ticket) -> Scored:
        Blocking.running += 1
        Blocking.runs += 1
        Blocking.most = max(Blocking.most, Blocking.running)
        if Blocking.runs == 1:
            time.sleep(1.5)
        Blocking.running -= 1
        return Scored(ticket.id, Blocking.runs)


async def test_a_thread_that_takes_too_long_does_not_run_beside_its_next_try(stream: Stream) -> None:
    Blocking.running = Blocking.most = Blocking.runs = 0
    stream.settings = stream.settings.model_copy(update={"deadline": 0.3})
    await stream.send(Ticket("slow"))
    await stream.host(stream.chainlet(Blocking))
    assert values(await stream.read(stream.scored, 1)) == [{"id": "slow", "score": 2.0}]
    assert Blocking.most == 1


class Once(chains.ChainletBase):
    """Fails once for a ticket that says so; runs one after another."""

    async def run_remote(self, ticket: Ticket) -> Scored | None:
        await asyncio.sleep(0.001)
        Seen.note(ticket.act or "another")
        if ticket.act and Seen.counts[ticket.act] == 1:
            raise ValueError("the first time")
        return None


async def test_what_is_tried_again_goes_before_what_has_not_begun(stream: Stream) -> None:
    await stream.send(Ticket("a", act="again"), partition=0)
    for number in range(2_000):
        await stream.send(Ticket(f"{number}"), partition=1 + number % (PARTITIONS - 1))
    await stream.host(stream.chainlet(Once))
    async with asyncio.timeout(30):
        await Seen.until("again", times=2)
    assert Seen.counts["another"] < 2_000


class Slow(chains.ChainletBase):
    """Takes its time, and lets nobody else have any meanwhile."""

    remote_config = WIDE

    async def run_remote(self, ticket: Ticket) -> Scored | None:
        time.sleep(0.01)  # noqa: ASYNC251 - what it is about
        Seen.note("run")
        return Scored(ticket.id, 1.0)


async def test_events_that_wait_for_nothing_leave_the_rest_of_the_process_its_turn(stream: Stream) -> None:
    await stream.send(*(Ticket(f"{number}") for number in range(60)))
    host = asyncio.create_task(stream.host(stream.chainlet(Slow)))
    seen, most = 0, 0
    async with asyncio.timeout(20):
        while seen < 60:
            await asyncio.sleep(0)
            most, seen = max(most, Seen.counts["run"] - seen), Seen.counts["run"]
    await host
    assert most <= 2, "events in one turn of the loop"


async def test_a_partition_that_is_taken_over_goes_on_after_the_long_line_of_a_key(stream: Stream) -> None:
    pairs, more = 625, 50  # every second one of the pairs was done by the worker before
    for number in range(2 * pairs + more):
        await stream.send(Ticket(f"{number}"), key=b"hot" if number % 2 == 0 else str(number).encode(), partition=0)
    group = f"{stream.settings.namespace}.Slowly.Slowly.events"

    async def nothing(_: frozenset[int]) -> None: ...

    before = await stream.broker.consume(stream.tickets, group, on_assigned=nothing, on_revoked=nothing)
    await before.commit({0: Committed(0, Note(epoch=1, clean=True, runs=[1, 1] * pairs).write())})
    await before.close()
    await stream.host(stream.chainlet(Slowly))
    async with asyncio.timeout(30):
        await Seen.until("run", times=pairs + more)


class Slowly(chains.ChainletBase):
    """Waits a little for each."""

    remote_config = WIDE

    async def run_remote(self, ticket: Ticket) -> Scored | None:
        await asyncio.sleep(0.001)
        Seen.note("run")
        return Scored(ticket.id, 1.0)


@pytest.mark.parametrize("key", [None, b"k"])
async def test_what_is_lost_while_it_is_stored_is_not_run_again_here(
    monkeypatch: pytest.MonkeyPatch, key: bytes | None
) -> None:
    async with AsyncExitStack() as stack:
        stream = Stream("memory://", stack, "at_least_once")
        await stream.start()
        (worker,) = (await stream.host(stream.chainlet(Slowly))).feeds
        storing: asyncio.Future[asyncio.Future[int]] = asyncio.get_running_loop().create_future()
        put = stream.broker.put

        def held_up(topic: str, *args: Any, **more: Any) -> "asyncio.Future[int] | None":
            if topic != stream.scored or storing.done():
                return put(topic, *args, **more)
            stored: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            storing.set_result(stored)
            return stored

        monkeypatch.setattr(stream.broker, "put", held_up)
        await (await stream.broker.publish(stream.tickets, b'{"id":"a"}', partition=0, key=key))
        async with asyncio.timeout(10):
            stored = await storing
            while not worker._storing:  # noqa: ASYNC110 - it has no event for it
                await asyncio.sleep(0)
            worker._lose([0])
            stored.set_exception(BrokerError("not stored"))
            while worker.in_flight:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0)
        assert Seen.counts["run"] == 1


class Counted(chains.ChainletBase):
    """Counts its runs of each, and has a place for all of them at once."""

    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=64))

    async def run_remote(self, ticket: Ticket) -> Scored:
        Seen.note(ticket.id)
        return Scored(ticket.id, 1.0)


@pytest.mark.parametrize("delivery", ["at_most_once", "at_least_once"])
async def test_what_is_lost_before_it_begins_is_not_run_here(monkeypatch: pytest.MonkeyPatch, delivery: str) -> None:
    source = {"key": "id"} if delivery == "at_least_once" else {}  # what else a worker waits for before it begins
    names = [f"t{number}" for number in range(10)]
    async with AsyncExitStack() as stack:
        stream = Stream("memory://", stack, delivery)
        await stream.start()
        first = await stream.host(stream.chainlet(Counted, **source))
        (worker,) = first.feeds
        moved = False

        async def move() -> None:
            nonlocal moved
            if not moved:
                moved = True
                with monkeypatch.context() as late:
                    late.setattr(worker._consumer, "commit", _refuse)  # as Kafka does once the session is over
                    # In a task of its own: the host drains in the one that has started it.
                    await asyncio.wait([asyncio.create_task(stream.host(stream.chainlet(Counted, **source)))])

        waits, of = ("name", worker._assignment) if delivery == "at_most_once" else ("keyed", worker._service)
        inner = getattr(of, waits)

        async def wait(what: Any) -> Any:
            await move()
            return await inner(what)

        monkeypatch.setattr(of, waits, wait)
        await stream.send(*map(Ticket, names), partition=1)
        await stream.read(stream.scored, len(names))
        await first.drain()
    assert {name: Seen.counts[name] for name in names} == dict.fromkeys(names, 1)


async def _refuse(_positions: object) -> frozenset[int]:
    raise BrokerError("too late")
