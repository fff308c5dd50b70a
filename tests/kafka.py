"""Kafka nodes of a test's own, to break as it likes."""

import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "deploy" / "kafka" / "kafka"

# Compiled less well, a broker starts in half the processor time, and none lives long enough here to repay more.
QUICK = {"KAFKA_OPTS": "-XX:TieredStopAtLevel=1"}

# Of three nodes, any two can go on.
CLUSTER = (
    "node.id={number}",
    "controller.quorum.voters={voters}",
    "listeners=PLAINTEXT://127.0.0.1:{{port}},CONTROLLER://127.0.0.1:{mine}",
    "offsets.topic.replication.factor=3",
    "min.insync.replicas=2",
)


class Node:
    """A real broker on a port of its own; `heap` as Java takes it."""

    def __init__(self, *config: str, heap: str = "") -> None:
        self._config = [argument for entry in config for argument in ("--config", entry)]
        self._heap = heap
        self.url = self._run("start", "--port", "0", *self._config)
        self.port = self.url.rpartition(":")[2]

    def start(self) -> None:
        self._run("start", "--port", self.port, *self._config)

    def stop(self) -> None:
        self._run("stop", "--port", self.port)

    def kill(self) -> None:
        self._run("kill", "--port", self.port)

    def signal(self, number: int) -> None:
        """Send its process a signal: SIGSTOP, say, after which it no longer does anything."""
        pid = int((SCRIPT.parents[2] / ".kafka" / self.port / "pid").read_text())
        os.kill(pid, number)
        while number == signal.SIGSTOP and not _stopped(pid):
            time.sleep(0.001)  # a thread may be at work on another processor; nobody is told when it has stopped

    def clean(self) -> None:
        self._run("clean", "--port", self.port)

    def _run(self, *arguments: str) -> str:
        environment = os.environ | QUICK | ({"KAFKA_HEAP": self._heap} if self._heap else {})
        done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


def _stopped(pid: int) -> bool:
    """Tell whether all threads of a process are stopped, where that can be seen."""
    try:
        states = [stat.read_text().rpartition(")")[2].split()[0] for stat in Path(f"/proc/{pid}/task").glob("*/stat")]
    except (FileNotFoundError, ProcessLookupError):  # of a thread that has just ended
        return False
    return all(state == "T" for state in states)


@contextmanager
def node(*config: str) -> Iterator[Node]:
    """Run a broker with these properties, written ``key=value``, for the length of the block."""
    started = Node(*config)
    try:
        yield started
    finally:
        started.clean()


@contextmanager
def cluster() -> Iterator[Sequence[Node]]:
    """Run three small brokers that are one cluster, for the length of the block."""
    controllers = free_ports(3)
    voters = ",".join(f"{number}@127.0.0.1:{port}" for number, port in enumerate(controllers, 1))

    def start(number: int, mine: int) -> Node:
        config = (entry.format(number=number, mine=mine, voters=voters) for entry in CLUSTER)
        return Node(*config, heap="256m")

    # All at once: none of them answers before two are there.
    with ThreadPoolExecutor() as pool:
        starting = [pool.submit(start, number, port) for number, port in enumerate(controllers, 1)]
    nodes = [future.result() for future in starting if future.exception() is None]
    try:
        assert len(nodes) == len(starting), [future.exception() for future in starting]
        yield nodes
    finally:
        for each in nodes:
            each.clean()


def free_ports(count: int) -> list[int]:
    """Give free ports, below those that the kernel gives to outgoing connections."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(20_000, 32_768)
        with socket.socket() as probe:
            if port not in found and probe.connect_ex(("127.0.0.1", port)) != 0:
                found.append(port)
    return found
