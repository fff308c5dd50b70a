"""The parts of a serving process, put together: what `chains run`, `gateway` and `worker` start."""

import shlex
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from typing import Any

from chains_stream.chain import Chain
from chains_stream.chainlet import ChainletBase, chainlet_name, signature
from chains_stream.checks import advice
from chains_stream.cli.example import example_arguments
from chains_stream.cli.health import Health
from chains_stream.cli.process import Serving, Signals, connect, run, serve
from chains_stream.codec import codec_of
from chains_stream.errors import ChainsUsageError
from chains_stream.gateway.app import Gateway
from chains_stream.gateway.server import Server
from chains_stream.log import get_logger
from chains_stream.settings import Settings
from chains_stream.worker import Host

log = get_logger(__name__)


def run_all(chain: Chain, settings: Settings) -> None:
    """Serve a Chain over HTTP, with all its Chainlets in this process."""

    async def start(stack: AsyncExitStack) -> Serving:
        server = await _bound(stack, settings)
        broker, caller = await connect(stack, settings)
        host = Host(chain, chain.chainlets, broker, caller, settings)
        stack.push_async_callback(host.drain)
        await host.start()
        hosted = [worker.callee for worker in host.workers]
        url = await _open(stack, server, Gateway(chain, caller, broker, settings, hosted))
        return Serving(f"{_ready(chain, url)}\n{try_it(chain, url)}", host.failed)

    _serve(chain, start)


def run_gateway(chain: Chain, settings: Settings) -> None:
    """Serve a Chain's entrypoint over HTTP; its Chainlets are elsewhere."""
    _need_cluster(settings)

    async def start(stack: AsyncExitStack) -> Serving:
        server = await _bound(stack, settings)
        broker, caller = await connect(stack, settings)
        url = await _open(stack, server, Gateway(chain, caller, broker, settings))
        return Serving(_ready(chain, url), caller.failed)

    _serve(chain, start)


def run_worker(chain: Chain, served: Sequence[type[ChainletBase]], settings: Settings) -> None:
    """Take requests for some Chainlets of a Chain."""
    _need_cluster(settings)

    async def start(stack: AsyncExitStack) -> Serving:
        health = await _watched(stack, settings)
        broker, caller = await connect(stack, settings)
        host = Host(chain, served, broker, caller, settings)
        stack.push_async_callback(host.drain)
        await host.start()
        if health is not None:
            health.watch(host, broker, caller)
            stack.callback(health.leave)
        return Serving(f"Worker of {', '.join(map(chainlet_name, served))} is ready", host.failed)

    _serve(chain, start)


def _serve(chain: Chain, start: Callable[[AsyncExitStack], Coroutine[Any, Any, Serving]]) -> None:
    for cls in chain.chainlets:
        for hint in advice(cls):
            log.warning("chain.advice", hint=str(hint))

    async def work(signals: Signals) -> None:
        await serve(start, signals)

    run(work)


async def _bound(stack: AsyncExitStack, settings: Settings) -> Server:
    """Take the port, before anything slow is done."""
    server = Server(settings.host, settings.port, settings.grace_period)
    stack.push_async_callback(server.stop)
    await server.bind()
    return server


async def _watched(stack: AsyncExitStack, settings: Settings) -> Health | None:
    """Answer probes, if a port for them is named."""
    if settings.health_port is None:
        return None
    health = Health(settings.host, settings.health_port)
    stack.push_async_callback(health.stop)
    await health.start()
    return health


async def _open(stack: AsyncExitStack, server: Server, gateway: Gateway) -> str:
    """Let HTTP in, as the first to be stopped; give the URL."""
    stack.push_async_callback(gateway.close)
    await gateway.start()
    stack.push_async_callback(server.stop)
    return await server.start(gateway.app, gateway.interrupt)


def _ready(chain: Chain, url: str) -> str:
    return f"Chain {chain.name} is ready on {url}"


def try_it(chain: Chain, url: str) -> str:
    """Write a request to try: a command for a shell, with arguments that the entrypoint takes."""
    if signature(chain.entrypoint).websocket:
        return f"Try it:\n  websocat ws{url.removeprefix('http')}/websocket"
    arguments, valid = example_arguments(codec_of(signature(chain.entrypoint)))
    text = "Try it:" if valid else "Try it, with arguments of your own:"
    header = "content-type: application/json"
    command = ["curl", "-N", f"{url}/run_remote", "-H", header, "-d", arguments.decode()]
    return f"{text}\n  {shlex.join(command)}"


def _need_cluster(settings: Settings) -> None:
    if settings.broker.startswith("memory:"):
        raise ChainsUsageError(
            "memory:// lives in one process: use `chains run`, or name a cluster with --broker kafka://host:port"
        )
