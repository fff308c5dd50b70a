"""The parts of a serving process, put together: what `chains run`, `gateway` and `worker` start."""

import asyncio
import gc
import shlex
import signal
import socket
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from chains_stream.broker import Broker
from chains_stream.calls import Caller
from chains_stream.chain import Chain
from chains_stream.chainlet import ChainletBase, chainlet_name, signature
from chains_stream.checks import advice
from chains_stream.cli.example import example_arguments
from chains_stream.cli.health import Health
from chains_stream.cli.process import Serving, Signals, connect, end, run, serve
from chains_stream.codec import codec_of
from chains_stream.delays import Mover
from chains_stream.errors import ChainsUsageError
from chains_stream.gateway.app import Gateway
from chains_stream.gateway.auth import Keys
from chains_stream.gateway.gate import Gate
from chains_stream.gateway.ids import secret_of
from chains_stream.gateway.server import Server, is_local
from chains_stream.gateway.tls import Tls
from chains_stream.log import get_logger
from chains_stream.settings import Settings
from chains_stream.webhooks import open_webhooks
from chains_stream.worker import Host

if TYPE_CHECKING:
    from chains_stream.cli.workers import Link

YOUNG = 10_000  # objects more than before, after which the garbage collector looks at them; Python has 700

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
        gateway = Gateway(chain, caller, broker, settings, hosted)
        failed = await _start_gateway(stack, gateway, (chain, broker, caller), settings)
        url = await _open(stack, server, gateway, settings)
        return Serving(f"{_ready(chain, url)}\n{try_it(chain, url)}", lambda: _any(host.failed(), failed()))

    _serve(chain, start)


def run_gateway(chain: Chain, settings: Settings, link: "Link | None" = None) -> None:
    """Serve a Chain's entrypoint over HTTP; its Chainlets are elsewhere. `link` is to the parent of several."""
    need_cluster(settings)

    async def start(stack: AsyncExitStack) -> Serving:
        server = await _bound(stack, settings, None if link is None else link.socket)
        broker, caller = await connect(stack, settings)
        gateway = Gateway(chain, caller, broker, settings)
        failed = await _start_gateway(stack, gateway, (chain, broker, caller), settings)
        url = await _open(stack, server, gateway, settings)
        return Serving(_ready(chain, url), failed)

    _serve(chain, start, link)


def run_worker(chain: Chain, served: Sequence[type[ChainletBase]], settings: Settings) -> None:
    """Take requests for some Chainlets of a Chain."""
    need_cluster(settings)

    async def start(stack: AsyncExitStack) -> Serving:
        health = await _watched(stack, settings)
        broker, caller = await connect(stack, settings)
        host = Host(chain, served, broker, caller, settings)
        stack.push_async_callback(host.drain)
        await host.start()
        if health is not None:
            health.watch(host, broker, caller)
            stack.callback(health.leave)
        _collect_less()
        return Serving(f"Worker of {', '.join(map(chainlet_name, served))} is ready", host.failed)

    _serve(chain, start)


