"""`chains dlq` and `chains cancel`, against letters that lie on a real Kafka."""

import json
import os
import pty
import re
import subprocess
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from chains_stream.broker import Broker, Record, TopicSpec
from chains_stream.brokers import open_broker
from chains_stream.chain import Chain
from chains_stream.chainlet import signature
from chains_stream.codec import codec_of
from chains_stream.control import CancelRequest, Control, Message
from chains_stream.errors import WorkerLostError
from chains_stream.letters import dead_letter_spec, dead_letter_topic, send_letter
from chains_stream.messages import DATAREF, Headers, Request, now_ms
from chains_stream.settings import Settings
from chains_stream.store import Store
from tests.acceptance.command import CHAINS, DEADLINE, HERE, Commands, chains, environment

ORDERS = str(HERE / "chains" / "orders.py")
TELL = f"{ORDERS}:Tell"
ID = "abcdefghijklmnopqrstu-"
HOUR_MS = 3_600_000
T = TypeVar("T")

pytestmark = pytest.mark.kafka


@dataclass(frozen=True)
class Kafka:
    """A Kafka, and a namespace on it."""

    url: str
    namespace: str

    def __call__(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return chains(*arguments, "--broker", self.url, "--namespace", self.namespace)

    def topic(self, name: str = "Order") -> str:
        chain = Chain.load(TELL if name == "Words" else ORDERS)
        return chain.topic(chain.find(name), self.namespace)

    async def on(self, work: Callable[[Broker], Awaitable[T]]) -> T:
        broker = open_broker(Settings(broker=self.url))
        try:
            await broker.start()
            return await work(broker)
        finally:
            await broker.close()

    async def put_aside(self, *records: Record, error: BaseException | None = None) -> None:
        """Do as a worker does, with a topic for the letters, and with three deliveries of each."""

        async def work(broker: Broker) -> None:
            settings = Settings(broker=self.url)
            topics = {self.topic(), *(record.topic for record in records)}
            await broker.ensure_topics([TopicSpec(topic, 4, HOUR_MS) for topic in topics])
            await broker.ensure_topics([dead_letter_spec(topic, settings) for topic in topics])
            for record in records:
                await send_letter(broker, record, "workers", error or WorkerLostError("three workers died of it"), 3)

        await self.on(work)

    def record(
        self, number: int = 0, value: bytes | None = None, *more: tuple[str, bytes | None], name: str = "Order"
    ) -> Record:
        arguments = codec_of(signature(Chain.load(ORDERS).find("Order"))).arguments_from_json(
            b'{"items":[{"name":"tea"}]}'
        )
        request = Request(correlation_id=b"\x01" * 16, request_id=ID, deadline_ms=1_700_000_005_000, attempt=2)
        headers: Headers = (*request.to_headers(), ("theirs", b"\x1b[31m"), *more)
        return Record(
            self.topic(name), 2, 40 + number, 1_700_000_000_000, b"k", arguments if value is None else value, headers
        )

    async def lies(self, partition: int, count: int) -> list[Record]:
        """Read the requests of Order."""

        async def work(broker: Broker) -> list[Record]:
            reader = await broker.read(self.topic(), {partition: 0})
            found: list[Record] = []
            try:
                while len(found) < count:
                    found += await reader.fetch()
            finally:
                await reader.close()
            return found

        return await self.on(work)


@pytest.fixture
def kafka(kafka_url: str, namespace: str) -> Kafka:
    return Kafka(kafka_url, namespace)


async def test_list(kafka: Kafka) -> None:
    await kafka.put_aside(kafka.record(1), kafka.record(2), kafka.record(3, name="Price"), kafka.record(4))
    listed = kafka("dlq", "list", ORDERS)
    assert (listed.returncode, listed.stderr) == (0, "")
    lines = listed.stdout.splitlines()
    reason = "WorkerLostError: three workers died of it"
    for line, letter, offset in zip(lines, ("Order/0", "Order/1", "Order/2", "Price/0"), (41, 42, 44, 43), strict=True):
        assert re.fullmatch(rf"{letter} +\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\dZ  {ID}  2@{offset} +{reason}", line)

    only = kafka("dlq", "list", ORDERS, "--chainlet", "Price", "--json")
    summary = json.loads(only.stdout)
    assert only.stdout.count("\n") == 1
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", summary.pop("at"))
    assert summary == {
        "id": "Price/0",
        "chainlet": "Price",
        "error": "chains_stream.errors.WorkerLostError",
        "message": "three workers died of it",
        "request_id": ID,
        "topic": kafka.topic("Price"),
        "partition": 2,
        "offset": 43,
        "group": "workers",
        "deliveries": 3,
    }


async def test_a_list_is_safe_on_a_terminal_and_short(kafka: Kafka) -> None:
    await kafka.put_aside(kafka.record(), error=ValueError(f"a\nb\x1b[31m{'x' * 200}"))
    (line,) = kafka("dlq", "list", ORDERS, "--chainlet", "Order").stdout.splitlines()
    assert re.search(r"  ValueError: a b�\[31mx+…$", line)
    assert len(line) < 160


async def test_nothing_to_list(kafka: Kafka) -> None:
    """With topics for letters, and, as before the first worker, without."""
    await kafka.put_aside()
    for command in (["list"], ["replay", "--all"], ["purge", "--all", "--yes"]):
        done = kafka("dlq", command[0], ORDERS, *command[1:])
        assert (done.returncode, done.stdout) == (0, "")
        with_topic, without = done.stderr.splitlines()
        assert with_topic == "Order: no dead letters"
        missing = dead_letter_topic(kafka.topic("Price"))
        assert without == f"Price: no dead letters, as no worker has served it yet; there is no topic {missing}"


def fail() -> None:
    raise LookupError("nothing was found")


async def test_show(kafka: Kafka) -> None:
    with pytest.raises(LookupError) as caught:
        fail()
    await kafka.put_aside(kafka.record(1), error=caught.value)
    shown = kafka("dlq", "show", ORDERS, "Order/0")
    assert (shown.returncode, shown.stderr) == (0, "")
    lines = shown.stdout.splitlines()
    assert re.fullmatch(r"Order/0, put aside at \S+Z", lines[0])
    for line in (
        "  error       LookupError: nothing was found",
        "  deliveries  3",
        f"  topic       {kafka.topic()}",
        "  lay at      partition 2, offset 41",
        "  sent at     2023-11-14T22:13:20Z",
        "  group       workers",
        "  key         k",
        f"  kafka_correlationId  {'01' * 16}",
        "  chains-deadline      2023-11-14T22:13:25Z",
        f"  chains-request-id    {ID}",
        "  chains-attempt       2",
        "  theirs               1b5b33316d",
        '  {"items":[{"name":"tea","price":1.5,"tags":[]}]}',
    ):
        assert line in lines
    assert lines.index("headers") < lines.index("arguments") < lines.index("stack trace")
    assert lines[-1] == "  LookupError: nothing was found"
    assert not any("kafka_dlt" in line for line in lines)


async def test_show_of_what_can_t_be_read(kafka: Kafka) -> None:
    await kafka.put_aside(
        kafka.record(0, b"\xc1\x00" + b"x" * 600),
        kafka.record(1, b'{"items": []}', ("content-type", b"application/json")),
        kafka.record(2, b"", (DATAREF, b"s3://bucket/one")),
        kafka.record(3, b"\x80", ("chains-window", b"x")),
        kafka.record(4, b"\xc1", ("kafka_correlationId", None), (DATAREF, None)),
    )
    garbage, as_json, stored, malformed, null = (kafka("dlq", "show", ORDERS, f"Order/{n}").stdout for n in range(5))
    assert "can't be read: Order.run_remote: the data is malformed" in garbage
    assert f"\n  \\xc1\\x00{'x' * 498}… and 102 bytes more\n" in garbage
    assert '\n  {"items":[]}\n' in as_json
    assert "in the store, as they are too large for a record: s3://bucket/one\n" in stored
    assert "missing required field `items`" in malformed
    assert "\n  kafka_correlationId  null\n" in null
    assert "can't be read" in null


async def test_replay(kafka: Kafka) -> None:
    await kafka.put_aside(kafka.record(1), kafka.record(2), kafka.record(3))
    one = kafka("dlq", "replay", ORDERS, "Order/1")
    stays = "The letters stay until `chains dlq purge` deletes them.\n"
    assert (one.returncode, one.stdout) == (0, "Order/1 was sent again: partition 2, offset 0\n")
    assert one.stderr == stays
    everything = kafka("dlq", "replay", ORDERS, "--all", "--chainlet", "Order")
    assert everything.stdout == "".join(f"Order/{n} was sent again: partition 2, offset {n + 1}\n" for n in range(3))
    for record in await kafka.lies(2, 4):
        original = kafka.record()
        assert (record.key, record.value) == (original.key, original.value)
        assert record.headers == tuple(header for header in original.headers if header[0] != "chains-deadline")
    assert len(kafka("dlq", "list", ORDERS, "--chainlet", "Order").stdout.splitlines()) == 3


async def test_a_worker_runs_what_was_sent_again(kafka: Kafka, start: Commands) -> None:
    """With its own caller's reply topic, and though the deadline that it had has passed."""
    replies = f"{kafka.namespace}.mine"
    request = Request(
        correlation_id=b"\x02" * 16,
        request_id=ID,
        reply_topic=replies,
        reply_partition=0,
        reply_offset=0,
        deadline_ms=1_700_000_005_000,
        content_type="application/json",
    )
    words = Record(kafka.topic("Words"), 1, 7, 1_700_000_000_000, None, b'{"text":"one two"}', request.to_headers())
    await kafka.put_aside(words)
    await kafka.on(lambda broker: broker.ensure_topics([TopicSpec(replies, 1, HOUR_MS)]))
    worker = start("worker", TELL, "--broker", kafka.url, "--namespace", kafka.namespace)
    worker.ready()
    assert kafka("dlq", "replay", TELL, "Words/0").returncode == 0

    async def answer(broker: Broker) -> list[bytes]:
        reader = await broker.read(replies, {0: 0})
        found: list[bytes] = []
        try:
            while b"" not in found:
                found += [record.value for record in await reader.fetch()]
        finally:
            await reader.close()
        return found

    assert await kafka.on(answer) == [b'"one"', b'"two"', b""]
    assert worker.stop() == 0


async def test_replay_tells_of_letters_that_can_t_be_sent_again(kafka: Kafka) -> None:
    await kafka.put_aside(kafka.record(1))

    async def stranger(broker: Broker) -> None:
        await (await broker.publish(dead_letter_topic(kafka.topic()), b"?", partition=0))

    await kafka.on(stranger)
    await kafka.put_aside(kafka.record(2))
    assert "Order/1" in kafka("dlq", "list", ORDERS).stdout
    assert "?" in kafka("dlq", "show", ORDERS, "Order/1").stdout
    done = kafka("dlq", "replay", ORDERS, "--all", "--chainlet", "Order")
    assert done.returncode == 1
    assert [line.split(" ")[0] for line in done.stdout.splitlines()] == ["Order/0", "Order/2"]
    assert "Order/1 was not sent again: it does not say which partition it came from\n" in done.stderr
    assert done.stderr.endswith("error: 1 of 3 letters were not sent again\n")


async def test_replay_looks_for_large_values_first(
    kafka: Kafka, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker could do nothing with a request whose arguments are gone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    store = Store(Settings(broker=kafka.url, namespace=kafka.namespace))
    await store.start()
    gone = await store.put(b"{}", 1)
    await store.sweep(now_ms() + 3 * HOUR_MS)
    there = await store.put(b"{}", 1)
    await store.close()
    claims = (gone, there, f"s3://elsewhere/{there}")
    await kafka.put_aside(*(kafka.record(n, b"", (DATAREF, claim.encode())) for n, claim in enumerate(claims)))
    done = kafka("dlq", "replay", ORDERS, "--all", "--chainlet", "Order")
    assert (done.returncode, done.stdout) == (1, "Order/1 was sent again: partition 2, offset 0\n")
    first, second, _, last = done.stderr.splitlines()
    assert first.startswith(f"Order/0 was not sent again: a large value is not in the store (any more): {gone};")
    assert second.startswith("Order/2 was not sent again: 's3://elsewhere/")
    assert last == "error: 2 of 3 letters were not sent again"


async def test_purge(kafka: Kafka) -> None:
    await kafka.put_aside(*(kafka.record(n) for n in range(4)), kafka.record(name="Price"))
    before = kafka("dlq", "purge", ORDERS, "--before", "Order/2", "--yes")
    assert (before.returncode, before.stdout) == (0, "Deleted 2 letters of Order.\n")
    left = kafka("dlq", "list", ORDERS).stdout.splitlines()
    assert [line.split(" ")[0] for line in left] == ["Order/2", "Order/3", "Price/0"]
    again = kafka("dlq", "purge", ORDERS, "--before", "Order/2", "--yes")
    assert (again.returncode, again.stdout) == (0, "")
    assert again.stderr == "There are no letters before Order/2.\n"
    gone = kafka("dlq", "show", ORDERS, "Order/1")
    assert (gone.returncode, gone.stderr) == (
        2,
        "error: there is no letter Order/1; there are Order/2 to Order/3\n",
    )
    everything = kafka("dlq", "purge", ORDERS, "--all", "--yes")
    assert everything.stdout == "Deleted 2 letters of Order.\nDeleted 1 letter of Price.\n"
    assert kafka("dlq", "list", ORDERS).stderr == "Order: no dead letters\nPrice: no dead letters\n"


async def test_purge_of_one_says_what_kafka_can_do(kafka: Kafka) -> None:
    done = kafka("dlq", "purge", ORDERS, "Order/2", "--yes")
    assert (done.returncode, done.stdout) == (2, "")
    reason = "Kafka deletes a log from its front only: `--before Order/3` deletes it and all older"
    assert done.stderr == f"error: Order/2 can't be deleted alone, as {reason}\n"


@pytest.mark.parametrize(
    ("answer", "status", "left"), [(b"y\n", 0, 0), (b"n\n", 1, 2), (b"\n", 1, 2), (b"\x04", 130, 2)]
)
async def test_purge_asks_on_a_terminal(kafka: Kafka, answer: bytes, status: int, left: int) -> None:
    await kafka.put_aside(kafka.record(1), kafka.record(2))
    said, found = asked(kafka, answer)
    assert "Delete 2 letters of Order? [y/N]: " in said
    assert found == status
    assert len(kafka("dlq", "list", ORDERS, "--chainlet", "Order").stdout.splitlines()) == left


def asked(kafka: Kafka, answer: bytes) -> tuple[str, int]:
    """Purge all on a terminal, and type the answer; give the question and the status."""
    ours, theirs = pty.openpty()
    purge = [str(CHAINS), "dlq", "purge", ORDERS, "--all", "--broker", kafka.url, "--namespace", kafka.namespace]
    with subprocess.Popen(
        purge,
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        start_new_session=True,
    ) as process:
        try:
            assert process.stderr is not None
            said = b""
            while not said.endswith(b"]: ") and (more := os.read(process.stderr.fileno(), 1000)):
                said += more
            os.write(ours, answer)
            return said.decode(), process.wait(DEADLINE)
        finally:
            process.kill()
            os.close(ours)
            os.close(theirs)


async def test_cancel(kafka: Kafka) -> None:
    """Whoever follows the control topic is asked."""
    others = "-bcdefghijklmnopqrstuv", "--cdefghijklmnopqrstuv", "-hcdefghijklmnopqrstuv"

    async def work(broker: Broker) -> list[Message]:
        control = Control(broker, Settings(broker=kafka.url, namespace=kafka.namespace))
        await control.start()
        done = kafka("cancel", ID, *others)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == "".join(
            f"Asked the workers of the namespace {kafka.namespace} to stop {one}.\n" for one in (ID, *others)
        )
        told: list[Message] = []
        await control.follow({"any.topic": told.append}, since=60)
        await control.close()
        return told

    assert await kafka.on(work) == [CancelRequest(one) for one in (ID, *others)]


def test_cancel_where_nothing_has_run(kafka: Kafka) -> None:
    for _ in range(2):  # the first one has not made the topic
        done = kafka("cancel", ID)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"error: nothing has run in the namespace {kafka.namespace}: ")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [
        ("dlq", "list", ORDERS),
        ("dlq", "show", ORDERS, "Order/0"),
        ("dlq", "replay", ORDERS, "--all"),
        ("dlq", "purge", ORDERS, "--all", "--yes"),
        ("cancel", ID),
    ],
    ids=lambda command: " ".join(command[:2]).replace(f" {ID}", ""),
)
def test_a_broker_that_can_t_be_reached(command: tuple[str, ...]) -> None:
    done = chains(*command, "--broker", "kafka://127.0.0.1:1", variables={"CHAINS_KAFKA_CONNECT_TIMEOUT": "0.5"})
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: .+ at kafka://127\.0\.0\.1:1 .+\n", done.stderr)
