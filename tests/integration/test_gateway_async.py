"""Requests that nobody waits for: made, asked about, cancelled; their states, priorities and retries."""

import asyncio
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Any

import pytest

import chains_stream as chains
from tests.sample import Seen
from tests.serving import Count, Greet, Pause, Say, Served, Slow, problem_of, serving


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    Seen.reset()


async def submit(served: Served, body: dict[str, Any], **headers: str) -> str:
    answer = await served.http.post("/async_run_remote", json=body, headers=headers)
    assert answer.status_code == HTTPStatus.ACCEPTED, answer.text
    request_id: str = answer.json()["request_id"]
    assert answer.json()["status"] == "QUEUED"
    assert answer.headers["location"] == f"/async_request/{request_id}"
    assert answer.headers["x-request-id"] == request_id
    assert int(answer.headers["retry-after"]) >= 1
    return request_id


async def report(served: Served, request_id: str, wait: float = 0) -> dict[str, Any]:
    headers = {"prefer": f"wait={wait}"} if wait else {}
    answer = await served.http.get(f"/async_request/{request_id}", headers=headers)
    assert answer.status_code == HTTPStatus.OK, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def until(served: Served, request_id: str, status: str) -> dict[str, Any]:
    """Ask until a request has come to a status that nothing tells of."""
    async with asyncio.timeout(20):
        while (found := await report(served, request_id))["status"] != status:
            pass
    return found


@pytest.mark.parametrize("body", [{"name": "Ada"}, {"model_input": {"name": "Ada"}}])
async def test_a_plain_body_and_that_of_baseten(body: dict[str, Any]) -> None:
    async with serving(Greet) as served:
        request_id = await submit(served, body)
        assert await report(served, request_id, 20) == {
            "request_id": request_id,
            "status": "SUCCEEDED",
            "events": f"/async_request/{request_id}/events",
            "result": "Hello, Ada!",
        }


async def test_it_is_queued_then_in_progress_then_done() -> None:
    async with serving(Slow, workers=False) as served:
        request_id = await submit(served, {"name": "one"})
        assert (await report(served, request_id))["status"] == "QUEUED"
        assert (await report(served, request_id, 0.2))["status"] == "QUEUED", "it waited, and nothing came"
        await served.host()
        await Seen.until("one began")
        await until(served, request_id, "IN_PROGRESS")
        waiting = asyncio.create_task(report(served, request_id, 20))
        Seen.note("go")
        assert (await waiting)["result"] == "one"


async def test_another_gateway_that_starts_later_knows_it() -> None:
    async with serving(Greet) as served:
        request_id = await submit(served, {"name": "Ada"})
        await report(served, request_id, 20)
        async with served.beside() as other:
            assert (await report(other, request_id))["result"] == "Hello, Ada!"


async def test_a_stream_is_collected_and_can_be_read_as_events() -> None:
    async with serving(Say) as served:
        request_id = await submit(served, {"texts": ["a", "b"]})
        assert (await report(served, request_id, 20))["result"] == ["a", "b"]
        events = await served.http.get(f"/async_request/{request_id}/events", params={"starting_after": 0})
        assert events.text.endswith('id: 1\ndata: "b"\n\nevent: done\ndata: {"chunks":2}\n\n')


async def test_a_failure_is_told_with_its_error() -> None:
    async with serving(Say) as served:
        found = await report(served, await submit(served, {"texts": ["a"], "fail": "no more"}), 20)
        assert (found["status"], found["error"]["detail"]) == ("FAILED", "no more")
        assert found["error"]["error"]["exception_cls_name"] == "ValueError"


async def test_what_waits_is_cancelled_and_never_begun() -> None:
    async with serving(Slow) as served:
        first, second = [await submit(served, {"name": name}) for name in ("first", "second")]
        await Seen.until("first began")
        gone = await served.http.delete(f"/async_request/{second}")
        assert gone.json() == {"request_id": second, "status": "CANCELED", "canceled": True}
        assert (await report(served, second))["status"] == "CANCELED"
        third = await submit(served, {"name": "third"})
        Seen.note("go")
        for request_id in (first, third):
            assert (await report(served, request_id, 20))["status"] == "SUCCEEDED"
        assert Seen.counts["second began"] == 0


async def test_what_runs_is_cancelled_where_it_runs() -> None:
    async with serving(Pause) as served:
        request_id = await submit(served, {"name": "running", "then": "never"})
        await Seen.until("running waits")
        assert (await served.http.delete(f"/async_request/{request_id}")).json()["canceled"] is True
        await Seen.until("running closed")
        assert (await report(served, request_id))["status"] == "CANCELED"
        assert (await served.http.delete(f"/async_request/{request_id}")).json()["canceled"] is False


async def test_what_has_ended_is_not_cancelled() -> None:
    async with serving(Greet) as served:
        request_id = await submit(served, {})
        await report(served, request_id, 20)
        gone = await served.http.delete(f"/async_request/{request_id}")
        assert gone.json() == {"request_id": request_id, "status": "SUCCEEDED", "canceled": False}


async def test_what_waits_for_too_long_is_not_begun() -> None:
    async with serving(Slow) as served:
        first = await submit(served, {"name": "first"})
        await Seen.until("first began")
        late = await submit(served, {"model_input": {"name": "late"}, "max_time_in_queue_seconds": 1})
        await asyncio.sleep(1.1)  # the time itself is what is tested
        Seen.note("go")
        await report(served, first, 20)
        found = await report(served, late, 20)
        assert (found["status"], found["error"]["code"]) == ("EXPIRED", "queue-expired")
        assert Seen.counts["late began"] == 0


