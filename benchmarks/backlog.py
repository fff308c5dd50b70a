"""What does a worker's memory cost while requests wait? Its RSS with 1,000 and with 100,000 of them on its topic.

    python benchmarks/backlog.py --size 300

The worker runs a few requests that don't end, so that all the others wait.
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from uuid import uuid4

import msgspec

import chains_stream as chains
from chains_stream.brokers import open_broker
from chains_stream.chain import Chain
from chains_stream.settings import Settings

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1]))  # it is loaded as a Chain file too

from benchmarks import processes  # noqa: E402 - only now it is found

SETTLED = 5.0  # seconds in which nothing more is fetched
FEW, MANY = 1_000, 100_000


@chains.mark_entrypoint
class Wait(chains.ChainletBase):
    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=8))

    async def run_remote(self, text: str) -> str:
        await asyncio.Event().wait()
        return text


async def fill(url: str, namespace: str, count: int, size: int) -> None:
    """Send requests that nobody waits for, over all partitions."""
    broker = open_broker(Settings(broker=url))
    await broker.start()
    try:
        topic = Chain.of(Wait).topic(Wait, namespace)
        partitions = await broker.partitions(topic)
        value = msgspec.msgpack.encode({"text": "x" * size})
        stored = [await broker.publish(topic, value, partition=number % partitions) for number in range(count)]
        await asyncio.gather(*stored)
    finally:
        await broker.close()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--broker", help="kafka://host:port; one of our own is started if none is named")
    parser.add_argument("--size", type=int, default=300, help="bytes of a request")
    given = parser.parse_args(arguments)
    print(processes.machine())
    namespace = f"backlog-{uuid4().hex[:8]}"
    with ExitStack() as stack:
        url = stack.enter_context(processes.kafka(given.broker))
        worker = stack.enter_context(
            processes.chains("worker", str(HERE), "--broker", url, "--namespace", namespace, "--log-level", "error")
        )
        found = {}
        for count in (FEW, MANY - FEW):
            asyncio.run(fill(url, namespace, count, given.size))
            asyncio.run(asyncio.sleep(SETTLED))
            found[count] = worker.rss() / 1e6
        few, many = found.values()
        print(
            f"requests of {given.size} bytes: {few:.1f} MB of RSS with {FEW:,} waiting, {many:.1f} MB with {MANY:,}: "
            f"{many - few:+.1f} MB"
        )


if __name__ == "__main__":
    main()
