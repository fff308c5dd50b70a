"""Readers of one stream beside each other: none holds another up, fills another's memory, or takes its answer away."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

import chains_stream as chains
from chains_stream.calls import Call
from chains_stream.chainlet import signature
from chains_stream.codec import codec_of
from chains_stream.control import Message, Reading
from chains_stream.gateway.ids import Ids, RequestId, secret_of
from chains_stream.messages import new_id, now_ms
from chains_stream.policy import Scope
from tests.sample import Seen
from tests.serving import WAIT, Pause, Pieces, Say, Served, serving


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    Seen.reset()


async def open_call(served: Served, **arguments: Any) -> tuple[Call, str]:
    """Make a request whose reader takes nothing, as one whose gateway was killed; give its id too."""
    caller, correlation_id = served.caller, new_id()
    where = RequestId("replies", *caller.reply_position(), correlation_id)
    scope = Scope(request_id="abandoned", deadline_ms=now_ms() + 60_000)
    body = codec_of(signature(served.chain.entrypoint)).encode_arguments((), arguments)
    call = await caller.open(served.topic, body, scope, correlation_id=correlation_id)
    return call, Ids(secret_of(served.settings), served.topic).mint(where, "")


async def test_a_reader_that_has_all_that_was_sent_gets_the_rest() -> None:
    """Its worker waits for whoever read before to say so, and that one is gone."""
    async with serving(Say, stream_window=16) as served:
        words = [f"w{number}" for number in range(40)]
        call, request_id = await open_call(served, texts=words)
        async with asyncio.timeout(WAIT):
            while call.chunks < 16:
                await call._wait()
        path = f"/async_request/{request_id}/events?starting_after=15"
        rest = await served.http.get(path, headers={"accept": "application/x-ndjson"}, timeout=5)
        assert rest.text.split() == [f'"{word}"' for word in words[16:]]
        call.close()


async def test_a_reader_that_came_before_the_client_left_keeps_it_alive() -> None:
    async with serving(Pause) as served:
        heard = asyncio.Event()

        def hear(message: Message) -> None:
            if isinstance(message, Reading) and message.here:
                heard.set()

        await served.caller.control.follow({served.topic: hear})
        arguments = {"name": "shared", "then": "shared goes on"}
        async with served.http.stream("POST", "/run_remote", json=arguments, headers={"prefer": "resume=0.3"}) as first:
            request_id = first.headers["x-request-id"]
            second = asyncio.create_task(served.http.get(f"/async_request/{request_id}/events"))
            await asyncio.wait_for(heard.wait(), WAIT)
            await Seen.until("shared waits")
        await asyncio.sleep(1)  # longer than it is kept without a reader: that nothing happens takes time
        Seen.note("shared goes on")
        assert (await second).text.endswith('event: done\ndata: {"chunks":2}\n\n')


async def test_too_many_that_are_kept_are_cancelled() -> None:
    async with serving(Pause, max_requests=1) as served:
        for name in ("one", "two"):
            arguments = {"name": name, "then": "never"}
            async with served.http.stream(
                "POST", "/run_remote", json=arguments, headers={"prefer": "resume=60"}
            ) as answer:
                assert await anext(answer.aiter_text()) == "first\n"
        await Seen.until("two closed")
        assert Seen.counts["one closed"] == 0


async def test_a_quick_reader_does_not_fill_the_memory_of_a_slow_one() -> None:
    async with serving(Pieces, stream_window=16, stream_window_bytes=64 << 10) as served:
        arguments = {"data": "QUJD" * 1_000, "size": 300, "repeat": 200, "name": "long"}
        async with served.connect(narrow=True) as slow:
            await slow.send(arguments, "accept: text/event-stream", "connection: close")
            head = (await slow.read_until(b"\r\n\r\n")).decode()
            request_id = next(line for line in head.split("\r\n") if line.startswith("x-request-id")).split(": ")[1]
            [call] = served.caller._calls.values()
            quick = await served.http.get(f"/async_request/{request_id}/events")
            assert 'event: done\ndata: {"chunks":2000}' in quick.text
            assert len(call._chunks) <= 128, "of 2,000"
            rest = (await slow.read_all()).decode()
        found = [line for line in rest.split("\n") if line.startswith("id: ")]
        assert found == [f"id: {number}" for number in range(2_000)]
        assert 'event: done\ndata: {"chunks":2000}' in rest


async def test_asking_how_it_stands_does_not_take_chunks_for_the_reader() -> None:
    async with serving(Pieces, stream_window=16, stream_window_bytes=64 << 10) as served:
        call, request_id = await open_call(served, data=b"abc" * 1000, size=30, repeat=20)
        async with asyncio.timeout(WAIT):
            while call.chunks < 16:
                await call._wait()
        report = await served.http.get(f"/async_request/{request_id}", headers={"prefer": "wait=1"})
        assert report.json()["status"] == "IN_PROGRESS"
        assert call.chunks == 16
        call.close()


class Anew(chains.ChainletBase):
    """A stream whose first try fails after many chunks."""

    async def run_remote(self, chunks: int) -> AsyncIterator[int]:
        Seen.note("run")
        run = Seen.counts["run"]
        for _ in range(chunks):
            yield run
        if run == 1:
            raise ValueError("once")


async def test_a_stream_that_was_tried_again_is_collected_as_it_ended() -> None:
    async with serving(Anew, stream_window=16) as served:
        retry = {"max_attempts": 2, "initial_delay_ms": 0, "max_delay_ms": 0}
        body = {"model_input": {"chunks": 100}, "inference_retry_config": retry}
        request_id = (await served.http.post("/async_run_remote", json=body)).json()["request_id"]
        report = await served.http.get(f"/async_request/{request_id}", headers={"prefer": "wait=20"})
        assert report.json().get("result") == [2] * 100, report.text
        events = await served.http.get(f"/async_request/{request_id}/events")
        assert events.text.count("data: 2\n") == 100
        assert "data: 1\n" not in events.text
        assert events.text.endswith('event: done\ndata: {"chunks":100}\n\n')
