"""A supply's records as a worker takes them, and lines as a supply and as results."""

import asyncio
import io
import re
from collections.abc import Sequence
from pathlib import Path

import click
import pytest

import chains_stream as chains
from chains_stream import cli
from chains_stream.broker import Committed, Record
from chains_stream.chain import Chain
from chains_stream.cli import lines, replaying
from chains_stream.cli.lines import LineOutlet, LineSupply
from chains_stream.cli.supplying import Wanted, chosen, fed_alone
from chains_stream.errors import BrokerError, ChainsRuntimeError, ChainsUsageError
from chains_stream.settings import Settings
from chains_stream.supply import SupplyConsumer

HERE = Path(__file__).parent
RETOLD = str(HERE.parent / "acceptance" / "chains" / "retold.py")


async def nothing(_partitions: frozenset[int]) -> None: ...


class Given:
    """A supply of a few records."""

    def __init__(self, *places: tuple[int, int]) -> None:
        self.starts = {0: 0, 1: 0}
        self._left = [Record("t", partition, offset, 0, None, b"", ()) for partition, offset in places]

    async def fetch(self, max_records: int) -> list[Record]:
        taken, self._left = self._left[:max_records], self._left[max_records:]
        return taken


def places(records: Sequence[Record]) -> list[tuple[int, int]]:
    return [(record.partition, record.offset) for record in records]


async def test_all_is_done_once_all_that_was_given_is_committed() -> None:
    consumer = SupplyConsumer(Given((0, 0), (1, 4), (0, 2)))
    await consumer.join(nothing, nothing)
    assert places(await consumer.fetch(2)) == [(0, 0), (1, 4)]
    await consumer.commit({0: Committed(1), 1: Committed(5)})
    assert not consumer.done.is_set(), "more may come"
    assert places(await consumer.fetch(2)) == [(0, 2)]
    at_end = asyncio.create_task(consumer.fetch(2))
    await asyncio.sleep(0)
    assert not consumer.done.is_set(), "the last one runs"
    await consumer.commit({0: Committed(3)})
    assert consumer.done.is_set()
    assert (consumer.given, consumer.positions, consumer.passed) == (3, {0: 3, 1: 5}, 8)
    at_end.cancel()


async def test_one_without_records_is_done_at_once() -> None:
    consumer = SupplyConsumer(Given())
    at_end = asyncio.create_task(consumer.fetch(2))
    await asyncio.wait_for(consumer.done.wait(), 10)
    at_end.cancel()


async def test_what_is_paused_is_kept_until_it_goes_on() -> None:
    consumer = SupplyConsumer(Given((0, 0), (0, 1), (1, 0), (0, 2), (1, 1)))
    await consumer.join(nothing, nothing)
    assert places(await consumer.fetch(1)) == [(0, 0)]
    consumer.pause(0)
    fetching = asyncio.create_task(consumer.fetch(1))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not fetching.done(), "the next record is of the partition that is paused"
    consumer.resume(0)
    assert places(await fetching) == [(0, 1)]
    consumer.pause(0)
    assert places(await consumer.fetch(4)) == [(1, 0), (1, 1)]
    assert consumer.lag() == {0: 1, 1: 0}
    consumer.resume(0)
    assert places(await consumer.fetch(4)) == [(0, 2)]


# --- lines


