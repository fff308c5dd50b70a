"""The bare loop: events consumed, run and produced with aiokafka alone, as a careful program does it.

    python -m benchmarks.rivals.events HOST:PORT SOURCE SINK GROUP GUARANTEE

It takes what is there, some batches of records at once, runs them one after the other, sends what they give, and waits
until it is stored. So there is an order of all events of a partition, and nothing else: no retries, no dead letters, no
deadlines, no concurrency, nothing that tells of what it does. Of an event that fails it dies.

- ``at_least_once``: an idempotent producer with ``acks=all``, and a commit when all outputs are stored.
- ``at_most_once``: the commit comes first.
- ``exactly_once``: a producer with a transactional id of its own for each partition, started when the partition is
  assigned, before its committed offset is read; a transaction for each batch of a partition, those of several
  partitions at once.
"""

import argparse
import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any

import msgspec
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener, TopicPartition

from benchmarks.chains.score import Ticket, score
from benchmarks.rivals import loop

BATCH_BYTES = 128 << 10  # as ours; aiokafka's 16 KiB would cost it a third

decode = msgspec.json.Decoder(Ticket).decode
encode = msgspec.json.Encoder().encode

Process = Callable[[dict[TopicPartition, Sequence[Any]]], Awaitable[None]]


async def answer(producer: AIOKafkaProducer, sink: str, records: Sequence[Any]) -> list[Awaitable[Any]]:
    """Run records, and send what they give; to be awaited until it is stored."""
    sent = []
    for record in records:
        given = await score(decode(record.value))
        sent.append(await producer.send(sink, encode(given), key=record.key))
    return sent


async def in_batches(consumer: AIOKafkaConsumer, servers: str, sink: str, *, commit_first: bool) -> Process:
    producer = AIOKafkaProducer(
        bootstrap_servers=servers, acks="all", enable_idempotence=True, max_batch_size=BATCH_BYTES
    )
    await producer.start()

    async def process(batches: dict[TopicPartition, Sequence[Any]]) -> None:
        if commit_first:
            await consumer.commit()
        sent = [future for records in batches.values() for future in await answer(producer, sink, records)]
        await asyncio.gather(*sent)  # `flush` would not tell of one that failed
        if not commit_first:
            await consumer.commit()

    return process


class Transactional(ConsumerRebalanceListener):  # type: ignore[misc] # aiokafka has no types
    """A producer for each partition that is assigned."""

    def __init__(self, servers: str, sink: str, group: str) -> None:
        self._servers = servers
        self._sink = sink
        self._group = group
        self._producers: dict[TopicPartition, AIOKafkaProducer] = {}

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        await asyncio.gather(*(self._producers.pop(place).stop() for place in revoked))

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        self._producers = {
            place: AIOKafkaProducer(
                bootstrap_servers=self._servers,
                transactional_id=f"{self._group}.{place.topic}.{place.partition}",
                max_batch_size=BATCH_BYTES,
            )
            for place in assigned
        }
        await asyncio.gather(*(producer.start() for producer in self._producers.values()))

    async def process(self, batches: dict[TopicPartition, Sequence[Any]]) -> None:
        await asyncio.gather(*(self._transact(place, records) for place, records in batches.items()))

    async def _transact(self, place: TopicPartition, records: Sequence[Any]) -> None:
        producer = self._producers[place]
        async with producer.transaction():
            await asyncio.gather(*await answer(producer, self._sink, records))
            await producer.send_offsets_to_transaction({place: records[-1].offset + 1}, self._group)


async def work(given: argparse.Namespace) -> None:
    exactly_once = given.guarantee == "exactly_once"
    consumer = AIOKafkaConsumer(
        bootstrap_servers=given.servers,
        group_id=given.group,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
    )
    if exactly_once:
        transactional = Transactional(given.servers, given.sink, given.group)
        process: Process = transactional.process
        consumer.subscribe([given.source], listener=transactional)
    else:
        process = await in_batches(consumer, given.servers, given.sink, commit_first=given.guarantee == "at_most_once")
        consumer.subscribe([given.source])
    await consumer.start()
    print("Loop is ready", flush=True)
    while True:
        if batches := await consumer.getmany(timeout_ms=1000, max_records=given.batch):
            await process(batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("servers")
    parser.add_argument("source")
    parser.add_argument("sink")
    parser.add_argument("group")
    parser.add_argument("guarantee", choices=("at_least_once", "at_most_once", "exactly_once"))
    parser.add_argument("--batch", type=int, default=2000, help="records that are taken at once, at most")
    loop.run(work(parser.parse_args()))


if __name__ == "__main__":
    main()
