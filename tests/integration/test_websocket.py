"""A Chain that talks: messages both ways through `/websocket`, on the embedded broker and on Kafka."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trustme
from openapi_spec_validator import OpenAPIV31SpecValidator
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from chains_stream import sessions
from chains_stream.gateway import websocket_session
from chains_stream.gateway.auth import new_key
from tests.members import take
from tests.sample import Seen
from tests.serving import WAIT, Greet, Served, problem_of, serving
from tests.websockets import Talk, closed, json_of, talk, url_of

LOAD = 10_000  # messages each way


@pytest.fixture(autouse=True)
def nothing_seen() -> Iterator[None]:
    Seen.reset()
    yield
    Seen.reset()


@pytest.fixture(params=["memory", pytest.param("kafka", marks=pytest.mark.kafka)])
def broker(request: pytest.FixtureRequest) -> str:
    return "memory://" if request.param == "memory" else str(request.getfixturevalue("kafka_url"))


@pytest.fixture
async def served(broker: str) -> AsyncIterator[Served]:
    async with serving(Talk, broker=broker) as running:
        yield running


# --- messages


async def test_messages_come_back_as_they_were(served: Served) -> None:
    messages: list[str | bytes] = ["hello", "", "Grüße 茶 🫖", b"", bytes(range(256)), "x" * 70_000, b"y" * 70_000]
    async with talk(served) as websocket:
        for message in messages:
            await websocket.send(message)
            assert await websocket.recv() == message


async def test_messages_over_the_limit_of_a_record_go_through_the_store(served: Served) -> None:
    large = "ü" * 1_000_000
    messages: list[str | bytes] = ["before", large, large.encode(), "after"]
    async with talk(served) as websocket:
        for message in messages:
            await websocket.send(message)
            assert await websocket.recv() == message


async def test_json_and_bytes(served: Served) -> None:
    async with talk(served, do="json") as websocket:
        await websocket.send('{"a": [1, null]}')
        await websocket.send(b'"bytes may hold JSON too"')
        answers = [await websocket.recv(), await websocket.recv()]
    assert [json_of(answer) for answer in answers] == [{"got": {"a": [1, None]}}, {"got": "bytes may hold JSON too"}]
    assert isinstance(answers[0], str)
    async with talk(served, do="bytes") as websocket:
        await websocket.send(b"ab")
        assert await websocket.recv() == b"abab"


async def test_a_conversation_calls_other_chainlets(served: Served) -> None:
    async with talk(served, do="reverse") as websocket:
        await websocket.send("abc")
        assert await websocket.recv() == "cba"
    await Seen.until("talk connected False")  # the loop has ended


async def test_headers_and_query(served: Served) -> None:
    headers = {"X-Test": "one", "authorization": "Bearer me"}
    async with talk(served, do="told", headers=headers, q="a%20b") as websocket:
        told = json_of(await websocket.recv())
        assert await websocket.recv() == "one"
    assert told["query"] == {"do": "told", "q": "a b"}
    assert told["headers"]["x-test"] == "one"
    assert told["headers"]["authorization"] == "Bearer me"
    assert "sec-websocket-key" not in told["headers"]


async def test_a_message_of_the_wrong_kind_closes_it(served: Served) -> None:
    async with talk(served, do="json") as websocket:
        await websocket.send("{")
        code, reason = await closed(websocket)
    assert (code, reason.partition(":")[0]) == (1007, "a message is no JSON")
    async with talk(served, do="reverse") as websocket:
        await websocket.send(b"abc")
        assert (await closed(websocket))[0] == 1007


async def test_order_under_load(served: Served) -> None:
    async with talk(served) as websocket, asyncio.timeout(60):

        async def send() -> None:
            for number in range(LOAD):
                await websocket.send(str(number))

        sending = asyncio.create_task(send())
        received = [await websocket.recv() for _ in range(LOAD)]
        await sending
    assert received == list(map(str, range(LOAD)))


async def test_many_at_once_don_t_mix(served: Served) -> None:
    async def one(who: int) -> list[str | bytes]:
        async with talk(served) as websocket:
            for number in range(20):
                await websocket.send(f"{who} {number}")
            return [await websocket.recv() for _ in range(20)]

    async with asyncio.timeout(WAIT):
        answers = await asyncio.gather(*map(one, range(40)))
    assert answers == [[f"{who} {number}" for number in range(20)] for who in range(40)]


async def test_tasks_may_send_at_once_and_be_cancelled(served: Served) -> None:
    async with talk(served, do="together") as websocket, asyncio.timeout(WAIT):
        received = [message async for message in websocket]
        assert (await closed(websocket))[0] == 1000
    assert [message for message in received if message != "given up"] == list(map(str, range(2_000)))


# --- one side is slow


async def test_a_client_that_does_not_read_holds_the_worker_up(broker: str) -> None:
    count, size = 4_000, 10_000
    async with (
        serving(Talk, broker=broker, stream_window=32) as served,
        talk(served, do="push", count=count, size=size, max_queue=1) as slow,
        talk(served) as other,
    ):
        assert await slow.recv() == "0".ljust(size)
        for _ in range(300):  # others go on meanwhile, and this one has had time for all of it
            await other.send("?")
            assert await other.recv() == "?"
        pushed = Seen.counts["pushed"]
        assert pushed < count / 2  # sockets hold some MB, the rest has not been made
        async with asyncio.timeout(WAIT):
            received = [message async for message in slow]
        assert received == [str(number).ljust(size) for number in range(1, count)]
        assert Seen.counts["pushed"] == count


async def test_a_worker_that_does_not_take_holds_the_client_up(broker: str) -> None:
    count, size = 400, 100_000
    async with (
        serving(Talk, broker=broker, stream_window=8) as served,
        talk(served, do="collect", count=count) as eager,
        talk(served) as other,
    ):
        sent = 0

        async def send() -> None:
            nonlocal sent
            for _ in range(count):
                await eager.send(bytes(size))
                sent += 1

        sending = asyncio.create_task(send())
        for _ in range(300):
            await other.send("?")
            assert await other.recv() == "?"
        assert sent < count / 2
        Seen.note("go")
        async with asyncio.timeout(WAIT):
            assert await eager.recv() == str(count * size)
            await sending


# --- the end


async def test_a_client_that_leaves_with_a_word(served: Served) -> None:
    async with talk(served) as websocket:
        await websocket.send("hi")
        await websocket.close(4001, "lunch")
    await Seen.until("talk left 4001 lunch")


async def test_what_a_client_sent_before_it_left_arrives(served: Served) -> None:
    async with talk(served, do="listen") as websocket:
        for number in range(1_000):
            await websocket.send(str(number))
    await Seen.until("talk ended")
    assert [Seen.counts[f"got {number}"] for number in range(1_000)] == [1] * 1_000


async def test_a_client_that_is_just_gone(served: Served) -> None:
    async with talk(served) as websocket:
        await websocket.send("hi")
        assert await websocket.recv() == "hi"
        websocket.transport.abort()
        await Seen.until("talk left 1006")
        await Seen.until("talk ended")


async def test_a_client_that_leaves_has_what_hangs_cancelled(broker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "LEAVE_SECONDS", 0.2)
    async with serving(Talk, broker=broker) as served:
        async with talk(served, do="hang") as websocket:
            assert await websocket.recv() == "hanging"
            assert not Seen.counts["talk ended"]
        await Seen.until("talk ended")


async def test_what_a_client_sent_before_it_left_is_taken(broker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if that takes longer, in all, than `run_remote` is given to end."""
    monkeypatch.setattr(sessions, "LEAVE_SECONDS", 0.5)
    async with serving(Talk, broker=broker) as served:
        async with talk(served, do="slowly") as websocket:
            for _ in range(20):
                await websocket.send("hi")
        await Seen.until("talk ended")
        assert Seen.counts["taken"] == 20


