"""Chainlets on the models of the tests."""

from collections.abc import AsyncIterator
from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from chainlets.triton_engine import Tensor, TritonChat, TritonConfig, TritonGenerate, TritonModel, TritonTextConfig
from tests.triton.server import URL, WAIT

Matrix = NDArray[np.float32]


class Scaled(msgspec.Struct):
    """What `batched` gives: its values, and how many requests it had at once."""

    scaled: NDArray[np.float32] = msgspec.field(name="SCALED")
    requests: int = msgspec.field(name="REQUESTS")


class Scale(TritonModel):
    config = TritonConfig(url=URL, model="batched", start_timeout=WAIT, max_in_flight=256)

    async def run_remote(
        self,
        values: Annotated[NDArray[np.float32], Tensor("VALUES")],
        factor: Annotated[float, Tensor("FACTOR")] = 2.0,
    ) -> Scaled:
        return await self.predict(Scaled, values=values, factor=factor)


class Number(msgspec.Struct):
    number: int = msgspec.field(name="NUMBER:0")
    square: int = msgspec.field(name="SQUARE:0")


class Count(TritonModel):
    config = TritonConfig(url=URL, model="counting", start_timeout=WAIT)

    async def run_remote(
        self, count: Annotated[int, Tensor("COUNT:0")], start: Annotated[int | None, Tensor("START:0")] = None
    ) -> AsyncIterator[Number]:
        async for number in self.predict_stream(Number, count=count, start=start):
            yield number


class Wait(TritonModel):
    config = TritonConfig(url=URL, model="waiting", start_timeout=WAIT)

    async def run_remote(self, key: str, seconds: float) -> str:
        return await self.predict(str, key=key, seconds=seconds)


class Fail(TritonModel):
    config = TritonConfig(url=URL, model="failing", start_timeout=WAIT)

    async def run_remote(self, how: str) -> str:
        return await self.predict(str, how=how)


class Double(TritonModel):
    config = TritonConfig(url=URL, model="doubling", start_timeout=WAIT)

    async def run_remote(self, x: Matrix) -> Matrix:
        return await self.predict(np.ndarray, x=x)


class Generate(TritonGenerate):
    config = TritonTextConfig(url=URL, model="tensorrt_llm_bls", start_timeout=WAIT)


class Chat(TritonChat):
    config = TritonTextConfig(url=URL, model="tensorrt_llm_bls", start_timeout=WAIT)
