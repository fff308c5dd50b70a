"""What workers leave to each other when they are killed: nothing is lost, run for nothing, or run for ever."""

import asyncio
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import chains_stream as chains
from chains_stream.brokers import open_broker
from chains_stream.chain import Chain
from chains_stream.letters import held, read_letters
from chains_stream.offsets import Note
from chains_stream.settings import Settings
from tests.acceptance import command
from tests.acceptance.command import HERE, Command, Commands

FILE = str(HERE / "chains" / "delivery.py")
WORK, TALE = (Chain.load(f"{FILE}:{name}") for name in ("Work", "Tale"))
# A killed worker's partitions go to another one when its session is over.
QUICK = {"CHAINS_KAFKA_SESSION_TIMEOUT_MS": "6000", "CHAINS_PARTITIONS": "2"}

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(240)]


def runs(folder: Path) -> list[str]:
    file = folder / "runs"
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


async def until(folder: Path, *lines: str) -> None:
    """Wait until Chainlets have noted these lines, each as often as it is given."""
    await asyncio.to_thread(command.until, lambda: Counter(lines) <= Counter(runs(folder)))


async def noted(kafka_url: str, topic: str, done: int) -> None:
    """Wait until the group has stored that so many records are done behind open ones."""
    broker: Any = open_broker(Settings.of(broker=kafka_url))
    await broker.start()
    try:
        async with asyncio.timeout(command.DEADLINE):
            while True:
                stored = await broker._cluster.committed(topic, topic, [0, 1])
                runs_of = [Note.read(committed.metadata).runs for committed in stored.values()]
                if sum(sum(lengths[1::2]) for lengths in runs_of) == done:
                    return
                await asyncio.sleep(0.05)
    finally:
        await broker.close()


class Supervised:
    """A worker that is started again when it dies, as whatever runs containers does."""

    def __init__(self, start: Commands, *arguments: str) -> None:
        self.deaths = 0
        self._start = start
        self._arguments = arguments
        self._worker = start(*arguments, variables=QUICK)
        self._watching = asyncio.create_task(self._watch())

    async def end(self) -> None:
        self._worker.send(signal.SIGTERM)
        await self._watching

    async def _watch(self) -> None:
        while await asyncio.to_thread(self._worker.wait, 120) == -signal.SIGKILL:
            self.deaths += 1
            self._worker = self._start(*self._arguments, variables=QUICK)


def worker(start: Commands, entrypoint: str, kafka_url: str, namespace: str) -> Command:
    started = start("worker", f"{FILE}:{entrypoint}", "--broker", kafka_url, "--namespace", namespace, variables=QUICK)
    started.ready()
    return started


def connected(chain: Chain, kafka_url: str, namespace: str) -> Any:
    entrypoint: Any = chain.entrypoint
    return chains.connect(kafka_url, entrypoint, namespace=namespace, partitions=2, deadline=120)


async def test_a_request_that_kills_its_workers_is_put_aside_and_no_other(
    start: Commands, kafka_url: str, namespace: str, tmp_path: Path
) -> None:
    folder = str(tmp_path)
    supervised = Supervised(start, "worker", f"{FILE}:Work", "--broker", kafka_url, "--namespace", namespace)
    try:
        async with connected(WORK, kafka_url, namespace) as work:
            calls = [asyncio.ensure_future(work.run_remote(f"before {n}", folder)) for n in range(10)]
            poison = asyncio.ensure_future(work.run_remote("poison", folder, then="kill"))
            calls += [asyncio.ensure_future(work.run_remote(f"after {n}", folder)) for n in range(10)]
            names = await asyncio.gather(*calls)
            with pytest.raises(chains.DeadLetteredError, match="3 workers died") as caught:
                await poison
            assert await work.run_remote("afterwards", folder) == "afterwards"
    finally:
        await supervised.end()
    assert names == [*(f"before {n}" for n in range(10)), *(f"after {n}" for n in range(10))]
    assert supervised.deaths <= 5
    topic = WORK.topic(WORK.entrypoint, namespace)
    assert caught.value.topic == f"{topic}.dlq"
    broker = open_broker(Settings.of(broker=kafka_url))
    try:
        await broker.start()
        offsets = await held(broker, topic)
        assert offsets is not None
        letters = [letter async for letter in read_letters(broker, topic, offsets)]
    finally:
        await broker.close()
    assert [(letter.record.offset, letter.deliveries) for letter in letters] == [(caught.value.offset, 3)]
    assert b"poison" in letters[0].record.value


