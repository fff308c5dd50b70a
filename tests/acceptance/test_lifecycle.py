"""How servers start, are watched, and end: what runs is answered, and the status says how it went."""

import json
import re
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.acceptance.command import HERE, Command, Commands, chains, until
from tests.kafka import node

GATE = str(HERE / "chains" / "gate.py")
HELLO = str(HERE.parents[1] / "chainlets" / "hello.py")
ORDERS = HERE / "chains" / "orders.py"
NO_BROKER = "kafka://127.0.0.1:1"


@contextmanager
def request(url: str, folder: Path) -> Iterator["Waiting"]:
    """Have a request under way at the gate, in a thread of its own."""
    with ThreadPoolExecutor(1) as thread:
        waiting = Waiting(url, folder, thread)
        try:
            yield waiting
        finally:
            waiting.let_go()


class Waiting:
    """A stream whose first chunk has come, and whose second waits for `let_go`."""

    def __init__(self, url: str, folder: Path, thread: ThreadPoolExecutor) -> None:
        self._folder = folder
        self._began = threading.Event()
        self._answer = thread.submit(self._ask, url)
        assert self._began.wait(30), "the first chunk came"
        until((folder / "began").exists)

    def _ask(self, url: str) -> str:
        body = {"folder": str(self._folder)}
        headers = {"accept": "text/event-stream"}
        with httpx.stream("POST", f"{url}/run_remote", json=body, headers=headers, timeout=60) as response:
            text = ""
            for part in response.iter_text():
                text += part
                self._began.set()
            return text

    def let_go(self) -> None:
        (self._folder / "go").touch()

    def answer(self) -> str:
        return self._answer.result(60)


def assert_complete(answer: str) -> None:
    assert re.findall("data: (.+)", answer) == ['"waiting"', '"let go"', '{"chunks":2}']


def served(start: Commands, *options: str) -> tuple[Command, Command, Command]:
    """Start a gateway and a worker for each Chainlet."""
    gateway = start("gateway", GATE, "--port", "0", *options)
    gate, wait = (start("worker", GATE, "--chainlet", name, *options) for name in ("Gate", "Wait"))
    for worker in (gate, wait):
        worker.ready()
    return gateway, gate, wait


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_is_told_to_end_answers_what_runs(
    start: Commands, tmp_path: Path, number: signal.Signals
) -> None:
    server = start("run", GATE, "--port", "0")
    url = server.ready()
    with request(url, tmp_path) as waiting:
        server.send(number)
        server.logged("stopping")
        until(lambda: refused(url))
        waiting.let_go()
        assert_complete(waiting.answer())
    assert server.wait() == 0


def refused(url: str) -> bool:
    try:
        httpx.get(f"{url}/healthz")
    except httpx.ConnectError:
        return True
    except httpx.TransportError:
        return False  # the system had taken the connection before the server let go of the port
    return False


@pytest.mark.kafka
@pytest.mark.parametrize("which", ["gateway", "worker of the entrypoint", "worker below"])
def test_each_of_many_processes_answers_what_runs(
    start: Commands, kafka_url: str, namespace: str, tmp_path: Path, which: str
) -> None:
    gateway, gate, wait = served(start, "--broker", kafka_url, "--namespace", namespace)
    ending = {"gateway": gateway, "worker of the entrypoint": gate, "worker below": wait}[which]
    with request(gateway.ready(), tmp_path) as waiting:
        ending.send(signal.SIGTERM)
        ending.logged("stopping")
        waiting.let_go()
        assert_complete(waiting.answer())
    assert ending.wait() == 0
    assert not (tmp_path / "cancelled").exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, -signal.SIGINT)])
def test_a_second_signal_ends_it_at_once(start: Commands, tmp_path: Path, number: signal.Signals, status: int) -> None:
    server = start("run", GATE, "--port", "0")
    with request(server.ready(), tmp_path) as waiting:
        server.send(number)
        server.logged("stopping")
        server.send(number)
        assert server.wait() == 128 - status
        waiting.let_go()
        with pytest.raises(httpx.RemoteProtocolError):
            waiting.answer()


