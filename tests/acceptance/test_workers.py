"""Several gateway processes on one port, as an operator meets them: killed, replaced, told to end."""

import os
import re
import signal
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from tests.acceptance.command import HERE, Command, Commands, chains, until

GATE = str(HERE / "chains" / "gate.py")
HELLO = str(HERE.parents[1] / "chainlets" / "hello.py")
STREAMS = 12
TLS = ssl.create_default_context()  # for all clients: making one takes longer than a request
PID = re.compile(r'chains_process_info\{pid="(\d+)"\}')


class Stream:
    """A client with one connection, on which a stream runs whose second chunk waits for the file `go`."""

    def __init__(self, url: str, folder: Path, threads: ThreadPoolExecutor) -> None:
        self._url = url
        self._folder = folder
        self._http = httpx.Client(timeout=60, verify=TLS)
        self.pid = pid_of(self._http, url)
        self._began = threading.Event()
        self._text: Future[str] = threads.submit(self._read)
        assert self._began.wait(30), "the first chunk came"

    def _read(self) -> str:
        text = ""
        with closing(self._http), suppress(httpx.RemoteProtocolError, httpx.ReadError):
            body = {"folder": str(self._folder)}
            with self._http.stream("POST", f"{self._url}/run_remote", json=body) as response:
                for part in response.iter_text():
                    text += part
                    self._began.set()
                text += " END"
        return text

    def text(self) -> str:
        return self._text.result(60)


def pid_of(http: httpx.Client, url: str) -> int:
    found = PID.search(http.get(f"{url}/metrics").text)
    assert found is not None
    return int(found[1])


def pids(url: str, connections: int = 30) -> set[int]:
    """Ask over connections of their own which processes there are."""
    found = set()
    for _ in range(connections):
        with httpx.Client(timeout=30, verify=TLS) as http:
            found.add(pid_of(http, url))
    return found


