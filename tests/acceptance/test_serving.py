"""The same requests get the same answers from one process on the embedded broker, one on Kafka, and many on Kafka."""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Self
from uuid import uuid4

import httpx
import pytest

from tests.acceptance.command import HERE, STARTED, Commands, chains, commands

ORDERS = str(HERE / "chains" / "orders.py")
ENTRYPOINTS = {"Order": (ORDERS, ["Order", "Price"]), "Tell": (f"{ORDERS}:Tell", ["Tell", "Words"])}
LARGEST_BODY = 10_000
LIMITS = {"CHAINS_MAX_BODY_BYTES": str(LARGEST_BODY)}

EVENTS, LINES, TEXT, ANY = "text/event-stream", "application/x-ndjson", "text/plain", "*/*"


class Case(NamedTuple):
    """A request, and what its answer has to be: the status, and what the body has in it."""

    name: str
    entrypoint: str
    body: str
    status: int
    has: str
    accept: str = ANY
    method: str = "POST"
    path: str = "/run_remote"
    content_type: str = "application/json"


CASES = [
    Case("unary", "Order", '{"items": [{"name": "tea"}]}', 200, '"total":3.0'),
    Case("all arguments", "Order", '{"items": [], "quantity": 5, "at": "2026-01-31T12:00:00Z"}', 200, "2026-01-31T12"),
    Case("defaults", "Order", '{"items": [{"name": "tea", "price": 2}]}', 200, '"total":4.0'),
    Case("unicode", "Order", '{"items": [{"name": "茶 🫖\\u2028"}], "greeting": "Grüße"}', 200, "Grüße: 茶 🫖"),
    Case("nested", "Order", '{"items": [{"name": "a", "tags": ["y", "x"]}, {"name": "b"}]}', 200, "a['x', 'y'], b"),
    Case("bytes", "Order", '{"items": []}', 200, '"data":"AP8="'),
    Case("a wrong type", "Order", '{"items": [{"name": 7}]}', 400, '"path":"$.items[0].name"'),
    Case("out of bounds", "Order", '{"items": [], "quantity": 0}', 400, '"path":"$.quantity"'),
    Case("not of the choices", "Order", '{"items": [], "greeting": "Ciao"}', 400, '"path":"$.greeting"'),
    Case("a missing argument", "Order", '{"quantity": 1}', 400, '"path":"$.items"'),
    Case("an unknown argument", "Order", '{"items": [], "qantity": 1}', 400, '"path":"$.qantity"'),
    Case("no arguments", "Order", "", 400, '"path":"$.items"'),
    Case("malformed JSON", "Order", '{"items": [', 400, "malformed"),
    Case("no object", "Order", "[]", 400, "Expected `object`"),
    Case("not JSON", "Order", "items=tea", 415, "JSON", content_type="application/x-www-form-urlencoded"),
    Case("a user's error", "Order", '{"items": [{"name": "nothing"}]}', 500, "there is no price for »nothing«"),
    Case("an error with a status", "Order", '{"items": [{"name": "unicorn"}]}', 409, "2 unicorns"),
    Case("too large", "Order", '{"items": [{"name": "' + LARGEST_BODY * "x" + '"}]}', 413, "bytes"),
    Case("an unknown route", "Order", "", 404, "Not Found", path="/nowhere"),
    Case("a wrong method", "Order", "", 405, "Method Not Allowed", method="GET"),
    Case("nothing acceptable", "Order", '{"items": []}', 406, "application/json", accept="image/png"),
    Case("health", "Order", "", 200, '"ok"', method="GET", path="/healthz"),
    Case("readiness", "Order", "", 200, '"ok"', method="GET", path="/readyz"),
    Case("openapi", "Order", "", 200, '"Receipt"', method="GET", path="/openapi.json"),
    Case("raw", "Tell", '{"text": "one two", "times": 2}', 200, "one two one two "),
    Case("events", "Tell", '{"text": "one two"}', 200, 'id: 1\ndata: "two "\n\nevent: done\n', accept=EVENTS),
    Case("lines", "Tell", '{"text": "one two"}', 200, '"one "\n"two "\n', accept=LINES),
    Case("text", "Tell", '{"text": "zwölf 🦆"}', 200, "zwölf 🦆 ", accept=TEXT),
    Case("a stream's defaults", "Tell", "{}", 200, "nothing was told "),
    Case("an empty stream", "Tell", '{"times": 0}', 200, ""),
    Case("an empty stream as events", "Tell", '{"times": 0}', 200, "event: done", accept=EVENTS),
    Case("line separators", "Tell", '{"text": "a\\u2028b\\nc\\r\\nd"}', 200, '"a\\u2028b\\nc\\r\\nd "', accept=LINES),
    Case("a long stream", "Tell", f'{{"text": "{2000 * "x y "}z"}}', 200, 2000 * "x y " + "z", accept=TEXT),
    Case("a stream that fails", "Tell", '{"text": "one stop!"}', 200, "event: error\ndata: {", accept=EVENTS),
    Case("lines that fail", "Tell", '{"text": "one stop!"}', 200, '"one "\n{"error":{', accept=LINES),
    Case("raw that fails", "Tell", '{"text": "one stop!"}', 200, "one BROKEN OFF"),
    Case("a stream that fails at once", "Tell", '{"text": "stop!"}', 500, "told to stop"),
    Case("a stream of wrong arguments", "Tell", '{"text": 1}', 400, '"path":"$.text"', accept=EVENTS),
]


