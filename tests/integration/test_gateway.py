"""HTTP in front of a Chain: what goes in, what comes out, and how every failure is told."""

import asyncio
import base64
import hashlib
import json
import logging
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import jsonschema
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

import chains_stream as chains
from chains_stream.brokers.memory_reading import MemoryReader
from chains_stream.errors import BrokerError, InvalidArgumentError, remote_detail
from chains_stream.gateway import app as gateway_app
from tests.sample import Counting, Item, Leaf, Relay, Sample, SampleError, Seen
from tests.serving import (
    WAIT,
    Greet,
    Pause,
    Pieces,
    Refuse,
    Say,
    SayParts,
    Served,
    Slow,
    problem_of,
    request_log,
    serving,
)


@pytest.fixture(autouse=True)
def nothing_seen() -> Iterator[None]:
    Seen.reset()
    yield
    Seen.reset()


@pytest.fixture
async def greet() -> AsyncIterator[Served]:
    async with serving(Greet) as served:
        yield served


@pytest.fixture
async def leaf() -> AsyncIterator[Served]:
    async with serving(Leaf, max_body_bytes=10_000) as served:
        yield served


# --- what goes well


async def test_a_result_is_json_with_a_request_id(leaf: Served) -> None:
    response = await leaf.call(item={"name": "ada", "count": 4})
    assert (response.status_code, response.json()) == (200, {"name": "ADA", "count": 5})
    assert response.headers["content-type"] == "application/json"
    assert len(response.headers["x-request-id"]) == 48
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "server" not in response.headers


async def test_request_ids_differ(greet: Served) -> None:
    ids = {(await greet.http.post("/run_remote")).headers["x-request-id"] for _ in range(20)}
    assert len(ids) == 20


@pytest.mark.parametrize("content", [b"", b"{}", b" { } "])
async def test_defaults_need_not_be_sent(greet: Served, content: bytes) -> None:
    headers = {"content-type": "application/json"} if content else {}
    response = await greet.http.post("/run_remote", content=content, headers=headers)
    assert response.json() == "Hello, world!"


@pytest.mark.parametrize(
    "content_type",
    ["application/json; charset=utf-8", 'Application/JSON;charset="UTF-8"', "application/vnd.greeting+json"],
)
async def test_json_by_any_of_its_names(greet: Served, content_type: str) -> None:
    content = '{"name": "Zoë 🌍"}'.encode()
    response = await greet.http.post("/run_remote", content=content, headers={"content-type": content_type})
    assert response.json() == "Hello, Zoë 🌍!"


async def test_many_at_once(greet: Served) -> None:
    answers = await asyncio.gather(*(greet.call(name=str(number)) for number in range(200)))
    assert [answer.json() for answer in answers] == [f"Hello, {number}!" for number in range(200)]


async def test_a_large_body_and_a_large_result() -> None:
    async with serving(Greet, max_record_bytes=10_000_000) as served:
        answer = await served.call(name="x" * 1_000_000, times=8)
        assert answer.json() == f"Hello, {'x' * 1_000_000}!" * 8


async def test_our_own_client_calls_through_the_gateway() -> None:
    async with serving(Sample) as served, chains.connect(served.url, Sample) as sample:
        assert await sample.run_remote([Item("a")], count=1) == [Item("A", 2), Item("counted", 0)]
        with pytest.raises(SampleError) as caught:
            await sample.run_remote([Item("x", 7)], mode="fail")
        assert caught.value.number == 7
        detail = remote_detail(caught.value)
        assert detail is not None
        assert [hop.chainlet for hop in detail.hops] == ["Sample", "Middle", "Leaf"]
        with pytest.raises(InvalidArgumentError) as refused:
            await sample.run_remote(itms=[])  # type: ignore[call-arg] # the mistake under test
        assert refused.value.path == "$.itms"


async def test_our_own_client_reads_streams() -> None:
    async with serving(Relay) as served, chains.connect(served.url, Relay) as relay:
        assert [chunk async for chunk in relay.run_remote(300)] == [f"{number};" for number in range(300)]
        got = []
        with pytest.raises(SampleError, match="broke off"):
            async for chunk in relay.run_remote(10, fail_at=3):
                got.append(chunk)  # noqa: PERF401 - what arrived before the error is what counts
        assert got == ["0;", "1;", "2;"]


# --- what the client did wrong