def alive(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


@contextmanager
def asking(url: str) -> Iterator[list[str]]:
    """Ask over one new connection after another for the length of the block; gives what went wrong."""
    wrong: list[str] = []
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            try:
                answer = httpx.get(f"{url}/healthz", timeout=30, verify=TLS)
            except httpx.HTTPError as error:
                wrong.append(repr(error))
            else:
                if answer.status_code != 200:
                    wrong.append(answer.text)

    with ThreadPoolExecutor(2) as threads:
        asked = [threads.submit(ask) for _ in range(2)]
        try:
            yield wrong
        finally:
            ended.set()
    for one in asked:
        one.result()


def served(start: Commands, kafka_url: str, namespace: str, count: int = 2) -> tuple[Command, str]:
    """Start a gateway of so many processes, and a worker."""
    options = ("--broker", kafka_url, "--namespace", namespace)
    gateway = start("gateway", GATE, "--port", "0", "--workers", str(count), *options)
    worker = start("worker", GATE, *options)
    url = gateway.ready()
    worker.ready()
    until(lambda: httpx.get(f"{url}/readyz", timeout=30, verify=TLS).status_code == 200)
    return gateway, url


@pytest.mark.kafka
def test_a_process_that_is_killed_takes_its_own_connections_along_and_is_replaced(
    start: Commands, kafka_url: str, namespace: str, tmp_path: Path
) -> None:
    gateway, url = served(start, kafka_url, namespace)
    with ThreadPoolExecutor(STREAMS) as threads:
        streams = [Stream(url, tmp_path, threads) for _ in range(STREAMS)]
        try:
            before = {stream.pid for stream in streams}
            assert len(before) == 2, "the kernel spreads connections"
            killed = streams[0].pid
            with asking(url) as wrong:
                os.kill(killed, signal.SIGKILL)
                assert f"process={killed}" in gateway.logged("gateway.process_ended")
                gateway.logged("gateway.process_ready")
            # Those that `asking` had open with the killed process may have broken; those that waited for it have not.
            assert len(wrong) <= 2
        finally:
            (tmp_path / "go").touch()
        for stream in streams:
            assert stream.text() == ("waiting" if stream.pid == killed else "waitinglet go END")
    after = pids(url)
    assert len(after) == 2
    assert after & before == before - {killed}
    assert gateway.stop() == 0
    assert not any(map(alive, after))


@pytest.mark.kafka
def test_the_next_process_does_not_wait_for_the_session_of_the_one_that_was_killed(
    start: Commands, kafka_url: str, namespace: str
) -> None:
    options = ("--broker", kafka_url, "--namespace", namespace, "--port", "0", "--workers", "2")
    gateway = start("gateway", GATE, *options, variables={"CHAINS_KAFKA_SESSION_TIMEOUT_MS": "60000"})
    url = gateway.ready()
    for _ in range(2):
        gateway.logged("gateway.process_ready")
    until(lambda: gateway.stderr.text().count("delayed.assigned") > 1)
    began = time.monotonic()
    os.kill(min(pids(url)), signal.SIGKILL)
    gateway.logged("gateway.process_ready")
    assert len(pids(url)) == 2
    assert time.monotonic() - began < 30
    gateway.send(signal.SIGTERM)
    assert gateway.wait(40) == 0


@pytest.mark.kafka
def test_a_renewal_breaks_no_stream_and_refuses_no_connection(
    start: Commands, kafka_url: str, namespace: str, tmp_path: Path
) -> None:
    gateway, url = served(start, kafka_url, namespace)
    for _ in range(2):
        gateway.logged("gateway.process_ready")
    with ThreadPoolExecutor(STREAMS) as threads, asking(url) as wrong:
        streams = [Stream(url, tmp_path, threads) for _ in range(STREAMS)]
        try:
            before = {stream.pid for stream in streams}
            gateway.send(signal.SIGHUP)
            gateway.logged("gateway.process_ready")
            # The first of them has a successor, and goes on with what it has.
            until(lambda: bool(pids(url, 5) - before))
            assert all(map(alive, before))
        finally:
            (tmp_path / "go").touch()
        assert [stream.text() for stream in streams] == STREAMS * ["waitinglet go END"]
        gateway.logged("gateway.renewed")
        assert not any(map(alive, before))
    assert wrong == []
    assert len(pids(url)) == 2
    assert gateway.stop() == 0


@pytest.mark.kafka
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_all_answer_what_runs_and_a_second_one_ends_them_at_once(
    start: Commands, kafka_url: str, namespace: str, tmp_path: Path, number: signal.Signals
) -> None:
    gateway, url = served(start, kafka_url, namespace)
    children = pids(url)
    with ThreadPoolExecutor(1) as threads:
        stream = Stream(url, tmp_path, threads)
        gateway.send(number)
        gateway.logged("stopping")
        until(lambda: not accepts(url))
        assert alive(stream.pid)
        if number == signal.SIGTERM:
            (tmp_path / "go").touch()
            assert stream.text() == "waitinglet go END"
            assert gateway.wait() == 0
        else:
            gateway.send(number)
            assert gateway.wait() == 128 + number
            assert stream.text() == "waiting"
    until(lambda: not any(map(alive, children)))


def accepts(url: str) -> bool:
    try:
        httpx.get(f"{url}/healthz", timeout=0.5, verify=TLS)
    except httpx.HTTPError:
        return False
    return True


@pytest.mark.kafka
def test_children_end_when_their_parent_is_killed(start: Commands, kafka_url: str, namespace: str) -> None:
    gateway, url = served(start, kafka_url, namespace, 3)
    children = pids(url)
    assert len(children) == 3
    gateway.send(signal.SIGKILL)
    gateway.wait()
    until(lambda: not any(map(alive, children)))


@pytest.mark.kafka
def test_it_gives_up_when_a_process_ends_again_and_again(
    start: Commands, kafka_url: str, namespace: str, tmp_path: Path
) -> None:
    file = tmp_path / "chain.py"
    file.write_text(Path(GATE).read_text(encoding="utf-8"), encoding="utf-8")
    options = ("--broker", kafka_url, "--namespace", namespace)
    gateway = start("gateway", str(file), "--port", "0", "--workers", "2", *options)
    url = gateway.ready()
    first, second = sorted(pids(url))
    file.write_text("raise RuntimeError('it was replaced by something broken')\n")
    os.kill(first, signal.SIGKILL)
    gateway.logged("gateway.process_ended")
    for _ in range(2):
        gateway.logged("gateway.process_ended")
    # Its place takes no connections meanwhile.
    assert pids(url) == {second}
    assert gateway.wait() == 1
    assert not alive(second)
    assert re.search(r"error: a gateway process ended 5 times in a row soon after its start", gateway.stderr.text())


@pytest.mark.kafka
def test_a_place_without_a_process_takes_connections_again_once_it_has_one(
    start: Commands, kafka_url: str, namespace: str, tmp_path: Path
) -> None:
    file = tmp_path / "chain.py"
    text = Path(GATE).read_text(encoding="utf-8")
    file.write_text(text, encoding="utf-8")
    options = ("--broker", kafka_url, "--namespace", namespace)
    gateway = start("gateway", str(file), "--port", "0", "--workers", "2", *options)
    url = gateway.ready()
    for _ in range(2):
        gateway.logged("gateway.process_ready")
    killed = min(pids(url))
    file.write_text("raise RuntimeError('it was replaced by something broken')\n")
    os.kill(killed, signal.SIGKILL)
    for _ in range(3):  # after the third at the latest nobody waits for the next one
        gateway.logged("gateway.process_ended")
    file.write_text(text, encoding="utf-8")
    gateway.logged("gateway.process_ready")
    assert len(pids(url) - {killed}) == 2
    assert gateway.stop() == 0


def test_a_mistake_is_told_once_and_ends_all(tmp_path: Path) -> None:
    (tmp_path / "chain.py").write_text("x = 1\n")
    options = ("--broker", "kafka://127.0.0.1:1", "--port", "0", "--workers", "3")
    done = chains("gateway", "chain.py", *options, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(re.findall("error: ", done.stderr)) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--workers", "0"), r"error: --workers: should be greater than or equal to 1"),
        (("--workers", "2"), r"error: memory:// lives in one process"),
        (("--workers", "2", "--broker", "kafka://127.0.0.1:1", "--host", "0.0.0.0"), r"error: without API keys"),
        (("--workers", "2", "--broker", "kafka://127.0.0.1:1", "--host", "203.0.113.1"), r"error: 203.0.113.1 is not"),
    ],
)
def test_a_wrong_setting_ends_it_before_anything_starts(arguments: tuple[str, ...], said: str) -> None:
    began = time.monotonic()
    done = chains("gateway", HELLO, "--port", "0", *arguments)
    assert re.match(said, done.stderr), done.stderr
    assert (done.returncode, done.stdout) == (2, "")
    assert time.monotonic() - began < 20


def test_a_port_that_several_processes_have_is_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as taken:
        port = str(taken.getsockname()[1])
        options = ("--broker", "kafka://127.0.0.1:1", "--port", port, "--workers", "2")
        done = chains("gateway", HELLO, *options, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"error: port {port} on 127.0.0.1 is in use" in done.stderr
