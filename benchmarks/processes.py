"""What benchmarks start: a Kafka, and the `chains` command; and the line that says where they ran."""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

KAFKA = Path(__file__).resolve().parents[1] / "deploy" / "kafka" / "kafka"
CHAINS = Path(sys.executable).with_name("chains")


def machine() -> str:
    """Name the versions and the machine, for the head of a report."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("chains-stream", "aiokafka"))
    return f"{versions}, Python {platform.python_version()}, {platform.platform()}, {os.cpu_count()} CPUs"


@contextmanager
def kafka(url: str | None) -> Iterator[str]:
    """The Kafka of that URL, or one of our own."""
    if url is not None:
        yield url
        return
    started = subprocess.run([KAFKA, "start", "--port", "0"], stdout=subprocess.PIPE, text=True, check=True)
    found = started.stdout.split()[-1]
    try:
        yield found
    finally:
        subprocess.run([KAFKA, "clean", "--port", found.rpartition(":")[2]], check=True)


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


@contextmanager
def chains(*arguments: str) -> Iterator[Serving]:
    """A `chains` command that serves, once it is ready."""
    command = [str(CHAINS), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if "is ready" not in line:
                raise SystemExit(f"{command} ended, or said {line!r}")
            yield Serving(process.pid, line.split()[-1])
        finally:
            process.terminate()
