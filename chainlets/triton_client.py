"""One model on a Triton server: found, asked once or for a stream, cancelled, tried again while it is away.

All of it goes through `tritonclient.grpc.aio`, over one connection, which any number of requests share.
"""

import asyncio
import logging
import math
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import (
    AbstractContextManager,
    AsyncExitStack,
    aclosing,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from types import TracebackType
from typing import Any, Self

import chains_stream as chains
from chainlets.triton_check import Model
from chainlets.triton_config import TritonConfig, read
from chainlets.triton_errors import INSTALL, TritonRefusedError, TritonUnavailableError, error_of
from chainlets.triton_memory import Region, SharedMemory
from chainlets.triton_tensors import WIDTHS, Array, Tensor, from_wire, to_wire

MAX_MESSAGE = 2**31 - 1  # bytes; gRPC's own limit for a message
BACKOFF_CAP = 5.0  # seconds
POLL_SECONDS = 0.2  # between looks at a server that is not ready
SAY_SECONDS = 10.0  # between lines in the log that say so
HEALTH_SECONDS = 2.0

Outputs = dict[str, Array]

log = logging.getLogger(__name__)


class Triton:
    """A connection to the server of a `TritonConfig`, and the model on it."""

    def __init__(self, config: TritonConfig) -> None:
        self.config = config
        self.model: Model
        self._grpc, self._failures = _tritonclient()
        self._headers = config.metadata()
        self._stack = AsyncExitStack()
        self._memory: SharedMemory | None = None
        self._places = asyncio.Semaphore(config.max_in_flight)

    async def __aenter__(self) -> Self:
        """Connect, and wait until the server and the model are ready. Raises TritonError, ChainsUsageError."""
        self._client = await self._stack.enter_async_context(self._connected())
        try:
            self.model = await self._found()
            if self.config.shared_memory_bytes is not None and self.config.on_this_host:
                self._memory = SharedMemory(self._client, self._headers)
                self._stack.push_async_callback(self._memory.close)
                await self._memory.start(self.config.shown)
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def is_ready(self, timeout: float = HEALTH_SECONDS) -> bool:  # noqa: ASYNC109 - gRPC's own, of each question
        """Tell whether the server and the model can serve."""
        try:
            return await self._is_ready(timeout)
        except chains.ChainsRuntimeError:
            return False

    async def infer(self, inputs: Mapping[str, Array]) -> Outputs:
        """Ask once.

        Raises InvalidArgumentError, CallTimeoutError, DeadlineExceededError, OverloadedError, TritonError.
        """
        if self.model.decoupled:
            raise chains.ChainsUsageError(f"{self.config.shown} is decoupled: it streams; use infer_stream")
        async with self._places:
            attempt = 1
            while True:
                try:
                    return await self._infer(inputs)
                except TritonUnavailableError as error:
                    await self._back_off(attempt, error)
                attempt += 1

    async def stream(self, inputs: Mapping[str, Array]) -> AsyncGenerator[Outputs, None]:
        """Ask for a stream of outputs. Closing the generator, or cancelling whoever waits for it, cancels in Triton.

        Raises what `infer` does, and StreamInterruptedError if the server goes away after some have come.
        """
        async with self._places:
            attempt, come = 1, 0
            while True:
                try:
                    async with aclosing(self._stream(inputs)) as outputs:
                        async for output in outputs:
                            come += 1
                            yield output
                        return
                except TritonUnavailableError as error:
                    if come:
                        raise chains.StreamInterruptedError(error.message, chunks=come) from error
                    await self._back_off(attempt, error)
                attempt += 1

    async def _infer(self, inputs: Mapping[str, Array]) -> Outputs:
        with self._errors() as seconds, self._regions() as held:
            given = [await self._input(name, array, held) for name, array in inputs.items()]
            wanted, places = await self._asked(inputs, held)
            result = await self._client.infer(
                self.config.model,
                given,
                self.config.model_version,
                outputs=wanted,
                request_id=_request_id(),
                client_timeout=seconds,
                headers=self._headers,
            )
            return self._outputs(result, places)

    async def _stream(self, inputs: Mapping[str, Array]) -> AsyncGenerator[Outputs, None]:
        with self._errors() as seconds, self._regions() as held:
            request = {
                "model_name": self.config.model,
                "model_version": self.config.model_version,
                "inputs": [await self._input(name, array, held) for name, array in inputs.items()],
                "request_id": _request_id(),
            }
            responses = self._client.stream_infer(_once(request), stream_timeout=seconds, headers=self._headers)
            try:
                async for result, error in responses:
                    if error is not None:
                        raise await self._kind_of(error)
                    yield self._outputs(result, {})
            finally:
                responses.cancel()  # or the model would go on; after the end it does nothing

    async def _kind_of(self, error: Any) -> chains.ChainsRuntimeError:
        """Give the error for what a stream says, which is text alone: whether the model is ready has to be asked."""
        status = "" if await self.is_ready() else "UNAVAILABLE"
        return error_of(status, error.message() or "", self.config.shown)

    async def _input(self, name: str, array: Array, held: list[Region] | None) -> Any:
        """Give an input as tritonclient takes it: with its data, or where they lie in shared memory."""
        datatype = self.model.inputs[name].datatype
        wire = to_wire(array, datatype)
        tensor = self._grpc.InferInput(name, list(wire.shape), datatype)
        region = await self._leased(wire.nbytes, datatype, held)
        if region is None:
            return tensor.set_data_from_numpy(wire)
        region.write(wire)
        return tensor.set_shared_memory(region.name, wire.nbytes)

    async def _asked(
        self, inputs: Mapping[str, Array], held: list[Region] | None
    ) -> tuple[list[Any] | None, dict[str, Region]]:
        """Give the outputs as tritonclient takes them, None for all; and the regions that large ones come in."""
        places: dict[str, Region] = {}
        wanted = []
        for name, output in self.model.outputs.items() if held is not None else ():
            wanted.append(requested := self._grpc.InferRequestedOutput(name))
            size = self._size_of(output, inputs) or 0
            region = await self._leased(size, output.datatype, held)
            if region is not None:
                places[name] = region
                requested.set_shared_memory(region.name, size)
        return (wanted if places else None), places

    def _outputs(self, result: Any, places: Mapping[str, Region]) -> Outputs:
        found = {}
        for output in result.get_response().outputs:
            name, datatype, shape = output.name, output.datatype, tuple(output.shape)
            if name in places:
                size = math.prod(shape) * WIDTHS[datatype]
                found[name] = places[name].read(size, datatype, shape)
            else:
                found[name] = from_wire(result.as_numpy(name), datatype)
        return found

    def _size_of(self, output: Tensor, inputs: Mapping[str, Array]) -> int | None:
        """Give the bytes of an output, None where they can't be told before it is there."""
        if output.datatype == "BYTES" or output.dims is None:
            return None
        if output.name in self.config.shared_memory_outputs:
            return self.config.shared_memory_outputs[output.name]
        dims = list(output.dims)
        if self.model.batched and inputs:
            dims[0] = next(iter(inputs.values())).shape[0]
        return None if -1 in dims else math.prod(dims) * WIDTHS[output.datatype]

    async def _leased(self, size: int, datatype: str, held: list[Region] | None) -> Region | None:
        """Give a region for a tensor that is large enough to be worth one, and put it to those of the request."""
        threshold = self.config.shared_memory_bytes
        if held is None or self._memory is None or threshold is None or size < threshold or datatype == "BYTES":
            return None
        region = await self._memory.lease(size)
        if region is not None:
            held.append(region)
        return region

    def _regions(self) -> AbstractContextManager[list[Region] | None]:
        return self._memory.held() if self._memory is not None and self._memory.usable else nullcontext()

    @contextmanager
    def _errors(self) -> Iterator[float]:
        """Give the seconds that a request may take; and make of what tritonclient raises an error of ours."""
        left = _left()
        seconds = self.config.timeout if left is None else min(left, self.config.timeout)
        if seconds <= 0:
            raise chains.DeadlineExceededError(f"{self.config.shown}: the deadline of the request passed")
        try:
            yield seconds
        except self._failures as error:
            status, said = _status(error)
            if status == "DEADLINE_EXCEEDED" and seconds == left:
                message = f"{self.config.shown}: the deadline of the request passed"
                raise chains.DeadlineExceededError(message) from error
            if "shared memory region" in said and status != "UNAVAILABLE":
                status = "UNAVAILABLE"  # it has restarted, and knows ours no more: the next try has new ones
            raise error_of(status, said, self.config.shown) from error

    async def _back_off(self, attempt: int, error: TritonUnavailableError) -> None:
        """Wait before the next try, or raise `error` if there is to be none."""
        if self._memory is not None:
            self._memory.forget()
        delay = min(BACKOFF_CAP, self.config.backoff * 2 ** (attempt - 1)) * random.uniform(0.5, 1)  # noqa: S311 - spreads load, no secret
        left = _left()
        if attempt >= self.config.retries or (left is not None and delay >= left):
            raise error
        log.info("%s; try %d of %d in %.1f s", error, attempt + 1, self.config.retries, delay)
        await asyncio.sleep(delay)

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Any]:
        config = self.config
        options: list[tuple[str, int]] = [
            ("grpc.max_send_message_length", MAX_MESSAGE),
            ("grpc.max_receive_message_length", MAX_MESSAGE),
            # gRPC waits up to two minutes before it connects again; our own tries are spread already.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
        ]
        if config.keepalive is not None:
            options.append(("grpc.keepalive_time_ms", int(config.keepalive * 1000)))
            options.append(("grpc.http2.max_pings_without_data", 0))
        for path in (config.root_certificates, config.private_key, config.certificate_chain):
            if path is not None:
                read(path)  # or gRPC's own words for it would be none of a file
        client = self._grpc.InferenceServerClient(
            config.target,
            ssl=config.tls,
            root_certificates=config.root_certificates,
            private_key=config.private_key,
            certificate_chain=config.certificate_chain,
            channel_args=options,
        )
        try:
            yield client
        finally:
            await client.close()

    async def _is_ready(self, seconds: float) -> bool:
        bounds = {"headers": self._headers, "client_timeout": seconds}
        with self._errors():
            if not await self._client.is_server_ready(**bounds):
                return False
            name, version = self.config.model, self.config.model_version
            return bool(await self._client.is_model_ready(name, version, **bounds))

    async def _found(self) -> Model:
        """Wait for the server and the model, and read what Triton says of the model."""
        began = said = time.monotonic()
        reason = ""
        while True:
            try:
                if await self._is_ready(self.config.start_timeout):
                    return await self._described()
                reason = await self._why_not()
            except (TritonUnavailableError, chains.CallTimeoutError) as error:
                reason = error.message
            waited = time.monotonic() - began
            if waited >= self.config.start_timeout:
                raise TritonUnavailableError(f"{reason} (waited {self.config.start_timeout:g} s)", reason="UNAVAILABLE")
            if time.monotonic() - said >= SAY_SECONDS or said == began:
                said = time.monotonic()
                log.info("waiting for Triton: %s", reason)
            await asyncio.sleep(POLL_SECONDS)

    async def _why_not(self) -> str:
        """Say why the model is not ready. Raises TritonRefusedError if the server does not know it."""
        config = self.config
        with self._errors() as seconds:
            known = await self._client.get_model_repository_index(headers=self._headers, client_timeout=seconds)
        mine = [model for model in known.models if model.name == config.model]
        if not mine and known.models:
            names = ", ".join(f"`{name}`" for name in sorted({model.name for model in known.models}))
            raise TritonRefusedError(f"there is no {config.shown}; it has {names}", reason="NOT_FOUND")
        reasons = [f"{model.state} {model.reason}".strip() for model in mine if model.state != "READY"]
        return f"{config.shown} is not ready: {'; '.join(filter(None, reasons)) or 'it is not loaded'}"

    async def _described(self) -> Model:
        name, version = self.config.model, self.config.model_version
        with self._errors() as seconds:
            bounds = {"headers": self._headers, "client_timeout": seconds}
            metadata = await self._client.get_model_metadata(name, version, **bounds)
            config = (await self._client.get_model_config(name, version, **bounds)).config
        optional = {one.name for one in config.input if one.optional}
        return Model(
            shown=self.config.shown,
            inputs={one.name: _tensor(one, optional=one.name in optional) for one in metadata.inputs},
            outputs={one.name: _tensor(one) for one in metadata.outputs},
            batched=config.max_batch_size > 0,
            decoupled=config.model_transaction_policy.decoupled,
        )


def _tritonclient() -> tuple[Any, tuple[type[Exception], ...]]:
    """Give tritonclient's module for asyncio, and what it raises. Raises ChainsUsageError."""
    try:
        import grpc
        from tritonclient.grpc import aio
        from tritonclient.utils import InferenceServerException
    except ImportError as error:
        raise chains.ChainsUsageError(f"Chainlets on Triton need tritonclient: {INSTALL}") from error
    return aio, (InferenceServerException, grpc.RpcError)


def _status(error: Any) -> tuple[str, str]:
    """Give gRPC's word for the kind of an error, and what the server said."""
    if hasattr(error, "debug_details"):  # tritonclient's
        return (error.status() or "").rpartition(".")[2], error.message() or ""
    return error.code().name, error.details() or ""


def _tensor(told: Any, *, optional: bool = False) -> Tensor:
    return Tensor(told.name, told.datatype, tuple(told.shape), optional)


async def _once(request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    yield request


def _left() -> float | None:
    """Seconds until the deadline of the request that is served; None if none is."""
    try:
        return chains.current_request().deadline - time.time()
    except chains.ChainsUsageError:
        return None


def _request_id() -> str:
    try:
        return chains.current_request().id
    except chains.ChainsUsageError:
        return ""
