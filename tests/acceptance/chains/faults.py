"""Chains of two levels whose every answer can be checked: with one answer, with a stream, and with a resumable one.

Each run of a Chainlet is noted in the file that CHAOS_RUNS names, so that a test can count them.
"""

import asyncio
import os
import time
import zlib
from collections.abc import AsyncIterator
from pathlib import Path

import chains_stream as chains

WIDE = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=64))
RESUMABLE = chains.RemoteConfig(
    compute=chains.Compute(predict_concurrency=64), options=chains.ChainletOptions(resumable=True)
)


def item(request: str, sequence: int) -> int:
    """What the chunk `sequence` of a request must be; 0 for its one answer."""
    return zlib.crc32(f"{request}/{sequence}".encode())


def note(chainlet: str, request: str) -> None:
    with Path(os.environ["CHAOS_RUNS"]).open("a", encoding="utf-8") as runs:
        runs.write(f"{request} {chainlet} {os.getpid()} {time.time():.3f}\n")  # one write, so that lines stay whole


class Work(chains.ChainletBase):
    remote_config = WIDE

    async def run_remote(self, request: str, ms: int) -> int:
        note("Work", request)
        await asyncio.sleep(ms / 1000)
        return item(request, 0)


@chains.mark_entrypoint
class Answer(chains.ChainletBase):
    remote_config = WIDE

    def __init__(self, work: Work = chains.depends(Work)) -> None:
        self._work = work

    async def run_remote(self, request: str, ms: int) -> int:
        note("Answer", request)
        return await self._work.run_remote(request, ms)


class Items(chains.ChainletBase):
    remote_config = WIDE

    async def run_remote(self, request: str, chunks: int, ms: int) -> AsyncIterator[int]:
        note("Items", request)
        for sequence in range(chunks):
            await asyncio.sleep(ms / 1000)
            yield item(request, sequence)


@chains.mark_entrypoint
class Tell(chains.ChainletBase):
    remote_config = WIDE

    def __init__(self, items: Items = chains.depends(Items)) -> None:
        self._items = items

    async def run_remote(self, request: str, chunks: int, ms: int) -> AsyncIterator[int]:
        note("Tell", request)
        async for value in self._items.run_remote(request, chunks, ms):
            yield value


class MoreItems(chains.ChainletBase):
    remote_config = RESUMABLE

    async def run_remote(self, request: str, first: int, chunks: int, ms: int) -> AsyncIterator[int]:
        note("MoreItems", request)
        for sequence in range(first + len(chains.current_request().emitted), chunks):
            await asyncio.sleep(ms / 1000)
            yield item(request, sequence)


@chains.mark_entrypoint
class Resume(chains.ChainletBase):
    remote_config = RESUMABLE

    def __init__(self, items: MoreItems = chains.depends(MoreItems)) -> None:
        self._items = items

    async def run_remote(self, request: str, chunks: int, ms: int) -> AsyncIterator[int]:
        note("Resume", request)
        first = len(chains.current_request().emitted)
        async for value in self._items.run_remote(request, first, chunks, ms):
            yield value
