"""Three Chainlets that hand a text on, and hand it back: over the broker, and hosted in one process."""

import chains_stream as chains

WIDE = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=512))


class Third(chains.ChainletBase):
    remote_config = WIDE

    async def run_remote(self, text: str) -> str:
        return text


@chains.mark_entrypoint
class Second(chains.ChainletBase):
    remote_config = WIDE

    def __init__(self, third: Third = chains.depends(Third)) -> None:
        self._third = third

    async def run_remote(self, text: str) -> str:
        return await self._third.run_remote(text)


@chains.mark_entrypoint
class First(chains.ChainletBase):
    remote_config = WIDE

    def __init__(self, second: Second = chains.depends(Second)) -> None:
        self._second = second

    async def run_remote(self, text: str) -> str:
        return await self._second.run_remote(text)


class FusedSecond(chains.ChainletBase):
    remote_config = WIDE

    def __init__(self, third: Third = chains.depends(Third, colocated=True)) -> None:
        self._third = third

    async def run_remote(self, text: str) -> str:
        return await self._third.run_remote(text)


@chains.mark_entrypoint
class FusedFirst(chains.ChainletBase):
    remote_config = WIDE

    def __init__(self, second: FusedSecond = chains.depends(FusedSecond, colocated=True)) -> None:
        self._second = second

    async def run_remote(self, text: str) -> str:
        return await self._second.run_remote(text)
