"""Chainlets that kill their process, that go on with a stream, and that tell in a file what they were asked to run."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import chains_stream as chains

WIDE = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=16))
RESUMABLE = chains.RemoteConfig(
    compute=chains.Compute(predict_concurrency=16), options=chains.ChainletOptions(resumable=True)
)


def note(folder: str, line: str) -> None:
    """Append a line; what is written at once is not mixed up with what other processes write."""
    with Path(folder, "runs").open("a", encoding="utf-8") as runs:
        runs.write(line + "\n")


async def exists(path: Path) -> None:
    while not path.exists():  # noqa: ASYNC110, ASYNC240 - the test is another process, and files are how the two speak
        await asyncio.sleep(0.01)


@chains.mark_entrypoint
class Work(chains.ChainletBase):
    """Notes each run by its name; kills its worker, or waits for a file, if told to."""

    remote_config = WIDE

    async def run_remote(self, name: str, folder: str, then: str = "return", wait: str = "") -> str:
        note(folder, name)
        if then == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            if wait:
                await exists(Path(folder, wait))
        except asyncio.CancelledError:
            note(folder, f"{name} cancelled")
            raise
        return name


@chains.mark_entrypoint
class Tale(chains.ChainletBase):
    """A stream that another worker can go on with; waits at its middle for a file if told to."""

    remote_config = RESUMABLE

    async def run_remote(self, name: str, upto: int, folder: str, wait: str = "") -> AsyncIterator[int]:
        begin = len(chains.current_request().emitted)
        note(folder, f"{name} from {begin}")
        assert list(chains.current_request().emitted) == list(range(begin))
        for number in range(begin, upto):
            if wait and number == upto // 2:
                note(folder, f"{name} waits")
                await exists(Path(folder, wait))
            yield number
