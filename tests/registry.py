"""A real schema registry for tests: Apicurio, which speaks Confluent's API, on a free port, its schemas in memory."""

import json
import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from tests.kafka import free_ports

HOME = Path(__file__).parents[1] / ".registry"
VERSION = "3.0.9"  # the last that Java 17 runs
ARTIFACT = f"io.apicurio:apicurio-registry-app:{VERSION}:tar.gz:all"
# Newer ones want the parent's description too, and Central does not have it.
GET = "org.apache.maven.plugins:maven-dependency-plugin:2.8:get"
API = "/apis/ccompat/v7"
START_SECONDS = 90


class MissingRegistryError(Exception):
    """There is no registry to be had on this machine; the message says why."""


class Registry:
    """A registry that runs; `url` is that of Confluent's API."""

    def __init__(self, url: str) -> None:
        self.url = url

    def register(self, subject: str, schema: Any, kind: str = "AVRO", references: Any = ()) -> int:
        """Register a schema as any other program would; give its id."""
        body = {"schema": json.dumps(schema), "schemaType": kind, "references": list(references)}
        answer = httpx.post(f"{self.url}/subjects/{subject}/versions", json=body)
        assert answer.status_code == 200, answer.text
        return int(answer.json()["id"])

    def latest(self, subject: str) -> tuple[int, Any]:
        """Give the id of the latest schema of a subject, and the schema."""
        answer = httpx.get(f"{self.url}/subjects/{subject}/versions/latest")
        assert answer.status_code == 200, answer.text
        return answer.json()["id"], json.loads(answer.json()["schema"])

    def subjects(self) -> list[str]:
        found: list[str] = httpx.get(f"{self.url}/subjects").json()
        return found

    def require(self, subject: str, compatibility: str) -> None:
        """Have new schemas of a subject checked."""
        answer = httpx.put(f"{self.url}/config/{subject}", json={"compatibility": compatibility})
        assert answer.status_code == 200, answer.text


@contextmanager
def running() -> Iterator[Registry]:
    """Run a registry for the length of the block, or take the one at REGISTRY_URL."""
    given = os.environ.get("REGISTRY_URL")
    if given:
        yield Registry(given)
        return
    jar = _fetched()
    (port,) = free_ports(1)
    options = ["-Xmx256m", "-XX:TieredStopAtLevel=1"]  # it lives too short to repay better compiling
    address = {"QUARKUS_HTTP_HOST": "127.0.0.1", "QUARKUS_HTTP_PORT": str(port)}
    with TemporaryDirectory() as folder, (Path(folder) / "log").open("w+b") as log:
        process = subprocess.Popen(
            ["java", *options, "-jar", str(jar)], cwd=folder, stdout=log, stderr=log, env=os.environ | address
        )
        try:
            registry = Registry(f"http://127.0.0.1:{port}{API}")
            _await(registry, process, Path(folder) / "log")
            yield registry
        finally:
            process.kill()
            process.wait()


def _fetched() -> Path:
    """Give the program's jar, which Maven fetches once."""
    if shutil.which("java") is None or shutil.which("mvn") is None:
        raise MissingRegistryError("it needs Java 17+ and, once, Maven")
    jar = HOME / VERSION / f"apicurio-registry-app-{VERSION}-runner.jar"
    if not jar.exists():
        HOME.mkdir(exist_ok=True)
        with TemporaryDirectory(dir=HOME) as folder:
            archive, unpacked = Path(folder) / "all.tar.gz", Path(folder) / VERSION
            fetch = ["mvn", "-q", "-B", GET, "-Dtransitive=false", f"-Dartifact={ARTIFACT}", f"-Ddest={archive}"]
            done = subprocess.run(fetch, capture_output=True, text=True, check=False)
            if done.returncode:
                raise MissingRegistryError(done.stdout.strip() or done.stderr.strip())
            with tarfile.open(archive) as packed:
                packed.extractall(unpacked, filter="data")
            unpacked.rename(HOME / VERSION)  # whole or not at all
    return jar


def _await(registry: Registry, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            if httpx.get(f"{registry.url}/subjects").status_code == 200:
                return
        except httpx.TransportError:
            pass
        if process.poll() is not None or time.monotonic() > deadline:
            raise MissingRegistryError(f"it did not start: {log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.2)
