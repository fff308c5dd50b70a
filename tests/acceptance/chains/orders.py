"""Unary and streaming entrypoints over shared Chainlets: every kind of answer that a request can get."""

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Annotated, Literal

import msgspec

import chains_stream as chains

WIDE = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=16))


class Item(msgspec.Struct):
    name: str
    price: float = 1.5
    tags: set[str] = set()


class Receipt(msgspec.Struct):
    text: str
    total: float
    at: datetime | None
    data: bytes = b"\x00\xff"


class OutOfStockError(Exception):
    """Has a status of its own, which the gateway answers with."""

    status = 409


class Price(chains.ChainletBase):
    remote_config = WIDE

    async def run_remote(self, item: Item, quantity: int) -> float:
        if item.name == "nothing":
            raise ValueError("there is no price for »nothing«")
        if item.name == "unicorn":
            raise OutOfStockError(f"{quantity} {item.name}s")
        return item.price * quantity


class Words(chains.ChainletBase):
    remote_config = WIDE

    async def run_remote(self, text: str) -> AsyncIterator[str]:
        for word in text.split(" "):
            if word == "stop!":
                raise ValueError("told to stop")
            await asyncio.sleep(0)
            yield word


@chains.mark_entrypoint("Orders")
class Order(chains.ChainletBase):
    remote_config = WIDE

    def __init__(self, price: Price = chains.depends(Price, retries=2)) -> None:
        self._price = price

    async def run_remote(
        self,
        items: list[Item],
        quantity: Annotated[int, msgspec.Meta(ge=1, le=100)] = 2,
        greeting: Literal["Hello", "Grüße"] = "Hello",
        at: datetime | None = None,
    ) -> Receipt:
        prices = await asyncio.gather(*(self._price.run_remote(item, quantity) for item in items))
        names = ", ".join(f"{item.name}{sorted(item.tags) or ''}" for item in items)
        return Receipt(f"{greeting}: {names}", sum(prices), at)


class Tell(chains.ChainletBase):
    """Streams; named on the command line as ``orders.py:Tell``."""

    remote_config = WIDE

    def __init__(self, words: Words = chains.depends(Words)) -> None:
        self._words = words

    async def run_remote(self, text: str = "nothing was told", times: int = 1) -> AsyncIterator[str]:
        for _ in range(times):
            async for word in self._words.run_remote(text):
                yield word + " "
