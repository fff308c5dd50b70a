"""Models of any kind: their types, their batches, their streams, and Chainlets that don't fit them."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypedDict

import numpy as np
import pytest
from numpy.typing import NDArray

import chains_stream as chains
from chainlets.triton_engine import Tensor, TritonConfig, TritonModel
from tests.triton.chainlets import Count, Number, Scale, Wait
from tests.triton.server import URL, Notes

pytestmark = pytest.mark.usefixtures("triton")

ARRAYS = {
    "BOOL": np.array([[True, False], [False, True]]),
    "UINT8": np.array([[0, 255]], np.uint8),
    "UINT16": np.array([[0, 65_535]], np.uint16),
    "UINT32": np.array([[0, 2**32 - 1]], np.uint32),
    "UINT64": np.array([[0, 2**64 - 1]], np.uint64),
    "INT8": np.array([[-128, 127]], np.int8),
    "INT16": np.array([[-(2**15), 2**15 - 1]], np.int16),
    "INT32": np.array([[-(2**31), 2**31 - 1]], np.int32),
    "INT64": np.array([[-(2**63), 2**63 - 1]], np.int64),
    "FP16": np.array([[0.1, -65_504]], np.float16),
    "FP32": np.array([[0.1, np.inf], [-3.4e38, np.pi]], np.float32),
    "FP64": np.array([[0.1, -1.7e308]], np.float64),
    "BF16": np.array([[1.5, -2.0], [2.0**127, 0.0]], np.float32),
    "STRING": np.array([[b"a\0", b"", "schön".encode(), b"\xff"]], np.object_),
}


class Identity(TritonModel):
    """Gives back one tensor of any type, as a list."""

    config = TritonConfig(url=URL, model="identity")
    inputs: ClassVar = {}  # it is given whatever a test likes
    outputs: ClassVar = {}

    async def run_remote(self, name: str) -> list[str]:
        return list(await self.infer({name: ARRAYS[name]}))


@pytest.mark.parametrize("name", ARRAYS)
async def test_a_tensor_of_every_type_comes_back_as_it_went(name: str) -> None:
    async with Identity() as model:
        found = await model.infer({name: ARRAYS[name]})
    array = found.pop(f"{name}_OUT")
    assert not found
    assert array.dtype == ARRAYS[name].dtype
    np.testing.assert_array_equal(array, ARRAYS[name])


async def test_a_bf16_is_the_nearest_to_a_float() -> None:
    given = np.array([[1 + 2**-8, 1 + 3 * 2**-8, 1 / 3, np.nan]], np.float32)
    async with Identity() as model:
        found = (await model.infer({"BF16": given}))["BF16_OUT"]
    # Eight bits: what lies in the middle between two goes to the even one.
    np.testing.assert_array_equal(found, np.array([[1, 1 + 2**-6, 0.333984375, np.nan]], np.float32))


async def test_arrays_in_any_order_and_of_any_size() -> None:
    strided = np.arange(24, dtype=np.float32).reshape(4, 6)[::2, ::3]
    async with Identity() as model:
        for given in (strided, strided.T, strided.astype(">f4"), np.empty((0, 3), np.float32)):
            found = (await model.infer({"FP32": given}))["FP32_OUT"]
            np.testing.assert_array_equal(found, given)


async def test_plain_values_stand_for_tensors() -> None:
    async with Identity() as model:
        given = {
            "INT8": 5,
            "FP16": [1, 2.5],
            "STRING": ["a", b"b"],
            "BOOL": [[True], [False]],
            "UINT8": [],
            "FP64": None,
        }
        found = await model.infer(given)
    assert {name: array.tolist() for name, array in found.items()} == {
        "INT8_OUT": [[5]],
        "FP16_OUT": [[1.0, 2.5]],
        "STRING_OUT": [[b"a", b"b"]],
        "BOOL_OUT": [[True], [False]],
        "UINT8_OUT": [[]],
    }


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"INT8": 300}, "`INT8`: 300 is out of its range"),
        ({"UINT8": [1, -1]}, "`UINT8`: -1 is out of its range"),
        ({"INT32": 1.5}, "`INT32`: INT32 is asked for, and float64 can't be made that without loss"),
        ({"FP32": np.zeros((1, 1))}, "`FP32`: FP32 is asked for, and float64"),
        ({"STRING": 5}, "`STRING`: text or bytes are asked for, and not int"),
        ({"FP32": "x"}, "`FP32`: "),
        ({"FP32": np.zeros((1, 1, 1), np.float32)}, "`FP32`: a tensor of 2 dimensions is asked for, and this has 3"),
        ({"INT8": [[[1]]]}, "`INT8`: a tensor of 2 dimensions"),
        ({"FP32": [[1, 2], [3]]}, "`FP32`: "),
        ({"X": 1}, "has no input `X`; it has `BOOL`, "),
    ],
)
async def test_what_does_not_fit_is_refused_before_it_is_sent(given: dict[str, Any], said: str) -> None:
    async with Identity() as model:
        with pytest.raises(chains.InvalidArgumentError, match=said):
            await model.infer(given)


async def test_what_triton_refuses_is_an_invalid_argument() -> None:
    async with Scale() as model:
        with pytest.raises(chains.InvalidArgumentError, match=r"batched.*unexpected shape for input 'VALUES'"):
            await model.infer({"VALUES": np.zeros(4, np.float32), "FACTOR": 1})


async def test_a_chain_sends_arguments_and_gets_a_struct() -> None:
    async with chains.run_chain(Scale) as chain:
        found = await chain.run_remote(np.array([1, 2, 3], np.float32))
        assert found.scaled.tolist() == [2, 4, 6]
        assert found.scaled.shape == (3,)
        found = await chain.run_remote(np.array([1, 2, 3], np.float32), factor=0.5)
        assert found.scaled.tolist() == [0.5, 1, 1.5]


async def test_run_local_connects_with_the_first_call() -> None:
    with chains.run_local():
        found = await Scale().run_remote(np.array([1, 2, 3], np.float32))
    assert found.scaled.tolist() == [2, 4, 6]


async def test_triton_batches_the_requests_of_many_callers() -> None:
    async with chains.run_chain(Scale) as chain:
        calls = (chain.run_remote(np.full(3, number, np.float32)) for number in range(200))
        found = await asyncio.gather(*calls)
    assert [each.scaled.tolist() for each in found] == [[2 * number] * 3 for number in range(200)]
    assert max(each.requests for each in found) > 1


async def test_a_caller_may_bring_a_batch() -> None:
    async with Scale() as model:
        found = await model.infer({"VALUES": np.arange(6, dtype=np.float32).reshape(2, 3), "FACTOR": 3})
        assert found["SCALED"].tolist() == [[0, 3, 6], [9, 12, 15]]
        assert found["REQUESTS"].shape == (2, 1)


async def test_a_stream_comes_in_order_and_ends() -> None:
    async with chains.run_chain(Count) as chain:
        found = [number async for number in chain.run_remote(100, start=5)]
        assert found == [Number(number, number * number) for number in range(5, 105)]
        assert [number async for number in chain.run_remote(0)] == []
        streams = await asyncio.gather(*(_collected(chain.run_remote(20, start)) for start in range(64)))
    assert streams == [[Number(number, number**2) for number in range(start, start + 20)] for start in range(64)]


async def _collected(stream: AsyncIterator[Number]) -> list[Number]:
    return [number async for number in stream]


class Pair(TypedDict):
    SCALED: list[float]
    REQUESTS: list[int]


@dataclass
class Only:
    SCALED: NDArray[np.float32]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Pair, {"SCALED": [2.0, 4.0, 6.0], "REQUESTS": [1]}),
        (dict[str, list[float]], {"SCALED": [2.0, 4.0, 6.0], "REQUESTS": [1.0]}),
        (dict[str, Any], {"SCALED": [2.0, 4.0, 6.0], "REQUESTS": [1]}),
    ],
)
async def test_outputs_as_other_types(kind: Any, expected: Any) -> None:
    async with Scale() as model:
        values = np.array([1, 2, 3], np.float32)
        assert await model.predict(kind, values=values, factor=2) == expected
        assert (await model.predict(Only, values=values, factor=2)).SCALED.tolist() == [2, 4, 6]
        with pytest.raises(chains.InvalidResultError, match=r"outputs \(SCALED float32\[3\], REQUESTS int32\[1\]\)"):
            await model.predict(str, values=values, factor=2)


async def test_requests_carry_their_headers(key: str) -> None:
    class Named(Wait):
        config = TritonConfig(url=URL, model="waiting", token="s3cret", headers={"X-Team": "blue"})  # type: ignore[arg-type] # pydantic makes it a secret

    async with Named() as model:
        assert await model.predict(str, key=key, seconds=0) == key
    told = Notes(key).lines[0]
    assert "Bearer s3cret" in told
    assert "blue" in told
    assert "s3cret" not in repr(Named.config)


# --- what does not fit the model


class Wrong(TritonModel):
    """Differs from its model in all that it can."""

    config = TritonConfig(url=URL, model="counting")

    async def run_remote(self, count: Annotated[float, Tensor("COUNT:0")], begin: int = 0) -> str:
        return await self.predict(str, count=count, begin=begin)


class WrongOutputs(TritonModel):
    config = TritonConfig(url=URL, model="batched")

    async def run_remote(
        self,
        VALUES: np.ndarray[tuple[int, int, int], np.dtype[np.float64]],  # noqa: N803 - the model's name
        FACTOR: list[list[float]] | None = None,  # noqa: N803
    ) -> AsyncIterator[Pair]:
        async for pair in self.predict_stream(Pair, VALUES=VALUES, FACTOR=FACTOR):
            yield pair


class WrongTensors(TritonModel):
    config = TritonConfig(url=URL, model="doubling")
    inputs: ClassVar = {"x": Tensor(dims=(512, 1024)), "z": Tensor()}
    outputs: ClassVar = {"y": Tensor(datatype="FP16")}

    async def run_remote(self, text: str) -> str:
        return text


def faults(cls: type[TritonModel]) -> list[str]:
    expected = {
        "Wrong": [
            "the input `COUNT:0` is float here, and INT32 in the model",
            "the model has no input `begin`; it has `COUNT:0`, `START:0`",
            (
                "the result is one value, str, and the model has 2 outputs, `NUMBER:0`, `SQUARE:0`: declare a Struct "
                "that has those you want as fields"
            ),
            "the model is decoupled, that is, it streams: make `run_remote` yield, and annotate `AsyncIterator[…]`",
        ],
        "WrongOutputs": [
            (
                "the input `VALUES` is numpy.ndarray[tuple[int, int, int], numpy.dtype[numpy.float64]] here, and FP32 "
                "in the model"
            ),
            "the input `VALUES` has 3 dimensions here, and 2 in the model, [-1, 3]",
            "the input `FACTOR` may be left out here, and the model asks for it always",
            "`run_remote` streams, and the model is not decoupled: it answers once",
        ],
        "WrongTensors": [
            "the input `x` has the dimensions [512, 1024] here, and [1024, 1024] in the model",
            "the model has no input `z`; it has `x`",
            "the output `y` is FP16 here, and FP32 in the model",
        ],
    }
    return expected[cls.__name__]


@pytest.mark.parametrize("cls", [Wrong, WrongOutputs, WrongTensors])
async def test_all_that_does_not_fit_is_said_at_once(cls: type[TritonModel]) -> None:
    with pytest.raises(chains.ChainsUsageError) as caught:
        async with chains.run_chain(cls):
            pass
    first, *rest = str(caught.value).splitlines()
    assert f"{cls.__name__} does not fit the model `{cls.config.model}` at {URL}:" in first
    assert [line.strip() for line in rest] == faults(cls)


async def test_a_model_that_is_not_there_is_named_with_those_that_are() -> None:
    class Nowhere(Scale):
        config = TritonConfig(url=URL, model="batches")

    with pytest.raises(chains.ChainsError, match=r"no model `batches` at .*; it has `batched`, `counting`, "):
        async with Nowhere():
            pass


async def test_nothing_is_asked_before_it_is_entered() -> None:
    with pytest.raises(chains.ChainsUsageError, match="Scale is not connected"):
        await Scale().infer({"VALUES": [1, 2, 3]})


async def test_concurrency_is_what_triton_may_have() -> None:
    assert Scale.remote_config.compute.predict_concurrency == 256
    assert Count.remote_config.compute.predict_concurrency == 64

    class Few(Scale):
        remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=3))

    class Fewer(Few):
        pass

    assert Few.remote_config.compute.predict_concurrency == 3
    assert Fewer.remote_config.compute.predict_concurrency == 3
