"""Tensors of Triton's types, and the Python values that stand for them.

Arrays of numpy travel as they are. What numpy has no type for: BF16 is float32 on our side, rounded to the nearest on
the way in and exact on the way out; BYTES are text in UTF-8, or bytes. Plain values and lists stand for small tensors:
one value fits a tensor of one element, whatever its rank.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

import chains_stream as chains
from chainlets.triton_errors import INSTALL

try:
    import numpy as np
except ImportError as missing:
    raise chains.ChainsUsageError(f"Triton's tensors are numpy's: {INSTALL}") from missing

Array = np.ndarray[Any, Any]

NUMPY: Mapping[str, Any] = {
    "BOOL": np.bool_, "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64,
    "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64,
    "FP16": np.float16, "FP32": np.float32, "FP64": np.float64, "BF16": np.float32, "BYTES": np.object_,
}  # fmt: skip
"""What the array of a tensor's type holds."""

WIDTHS = {name: 2 if name == "BF16" else np.dtype(held).itemsize for name, held in NUMPY.items() if name != "BYTES"}
"""How many bytes one element of a tensor of numbers has."""


class Tensor(msgspec.Struct, frozen=True):
    """An input or an output of a model: its name, its type, and its dimensions, of which -1 may have any size.

    `optional` says of an input that requests may lack it. In an annotation, as
    ``Annotated[np.ndarray, Tensor("INPUT__0", "BF16")]``, it tells what the Python type leaves open: no name is the
    argument's own, no type is any that fits, and no dimensions are any.
    """

    name: str = ""
    datatype: str = ""
    dims: tuple[int, ...] | None = None
    optional: bool = False

    def __str__(self) -> str:
        dims = "" if self.dims is None else f"[{', '.join(map(str, self.dims))}]"
        return " ".join(filter(None, (self.datatype, dims))) or "anything"


def encode(value: Any, tensor: Tensor, *, batched: bool) -> tuple[Array, bool]:
    """Turn a value into an array of a tensor's type and rank; and tell whether it is one item of a batch.

    Where the first dimension is that of a batch (`batched`), a value without it is one item: it gets that dimension.
    Raises InvalidArgumentError.
    """
    array = _array(value, tensor)
    rank = array.ndim if tensor.dims is None else len(tensor.dims)
    is_array = isinstance(value, np.ndarray) and value.ndim > 0
    if array.ndim == rank and (is_array or not batched):
        return array, False
    if batched and is_array and array.ndim == rank - 1:
        return array[np.newaxis], True
    if is_array or array.ndim > rank - batched:
        raise _refused(tensor, f"a tensor of {rank} dimensions is asked for, and this has {array.ndim}")
    return array.reshape((1,) * (rank - array.ndim) + array.shape), batched


def _array(value: Any, tensor: Tensor) -> Array:
    wanted = np.dtype(NUMPY[tensor.datatype])
    try:
        if tensor.datatype == "BYTES":
            return _text(value)
        if isinstance(value, np.ndarray | np.generic):
            return _cast(np.asarray(value), wanted, tensor)
        return _cast(np.asarray(value), wanted, tensor, casting="same_kind", exact=True)
    except (ValueError, TypeError, OverflowError) as error:
        raise _refused(tensor, str(error)) from None


def _cast(
    array: Array, wanted: "np.dtype[Any]", tensor: Tensor, *, casting: Any = "safe", exact: bool = False
) -> Array:
    """Convert without loss; `exact` looks at the values themselves, as Python's numbers have no width."""
    if array.dtype == wanted:
        return array
    if tensor.datatype == "BF16" and array.dtype.kind == "f":
        casting = "same_kind"  # to be rounded is what BF16 is about
    if exact and array.size == 0:
        return array.astype(wanted)
    if exact and array.dtype.kind in "iu" and wanted.kind in "iuf":
        made = array.astype(wanted)
        if not (made == array).all():
            raise OverflowError(f"{array.reshape(-1)[(made != array).reshape(-1)][0]} is out of its range")
        return made
    if not np.can_cast(array.dtype, wanted, casting):
        raise TypeError(f"{tensor.datatype} is asked for, and {array.dtype} can't be made that without loss")
    return array.astype(wanted)


def _text(value: Any) -> Array:
    """Make an array of `bytes` from text or bytes, single or in lists or arrays."""
    array = np.asarray(value) if isinstance(value, np.ndarray) else np.array(value, dtype=np.object_)
    found = np.empty(array.shape, dtype=np.object_)
    flat = found.reshape(-1)
    for index, item in enumerate(array.reshape(-1).tolist()):
        if not isinstance(item, str | bytes):
            raise TypeError(f"text or bytes are asked for, and not {type(item).__name__}")
        flat[index] = item.encode() if isinstance(item, str) else item
    return found


def _refused(tensor: Tensor, reason: str) -> chains.InvalidArgumentError:
    return chains.InvalidArgumentError(f"`{tensor.name}`: {reason}", path=f"$.{tensor.name}")


def to_wire(array: Array, datatype: str) -> Array:
    """Give the array as tritonclient takes it: C order, this machine's bytes, BF16 as a type of its own."""
    if datatype == "BF16":
        import ml_dtypes  # it comes with tritonclient

        array = array.astype(ml_dtypes.bfloat16)
    return np.ascontiguousarray(array).reshape(array.shape)


def from_wire(array: Array, datatype: str) -> Array:
    """Give what came for an output as the array that it is in Python."""
    return array.astype(np.float32) if datatype == "BF16" else array


def from_bytes(data: bytes, datatype: str, shape: tuple[int, ...]) -> Array:
    """Read a tensor of numbers from its bytes."""
    if datatype == "BF16":  # the upper half of a float32
        wide = np.frombuffer(data, np.uint16).astype(np.uint32) << 16
        return wide.view(np.float32).reshape(shape)
    return np.frombuffer(data, NUMPY[datatype]).reshape(shape)