async def test_a_client_that_leaves_before_it_is_served(broker: str) -> None:
    async with serving(Talk, broker=broker, workers=False) as served:
        requests = await served.follow(served.topic)
        opening = asyncio.ensure_future(talk(served, name="late").__aenter__())
        await take(requests, 1)
        opening.cancel()
        await asyncio.wait([opening])
        await requests.close()
        await served.host()
        async with talk(served, name="next") as websocket:
            await websocket.send("hi")
            assert await websocket.recv() == "hi"
        await Seen.until("next ended")
        assert not Seen.counts["late began"]


async def test_run_remote_closes_it_and_goes_on(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "LEAVE_SECONDS", 0.01)
    async with talk(served, do="close") as websocket:
        assert await closed(websocket) == (4321, "enough")
    async with talk(served, name="other") as other:  # by then the first would have been stopped
        await other.send("hi")
        assert await other.recv() == "hi"
    Seen.note("go")
    await Seen.until("talk went on")
    await Seen.until("talk left 4321 enough")


async def test_run_remote_returns(served: Served) -> None:
    async with talk(served, do="push", count=3, size=1) as websocket:
        assert [await websocket.recv() for _ in range(3)] == ["0", "1", "2"]
        assert await closed(websocket) == (1000, "")


async def test_run_remote_fails(served: Served) -> None:
    async with talk(served, do="fail") as websocket:
        assert await websocket.recv() == "first"
        code, reason = await closed(websocket)
    assert code == 1011
    assert reason == ("no good: " + "ü" * 57)  # as much as fits 123 bytes
    assert len(reason.encode()) == 123


