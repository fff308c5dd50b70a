"""Two gateways of one Chain on Kafka: what one has begun the other goes on with, also when the first is killed."""

import asyncio
import base64
import hashlib
import hmac
import json
import queue
import signal
import subprocess
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from uuid import uuid4

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from websockets.sync.client import connect

from tests.acceptance.command import DEADLINE, HERE, STARTED, Command, Commands, commands

FILE = str(HERE / "chains" / "pair.py")
CHAT = str(HERE.parents[1] / "chainlets" / "openai_chat.py")
COUNT = str(HERE.parents[1] / "chainlets" / "websocket_count.py")
KEY = b"a key of thirty-two bytes, no less"
STREAMS = 50
WORDS = 1_500  # more than are on their way to a reader: a worker waits for one, and goes on for the next

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(180)]

SECRET = "whsec_" + base64.b64encode(KEY).decode()

Gateway = tuple[Command, str]  # with its URL


def serve(start: Commands, count: int, file: str, kafka_url: str, **variables: str) -> list[Gateway]:
    """Start a worker and so many gateways."""
    common = ("--broker", kafka_url, "--namespace", f"t{uuid4().hex[:12]}")
    worker = start("worker", file, *common)
    gateways = [start("gateway", file, "--port", "0", *common, variables=variables) for _ in range(count)]
    worker.ready()
    return [(gateway, gateway.ready()) for gateway in gateways]


@pytest.fixture(scope="module")
def gateways(request: pytest.FixtureRequest, kafka_url: str) -> Iterator[list[Gateway]]:
    """Gateways of one Chain; a test that kills one takes it out."""
    variables = {"CHAINS_WEBHOOK_SECRETS": SECRET, "CHAINS_WEBHOOK_ALLOW_PRIVATE": "true"}
    with commands() as started:
        request.node.stash[STARTED] = started
        yield serve(started, 3, FILE, kafka_url, **variables)


class Reader:
    """Reads one stream of events, and goes on with it elsewhere when it breaks off."""

    def __init__(self, http: httpx.AsyncClient, name: str) -> None:
        self.words: list[str] = []
        self.done: dict[str, int] | None = None
        self.reading = asyncio.Event()
        self._http = http
        self._name = name
        self._id = ""

    @property
    def whole(self) -> bool:
        return self.words == [f"{self._name} {number}\n" for number in range(WORDS)] and self.done == {"chunks": WORDS}

    async def begin(self, url: str) -> None:
        body = {"name": self._name, "words": WORDS, "pause": 0.04}
        headers = {"accept": "text/event-stream"}
        async with self._http.stream("POST", f"{url}/run_remote", json=body, headers=headers) as answer:
            self._id = answer.headers["x-request-id"]
            with suppress(httpx.TransportError):
                await self._read(answer)

    async def go_on(self, url: str) -> None:
        headers = {"last-event-id": str(len(self.words) - 1)} if self.words else {}
        path = f"{url}/async_request/{self._id}/events"
        async with self._http.stream("GET", path, headers=headers) as answer:
            answer.raise_for_status()
            await self._read(answer)

    async def _read(self, answer: httpx.Response) -> None:
        async with aclosing(events(answer)) as found:
            async for kind, number, data in found:
                if kind == "done":
                    self.done = json.loads(data)
                    return
                assert kind == "message", data
                assert number == len(self.words), "each once, in order"
                self.words.append(json.loads(data))
                if len(self.words) == WORDS // 10:
                    self.reading.set()


async def events(answer: httpx.Response) -> AsyncGenerator[tuple[str, int, str], None]:
    kind, number, data = "message", -1, ""
    async for line in answer.aiter_lines():
        name, _, value = line.partition(": ")
        match name:
            case "event":
                kind = value
            case "id":
                number = int(value)
            case "data":
                data = value
            case "" if data:
                yield kind, number, data
                kind, number, data = "message", -1, ""


async def kill_amid_streams(first: Command, url: str, other: str) -> list[Reader]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=DEADLINE, limits=limits, trust_env=False) as http:
        readers = [Reader(http, f"r{number}") for number in range(STREAMS)]
        async with asyncio.TaskGroup() as beginning:
            for reader in readers:
                beginning.create_task(reader.begin(url))
            await asyncio.gather(*(reader.reading.wait() for reader in readers))
            first.send(signal.SIGKILL)
        assert all(reader.done is None for reader in readers), "it was killed amid them all"
        await asyncio.gather(*(reader.go_on(other) for reader in readers))
        return readers