class Answer(NamedTuple):
    status: int
    content_type: str | None
    body: str


class Deployment:
    """Both entrypoints, served in one of the ways."""

    def __init__(self, urls: dict[str, str]) -> None:
        self.urls = urls
        self._http = httpx.Client(timeout=30)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def ask(self, case: Case) -> Answer:
        """Send a request; of the answer, what is not this request's alone."""
        headers = {"accept": case.accept}
        if case.body:
            headers["content-type"] = case.content_type
        url = self.urls[case.entrypoint] + case.path
        with self._http.stream(case.method, url, content=case.body.encode(), headers=headers) as response:
            parts: list[bytes] = []
            try:
                parts.extend(response.iter_raw())
            except httpx.RemoteProtocolError:
                parts.append(b"BROKEN OFF")
            body = b"".join(parts).decode()
            request_id = response.headers["x-request-id"]
            assert re.fullmatch(r"[\w.-]{16,}", request_id)
            return Answer(
                response.status_code, response.headers.get("content-type"), body.replace(request_id, "REQUEST-ID")
            )


def in_one_process(start: Commands, *options: str) -> dict[str, str]:
    started = {
        name: start("run", target, "--port", "0", *options, variables=LIMITS)
        for name, (target, _) in ENTRYPOINTS.items()
    }
    return {name: command.ready() for name, command in started.items()}


def in_many_processes(start: Commands, *options: str) -> dict[str, str]:
    gateways, workers = {}, []
    for name, (target, names) in ENTRYPOINTS.items():
        gateways[name] = start("gateway", target, "--port", "0", *options, variables=LIMITS)
        workers += [start("worker", target, "--chainlet", chainlet, *options) for chainlet in names]
    for worker in workers:
        assert worker.ready() == ""
    return {name: gateway.ready() for name, gateway in gateways.items()}


@pytest.fixture(scope="module")
def started(request: pytest.FixtureRequest) -> Iterator[Commands]:
    with commands() as started:
        request.node.stash[STARTED] = started
        yield started


@pytest.fixture(scope="module")
def memory(started: Commands) -> Iterator[Deployment]:
    with Deployment(in_one_process(started)) as deployment:
        yield deployment


@pytest.fixture(scope="module")
def kafka(started: Commands, kafka_url: str) -> Iterator[dict[str, Deployment]]:
    one = ("--broker", kafka_url, "--namespace", f"t{uuid4().hex[:12]}")
    many = ("--broker", kafka_url, "--namespace", f"t{uuid4().hex[:12]}")
    with ExitStack() as stack:
        yield {
            "one": stack.enter_context(Deployment(in_one_process(started, *one))),
            "many": stack.enter_context(Deployment(in_many_processes(started, *many))),
        }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_on_memory(memory: Deployment, case: Case) -> None:
    answer = memory.ask(case)
    assert (answer.status, case.has in answer.body) == (case.status, True), answer


@pytest.mark.kafka
@pytest.mark.parametrize("way", ["one", "many"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_on_kafka_as_on_memory(memory: Deployment, kafka: dict[str, Deployment], case: Case, way: str) -> None:
    assert kafka[way].ask(case) == memory.ask(case)


def test_an_error_comes_with_its_way_through_the_chainlets(memory: Deployment) -> None:
    body = '{"items": [{"name": "nothing"}]}'
    problem: dict[str, Any] = httpx.post(
        memory.urls["Order"] + "/run_remote", content=body, headers={"content-type": "application/json"}
    ).json()
    assert [hop[0] for hop in problem["error"]["hops"]] == ["Order", "Price"]
    assert all(Path(frame[0]).name == "orders.py" for hop in problem["error"]["hops"] for frame in hop[1])


@pytest.mark.kafka
def test_call_over_the_broker_and_through_the_gateway(kafka: dict[str, Deployment], started: Commands) -> None:
    """`chains call` gets from the running workers what it gets in one process."""
    broker = next(command.arguments[-3:] for command in started.all() if command.arguments[0] == "worker")
    options = ("--broker", broker[0], "--namespace", broker[2])
    body = '{"items": [{"name": "tea"}]}'
    local = chains("call", ORDERS, body)
    assert local.returncode == 0, local.stderr
    for arguments in ((ORDERS, body, *options), (kafka["many"].urls["Order"], body)):
        done = chains("call", *arguments)
        assert (done.returncode, done.stdout, done.stderr) == (0, local.stdout, "")
