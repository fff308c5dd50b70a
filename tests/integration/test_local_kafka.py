"""`deploy/kafka/kafka` by its command line: what `make kafka`, this suite and a person at a terminal rely on."""

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

pytestmark = pytest.mark.kafka

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "deploy" / "kafka" / "kafka"


def kafka(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, check=False, timeout=90)


def folder(port: str) -> Path:
    return ROOT / ".kafka" / port


@pytest.fixture(scope="module")
def picked(kafka_url: str) -> Iterator[str]:
    """A port with a broker of this module's own; `kafka_url` says whether there is a Kafka at all."""
    started = kafka("start", "--port", "0")
    assert started.returncode == 0, started.stderr
    port = started.stdout.strip().rpartition(":")[2]
    yield port
    kafka("clean", "--port", port)
    assert not folder(port).exists()


@pytest.fixture
def port(picked: str) -> str:
    """The same, running; what one test does to the broker is nothing to the next."""
    started = kafka("start", "--port", picked)
    assert started.returncode == 0, started.stderr
    return picked


async def topics(port: str, *, create: str = "") -> list[str]:
    client = AIOKafkaAdminClient(bootstrap_servers=f"127.0.0.1:{port}")
    try:
        await client.start()
        if create:
            await client.create_topics([NewTopic(create, 1, 1)])
        return list(await client.list_topics())
    finally:
        await client.close()


async def setting(port: str, name: str) -> str:
    client = AIOKafkaAdminClient(bootstrap_servers=f"127.0.0.1:{port}")
    try:
        await client.start()
        [answer] = await client.describe_configs([ConfigResource(ConfigResourceType.BROKER, "1", {name: None})])
        [(_error, _reason, _type, _resource, [(_name, value, *_rest)])] = answer.resources
        return str(value)
    finally:
        await client.close()


def test_a_broker_answers_as_soon_as_start_returns(port: str) -> None:
    kafka("stop", "--port", port)
    started = kafka("start", "--port", port)
    assert started.stdout == f"kafka://127.0.0.1:{port}\n"
    assert asyncio.run(topics(port, create="at-once")) == ["at-once"]


def test_starting_twice_is_starting_once(port: str) -> None:
    before = kafka("status", "--port", port)
    again = kafka("start", "--port", port)
    assert (again.returncode, again.stdout) == (0, f"kafka://127.0.0.1:{port}\n")
    assert kafka("status", "--port", port).stdout == before.stdout


