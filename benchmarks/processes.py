"""What benchmarks start: a Kafka, the `chains` command, the rivals; and the line that says where they ran."""

import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import msgspec

ROOT = Path(__file__).resolve().parents[1]
KAFKA = ROOT / "deploy" / "kafka" / "kafka"
CHAINS = Path(sys.executable).with_name("chains")
READY = "is ready"  # what all of them print when they are
START_SECONDS = 90.0
ANSWER_SECONDS = 120.0
END_SECONDS = 20.0


class ProgramFailedError(Exception):
    """A program ended, or gave no answer in time; its last words are in the message."""


def machine() -> str:
    """Name the versions and the machine, for the head of a report."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("chains-stream", "aiokafka"))
    return f"{versions}, Python {platform.python_version()}, {platform.platform()}, {os.cpu_count()} CPUs"


@contextmanager
def kafka(url: str | None, *properties: str) -> Iterator[str]:
    """The Kafka of that URL, or one of our own with these properties, written ``key=value``."""
    if url is not None:
        yield url
        return
    configured = [argument for entry in properties for argument in ("--config", entry)]
    started = subprocess.run(
        [KAFKA, "start", "--port", "0", *configured], stdout=subprocess.PIPE, text=True, check=True
    )
    found = started.stdout.split()[-1]
    try:
        yield found
    finally:
        subprocess.run([KAFKA, "clean", "--port", found.rpartition(":")[2]], check=True)


def end_what_was_started() -> None:
    """Have SIGTERM end this program as Ctrl-C does, so that what it has started ends too."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


class Serving:
    """A command that serves: its process id and, of a gateway, its URL."""

    def __init__(self, pid: int, url: str) -> None:
        self.pid = pid
        self.url = url

    def rss(self) -> int:
        """Give its resident memory in bytes."""
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None, "Linux"
        return int(found[1]) * 1024


class Driver(Serving):
    """A program that measures what it is told to on its stdin (`driving.obey`)."""

    def __init__(self, process: subprocess.Popen[str], url: str, log: IO[bytes]) -> None:
        super().__init__(process.pid, url)
        self._process = process
        self._log = log

    def ask(self, order: msgspec.Struct, limit: float = ANSWER_SECONDS) -> dict[str, float]:
        """Have a measurement made, and give its figures."""
        assert self._process.stdin is not None, "a pipe"
        self._process.stdin.write(msgspec.json.encode(order).decode() + "\n")
        self._process.stdin.flush()
        return msgspec.json.decode(_line(self._process, self._log, limit), type=dict[str, float])


@contextmanager
def chains(*arguments: str, seconds: float = START_SECONDS) -> Iterator[Serving]:
    """A `chains` command that serves, once it is ready, which takes so many seconds at most."""
    with _started([str(CHAINS), *arguments], {}, seconds) as serving:
        yield serving


@contextmanager
def program(module: str, *arguments: str, variables: Mapping[str, str] | None = None) -> Iterator[Driver]:
    """A module of ours, run as a program, once it is ready."""
    with _started([sys.executable, "-m", module, *arguments], variables or {}, START_SECONDS) as started:
        yield started


@contextmanager
def _started(command: Sequence[str], variables: Mapping[str, str], seconds: float) -> Iterator[Driver]:
    """A process in a group of its own, which ends with it, so that what it started itself is ended too."""
    with TemporaryFile() as log:
        driven = False
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=ROOT,
            env=os.environ | variables,
            start_new_session=True,
        )
        try:
            while READY not in (line := _line(process, log, seconds)):
                pass
            driven = line.startswith("Driver")
            yield Driver(process, line.split()[-1], log)
        finally:
            _end(process, driven=driven)


def _line(process: subprocess.Popen[str], log: IO[bytes], limit: float) -> str:
    """Wait for a line; a process that gives none in time is killed. Raises ProgramFailedError."""
    assert process.stdout is not None, "a pipe"
    timer = threading.Timer(limit, process.kill)
    timer.start()
    try:
        line = process.stdout.readline()
    finally:
        timer.cancel()
    if not line:
        code = process.wait()
        log.seek(0)
        said = log.read().decode(errors="replace")[-4000:]
        raise ProgramFailedError(f"{shlex.join(map(str, process.args))} ended with {code}:\n{said}")  # type: ignore[arg-type] # a sequence, as we gave it
    return line


def _end(process: subprocess.Popen[str], *, driven: bool) -> None:
    """End a process, by force if it does not go by itself, and what is left of its group."""
    assert process.stdin is not None, "a pipe"
    assert process.stdout is not None, "a pipe"
    with suppress(BrokenPipeError):
        process.stdin.close()
    if not driven:  # a driver ends when there are no more orders
        process.terminate()
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.stdout.close()
