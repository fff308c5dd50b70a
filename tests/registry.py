"""A real schema registry for tests: Apicurio, which speaks Confluent's API, on a free port, its schemas in memory."""

import asyncio
import json
import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import trustme
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from chains_stream.formats import Reader, Writer
from tests.kafka import free_ports

HOME = Path(__file__).parents[1] / ".registry"
VERSION = "3.0.9"  # Java 17 runs it; 3.3 wants 21
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


async def write(writer: Writer, value: Any, topic: str) -> bytes:
    missing = writer.missing(topic)
    if missing is not None:
        await missing
    assert writer.missing(topic) is None
    data, headers = writer.write(value, topic)
    assert headers == ()
    return data


async def read(reader: Reader, data: bytes, topic: str = "topic") -> Any:
    missing = reader.missing(data)
    if missing is not None:
        await missing
    assert reader.missing(data) is None
    return reader.read(data, {}, topic)


class Front:
    """What stands before a registry: it checks the credentials, and goes away when told to."""

    def __init__(self, behind: Registry, authorization: str | None) -> None:
        self.away = False
        self.hold = asyncio.Event()  # answers wait for it
        self.hold.set()
        self.asked: list[str] = []
        self.url = ""
        self._behind = behind
        self._authorization = authorization
        self._client = httpx.AsyncClient()

    async def answer(self, request: Request) -> Response:
        self.asked.append(request.url.path)
        await self.hold.wait()
        if self.away:
            return Response("nobody home", 503)
        if self._authorization not in (None, request.headers.get("authorization")):
            return Response('{"error_code": 401, "message": "who are you?"}', 401)
        answer = await self._client.request(
            request.method,
            f"{self._behind.url}{request.url.path}",
            params=dict(request.query_params),
            content=await request.body(),
            headers={"content-type": request.headers.get("content-type", "application/json")},
        )
        return Response(answer.content, answer.status_code, media_type="application/json")

    async def close(self) -> None:
        await self._client.aclose()


@asynccontextmanager
async def fronted(
    behind: Registry,
    certificate: trustme.LeafCert | None = None,
    folder: Path | None = None,
    authorization: str | None = None,
) -> AsyncIterator[Front]:
    front = Front(behind, authorization)
    app = Starlette(routes=[Route("/{path:path}", front.answer, methods=["GET", "POST"])])
    files: dict[str, Any] = {}
    if certificate is not None and folder is not None:
        pem = folder / "server.pem"
        certificate.private_key_and_cert_chain_pem.write_to_path(str(pem))
        files["ssl_certfile"] = str(pem)
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", 0, log_config=None, lifespan="off", **files))
    serving = asyncio.create_task(server.serve())
    try:
        async with asyncio.timeout(20):
            while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
                await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        front.url = f"{'https' if files else 'http'}://127.0.0.1:{port}"
        yield front
    finally:
        server.should_exit = True
        await serving
        await front.close()