async def test_an_ordinary_request_goes_before_those_of_the_background() -> None:
    async with serving(Slow) as served:
        held = await submit(served, {"name": "held"})
        await Seen.until("held began")
        behind = [
            await submit(served, {"model_input": {"name": f"behind {n}"}, "priority": 1 + n % 2}) for n in range(5)
        ]
        ahead = await submit(served, {"model_input": {"name": "ahead"}, "priority": 0})
        Seen.note("go")
        for request_id in (held, ahead, *behind):
            assert (await report(served, request_id, 20))["status"] == "SUCCEEDED"
        order = list(Seen.counts)
        assert order.index("ahead began") < min(order.index(f"behind {n} began") for n in range(5))


async def test_a_failure_is_tried_again() -> None:
    async with serving(Count) as served:
        retry = {"max_attempts": 3, "initial_delay_ms": 0, "max_delay_ms": 0}
        body = {"model_input": {"name": "flaky", "succeed_at": 3}, "inference_retry_config": retry}
        assert (await report(served, await submit(served, body), 20))["result"] == 3
        body = {"model_input": {"name": "hopeless", "succeed_at": 9}, "inference_retry_config": retry}
        assert (await report(served, await submit(served, body), 20))["status"] == "FAILED"
        assert Seen.counts["hopeless"] == 3


class Anew(chains.ChainletBase):
    """A stream that fails the first time."""

    async def run_remote(self) -> AsyncIterator[int]:
        Seen.note("run")
        run = Seen.counts["run"]
        yield run
        if run == 1:
            raise ValueError("once")
        yield run


async def test_a_stream_that_is_tried_again_begins_anew() -> None:
    async with serving(Anew) as served:
        retry = {"max_attempts": 2, "initial_delay_ms": 0, "max_delay_ms": 0}
        request_id = await submit(served, {"model_input": {}, "inference_retry_config": retry})
        assert (await report(served, request_id, 20))["result"] == [2, 2]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"model_input": {"name": 1}}, "name"),
        ({"model_input": {}, "priority": 3}, "priority"),
        ({"model_input": {}, "max_time_in_queue_seconds": 0}, "max_time_in_queue_seconds"),
        ({"model_input": {}, "max_time_in_queue_seconds": 72 * 3600 + 1}, "max_time_in_queue_seconds"),
        ({"model_input": {}, "inference_retry_config": {"max_attempts": 11}}, "max_attempts"),
        ({"model_input": {}, "webhook": "x"}, "webhook"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
async def test_a_wrong_request_is_refused_and_not_made(body: dict[str, Any], said: str) -> None:
    async with serving(Greet) as served:
        problem = problem_of(await served.http.post("/async_run_remote", json=body), HTTPStatus.BAD_REQUEST)
        assert said in problem["detail"]


async def test_how_much_waits() -> None:
    async with serving(Slow) as served:
        await submit(served, {"name": "one"})
        await Seen.until("one began")
        waiting = [await submit(served, {"name": f"n{n}"}) for n in range(3)]
        waiting += [await submit(served, {"model_input": {"name": "b"}, "priority": 2})]
        async with asyncio.timeout(20):
            while True:
                status = (await served.http.get("/async_queue_status")).json()
                if status == {"num_queued_requests": 4, "num_in_progress_requests": 1}:
                    break
        Seen.note("go")
        for request_id in waiting:
            await report(served, request_id, 20)


async def test_what_keeps_a_gateway_from_reading_a_result_is_no_part_of_it() -> None:
    async with serving(Greet, max_body_bytes=100_000, max_buffered_bytes=100_000) as served:
        request_id = await submit(served, {"name": "", "times": 10_000})
        assert len((await report(served, request_id, 20))["result"]) == 80_000
        async with served.connect() as other:
            head = ("POST /run_remote HTTP/1.1", "host: t", "content-type: application/json", "content-length: 90000")
            await other.send_raw(
                "\r\n".join([*head, "", ""]).encode() + b" " * 80_000
            )  # held for as long as the rest does not come
            async with asyncio.timeout(5):
                while (answer := await served.http.get(f"/async_request/{request_id}")).status_code == HTTPStatus.OK:
                    assert "error" not in answer.json(), "the request has succeeded"
        assert problem_of(answer, HTTPStatus.TOO_MANY_REQUESTS)["code"] == "overloaded"


async def test_a_gateway_that_hears_of_no_results_says_so() -> None:
    """As when the right to read them was taken from it: what it knows would stay as it is."""
    async with serving(Greet) as served:
        request_id = await submit(served, {})
        await report(served, request_id, 20)
        reader = served.gateway._past.results._reader
        assert reader is not None
        await reader.close()
        with pytest.raises(chains.BrokerError):
            await asyncio.wait_for(served.gateway.failed(), 20)
        problem_of(await served.http.get(f"/async_request/{request_id}"), HTTPStatus.SERVICE_UNAVAILABLE)
        health = await served.http.get("/healthz")
        assert health.status_code == HTTPStatus.SERVICE_UNAVAILABLE
        assert "results can't be read any more" in health.json()["reason"]