def _collect_less() -> None:
    """Have the garbage collector pass what is there from the start, and look at the rest less often.

    A thousand events that wait to be stored outlive several of its rounds: it took a quarter of a worker's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG)


def _serve(
    chain: Chain, start: Callable[[AsyncExitStack], Coroutine[Any, Any, Serving]], link: "Link | None" = None
) -> None:
    for cls in chain.chainlets:
        for hint in advice(cls):
            log.warning("chain.advice", hint=str(hint))

    async def work(signals: Signals) -> None:
        if link is None:
            await serve(start, signals)
            return
        async with link.followed(signals):
            await serve(start, signals, link.announce)

    run(work)


async def _bound(stack: AsyncExitStack, settings: Settings, given: socket.socket | None = None) -> Server:
    """Take the port, before anything slow is done; `given` is one that whoever took it has looked at."""
    server = Server(settings.host, settings.port, settings.grace_period, tls=Tls.of(settings), bound=given)
    stack.push_async_callback(server.stop)
    await server.bind()
    if given is None:
        guard(settings, server.bound)
    return server


def guard(settings: Settings, bound: socket.socket) -> None:
    """Refuse to serve whoever reaches us from elsewhere without a key.

    Raises ChainsUsageError, for a wrong setting of keys, origins or certificates and a missing secret too.
    """
    secret_of(settings)  # before the broker is waited for
    gate = Gate.of(settings)
    Tls.of(settings)
    if not ((gate is not None and gate.keys is not None) or is_local(bound) or settings.allow_anonymous):
        raise ChainsUsageError(
            f"without API keys a gateway listens on loopback only, and {settings.host or 'all addresses'} is not: set "
            "CHAINS_API_KEYS (`chains key NAME` makes one), or CHAINS_ALLOW_ANONYMOUS=true behind something that checks"
        )


def _tell_of_keys(gateway: Gateway, server: Server) -> None:
    """Say who may call where there are no keys."""
    if gateway.gate is not None and gateway.gate.keys is not None:
        return
    if is_local(server.bound):
        log.info("gateway.no_keys", reason=f"no API keys are set: any program of this machine may call {server.url}")
    else:
        log.warning("gateway.no_keys", reason=f"no API keys are set: whoever reaches {server.url} may call it")


async def _watched(stack: AsyncExitStack, settings: Settings) -> Health | None:
    """Answer probes, if a port for them is named."""
    if settings.health_port is None:
        return None
    health = Health(settings.host, settings.health_port)
    stack.push_async_callback(health.stop)
    await health.start()
    return health


async def _start_gateway(
    stack: AsyncExitStack, gateway: Gateway, parts: tuple[Chain, Broker, Caller], settings: Settings
) -> Callable[[], Awaitable[None]]:
    """Start a gateway, and what every process that has one does besides: move what is due, deliver webhooks.

    Gives a wait for what ends one of them. Requests do not wait for the latter two to begin: a group whose member was
    killed lets nobody in until its session is over, and whoever takes its place has connections waiting.
    """
    chain, broker, caller = parts
    stack.push_async_callback(gateway.close)
    moving = asyncio.create_task(_move(broker, settings), name="move delayed")
    delivering = asyncio.create_task(_deliver(chain, broker, caller, settings), name="deliver webhooks")
    stack.push_async_callback(end, moving, delivering)
    await gateway.start()
    return lambda: _any(gateway.failed(), asyncio.shield(moving), asyncio.shield(delivering))


async def _move(broker: Broker, settings: Settings) -> None:
    """Publish what is due, until cancelled. Raises what keeps it from that."""
    mover = Mover(broker, settings)
    try:
        await mover.start()
        await mover.failed()
    finally:
        await mover.drain()


async def _deliver(chain: Chain, broker: Broker, caller: Caller, settings: Settings) -> None:
    """Deliver webhooks, until cancelled. Raises what keeps it from that."""
    async with AsyncExitStack() as stack:
        webhooks = await open_webhooks(stack, chain, broker, caller, settings)
        await webhooks.failed()


async def _any(*failures: Awaitable[None]) -> None:
    """Wait for the first failure. Raises it."""
    await asyncio.gather(*failures)


async def _open(stack: AsyncExitStack, server: Server, gateway: Gateway, settings: Settings) -> str:
    """Let HTTP in, as the first to be stopped; give the URL."""
    stack.push_async_callback(server.stop)
    _reload_on_hangup(stack, server, gateway, settings)
    _tell_of_keys(gateway, server)
    return await server.start(gateway.app, gateway.interrupt)


def _reload_on_hangup(stack: AsyncExitStack, server: Server, gateway: Gateway, settings: Settings) -> None:
    """Read certificate and keys again at SIGHUP, if there are any; without, the signal ends the process as ever."""
    gate, tls = gateway.gate, server.tls

    def reload() -> None:
        try:
            keys = Keys.of(settings)
            if tls is not None:
                tls.reload()
        except ChainsUsageError as error:
            log.warning("gateway.not_reloaded", reason=str(error))
            return
        if gate is not None:
            gate.keys = keys
        log.info("gateway.reloaded")

    if tls is not None or (gate is not None and gate.keys is not None):
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, reload)
        stack.callback(loop.remove_signal_handler, signal.SIGHUP)


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


def need_cluster(settings: Settings) -> None:
    """Raise ChainsUsageError for a broker that no other process reaches."""
    if settings.embedded:
        raise ChainsUsageError(
            "memory:// lives in one process: use `chains run`, or name a cluster with --broker kafka://host:port"
        )
