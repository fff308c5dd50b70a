"""What scripts, tests and other services use: `connect` to a running Chain, or `run_chain` to host one here."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, cast

from chains_stream.broker import Broker
from chains_stream.brokers import open_broker
from chains_stream.calls import Call, Caller, RemoteTarget, remote_target
from chains_stream.chain import Chain
from chains_stream.chainlet import ChainletBase, signature
from chains_stream.codec import Buffer, Codec, codec_of
from chains_stream.control import Control
from chains_stream.errors import ChainsRuntimeError, ChainsUsageError, DeadlineExceededError
from chains_stream.http_target import HttpTarget
from chains_stream.options import RPCOptions
from chains_stream.policy import scope_or_new
from chains_stream.settings import Settings
from chains_stream.signature import Signature
from chains_stream.store import Store, place_of
from chains_stream.stub import Stub
from chains_stream.worker import Host

# The limit of a dependency keeps one Chainlet from flooding another; whoever calls from outside knows what it wants.
UNHINDERED = RPCOptions(concurrency_limit=100_000)

P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)


class _Callable(Protocol[P, R_co]):
    """A Chainlet, seen by its one method alone: so the type checker knows what `run_remote` of a connection takes."""

    def run_remote(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


class Handle:
    """A request that was submitted, and runs whether anybody waits for it or not.

    Attributes:
        id: the request's id.
    """

    def __init__(self, call: Call, codec: Codec, signature: Signature) -> None:
        self.id = call.scope.request_id
        self._call = call
        self._codec = codec
        self._streaming = signature.streaming
        self._name = signature.chainlet
        self._unread: deque[Buffer] = deque()  # chunks that are here already

    async def result(self) -> Any:
        """Wait for the result; of a stream, for the list of its chunks that were not read yet.

        Raises what the Chainlet raised.
        """
        if self._streaming:
            return [chunk async for chunk in self]
        return self._codec.decode_result(await self._bounded(self._call.result()))

    async def __aiter__(self) -> AsyncIterator[Any]:
        if not self._streaming:
            raise ChainsUsageError(f"{self._name}.run_remote is no stream: await handle.result()")
        while True:
            while self._unread:  # one by one: whoever stops may come back for the others
                yield self._codec.decode_result(self._unread.popleft())
            chunks = await self._bounded(self._call.next())
            if chunks is None:
                return
            self._unread.extend(chunks)

    async def cancel(self) -> None:
        """Stop the request, wherever it is; `result` then raises CallCancelledError."""
        self._call.close()

    async def _bounded(self, work: Any) -> Any:
        limit = asyncio.timeout(max(0.0, self._call.scope.remaining))
        try:
            async with limit:
                return await work
        except TimeoutError as error:
            if limit.expired():
                raise DeadlineExceededError(f"{self._name}: the deadline of the request passed") from error
            raise


class Connection(Generic[P, R_co]):
    """A running Chain, called over the broker or through its gateway; serves thousands of calls at once."""

    def __init__(self, stub: Stub, submitter: "Submitter | None") -> None:
        self._submitter = submitter
        self._stub = stub

    def run_remote(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Call the entrypoint, as in the Chain file: await it, or ``async for`` over it.

        Raises what the Chainlet raised, or a `ChainsRuntimeError`.
        """
        result: R_co = self._stub.run_remote(*args, **kwargs)
        return result

    async def submit(self, *args: P.args, **kwargs: P.kwargs) -> Handle:
        """Send a request and return once the broker has stored it. It is not cancelled when the connection closes."""
        if self._submitter is None:
            raise ChainsUsageError(
                "submit needs a connection to the broker; through a gateway, use its asynchronous API"
            )
        return await self._submitter.submit(args, kwargs)


