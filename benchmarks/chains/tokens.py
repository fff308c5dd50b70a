"""Chainlets that stream: tokens from memory, tokens at an engine's pace, and streams that wait."""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import chains_stream as chains

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # it is loaded by path

from benchmarks import pacing
from benchmarks.rivals import tokens

WIDE = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=1024))


@chains.mark_entrypoint
class Tokens(chains.ChainletBase):
    """As fast as they are taken."""

    remote_config = WIDE

    async def run_remote(self, count: int) -> AsyncIterator[str]:
        for number in range(count):
            yield tokens.token(number)


@chains.mark_entrypoint
class Paced(chains.ChainletBase):
    """As the synthetic engine gives them."""

    remote_config = WIDE

    async def run_remote(self, count: int, first: float, interval: float) -> AsyncIterator[str]:
        async for text in pacing.generate(pacing.Engine(count, first, interval)):
            yield text


@chains.mark_entrypoint
class Wait(chains.ChainletBase):
    """One token, and then nothing more."""

    remote_config = WIDE

    async def run_remote(self) -> AsyncIterator[str]:
        yield "first"
        await asyncio.Event().wait()
