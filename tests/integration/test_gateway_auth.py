"""A gateway that asks for keys, counts how often each calls, and answers pages of other origins."""

import re
from collections.abc import Iterator

import httpx
import pytest

from chains_stream.gateway.auth import new_key
from tests.sample import Seen
from tests.serving import Greet, RequestLog, Say, Slow, problem_of, request_log, serving

KEY, ENTRY = new_key("ada")
OTHER, OTHER_ENTRY = new_key("grace")
KEYS = f"{ENTRY},{OTHER_ENTRY}"
PAGE = "https://page.example"
OPEN = ["/healthz", "/readyz", "/metrics", "/docs", "/openapi.json"]


@pytest.fixture(autouse=True)
def nothing_seen() -> Iterator[None]:
    Seen.reset()
    yield
    Seen.reset()


@pytest.fixture
def log() -> Iterator[RequestLog]:
    with request_log() as handler:
        yield handler


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def test_a_request_with_a_key_is_served_and_logged_under_its_name(log: RequestLog) -> None:
    async with serving(Greet, api_keys=KEYS) as served:
        for headers in (bearer(KEY), {"x-api-key": KEY}, {"authorization": f"Api-Key {KEY}"}):
            response = await served.http.post("/run_remote", json={}, headers=headers)
            assert response.json() == "Hello, world!"
        lines = await log.wait(3)
    assert [line["owner"] for line in lines] == 3 * ["ada"]
    assert KEY not in str(lines)


@pytest.mark.parametrize("headers", [{}, bearer("ck_wrong"), {"x-api-key": OTHER[:-1]}])
@pytest.mark.parametrize("path", ["/run_remote", "/nowhere", "/run_remote/", "/healthz/", "//healthz", "/metrics%00"])
async def test_without_one_nothing_is_told(headers: dict[str, str], path: str) -> None:
    async with serving(Greet, api_keys=KEYS) as served:
        response = await served.http.post(path, json={}, headers=headers)
        problem = problem_of(response, 401)
        assert problem["code"] == "unauthorized"
        assert response.headers["www-authenticate"] == "Bearer"
        assert Seen.counts == {}


async def test_probes_metrics_and_the_description_need_none() -> None:
    async with serving(Greet, api_keys=KEYS) as served:
        for path in OPEN:
            assert (await served.http.get(path)).status_code == 200
        assert 'chains_process_info{pid="' in (await served.http.get("/metrics")).text


async def test_a_stranger_is_told_before_the_body_is_sent() -> None:
    async with serving(Greet, api_keys=KEYS) as served, served.connect() as client:
        await client.send_raw(
            b"POST /run_remote HTTP/1.1\r\nhost: t\r\ncontent-type: application/json\r\n"
            b"content-length: 10000000\r\nexpect: 100-continue\r\n\r\n"
        )
        answer = await client.read_all()
        assert answer.startswith(b"HTTP/1.1 401 ")
        assert b"connection: close" in answer


async def test_strangers_take_no_place_of_a_key() -> None:
    async with serving(Slow, api_keys=KEYS, max_requests=1, max_requests_per_key=1) as served:
        for _ in range(3):
            problem_of(await served.http.post("/run_remote", json={"name": "n"}), 401)
        Seen.note("go")
        response = await served.http.post("/run_remote", json={"name": "n"}, headers=bearer(KEY))
        assert response.json() == "n"


async def test_the_description_says_that_keys_are_asked_for() -> None:
    async with serving(Greet, api_keys=KEYS) as served:
        document = (await served.http.get("/openapi.json")).json()
    assert document["security"] == [{"bearer": []}, {"api-key": []}]
    assert document["components"]["securitySchemes"]["bearer"] == {"type": "http", "scheme": "bearer"}
    assert "security" not in document["paths"]["/run_remote"]["post"]
    assert "401" in document["paths"]["/run_remote"]["post"]["responses"]
    assert document["paths"]["/healthz"]["get"]["security"] == []
    async with serving(Greet) as served:
        document = (await served.http.get("/openapi.json")).json()
    assert "security" not in document
    assert "401" not in document["paths"]["/run_remote"]["post"]["responses"]


