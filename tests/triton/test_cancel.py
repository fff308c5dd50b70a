"""Whoever goes takes the work with them: the model itself sees that it is cancelled."""

import asyncio
from contextlib import aclosing

import httpx
import pytest

import chains_stream as chains
from chainlets.triton_engine import Sampling, TritonConfig, TritonTextConfig
from tests.serving import serving
from tests.triton.chainlets import Chat, Generate, Wait
from tests.triton.server import URL, Notes

pytestmark = pytest.mark.usefixtures("triton")

LONG = Sampling(max_tokens=100_000)
SECONDS = 30.0  # for which `Wait` would wait


def endless(key: str) -> str:
    return f"slowly endless key={key}"


async def test_leaving_a_stream_cancels_in_triton(key: str) -> None:
    async with chains.run_chain(Generate) as chain:
        async with aclosing(chain.run_remote(endless(key), LONG)) as pieces:  # type: ignore[type-var] # a generator
            assert await anext(pieces) == " slowly"
        await Notes(key).have("cancelled")


async def test_leaving_a_chainlets_own_stream_cancels_at_once(key: str) -> None:
    async with Generate() as model:
        async with aclosing(
            model.infer_stream({"text_input": endless(key), "max_tokens": 100_000, "stream": True})
        ) as s:
            await anext(s)
        await Notes(key).have("cancelled", seconds=2)


async def test_cancelling_a_task_cancels_its_stream(key: str) -> None:
    async def read() -> None:
        async for _ in chain.run_remote(endless(key), LONG):
            pass

    async with chains.run_chain(Generate) as chain:
        task = asyncio.create_task(read())
        await Notes(key).have("token")
        task.cancel()
        await Notes(key).have("cancelled")
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_cancelling_a_unary_call_cancels_in_triton(key: str) -> None:
    async with chains.run_chain(Wait) as chain:
        task = asyncio.create_task(chain.run_remote(key, SECONDS))
        await Notes(key).have("began")
        task.cancel()
        await Notes(key).have("cancelled")
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_handle_cancels_in_triton(key: str) -> None:
    async with chains.run_chain(Wait) as chain:
        handle = await chain.submit(key, SECONDS)
        await Notes(key).have("began")
        await handle.cancel()
        await Notes(key).have("cancelled")


async def test_the_deadline_of_a_request_ends_it_in_triton(key: str) -> None:
    async with chains.run_chain(Wait, deadline=0.5) as chain:
        with pytest.raises(chains.DeadlineExceededError):
            await chain.run_remote(key, SECONDS)
        await Notes(key).have("cancelled")
    stream = f"{key}-stream"
    async with chains.run_chain(Generate, deadline=0.5) as chain:
        with pytest.raises(chains.DeadlineExceededError):
            async for _ in chain.run_remote(endless(stream), LONG):
                pass
        await Notes(stream).have("cancelled")


class Impatient(Wait):
    config = TritonConfig(url=URL, model="waiting", timeout=0.3)


class ImpatientChat(Generate):
    config = TritonTextConfig(url=URL, model="tensorrt_llm_bls", timeout=0.3)


async def test_its_own_timeout_ends_it_in_triton(key: str) -> None:
    async with chains.run_chain(Impatient) as chain:
        with pytest.raises(chains.CallTimeoutError, match=r"model `waiting` at .*: no answer in time"):
            await chain.run_remote(key, SECONDS)
        await Notes(key).have("cancelled")
    stream = f"{key}-stream"
    async with chains.run_chain(ImpatientChat) as chain:
        with pytest.raises(chains.CallTimeoutError):
            async for _ in chain.run_remote(endless(stream), LONG):
                pass
        await Notes(stream).have("cancelled")


async def test_a_client_that_leaves_the_gateway_frees_the_model(key: str) -> None:
    body = {
        "model": "any",
        "messages": [{"role": "user", "content": endless(key)}],
        "stream": True,
        "max_tokens": 99_999,
    }
    async with serving(Chat) as served:
        async with served.http.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.status_code == httpx.codes.OK
            await anext(response.aiter_bytes())
        await Notes(key).have("cancelled")


async def test_draining_a_worker_lets_its_stream_finish(key: str) -> None:
    async with serving(Generate) as served:
        arguments = {"prompt": f"slowly a b c d e key={key}"}
        async with served.http.stream("POST", "/run_remote", json=arguments) as response:
            pieces = response.aiter_text()
            await anext(pieces)
            assert served.hosted is not None
            draining = asyncio.ensure_future(served.hosted.drain())
            rest = "".join([piece async for piece in pieces])
            await draining
    assert rest.endswith(f"key={key}")
    await Notes(key).have("ended")