def test_what_outlasts_the_grace_period_is_ended(start: Commands, tmp_path: Path) -> None:
    server = start("run", GATE, "--port", "0", variables={"CHAINS_GRACE_PERIOD": "0.5"})
    with request(server.ready(), tmp_path) as waiting:
        server.send(signal.SIGTERM)
        assert "event: error" in waiting.answer()
        assert server.wait() == 0
    assert (tmp_path / "cancelled").exists()


def test_a_thread_that_can_t_be_stopped_does_not_keep_the_process(start: Commands, tmp_path: Path) -> None:
    (tmp_path / "chain.py").write_text(
        "import pathlib, time\nimport chains_stream as chains\n@chains.mark_entrypoint\n"
        "class A(chains.ChainletBase):\n    def run_remote(self) -> None:\n"
        "        pathlib.Path('began').touch()\n        time.sleep(600)\n"
    )
    server = start("run", "chain.py", "--port", "0", cwd=tmp_path, variables={"CHAINS_GRACE_PERIOD": "0.2"})
    url = server.ready()
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(httpx.post, f"{url}/run_remote", timeout=60)
        until((tmp_path / "began").exists)
        server.send(signal.SIGTERM)
        assert server.wait() == 0
        assert asked.result(60).status_code == 503
    server.logged("thread.abandoned")


def test_a_signal_while_a_model_is_loaded_is_heard_at_once(start: Commands, tmp_path: Path) -> None:
    (tmp_path / "chain.py").write_text(
        "import asyncio, pathlib, time\nimport chains_stream as chains\n@chains.mark_entrypoint\n"
        "class A(chains.ChainletBase):\n    async def __aenter__(self):\n"
        "        await asyncio.shield(asyncio.to_thread(self.load))\n"
        "    async def __aexit__(self, *_): ...\n    async def run_remote(self) -> None: ...\n"
        "    def load(self):\n        pathlib.Path('began').touch()\n"
        "        while not pathlib.Path('go').exists():\n            time.sleep(0.01)\n"
    )
    server = start("run", "chain.py", "--port", "0", cwd=tmp_path)
    until((tmp_path / "began").exists)
    server.send(signal.SIGTERM)
    assert "before all was ready" in server.logged("stopping")
    (tmp_path / "go").touch()
    assert server.wait() == 0


@pytest.mark.parametrize("command", ["run", "gateway", "worker", "call"])
def test_a_broker_that_is_not_there_is_told_within_30_seconds(start: Commands, command: str) -> None:
    arguments = {"run": ["--port", "0"], "gateway": ["--port", "0"], "worker": [], "call": ['{"names": []}']}[command]
    variables = {} if command == "worker" else {"CHAINS_KAFKA_CONNECT_TIMEOUT": "1"}
    started = start(command, HELLO, *arguments, "--broker", NO_BROKER, variables=variables)
    assert started.wait() == 1
    assert started.stdout.text() == ""
    errors = [line for line in started.stderr.text().splitlines() if "[info" not in line and "waiting" not in line]
    assert len(errors) == 1, errors
    assert re.fullmatch(r"error: no Kafka broker answered at kafka://127\.0\.0\.1:1 within \d+ s .+", errors[0])


def test_a_signal_while_the_broker_is_waited_for(start: Commands) -> None:
    worker = start("worker", HELLO, "--broker", NO_BROKER)
    worker.logged("broker.waiting")
    assert worker.stop() == 0


@pytest.mark.kafka
def test_a_server_whose_broker_is_gone_ends_in_order(
    start: Commands,
    kafka_url: str,
) -> None:
    with node() as kafka:
        options = ("--broker", kafka.url)
        started = [
            start("worker", HELLO, *options),
            start("gateway", HELLO, "--port", "0", *options),
            start("run", HELLO, "--port", "0", *options, "--namespace", "other"),
        ]
        for command in started:
            command.ready()
        kafka.kill()
        for command in started:
            command.stderr.until(lambda line: "Unable connect to node" in line, command)
        for command in started:
            assert command.stop() == 0
            assert "Traceback" not in command.stderr.text()
            assert len(command.stderr.text().splitlines()) < 50