async def read(
    data: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> tuple[list[tuple[int, bytes]], list[int]]:
    """Give the lines of a file with their numbers, and the numbers of those that are too long."""
    monkeypatch.setattr(lines, "LONGEST_LINE", 20)
    monkeypatch.setattr(lines, "_READ", 7)
    file, too_long = tmp_path / "lines", list[int]()
    file.write_bytes(data)
    supply = LineSupply(str(file), "t", too_long.append)
    found: list[tuple[int, bytes]] = []
    async with asyncio.timeout(10):
        while records := await supply.fetch(2):
            found += [(record.offset, record.value) for record in records]
    supply.close()
    return found, too_long


@pytest.mark.parametrize(
    ("data", "expected", "too_long"),
    [
        (b"", [], []),
        (b"1\n2\n", [(0, b"1"), (1, b"2")], []),
        (b"1\n2", [(0, b"1"), (1, b"2")], []),
        (b"\n\n1\r\n \n2\n", [(2, b"1\r"), (4, b"2")], []),
        (b"\xef\xbb\xbf1\n\xef\xbb\xbf2", [(0, b"1"), (1, b"\xef\xbb\xbf2")], []),
        (b"1\n" + b"x" * 100 + b"\n2\n", [(0, b"1"), (2, b"2")], [1]),
        (b"1\n" + b"x" * 100, [(0, b"1")], [1]),
        (b"x" * 30 + b"\n" + b"y" * 30 + b"\n3", [(2, b"3")], [0, 1]),
    ],
    ids=["empty", "lines", "no end", "blank", "mark", "long", "long end", "two long"],
)
async def test_lines_have_their_numbers(
    data: bytes,
    expected: list[tuple[int, bytes]],
    too_long: list[int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    assert await read(data, monkeypatch, tmp_path) == (expected, too_long)


async def test_a_result_is_stored_once_it_is_written(tmp_path: Path) -> None:
    file = tmp_path / "results"
    file.write_bytes(b"before\n")
    outlet = LineOutlet(str(file), io.BytesIO(), append=True)
    stored = [await outlet.publish(value, partition=0, key=None, headers=()) for value in (b"1", b'"\xe2\x80\xa8"')]
    assert not any(each.done() for each in stored)
    await asyncio.gather(*stored)
    assert file.read_bytes() == b'before\n1\n"\\u2028"\n'
    outlet.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="it is Linux's")
async def test_a_full_disk_ends_it_and_nothing_counts_as_written() -> None:
    outlet = LineOutlet("/dev/full", io.BytesIO())
    stored = await outlet.publish(b"1", partition=0, key=None, headers=())
    with pytest.raises(BrokerError, match="nothing more can be written"):
        await stored
    with pytest.raises(OSError, match="No space left"):
        await outlet.broken
    with pytest.raises(BrokerError, match="nothing more can be written"):
        await outlet.publish(b"2", partition=0, key=None, headers=())
    with pytest.raises(OSError, match="No space left"):
        outlet.close()


# --- the command line


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["replay", "--from", "soon"], "--from should be an offset, .+"),
        (["replay", "--from", "0", "--to", "x:1"], "--to should be an offset, .+"),
        (["replay"], r"Missing option '--from'\. .+"),
        (["replay", "--from", "0", "--partition", "-1"], "Invalid value for '--partition': .+"),
        (["replay", "--from", "0", "--sink", "a", "--output", "b"], ".+: say --sink or --output, not both"),
        (["replay", "--from", "0", "--append"], "--append goes with the name of a file, --output FILE"),
        (["replay", "--from", "0", "--sink", "a b"], r"--sink\('a b'\): a topic is named by .+"),
        (["replay", "--from", "0", *["--sink", "a"] * 3], "--sink names 3 topics for the 2 sinks tickets.told, .+"),
        (["replay", "--from", "0", "--format", "xml"], "there is no format `xml`: use one of json, .+"),
        (["replay", "--from", "0", "--chainlet", "Loud"], "Loud has no source: name a topic with --topic"),
        (["replay", "--from", "0", "--chainlet", "No"], ".+Retell.+"),
        (["replay", "--from", "0", "--topic", "a/b"], r"Source\('a/b'\): a topic is named by .+"),
        (["replay", "--from", "0", "--broker", "memory://"], "memory:// lives in one process, .+"),
        (["run", "--output", "x"], "--chainlet and --output are of events: name a file .+"),
        (["run", "--source", "-", "--port", "0"], "--port does not go with --source, .+"),
        (["run", "--source", "-", "--broker", "memory://"], "--broker does not go with --source, .+"),
        (["run", "--source", "/no/such/file"], "/no/such/file can't be read: No such file or directory"),
        (["run", "--source", str(HERE)], ".+ can't be read: Is a directory"),
        (["run", "--source", RETOLD, "--output", RETOLD], ".+ is the --source itself"),
        (["run", "--source", RETOLD, "--output", str(HERE)], ".+ can't be written: Is a directory"),
    ],
)
def test_a_mistake_is_told_in_a_line(
    arguments: list[str], told: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHAINS_BROKER", "kafka://127.0.0.1:1")
    command, *more = arguments
    status = cli.main([command, RETOLD, *more])
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("running ")]
    assert (status, len(lines)) == (2, 1), lines
    assert re.fullmatch(f"error: {told}", lines[0]), lines


