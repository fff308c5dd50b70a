"""Values that msgspec does not know: pydantic models and numpy arrays, as hooks of its encoders and decoders.

A model travels by field name and keeps what its fields hold; in JSON it looks as pydantic itself would write it. An
array travels as a map of dtype, shape and bytes in C order; in JSON as Truss Chains' ``NumpyArrayField`` does.
"""

import base64
import binascii
import math
import re
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple, get_args, get_origin

import msgspec
import pydantic
import pydantic_core

_ARRAY_KINDS = "biufcmMSU"  # numpy's kinds of fixed-size plain data: no objects, no structured or void dtypes
_ABSTRACT_SCALARS = frozenset(
    {
        "generic",
        "number",
        "integer",
        "signedinteger",
        "unsignedinteger",
        "inexact",
        "floating",
        "complexfloating",
        "flexible",
        "character",
    }
)
_DTYPE = re.compile(r"[<>=|]?[A-Za-z]+[0-9]{0,9}(\[[0-9]{0,9}[A-Za-z]{1,2}\])?")  # float32, <f4, <M8[ns]


_MAX_DIMENSIONS = 64  # numpy 2's own


class ArraySpec(NamedTuple):
    """What an array annotation asks for: any of `scalars` (numpy scalar classes; none means any), and dimensions."""

    scalars: tuple[Any, ...] = ()
    ndim: int | None = None

    @property
    def dtype_names(self) -> list[str]:
        numpy = _numpy()
        return sorted(s.__name__ if s.__name__ in _ABSTRACT_SCALARS else numpy.dtype(s).name for s in self.scalars)


def is_model(kind: Any) -> bool:
    """Tell whether an annotation is a pydantic model."""
    return isinstance(kind, type) and issubclass(kind, pydantic.BaseModel)


def is_model_dataclass(kind: Any) -> bool:
    """Tell whether a dataclass is one of pydantic's, whose validation msgspec would not run."""
    return hasattr(kind, "__pydantic_validator__")


def is_array(kind: Any) -> bool:
    """Tell whether an annotation is ``np.ndarray``, bare or with its dtype."""
    numpy = _numpy()
    return numpy is not None and (get_origin(kind) or kind) is numpy.ndarray


def is_numpy(value: Any) -> bool:
    """Tell whether a value is an array, or a scalar, of numpy's."""
    numpy = _numpy()
    return numpy is not None and isinstance(value, numpy.ndarray | numpy.generic)


def array_spec(kind: Any) -> ArraySpec:
    """Read ``np.ndarray[shape, np.dtype[scalar]]``; raise ValueError for data that can't travel."""
    numpy = _numpy()
    args = get_args(kind)
    if not args:
        return ArraySpec()
    shape = get_args(args[0])
    ndim = None if not shape or shape[-1] is Ellipsis else len(shape)
    dtype = (get_args(args[1]) or (Any,))[0] if len(args) > 1 else Any
    scalars = tuple(s for s in (get_args(dtype) or (dtype,)) if isinstance(s, type) and issubclass(s, numpy.generic))
    for scalar in scalars:
        if scalar.__name__ not in _ABSTRACT_SCALARS and numpy.dtype(scalar).kind not in _ARRAY_KINDS:
            msg = f"arrays of `{scalar.__name__}` can't travel; use a dtype of numbers, bools, times or fixed-size text"
            raise ValueError(msg)
    return ArraySpec(() if numpy.generic in scalars else scalars, ndim)


def encode_hook(value: Any) -> Any:
    """Turn a value that msgspec does not know into one that it does, for msgpack."""
    if isinstance(value, pydantic.BaseModel):
        # What a model holds may be what only pydantic knows how to write, so its insides have an encoder of their own.
        dumped = value.model_dump(mode="python", round_trip=True, by_alias=False, warnings=False)
        return msgspec.Raw(_inside_model.encode(dumped))
    numpy = _numpy()
    if numpy is not None and isinstance(value, numpy.ndarray):
        return {"dtype": _plain_dtype(value.dtype).str, "shape": value.shape, "data": _buffer(value)}
    return _encode_scalar(value)


def encode_json_hook(value: Any) -> Any:
    """Turn a value that msgspec does not know into one that it does, for JSON."""
    if isinstance(value, pydantic.BaseModel):
        return value.model_dump(mode="json", warnings=False)
    numpy = _numpy()
    if numpy is not None and isinstance(value, numpy.ndarray):
        dtype = str(_plain_dtype(value.dtype))
        return {"data_b64": _buffer(value), "shape": value.shape, "dtype": dtype}  # msgspec writes bytes as base64
    return _encode_scalar(value)


def encode_plain_hook(value: Any) -> Any:
    """Turn a value that msgspec does not know into plain ones, which another library is to write; see `decode_hook`."""
    if isinstance(value, pydantic.BaseModel):
        return value.model_dump(mode="python", round_trip=True, by_alias=False, warnings=False)
    plain = _encode_inside_model(value)
    if isinstance(plain, dict) and is_numpy(value):
        plain["data"] = bytes(plain["data"])
    return plain


