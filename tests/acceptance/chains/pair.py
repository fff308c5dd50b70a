"""A Chain whose streams take a while."""

import asyncio
from collections.abc import AsyncIterator

import chains_stream as chains


@chains.mark_entrypoint
class Tell(chains.ChainletBase):
    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=100))

    async def run_remote(self, name: str, words: int, pause: float = 0.0) -> AsyncIterator[str]:
        for number in range(words):
            yield f"{name} {number}\n"
            if number % 10 == 0:
                await asyncio.sleep(pause)
