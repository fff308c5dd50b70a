"""Real Triton servers for tests: one that all share, and those of a test's own, to break as it likes."""

import asyncio
import os
import subprocess
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.kafka import free_ports

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "deploy" / "engines" / "triton"
MODELS = Path(__file__).parent / "models"
ENVIRONMENT = ROOT / ".venv-triton"
WAIT = 20.0  # seconds that a test waits for what must come

# Chosen here, so that Chainlets of the tests can name it; the server is started by the first test that asks for it.
PORT = free_ports(1)[0]
URL = f"grpc://127.0.0.1:{PORT}"
NOTES = Path(tempfile.gettempdir()) / f"chains-triton-notes-{PORT}"  # where models note what happened to a request


class Server:
    """A server on a port of its own; `config` are options of tritonserver, written ``key=value``."""

    def __init__(self, *config: str, port: int | None = None) -> None:
        self.port = port or free_ports(1)[0]
        self.url = f"grpc://127.0.0.1:{self.port}"
        # Told, and not found out by starting each model twice.
        self._config = [argument for entry in ("strict-model-config=true", *config) for argument in ("--config", entry)]

    def start(self) -> None:
        self._run("start", str(MODELS), "--port", str(self.port), *self._config)

    def kill(self) -> None:
        self._run("kill", "--port", str(self.port))

    def clean(self) -> None:
        self._run("clean", "--port", str(self.port))

    def _run(self, *arguments: str) -> None:
        environment = os.environ | {"NOTES": str(NOTES)}
        done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr


@contextmanager
def server(model: str, *config: str) -> Iterator[Server]:
    """Run a server with one model for the length of the block."""
    started = Server("model-control-mode=explicit", f"load-model={model}", *config)
    started.start()
    try:
        yield started
    finally:
        started.clean()


async def until(true: Callable[[], bool] | Callable[[], Awaitable[bool]], seconds: float = WAIT) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(seconds):
        while True:
            found = true()
            if found if isinstance(found, bool) else await found:
                return
            await asyncio.sleep(0.01)


class Notes:
    """What a model has noted of the request with this key."""

    def __init__(self, key: str) -> None:
        self.path = NOTES / key

    @property
    def lines(self) -> list[str]:
        return self.path.read_text().splitlines() if self.path.exists() else []

    async def have(self, line: str, seconds: float = WAIT) -> None:
        await until(lambda: line in self.lines, seconds)