AILING = (
    "import pathlib\nimport chains_stream as chains\n@chains.mark_entrypoint\nclass A(chains.ChainletBase):\n"
    "    def is_healthy(self) -> bool:\n        return not pathlib.Path('ill').exists()\n"
    "    async def run_remote(self) -> None: ...\n"
)


def test_the_health_of_a_process_that_does_both(start: Commands, tmp_path: Path) -> None:
    (tmp_path / "chain.py").write_text(AILING)
    server = start("run", "chain.py", "--port", "0", cwd=tmp_path)
    url = server.ready().split()[-1]
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}
    (tmp_path / "ill").touch()
    health = httpx.get(f"{url}/healthz")
    assert (health.status_code, health.json()) == (503, {"status": "unhealthy", "reason": "A.is_healthy said no"})
    assert server.stop() == 0


@pytest.mark.kafka
def test_a_worker_s_health(start: Commands, kafka_url: str, namespace: str, tmp_path: Path) -> None:
    (tmp_path / "chain.py").write_text(AILING)
    options = ("--broker", kafka_url, "--namespace", namespace, "--health-port", "0")
    worker = start("worker", "chain.py", *options, cwd=tmp_path)
    found = re.search(r"url=(http://\S+)", worker.logged("health.ready"))
    assert found is not None
    worker.ready()
    health, ready = (httpx.get(f"{found[1]}/{name}") for name in ("healthz", "readyz"))
    assert (health.status_code, health.json(), ready.status_code) == (200, {"status": "ok"}, 200)
    (tmp_path / "ill").touch()
    health = httpx.get(f"{found[1]}/healthz")
    assert (health.status_code, health.json()) == (503, {"status": "unhealthy", "reason": "A.is_healthy said no"})
    assert "process_resident_memory_bytes" in httpx.get(f"{found[1]}/metrics").text
    assert worker.stop() == 0


def test_a_busy_health_port(start: Commands) -> None:
    server = start("run", HELLO, "--port", "0")
    port = server.ready().rpartition(":")[2]
    # The port is looked at before the broker is.
    done = chains("worker", HELLO, "--broker", NO_BROKER, "--health-port", port)
    assert done.returncode == 2
    assert re.search(rf"error: port {port} .+ in use: choose another with --health-port\n", done.stderr)


@pytest.mark.kafka
def test_a_changed_signature_runs_beside_the_old_one(
    start: Commands, kafka_url: str, namespace: str, tmp_path: Path
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for folder, text in ((old, "{name}"), (new, "{name} {surname}")):
        folder.mkdir()
        extra = ', surname: str = "Lovelace"' if folder is new else ""
        (folder / "chain.py").write_text(
            "import chains_stream as chains\n@chains.mark_entrypoint\nclass Greet(chains.ChainletBase):\n"
            f"    async def run_remote(self, name: str{extra}) -> str:\n        return f'{text}'\n"
        )
    options = ("--broker", kafka_url, "--namespace", namespace)
    for folder in (old, new):
        start("worker", "chain.py", *options, cwd=folder).ready()
    answers, topics = {}, {}
    for folder in (old, new, old):
        done = chains("call", "chain.py", '{"name": "Ada"}', *options, cwd=folder)
        assert done.stderr == ""
        answers[folder.name] = json.loads(done.stdout)
        topics[folder.name] = chains("topics", "chain.py", "--namespace", namespace, cwd=folder).stdout.split()[0]
    assert answers == {"old": "Ada", "new": "Ada Lovelace"}
    assert topics["old"] != topics["new"]
    assert all(
        re.fullmatch(rf"{namespace}\.Greet\.Greet\.run_remote\.[0-9a-f]{{8}}", topic) for topic in topics.values()
    )


def test_logs_are_json_lines_where_asked_for(start: Commands) -> None:
    server = start("run", HELLO, "--port", "0", "--log-format", "json")
    url = server.ready()
    assert httpx.post(f"{url}/run_remote", json={"names": ["Ada"]}).status_code == 200
    assert server.stop() == 0
    events = [json.loads(line) for line in server.stderr.text().splitlines()]
    assert {"worker.started", "request", "stopping", "worker.stopped", "stopped"} <= {
        event["event"] for event in events
    }
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", event["timestamp"]) for event in events)
    assert "Ada" not in server.stderr.text()
