"""What tests of brokers do: join a group and note what it is told, fill a topic, read it."""

import asyncio
from typing import Any

from chains_stream.broker import Broker, Committed, GroupConsumer, Isolation, Record, Start

HOUR_MS = 3_600_000


class Member:
    """A member of a group that notes what it is told and can wait for it."""

    def __init__(self, broker: Broker, topic: str) -> None:
        self.held: frozenset[int] = frozenset()
        self.revoked: list[frozenset[int]] = []
        self.commit_on_revoke: dict[int, Committed] = {}
        self.hesitate = asyncio.Event()  # in the callback, until `go_on`
        self.hesitate_to_revoke = asyncio.Event()
        self.hesitating = asyncio.Event()
        self.go_on = asyncio.Event()
        self.consumer: GroupConsumer
        self._broker = broker
        self._topic = topic
        self._changed = asyncio.Event()

    async def join(
        self, group: str = "", *, isolation: Isolation = "read_uncommitted", start: Start = "earliest"
    ) -> "Member":
        self.consumer = await self._broker.consume(
            self._topic,
            group or self._topic,
            on_assigned=self._assigned,
            on_revoked=self._revoked,
            isolation=isolation,
            start=start,
        )
        return self

    async def until(self, count: int) -> None:
        async with asyncio.timeout(30):
            while len(self.held) != count:
                self._changed.clear()
                await self._changed.wait()

    async def take(self, count: int) -> list[Record]:
        """Fetch so many records, in all."""
        records: list[Record] = []
        async with asyncio.timeout(30):
            while len(records) < count:
                records += await self.consumer.fetch(count - len(records))
        return records

    async def _assigned(self, partitions: frozenset[int]) -> None:
        await self._hesitate(self.hesitate)
        self.held = partitions
        self._changed.set()

    async def _hesitate(self, wanted: asyncio.Event) -> None:
        if wanted.is_set():
            self.hesitating.set()
            await self.go_on.wait()

    async def _revoked(self, partitions: frozenset[int]) -> None:
        await self._hesitate(self.hesitate_to_revoke)
        self.revoked.append(partitions)
        due = {partition: at for partition, at in self.commit_on_revoke.items() if partition in partitions}
        if due:
            await self.consumer.commit(due)


async def fill(broker: Broker, topic: str, values: int, partition: int = 0) -> list[int]:
    stored = [await broker.publish(topic, str(n).encode(), partition=partition) for n in range(values)]
    return list(await asyncio.gather(*stored))


async def take(reader: Any, count: int) -> list[Record]:
    records: list[Record] = []
    async with asyncio.timeout(30):
        while len(records) < count:
            records += await reader.fetch()
    return records