def curl(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = ["curl", "-sS", "-N", "--max-time", "60", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=DEADLINE)


def test_with_curl(gateways: list[Gateway]) -> None:
    (_, url), (_, other) = gateways[:2]
    body = json.dumps({"name": "c", "words": 3})
    made = curl("-i", f"{url}/run_remote", "--json", body)
    head, _, text = made.stdout.partition("\n\n" if "\n\n" in made.stdout else "\r\n\r\n")
    request_id = next(line.split(": ")[1].strip() for line in head.splitlines() if line.startswith("x-request-id"))
    assert text == "c 0\nc 1\nc 2\n"
    again = curl("-H", "Last-Event-ID: 1", f"{other}/async_request/{request_id}/events")
    assert again.stdout == 'retry: 1000\n\nid: 2\ndata: "c 2\\n"\n\nevent: done\ndata: {"chunks":3}\n\n'
    accepted = json.loads(curl(f"{url}/async_run_remote", "--json", body).stdout)
    report = curl("-H", "Prefer: wait=20", f"{other}/async_request/{accepted['request_id']}").stdout
    assert json.loads(report)["result"] == ["c 0\n", "c 1\n", "c 2\n"]
    endless = json.loads(curl(f"{url}/async_run_remote", "--json", json.dumps({"name": "e", "words": 10**9})).stdout)
    gone = curl("-X", "DELETE", f"{other}/async_request/{endless['request_id']}").stdout
    assert json.loads(gone)["status"] == "CANCELED"


def test_a_gateway_that_is_killed_loses_no_stream(gateways: list[Gateway]) -> None:
    first, url = gateways.pop(0)
    _, other = gateways[0]
    readers = asyncio.run(kill_amid_streams(first, url, other))
    assert [reader._name for reader in readers if not reader.whole] == []


def test_with_the_openai_client(start: Commands, kafka_url: str) -> None:
    urls = [url for _, url in serve(start, 2, CHAT, kafka_url)]
    messages: list[ChatCompletionMessageParam] = [
        {"role": "system", "content": "The office opens at nine. Parking is behind the house."},
        {"role": "user", "content": "When does the office open?"},
    ]
    for url in urls:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=DEADLINE) as client:
            whole = client.chat.completions.create(model="any", messages=messages)
            assert whole.choices[0].message.content == "The office opens at nine."
            with client.chat.completions.create(model="any", messages=messages, stream=True) as stream:
                text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
            assert text == "The office opens at nine."
            assert len(client.embeddings.create(model="any", input="a text").data[0].embedding) > 1
            with pytest.raises(openai.BadRequestError):
                client.chat.completions.create(model="any", messages="none")  # type: ignore[arg-type]


def test_with_a_websocket_client(start: Commands, kafka_url: str) -> None:
    urls = [url for _, url in serve(start, 2, COUNT, kafka_url)]
    for url in urls:
        with connect(f"{url.replace('http', 'ws')}/websocket", proxy=None, open_timeout=DEADLINE) as client:
            client.send("one two")
            first = json.loads(client.recv(DEADLINE))
            client.send("three")
            second = json.loads(client.recv(DEADLINE))
        assert (first["words"], second["words"]) == (2, 3)


class Receiver(BaseHTTPRequestHandler):
    """Fails the first delivery, and takes the others."""

    came: ClassVar["queue.Queue[tuple[dict[str, str], bytes]]"] = queue.Queue()
    statuses: ClassVar[list[int]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.send_response(Receiver.statuses.pop(0) if Receiver.statuses else 204)
        self.send_header("content-length", "0")
        self.end_headers()
        Receiver.came.put((dict(self.headers.items()), body))

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's
        """Say nothing."""


@contextmanager
def receiver() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/hook"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_with_a_webhook_receiver(gateways: list[Gateway]) -> None:
    first, url = gateways.pop(0)
    _, other = gateways[0]
    Receiver.statuses[:] = [503]
    with receiver() as hook:
        body = {"model_input": {"name": "w", "words": 2}, "webhook_endpoint": hook}
        accepted = httpx.post(f"{url}/async_run_remote", json=body, timeout=DEADLINE).json()
        Receiver.came.get(timeout=DEADLINE)  # which was refused
        first.send(signal.SIGKILL)  # what is still to be told is in a queue that survives it
        headers, payload = Receiver.came.get(timeout=DEADLINE)
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + payload
    mac = base64.b64encode(hmac.digest(KEY, signed, hashlib.sha256)).decode()
    assert headers["webhook-signature"] == f"v1,{mac}"
    assert headers["webhook-id"] == accepted["request_id"]
    told = json.loads(payload)
    assert (told["status"], told["data"]) == ("SUCCEEDED", ["w 0\n", "w 1\n"])
    report = httpx.get(f"{other}/async_request/{accepted['request_id']}", timeout=DEADLINE).json()
    assert report["status"] == "SUCCEEDED"
