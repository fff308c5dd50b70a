"""Requests with an idempotency key: of those with one key one runs, through whichever gateway they come."""

import asyncio
import hashlib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

import httpx
import msgspec
import pytest

import chains_stream as chains
from chains_stream.gateway.claims import PARTITIONS, Claimed
from chains_stream.gateway.ids import Ids, RequestId, secret_of
from chains_stream.messages import new_id, now_ms
from tests.sample import Seen
from tests.serving import WAIT, Say, Served, Slow, problem_of, request_log, serving


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    Seen.reset()


async def ask(served: Served, key: str, **arguments: Any) -> httpx.Response:
    return await served.http.post("/run_remote", json=arguments, headers={"idempotency-key": key})


class Count(chains.ChainletBase):
    """Counts how often it ran; fails if it is told to."""

    async def run_remote(self, name: str, status: int = 0) -> int:
        Seen.note(name)
        if status == HTTPStatus.TOO_MANY_REQUESTS:
            raise chains.OverloadedError("not now")
        if status:
            raise ValueError(name)
        return Seen.counts[name]


async def test_a_repeated_request_has_the_answer_of_the_first() -> None:
    async with serving(Count) as served, served.beside() as other:
        first = await ask(served, "k1", name="once")
        again = await ask(other, "k1", name="once")
        assert (first.json(), again.json()) == (1, 1)
        assert again.headers["x-request-id"] == first.headers["x-request-id"]
        assert (await ask(other, "k2", name="once")).json() == 2
        assert (await other.call(name="once")).json() == 3


async def test_a_failure_of_the_chain_is_its_answer_too() -> None:
    async with serving(Count) as served:
        first = problem_of(await ask(served, "k", name="bad", status=500), 500)
        again = problem_of(await ask(served, "k", name="bad", status=500), 500)
        assert first == again
        assert Seen.counts["bad"] == 1


async def test_what_can_be_mended_by_repeating_it_may_be_repeated() -> None:
    async with serving(Count) as served:
        for _ in range(2):
            problem_of(await ask(served, "k", name="busy", status=429), 429)
        assert Seen.counts["busy"] == 2


async def test_many_at_once_through_two_gateways_run_once() -> None:
    async with serving(Slow) as served, served.beside() as other:
        waiting = [asyncio.create_task(ask(each, "k", name="race")) for each in (served, other) * 5]
        await Seen.until("race began")
        done, running = await asyncio.wait(waiting, timeout=20, return_when=asyncio.FIRST_COMPLETED)
        while len(running) > 1:
            more, running = await asyncio.wait(running, timeout=20, return_when=asyncio.FIRST_COMPLETED)
            done |= more
        for each in done:
            problem = problem_of(each.result(), HTTPStatus.CONFLICT)
            assert problem["code"] == "idempotency-key-in-use"
            assert each.result().headers["retry-after"] == "1"
        Seen.note("go")
        first = await running.pop()
        assert first.json() == "race"
        assert Seen.counts["race began"] == 1
        assert (await ask(other, "k", name="race")).json() == "race"


async def test_another_body_is_refused() -> None:
    async with serving(Count) as served:
        await ask(served, "k", name="one")
        problem = problem_of(await ask(served, "k", name="two"), HTTPStatus.UNPROCESSABLE_ENTITY)
        assert problem["code"] == "idempotency-key-reused"
        assert Seen.counts["two"] == 0


async def test_a_client_that_lost_its_connection_asks_again() -> None:
    async with serving(Slow) as served:
        first = asyncio.create_task(ask(served, "k", name="lost"))
        await Seen.until("lost began")
        first.cancel()
        await asyncio.wait([first])
        problem_of(await ask(served, "k", name="lost"), HTTPStatus.CONFLICT)
        Seen.note("go")
        await Seen.until("lost stopped")
        answer = await ask(served, "k", name="lost")
        while answer.status_code == HTTPStatus.CONFLICT:  # it has ended, and its answer is on its way into the log
            answer = await ask(served, "k", name="lost")
        assert answer.json() == "lost"
        assert Seen.counts["lost began"] == 1


async def test_a_stream_is_told_again() -> None:
    async with serving(Say) as served:
        first = await ask(served, "k", texts=["a", "b"])
        again = await ask(served, "k", texts=["a", "b"])
        assert first.text == again.text == "ab"


async def test_arguments_that_are_wrong_use_no_key_up() -> None:
    async with serving(Count) as served:
        problem_of(await ask(served, "k", nothing=1), HTTPStatus.BAD_REQUEST)
        assert (await ask(served, "k", name="right")).json() == 1
        problem_of(await ask(served, "", name="right"), HTTPStatus.BAD_REQUEST)
        problem_of(await ask(served, "k" * 256, name="right"), HTTPStatus.BAD_REQUEST)


async def test_an_asynchronous_request_is_made_once() -> None:
    async with serving(Count) as served, served.beside() as other:
        ids = set()
        for each in (served, other, served):
            headers = {"idempotency-key": "k"}
            answer = await each.http.post("/async_run_remote", json={"name": "later"}, headers=headers)
            assert answer.status_code == HTTPStatus.ACCEPTED
            ids.add(answer.json()["request_id"])
        assert len(ids) == 1
        report = await served.http.get(f"/async_request/{ids.pop()}", headers={"prefer": "wait=10"})
        assert report.json()["result"] == 1