@pytest.mark.parametrize(
    ("content", "path", "said"),
    [
        (b'{"item": {"name": "a", "count": "many"}}', "$.item.count", "Expected `int`, got `str`"),
        (b'{"item": {"count": 1}}', "$.item.name", "missing required field `name`"),
        (b'{"itm": 1}', "$.itm", "unknown field `itm`"),
        (b"", "$.item", "missing required field `item`"),
        (b"{'item': 1}", None, "malformed"),
        (b"[1, 2]", None, "Expected `object`, got `array`"),
        (b'{"item": {"name": "\xff"}}', None, ""),
    ],
)
async def test_wrong_arguments_name_the_field(leaf: Served, content: bytes, path: str | None, said: str) -> None:
    response = await leaf.http.post("/run_remote", content=content, headers={"content-type": "application/json"})
    problem = problem_of(response, 400)
    assert problem["code"] == "invalid-argument"
    assert said in problem["detail"]
    assert problem.get("path") == path
    assert problem["error"]["code"] == "invalid-argument"


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({}, "has no content type"),
        ({"content-type": "application/x-www-form-urlencoded"}, "curl --json"),
        ({"content-type": "text/json-ish"}, "`text/json-ish`"),
        ({"content-type": "application/json; charset=latin-1"}, "`latin-1`"),
        ({"content-type": "application/json", "content-encoding": "gzip"}, "`gzip`"),
    ],
)
async def test_only_json_is_taken(greet: Served, headers: dict[str, str], said: str) -> None:
    problem = problem_of(await greet.http.post("/run_remote", content=b"{}", headers=headers), 415)
    assert said in problem["detail"]
    assert problem["offered"] == ["application/json"]


async def test_a_body_over_the_limit_is_refused(leaf: Served) -> None:
    problem = problem_of(await leaf.call(item={"name": "x" * 10_000}), 413)
    assert "10000 bytes" in problem["detail"]
    assert (await leaf.call(item={"name": "x" * 9_000})).status_code == 200


async def test_a_body_that_the_broker_does_not_take_is_refused() -> None:
    async with serving(Greet, max_record_bytes=1000, max_value_bytes=1500) as served:
        assert problem_of(await served.call(name="x" * 2000), 413)["code"] == "record-too-large"


async def test_a_chunked_body_over_the_limit_is_not_read_to_its_end(leaf: Served) -> None:
    async with leaf.connect() as client:
        headers = "content-type: application/json\r\ntransfer-encoding: chunked"
        await client.send_raw(f"POST /run_remote HTTP/1.1\r\nhost: t\r\n{headers}\r\n\r\n".encode())
        await client.send_raw(b"2000\r\n" + b" " * 0x2000 + b"\r\n")
        await client.send_raw(b"2000\r\n" + b" " * 0x2000 + b"\r\n")  # and no end: it is not waited for
        answer = await client.read_all()
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answer.lower()


async def test_a_client_that_asks_first_is_told_before_it_sends(leaf: Served) -> None:
    async with leaf.connect() as client:
        headers = "content-type: application/json\r\ncontent-length: 99999999\r\nexpect: 100-continue"
        await client.send_raw(f"POST /run_remote HTTP/1.1\r\nhost: t\r\n{headers}\r\n\r\n".encode())
        assert (await client.read_until(b"\r\n")).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("path", ["/", "/run_remote/", "/run_remot", "/docs/../run_remote/x", "/%00", "/run_remote%0A"])
async def test_an_unknown_route(greet: Served, path: str) -> None:
    assert "/docs" in problem_of(await greet.http.post(path, json={}), 404)["detail"]


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/run_remote"), ("OPTIONS", "/run_remote"), ("PROPFIND", "/docs")]
)
async def test_a_wrong_method(greet: Served, method: str, path: str) -> None:
    response = await greet.http.request(method, path)
    problem_of(response, 405)
    assert response.headers["allow"] == ("POST" if path == "/run_remote" else "GET, HEAD")
    assert not [name for name in response.headers if name.startswith("access-control")]


