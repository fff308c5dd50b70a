"""Chainlets that give back what they get, and that gather many such answers."""

import asyncio

import chains_stream as chains

WIDE = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=512))


@chains.mark_entrypoint
class Echo(chains.ChainletBase):
    remote_config = WIDE

    async def run_remote(self, text: str) -> str:
        return text


@chains.mark_entrypoint
class FanOut(chains.ChainletBase):
    """Has each of 32 calls give its part back, and puts them together."""

    remote_config = WIDE

    def __init__(self, echo: Echo = chains.depends(Echo)) -> None:
        self._echo = echo

    async def run_remote(self, text: str) -> str:
        size = len(text) // 32
        parts = [text[number * size : (number + 1) * size] for number in range(32)]
        return "".join(await asyncio.gather(*(self._echo.run_remote(part) for part in parts)))


@chains.mark_entrypoint
class Sleep(chains.ChainletBase):
    """Takes 20 ms of time and none of the processor, eight at once a worker."""

    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=8))

    async def run_remote(self, text: str) -> str:
        await asyncio.sleep(0.02)
        return text
