"""Topics of ordinary events, and hosts between them: what tests of Chainlets that are fed from topics share."""

import asyncio
import json
from contextlib import AsyncExitStack
from typing import Any
from uuid import uuid4

import msgspec

import chains_stream as chains
from chains_stream import events
from chains_stream.broker import Broker, Record, TopicSpec
from chains_stream.chain import Chain
from chains_stream.client import open_caller, open_connected
from chains_stream.settings import Settings
from chains_stream.worker import Host

PARTITIONS = 4


class Ticket(msgspec.Struct):
    id: str
    number: int = 0
    act: str = ""


class Scored(msgspec.Struct):
    id: str
    score: float


class Stream:
    """Topics of a test's own, whoever writes to them and reads them, and the hosts between."""

    def __init__(self, url: str, stack: AsyncExitStack, delivery: str) -> None:
        self.delivery = delivery
        self.tickets, self.scored, self.urgent = (
            f"{name}-{uuid4().hex[:8]}" for name in ("tickets", "scored", "urgent")
        )
        self.settings = Settings.of(
            broker=url, namespace=f"t{uuid4().hex[:8]}", partitions=PARTITIONS, reply_partitions=1, grace_period=5
        )
        self.broker: Broker
        self._stack = stack

    async def start(self) -> None:
        self.broker = await open_connected(self._stack, self.settings)
        hour = 3_600_000
        await self.broker.ensure_topics(
            [TopicSpec(topic, PARTITIONS, hour) for topic in (self.tickets, self.scored, self.urgent)]
        )

    def chainlet(self, base: type[chains.ChainletBase], **source: Any) -> type[chains.ChainletBase]:
        """Give a Chainlet that is fed from these topics."""
        source = {"delivery": self.delivery} | source
        body = {
            "__module__": base.__module__,
            "source": chains.Source(self.tickets, **source),
            "sink": (chains.Sink(self.scored), chains.Sink(self.urgent, key="id")),
        }
        return type(base.__name__, (base,), body)

    async def host(self, entrypoint: type[chains.ChainletBase]) -> Host:
        caller = await open_caller(self._stack, self.broker, self.settings)
        chain = Chain.of(entrypoint)
        host = Host(chain, chain.chainlets, self.broker, caller, self.settings)
        self._stack.push_async_callback(host.drain)
        await host.start()
        return host

    async def send(self, *tickets: Ticket | bytes, key: bytes | None = None, partition: int | None = None) -> None:
        for ticket in tickets:
            value = ticket if isinstance(ticket, bytes) else msgspec.json.encode(ticket)
            by = key if key is not None or isinstance(ticket, bytes) else ticket.id.encode()
            where = partition if partition is not None else events.partition_of(by or b"", PARTITIONS)
            await (await self.broker.publish(self.tickets, value, partition=where, key=by))

    async def read(self, topic: str, count: int) -> list[Record]:
        """Read a topic from its beginning, until so many records are there."""
        numbers = range(await self.broker.partitions(topic))
        reader = await self.broker.read(topic, dict.fromkeys(numbers, 0), isolation="read_committed")
        found: list[Record] = []
        try:
            async with asyncio.timeout(90):  # an event may wait for half a minute between two tries
                while len(found) < count:
                    found += await reader.fetch()
        finally:
            await reader.close()
        return found


def values(records: list[Record]) -> list[Any]:
    return [json.loads(record.value) for record in records]
