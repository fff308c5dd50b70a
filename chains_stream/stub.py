"""A typed call: what stands in for a Chainlet wherever another one calls it.

A `Stub` has the Chainlet's `run_remote`. It turns arguments into bytes and bytes into results (`Codec`), and bounds and
repeats the call (`policy`). Where the bytes go is a `Target`: the broker, a gateway, or an instance in this process.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, NoReturn, Protocol

from chains_stream import policy
from chains_stream.codec import Buffer, Codec, codec_of
from chains_stream.options import RPCOptions
from chains_stream.policy import Scope
from chains_stream.signature import Signature


class Target(Protocol):
    """Where the bytes of a call go. `arguments` and results are msgpack; `attempt` counts the tries from 1."""

    async def call(self, arguments: bytes, scope: Scope, attempt: int) -> Buffer: ...

    def stream(self, arguments: bytes, scope: Scope, attempt: int) -> AsyncGenerator[Sequence[Buffer], None]:
        """Yield the chunks that are there at once, one at least."""


class Stub:
    """Calls one Chainlet.

    Args:
        signature: of the Chainlet's `run_remote`.
        target: where calls go.
        options: retries, timeouts and the limit on calls in flight.
        deadline: seconds for a call that is not made while serving a request.
    """

    def __init__(self, signature: Signature, target: Target, options: RPCOptions, deadline: float) -> None:
        self._name = f"{signature.chainlet}.run_remote"
        self._codec: Codec = codec_of(signature)
        self._target = target
        self._options = options
        self._deadline = deadline
        self._limit = policy.Limit(options.concurrency_limit)
        self.run_remote: Any = self._stream if signature.streaming else self._call

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"`{name}` is not to be had of {self._name}: a Chainlet is called by `run_remote` alone")

    async def _call(self, *args: Any, **kwargs: Any) -> Any:
        scope = policy.scope_or_new(self._deadline)
        arguments = self._codec.encode_arguments(args, kwargs)

        async def one_try(attempt: int) -> Any:
            limit = self._limit.here()
            await limit.acquire()
            try:
                return self._codec.decode_result(await self._target.call(arguments, scope, attempt))
            finally:
                limit.release()

        return await policy.call(one_try, self._options, scope, self._name)

    async def _stream(self, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        scope = policy.scope_or_new(self._deadline)
        arguments = self._codec.encode_arguments(args, kwargs)

        async def one_try(attempt: int) -> AsyncGenerator[Sequence[Buffer], None]:
            async with self._limit.here(), aclosing(self._target.stream(arguments, scope, attempt)) as chunks:
                async for several in chunks:
                    yield several

        decode = self._codec.decode_result
        async with aclosing(policy.stream(one_try, self._options, scope, self._name)) as chunks:
            async for several in chunks:
                for chunk in several:
                    yield decode(chunk)