def fed_chain() -> Chain:
    """A Chain whose entrypoint has no source, and calls two that have."""

    class One(chains.ChainletBase):
        source = chains.Source("one", key=len, retries=7, delivery="exactly_once")
        sink = chains.Sink("one.out", format="msgpack")

        async def run_remote(self, text: str) -> str:
            return text

    class Two(chains.ChainletBase):
        source = chains.Source("two", format="text")

        async def run_remote(self, text: str) -> None: ...

    class Top(chains.ChainletBase):
        def __init__(self, one: One = chains.depends(One), two: Two = chains.depends(Two)) -> None: ...

        async def run_remote(self, text: str) -> str:
            return text

    return Chain.of(Top)


def test_one_of_several_that_have_a_source_is_to_be_named() -> None:
    chain = fed_chain()
    with pytest.raises(ChainsUsageError, match="name one of One, Two with --chainlet"):
        chosen(chain, None)
    assert chosen(chain, "Two") is chain.find("Two")
    chain.find("Two").source = None  # type: ignore[attr-defined] # it is
    assert chosen(chain, None) is chain.find("One")
    chain.find("One").source = None  # type: ignore[attr-defined] # it is
    assert chosen(chain, None) is chain.entrypoint


def test_one_alone_is_fed_as_it_says_but_for_what_is_said_of_it() -> None:
    chain = fed_chain()
    feed = fed_alone(chain, chain.find("One"), Wanted(topic="again", lines=True))
    assert feed.source == chains.Source("again", key=len, retries=7)
    assert feed.sinks == (chains.Sink("one.out", format="json"),)
    assert chain.find("Two").source is None  # type: ignore[attr-defined] # it is
    feed = fed_alone(chain, chain.entrypoint, Wanted(topic="t", sinks=("a",), style="text"))
    assert (feed.source, feed.sinks) == (chains.Source("t", format="text"), (chains.Sink("a", format="text"),))


def test_one_whose_events_all_fail_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Away(chains.ChainletBase):
        async def run_remote(self, text: str) -> str:
            raise ConnectionRefusedError(f"nobody is there for {text}"[:15])

    monkeypatch.setattr(replaying, "LINES_PATIENCE", 0.2)
    file = tmp_path / "lines"
    file.write_text('"a"\n"b"\n', encoding="utf-8")
    settings = Settings(grace_period=1)
    with pytest.raises(ChainsRuntimeError, match=r"^no event has succeeded for 0\.2 s: nobody is there$"):
        replaying.run_lines(Chain.of(Away), str(file), None, None, settings)
    assert capfd.readouterr().err.splitlines()[-2:] == [
        "waiting, as no event succeeds: nobody is there",
        f"all lines before {file}:1 are done",
    ]


def test_those_that_fail_at_the_end_after_others_succeeded_are_told_and_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Picky(chains.ChainletBase):
        remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=4))
        source = chains.Source("t", retries=1)
        sink = chains.Sink("t.out")

        async def run_remote(self, text: str) -> str:
            if text.startswith("bad"):
                raise ConnectionRefusedError(f"nobody is there for {text}")
            return text

    monkeypatch.setattr(replaying, "LINES_PATIENCE", 0.2)
    file, results = tmp_path / "lines", tmp_path / "results"
    file.write_text('"a"\n"b"\n"bad c"\n"bad d"\n', encoding="utf-8")
    with pytest.raises(click.exceptions.Exit) as ended:
        replaying.run_lines(Chain.of(Picky), str(file), None, str(results), Settings(grace_period=1))
    told = capfd.readouterr().err.splitlines()
    assert ended.value.exit_code == 1
    assert sorted(told[-3:-1]) == [
        f"{file}:3: ConnectionRefusedError: nobody is there for bad c",
        f"{file}:4: ConnectionRefusedError: nobody is there for bad d",
    ]
    assert told[-1] == f"2 events done, 2 failed; 2 results written to {results}"
    assert sorted(results.read_text(encoding="utf-8").split()) == ['"a"', '"b"']
