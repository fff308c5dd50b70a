"""A Chainlet above one whose engine dies, in one process: it waits for an answer that another process gives."""

import asyncio
from pathlib import Path
from typing import Self

import chains_stream as chains


class Engine(chains.ChainletBase):
    """Dies once, if a file in the folder says so."""

    async def __aenter__(self) -> Self:
        self._dead = asyncio.Event()
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def failed(self) -> None:
        await self._dead.wait()
        raise RuntimeError("its core was killed")

    async def run_remote(self, folder: str) -> str:
        try:
            (Path(folder) / "die").rename(Path(folder) / "died")
        except FileNotFoundError:
            return "answered"
        self._dead.set()
        raise ConnectionError("no answer from the core")


@chains.mark_entrypoint
class Above(chains.ChainletBase):
    """Asks the engine over the broker."""

    def __init__(self, engine: Engine = chains.depends(Engine)) -> None:
        self._engine = engine

    async def run_remote(self, folder: str) -> str:
        return await self._engine.run_remote(folder)