class Submitter:
    """Sends requests whose answers may be awaited later."""

    def __init__(self, signature: Signature, target: RemoteTarget, settings: Settings) -> None:
        self._signature = signature
        self._codec = codec_of(signature)
        self._target = target
        self._settings = settings

    async def submit(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Handle:
        arguments = self._codec.encode_arguments(args, dict(kwargs))
        scope = scope_or_new(self._settings.deadline)
        limit = asyncio.timeout(max(0.0, scope.remaining))
        try:
            async with limit:
                call = await self._target.open(arguments, scope, 1)
                try:
                    await call.stored()
                except BaseException:
                    call.close()
                    raise
        except TimeoutError as error:
            if limit.expired():
                raise DeadlineExceededError(f"{self._signature.chainlet}: not stored before the deadline") from error
            raise
        return Handle(call, self._codec, self._signature)


@asynccontextmanager
async def connect(url: str, chainlet: type[_Callable[P, R_co]], **settings: Any) -> AsyncIterator[Connection[P, R_co]]:
    """Connect to a running Chain by its entrypoint, or by any Chainlet that is an entrypoint itself.

    Args:
        url: ``kafka://host:9092`` for its broker, ``http://host:8000`` for its gateway.
        chainlet: the class, as in the Chain file; it may be declared anywhere, only names and types count.
        settings: fields of `Settings`, such as ``namespace`` and ``deadline``.

    Raises:
        ChainsUsageError: for a wrong URL, setting or Chainlet.
        BrokerError: if the broker can't be reached.
    """
    chain = _chain_of(chainlet)
    if url.startswith(("http://", "https://")):
        checked = Settings.of(**settings)
        async with HttpTarget(url, codec_of(signature(chain.entrypoint)), key=checked.api_key) as target:
            yield Connection(Stub(signature(chain.entrypoint), target, UNHINDERED, checked.deadline), None)
        return
    checked = Settings.of(broker=url, **settings)
    if checked.embedded:
        raise ChainsUsageError("memory:// lives in one process: host the Chain here with chains.run_chain(...)")
    async with AsyncExitStack() as stack:
        broker = await open_connected(stack, checked)
        yield await _connection(chain, await open_caller(stack, broker, checked), checked)


@asynccontextmanager
async def run_chain(
    entrypoint: type[_Callable[P, R_co]], broker: str = "memory://", **settings: Any
) -> AsyncIterator[Connection[P, R_co]]:
    """Host every Chainlet of a Chain in this process, and connect to it. For tests, and for small programs.

    Takes and raises what `connect` does.
    """
    chain = _chain_of(entrypoint)
    checked = Settings.of(broker=broker, **settings)
    async with AsyncExitStack() as stack:
        opened = await open_connected(stack, checked)
        caller = await open_caller(stack, opened, checked)
        host = Host(chain, chain.chainlets, opened, caller, checked)
        stack.push_async_callback(host.drain)
        await host.start()
        watch = asyncio.create_task(_watch(host, caller), name="watch host")
        stack.callback(watch.cancel)
        yield await _connection(chain, caller, checked)


async def open_connected(stack: AsyncExitStack, settings: Settings) -> Broker:
    """Open the broker that the settings name, connect, and close it with `stack`."""
    broker = open_broker(settings)
    place_of(settings)  # a mistake is told before the broker is waited for
    stack.push_async_callback(broker.close)
    await broker.start()
    return broker


async def open_caller(stack: AsyncExitStack, broker: Broker, settings: Settings) -> Caller:
    """Start this process's caller, with its store and its side of the control topic; close them with `stack`."""
    store = Store(settings)
    stack.push_async_callback(store.close)
    await store.start()
    control = Control(broker, settings)
    stack.push_async_callback(control.close)
    await control.start()
    caller = Caller(broker, control, settings, store)
    stack.push_async_callback(caller.close)
    await caller.start()
    return caller


async def _watch(host: Host, caller: Caller) -> None:
    """Fail the calls to a host that can't go on: nobody would answer them."""
    try:
        await host.failed()
    except ChainsRuntimeError as error:
        caller.fail(error)


async def _connection(chain: Chain, caller: Caller, settings: Settings) -> Connection[Any, Any]:
    found = signature(chain.entrypoint)
    target = await remote_target(chain, chain.entrypoint, caller, settings)
    stub = Stub(found, target, UNHINDERED, settings.deadline)
    return Connection(stub, Submitter(found, target, settings))


def _chain_of(chainlet: type[Any]) -> Chain:
    chain = Chain.of(cast("type[ChainletBase]", chainlet))  # which refuses what is none
    if signature(chain.entrypoint).websocket:
        raise ChainsUsageError(f"{chain.name} takes a WebSocket: open one at /websocket of its gateway")
    return chain
