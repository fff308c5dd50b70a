"""The embedded broker with one topic that is supplied from elsewhere, and others that go elsewhere."""

import asyncio
from collections.abc import Mapping, Sequence

from typing_extensions import override

from chains_stream.broker import GroupConsumer, Isolation, PartitionsChanged, Start, TopicSpec
from chains_stream.brokers.memory import MemoryBroker
from chains_stream.messages import Headers
from chains_stream.settings import Settings
from chains_stream.supply import Outlet, SupplyConsumer


class SuppliedBroker(MemoryBroker):
    """Gives `consumer` to whoever consumes `topic`, and what is published to topics that have an outlet to that."""

    def __init__(self, settings: Settings, topic: str, consumer: SupplyConsumer, outlets: Mapping[str, Outlet]) -> None:
        super().__init__(settings)
        self._supplied = topic
        self._consumer = consumer
        self._outlets = outlets

    @override
    async def ensure_topics(self, topics: Sequence[TopicSpec]) -> None:
        await super().ensure_topics(topics)
        for spec in topics:
            if spec.name in self._outlets:
                await self._outlets[spec.name].ensure(spec)

    @override
    async def partitions(self, topic: str) -> int:
        outlet = self._outlets.get(topic)
        return await (super().partitions(topic) if outlet is None else outlet.partitions())

    @override
    async def record_limit(self, topic: str) -> int:
        ours = await super().record_limit(topic)
        outlet = self._outlets.get(topic)
        its = None if outlet is None else await outlet.record_limit()
        return ours if its is None else min(ours, its)

    @override
    def put(
        self,
        topic: str,
        value: bytes,
        *,
        partition: int,
        key: bytes | None = None,
        headers: Headers = (),
        durable: bool = True,
    ) -> "asyncio.Future[int] | None":
        if topic in self._outlets:
            return None
        return super().put(topic, value, partition=partition, key=key, headers=headers, durable=durable)

    @override
    async def publish(
        self,
        topic: str,
        value: bytes,
        *,
        partition: int,
        key: bytes | None = None,
        headers: Headers = (),
        durable: bool = True,
    ) -> "asyncio.Future[int]":
        outlet = self._outlets.get(topic)
        if outlet is not None:
            return await outlet.publish(value, partition=partition, key=key, headers=headers)
        return await super().publish(topic, value, partition=partition, key=key, headers=headers, durable=durable)

    @override
    async def consume(  # type: ignore[override] # a member may be of another kind: the protocol is the same
        self,
        topic: str,
        group: str,
        *,
        on_assigned: PartitionsChanged,
        on_revoked: PartitionsChanged,
        isolation: Isolation = "read_uncommitted",
        start: Start = "earliest",
    ) -> GroupConsumer:
        if topic == self._supplied:
            await self._consumer.join(on_assigned, on_revoked)
            return self._consumer
        return await super().consume(
            topic, group, on_assigned=on_assigned, on_revoked=on_revoked, isolation=isolation, start=start
        )
