"""Frames that share records, over a broker that stores when the test says so."""

import asyncio
from itertools import chain

import msgspec
import pytest

from chains_stream import batching
from chains_stream.batching import RECORD_BYTES, FrameBatcher
from chains_stream.broker import TopicSpec
from chains_stream.brokers.memory import MemoryBroker
from chains_stream.errors import BrokerError
from chains_stream.messages import DATAREF, Chunk, Frame, Headers, decode_frames
from chains_stream.settings import Settings

WAITING_BYTES = 800_000


class SlowBroker(MemoryBroker):
    """Stores a record when it is told to, as a broker on a network does later."""

    def __init__(self) -> None:
        super().__init__(Settings())
        self.records: list[tuple[list[Frame], Headers]] = []
        self.waiting: list[asyncio.Future[int]] = []
        self.refuses: BrokerError | None = None
        self.full = False  # its send buffer is
        self.publishing = self.publishing_at_once = 0

    async def publish(
        self,
        topic: str,
        value: bytes,
        *,
        partition: int,
        key: bytes | None = None,
        headers: Headers = (),
        durable: bool = True,
    ) -> asyncio.Future[int]:
        if self.refuses is not None:
            raise self.refuses
        self.publishing += 1
        self.publishing_at_once = max(self.publishing_at_once, self.publishing)
        while self.full:  # noqa: ASYNC110 - as long as the test says
            await asyncio.sleep(0)
        self.publishing -= 1
        await super().publish(topic, value, partition=partition, key=key, headers=headers, durable=durable)
        self.records.append((decode_frames(value), headers))
        self.waiting.append(asyncio.get_running_loop().create_future())
        return self.waiting[-1]

    async def store(self) -> None:
        """Have what was published so far stored."""
        stored, self.waiting = self.waiting, []
        for future in stored:
            future.set_result(len(self.records))
        for _ in range(5):  # what follows from it
            await asyncio.sleep(0)


@pytest.fixture(autouse=True)
def full_from_one_large_frame_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "WAITING_BYTES", WAITING_BYTES)


@pytest.fixture
async def broker() -> SlowBroker:
    broker = SlowBroker()
    await broker.ensure_topics([TopicSpec("replies", 2, 60_000, ring=True)])
    return broker


def chunk(sequence: int, size: int = 1) -> Chunk:
    return Chunk(b"0" * 16, 1, sequence, msgspec.Raw(msgspec.msgpack.encode(b"x" * size)))


async def send(frames: FrameBatcher, sequence: int, size: int = 1, claim: Headers = ()) -> asyncio.Future[int]:
    return await frames.send("replies", 0, chunk(sequence, size), size, claim, durable=False)


def sequences(broker: SlowBroker) -> list[list[int]]:
    return [[frame.sequence for frame in frames if isinstance(frame, Chunk)] for frames, _ in broker.records]


async def test_the_first_goes_at_once_and_those_after_it_together(broker: SlowBroker) -> None:
    frames = FrameBatcher(broker)
    first = await send(frames, 0)
    shared = [await send(frames, sequence) for sequence in range(1, 6)]
    assert sequences(broker) == [[0]]
    assert not first.done()
    await broker.store()
    assert first.result() == 1
    assert sequences(broker) == [[0], [1, 2, 3, 4, 5]]
    assert not any(future.done() for future in shared)
    await broker.store()
    assert {future.result() for future in shared} == {2}
    await send(frames, 6)
    assert sequences(broker)[2:] == [[6]], "nothing is on its way: it goes at once"


async def test_each_partition_and_kind_has_a_record_of_its_own(broker: SlowBroker) -> None:
    frames = FrameBatcher(broker)
    for partition, durable in ((0, False), (1, False), (0, True)):
        await frames.send("replies", partition, chunk(0), 1, durable=durable)
    assert sequences(broker) == [[0], [0], [0]]


