"""A Chainlet with an engine that dies when it is asked to; the file in a folder says whether it may."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Self

import chains_stream as chains


@chains.mark_entrypoint
class Engine(chains.ChainletBase):
    """Counts, and goes on where another worker was lost."""

    remote_config = chains.RemoteConfig(
        compute=chains.Compute(predict_concurrency=8), options=chains.ChainletOptions(resumable=True)
    )

    async def __aenter__(self) -> Self:
        self._dead = asyncio.Event()
        print("the engine has begun", flush=True)  # noqa: T201 - for the test to see
        return self

    async def __aexit__(self, *_: object) -> None:
        print("the engine has ended", flush=True)  # noqa: T201 - for the test to see

    async def is_healthy(self) -> bool:
        return not self._dead.is_set()

    async def failed(self) -> None:
        await self._dead.wait()
        raise RuntimeError("its core was killed")

    async def run_remote(self, folder: str, upto: int = 6) -> AsyncIterator[int]:
        for number in range(len(chains.current_request().emitted), upto):
            yield number
            try:
                (Path(folder) / "die").rename(Path(folder) / f"died at {number}")
            except FileNotFoundError:
                continue
            self._dead.set()
            raise ConnectionError("no answer from the core")
