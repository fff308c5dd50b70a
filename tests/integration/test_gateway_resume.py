"""Streams that are read again: from any point, by several readers, through another gateway, and when it is all gone."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from http import HTTPStatus
from typing import Any

import httpx
import pytest

import chains_stream as chains
from chains_stream.errors import GatewayError
from chains_stream.gateway.ids import Ids, RequestId, secret_of
from chains_stream.messages import new_id
from tests.sample import Seen
from tests.serving import Pause, Pieces, Say, Served, Slow, serving

WORDS = [f"word {number}" for number in range(40)]


def events(text: str) -> list[tuple[str, str, Any]]:
    """Give the events of a whole stream: kind, id, data."""
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.partition(": ")[::2] for line in block.split("\n") if line and not line.startswith(":"))
        if "data" in fields:
            found.append((fields.get("event", "message"), fields.get("id", ""), json.loads(fields["data"])))
    return found


async def replay(served: Served, request_id: str, after: int | None = None, **headers: str) -> httpx.Response:
    query = "" if after is None else f"?starting_after={after}"
    return await served.http.get(f"/async_request/{request_id}/events{query}", headers=headers)


async def test_a_stream_is_read_again_from_any_point() -> None:
    async with serving(Say) as served:
        answer = await served.call("text/event-stream", texts=WORDS)
        request_id = answer.headers["x-request-id"]
        whole = await replay(served, request_id)
        assert whole.headers["content-type"] == "text/event-stream"
        assert whole.text == answer.text, "to the byte"
        later = events((await replay(served, request_id, 37)).text)
        assert later == [("message", "38", "word 38"), ("message", "39", "word 39"), ("done", "", {"chunks": 40})]
        by_header = await replay(served, request_id, None, **{"last-event-id": "38"})
        assert [event[1] for event in events(by_header.text)] == ["39", ""]
        assert events((await replay(served, request_id, 39)).text) == [("done", "", {"chunks": 40})]
        assert events((await replay(served, request_id, 10**14)).text) == [("done", "", {"chunks": 40})]
        lines = await replay(served, request_id, 37, accept="application/x-ndjson")
        assert [json.loads(line) for line in lines.text.splitlines()] == ["word 38", "word 39"]


async def test_a_failure_is_read_again_too() -> None:
    async with serving(Say) as served:
        answer = await served.call("text/event-stream", texts=["a"], fail="no more")
        again = events((await replay(served, answer.headers["x-request-id"])).text)
        assert [event[0] for event in again] == ["message", "error"]
        assert again[1][2]["detail"] == "no more"


async def test_a_stream_is_read_while_it_runs_by_two_readers() -> None:
    async with serving(Pause) as served:
        arguments = {"name": "pair", "then": "pair goes on"}
        async with served.http.stream("POST", "/run_remote", json=arguments) as first:
            request_id = first.headers["x-request-id"]
            second = asyncio.create_task(replay(served, request_id))
            await Seen.until("pair waits")
            Seen.note("pair goes on")
            text = await first.aread()
            assert text == b"first\nlast\n"
            assert [event[2] for event in events((await second).text)] == ["first\n", "last\n", {"chunks": 2}]


async def test_another_gateway_reads_it() -> None:
    async with serving(Say) as served:
        answer = await served.call("text/event-stream", texts=WORDS)
        async with served.beside() as other:
            again = await replay(other, answer.headers["x-request-id"])
        assert again.text == answer.text


async def test_a_stream_of_which_the_client_left_is_kept_for_as_long_as_it_said() -> None:
    async with serving(Pause) as served:
        arguments = {"name": "kept", "then": "kept goes on"}
        async with served.http.stream("POST", "/run_remote", json=arguments, headers={"prefer": "resume=60"}) as answer:
            request_id = answer.headers["x-request-id"]
            assert await anext(answer.aiter_text()) == "first\n"
        second = asyncio.create_task(replay(served, request_id))
        await Seen.until("kept waits")
        Seen.note("kept goes on")
        assert [event[2] for event in events((await second).text)] == ["first\n", "last\n", {"chunks": 2}]


async def test_nobody_came_back_in_time() -> None:
    async with serving(Pause) as served:
        arguments = {"name": "forgotten", "then": "never"}
        async with served.http.stream(
            "POST", "/run_remote", json=arguments, headers={"prefer": "resume=0.2"}
        ) as answer:
            request_id = answer.headers["x-request-id"]
            assert await anext(answer.aiter_text()) == "first\n"
        await Seen.until("forgotten closed")
        again = events((await replay(served, request_id)).text)
        assert [event[0] for event in again] == ["message", "error"]
        assert again[1][2]["code"] == "cancelled"


async def test_a_reader_that_came_back_keeps_it_alive() -> None:
    async with serving(Pause) as served:
        arguments = {"name": "saved", "then": "saved goes on"}
        async with served.http.stream("POST", "/run_remote", json=arguments, headers={"prefer": "resume=1"}) as answer:
            request_id = answer.headers["x-request-id"]
            assert await anext(answer.aiter_text()) == "first\n"
        async with served.http.stream("GET", f"/async_request/{request_id}/events") as again:
            chunks = again.aiter_text()
            assert "retry" in await anext(chunks)
            await asyncio.sleep(1.5)  # longer than it is kept without a reader: that nothing happens takes time
            assert Seen.counts["saved closed"] == 0
            Seen.note("saved goes on")
            rest = "".join([part async for part in chunks])
        assert "event: done" in rest


async def test_a_stream_larger_than_its_window_goes_on_for_the_reader_that_resumes() -> None:
    """The worker stops where its reader is gone; the one that comes gives it credit again."""
    async with serving(Pieces, stream_window=64, stream_window_bytes=64 << 10, grace_period=0.5) as served:
        data = "QUJD" * 100
        arguments = {"data": data, "size": 3, "repeat": 50, "name": "large"}
        async with served.beside() as other:
            async with other.http.stream(
                "POST", "/run_remote", json=arguments, headers={"accept": "text/event-stream"}
            ) as answer:
                request_id = answer.headers["x-request-id"]
                chunks = answer.aiter_bytes()
                await anext(chunks)
                await other.server.stop()
            again = events((await replay(served, request_id)).text)
        assert again[-1] == ("done", "", {"chunks": 5_000})
        assert [int(event[1]) for event in again[:-1]] == list(range(5_000))


async def test_a_slow_reader_falls_behind_and_misses_nothing() -> None:
    async with serving(Pieces, stream_window=32, stream_window_bytes=32 << 10) as served:
        arguments = {"data": "QUJD" * 2_000, "size": 300, "repeat": 100, "name": "long"}
        answer = await served.call("text/event-stream", **arguments)
        request_id = answer.headers["x-request-id"]
        async with served.connect(narrow=True) as client:
            path = f"/async_request/{request_id}/events"
            await client.send_raw(f"GET {path} HTTP/1.1\r\nhost: t\r\nconnection: close\r\n\r\n".encode())
            await client.read_until(b"id: 0\n")
            rest = await client.read_all()
        assert b"id: 1999\n" in rest
        assert b'event: done\ndata: {"chunks":2000}' in rest


@pytest.mark.parametrize("change", ["", "A" * 48, "nothing", "%00", "x" * 49])
async def test_an_id_that_is_none_is_not_found(change: str) -> None:
    async with serving(Say) as served:
        for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/events")):
            response = await served.http.request(method, f"/async_request/{change}{path}")
            assert response.status_code == HTTPStatus.NOT_FOUND
            assert response.headers["content-type"] == "application/problem+json"


async def test_a_wrong_position_is_named() -> None:
    async with serving(Say) as served:
        request_id = (await served.call(texts=["a"])).headers["x-request-id"]
        for wrong in ("-1", "two", "1.5", "9" * 16, "\u0661"):
            response = await served.http.get(f"/async_request/{request_id}/events", params={"starting_after": wrong})
            assert response.status_code == HTTPStatus.BAD_REQUEST
            assert response.json()["code"] == "invalid-position"


async def test_what_the_log_no_longer_holds_is_gone() -> None:
    async with serving(Say) as served:
        request_id = (await served.call(texts=["a"])).headers["x-request-id"]
        topic = f"{served.settings.namespace}.replies"
        await served.broker.delete_before(topic, {0: await served.broker.end_offset(topic, 0)})
        for path in ("", "/events"):
            response = await served.http.get(f"/async_request/{request_id}{path}")
            assert response.status_code == HTTPStatus.GONE
            assert response.json()["code"] == "gone"


@pytest.mark.parametrize("kind", ["replies", "results"])
@pytest.mark.parametrize(("partition", "offset"), [(0, 10**9), (999, 0)])
async def test_an_id_from_before_the_log_was_made_anew_is_gone(kind: str, partition: int, offset: int) -> None:
    async with serving(Say) as served:
        old = Ids(secret_of(served.settings), served.topic).mint(RequestId(kind, partition, offset, new_id()), "")
        for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/events")):
            response = await served.http.request(method, f"/async_request/{old}{path}")
            assert response.status_code == HTTPStatus.GONE
            assert response.json()["code"] == "gone"


async def test_a_result_can_be_had_as_events() -> None:
    async with serving(Slow) as served:
        asked = asyncio.create_task(served.call(name="one"))
        await Seen.until("one began")
        Seen.note("go")
        request_id = (await asked).headers["x-request-id"]
        again = events((await replay(served, request_id)).text)
        assert again == [("message", "0", "one"), ("done", "", {"chunks": 1})]
        report = (await served.http.get(f"/async_request/{request_id}")).json()
        assert (report["status"], report["result"]) == ("SUCCEEDED", "one")


class Endless(chains.ChainletBase):
    """Streams until it is stopped."""

    async def run_remote(self, name: str) -> AsyncIterator[int]:
        number = 0
        try:
            while True:
                yield number
                number += 1
                await asyncio.sleep(0.01)
        finally:
            Seen.note(f"{name} closed")


async def test_a_stream_is_cancelled_by_its_id() -> None:
    async with (
        serving(Endless) as served,
        served.http.stream("POST", "/run_remote", json={"name": "endless"}) as answer,
    ):
        request_id = answer.headers["x-request-id"]
        lines = answer.aiter_lines()
        await anext(lines)
        gone = await served.http.delete(f"/async_request/{request_id}")
        assert gone.json() == {"request_id": request_id, "status": "CANCELED", "canceled": True}
        assert [line async for line in lines][-1].startswith('{"error":{"title":"Request Cancelled"')
        await Seen.until("endless closed")
        again = await served.http.delete(f"/async_request/{request_id}")
        assert again.json()["canceled"] is False


async def test_a_client_in_python_goes_on_by_itself_when_its_gateway_is_replaced() -> None:
    async with AsyncExitStack() as stack:
        served = await stack.enter_async_context(serving(Pause, grace_period=0.2))
        first = await stack.enter_async_context(served.beside())
        pause = await stack.enter_async_context(chains.connect(first.url, Pause))
        chunks = []
        async for chunk in pause.run_remote("moved", then="moved goes on"):
            chunks.append(chunk)
            if len(chunks) == 1:
                await first.server.stop()
                await stack.enter_async_context(served.beside(int(first.url.rpartition(":")[2])))
                Seen.note("moved goes on")
        assert chunks == ["first\n", "last\n"]


async def test_a_client_in_python_has_a_key() -> None:
    entry = "alice:" + hashlib.sha256(b"ck_alice").hexdigest()
    async with serving(Say, api_keys=entry) as served:
        async with chains.connect(served.url, Say, api_key="ck_alice") as say:
            assert [chunk async for chunk in say.run_remote(["a", "b"])] == ["a", "b"]
        async with chains.connect(served.url, Say) as say:
            with pytest.raises(GatewayError, match="401"):
                [chunk async for chunk in say.run_remote(["a"])]