async def test_a_client_that_leaves_before_its_request_is_made_locks_no_key() -> None:
    async with serving(Count) as served, served.connect() as client:
        claims = await served.follow(f"{served.settings.namespace}.idempotency")
        with slow_publishing(served, "idempotency"):
            await client.send({"name": "early"}, "idempotency-key: k")
            await asyncio.wait_for(claims.fetch(), WAIT)
            with request_log() as log:
                await client.leave()
                await log.wait()
        async with asyncio.timeout(5):
            while (answer := await ask(served, "k", name="early")).status_code == HTTPStatus.CONFLICT:
                pass
        assert answer.json() == 1
        await claims.close()


async def test_a_client_that_leaves_as_its_request_is_stored_makes_it_once() -> None:
    async with serving(Count) as served, served.connect() as client:
        requests = await served.follow(served.topic)
        body, headers = b'{"name": "once"}', {"idempotency-key": "k", "content-type": "application/json"}
        lines = [f"{name}: {value}" for name, value in headers.items()]
        head = "\r\n".join(
            ["POST /async_run_remote HTTP/1.1", "host: t", f"content-length: {len(body)}", *lines, "", ""]
        )
        with slow_publishing(served, "run_remote"):
            await client.send_raw(head.encode() + body)
            await asyncio.wait_for(requests.fetch(), WAIT)
            with request_log() as log:
                await client.leave()
                await log.wait()
        answer = await served.http.post("/async_run_remote", content=body, headers=headers)
        request_id = answer.json()["request_id"]
        report = await served.http.get(f"/async_request/{request_id}", headers={"prefer": "wait=10"})
        assert report.json()["result"] == 1
        assert Seen.counts["once"] == 1
        await requests.close()


@contextmanager
def slow_publishing(served: Served, part: str) -> Iterator[None]:
    """Have nobody told, while the block runs, that records of a topic are stored: as by a broker that is slow."""
    publish, waiting = served.broker.publish, list[tuple[asyncio.Future[int], asyncio.Future[int]]]()

    async def late(topic: str, value: bytes, **options: Any) -> asyncio.Future[int]:
        stored = await publish(topic, value, **options)
        if part not in topic:
            return stored
        told = asyncio.get_running_loop().create_future()
        waiting.append((told, stored))
        return told

    served.broker.publish = late  # type: ignore[method-assign]
    try:
        yield
    finally:
        served.broker.publish = publish  # type: ignore[method-assign]
        for told, stored in waiting:
            if not told.done():
                told.set_result(stored.result())


async def test_what_came_too_late_stays_so() -> None:
    async with serving(Slow) as served:
        headers = {"idempotency-key": "k", "x-request-timeout": "0.3"}
        for _ in range(2):
            answer = await served.http.post("/run_remote", json={"name": "late"}, headers=headers)
            async with asyncio.timeout(5):
                while answer.status_code == HTTPStatus.CONFLICT:
                    answer = await served.http.post("/run_remote", json={"name": "late"}, headers=headers)
            assert problem_of(answer, HTTPStatus.GATEWAY_TIMEOUT)["code"] == "deadline-exceeded"
        assert Seen.counts["late began"] == 1


async def claim_elsewhere(served: Served, route: str, body: bytes, age: float) -> None:
    """Claim the key `k` as a gateway does that is killed then, so many seconds ago."""
    where = RequestId("results", 0, 0, new_id())
    digest = hashlib.sha256(route.encode() + b"\0" + body).digest()
    key = hashlib.sha256(b"\0k").digest()
    claimed = Claimed(
        key, digest, Ids(secret_of(served.settings), served.topic).mint(where, ""), now_ms() - int(age * 1000)
    )
    topic = f"{served.settings.namespace}.idempotency"
    partition = zlib.crc32(key) % PARTITIONS
    await (await served.broker.publish(topic, msgspec.msgpack.encode(claimed), partition=partition, key=key))


async def test_a_gateway_that_dies_with_a_claimed_key_loses_no_request() -> None:
    async with serving(Count) as served:
        body, headers = b'{"name":"later"}', {"idempotency-key": "k", "content-type": "application/json"}
        await claim_elsewhere(served, "/async_run_remote", body, age=31)
        async with asyncio.timeout(5):
            while True:
                answer = await served.http.post("/async_run_remote", content=body, headers=headers)
                if answer.status_code == HTTPStatus.ACCEPTED:
                    break
                assert problem_of(answer, HTTPStatus.CONFLICT)["code"] == "idempotency-key-in-use"
        report = await served.http.get(answer.headers["location"], headers={"prefer": "wait=5"})
        assert report.json().get("result") == 1


async def test_a_request_that_is_being_made_is_not_made_twice() -> None:
    async with serving(Count) as served:
        body, headers = b'{"name":"now"}', {"idempotency-key": "k", "content-type": "application/json"}
        await claim_elsewhere(served, "/async_run_remote", body, age=1)
        for _ in range(3):
            problem_of(await served.http.post("/async_run_remote", content=body, headers=headers), HTTPStatus.CONFLICT)


async def test_a_key_may_be_used_anew_after_a_day_whatever_a_gateway_remembers() -> None:
    async with serving(Count) as served:
        await claim_elsewhere(served, "/run_remote", b"another body", age=24 * 3600 + 60)
        assert (await ask(served, "k", name="anew")).json() == 1
        assert (await ask(served, "k", name="anew")).json() == 1
