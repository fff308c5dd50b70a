"""Passes events on with all that came with them: what others wrote, and will read."""

from typing import Literal

import msgspec
import pydantic

import chains_stream as chains


class Options(pydantic.BaseModel):
    source: str = "source"
    sink: str = "sink"
    delivery: Literal["at_least_once", "exactly_once", "at_most_once"] = "at_least_once"


options = chains.parameters(Options)


class Reading(msgspec.Struct):
    sensor: str
    celsius: float


class Converted(msgspec.Struct):
    sensor: str
    fahrenheit: float
    partition: int


@chains.mark_entrypoint
class Convert(chains.ChainletBase):
    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=16))
    source = chains.Source(options.source, delivery=options.delivery)
    sink = chains.Sink(options.sink)

    async def run_remote(self, event: chains.Event[Reading]) -> chains.Output[Converted]:
        converted = Converted(event.value.sensor, event.value.celsius * 9 / 5 + 32, event.partition)
        return chains.Output(converted, headers=event.headers | {"unit": b"F"})
