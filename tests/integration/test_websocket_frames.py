"""RFC 6455 as the gateway speaks it: handshakes and frames, from a client that sends what it likes."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Literal

import pytest
import uvicorn
import uvloop
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from chains_stream.gateway import websocket as gateway_websocket
from chains_stream.gateway import websocket_session
from chains_stream.gateway.app import Gateway
from tests.sample import Seen
from tests.serving import RawClient, Served, request_log, serving
from tests.websockets import BINARY, CLOSE, OPENING, PING, PONG, TEXT, Frames, Talk, talk

LIMIT = 100_000  # bytes of a message
CONTINUATION = 0x0
LARGE, HEAD = 16_000_000, 10  # bytes of a message, more than sockets buffer, and of its head


@pytest.fixture(autouse=True)
def nothing_seen() -> Iterator[None]:
    Seen.reset()
    yield
    Seen.reset()


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving(Talk, max_body_bytes=LIMIT) as running:
        yield running


@pytest.fixture
async def client(served: Served) -> AsyncIterator[Frames]:
    async with Frames(served.url) as connected:
        yield connected


# --- handshakes


async def test_the_token_is_that_of_the_rfc(client: Frames) -> None:
    await client.send_raw((OPENING % b"").replace(b"AAAAAAAAAAAAAAAAAAAAAA==", b"dGhlIHNhbXBsZSBub25jZQ=="))
    head = (await client.read_until(b"\r\n\r\n")).lower()
    assert head.startswith(b"http/1.1 101 switching protocols\r\n")
    assert b"\r\nsec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n".lower() in head
    assert b"\r\nupgrade: websocket\r\n" in head
    assert b"\r\nx-request-id: " in head
    assert b"sec-websocket-extensions" not in head


@pytest.mark.parametrize(
    ("wrong", "right", "status"),
    [
        (b"upgrade: websocket\r\n", b"", 426),
        (b"upgrade: websocket", b"upgrade: h2c", 426),
        (b"connection: Upgrade", b"connection: keep-alive", 426),
        (b"version: 13", b"version: 8", 426),
        (b"AAAAAAAAAAAAAAAAAAAAAA==", b"short", 400),
        (b"AAAAAAAAAAAAAAAAAAAAAA==", b"", 400),
        (b"HTTP/1.1", b"HTTP/1.0", 400),
        (b"\r\n\r\n", b"\r\ncontent-length: 5\r\n\r\nhello", 413),
        (b"\r\n\r\n", b"\r\nx-request-timeout: soon\r\n\r\n", 400),
    ],
)
async def test_what_is_no_handshake(client: Frames, wrong: bytes, right: bytes, status: int) -> None:
    await client.send_raw((OPENING % b"").replace(wrong, right))
    answer = await client.read_answer()
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert b"application/problem+json" in answer
    if status == 426:
        assert b"\r\nsec-websocket-version: 13\r\n" in answer


async def test_a_connection_can_be_used_before_and_is_closed_behind(client: Frames) -> None:
    await client.send_raw(b"GET /healthz HTTP/1.1\r\nhost: t\r\n\r\n")
    assert (await client.read_answer()).startswith(b"HTTP/1.1 200 ")
    await client.open(b"do=push&count=1&size=1")
    assert await client.read_frame() == (TEXT, b"0")
    assert await client.read_frame() == (CLOSE, (1000).to_bytes(2, "big"))
    await client.send_frame(CLOSE, (1000).to_bytes(2, "big"))
    assert await client.read_all() == b""


async def test_frames_sent_ahead_of_the_answer_are_refused(client: Frames) -> None:
    await client.send_raw(OPENING % b"" + b"GET /healthz HTTP/1.1\r\nhost: t\r\n\r\n")
    assert (await client.read_until(b"\r\n\r\n")).startswith(b"HTTP/1.1 400 ")
    await Seen.until("talk ended")


# --- frames


async def test_fragments_are_one_message(client: Frames) -> None:
    await client.open()
    text = "Grüße 茶".encode()
    await client.send_frame(TEXT, text[:3], final=False)  # in the middle of a character
    await client.send_frame(PING, b"between")
    await client.send_frame(CONTINUATION, b"", final=False)
    await client.send_frame(CONTINUATION, text[3:])
    assert await client.read_frame() == (PONG, b"between")
    assert await client.read_frame() == (TEXT, text)
    await client.send_frame(BINARY, b"a", final=False)
    await client.send_frame(CONTINUATION, b"b")
    assert await client.read_frame() == (BINARY, b"ab")


async def test_a_message_that_arrives_byte_by_byte(client: Frames) -> None:
    await client.open()
    for byte in b"\x81\x83\x00\x00\x00\x00abc":
        await client.send_raw(bytes([byte]))
        await asyncio.sleep(0)
    assert await client.read_frame() == (TEXT, b"abc")


async def test_the_closing_handshake(client: Frames) -> None:
    await client.open()
    await client.send_frame(CLOSE, (4001).to_bytes(2, "big") + b"lunch")
    assert await client.read_close() == (4001, "lunch")
    assert await client.read_all() == b""
    await Seen.until("talk left 4001 lunch")


async def test_a_close_without_a_code(client: Frames) -> None:
    await client.open()
    await client.send_frame(CLOSE, b"")
    assert (await client.read_close())[0] == 1000
    await Seen.until("talk left 1005")


async def test_a_connection_whose_sending_side_is_shut_down(client: Frames) -> None:
    await client.open()
    client.writer.write_eof()
    assert await client.read_all() == b""
    await Seen.until("talk left 1006")


BAD = [
    ("not masked", [(TEXT, b"hi", True, False)], 1002),
    ("no such opcode", [(0x3, b"hi", True, True)], 1002),
    ("a reserved bit", [(TEXT | 0x40, b"hi", True, True)], 1002),
    ("a continuation of nothing", [(CONTINUATION, b"hi", True, True)], 1002),
    ("a message within a message", [(TEXT, b"hi", False, True), (TEXT, b"hi", True, True)], 1002),
    ("a control frame in parts", [(PING, b"", False, True)], 1002),
    ("a control frame too large", [(PING, bytes(126), True, True)], 1002),
    ("a code that is none", [(CLOSE, b"\x03\xee", True, True)], 1002),
    ("half a code", [(CLOSE, b"\x03", True, True)], 1002),
    ("text that is not UTF-8", [(TEXT, b"\xff", True, True)], 1007),
    ("text that ends in the middle of a character", [(TEXT, b"\xc3", True, True)], 1007),
    ("a reason that is not UTF-8", [(CLOSE, b"\x03\xe8\xff", True, True)], 1007),
    ("a message too large", [(BINARY, bytes(LIMIT + 1), True, True)], 1009),
    ("parts too large", [(BINARY, bytes(LIMIT), False, True), (CONTINUATION, b"1", True, True)], 1009),
    ("text too large", [(TEXT, "ü".encode() * (LIMIT // 2 + 1), True, True)], 1009),
]


@pytest.mark.parametrize(("frames", "code"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
async def test_bad_frames(client: Frames, frames: list[tuple[int, bytes, bool, bool]], code: int) -> None:
    await client.open()
    await client.send_frame(TEXT, b"before")
    assert await client.read_frame() == (TEXT, b"before")
    for opcode, data, final, masked in frames:
        await client.send_frame(opcode, data, final=final, masked=masked)
    assert (await client.read_close())[0] == code
    await client.send_frame(CLOSE, b"")
    assert await client.read_all() == b""
    await Seen.until("talk ended")
    assert any(what.startswith(f"talk left {code}") for what in Seen.counts)


async def test_a_message_of_just_the_limit(client: Frames) -> None:
    await client.open()
    await client.send_frame(BINARY, bytes(LIMIT))
    assert await client.read_frame() == (BINARY, bytes(LIMIT))


async def test_a_flood_of_pings_costs_nothing(client: Frames) -> None:
    await client.open()
    for number in range(5_000):
        await client.send_frame(PING, b"%d" % number)
    await client.send_frame(TEXT, b"after")
    found = [await client.read_frame()]
    while found[-1][0] != TEXT:
        found.append(await client.read_frame())
    assert found[-1] == (TEXT, b"after")
    assert found[-2] == (PONG, b"4999")


@pytest.mark.parametrize(
    "flood",
    [b"\x89\x80" + bytes(4), b"\x00\x80" + bytes(4), b"\x81\x80" + bytes(4)],
    ids=["pings", "fragments", "messages"],
)
async def test_a_flood_of_empty_frames_keeps_others_from_nothing(client: Frames, flood: bytes) -> None:
    """What a socket gives at once holds 40,000 of them, and they take a second to read."""
    await client.open(b"do=listen")
    if flood[0] == CONTINUATION:
        await client.send_frame(TEXT, b"", final=False)
    clock = asyncio.get_running_loop().time
    client.writer.write(flood * 100_000)
    longest, end = 0.0, clock() + 2
    while (now := clock()) < end:
        await asyncio.sleep(0)
        longest = max(longest, clock() - now)
    assert longest < 0.5
    assert not Seen.counts["talk ended"]


async def test_pings_are_sent_and_a_client_that_answers_none_is_lost(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(websocket_session, "BEAT", 0.1)
    monkeypatch.setattr(websocket_session, "SILENCE", 0.2)
    async with Frames(served.url) as silent, talk(served, name="alive", do="hang") as alive:
        await silent.open(b"name=silent&do=echo")
        assert (await silent.read_frame())[0] == PING
        assert (await silent.read_close())[0] == 1011
        await Seen.until("silent left 1006 the client answered no ping")
        assert await alive.recv() == "hanging"
        assert not Seen.counts["alive ended"]  # it has answered all of them
        await (await alive.ping())


def test_no_ping_is_sent_to_who_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it sent before is still on its way to a worker that takes nothing; the command's loop minds such writing."""
    monkeypatch.setattr(websocket_session, "BEAT", 0.02)
    monkeypatch.setattr(gateway_websocket, "LINGER", 0.5)
    faults: list[str] = []

    async def leave() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(str(context)))
        with request_log() as log:
            async with serving(Talk) as served, talk(served, do="hang") as client:
                await client.recv()
                for _ in range(3_000):
                    await client.send("more than there is room for")
                client.transport.abort()
                await log.wait()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(leave())
    assert not faults


