"""Where requests go: by load, by key, and by rotation where nothing is known; and when a worker reports."""

import asyncio
import gc
import sys
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Sequence

import pytest

from chains_stream import balance
from chains_stream.balance import REPORT_VALID, Balancer, Busy, Reporter
from chains_stream.brokers.memory import MemoryBroker
from chains_stream.control import Cancel, Control, Load, Message
from chains_stream.settings import Settings

PARTITIONS = 8
LEFT, RIGHT = range(4), range(4, 8)


class Clock:
    now = 1_000.0

    def __call__(self) -> float:
        return self.now


class Workers:
    """Reports of workers, as they come to a caller at a time of its own clock."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.balancer = Balancer(PARTITIONS, self.clock)

    def report(
        self,
        worker: bytes,
        partitions: Sequence[int],
        running: int,
        *,
        waiting: int = 0,
        capacity: int = 8,
        at: float | None = None,
    ) -> None:
        at_ms = int(1000 * (self.clock.now if at is None else at))
        self.balancer.handle(Load(worker, at_ms, list(partitions), running, waiting, capacity))

    def chosen(self, times: int = 800) -> Counter[int]:
        """Choose, and have each request end before the next one."""
        return Counter(self.balancer.choose(None) for _ in range(times))

    def share(self, partitions: Sequence[int]) -> float:
        chosen = self.chosen()
        return sum(chosen[partition] for partition in partitions) / chosen.total()


@pytest.fixture
def workers() -> Workers:
    return Workers()


EVENLY = dict.fromkeys(range(PARTITIONS), 100)  # of 800


def test_without_reports_partitions_take_turns(workers: Workers) -> None:
    assert workers.chosen() == EVENLY


def test_with_one_worker_partitions_take_turns(workers: Workers) -> None:
    workers.report(b"a", range(PARTITIONS), 8)
    assert workers.chosen() == EVENLY


def test_equal_workers_take_turns(workers: Workers) -> None:
    workers.report(b"a", LEFT, 3)
    workers.report(b"b", RIGHT, 3)
    assert workers.chosen() == EVENLY


def test_of_two_workers_the_less_loaded_one_gets_all(workers: Workers) -> None:
    workers.report(b"a", LEFT, 8)
    workers.report(b"b", RIGHT, 1)
    chosen = workers.chosen()
    assert set(chosen) == set(RIGHT)
    assert min(chosen.values()) > 100  # on all its partitions


def test_load_is_relative_to_capacity(workers: Workers) -> None:
    workers.report(b"a", LEFT, 2, capacity=4)
    workers.report(b"b", RIGHT, 10, capacity=64)
    assert workers.share(RIGHT) == 1


def test_what_waits_counts_too(workers: Workers) -> None:
    workers.report(b"a", LEFT, 8, waiting=5)
    workers.report(b"b", RIGHT, 8, waiting=2)
    assert workers.share(RIGHT) == 1


def test_the_one_worker_with_a_free_place_is_found_among_many(workers: Workers) -> None:
    for number in range(PARTITIONS):
        workers.report(bytes([number]), [number], 0 if number == 5 else 1, capacity=1)
    assert set(workers.chosen()) == {5}


def test_two_are_compared_and_not_all_so_that_callers_do_not_rush_to_one(workers: Workers) -> None:
    for number in range(PARTITIONS):
        workers.report(bytes([number]), [number], 1 if number == 5 else 2)
    assert 0.15 < workers.share([5]) < 0.35  # of itself 1/8, and each other draws it with 1/7: by chance alone 1/8


def test_own_requests_count_until_they_end(workers: Workers) -> None:
    workers.report(b"a", LEFT, 0)
    workers.report(b"b", RIGHT, 4)
    under_way = [workers.balancer.sent(workers.balancer.choose(None)) for _ in range(4)]
    assert {report.worker for report in under_way if report is not None} == {b"a"}
    assert workers.chosen() == EVENLY  # four on each side
    for report in under_way:
        assert report is not None
        report.sent -= 1
    assert workers.share(LEFT) == 1


def test_own_requests_are_in_the_next_report(workers: Workers) -> None:
    workers.report(b"a", LEFT, 0)
    workers.report(b"b", RIGHT, 2)
    under_way = [workers.balancer.sent(0) for _ in range(6)]
    assert workers.share(RIGHT) == 1
    workers.report(b"a", LEFT, 1)
    assert workers.share(LEFT) == 1
    for report in under_way:  # they end, which says nothing of the newer report
        assert report is not None
        report.sent -= 1
    workers.report(b"b", RIGHT, 0)
    assert workers.share(RIGHT) == 1


def test_requests_of_one_key_go_to_one_partition_also_when_they_wait_there(workers: Workers) -> None:
    workers.report(b"a", LEFT, 8, waiting=7)
    workers.report(b"b", RIGHT, 0)
    keys = [f"session-{number}".encode() for number in range(200)]
    chosen = {key: workers.balancer.choose(key) for key in keys}
    assert all(workers.balancer.choose(key) == partition for key, partition in chosen.items())
    assert chosen == {key: zlib.crc32(key) % PARTITIONS for key in keys}
    assert set(chosen.values()) == set(range(PARTITIONS))


def test_keys_of_an_overloaded_worker_go_to_another_one_each_and_come_back(workers: Workers) -> None:
    first, second = range(2, 4), range(4, 8)
    workers.report(b"a", range(2), 8, waiting=8)
    workers.report(b"b", first, 7)
    workers.report(b"c", second, 0)
    keys = [f"session-{number}".encode() for number in range(200)]
    home = {key: zlib.crc32(key) % PARTITIONS for key in keys}
    chosen = {key: workers.balancer.choose(key) for key in keys}
    assert all(chosen[key] == home[key] for key in keys if home[key] > 1)
    moved = {key for key in keys if home[key] < 2}
    assert {chosen[key] in first for key in moved} == {True, False}, "they share the load"
    workers.report(b"c", second, 1)
    assert {key: workers.balancer.choose(key) for key in keys} == chosen, "and stay where they are"
    workers.report(b"b", first, 8)  # which has no room any more
    assert {workers.balancer.choose(key) in second for key in moved} == {True}
    workers.report(b"c", second, 8)
    assert {key: workers.balancer.choose(key) for key in keys} == home, "nobody has room"
    workers.report(b"c", second, 0)
    workers.report(b"a", range(2), 8)
    assert {key: workers.balancer.choose(key) for key in keys} == home


def test_keys_of_an_overloaded_worker_are_shared_out_evenly(workers: Workers) -> None:
    workers.report(b"a" * 16, range(2), 8, waiting=8)
    for number, worker in enumerate((b"b", b"c", b"d"), 1):
        workers.report(worker * 16, range(2 * number, 2 * number + 2), 0)
    keys = [b"session-%04d" % number for number in range(4000)]
    moved = Counter(workers.balancer.choose(key) // 2 for key in keys if zlib.crc32(key) % PARTITIONS < 2)
    assert all(0.28 < moved[worker] / moved.total() < 0.39 for worker in (1, 2, 3))


def test_an_overload_that_was_reported_long_ago_moves_no_key(workers: Workers) -> None:
    workers.report(b"a", LEFT, 8, waiting=8)
    workers.clock.now += REPORT_VALID / 2
    workers.report(b"b", RIGHT, 0)
    key = next(key for key in (b"%d" % number for number in range(99)) if zlib.crc32(key) % PARTITIONS in LEFT)
    assert workers.balancer.choose(key) in RIGHT
    workers.clock.now += REPORT_VALID / 2 + 0.1
    assert workers.balancer.choose(key) in LEFT


def test_a_worker_that_vanishes_neither_attracts_nor_repels(workers: Workers) -> None:
    for busy_one in (0, 8):
        workers.report(b"a", LEFT, busy_one)
        workers.report(b"b", RIGHT, 4)
        assert workers.share(LEFT) == (1 if busy_one == 0 else 0)
        workers.clock.now += REPORT_VALID + 1
        workers.report(b"b", RIGHT, 4)
        assert workers.chosen() == EVENLY


def test_reports_of_a_worker_with_a_wrong_clock_count(workers: Workers) -> None:
    workers.report(b"a", LEFT, 8, at=5)
    workers.report(b"b", RIGHT, 1, at=9_999_999)
    assert workers.share(RIGHT) == 1


def test_a_report_that_is_read_again_later_is_ignored(workers: Workers) -> None:
    workers.report(b"a", LEFT, 8)
    workers.report(b"b", RIGHT, 0)
    workers.report(b"a", range(PARTITIONS), 0, at=workers.clock.now - REPORT_VALID - 1)
    assert workers.share(RIGHT) == 1


def test_a_worker_whose_clock_was_put_back_is_believed_again(workers: Workers) -> None:
    workers.report(b"a", LEFT, 8)
    workers.clock.now += REPORT_VALID + 1
    workers.report(b"a", LEFT, 8, at=17)
    workers.report(b"b", RIGHT, 0)
    assert workers.share(RIGHT) == 1


def test_a_partition_is_the_one_s_that_reported_it_last(workers: Workers) -> None:
    workers.report(b"a", range(PARTITIONS), 0)
    workers.report(b"b", RIGHT, 0)
    workers.report(b"a", LEFT, 8)
    assert workers.share(RIGHT) == 1


def test_a_stale_report_after_a_rebalance_is_mended_by_the_next_one(workers: Workers) -> None:
    workers.report(b"b", RIGHT, 8)
    workers.report(b"a", range(PARTITIONS), 0)  # of before the rebalance, stored after it
    assert workers.chosen() == EVENLY
    workers.report(b"a", LEFT, 0)
    workers.report(b"b", RIGHT, 8)
    assert workers.share(LEFT) == 1


def test_partitions_that_a_worker_lists_no_more_are_nobody_s(workers: Workers) -> None:
    workers.report(b"a", LEFT, 8)
    workers.report(b"b", RIGHT, 0)
    workers.report(b"a", [0, 1], 8)
    chosen = workers.chosen()
    assert chosen[0] == chosen[1] == 0
    assert chosen[2] == chosen[3] == 100  # in rotation, as nothing is known of them


def test_a_worker_that_left_is_forgotten_at_once(workers: Workers) -> None:
    workers.report(b"a", LEFT, 0)
    workers.report(b"b", RIGHT, 8)
    workers.report(b"a", [], 0, capacity=0)
    assert workers.chosen() == EVENLY


def test_a_worker_that_drains_gets_nothing_more_if_there_is_another(workers: Workers) -> None:
    workers.report(b"a", LEFT, 0, capacity=0)
    workers.report(b"b", RIGHT, 8, waiting=100)
    assert workers.share(RIGHT) == 1
    workers.report(b"b", RIGHT, 0, capacity=0)
    assert workers.chosen() == EVENLY


def test_strange_reports_do_no_harm(workers: Workers) -> None:
    workers.report(b"a", [-1, 3, 3, 8, 2**40], -5, waiting=-7, capacity=-1)
    workers.report(b"b", RIGHT, 2**60)
    workers.report(b"b", RIGHT, 2**60)
    assert set(workers.chosen()) <= set(range(PARTITIONS))
    workers.balancer.handle(Cancel(b"an id"))


def test_what_is_kept_is_bounded(workers: Workers) -> None:
    def kept() -> int:
        gc.collect()
        return sum(sys.getsizeof(value) for value in (workers.balancer._reports, workers.balancer._known))

    for number in range(PARTITIONS):
        workers.report(f"first {number}".encode(), [number], 1)
    before = kept()
    for number in range(10_000):
        workers.report(f"worker {number}".encode(), [number % PARTITIONS, number * 3 % PARTITIONS], 1)
    assert len(workers.balancer._reports) <= PARTITIONS
    assert kept() <= 2 * before


class Working:
    """A worker of which a test says what it does."""

    def __init__(self, topic: str) -> None:
        self.topic = topic
        self.says = Busy([0, 1], 0, 0, 8)

    def busy(self) -> Busy:
        return self.says


@pytest.fixture
async def control() -> AsyncIterator[Control]:
    settings = Settings()
    control = Control(MemoryBroker(settings), settings)
    await control.start()
    yield control
    await control.close()


class Heard:
    """The reports that a caller gets."""

    def __init__(self) -> None:
        self.reports: list[Load] = []
        self._more = asyncio.Event()

    def handle(self, message: Message) -> None:
        assert isinstance(message, Load)
        self.reports.append(message)
        self._more.set()

    async def until(self, times: int) -> list[Load]:
        async with asyncio.timeout(20):
            while len(self.reports) < times:
                self._more.clear()
                await self._more.wait()
        return self.reports


async def test_a_worker_reports_changes_soon_and_little_else(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balance, "REPORT_AT_MOST_EVERY", 0.001)
    monkeypatch.setattr(balance, "REPORT_EVERY", 600)
    heard, worker = Heard(), Working("t")
    await control.follow({"t": heard.handle})
    reporter = Reporter(control, [worker])
    reporter.start()
    first = (await heard.until(1))[0]
    assert (first.partitions, first.running, first.waiting, first.capacity) == ([0, 1], 0, 0, 8)
    for says in (Busy([0, 1], 1, 0, 8), Busy([0, 1], 0, 1, 8)):  # too little to tell
        worker.says = says
        await asyncio.sleep(0.02)
    worker.says = Busy([0, 1], 2, 0, 8)
    assert (await heard.until(2))[1].running == 2
    worker.says = Busy([0], 2, 0, 8)
    assert (await heard.until(3))[2].partitions == [0]
    worker.says = Busy([0], 7, 0, 8)
    await heard.until(4)
    worker.says = Busy([0], 8, 0, 8)  # full
    assert (await heard.until(5))[4].running == 8
    assert len(heard.reports) == 5
    await reporter.close()


async def test_a_worker_reports_regularly_and_at_a_bounded_rate(
    control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(balance, "REPORT_AT_MOST_EVERY", 0.01)
    monkeypatch.setattr(balance, "REPORT_EVERY", 0.03)
    heard, worker, idle = Heard(), Working("t"), Working("t")
    idle.topic, idle.says = "idle", Busy([], 0, 0, 8)
    await control.follow({"t": heard.handle, "idle": heard.handle})
    reporter = Reporter(control, [worker, idle])
    reporter.start()
    began = asyncio.get_running_loop().time()
    times = len(await heard.until(10))
    assert asyncio.get_running_loop().time() - began >= 0.03 * (times - 1)
    assert all(load.partitions for load in heard.reports)  # one that holds nothing says nothing
    await reporter.close()


async def test_a_worker_that_drains_says_so_and_then_that_it_has_gone(control: Control) -> None:
    heard, worker = Heard(), Working("t")
    await control.follow({"t": heard.handle})
    reporter = Reporter(control, [worker])
    reporter.start()
    await heard.until(1)
    async with reporter.leaving(worker):
        draining = (await heard.until(2))[1]
        assert (draining.partitions, draining.capacity) == ([0, 1], 0)
    gone = (await heard.until(3))[2]
    assert gone.partitions == []
    await reporter.close()
    assert len(heard.reports) == 3
