"""What do transactions cost? Records and an offset in each, through our `Transactor` and through bare aiokafka.

    python benchmarks/transactions.py                       # 1, 10, 100 and 1000 records a transaction, 3 pairs of 5 s
    python benchmarks/transactions.py --sizes 100 --transactors 4

The rival is aiokafka's own loop, as a program would write it: begin, send each record, send the offsets, commit.
Both keep one transaction of a transactor under way at a time, on one partition each; clients and broker share this
machine, so what is compared is the ratio of a pair, measured one after the other.
"""

import argparse
import asyncio
import resource
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from uuid import uuid4

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.structs import OffsetAndMetadata

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import processes
from chains_stream.broker import Broker, Committed, TopicSpec
from chains_stream.brokers import open_broker
from chains_stream.settings import Settings

VALUE = bytes(200)
HOUR_MS = 3_600_000

Transaction = Callable[[], Awaitable[None]]
Close = Callable[[], Awaitable[None]]


async def ours(broker: Broker, topic: str, partition: int, size: int) -> tuple[Transaction, Close]:
    transactor = broker.transactor(uuid4().hex)
    await transactor.start()

    async def transact() -> None:
        transactor.begin()
        for _ in range(size):
            await transactor.publish(f"{topic}.out", VALUE, partition=partition)
        transactor.add_offsets(topic, topic, {partition: Committed(size)})
        await transactor.commit()

    return transact, transactor.close


async def bare(broker: Broker, topic: str, partition: int, size: int) -> tuple[Transaction, Close]:
    servers = broker.url.removeprefix("kafka://")
    producer = AIOKafkaProducer(
        bootstrap_servers=servers, transactional_id=uuid4().hex, linger_ms=0, max_batch_size=128 << 10
    )
    await producer.start()
    offsets = {TopicPartition(topic, partition): OffsetAndMetadata(size, "")}

    async def transact() -> None:
        await producer.begin_transaction()
        for _ in range(size):
            await producer.send(f"{topic}.out", VALUE, partition=partition)
        await producer.send_offsets_to_transaction(offsets, topic)
        await producer.commit_transaction()

    return transact, producer.stop


async def rate(broker: Broker, who: str, size: int, given: argparse.Namespace) -> float:
    """Give transactions a second, of all transactors together."""
    topic = f"transactions.{uuid4().hex}"
    await broker.ensure_topics([TopicSpec(name, given.transactors, HOUR_MS) for name in (topic, f"{topic}.out")])
    make = {"ours": ours, "bare": bare}[who]
    made = [await make(broker, topic, partition, size) for partition in range(given.transactors)]
    await asyncio.gather(*[transact() for transact, _ in made])  # coordinators and leaders are known from then on
    begun, cpu = time.perf_counter(), _cpu()

    async def go_on(transact: Transaction) -> int:
        count = 0
        while time.perf_counter() - begun < given.seconds:
            await transact()
            count += 1
        return count

    count = sum(await asyncio.gather(*[go_on(transact) for transact, _ in made]))
    seconds, cpu = time.perf_counter() - begun, _cpu() - cpu
    await asyncio.gather(*[close() for _, close in made])
    per_second = count / seconds
    print(
        f"  {who}: {per_second:7.1f} transactions/s, {per_second * size:8.0f} records/s, "
        f"{cpu / count * 1000:5.2f} ms of CPU each",
        flush=True,
    )
    return per_second


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def measure(url: str, given: argparse.Namespace) -> None:
    broker = open_broker(Settings.of(broker=url))
    await broker.start()
    for size in given.sizes:
        print(f"{size} records a transaction, {given.transactors} transactor(s):")
        ratios = []
        for number in range(given.pairs):
            order = ("ours", "bare") if number % 2 == 0 else ("bare", "ours")
            rates = {who: await rate(broker, who, size, given) for who in order}
            ratios.append(rates["ours"] / rates["bare"])
        shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"  ours / bare: {statistics.median(ratios):.2f} (median of {shown})", flush=True)
    await broker.close()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--broker", help="kafka://host:port; one of our own is started if none is named")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 10, 100, 1000], help="records a transaction")
    parser.add_argument("--transactors", type=int, default=1, help="at the same time, each on a partition of its own")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each half of a pair")
    parser.add_argument("--pairs", type=int, default=3)
    given = parser.parse_args(arguments)
    print(processes.machine())
    with processes.kafka(given.broker) as url:
        asyncio.run(measure(url, given))


if __name__ == "__main__":
    main()
