"""What is known of cancelled requests, and since when."""

from typing import Any

import pytest

from chains_stream import cancellations
from chains_stream.broker import TopicSpec
from chains_stream.brokers.memory import MemoryBroker
from chains_stream.cancellations import Cancellations, CancelledLog
from chains_stream.messages import Cancelled, Request, Started, encode_frames, now_ms
from chains_stream.settings import Settings

HOUR_MS = 3_600_000


def request(number: int, **more: Any) -> Request:
    return Request(correlation_id=id_of(number), **{"request_id": f"r{number}", **more})


def id_of(number: int) -> bytes:
    return number.to_bytes(16, "big")


def test_a_cancelled_request_is_met_once_by_its_own_id_and_again_by_the_requests() -> None:
    known = Cancellations(60.0)
    known.add(id_of(1))
    known.add("r2")
    assert [known.meet(request(number)) for number in (1, 2, 2, 3)] == [True, True, True, False]
    assert not known.meet(request(1))


def test_what_nobody_can_wait_for_any_more_is_forgotten_but_for_those_that_wait_long() -> None:
    known = Cancellations(-1.0)
    for number in range(3):
        known.add(id_of(number))
    assert not known.meet(request(0))
    assert known.meet(request(1, start_by_ms=now_ms() + HOUR_MS))


def test_beyond_the_bound_the_oldest_is_forgotten_and_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cancellations, "MAX_CANCELLED", 3)
    known = Cancellations(60.0)
    known.heard_back(60.0)
    assert known.known_since_ms <= now_ms() - 60_000
    for number in range(4):
        known.add(id_of(number))
    assert [known.meet(request(number)) for number in range(4)] == [False, True, True, True]
    assert known.known_since_ms >= now_ms() - 30_000, "one that was heard of just now is not known any more"


def test_one_that_is_told_of_again_takes_no_other_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cancellations, "MAX_CANCELLED", 2)
    known = Cancellations(60.0)
    for number in (1, 2, 2, 2):
        known.add(id_of(number))
    assert known.meet(request(1))


class CountingBroker(MemoryBroker):
    """Counts the passes over its logs."""

    reads = 0

    async def read(self, *arguments: Any, **options: Any) -> Any:
        self.reads += 1
        return await super().read(*arguments, **options)


@pytest.fixture
async def broker() -> CountingBroker:
    made = CountingBroker(Settings())
    await made.ensure_topics([TopicSpec("results", 1, HOUR_MS)])
    for number in range(100):
        frame = Cancelled(id_of(number), 0) if number % 10 == 0 else Started(id_of(number), 1)
        await made.publish("results", encode_frames([frame]), partition=0)
    await made.publish("results", b"no frames", partition=0)
    return made


async def test_a_reply_log_is_read_once_for_all_that_ask(broker: CountingBroker) -> None:
    log, now = CancelledLog(broker), now_ms()
    assert await log.tells_of("results", 0, 50, id_of(60), now)
    assert not await log.tells_of("results", 0, 55, id_of(61), now)
    assert await log.tells_of("results", 0, 60, id_of(90), now)
    assert broker.reads == 1
    assert await log.tells_of("results", 0, 20, id_of(20), now), "from further back"
    assert await log.tells_of("results", 0, 0, id_of(0), now)
    assert broker.reads == 2, "some more is read where it must be read further back"


async def test_it_is_read_on_if_less_is_known_otherwise(broker: CountingBroker) -> None:
    log = CancelledLog(broker)
    assert not await log.tells_of("results", 0, 50, id_of(200), now_ms())
    await broker.publish("results", encode_frames([Cancelled(id_of(200), 0)]), partition=0)
    assert not await log.tells_of("results", 0, 50, id_of(200), now_ms() - 1_000), "that one is known by other ways"
    assert await log.tells_of("results", 0, 50, id_of(200), now_ms() + 1_000)


async def test_what_the_log_holds_no_longer_is_not_looked_for(broker: CountingBroker) -> None:
    await broker.delete_before("results", {0: 50})
    log = CancelledLog(broker)
    assert await log.tells_of("results", 0, 0, id_of(50), now_ms())
    assert not await log.tells_of("results", 0, 0, id_of(40), now_ms())
