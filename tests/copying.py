"""A process that copies a topic to another one in transactions, for tests to stop and kill.

``python -m tests.copying URL SOURCE SINK GROUP INSTANCE`` copies each record to the same partition of the sink; the
INSTANCE may be empty. One transaction in ten is aborted and done again.
"""

import asyncio
import random
import sys
from collections import defaultdict
from collections.abc import Sequence

from chains_stream.broker import Broker, Committed, GroupConsumer, Record, Transactor
from chains_stream.brokers import open_broker
from chains_stream.errors import BrokerError
from chains_stream.settings import Settings


class Holding:
    """A partition that is held: its transactor, and from where on it is to be done."""

    def __init__(self, transactor: Transactor) -> None:
        self.transactor = transactor
        self.floor = 0


class Copier:
    """A member of the group."""

    def __init__(self, broker: Broker, source: str, sink: str, group: str) -> None:
        self._broker = broker
        self._source = source
        self._sink = sink
        self._group = group
        self._held: dict[int, Holding] = {}
        self._consumer: GroupConsumer | None = None

    async def run(self) -> None:
        self._consumer = await self._broker.consume(
            self._source,
            self._group,
            on_assigned=self._assigned,
            on_revoked=self._revoked,
            isolation="read_committed",
        )
        while True:
            records = await self._consumer.fetch(random.randint(1, 60))
            # Those of the moment: what was fetched must not go out under what a later assignment brings.
            held = dict(self._held)
            by_partition = defaultdict(list)
            for record in records:
                by_partition[record.partition].append(record)
            for number, of_partition in by_partition.items():
                await self._copy(number, held[number], of_partition)

    async def _copy(self, number: int, holding: Holding, records: Sequence[Record]) -> None:
        """Copy records, and again what did not count, as long as the partition stays ours."""
        while due := [record for record in records if record.offset >= holding.floor]:
            if self._held.get(number) is not holding:
                return
            try:
                if random.random() < 0.1:
                    await self._write(holding.transactor, due)
                    await holding.transactor.abort()
                await self._write(holding.transactor, due)
                holding.transactor.add_offsets(self._source, self._group, {number: Committed(due[-1].offset + 1)})
                await holding.transactor.commit()
            except BrokerError:
                await self._begin_anew(number, holding)
            else:
                holding.floor = due[-1].offset + 1

    async def _write(self, transactor: Transactor, records: Sequence[Record]) -> None:
        transactor.begin()
        for record in records:
            await transactor.publish(self._sink, record.value, partition=record.partition)

    async def _begin_anew(self, number: int, holding: Holding) -> None:
        """Go on from what is committed, under a new transactor, until the group says that the partition is lost."""
        while self._held.get(number) is holding:
            await holding.transactor.close()
            holding.transactor = self._broker.transactor(f"{self._group}.{number}")
            try:
                await asyncio.sleep(random.random())  # whoever fenced us may not know yet that it has lost it
                await holding.transactor.start()
                assert self._consumer is not None, "records come from it"
                committed = await self._consumer.committed([number])
            except BrokerError:
                continue
            holding.floor = committed[number].offset if number in committed else 0
            return

    async def _assigned(self, partitions: frozenset[int]) -> None:
        for number in partitions:
            holding = self._held[number] = Holding(self._broker.transactor(f"{self._group}.{number}"))
            await holding.transactor.start()

    async def _revoked(self, _partitions: frozenset[int]) -> None:
        revoked, self._held = self._held, {}
        await asyncio.gather(*[holding.transactor.close() for holding in revoked.values()])


async def main(url: str, source: str, sink: str, group: str, instance: str) -> None:
    kafka = {"session_timeout_ms": 6_000}
    broker = open_broker(Settings.of(broker=url, instance_id=instance or None, kafka=kafka))
    await broker.start()
    await Copier(broker, source, sink, group).run()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
