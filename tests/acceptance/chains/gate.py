"""A Chain that waits for a file, so that a test knows what is running and decides when it ends."""

# ruff: noqa: ASYNC110, ASYNC240 - the test is another process, and files are how the two speak
import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import chains_stream as chains


class Wait(chains.ChainletBase):
    """Notes that it began, and waits to be let go."""

    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=16))

    async def run_remote(self, folder: str) -> str:
        Path(folder, "began").touch()
        try:
            while not Path(folder, "go").exists():
                await asyncio.sleep(0.02)
        except asyncio.CancelledError:
            Path(folder, "cancelled").touch()
            raise
        return "let go"


@chains.mark_entrypoint
class Gate(chains.ChainletBase):
    """Says that it waits, waits, and says so."""

    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=16))

    def __init__(self, wait: Wait = chains.depends(Wait)) -> None:
        self._wait = wait

    async def run_remote(self, folder: str) -> AsyncIterator[str]:
        yield "waiting"
        yield await self._wait.run_remote(folder)
