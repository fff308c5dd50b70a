"""Chains that do next to nothing, many times at once."""

from collections.abc import AsyncIterator

import chains_stream as chains

WIDE = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=256))


class Below(chains.ChainletBase):
    remote_config = WIDE

    async def run_remote(self, number: int) -> int:
        return number + 1


@chains.mark_entrypoint
class Above(chains.ChainletBase):
    remote_config = WIDE

    def __init__(self, below: Below = chains.depends(Below)) -> None:
        self._below = below

    async def run_remote(self, number: int) -> int:
        return await self._below.run_remote(number)


@chains.mark_entrypoint
class Count(chains.ChainletBase):
    remote_config = WIDE

    async def run_remote(self, upto: int) -> AsyncIterator[int]:
        for number in range(upto):
            yield number