async def test_a_method_that_nobody_knows(greet: Served) -> None:
    async with greet.connect() as client:
        await client.send_raw(b"BREW /docs HTTP/1.1\r\nhost: t\r\n\r\n")
        head, _, body = (await client.read_all()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 501 ")
    assert json.loads(body)["code"] == "not-implemented"


async def test_head(greet: Served) -> None:
    response = await greet.http.head("/docs")
    assert (response.status_code, response.content) == (200, b"")
    assert int(response.headers["content-length"]) > 1000
    response = await greet.http.head("/run_remote")
    assert (response.status_code, response.content) == (405, b"")


@pytest.mark.parametrize(
    "request_line", [b"GARBAGE", b"GET /readyz HTTP/1.1\r\nhost: t\r\nbad header\r\nx", b"\x16\x03\x01"]
)
async def test_malformed_http(greet: Served, request_line: bytes) -> None:
    async with greet.connect() as client:
        await client.send_raw(request_line + b"\r\n\r\n")
        head, _, body = (await client.read_all()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"content-type: application/problem+json" in head.lower()
    problem = json.loads(body)
    assert problem["code"] == "invalid-http"
    assert f"x-request-id: {problem['request_id']}".encode() in head
    assert (await greet.call()).status_code == 200


async def test_malformed_headers_of_ours_are_ignored_or_named(greet: Served) -> None:
    for value in ("soon", "0", "-1", "nan", "inf", "1e9", "", "1" * 40, "\u0661"):
        response = await greet.http.post("/run_remote", headers=[(b"x-request-timeout", value.encode())])
        assert "x-request-timeout" in problem_of(response, 400)["detail"]
    for name, value in (("traceparent", "00-zz"), ("tracestate", "\xff"), ("accept", "\xff, */*")):
        response = await greet.http.post("/run_remote", headers=[(name.encode(), value.encode("latin-1"))])
        assert response.status_code == 200, name


# --- what the Chain did


async def test_an_error_of_the_chain_has_its_way_through_it() -> None:
    async with serving(Sample) as served:
        problem = problem_of(await served.call(items=[{"name": "x", "count": 7}], mode="fail"), 500)
    assert problem["code"] == "remote"
    assert "no such item" in problem["detail"]
    assert problem["error"]["exception_cls_name"] == "SampleError"
    assert [hop[0] for hop in problem["error"]["hops"]] == ["Sample", "Middle", "Leaf"]
    assert problem["error"]["hops"][-1][1][-1][3] == 'raise SampleError("no such item", item.count)'


async def test_a_status_that_user_code_raises_is_kept() -> None:
    async with serving(Refuse) as served:
        for status in (402, 404, 418, 599):
            problem_of(await served.call(status=status), status)
        for status in (429, 503):
            response = await served.call(status=status)
            problem_of(response, status)
            assert response.headers["retry-after"] == "1"
        response = await served.call(status=0, retry_after=6.2)
        assert problem_of(response, 429)["code"] == "overloaded"
        assert response.headers["retry-after"] == "7"


async def test_a_result_of_the_wrong_type(leaf: Served) -> None:
    problem = problem_of(await leaf.call(item={"name": "a"}, mode="wrong"), 500)
    assert problem["code"] == "invalid-result"


async def test_the_deadline_that_a_client_sets() -> None:
    async with serving(Slow) as served:
        response = await served.http.post("/run_remote", json={"name": "late"}, headers={"x-request-timeout": "0.3"})
        assert problem_of(response, 504)["code"] == "deadline-exceeded"
        await Seen.until("late stopped")


async def test_the_deadline_is_at_most_the_gateways() -> None:
    async with serving(Slow, deadline=0.3) as served:
        response = await served.http.post("/run_remote", json={"name": "late"}, headers={"x-request-timeout": "60"})
        problem_of(response, 504)


async def test_a_body_that_does_not_arrive_in_time(greet: Served) -> None:
    async with greet.connect() as client:
        headers = "content-type: application/json\r\ncontent-length: 100\r\nx-request-timeout: 0.2"
        await client.send_raw(f"POST /run_remote HTTP/1.1\r\nhost: t\r\n{headers}\r\n\r\n{{".encode())
        assert (await client.read_all()).startswith(b"HTTP/1.1 408 ")


async def test_a_request_waits_for_the_first_worker() -> None:
    async with serving(Greet, workers=False) as served:
        late = await served.http.post("/run_remote", headers={"x-request-timeout": "0.2"})
        problem_of(late, 504)
        early = asyncio.ensure_future(served.http.post("/run_remote"))
        await served.host()
        assert (await early).json() == "Hello, world!"


async def test_pipelined_requests_are_answered_in_order(greet: Served) -> None:
    async with greet.connect() as client:
        for name in ("a", "b"):
            await client.send({"name": name})
        await client.send({"name": "c"}, "connection: close")
        answers = await client.read_all()
    assert re.findall(rb'"Hello, (.)!"', answers) == [b"a", b"b", b"c"]
    assert len(set(re.findall(rb"x-request-id: (\S+)", answers))) == 3


# --- the other routes


async def test_health_and_readiness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_app, "READY_FOR", 0.0)
    async with serving(Greet, workers=False) as served:
        assert (await served.http.get("/healthz")).json() == {"status": "ok"}
        response = await served.http.get("/readyz")
        problem = problem_of(response, 503)
        assert problem["missing"] == ["worker"]
        assert "Greet" in problem["detail"]
        assert response.headers["retry-after"] == "1"
        await served.host()
        assert (await served.http.get("/readyz")).json() == {"status": "ok"}


async def test_a_gateway_that_can_read_no_answers_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_app, "READY_FOR", 0.0)
    async with serving(Greet) as served:
        assert (await served.http.get("/readyz")).status_code == 200
        reader = served.caller._reader
        assert isinstance(reader, MemoryReader)
        reader.fail(BrokerError("the disk is full"))
        problem_of(await served.call(), 503)
        problem = problem_of(await served.http.get("/readyz"), 503)
    assert problem["missing"] == ["replies"]
    assert "the disk is full" in problem["detail"]


