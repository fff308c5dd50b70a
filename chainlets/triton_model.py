"""`TritonModel`: the base of a Chainlet whose work is done by a model on Triton."""

import abc
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from types import TracebackType
from typing import Any, ClassVar, Self, TypeVar

import chains_stream as chains
from chainlets.triton_check import Model, declaration_by, declaration_of, mismatches
from chainlets.triton_client import Triton
from chainlets.triton_config import TritonConfig
from chainlets.triton_errors import TritonMismatchError
from chainlets.triton_tensors import Array, Tensor, encode
from chainlets.triton_types import build

T = TypeVar("T")


class TritonModel(chains.ChainletBase, abc.ABC):
    """A Chainlet on a model of Triton. Derive a class, set `config`, and write `run_remote`::

        class Scores(msgspec.Struct):
            scores: NDArray[np.float32]

        class Classify(TritonModel):
            config = TritonConfig(url="grpc://localhost:8001", model="resnet")

            async def run_remote(self, image: NDArray[np.float32]) -> Scores:
                return await self.predict(Scores, image=image)

    At start it waits for the server and the model, and holds the arguments and the result of `run_remote` against the
    model's inputs and outputs: names, types, dimensions, and whether it streams. Whatever differs ends the start, all
    of it in one error. Where `run_remote` takes something else than the model, list the tensors themselves in `inputs`
    and `outputs`. A name that is none of Python's stands in an annotation,
    ``Annotated[NDArray[np.float32], Tensor("INPUT__0")]``, or is that of a field (``msgspec.field(name=…)``).

    Of a model that batches, give one item, without the dimension of the batch, and get one: Triton puts the requests
    of many callers together, if its configuration says `dynamic_batching`. Or give the batch itself.
    """

    config: ClassVar[TritonConfig] = TritonConfig()
    inputs: ClassVar[Mapping[str, Tensor] | None] = None
    outputs: ClassVar[Mapping[str, Tensor] | None] = None

    _connection: Triton | None = None
    _tensor_names: Mapping[str, str] = {}
    _concurrency_is_ours: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        compute = cls.remote_config.compute
        if "remote_config" in vars(cls):
            cls._concurrency_is_ours = "predict_concurrency" not in compute.model_fields_set
        if cls._concurrency_is_ours:
            # As many as may be at Triton at once: no more are taken, so that waiting stays with the broker.
            compute = compute.model_copy(update={"predict_concurrency": cls.config.max_in_flight})
            cls.remote_config = cls.remote_config.model_copy(update={"compute": compute})

    @abc.abstractmethod
    def run_remote(self, *args: Any, **kwargs: Any) -> Any:
        """What the Chainlet does: write it in the class that you derive."""

    async def predict(self, result: type[T], /, **inputs: Any) -> T:
        """Ask the model once, and give its outputs as a value of the type `result`.

        Args:
            result: a Struct, dataclass or TypedDict with the outputs that are wanted as fields; a dict of them all; or,
                of a model with one output, its own type: an array, a list, a plain value.
            inputs: arrays, lists or plain values, by the names of the model's inputs or of `run_remote`'s arguments;
                what is None is left out.

        Raises:
            InvalidArgumentError: an input does not fit the model, or the model says so.
            CallTimeoutError, DeadlineExceededError: there was no answer in time.
            OverloadedError: the model's queue is full.
            TritonError: the model failed, or can't be reached.
        """
        return build(result, await self.infer(self._by_tensor(inputs)))  # type: ignore[no-any-return] # of that type

    async def predict_stream(self, result: type[T], /, **inputs: Any) -> AsyncGenerator[T, None]:
        """Ask a model that streams, and yield each of its answers as `predict` gives one. Raises what that raises."""
        async with aclosing(self.infer_stream(self._by_tensor(inputs))) as answers:
            async for outputs in answers:
                yield build(result, outputs)

    async def infer(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        """Ask the model once, by the names of its inputs, and give its outputs as arrays. Raises what `predict` does.

        BYTES come as arrays of `bytes` objects, and BF16 as float32.
        """
        connection = self._connected()
        arrays, item = self._encoded(inputs)
        return _items(await connection.infer(arrays), item=item)

    async def infer_stream(self, inputs: Mapping[str, Any]) -> AsyncGenerator[dict[str, Array], None]:
        """Ask a model that streams, and yield the outputs of each of its answers. Raises what `predict` does.

        Close it, as ``async with aclosing(…)`` does, and Triton cancels the request; so it does if the task is.
        """
        arrays, item = self._encoded(inputs)
        async with aclosing(self._connected().stream(arrays)) as answers:
            async for outputs in answers:
                if outputs:  # the last one may only say that it is
                    yield _items(outputs, item=item)

    async def is_healthy(self) -> bool:
        """Ask Triton whether the server and the model are ready."""
        return self._connection is not None and await self._connection.is_ready()

    async def __aenter__(self) -> Self:
        """Wait for the model, and check it. Raises TritonMismatchError, TritonError, ChainsUsageError."""
        connection = await Triton(self.config).__aenter__()
        try:
            self.check(connection.model)
        except BaseException:
            await connection.__aexit__(None, None, None)
            raise
        self._connection = connection
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.__aexit__(kind, error, trace)

    def check(self, model: Model) -> None:
        """Raise TritonMismatchError if the Chainlet and the model don't fit."""
        if self.inputs is None and self.outputs is None:
            declaration = declaration_of(type(self))
        else:
            declaration = declaration_by(self.inputs or {}, self.outputs or {})
        faults = mismatches(declaration, model)
        if faults:
            lines = "".join(f"\n  {fault}" for fault in faults)
            raise TritonMismatchError(f"{type(self).__name__} does not fit the {model.shown}:{lines}")
        self._tensor_names = declaration.arguments

    @property
    def model(self) -> Model:
        """What Triton says of the model: its inputs and outputs, whether it batches, whether it streams."""
        return self._connected().model

    def _connected(self) -> Triton:
        if self._connection is None:
            name = type(self).__name__
            raise chains.ChainsUsageError(f"{name} is not connected: it is once a host, or `run_local`, has entered it")
        return self._connection

    def _by_tensor(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {self._tensor_names.get(name, name): value for name, value in inputs.items()}

    def _encoded(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Array], bool]:
        """Give the inputs as arrays, and whether they are one item of a batch."""
        model = self.model
        unknown = [name for name in inputs if name not in model.inputs]
        if unknown:
            names = ", ".join(f"`{name}`" for name in model.inputs)
            raise chains.InvalidArgumentError(f"{model.shown} has no input `{unknown[0]}`; it has {names}")
        given = {
            name: encode(value, model.inputs[name], batched=model.batched)
            for name, value in inputs.items()
            if value is not None
        }
        batch = next((array.shape[0] for array, item in given.values() if model.batched and not item), None)
        if batch is None:
            return {name: array for name, (array, _) in given.items()}, model.batched
        # One value beside a batch is that of each of its items.
        return {name: array.repeat(batch, axis=0) if item else array for name, (array, item) in given.items()}, False


def _items(outputs: dict[str, Array], *, item: bool) -> dict[str, Array]:
    """Take the dimension of the batch away again where there was none."""
    return {name: array[0] for name, array in outputs.items()} if item else outputs
