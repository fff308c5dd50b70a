"""Kafka nodes of a test's own, to break as it likes."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "deploy" / "kafka" / "kafka"


class Node:
    """A real broker on a port of its own."""

    def __init__(self, *config: str) -> None:
        self._config = [argument for entry in config for argument in ("--config", entry)]
        self.url = self._run("start", "--port", "0", *self._config)
        self.port = self.url.rpartition(":")[2]

    def start(self) -> None:
        self._run("start", "--port", self.port, *self._config)

    def stop(self) -> None:
        self._run("stop", "--port", self.port)

    def kill(self) -> None:
        self._run("kill", "--port", self.port)

    def signal(self, number: int) -> None:
        """Send its process a signal: SIGSTOP, say."""
        os.kill(int((SCRIPT.parents[2] / ".kafka" / self.port / "pid").read_text()), number)

    def clean(self) -> None:
        self._run("clean", "--port", self.port)

    def _run(self, *arguments: str) -> str:
        done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@contextmanager
def node(*config: str) -> Iterator[Node]:
    """Run a broker with these properties, written ``key=value``, for the length of the block."""
    started = Node(*config)
    try:
        yield started
    finally:
        started.clean()