async def test_a_ping_is_answered_once_a_client_has_read_what_it_was_sent_before(client: Frames) -> None:
    """Though the worker sends nothing more: the client would take the gateway for dead."""
    await client.open(b"do=push_and_wait&size=%d" % LARGE)
    await client.reader.readexactly(HEAD)  # of a message that is on its way
    await client.send_frame(PING, b"there?")
    await client.send_frame(TEXT, b"go on")
    await Seen.until("got go on")  # so the ping was read
    await client.reader.readexactly(LARGE)
    assert await client.read_frame() == (PONG, b"there?")


async def test_a_client_that_is_busy_reading_is_not_lost(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no chance to answer a ping: one stands behind all that was sent before."""
    monkeypatch.setattr(websocket_session, "BEAT", 0.3)
    monkeypatch.setattr(websocket_session, "SILENCE", 1.0)
    async with Frames(served.url, narrow=True) as client:
        await client.open(b"name=slow&do=push_and_wait&size=%d" % LARGE)
        while (await client.reader.readexactly(2))[0] & 0xF == PING:
            pass
        await client.reader.readexactly(HEAD - 2)
        for _ in range(40):
            await client.reader.readexactly(LARGE // 40)
            await asyncio.sleep(0.05)  # which makes 2 seconds at least
        assert (await client.read_frame())[0] == PING
        assert not Seen.counts["slow ended"]


async def test_what_all_hold_is_bounded() -> None:
    async with (
        serving(Talk, max_body_bytes=LIMIT, max_buffered_bytes=LIMIT) as served,
        Frames(served.url) as first,
        Frames(served.url) as second,
    ):
        await first.open(b"name=first&do=echo")
        await first.send_frame(BINARY, bytes(LIMIT - 10), final=False)
        await first.send_frame(PING, b"")
        assert await first.read_frame() == (PONG, b"")
        await second.open(b"name=second&do=echo")
        await second.send_frame(BINARY, bytes(1_000), final=False)
        assert (await second.read_close())[0] == 1013
        await first.send_frame(CONTINUATION, b"")
        assert await first.read_frame() == (BINARY, bytes(LIMIT - 10))


# --- another server


@pytest.mark.parametrize("ws", ["none", "wsproto"])
async def test_another_asgi_server_refuses_clearly(ws: Literal["none", "wsproto"]) -> None:
    async with serving(Talk) as served:
        gateway = Gateway(served.chain, served.caller, served.broker, served.settings)
        await gateway.start()
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen()
            server = uvicorn.Server(uvicorn.Config(gateway.app, lifespan="off", log_config=None, ws=ws))
            running = asyncio.create_task(server._serve(sockets=[listening]))
            try:
                with pytest.raises(InvalidStatus) as refused:
                    await connect(f"ws://127.0.0.1:{listening.getsockname()[1]}/websocket", proxy=None).__aenter__()
            finally:
                server.should_exit = True
                await running
                await gateway.close()
        assert refused.value.response.status_code == 501
        assert b"chains gateway" in (refused.value.response.body or b"")


async def test_a_reset_in_the_middle_of_a_message(served: Served) -> None:
    async with Frames(served.url) as client:
        await client.open()
        await client.send_frame(TEXT, b"half", final=False)
        await RawClient.leave(client)
        await Seen.until("talk left 1006")
