"""FastStream: two subscribers wired by hand as request and reply, since its Kafka broker has no `request`.

    python -m benchmarks.rivals.faststream_pair echo HOST:PORT NAME
    python -m benchmarks.rivals.faststream_pair caller HOST:PORT NAME

The echo runs many requests at once, which FastStream allows only if they are committed before they run: a crash loses
them. Both sides publish with `no_confirm`, or each message would wait for the one before it.
"""

import argparse
import asyncio
from typing import Annotated
from uuid import uuid4

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from faststream import Context, FastStream
from faststream.kafka import KafkaBroker

from benchmarks import driving
from benchmarks.rivals import loop

PARTITIONS = 16
WORKERS = 256
BATCH_BYTES = 512 << 10  # of a partition in one request; the default of 16 KiB is one record of 10 KB

Identity = Annotated[str, Context("message.correlation_id")]


def broker_of(address: str) -> KafkaBroker:
    return KafkaBroker(address, acks="all", linger_ms=0, max_batch_size=BATCH_BYTES, logger=None)


async def echo(address: str, name: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=address)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(f"{name}.requests", PARTITIONS, 1), NewTopic(f"{name}.replies", 1, 1)])
    finally:
        await admin.close()
    broker = broker_of(address)

    @broker.subscriber(f"{name}.requests", group_id=name, max_workers=WORKERS, auto_offset_reset="earliest")
    async def answer(body: str, identity: Identity) -> None:
        await broker.publish(body, f"{name}.replies", partition=0, correlation_id=identity, no_confirm=True)

    app = FastStream(broker, logger=None)

    @app.after_startup
    async def ready() -> None:
        print("Echo is ready", flush=True)

    await app.run()


async def caller(address: str, name: str) -> None:
    broker = broker_of(address)
    waiting: dict[str, asyncio.Future[str]] = {}

    @broker.subscriber(f"{name}.replies", max_workers=1)
    async def take(body: str, identity: Identity) -> None:
        waiting.pop(identity).set_result(body)

    async def call(text: str) -> str:
        identity = uuid4().hex
        waiting[identity] = asyncio.get_running_loop().create_future()
        await broker.publish(text, f"{name}.requests", correlation_id=identity, no_confirm=True)
        return await waiting[identity]

    async with broker:
        await broker.start()
        await driving.drive(call, driving.text_payload)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["echo", "caller"])
    parser.add_argument("address")
    parser.add_argument("name")
    given = parser.parse_args()
    loop.run((echo if given.part == "echo" else caller)(given.address, given.name))


if __name__ == "__main__":
    main()