async def test_a_value_in_the_store_has_its_record_and_its_place(broker: SlowBroker) -> None:
    frames = FrameBatcher(broker)
    claim = ((DATAREF, b"file:///x"),)
    for sequence in range(3):
        await send(frames, sequence)
    await send(frames, 3, claim=claim)
    await send(frames, 4)
    await broker.store()
    assert sequences(broker) == [[0], [1, 2], [3], [4]]
    assert [headers for _, headers in broker.records] == [(), (), claim, ()]


async def test_a_record_is_bounded_and_so_is_what_waits(broker: SlowBroker) -> None:
    frames = FrameBatcher(broker)
    size = 10_000
    count = WAITING_BYTES // size * 2
    await send(frames, 0)
    sent: list[int] = []

    async def send_all() -> None:
        for sequence in range(1, count):
            await send(frames, sequence, size)
            sent.append(sequence)

    sending = asyncio.create_task(send_all())
    for _ in range(5):
        await asyncio.sleep(0)
    assert len(sent) * size <= WAITING_BYTES + size
    while not sending.done():
        await broker.store()
    await sending
    while broker.waiting:
        await broker.store()
    await frames.close()
    assert [*chain.from_iterable(sequences(broker))] == list(range(count)), "in order, and each once"
    assert max(map(len, sequences(broker))) <= RECORD_BYTES // size


async def test_all_that_wait_go_on_together_once_half_is_free(broker: SlowBroker) -> None:
    frames = FrameBatcher(broker)
    await send(frames, 0)
    await send(frames, 1, 900_000)
    waiting = [asyncio.create_task(send(frames, number, 1_000)) for number in range(2, 102)]
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    await broker.store()
    assert all(task.done() for task in waiting), "in a few turns, and not in some for each"
    while broker.waiting:
        await broker.store()
    assert [*chain.from_iterable(sequences(broker))] == list(range(102))


async def test_who_waits_for_room_is_not_overtaken_by_its_own_next(broker: SlowBroker) -> None:
    frames = FrameBatcher(broker)
    await send(frames, 0)
    await send(frames, 1, 900_000)
    waiting = asyncio.create_task(send(frames, 2, 200_000))
    await asyncio.sleep(0)
    await broker.store()  # the large one goes
    await broker.store()  # all has gone: the line is empty, but for the one that waits
    await waiting
    await send(frames, 3)
    while broker.waiting:
        await broker.store()
    assert [*chain.from_iterable(sequences(broker))] == [0, 1, 2, 3]


async def test_what_comes_in_the_turn_in_which_a_record_is_stored_keeps_its_place(broker: SlowBroker) -> None:
    frames = FrameBatcher(broker)
    await send(frames, 0)
    await send(frames, 1)
    broker.full = True
    broker.waiting.pop().set_result(1)  # the batcher is told with the next turn
    await send(frames, 2, claim=((DATAREF, b"file:///x"),))
    for _ in range(5):
        await asyncio.sleep(0)
    broker.full = False
    while len(broker.records) < 3:
        await broker.store()
    assert sequences(broker) == [[0], [1], [2]]
    assert broker.publishing_at_once == 1


async def test_one_that_gives_up_waiting_holds_up_nobody(broker: SlowBroker) -> None:
    frames = FrameBatcher(broker)
    await send(frames, 0)
    await send(frames, 1, 900_000)
    waiting = asyncio.create_task(send(frames, 2, 200_000))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    while broker.waiting:
        await broker.store()
    async with asyncio.timeout(5):
        await frames.close()
    assert sequences(broker) == [[0], [1]]


async def test_one_that_gives_up_with_room_given_holds_up_nobody(broker: SlowBroker) -> None:
    frames = FrameBatcher(broker)
    await send(frames, 0)
    await send(frames, 1, 900_000)
    waiting = [asyncio.create_task(send(frames, number, 200_000)) for number in (2, 3)]
    await asyncio.sleep(0)
    broker.refuses = BrokerError("away")
    broker.waiting.pop().set_result(1)
    for _ in range(20):  # at each point between the room's being given and its being taken
        await asyncio.sleep(0)
        waiting[0].cancel()
    await asyncio.wait(waiting)
    assert waiting[1].done()
    async with asyncio.timeout(5):
        await frames.close()


