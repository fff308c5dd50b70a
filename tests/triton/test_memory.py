"""Large tensors through shared memory: that they go that way, and that nothing of it stays behind."""

import asyncio
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from tritonclient.grpc.aio import InferenceServerClient

import chains_stream as chains
from chainlets import triton_memory
from chainlets.triton_engine import TritonConfig
from chainlets.triton_memory import PREFIX
from tests.triton.chainlets import Double, Wait
from tests.triton.server import PORT, ROOT, URL, Notes, Server, until

pytestmark = pytest.mark.usefixtures("triton")

ONES = np.ones((1024, 1024), np.float32)


def regions() -> list[str]:
    return sorted(path.name for path in triton_memory.FOLDER.iterdir() if PREFIX in path.name)


async def registered() -> list[str]:
    async with InferenceServerClient(f"127.0.0.1:{PORT}") as client:
        status = await client.get_system_shared_memory_status()
        return sorted(name for name in status.regions if name.startswith(PREFIX))


@pytest.fixture(autouse=True)
async def nothing_left() -> None:
    assert regions() == []


async def test_a_large_tensor_goes_through_shared_memory_both_ways() -> None:
    async with chains.run_chain(Double) as chain:
        for number in range(3):
            found = await chain.run_remote(ONES * number)
            assert found.min() == found.max() == 2 * number
        # One for the first look whether it works at all, one for the input and one for the output, used again.
        assert len(regions()) == 3
        assert await registered() == regions()
    assert regions() == []
    assert await registered() == []


async def test_outputs_of_any_size_need_a_bound() -> None:
    class Identity(Wait):
        config = TritonConfig(url=URL, model="identity", shared_memory_outputs={"BF16_OUT": 4 << 20})
        inputs: ClassVar = {}
        outputs: ClassVar = {}

    given = (np.arange(1 << 21, dtype=np.float32) % 256).reshape(2, -1)
    async with Identity() as model:
        found = (await model.infer({"BF16": given}))["BF16_OUT"]
        np.testing.assert_array_equal(found, given)
        assert len(regions()) == 3
        with pytest.raises(chains.ChainsRuntimeError, match="shared memory"):
            await model.infer({"BF16": np.zeros((1, 1 << 22), np.float32)})
    assert regions() == []


async def test_where_there_is_no_room_tensors_go_with_the_request(caplog: pytest.LogCaptureFixture) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with Double() as model:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
        try:
            for _ in range(2):
                assert (await model.infer({"x": ONES}))["y"].max() == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [record.getMessage() for record in caplog.records if "shared memory" in record.getMessage()] == [
        "no shared memory of 4194304 bytes: [Errno 27] File too large; such tensors go with the requests"
    ]
    assert regions() == []


async def test_a_stream_takes_its_inputs_from_shared_memory() -> None:
    async with Double() as model:
        (found,) = [outputs async for outputs in model.infer_stream({"x": ONES})]
        assert found["y"].max() == 2
        assert len(regions()) == 2
    assert regions() == []


async def test_many_at_once_do_not_mix() -> None:
    async with chains.run_chain(Double) as chain:
        found = await asyncio.gather(*(chain.run_remote(ONES * number) for number in range(16)))
    assert [(each.min(), each.max()) for each in found] == [(2 * number, 2 * number) for number in range(16)]
    assert regions() == []
    assert await registered() == []


class Small(Wait):
    """Even its numbers go through shared memory."""

    config = TritonConfig(url=URL, model="waiting", shared_memory_bytes=1)


async def test_a_cancelled_request_leaves_nothing(key: str) -> None:
    async with Small() as model:
        task = asyncio.create_task(model.infer({"key": key, "seconds": 30.0}))
        await Notes(key).have("began")
        before = regions()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(regions()) == len(before) - 1  # its own is gone at once, and used by nobody again
        await Notes(key).have("cancelled")

        async def let_go() -> bool:
            return await registered() == regions()

        await until(let_go)  # by the server, once it has done with it
        assert (await model.infer({"key": key, "seconds": 0.0}))["key"].tolist() == [key.encode()]
    assert regions() == []


async def test_where_the_server_can_not_open_them_tensors_go_with_the_request(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(triton_memory, "FOLDER", tmp_path)  # which is not where the server looks
    async with chains.run_chain(Double) as chain:
        for _ in range(3):
            assert (await chain.run_remote(ONES)).max() == 2
    (said,) = [record.getMessage() for record in caplog.records if "shared memory" in record.getMessage()]
    assert said.startswith(f"no shared memory for model `doubling` at {URL}: ")
    assert said.endswith("; tensors go with the requests")
    assert regions() == []


PROGRAM = f"""
import asyncio, numpy as np
from tests.triton.chainlets import Double

class Here(Double):
    config = Double.config.model_copy(update={{"url": {URL!r}}})

async def main():
    async with Here() as model:
        await model.infer({{"x": np.ones((1024, 1024), np.float32)}})
        print("done", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_what_a_killed_process_leaves_the_next_one_removes() -> None:
    running = subprocess.Popen(  # noqa: ASYNC220 - it starts in no time
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    try:
        assert running.stdout is not None
        assert await asyncio.to_thread(running.stdout.readline) == b"done\n"
        async with Double():  # a living one's are left alone
            assert len([name for name in regions() if f"-{running.pid}-" in name]) == 3
    finally:
        running.send_signal(signal.SIGKILL)
        running.communicate()
    assert len(regions()) == 3
    async with Double():
        assert len(regions()) == 1
        assert await registered() == regions()


async def test_it_is_faster_than_the_socket(triton: Server) -> None:
    class Plain(Double):
        config = TritonConfig(url=triton.url, model="doubling", shared_memory_bytes=None)

    async def seconds(cls: type[Double]) -> float:
        async with cls() as model:
            taken = []
            for _ in range(20):
                began = time.perf_counter()
                await model.infer({"x": ONES})
                taken.append(time.perf_counter() - began)
            return min(taken)  # what else the machine does comes on top

    assert await seconds(Double) < await seconds(Plain)