async def test_a_rate_is_each_keys_own_and_told_in_headers() -> None:
    async with serving(Greet, api_keys=KEYS, rate_per_key=0.01, rate_burst=2) as served:
        answers = [await served.http.post("/run_remote", json={}, headers=bearer(KEY)) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert [answer.headers["ratelimit-policy"] for answer in answers] == 3 * ['"requests";q=2;w=200']
        left = [re.fullmatch(r'"requests";r=(\d);t=(\d+)', answer.headers["ratelimit"]) for answer in answers]
        assert [found and found[1] for found in left] == ["1", "0", "0"]
        assert problem_of(answers[2], 429)["code"] == "overloaded"
        assert 90 <= int(answers[2].headers["retry-after"]) <= 100
        other = await served.http.post("/run_remote", json={}, headers=bearer(OTHER))
        assert other.status_code == 200
        probe = await served.http.get("/healthz")
        assert "ratelimit" not in probe.headers
        assert 'chains_shed_total{reason="rate"}' in (await served.http.get("/metrics")).text


async def test_without_keys_a_rate_is_an_addresss_own() -> None:
    async with serving(Say, rate_per_key=0.01, rate_burst=1) as served:
        first = await served.call(texts=["a"])
        assert (first.text, first.headers["ratelimit"]) == ("a", '"requests";r=0;t=100')
        second = await served.http.post("/run_remote", json={"texts": []}, headers=bearer("another"))
        assert second.status_code == 429


async def preflight(http: httpx.AsyncClient, origin: str, path: str = "/run_remote") -> httpx.Response:
    headers = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    return await http.options(path, headers=headers)


async def test_a_page_of_another_origin_may_call_if_it_is_named() -> None:
    async with serving(Greet, api_keys=KEYS, cors_origins=f"{PAGE}, http://localhost:3000") as served:
        asked = await preflight(served.http, PAGE)
        assert (asked.status_code, asked.content) == (204, b"")
        assert asked.headers["access-control-allow-origin"] == PAGE
        assert asked.headers["access-control-allow-headers"] == "authorization,content-type"
        assert "POST" in asked.headers["access-control-allow-methods"]
        assert "access-control-allow-credentials" not in asked.headers
        answers = [
            await served.http.post("/run_remote", json={}, headers=bearer(KEY) | {"origin": PAGE}),
            await served.http.post("/run_remote", json={"name": 1}, headers=bearer(KEY) | {"origin": PAGE}),
            await served.http.post("/run_remote", json={}, headers={"origin": PAGE}),
            await served.http.get("/nowhere", headers=bearer(KEY) | {"origin": PAGE}),
            await served.http.get("/healthz", headers={"origin": PAGE}),
        ]
        assert [answer.status_code for answer in answers] == [200, 400, 401, 404, 200]
        for answer in answers:
            assert answer.headers["access-control-allow-origin"] == PAGE
            assert answer.headers["vary"] == "origin"
            assert {"x-request-id", "retry-after", "location"} <= set(
                answer.headers["access-control-expose-headers"].split(", ")
            )


async def test_a_page_of_another_origin_may_not_call_if_it_is_not_named() -> None:
    async with serving(Greet, cors_origins=PAGE) as served:
        problem_of(refused := await preflight(served.http, "https://other.example"), 403)
        answer = await served.http.post("/run_remote", json={}, headers={"origin": "https://other.example"})
        for response in (refused, answer):
            assert "access-control-allow-origin" not in response.headers
            assert response.headers["vary"] == "origin"


async def test_any_page_may_call_if_all_may() -> None:
    async with serving(Greet, cors_origins="*") as served:
        assert (await preflight(served.http, PAGE)).headers["access-control-allow-origin"] == "*"
        answer = await served.http.post("/run_remote", json={}, headers={"origin": PAGE})
        assert answer.headers["access-control-allow-origin"] == "*"


async def test_no_page_of_another_origin_may_call_unless_it_is_set() -> None:
    async with serving(Greet) as served:
        assert (await preflight(served.http, PAGE)).status_code == 405
        answer = await served.http.post("/run_remote", json={}, headers={"origin": PAGE})
        assert not [name for name in answer.headers if name.startswith("access-control")]
