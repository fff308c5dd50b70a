"""What is broken: two gateways, workers of each kind, and their Kafka, all real processes of this machine."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from uuid import uuid4

from tests.acceptance.command import HERE, Command, Commands
from tests.chaos.driver import KINDS, Kind
from tests.chaos.proxy import Proxy
from tests.kafka import Node, cluster, free_ports, node

FILE = str(HERE / "chains" / "faults.py")
ENTRYPOINTS: Mapping[Kind, str] = {"unary": "Answer", "stream": "Tell", "resumable": "Resume"}
WORKERS = 2  # of each kind
SESSION_SECONDS = 6.0  # until Kafka gives a silent worker's partitions to others: the least that it allows
PARTITIONS = 8

# A second listener, which is named to clients by the proxy's port: a worker that begins there stays there.
PROXIED = (
    "listeners=PLAINTEXT://127.0.0.1:{{port}},CONTROLLER://127.0.0.1:{{controller}},PROXIED://127.0.0.1:{target}",
    "advertised.listeners=PLAINTEXT://127.0.0.1:{{port}},PROXIED://127.0.0.1:{port}",
    "listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,PROXIED:PLAINTEXT",
)


class World:
    """The processes; a fault takes what it breaks from here, and puts what it starts back.

    Attributes:
        proxy: the way to the broker for workers that begin at `proxied`; None for a cluster.
        namespace: of all topics.
    """

    def __init__(
        self, nodes: Sequence[Node], commands: Commands, runs: Path, proxy: Proxy | None = None, proxied: str = ""
    ) -> None:
        self.nodes = nodes
        self.proxy = proxy
        self.proxied = proxied
        self.namespace = f"t{uuid4().hex[:12]}"
        self.servers = [each.url.removeprefix("kafka://") for each in nodes]
        self.workers: dict[Kind, list[Command]] = {kind: [] for kind in KINDS}
        self.gateways: dict[Kind, Command] = {}
        self.urls: dict[Kind, str] = {}
        self._commands = commands
        self._runs = runs
        self._variables = {
            "CHAINS_KAFKA_SESSION_TIMEOUT_MS": f"{SESSION_SECONDS * 1000:.0f}",
            "CHAINS_PARTITIONS": str(PARTITIONS),
            "CHAINS_REPLY_PARTITIONS": str(PARTITIONS),
            "CHAINS_REPLICATION_FACTOR": str(len(nodes)),
            "CHAOS_RUNS": str(runs),
        }

    async def start(self) -> None:
        async with asyncio.TaskGroup() as starting:
            for kind in KINDS:
                for _ in range(WORKERS):
                    starting.create_task(self.add_worker(kind))
                starting.create_task(self.open_gateway(kind))

    async def open_gateway(self, kind: Kind) -> None:
        """Start the gateway of a kind, on the port that it had before."""
        port = self.urls[kind].rpartition(":")[2] if kind in self.urls else "0"
        # Its log has a line for each request, which a driver in the same process would have to read.
        command = self._begin("gateway", kind, "--port", port, variables={"CHAINS_LOG_LEVEL": "warning"})
        self.gateways[kind] = command
        self.urls[kind] = await asyncio.to_thread(command.ready)

    async def add_worker(self, kind: Kind, broker: str | None = None) -> Command:
        """Start a worker, and wait until it has joined."""
        command = self._begin("worker", kind, broker=broker)
        self.workers[kind].append(command)
        await asyncio.to_thread(command.ready)
        return command

    def notes(self) -> list[list[str]]:
        """Give the runs of Chainlets so far, each as its request, the Chainlet, the process and the moment."""
        lines = self._runs.read_text(encoding="utf-8").splitlines() if self._runs.exists() else []
        return [line.split() for line in lines]

    def report(self) -> str:
        return self._commands.report()

    def _begin(
        self, what: str, kind: Kind, *flags: str, broker: str | None = None, variables: Mapping[str, str] | None = None
    ) -> Command:
        at = ("--broker", broker or f"kafka://{','.join(self.servers)}", "--namespace", self.namespace)
        file = f"{FILE}:{ENTRYPOINTS[kind]}"
        return self._commands(what, file, *at, *flags, variables=self._variables | dict(variables or {}))


@asynccontextmanager
async def one_broker(commands: Commands, folder: Path) -> AsyncIterator[World]:
    """Run a world on one broker, with a proxy to it, for the length of the block."""
    port, target = free_ports(2)
    async with AsyncExitStack() as stack:
        broker = stack.enter_context(node(*(entry.format(port=port, target=target) for entry in PROXIED)))
        proxy = await stack.enter_async_context(Proxy(port, target))
        world = World([broker], commands, folder / f"runs-{port}", proxy, f"kafka://127.0.0.1:{port}")
        stack.callback(commands.end)  # before the broker ends, and the proxy
        await world.start()
        yield world


@asynccontextmanager
async def three_brokers(commands: Commands, folder: Path) -> AsyncIterator[World]:
    """Run a world on a cluster, for the length of the block."""
    with cluster() as nodes:
        world = World(nodes, commands, folder / f"runs-{nodes[0].port}")
        try:
            await world.start()
            yield world
        finally:
            commands.end()