async def test_the_deadline_ends_it(served: Served) -> None:
    async with talk(served, do="hang", headers={"x-request-timeout": "1"}) as websocket:
        assert await websocket.recv() == "hanging"
        assert (await closed(websocket))[0] == 1001
    await Seen.until("talk ended")


async def test_the_gateway_stops(broker: str) -> None:
    async with serving(Talk, broker=broker, grace_period=0.2) as served, talk(served) as websocket:
        await websocket.send("hi")
        assert await websocket.recv() == "hi"
        async with asyncio.timeout(WAIT):
            await asyncio.gather(served.server.stop(), websocket.wait_closed())
        assert await closed(websocket) == (1001, "the gateway is stopping")
        await Seen.until("talk left 1001 the gateway is stopping")


async def test_the_worker_stops(broker: str) -> None:
    async with serving(Talk, broker=broker, grace_period=0.2) as served, talk(served) as websocket:
        await websocket.send("hi")
        assert await websocket.recv() == "hi"
        assert served.hosted is not None
        await served.hosted.drain()
        await Seen.until("talk ended")
        await served.host()
        assert (await closed(websocket))[0] == 1012
        async with talk(served, name="new") as again:
            await again.send("hi")
            assert await again.recv() == "hi"


async def test_a_gateway_of_which_nothing_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "SILENCE", 0.3)
    async with serving(Talk) as served, talk(served) as websocket:
        await Seen.until("talk left 1006")
        assert (await closed(websocket))[0] == 1012


async def test_signs_of_life_keep_a_silent_one_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "SILENCE", 1.0)
    monkeypatch.setattr(websocket_session, "BEAT", 0.1)
    async with serving(Talk) as served, talk(served) as websocket, talk(served, name="clock") as clock:
        end = asyncio.get_running_loop().time() + 2.0
        while asyncio.get_running_loop().time() < end:
            await clock.send("tick")
            await clock.recv()
        await websocket.send("still here")
        assert await websocket.recv() == "still here"


# --- what is no WebSocket, or no Chain for one