@pytest.mark.parametrize("turns", range(6))
async def test_a_waiter_that_is_passed_the_line_is_not_forgotten(broker: SlowBroker, turns: int) -> None:
    frames = FrameBatcher(broker)
    await send(frames, 0)
    await send(frames, 1, 900_000)
    waiting = [asyncio.create_task(send(frames, number, 200_000)) for number in (2, 3, 4)]
    await asyncio.sleep(0)
    broker.waiting.pop().set_result(1)
    for _ in range(turns):
        await asyncio.sleep(0)
    waiting[0].cancel()
    async with asyncio.timeout(5):
        while not all(task.done() for task in waiting) or broker.waiting:
            await broker.store()
        await frames.close()
    sent = [number for number, task in zip((2, 3, 4), waiting, strict=True) if not task.cancelled()]
    assert [*chain.from_iterable(sequences(broker))] == [0, 1, *sent]


async def test_what_cannot_be_encoded_fails_alone(broker: SlowBroker) -> None:
    frames = FrameBatcher(broker)
    await send(frames, 0)
    wrong = Chunk(b"0" * 16, 1, 2**70, msgspec.Raw(b"\xc0"))
    failed = await frames.send("replies", 0, wrong, 1, ((DATAREF, b"x"),), durable=False)
    later = await send(frames, 1)
    while broker.waiting:
        await broker.store()
    with pytest.raises(OverflowError):
        await failed
    assert later.done()
    assert sequences(broker) == [[0], [1]]


async def test_close_waits_only_so_long_for_a_broker_that_is_away(
    broker: SlowBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "CLOSE_SECONDS", 0.1)
    frames = FrameBatcher(broker)
    await send(frames, 0)
    gathered = await send(frames, 1)
    async with asyncio.timeout(5):
        await frames.close()
    with pytest.raises(BrokerError, match="closed"):
        await gathered


async def test_who_still_waits_for_room_at_the_end_is_told(broker: SlowBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "CLOSE_SECONDS", 0.1)
    frames = FrameBatcher(broker)
    await send(frames, 0)
    await send(frames, 1, 900_000)
    waiting = asyncio.create_task(send(frames, 2))
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await frames.close()
        with pytest.raises(BrokerError, match="closed"):
            await waiting


async def test_all_that_share_a_record_learn_that_it_was_not_stored(broker: SlowBroker) -> None:
    frames = FrameBatcher(broker)
    await send(frames, 0)
    shared = [await send(frames, sequence) for sequence in (1, 2)]
    broker.refuses = BrokerError("away")
    await broker.store()
    for future in shared:
        with pytest.raises(BrokerError, match="away"):
            await asyncio.shield(future)
    broker.refuses = None
    again = await send(frames, 3)
    await broker.store()
    assert again.done()
    assert sequences(broker) == [[0], [3]]


async def test_one_that_waits_for_the_record_of_several_may_be_cancelled_alone(broker: SlowBroker) -> None:
    frames = FrameBatcher(broker)
    _, first, second = [await frames.send("replies", 0, chunk(number), 1, durable=True) for number in range(3)]
    first.cancel()
    await broker.store()
    await broker.store()
    assert await second == 2
    assert sequences(broker) == [[0], [1, 2]]


async def test_close_waits_for_all_that_was_sent(broker: SlowBroker) -> None:
    frames = FrameBatcher(broker)
    for sequence in range(3):
        await send(frames, sequence)
    closing = asyncio.create_task(frames.close())
    await asyncio.sleep(0)
    assert not closing.done()
    await broker.store()
    await broker.store()
    async with asyncio.timeout(5):
        await closing
    assert sequences(broker) == [[0], [1, 2]]