def decode_hook(kind: Any, value: Any) -> Any:
    """Build a model or an array from what msgpack held; raise ValueError if it does not fit."""
    if is_model(kind):
        return kind.model_validate(value, strict=False, by_alias=True, by_name=True)
    if is_array(kind):
        dtype, shape, data = _members(value, ("dtype", "shape", "data"))
        if not isinstance(data, bytes):
            raise ValueError("Expected an array's `data` as `bytes`")
        return _build(kind, dtype, shape, data)
    msg = f"values of type `{kind}` can't be read"
    raise TypeError(msg)


def decode_json_hook(kind: Any, value: Any) -> Any:
    """Build a model or an array from what JSON held; raise ValueError if it does not fit."""
    if is_model(kind):
        # pydantic reads JSON more kindly than Python values: a strict model takes a date as text there.
        return kind.model_validate_json(msgspec.json.encode(value), by_alias=True, by_name=True)
    if is_array(kind):
        text, shape, dtype = _members(value, ("data_b64", "shape", "dtype"))
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError, TypeError):
            raise ValueError("Expected an array's `data_b64` as base64 text") from None
        return _build(kind, dtype, shape, data)
    msg = f"values of type `{kind}` can't be read"
    raise TypeError(msg)


def array_schema() -> dict[str, Any]:
    """The JSON Schema of an array."""
    return {
        "type": "object",
        "title": "NumpyArray",
        "properties": {
            "data_b64": {"type": "string", "contentEncoding": "base64"},
            "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
            "dtype": {"type": "string", "examples": ["float32"]},
        },
        "required": ["data_b64", "shape", "dtype"],
    }


def _numpy() -> Any:
    """Give numpy if somebody imported it: no value of its can exist otherwise."""
    return sys.modules.get("numpy")


def _encode_scalar(value: Any) -> Any:
    numpy = _numpy()
    if numpy is not None and isinstance(value, numpy.generic):
        plain = value.item()
        return float(plain) if isinstance(plain, numpy.generic) else plain  # a longdouble gives itself
    if isinstance(value, bytes):
        return bytes(value)
    for base in (str, int, float):  # a subclass of one travels as what it is in value
        if isinstance(value, base):
            return base(value)
    msg = f"values of type `{type(value).__qualname__}` can't be sent"
    raise TypeError(msg)


def _encode_inside_model(value: Any) -> Any:
    """Encode what a pydantic model holds; secrets are sent, as a caller that passes one means them to be."""
    if isinstance(value, pydantic.SecretStr | pydantic.SecretBytes | pydantic.Secret):
        return value.get_secret_value()
    try:
        return encode_hook(value)
    except TypeError:
        return pydantic_core.to_jsonable_python(value)


_inside_model = msgspec.msgpack.Encoder(enc_hook=_encode_inside_model)


def _plain_dtype(dtype: Any) -> Any:
    if dtype.kind not in _ARRAY_KINDS or not dtype.itemsize:
        msg = f"arrays of dtype `{dtype}` can't travel; use a dtype of numbers, bools, times or fixed-size text"
        raise ValueError(msg)
    return dtype


def _buffer(array: Any) -> Any:
    """Give an array's bytes in C order, without a copy where they lie so already."""
    if array.size and array.flags.c_contiguous:
        return array.reshape(-1).view(_numpy().uint8).data
    return array.tobytes()


def _members(value: Any, names: tuple[str, ...]) -> tuple[Any, ...]:
    if not isinstance(value, Mapping) or set(value) != set(names):
        msg = f"Expected an array as an object of {', '.join(f'`{name}`' for name in names)}"
        raise ValueError(msg)
    return tuple(value[name] for name in names)


def _build(kind: Any, dtype_name: Any, shape: Any, data: bytes) -> Any:
    numpy = _numpy()
    dtype = _read_dtype(dtype_name)
    if (
        not isinstance(shape, list | tuple)
        or len(shape) > _MAX_DIMENSIONS
        or not all(type(n) is int and n >= 0 for n in shape)
    ):
        raise ValueError("Expected an array's `shape` as integers of 0 and more")
    if math.prod(shape) * dtype.itemsize != len(data):
        msg = (
            f"Expected {math.prod(shape) * dtype.itemsize} bytes of array data for shape {list(shape)}, got {len(data)}"
        )
        raise ValueError(msg)
    spec = array_spec(kind)
    if spec.scalars and not any(numpy.issubdtype(dtype, scalar) for scalar in spec.scalars):
        msg = f"Expected an array of `{' | '.join(spec.dtype_names)}`, got `{dtype}`"
        raise ValueError(msg)
    if spec.ndim is not None and spec.ndim != len(shape):
        msg = f"Expected an array of {spec.ndim} dimensions, got {len(shape)}"
        raise ValueError(msg)
    # A bytearray is writable, and the array's own: what it was read from can be freed.
    return numpy.ndarray(tuple(shape), dtype, bytearray(data)) if data else numpy.empty(tuple(shape), dtype)


def _read_dtype(name: Any) -> Any:
    # numpy reads more as a dtype than text, and may evaluate what looks like a list of fields.
    if isinstance(name, str) and _DTYPE.fullmatch(name):
        try:
            return _plain_dtype(_numpy().dtype(name))
        except (TypeError, ValueError):
            pass
    msg = f"Expected an array's `dtype` as a numpy dtype of plain data, got {str(name)[:40]!r}"
    raise ValueError(msg)
