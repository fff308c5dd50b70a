"""`deploy/kafka/kafka` by its command line: what `make kafka`, this suite and a person at a terminal rely on."""

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

pytestmark = pytest.mark.kafka

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "deploy" / "kafka" / "kafka"


# Compiled less well, a broker starts in half the processor time; only here, where none lives long enough to repay more.
ENVIRONMENT = os.environ | {"KAFKA_OPTS": "-XX:TieredStopAtLevel=1"}


def kafka(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, *arguments], capture_output=True, text=True, check=False, timeout=90, env=ENVIRONMENT
    )


def kafka_begins(*arguments: str, pass_fds: Sequence[int] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [SCRIPT, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=ENVIRONMENT,
        pass_fds=pass_fds,
    )


def folder(port: str) -> Path:
    return ROOT / ".kafka" / port


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture(scope="module")
def port(kafka_url: str) -> Iterator[str]:
    """A port with a broker of this module's own; `kafka_url` says whether there is a Kafka at all."""
    started = kafka("start", "--port", "0")
    assert started.returncode == 0, started.stderr
    port = started.stdout.strip().rpartition(":")[2]
    yield port
    kafka("clean", "--port", port)
    assert not folder(port).exists()


@pytest.fixture
def running(port: str) -> str:
    """The same, running, whatever the test before did to it."""
    started = kafka("start", "--port", port)
    assert started.returncode == 0, started.stderr
    return port


@pytest.fixture
def stopped(port: str) -> str:
    assert kafka("stop", "--port", port).returncode == 0
    return port


async def topics(port: str, *, create: str = "") -> list[str]:
    client = AIOKafkaAdminClient(bootstrap_servers=f"127.0.0.1:{port}")
    try:
        await client.start()
        if create:
            await client.create_topics([NewTopic(create, 1, 1)])
            while create not in await client.list_topics():  # noqa: ASYNC110 - the controller knows first; nobody is told
                await asyncio.sleep(0.02)
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


def test_starting_twice_is_starting_once(running: str) -> None:
    before = kafka("status", "--port", running)
    assert before.returncode == 0
    again = kafka("start", "--port", running)
    assert (again.returncode, again.stdout, again.stderr) == (0, f"kafka://127.0.0.1:{running}\n", "")
    assert kafka("status", "--port", running).stdout == before.stdout


def test_a_crash_loses_no_data_and_its_pid_file_harms_nobody(running: str) -> None:
    """The number may belong to another process by now, which is neither taken for the broker nor ended."""
    assert asyncio.run(topics(running, create="kept")) == ["kept"]
    assert kafka("kill", "--port", running).returncode == 0
    with subprocess.Popen(["sleep", "600"]) as bystander:
        pid_file = folder(running) / "pid"
        pid_file.write_text(str(bystander.pid), encoding="ascii")
        assert kafka("status", "--port", running).returncode == 3
        assert "no broker" in kafka("stop", "--port", running).stderr
        pid_file.write_text(str(bystander.pid), encoding="ascii")
        assert kafka("start", "--port", running).returncode == 0
        assert bystander.poll() is None
        bystander.kill()
    assert asyncio.run(topics(running)) == ["kept"]


def test_a_setting_holds_for_one_start(running: str) -> None:
    usual = asyncio.run(setting(running, "message.max.bytes"))
    other = ["--config", "message.max.bytes=5000"]
    refused = kafka("start", "--port", running, *other)
    assert refused.returncode == 1
    assert refused.stderr.endswith("runs already, with other settings; `restart` changes them\n")
    assert kafka("restart", "--port", running, *other).returncode == 0
    assert asyncio.run(setting(running, "message.max.bytes")) == "5000"
    assert kafka("start", "--port", running, *other).returncode == 0
    assert kafka("restart", "--port", running).returncode == 0
    assert asyncio.run(setting(running, "message.max.bytes")) == usual


def test_clean_deletes_the_data(running: str) -> None:
    assert kafka("clean", "--port", running).returncode == 0
    assert not folder(running).exists()


def test_concurrent_starts_make_one_broker(stopped: str) -> None:
    starts = [kafka_begins("start", "--port", stopped) for _ in range(3)]
    assert [start.communicate(timeout=90)[0] for start in starts] == [f"kafka://127.0.0.1:{stopped}\n"] * 3
    assert kafka("stop", "--port", stopped).returncode == 0
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", int(stopped)))


def test_a_broker_holds_nothing_of_the_caller(stopped: str) -> None:
    """A pipe whose reader waits for its end would otherwise keep a CI job open for as long as the broker runs."""
    reading, writing = os.pipe()
    start = kafka_begins("start", "--port", stopped, pass_fds=[writing])
    os.close(writing)
    with os.fdopen(reading, "rb") as inherited:
        assert start.communicate(timeout=90)[0] == f"kafka://127.0.0.1:{stopped}\n"
        assert inherited.read() == b""
    assert kafka("status", "--port", stopped).returncode == 0


def test_a_start_that_was_killed_is_found_by_the_next(port: str) -> None:
    kafka("clean", "--port", port)
    with kafka_begins("start", "--port", port) as start:
        wait_for(folder(port) / "pid")
        start.kill()
    assert kafka("start", "--port", port).returncode == 0
    assert asyncio.run(topics(port)) == []


def test_stopping_what_does_not_run_is_success(running: str) -> None:
    stopped, again = kafka("stop", "--port", running), kafka("stop", "--port", running)
    assert (stopped.returncode, stopped.stderr) == (0, f"stopped the broker on port {running}\n")
    assert (again.returncode, again.stderr) == (0, f"no broker of this checkout ran on port {running}\n")
    assert kafka("status", "--port", running).returncode == 3


def test_an_interrupted_start_leaves_nothing_that_runs(port: str) -> None:
    kafka("clean", "--port", port)
    with kafka_begins("start", "--port", port) as start:
        wait_for(folder(port) / "data")
        start.send_signal(signal.SIGINT)
    assert start.returncode == 130
    assert kafka("status", "--port", port).stdout == f"no broker of this checkout runs on port {port}\n"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("num.io.threads", "--config num.io.threads: write it as key=value"),
        ("num.io.threads=-1", "Invalid value -1 for configuration num.io.threads"),
        ("authorizer.class.name=Missing", "ClassNotFoundException: Missing"),
    ],
)
def test_a_wrong_setting_is_one_line(stopped: str, config: str, said: str) -> None:
    started = kafka("start", "--port", stopped, "--config", config)
    assert started.returncode == 1
    assert said in started.stderr
    assert started.stderr.count("\n") == 1
    assert kafka("status", "--port", stopped).stdout == f"no broker of this checkout runs on port {stopped}\n"


def test_a_port_of_another_program_is_one_line(kafka_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        started = kafka("start", "--port", port)
    assert (started.returncode, started.stdout) == (1, "")
    assert started.stderr == f"kafka: port {port}: Address already in use; choose another one with --port\n"
    assert not folder(port).exists()


@pytest.mark.parametrize("arguments", [["stop", "--port", "0"], ["start", "--port", "65536"], ["begin"]])
def test_a_mistyped_command_is_status_2(arguments: list[str]) -> None:
    assert kafka(*arguments).returncode == 2
