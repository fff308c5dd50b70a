"""Chainlets in this process: `run_local`, and the target of a call that needs no broker.

A local call passes through the same codec and the same policy as a remote one: what `run_local` accepts, Kafka accepts.
"""

import asyncio
import contextvars
import types
from collections.abc import AsyncGenerator, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, contextmanager, suppress
from pathlib import Path
from typing import Any

from chains_stream.batches import Batcher
from chains_stream.chain import Chain
from chains_stream.chainlet import (
    METHOD,
    ChainletBase,
    ContextDependency,
    Dependency,
    chainlet_name,
    injecting,
    signature,
)
from chains_stream.codec import Buffer, Codec, codec_of
from chains_stream.errors import ChainsRuntimeError, WebSocketClosedError, message_of
from chains_stream.log import get_logger
from chains_stream.options import DeployedServiceDescriptor, DeploymentContext, RPCOptions
from chains_stream.policy import Limit, Scope, current, scope_or_new
from chains_stream.stub import Stub
from chains_stream.timeouts import Timeout, fault_of
from chains_stream.websocket import WebSocketProtocol

THREADS = "chains-thread"  # how the names of the threads of sync Chainlets begin
FAILED = "failed"  # of a Chainlet: waits until it can't serve any more, and raises why
LOCAL_DEADLINE = 600.0  # seconds, of a request made in `run_local`

log = get_logger(__name__)


class Callee:
    """An instance of a Chainlet, ready to be called with decoded arguments."""

    def __init__(self, cls: type[ChainletBase], instance: ChainletBase) -> None:
        self.name = chainlet_name(cls)
        self.signature = signature(cls)
        self.codec: Codec = codec_of(self.signature)
        self.concurrency = cls.remote_config.compute.concurrency
        self.resumable = cls.remote_config.options.resumable
        self.slots = Limit(self.concurrency)
        self.colocated = False  # called in this process too, and not by its worker alone
        self.beneath: Sequence[Callee] = ()  # those that it calls in this process, and can't do without
        # Of its own: the event loop's has a handful, whatever `predict_concurrency` says. Threads start as needed.
        self._threads = ThreadPoolExecutor(self.concurrency, thread_name_prefix=f"{THREADS}-{self.name}")
        self.instance = instance
        self._batcher = Batcher(self._run_batch, cls.batch) if cls.batch is not None else None
        # The class's own: `run_local` puts a stub in its place on the instance.
        self._method = types.MethodType(getattr(type(instance), METHOD), instance)
        self._lives: tuple[asyncio.AbstractEventLoop, asyncio.Task[None]] | None = None  # where, and its entering

    async def enter(self, stack: AsyncExitStack) -> None:
        """Enter an instance that is an async context manager; `stack` exits it. Raises what it raises."""
        if isinstance(self.instance, AbstractAsyncContextManager):
            await self.instance.__aenter__()
            stack.push_async_callback(self._exit, self.instance)

    async def _exit(self, instance: AbstractAsyncContextManager[Any]) -> None:
        try:
            await instance.__aexit__(None, None, None)
        except Exception as error:
            reason = f"{type(error).__name__}: {message_of(error)}"
            if await self.dead():  # which is what ends the process, and has a reason of its own
                log.error("chainlet.exit_failed", chainlet=self.name, reason=reason)  # noqa: TRY400 - it says it all
                return
            raise ChainsRuntimeError(f"{self.name}.__aexit__ failed: {reason}") from error

    async def enter_for_the_loop(self) -> None:
        """Enter it once, as the first call of an event loop needs it; it is exited when that loop ends."""
        if not isinstance(self.instance, AbstractAsyncContextManager):
            return
        loop = asyncio.get_running_loop()
        if self._lives is None or self._lives[0] is not loop:
            # The loop closes an asynchronous generator that is still open when it ends: nobody else is there to.
            life = self._life = _life(self.instance)
            self._lives = loop, loop.create_task(_begin(life), name=f"enter {self.name}")
        await asyncio.shield(self._lives[1])

    async def dead(self) -> bool:
        """Tell whether the Chainlet, or one beneath it, says by its `failed` that it can't serve any more."""
        failed = getattr(self.instance, FAILED, None)
        if failed is not None and await fault_of(failed) is not None:
            return True
        return any([await callee.dead() for callee in self.beneath])

    async def call(self, arguments: Mapping[str, Any]) -> bytes:
        """Run a unary `run_remote`, a sync one in a thread, and encode its result.

        Raises what it raises, and InvalidResultError.
        """
        return self.codec.encode_result(await self.invoke(arguments))

    def invoke(self, arguments: Mapping[str, Any]) -> Coroutine[Any, Any, Any]:
        """Run a unary `run_remote`, a sync one in a thread, once it is awaited: it gives the result as it is.

        Raises what it raises.
        """
        if self._batcher is not None:
            (items,) = arguments.values()
            return self._batcher.call(list(items))
        return self._invoke(arguments)

    async def _run_batch(self, items: list[Any]) -> Any:
        return await self._invoke({self.signature.parameters[0].name: items})

    def _invoke(self, arguments: Mapping[str, Any]) -> Coroutine[Any, Any, Any]:
        return self._method(**arguments) if self.signature.is_async else self._in_thread(arguments)

    async def _in_thread(self, arguments: Mapping[str, Any]) -> Any:
        """Run a sync `run_remote`. A thread can't be cancelled: it takes one of the places until it has ended."""
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(self._threads, context.run, self._guarded, arguments)

    def _guarded(self, arguments: Mapping[str, Any]) -> Any:
        try:
            return self._method(**arguments)
        except StopIteration as error:  # which no future can hold
            raise RuntimeError("run_remote raised StopIteration") from error

    def close(self) -> None:
        """Let the threads end. One that runs is left to itself."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def stream(self, arguments: Mapping[str, Any]) -> AsyncGenerator[Any, None]:
        """Begin a streaming `run_remote`. Its items are not encoded yet; close it, whatever happens."""
        items: AsyncGenerator[Any, None] = self._method(**arguments)
        return items

    async def converse(self, websocket: WebSocketProtocol) -> None:
        """Run a `run_remote` that takes a WebSocket. Raises what it raises, but for the client's leaving."""
        with suppress(WebSocketClosedError):
            await self._method(websocket)

    async def converse_locally(self, websocket: WebSocketProtocol) -> None:
        """Run it as a request of its own, under a deadline."""
        await self.enter_for_the_loop()
        scope = scope_or_new(LOCAL_DEADLINE).of_a_call()
        token = current.set(scope)
        try:
            async with self.slots.here():
                with Timeout(max(0.0, scope.remaining)):
                    await self.converse(websocket)
        finally:
            current.reset(token)


