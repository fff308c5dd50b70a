"""What the benchmarks measure with: right answers alone count, and streams are compared token by token."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import msgspec
import pytest

from benchmarks import driving, pacing
from benchmarks.bench import in_turn, shown_as
from benchmarks.chains.echo import Echo
from benchmarks.chains.tokens import Tokens
from benchmarks.driving import Step, WrongAnswerError
from benchmarks.http_client import Connection
from benchmarks.rivals import tokens
from chains_stream.chainlet import signature
from chains_stream.codec import codec_of
from chains_stream.gateway.streaming import Events

FEW = Step(in_flight=2, count=20, size=16, warm_up=0.0)


async def test_figures_of_calls() -> None:
    sent: list[str] = []

    async def call(text: str) -> str:
        sent.append(text)
        return text

    figures = await driving.measure(call, driving.text_payload, FEW)
    assert figures["calls"] == len(sent) == len(set(sent)) == 20
    assert {len(text) for text in sent} == {16}
    assert {"p50_s", "p99_s", "rate_per_s", "cpu_s_per_call"} <= figures.keys()


async def test_a_wrong_answer_fails_the_measurement() -> None:
    async def call(text: str) -> str:
        return text if text != driving.text_payload(7, 16) else "another"

    with pytest.raises(WrongAnswerError):
        await driving.measure(call, driving.text_payload, FEW)


async def test_an_open_loop_may_leave_calls_unanswered_but_not_answer_wrongly() -> None:
    async def call(_text: str) -> str:
        return "another"

    step = Step(in_flight=8, seconds=0.2, size=16, warm_up=0.0, rate=200.0)
    with pytest.raises(WrongAnswerError):
        await driving.measure(call, driving.text_payload, step)


def test_processor_time_of_a_process() -> None:
    before = driving.cpu_seconds([os.getpid()])
    until = time.process_time() + 0.05
    while time.process_time() < until:
        pass
    assert driving.cpu_seconds([os.getpid()]) > before


def test_systems_take_turns_in_being_first() -> None:
    assert [in_turn("abc", repeat)[0] for repeat in range(4)] == ["a", "b", "c", "a"]
    assert sorted(in_turn("abc", 2)) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("p50_s", 0.0015, "1.50 ms"),
        ("seconds_s", 2.5, "2.50 s"),
        ("rate_per_s", 1234.5, "1,234/s"),
        ("cpu_s_per_call", 0.00012, "120 µs"),
        ("rss_bytes", 56_300_000.0, "56.3 MB"),
        ("bytes_per_stream", 9_500.0, "9.5 KB"),
    ],
)
def test_figures_for_the_eye(name: str, value: float, shown: str) -> None:
    assert shown_as(name, value) == shown


def test_the_bare_server_streams_the_bytes_that_the_gateway_does() -> None:
    form = Events(codec_of(signature(Tokens)))
    chunks = [form.chunk(number, msgspec.msgpack.encode(tokens.token(number))) for number in range(3)]
    assert b"".join([form.head, *chunks, form.end(3)]) == b"".join(tokens.events(3))


async def test_the_measured_chainlets_answer() -> None:
    assert await Echo().run_remote("text") == "text"
    assert [text async for text in Tokens().run_remote(2)] == [tokens.token(0), tokens.token(1)]


# --- paced streams

ENGINE = pacing.Engine(count=3, first=0.0, interval=0.0)


def reading(*arrivals: tuple[float, Sequence[str]]) -> pacing.Read:
    async def read(_engine: pacing.Engine) -> AsyncIterator[tuple[float, list[str]]]:
        for moment, texts in arrivals:
            yield moment, list(texts)

    return read


async def test_a_stream_is_compared_with_its_engine_token_by_token() -> None:
    times = pacing.Times(0.0, 100.0)
    # The engine gave them at 1, 2 and 3 s; the last two arrived together.
    await times.follow(reading((1.5, ["1.0 0"]), (3.25, ["2.0 1", "3.0 2"])), ENGINE)
    assert list(times.transit) == [0.5, 1.25, 0.25]
    assert list(times.between) == [1.75, 0.0]
    assert list(times.added) == [0.75, 1.0]
    assert len(times.first) == 1


async def test_what_arrives_before_or_after_is_not_measured() -> None:
    times = pacing.Times(2.0, 3.0)
    await times.follow(reading((1.5, ["1.0 0"]), (2.5, ["2.0 1"]), (3.5, ["3.0 2"])), ENGINE)
    assert times.tokens == len(times.between) == 1
    assert not times.first


@pytest.mark.parametrize("texts", [["1.0 0", "2.0 1"], ["1.0 0", "2.0 2", "3.0 1"]])
async def test_a_stream_that_is_not_complete_and_in_order_fails(texts: list[str]) -> None:
    with pytest.raises(WrongAnswerError):
        await pacing.Times(0.0, 9.0).follow(reading((1.5, texts)), ENGINE)


async def test_the_engine_gives_all_its_tokens() -> None:
    given = [text.partition(" ")[2] async for text in pacing.generate(pacing.Engine(3, 0.001, 0.001))]
    assert given == ["0", "1", "2"]


# --- the HTTP client


@asynccontextmanager
async def answering(*pieces: bytes) -> AsyncIterator[Connection]:
    """Connect to a server that answers a request with these pieces, one by one, and then closes the connection."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server, Connection(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as connection:
        yield connection


CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


async def test_an_answer_in_pieces() -> None:
    async with answering(b"HTTP/1.1 200 OK\r\nconte", b"nt-length: 5\r\n\r\nhe", b"llo") as connection:
        assert await connection.post("/", b"{}") == b"hello"


async def test_a_stream_in_chunks_that_are_cut_anywhere() -> None:
    async with answering(CHUNKED + b"5\r\nhel", b"lo\r\n6\r\n", b" world\r\n0\r\n\r\n") as connection:
        pieces = [piece async for piece in connection.stream("/", b"{}")]
        assert b"".join(pieces).endswith(b"0\r\n\r\n")
        assert connection.body() == b"hello world"


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n", CHUNKED + b"5\r\nhello\r\n"]
)
async def test_a_failure_and_a_broken_stream_fail(answer: bytes) -> None:
    async with answering(answer) as connection:
        with pytest.raises(WrongAnswerError):
            async for _ in connection.stream("/", b"{}"):
                pass