async def test_a_broker_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(group: str) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(gateway_app, "READY_WITHIN", 0.05)
    async with serving(Greet) as served:
        monkeypatch.setattr(served.broker, "members", never)
        assert problem_of(await served.http.get("/readyz"), 503)["missing"] == ["broker"]


@pytest.mark.parametrize("entrypoint", [Greet, Sample, Say, SayParts, Pieces, Counting, Refuse, Pause])
async def test_openapi(entrypoint: type[Any]) -> None:
    async with serving(entrypoint, workers=False) as served:
        response = await served.http.get("/openapi.json")
        document = response.json()
        not_found = (await served.http.get("/nowhere")).json()
    assert response.headers["content-type"] == "application/json"
    OpenAPIV31SpecValidator(document).validate()
    assert document["info"]["title"] == served.chain.name
    answers = document["paths"]["/run_remote"]["post"]["responses"]
    assert {"200", "400", "406", "413", "415", "429", "500", "503", "504"} <= set(answers)
    problem = answers["400"]["content"]["application/problem+json"]["schema"]
    jsonschema.validate(not_found, {**problem, "components": document["components"]})


@pytest.mark.parametrize("entrypoint", [Greet, Counting])
async def test_openapi_says_of_a_chain_what_its_author_says(entrypoint: type[Any]) -> None:
    async with serving(entrypoint, workers=False) as served:
        info = (await served.http.get("/openapi.json")).json()["info"]
    assert info["description"] == (entrypoint.__doc__ or f"The Chain {served.chain.name}.")


async def test_openapi_describes_the_chains_own_types() -> None:
    async with serving(Sample, workers=False) as served:
        document = (await served.http.get("/openapi.json")).json()
    operation = document["paths"]["/run_remote"]["post"]
    arguments = operation["requestBody"]["content"]["application/json"]["schema"]
    schema = {**arguments, "components": document["components"]}
    jsonschema.validate({"items": [{"name": "a"}], "mode": "echo"}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"items": [{"name": 1}]}, schema)
    assert operation["requestBody"]["required"]
    assert operation["responses"]["200"]["content"]["application/json"]["schema"]["type"] == "array"


async def test_the_page_needs_nothing_from_elsewhere_and_runs_what_is_written_in_it(greet: Served) -> None:
    response = await greet.http.get("/docs")
    page, policy = response.text, response.headers["content-security-policy"]
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for kind in ("script", "style"):
        assert page.count(f"<{kind}") == 1
        text = page.partition(f"<{kind}>")[2].partition(f"</{kind}>")[0]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert not re.search(r"""(src|href)=["'](https?:)?//|url\(|@import| on\w+=|style=""", page)


# --- the log


async def test_one_line_a_request_without_what_was_said(greet: Served, caplog: pytest.LogCaptureFixture) -> None:
    with request_log() as log:
        responses = [
            await greet.call(name="confidential"),
            await greet.http.get("/nowhere?confidential"),
            await greet.http.get("/healthz"),
            await greet.call(name=["confidential"]),
        ]
        lines = await log.wait(len(responses))
    assert [(line["method"], line["route"], line["status"], line.get("error")) for line in lines] == [
        ("POST", "/run_remote", 200, None),
        ("GET", "unknown", 404, "not-found"),
        ("GET", "/healthz", 200, None),
        ("POST", "/run_remote", 400, "invalid-argument"),
    ]
    assert [line["request_id"] for line in lines] == [response.headers["x-request-id"] for response in responses]
    assert all(0 <= line["duration_ms"] < WAIT * 1000 for line in lines)
    assert "confidential" not in caplog.text
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


async def test_a_mistake_of_the_gateways_own_is_told_and_kept_to_itself(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("secret internals")

    async with serving(Greet) as served:
        monkeypatch.setattr(served.caller, "open", broken)
        problem = problem_of(await served.call(), 500)
        monkeypatch.undo()
        assert (await served.call()).status_code == 200
    assert problem["code"] == "internal"
    assert "secret" not in json.dumps(problem)
    assert "gateway.defect" in caplog.text
    assert not [record for record in caplog.records if record.name.startswith("uvicorn")]


async def test_keep_alive_survives_refusals(greet: Served) -> None:
    limits = httpx.Limits(max_connections=1)
    async with httpx.AsyncClient(base_url=greet.url, limits=limits, trust_env=False) as http:
        for _ in range(3):
            assert (await http.post("/run_remote", content=b"x=1")).status_code == 415
            assert (await http.get("/nowhere")).status_code == 404
            assert (await http.post("/run_remote")).status_code == 200