async def test_a_kill_makes_no_record_wait_for_another(
    start: Commands, kafka_url: str, namespace: str, tmp_path: Path
) -> None:
    """After one death all that was open runs at once again: else one kill would make a queue of a worker's streams."""
    folder = str(tmp_path)
    first = worker(start, "Work", kafka_url, namespace)
    async with connected(WORK, kafka_url, namespace) as work:
        waiting = [asyncio.ensure_future(work.run_remote(f"w{n}", folder, wait="go")) for n in range(8)]
        await until(tmp_path, *(f"w{n}" for n in range(8)))
        first.send(signal.SIGKILL)
        worker(start, "Work", kafka_url, namespace)
        await until(tmp_path, *(f"w{n}" for n in range(8) for _ in range(2)))
        (tmp_path / "go").touch()
        assert await asyncio.gather(*waiting) == [f"w{n}" for n in range(8)]


async def test_what_was_done_behind_an_open_record_is_not_run_again(
    start: Commands, kafka_url: str, namespace: str, tmp_path: Path
) -> None:
    folder = str(tmp_path)
    first = worker(start, "Work", kafka_url, namespace)
    async with connected(WORK, kafka_url, namespace) as work:
        open_ones = [asyncio.ensure_future(work.run_remote(f"open {n}", folder, wait="go")) for n in range(2)]
        await until(tmp_path, "open 0", "open 1")
        for n in range(100):
            await work.run_remote(f"done {n}", folder)
        await noted(kafka_url, WORK.topic(WORK.entrypoint, namespace), 100)
        first.send(signal.SIGKILL)
        (tmp_path / "go").touch()
        worker(start, "Work", kafka_url, namespace)
        assert await asyncio.gather(*open_ones) == ["open 0", "open 1"]
    counts = Counter(runs(tmp_path))
    assert [counts[f"open {n}"] for n in range(2)] == [2, 2]
    assert {counts[f"done {n}"] for n in range(100)} == {1}


async def test_a_resumable_stream_goes_on_where_its_worker_was_killed(
    start: Commands, kafka_url: str, namespace: str, tmp_path: Path
) -> None:
    first = worker(start, "Tale", kafka_url, namespace)
    async with connected(TALE, kafka_url, namespace) as tale:
        numbers = tale.run_remote("shown", 1000, str(tmp_path), wait="go")
        shown = [await anext(numbers) for _ in range(200)]
        unread = await tale.submit("unread", 600, str(tmp_path), wait="go")
        await until(tmp_path, "shown waits", "unread waits")
        first.send(signal.SIGKILL)
        (tmp_path / "go").touch()
        worker(start, "Tale", kafka_url, namespace)
        async for number in numbers:
            shown.append(number)  # noqa: PERF401 - it goes on with those read before
        assert shown == list(range(1000))
        assert await unread.result() == list(range(600))
    begun = [line.split(" from ") for line in runs(tmp_path) if " from " in line]
    for name, least in (("shown", 200), ("unread", 1)):
        first_run, second_run = (int(at) for whose, at in begun if whose == name)
        assert first_run == 0
        assert second_run >= least, "it did not begin again"


async def test_a_request_that_is_cancelled_while_no_worker_runs_is_never_run(
    start: Commands, kafka_url: str, namespace: str, tmp_path: Path
) -> None:
    folder = str(tmp_path)
    async with connected(WORK, kafka_url, namespace) as work:
        cancelled = [await work.submit(f"cancelled {n}", folder) for n in range(5)]
        for handle in cancelled:
            await handle.cancel()
        stopped = await work.submit("stopped by its id", folder)
        process = await asyncio.to_thread(start, "cancel", stopped.id, "--broker", kafka_url, "--namespace", namespace)
        assert await asyncio.to_thread(process.wait) == 0
        kept = await work.submit("kept", folder)
        worker(start, "Work", kafka_url, namespace)
        assert await kept.result() == "kept"
        with pytest.raises(chains.CallCancelledError):
            await stopped.result()
        for _ in range(4):  # of both partitions the records behind are reached
            await work.run_remote("later", folder)
    assert set(runs(tmp_path)) == {"kept", "later"}


async def test_a_running_request_is_stopped_by_its_id(
    start: Commands, kafka_url: str, namespace: str, tmp_path: Path
) -> None:
    worker(start, "Work", kafka_url, namespace)
    async with connected(WORK, kafka_url, namespace) as work:
        handle = await work.submit("long", str(tmp_path), wait="never")
        await until(tmp_path, "long")
        process = start("cancel", handle.id, "--broker", kafka_url, "--namespace", namespace)
        assert await asyncio.to_thread(process.wait) == 0
        with pytest.raises(chains.CallCancelledError):
            await handle.result()
        await until(tmp_path, "long cancelled")