async def test_it_is_counted(served: Served) -> None:
    async with talk(served):
        assert "\nchains_websockets 1.0\n" in (await served.http.get("/metrics")).text
    await Seen.until("talk ended")


async def test_keys_are_asked_for_and_kept_from_the_chain() -> None:
    key, entry = new_key("ada")
    async with serving(Talk, api_keys=str(entry)) as served:
        with pytest.raises(InvalidStatus) as refused:
            await talk(served).__aenter__()
        assert refused.value.response.status_code == 401
        headers = {"authorization": f"Bearer {key}", "x-test": "one"}
        async with talk(served, do="told", headers=headers) as websocket:
            assert "authorization" not in json_of(await websocket.recv())["headers"]


async def test_it_is_described() -> None:
    async with serving(Talk) as served:
        document = (await served.http.get("/openapi.json")).json()
    OpenAPIV31SpecValidator(document).validate()
    assert {"/websocket", "/healthz"} <= document["paths"].keys()
    assert not {"/run_remote", "/async_run_remote"} & document["paths"].keys()
    assert {"101", "426", "429"} <= document["paths"]["/websocket"]["get"]["responses"].keys()


async def test_over_tls(tmp_path: Path) -> None:
    authority, trust = trustme.CA(), ssl.create_default_context()
    authority.configure_trust(trust)
    issued = authority.issue_cert("127.0.0.1")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    key.write_bytes(issued.private_key_pem.bytes())
    files = {"tls_certfile": str(certificate), "tls_keyfile": str(key)}
    async with serving(Talk, workers=True, trust=trust, **files) as served:
        url = url_of(served)
        assert url.startswith("wss://")
        async with connect(url, ssl=trust, proxy=None) as websocket:
            for size in (1, 1_000_000):
                await websocket.send("x" * size)
                assert await websocket.recv() == "x" * size
            await websocket.send("\ud800".encode("utf-8", "surrogatepass"), text=True)  # no UTF-8
            assert (await closed(websocket))[0] == 1007


@pytest.mark.parametrize("origins", [None, "https://good.example"])
async def test_pages_of_other_sites_are_kept_out(origins: str | None) -> None:
    async with serving(Talk, cors_origins=origins) as served:
        own = served.url
        with pytest.raises(InvalidStatus) as refused:
            await talk(served, headers={"origin": "https://evil.example"}).__aenter__()
        assert refused.value.response.status_code == 403
        for good in (own, origins or own):
            async with talk(served, headers={"origin": good}), talk(served):
                pass


async def test_another_chain_has_none() -> None:
    async with serving(Greet) as served:
        with pytest.raises(InvalidStatus) as refused:
            await talk(served).__aenter__()
        assert refused.value.response.status_code == 404
        assert "/websocket" not in (await served.http.get("/openapi.json")).json()["paths"]


async def test_run_remote_names_the_way() -> None:
    async with serving(Talk) as served:
        problem = problem_of(await served.call(name="you"), 426)
        assert problem["code"] == "upgrade-required"
        assert "/websocket" in problem["detail"]
        response = await served.http.get("/websocket")
        assert problem_of(response, 426)["code"] == "upgrade-required"
        assert response.headers["upgrade"] == "websocket"
        assert (await served.http.post("/websocket")).status_code == 405


async def test_what_fails_before_it_is_open_is_an_answer() -> None:
    async with serving(Talk, workers=False, max_requests=1) as served:
        requests = await served.follow(served.topic)
        first = asyncio.ensure_future(talk(served, headers={"x-request-timeout": "2"}).__aenter__())
        await take(requests, 1)
        await requests.close()
        with pytest.raises(InvalidStatus) as refused:
            await talk(served).__aenter__()
        assert refused.value.response.status_code == 429
        assert refused.value.response.headers["retry-after"]
        assert b'"code":"overloaded"' in (refused.value.response.body or b"")
        with pytest.raises(InvalidStatus) as late:
            await first
        assert late.value.response.status_code == 504