def test_concurrent_starts_make_one_broker(port: str) -> None:
    kafka("stop", "--port", port)
    starts = [
        subprocess.Popen(
            [SCRIPT, "start", "--port", port], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        for _ in range(3)
    ]
    assert [start.communicate(timeout=90)[0] for start in starts] == [f"kafka://127.0.0.1:{port}\n"] * 3
    assert kafka("stop", "--port", port).returncode == 0
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", int(port)))


def test_a_broker_holds_nothing_of_the_caller(port: str) -> None:
    """A pipe whose reader waits for its end would otherwise keep a CI job open for as long as the broker runs."""
    kafka("stop", "--port", port)
    reading, writing = os.pipe()
    start = subprocess.Popen(
        [SCRIPT, "start", "--port", port], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, pass_fds=[writing]
    )
    os.close(writing)
    with os.fdopen(reading, "rb") as inherited:
        assert start.communicate(timeout=90)[0].decode() == f"kafka://127.0.0.1:{port}\n"
        assert inherited.read() == b""
    assert kafka("status", "--port", port).returncode == 0


@pytest.mark.parametrize("how", ["kill", "stop", "restart"])
def test_data_outlives_the_process(port: str, how: str) -> None:
    assert how in asyncio.run(topics(port, create=how))
    assert kafka(how, "--port", port).returncode == 0
    assert kafka("start", "--port", port).returncode == 0
    assert how in asyncio.run(topics(port))


def test_clean_deletes_the_data(port: str) -> None:
    asyncio.run(topics(port, create="forgotten"))
    assert kafka("clean", "--port", port).returncode == 0
    assert not folder(port).exists()
    assert kafka("start", "--port", port).returncode == 0
    assert asyncio.run(topics(port)) == []


def test_stopping_what_does_not_run_is_success(port: str) -> None:
    assert kafka("status", "--port", port).returncode == 0
    stopped, again = kafka("stop", "--port", port), kafka("stop", "--port", port)
    assert (stopped.returncode, stopped.stderr) == (0, f"stopped the broker on port {port}\n")
    assert (again.returncode, again.stderr) == (0, f"no broker of this checkout ran on port {port}\n")
    assert kafka("status", "--port", port).returncode == 3


def test_a_port_of_another_program_is_one_line(picked: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        started = kafka("start", "--port", port)
    assert started.returncode == 1
    assert started.stdout == ""
    assert started.stderr == f"kafka: port {port}: Address already in use; choose another one with --port\n"
    assert not folder(port).exists()


def test_the_pid_file_of_a_crashed_broker_harms_nobody(port: str) -> None:
    """Its number may belong to another process by now, which is neither taken for the broker nor ended."""
    kafka("kill", "--port", port)
    with subprocess.Popen(["sleep", "600"]) as bystander:
        (folder(port) / "pid").write_text(str(bystander.pid), encoding="ascii")
        assert kafka("status", "--port", port).returncode == 3
        assert "no broker" in kafka("stop", "--port", port).stderr
        (folder(port) / "pid").write_text(str(bystander.pid), encoding="ascii")
        assert kafka("start", "--port", port).returncode == 0
        assert bystander.poll() is None
        bystander.kill()


def test_a_start_that_was_killed_is_found_by_the_next(port: str) -> None:
    kafka("clean", "--port", port)
    with subprocess.Popen([SCRIPT, "start", "--port", port], stdout=subprocess.DEVNULL) as start:
        deadline = time.monotonic() + 30
        while not (folder(port) / "pid").exists():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        start.kill()
    assert kafka("start", "--port", port).returncode == 0


def test_an_interrupted_start_leaves_nothing_that_runs(port: str) -> None:
    kafka("clean", "--port", port)
    with subprocess.Popen([SCRIPT, "start", "--port", port], stdout=subprocess.DEVNULL) as start:
        deadline = time.monotonic() + 30
        while not (folder(port) / "data").exists():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        start.send_signal(signal.SIGINT)
    assert start.returncode == 130
    assert kafka("status", "--port", port).returncode == 3


def test_a_setting_holds_for_one_start(port: str) -> None:
    usual = asyncio.run(setting(port, "message.max.bytes"))
    other = ["--config", "message.max.bytes=5000"]
    refused = kafka("start", "--port", port, *other)
    assert refused.returncode == 1
    assert refused.stderr.endswith("runs already, with other settings; `restart` changes them\n")
    assert kafka("restart", "--port", port, *other).returncode == 0
    assert asyncio.run(setting(port, "message.max.bytes")) == "5000"
    assert kafka("start", "--port", port, *other).returncode == 0
    assert kafka("restart", "--port", port).returncode == 0
    assert asyncio.run(setting(port, "message.max.bytes")) == usual


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("num.io.threads", "--config num.io.threads: write it as key=value"),
        ("num.io.threads=-1", "Invalid value -1 for configuration num.io.threads"),
        ("authorizer.class.name=Missing", "ClassNotFoundException: Missing"),
    ],
)
def test_a_wrong_setting_is_one_line(port: str, config: str, said: str) -> None:
    kafka("stop", "--port", port)
    started = kafka("start", "--port", port, "--config", config)
    assert started.returncode == 1
    assert said in started.stderr
    assert started.stderr.count("\n") == 1
    assert kafka("status", "--port", port).returncode == 3


@pytest.mark.parametrize("arguments", [["stop", "--port", "0"], ["start", "--port", "65536"], ["begin"]])
def test_a_mistyped_command_is_status_2(arguments: list[str]) -> None:
    assert kafka(*arguments).returncode == 2
