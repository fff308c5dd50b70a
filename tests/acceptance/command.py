"""The real `chains` command as a subprocess, in a process group of its own, with deadlines on every wait."""

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import pytest

CHAINS = Path(sys.executable).with_name("chains")
HERE = Path(__file__).parent
READY = re.compile(r"(?:Chain .+ is ready on (?P<url>https?://\S+)|Worker of .+ is ready)$")
DEADLINE = 40.0  # seconds: more than any step takes on a busy machine, and less than a test's own timeout


def environment(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a command: of ours, without settings that a developer may have set."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("CHAINS_")}
    return inherited | {"PYTHONWARNINGS": "error", "NO_PROXY": "127.0.0.1", **(variables or {})}


def chains(
    *arguments: str, stdin: str = "", cwd: Path | None = None, variables: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end."""
    return subprocess.run(
        [CHAINS, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=environment(variables),
        timeout=DEADLINE,
    )


def until(holds: Callable[[], bool]) -> None:
    """Wait for something that happens in another process, which can't tell us."""
    end = time.monotonic() + DEADLINE
    while not holds():
        assert time.monotonic() < end, f"{holds} came true"
        time.sleep(0.01)


class Command:
    """A command that runs until it is told to stop."""

    def __init__(self, *arguments: str, cwd: Path | None = None, variables: Mapping[str, str] | None = None) -> None:
        self.arguments = arguments
        self._process = subprocess.Popen(
            [CHAINS, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            cwd=cwd,
            env=environment(variables),
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self.stdout = _Lines(self._process.stdout)
        self.stderr = _Lines(self._process.stderr)

    @property
    def pid(self) -> int:
        return self._process.pid

    def ready(self, seconds: float = DEADLINE) -> str:
        """Wait for the line that says so; give the URL in it, if it has one."""
        found = READY.search(self.stdout.until(lambda line: READY.search(line) is not None, self, seconds))
        assert found is not None
        return found["url"] or ""

    def logged(self, event: str) -> str:
        """Wait for an event in the log."""
        return self.stderr.until(lambda line: f"] {event} " in line, self)

    def send(self, number: signal.Signals) -> None:
        os.kill(self._process.pid, number)

    def wait(self, seconds: float = DEADLINE) -> int:
        """Wait for the end, and give the status."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self} did not end\n{self.report()}") from None

    def stop(self) -> int:
        self.send(signal.SIGTERM)
        return self.wait()

    def end(self) -> None:
        """Leave nothing of it behind, whatever it did."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.stdout.close()
        self.stderr.close()

    def report(self) -> str:
        return f"--- {self}\n--- stdout\n{self.stdout.text()}\n--- stderr\n{self.stderr.text()}"

    def __str__(self) -> str:
        return f"chains {' '.join(self.arguments)} ({self._process.returncode})"


class _Lines:
    """What a process writes, line by line."""

    def __init__(self, pipe: IO[str]) -> None:
        self._pipe = pipe
        self._seen: list[str] = []
        self._new: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def until(self, wanted: Callable[[str], bool], command: Command, seconds: float = DEADLINE) -> str:
        """Wait for a line, of those not waited for before."""
        end = time.monotonic() + seconds
        while True:
            try:
                line = self._new.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"{command} did not say so in time\n{command.report()}") from None
            assert line is not None, f"{command} ended without saying so\n{command.report()}"
            if wanted(line):
                return line

    def text(self) -> str:
        return "\n".join(self._seen)

    def close(self) -> None:
        self._thread.join()
        self._pipe.close()

    def _read(self) -> None:
        for line in self._pipe:
            self._seen.append(line.rstrip("\n"))
            self._new.put(self._seen[-1])
        self._new.put(None)


class Commands:
    """Starts commands, and ends them all."""

    def __init__(self) -> None:
        self._started: list[Command] = []

    def __call__(self, *arguments: str, cwd: Path | None = None, variables: Mapping[str, str] | None = None) -> Command:
        self._started.append(Command(*arguments, cwd=cwd, variables=variables))
        return self._started[-1]

    def all(self) -> list[Command]:
        return list(self._started)

    def report(self) -> str:
        return "\n".join(command.report() for command in self._started)

    def end(self) -> None:
        for command in self._started:
            command.end()


STARTED = pytest.StashKey[Commands]()  # of a test or its module: what it started, to be shown if it fails


@contextmanager
def commands() -> Iterator[Commands]:
    """Commands that live as long as the block."""
    started = Commands()
    try:
        yield started
    finally:
        started.end()
