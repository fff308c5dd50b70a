"""The floor: bare aiokafka, as fast as we know how to make it. Raw bytes go out, and come back.

    python -m benchmarks.rivals.floor echo HOST:PORT NAME
    python -m benchmarks.rivals.floor caller HOST:PORT NAME

`--by send` produces record by record, and not in batches of its own.

The caller produces to NAME.requests, the echo produces what it consumes to NAME.replies. Values carry 8 bytes that tell
which request they belong to. Nothing is acknowledged before it is done: requests and replies are produced with
`acks=all`, and the echo commits what it has answered, once a second. No types, no errors, no deadlines, no cancelling.
"""

import argparse
import asyncio
import contextlib
from collections import deque
from itertools import cycle

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from benchmarks import driving
from benchmarks.rivals import loop

PARTITIONS = 16  # as many as our topics have
COMMIT_EVERY = 1.0  # seconds
BATCH_BYTES = 512 << 10  # of a partition in one request; the default of 16 KiB is one record of 10 KB
ID = 8  # bytes
WAIT_MS = 10_000  # for a record; one that arrives ends it


class Sender:
    """Produces values in batches of our own: what comes while one batch is on its way shares the next.

    aiokafka has one request to a broker on its way at a time, so that nothing waits longer than it would anyhow; and a
    batch costs a quarter of what `send` costs for each of its records.
    """

    def __init__(self, producer: AIOKafkaProducer, topic: str, partitions: int) -> None:
        self._producer = producer
        self._topic = topic
        self._partitions = cycle(range(partitions))
        self._values: deque[bytes] = deque()
        self._ready = asyncio.Event()
        self.taken = 0
        self.stored = 0

    def put(self, value: bytes) -> None:
        self._values.append(value)
        self.taken += 1
        self._ready.set()

    async def run(self) -> None:
        """Send what is put, until cancelled. Raises what a batch failed with."""
        while True:
            await self._ready.wait()
            self._ready.clear()
            while self._values:
                batch = self._producer.create_batch()
                count = 0
                while self._values and batch.append(key=None, value=self._values[0], timestamp=None) is not None:
                    self._values.popleft()
                    count += 1
                batch.close()
                await (await self._producer.send_batch(batch, self._topic, partition=next(self._partitions)))
                self.stored += count


class RecordSender(Sender):
    """Produces by `send`, record by record, as programs do."""

    async def run(self) -> None:
        while True:
            await self._ready.wait()
            self._ready.clear()
            while self._values:
                value, partition = self._values.popleft(), next(self._partitions)
                stored = await self._producer.send(self._topic, value, partition=partition)
                stored.add_done_callback(self._count)

    def _count(self, stored: asyncio.Future[object]) -> None:
        stored.result()
        self.stored += 1


def producer_of(address: str) -> AIOKafkaProducer:
    return AIOKafkaProducer(bootstrap_servers=address, acks="all", linger_ms=0, max_batch_size=BATCH_BYTES)


async def reading(address: str, topic: str, partitions: int, group: str | None = None) -> AIOKafkaConsumer:
    """Read partitions assigned by hand, from their ends."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=address, group_id=group, enable_auto_commit=False, auto_offset_reset="latest"
    )
    await consumer.start()
    assigned = [TopicPartition(topic, number) for number in range(partitions)]
    consumer.assign(assigned)
    await consumer.seek_to_end(*assigned)
    for partition in assigned:
        await consumer.position(partition)
    return consumer


SENDERS = {"batches": Sender, "send": RecordSender}


async def create_topics(address: str, name: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=address)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(f"{name}.requests", PARTITIONS, 1), NewTopic(f"{name}.replies", 1, 1)])
    finally:
        await admin.close()


async def echo(address: str, name: str, by: type[Sender]) -> None:
    """Send back what comes."""
    await create_topics(address, name)
    consumer = await reading(address, f"{name}.requests", PARTITIONS, group=name)
    producer = producer_of(address)
    await producer.start()
    sender = by(producer, f"{name}.replies", 1)

    async def answer() -> None:
        while True:
            for records in (await consumer.getmany(timeout_ms=WAIT_MS)).values():
                for record in records:
                    sender.put(record.value)

    async def commit() -> None:
        while True:
            positions = {partition: await consumer.position(partition) for partition in consumer.assignment()}
            taken = sender.taken
            await asyncio.sleep(COMMIT_EVERY)
            if sender.stored >= taken:
                await consumer.commit(positions)

    async with asyncio.TaskGroup() as tasks:
        for work in (answer(), sender.run(), commit()):
            tasks.create_task(work)
        print("Echo is ready", flush=True)


class Caller:
    """Calls the echo, any number of times at once."""

    def __init__(self, sender: Sender, consumer: AIOKafkaConsumer) -> None:
        self._sender = sender
        self._consumer = consumer
        self._waiting: dict[bytes, asyncio.Future[bytes]] = {}
        self._number = 0

    async def call(self, payload: bytes) -> bytes:
        self._number += 1
        identity = self._number.to_bytes(ID, "big")
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[identity] = answer
        self._sender.put(identity + payload)
        return await answer

    async def read(self) -> None:
        while True:
            for records in (await self._consumer.getmany(timeout_ms=WAIT_MS)).values():
                for record in records:
                    answer = self._waiting.pop(record.value[:ID])
                    answer.set_result(record.value[ID:])


async def caller(address: str, name: str, by: type[Sender]) -> None:
    consumer = await reading(address, f"{name}.replies", 1)
    producer = producer_of(address)
    await producer.start()
    sender = by(producer, f"{name}.requests", PARTITIONS)
    calls = Caller(sender, consumer)
    tasks = [asyncio.create_task(sender.run()), asyncio.create_task(calls.read())]
    try:
        await driving.drive(calls.call, driving.raw_payload)
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await producer.stop()
        await consumer.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["echo", "caller"])
    parser.add_argument("address")
    parser.add_argument("name")
    parser.add_argument("--by", choices=list(SENDERS), default="batches")
    given = parser.parse_args()
    loop.run((echo if given.part == "echo" else caller)(given.address, given.name, SENDERS[given.by]))


if __name__ == "__main__":
    main()