async def _life(instance: AbstractAsyncContextManager[Any]) -> AsyncGenerator[None, None]:
    async with instance:
        yield


async def _begin(life: AsyncGenerator[None, None]) -> None:
    await anext(life)


class LocalTarget:
    """Calls an instance in this process, as many at once as its `predict_concurrency` allows."""

    def __init__(self, callee: Callee, *, hosted: bool = True) -> None:
        """Call a `callee` that a host has entered, or else enter it with the first call."""
        self._callee = callee
        self._hosted = hosted

    async def call(self, arguments: bytes, scope: Scope, attempt: int) -> Buffer:  # noqa: ARG002 - Target's
        decoded = self._callee.codec.decode_arguments(arguments)
        if not self._hosted:
            await self._callee.enter_for_the_loop()
        async with self._callee.slots.here():
            token = current.set(scope.of_a_call())
            try:
                return await self._callee.call(decoded)
            finally:
                current.reset(token)

    async def stream(self, arguments: bytes, scope: Scope, attempt: int) -> AsyncGenerator[tuple[Buffer], None]:  # noqa: ARG002 - Target's
        scope = scope.of_a_call()
        encode = self._callee.codec.encode_result
        decoded = self._callee.codec.decode_arguments(arguments)
        if not self._hosted:
            await self._callee.enter_for_the_loop()
        async with self._callee.slots.here(), aclosing(self._callee.stream(decoded)) as items:
            while True:
                # Set anew for each step: between two of them the reader runs, in the same context.
                token = current.set(scope)
                try:
                    item = await anext(items)
                except StopAsyncIteration:
                    return
                finally:
                    current.reset(token)
                yield (encode(item),)


class LocalRun:
    """What `run_local` sets up: one instance a Chainlet, each dependency a stub on it."""

    def __init__(self, context: DeploymentContext) -> None:
        self._context = context
        self._callees: dict[type[ChainletBase], Callee] = {}

    def adopt(self, instance: ChainletBase) -> None:
        """Put a new instance's `run_remote` behind the codec and the policy of a remote one."""
        cls = type(instance)
        if cls not in self._callees:  # the entrypoint: a dependency is checked with whom it belongs to
            Chain.of(cls)
        callee = self._callees[cls] = Callee(cls, instance)
        local = callee.converse_locally if callee.signature.websocket else self._stub(callee, RPCOptions()).run_remote
        setattr(instance, METHOD, local)

    def replacement(self, dependency: Dependency | ContextDependency) -> Any:
        """Give what stands for a marker: the context, or a stub on the one instance of the Chainlet."""
        if isinstance(dependency, ContextDependency):
            return self._context
        if dependency.chainlet not in self._callees:
            dependency.chainlet()
        return self._stub(self._callees[dependency.chainlet], dependency.options)

    def _stub(self, callee: Callee, options: RPCOptions) -> Stub:
        return Stub(callee.signature, LocalTarget(callee, hosted=False), options, LOCAL_DEADLINE)


@contextmanager
def run_local(
    secrets: Mapping[str, str] | None = None,
    data_dir: Path | None = None,
    chainlet_to_service: Mapping[str, DeployedServiceDescriptor] | None = None,
) -> Iterator[None]:
    """Run a Chain in this process: inside the block, ``Entrypoint()`` is built with its dependencies.

    Types, defaults, retries and timeouts are those of a remote call. A dependency passed as a keyword argument, a fake
    say, is used as it is. Raises InvalidChainError, when a Chainlet is built, for mistakes in the Chain.

    Example::

        with chains.run_local():
            print(asyncio.run(HelloAll().run_remote(["Ada"])))
    """
    context = DeploymentContext(secrets=secrets or {}, data_dir=data_dir, chainlet_to_service=chainlet_to_service or {})
    token = injecting.set(LocalRun(context))
    try:
        yield
    finally:
        injecting.reset(token)
