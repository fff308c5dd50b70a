"""The gateway's app in an ASGI server that is not ours."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import uvicorn

from chains_stream.gateway.app import Gateway
from tests.sample import Seen
from tests.serving import WAIT, Greet, Pause, RawClient, Say, serving


@pytest.fixture(autouse=True)
def nothing_seen() -> Iterator[None]:
    Seen.reset()
    yield
    Seen.reset()


@asynccontextmanager
async def in_uvicorn(entrypoint: type[Any]) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(entrypoint) as served:
        gateway = Gateway(served.chain, served.caller, served.broker, served.settings)
        await gateway.start()
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen()
            server = uvicorn.Server(uvicorn.Config(gateway.app, lifespan="off", log_config=None, ws="none"))
            running = asyncio.create_task(server._serve(sockets=[listening]))  # `serve` takes the signals too
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            try:
                async with httpx.AsyncClient(base_url=url, timeout=WAIT, trust_env=False) as http:
                    yield http
            finally:
                server.should_exit = True
                await running


async def test_a_result_and_a_refusal() -> None:
    async with in_uvicorn(Greet) as http:
        response = await http.post("/run_remote", json={"name": "you"})
        assert (response.status_code, response.json()) == (200, "Hello, you!")
        assert response.headers["x-request-id"]
        assert (await http.post("/run_remote", content=b"{}", headers={"content-type": "text/css"})).status_code == 415
        assert (await http.post("/nowhere")).status_code == 404


async def test_a_stream_to_its_end() -> None:
    async with in_uvicorn(Say) as http:
        response = await http.post("/run_remote", json={"texts": ["a", "b"]}, headers={"accept": "text/event-stream"})
    assert response.status_code == 200
    assert 'id: 0\ndata: "a"\n\n' in response.text
    assert response.text.endswith('id: 1\ndata: "b"\n\nevent: done\ndata: {"chunks":2}\n\n')


async def test_a_stream_that_fails_has_no_good_end() -> None:
    async with in_uvicorn(Say) as http:
        with pytest.raises(httpx.RemoteProtocolError):
            await http.post("/run_remote", json={"texts": ["a"], "fail": "no"}, headers={"accept": "text/plain"})


async def test_a_client_that_leaves_cancels_its_call() -> None:
    async with in_uvicorn(Pause) as http, RawClient(str(http.base_url).rstrip("/")) as client:
        await client.send({"name": "A", "then": "never"})
        await Seen.until("A waits")
        await client.leave()
        await Seen.until("A closed")
