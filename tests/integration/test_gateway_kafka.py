"""Answers that are read again from a real Kafka: with transactions in the log, and with a broker that goes away."""

import asyncio
import gc
import signal
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from http import HTTPStatus
from uuid import uuid4

import pytest
from aiokafka import AIOKafkaProducer

from chains_stream.broker import TopicSpec
from chains_stream.client import open_connected
from chains_stream.settings import Settings
from tests.kafka import Node, node
from tests.sample import Seen
from tests.serving import Pause, Say, serving

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(120)]

WORDS = [f"word {number}" for number in range(300)]


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    Seen.reset()


@pytest.fixture
def own(kafka_url: str) -> Iterator[Node]:
    """A broker that this test may stop; `kafka_url` says whether there is a Kafka at all."""
    with node() as started:
        yield started
    gc.collect()  # see AWAY


# aiokafka leaves connections to a broker that goes away to the garbage collector, which tells so.
AWAY = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


async def test_a_reader_that_nobody_waits_for_any_more_leaves_nothing_open(kafka_url: str) -> None:
    async with AsyncExitStack() as stack:
        broker = await open_connected(stack, Settings.of(broker=kafka_url))
        topic = f"left.{uuid4().hex}"
        await broker.ensure_topics([TopicSpec(topic, 1, 3_600_000)])
        for number in range(12):
            reading = asyncio.create_task(broker.read(topic, {0: 0}))
            await asyncio.sleep(number / 400)  # somewhere in the middle
            reading.cancel()
            with suppress(asyncio.CancelledError):
                await (await reading).close()
    gc.collect()  # what was left open is told of now, as an error


async def test_answers_between_the_markers_of_transactions(kafka_url: str) -> None:
    """A marker has an offset and is no record: whoever reads up to one must not wait for it."""
    async with serving(Say, broker=kafka_url, stream_window=64, reply_partitions=3) as served:
        namespace = served.settings.namespace
        producer = AIOKafkaProducer(bootstrap_servers=kafka_url.removeprefix("kafka://"), transactional_id=namespace)
        await producer.start()

        async def mark() -> None:
            for topic in (f"{namespace}.replies", f"{namespace}.results"):
                async with producer.transaction():
                    for partition in range(3):
                        await producer.send_and_wait(topic, b"a stranger's", partition=partition)

        try:
            await mark()
            made = await served.http.post("/async_run_remote", json={"texts": WORDS})
            answer = await served.call("text/event-stream", texts=WORDS)
            location = made.headers["location"]
            report = await served.http.get(location, headers={"prefer": "wait=20"})
            assert report.json()["result"] == WORDS
            await mark()
            async with served.beside() as other:
                for each in (served, other):
                    again = await each.http.get(f"/async_request/{answer.headers['x-request-id']}/events")
                    assert again.text == answer.text
                    assert (await each.http.get(location)).json()["result"] == WORDS
                    events = await each.http.get(f"{location}/events", params={"starting_after": 298})
                    assert events.text.endswith('id: 299\ndata: "word 299"\n\nevent: done\ndata: {"chunks":300}\n\n')
                    gone = await each.http.delete(f"/async_request/{answer.headers['x-request-id']}")
                    assert gone.json()["status"] == "SUCCEEDED"
        finally:
            await producer.stop()


@AWAY
async def test_a_broker_that_is_away_for_some_seconds_ends_no_reading(own: Node) -> None:
    async with serving(Pause, broker=own.url) as served:
        arguments = {"name": "away", "then": "away goes on"}
        async with served.http.stream("POST", "/run_remote", json=arguments) as first:
            request_id = first.headers["x-request-id"]
            path = f"/async_request/{request_id}/events"
            async with served.http.stream("GET", path) as second:
                await Seen.until("away waits")
                chunks = second.aiter_text()
                while "id: 0" not in await anext(chunks):
                    pass
                own.signal(signal.SIGSTOP)
                try:
                    third = asyncio.create_task(served.http.get(path))
                    asked = asyncio.create_task(served.http.get(f"/async_request/{request_id}"))
                    await asyncio.sleep(4)  # the time itself is what is tested
                finally:
                    own.signal(signal.SIGCONT)
                Seen.note("away goes on")
                assert "event: done" in "".join([part async for part in chunks])
                assert "event: done" in (await third).text
                assert (await asked).status_code == HTTPStatus.OK
            assert (await first.aread()).endswith(b"last\n")


@AWAY
async def test_a_broker_that_is_started_anew_ends_no_reading(own: Node) -> None:
    async with serving(Pause, broker=own.url) as served:
        arguments = {"model_input": {"name": "anew", "then": "anew goes on"}}
        made = await served.http.post("/async_run_remote", json=arguments)
        await Seen.until("anew waits")
        async with served.http.stream("GET", f"{made.headers['location']}/events") as reading:
            chunks = reading.aiter_text()
            while "id: 0" not in await anext(chunks):
                pass
            await asyncio.to_thread(own.stop)
            await asyncio.to_thread(own.start)
            Seen.note("anew goes on")
            assert "event: done" in "".join([part async for part in chunks])
        report = await served.http.get(made.headers["location"], headers={"prefer": "wait=20"})
        assert report.json()["result"] == ["first\n", "last\n"]
