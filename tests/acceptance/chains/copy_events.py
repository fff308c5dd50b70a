"""Copies events from one topic to another, with the number of the process that did."""

import asyncio
import os
from typing import Literal

import msgspec
import pydantic

import chains_stream as chains


class Options(pydantic.BaseModel):
    source: str = "source"
    sink: str = "sink"
    delivery: Literal["at_least_once", "exactly_once", "at_most_once"] = "at_least_once"


options = chains.parameters(Options)


class Numbered(msgspec.Struct):
    key: str
    number: int
    by: int = 0


@chains.mark_entrypoint
class Copy(chains.ChainletBase):
    """Copies an event; now and then it takes a turn longer, so that others overtake it."""

    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=64))
    source = chains.Source(options.source, delivery=options.delivery)
    sink = chains.Sink(options.sink)

    async def run_remote(self, event: Numbered) -> Numbered:
        if event.number % 7 == 0:
            await asyncio.sleep(0.001)
        return Numbered(event.key, event.number, os.getpid())
