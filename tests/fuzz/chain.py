"""Chains that answer at once and never fail: one with fields of many types, and one that talks."""

import datetime as dt
from contextlib import suppress
from typing import Annotated, Literal

import msgspec

import chains_stream as chains


class Line(msgspec.Struct):
    """One line of an order, and what goes with it."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=40)]
    price: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    parts: list["Line"] = []


class Order(msgspec.Struct, forbid_unknown_fields=True):
    """An order."""

    lines: Annotated[list[Line], msgspec.Meta(max_length=8)]
    kind: Literal["new", "again"] = "new"
    count: Annotated[int, msgspec.Meta(ge=0, le=9)] = 1
    at: dt.datetime | None = None
    seal: bytes = b""
    marks: dict[str, int | None] = {}


@chains.mark_entrypoint
class Take(chains.ChainletBase):
    """Says what was ordered."""

    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=256))

    async def run_remote(self, order: Order, note: str = "") -> list[str]:
        return [f"{line.name} {note}"[:80] for line in order.lines] * order.count


@chains.mark_entrypoint
class Echo(chains.ChainletBase):
    """Sends back what it gets, until the client leaves."""

    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=256))

    async def run_remote(self, websocket: chains.WebSocketProtocol) -> None:
        with suppress(chains.WebSocketClosedError):
            while True:
                await websocket.send(await websocket.receive())
