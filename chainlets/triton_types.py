"""What Python types say of tensors: which of Triton's types fit an annotation, and values of it made of arrays."""

import dataclasses
import types
import typing
from collections import abc
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
import numpy as np

import chains_stream as chains
from chainlets.triton_tensors import NUMPY, Array, Tensor

_INTEGERS = frozenset({"UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"})
_FLOATS = frozenset({"FP16", "BF16", "FP32", "FP64"})
_TEXT = frozenset({"BYTES"})
_NUMBERS = frozenset(NUMPY) - _TEXT
_PLAIN: Mapping[Any, frozenset[str]] = {
    bool: frozenset({"BOOL"}), int: _INTEGERS, float: _FLOATS, str: _TEXT, bytes: _TEXT,
}  # fmt: skip
_LISTS = (list, tuple, set, frozenset, abc.Sequence, abc.Collection, abc.MutableSequence)
_MAPPINGS = (dict, abc.Mapping, abc.MutableMapping)


class Declared(msgspec.Struct, frozen=True):
    """What a Chainlet says of an input or an output.

    Attributes:
        name: of the tensor.
        kind: its type in Python, None left out.
        datatypes: Triton's types that fit; None for any.
        rank: its dimensions as an array, or how deep its lists are; None for any.
        is_array: whether it is an array, whose rank is the tensor's; lists and plain values are filled up with ones.
        dims: the dimensions themselves, if they were told.
        required: whether every request has it.
    """

    name: str
    kind: Any
    datatypes: frozenset[str] | None = None
    rank: int | None = None
    is_array: bool = False
    dims: tuple[int, ...] | None = None
    required: bool = True

    @property
    def shown(self) -> str:
        kind = self.kind
        return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind).replace("typing.", "")


def declared(name: str, annotation: Any, *, required: bool = True) -> Declared:
    """Read what an annotation says of the tensor that it stands for."""
    kind, nullable, told = _stripped(annotation)
    datatypes, rank, is_array = _fitting(kind)
    return Declared(
        name=told.name or name,
        kind=kind,
        datatypes=frozenset({told.datatype}) if told.datatype else datatypes,
        rank=rank if told.dims is None else len(told.dims),
        is_array=is_array,
        dims=told.dims,
        required=required and not nullable and not told.optional,
    )


def _stripped(annotation: Any) -> tuple[Any, bool, Tensor]:
    """Give a type without None and what annotates it; whether None was there; and the `Tensor` that annotates it."""
    kind, nullable, told = annotation, False, Tensor()
    while True:
        if get_origin(kind) is Annotated:
            told = next((extra for extra in kind.__metadata__ if isinstance(extra, Tensor)), told)
            kind = get_args(kind)[0]
            continue
        others = [arg for arg in get_args(kind) if arg is not type(None)]
        if get_origin(kind) not in (Union, types.UnionType) or len(others) == len(get_args(kind)):
            return kind, nullable, told
        kind, nullable = (others[0] if len(others) == 1 else Union[tuple(others)]), True  # noqa: UP007 - of a list


def _fitting(kind: Any) -> tuple[frozenset[str] | None, int | None, bool]:
    """Give the types of tensors that fit, the rank, and whether it is an array."""
    kind = _stripped(kind)[0]
    if (get_origin(kind) or kind) is np.ndarray:
        return *_of_array(kind), True
    if kind in _PLAIN:
        return _PLAIN[kind], 0, False
    if get_origin(kind) is Literal:
        return _PLAIN.get(type(get_args(kind)[0])), 0, False
    if (get_origin(kind) or kind) in _LISTS:
        args = [arg for arg in get_args(kind) if arg is not Ellipsis]
        inner, depth, _ = _fitting(args[0]) if args else (None, None, False)
        return inner, None if depth is None else depth + 1, False
    return None, None, False


def _of_array(kind: Any) -> tuple[frozenset[str], int | None]:
    args = get_args(kind)
    shape = get_args(args[0]) if args else ()
    rank = None if not shape or shape[-1] is Ellipsis else len(shape)
    held = (get_args(args[1]) or (Any,))[0] if len(args) > 1 else Any
    scalars = [one for one in (get_args(held) or (held,)) if isinstance(one, type) and issubclass(one, np.generic)]
    if not scalars:
        return _NUMBERS, rank
    fit = {name for name, of in NUMPY.items() if name != "BYTES" for one in scalars if issubclass(of, one)}
    fit |= _TEXT if any(issubclass(one, np.character) for one in scalars) else frozenset()
    return frozenset(fit), rank


def result_of(annotation: Any) -> Mapping[str, Declared] | Declared | None:
    """Read what the type of a result says: outputs by name, the only one (its name is empty), or None for any."""
    kind, _, _ = _stripped(annotation)
    if (get_origin(kind) or kind) in _MAPPINGS or kind is Any:
        return None
    fields = _fields(kind)
    if fields is None:
        return declared("", annotation)
    found = [declared(name, of) for name, of in fields.values()]
    return {each.name: each for each in found}


def _fields(kind: Any) -> Mapping[str, tuple[str, Any]] | None:
    """Give, by attribute, the name and the type of what an object holds; None for what is no object of fields."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        hints = typing.get_type_hints(kind, include_extras=True)
        return {field.name: (field.encode_name, hints[field.name]) for field in msgspec.structs.fields(kind)}
    if dataclasses.is_dataclass(kind) or typing.is_typeddict(kind):
        return {name: (name, of) for name, of in typing.get_type_hints(kind, include_extras=True).items()}
    return None


def build(annotation: Any, outputs: Mapping[str, Array]) -> Any:
    """Make a value of a result's type of a model's outputs. Raises InvalidResultError."""
    kind, _, _ = _stripped(annotation)
    try:
        if kind is Any:
            return {name: _plain(array) for name, array in outputs.items()}
        if (get_origin(kind) or kind) in _MAPPINGS:
            held = (get_args(kind) or (str, Any))[1]
            return {name: _value(array, held) for name, array in outputs.items()}
        fields = _fields(kind)
        if fields is None:
            (array,) = outputs.values()
            return _value(array, kind)
        values = {}
        for attribute, (name, of) in fields.items():
            tensor = declared(name, of)
            if tensor.required or tensor.name in outputs:
                values[attribute] = _value(outputs[tensor.name], tensor.kind)
        return kind(**values)
    except (KeyError, ValueError, TypeError) as error:
        shown = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in outputs.items()) or "none"
        reason = f"`{error.args[0]}` is missing" if isinstance(error, KeyError) else str(error)
        raise chains.InvalidResultError(f"the model's outputs ({shown}) don't make a {kind}: {reason}") from error


def _value(array: Array, kind: Any) -> Any:
    kind, _, _ = _stripped(kind)
    if (get_origin(kind) or kind) is np.ndarray:
        return _texts_of(array, kind) if array.dtype == np.object_ else array
    if kind in _PLAIN or get_origin(kind) is Literal:
        if array.size != 1:
            raise ValueError(f"one value is asked for, and there are {array.size}")
        plain = _plain(array.reshape(-1), as_bytes=kind is bytes)[0]
        return msgspec.convert(plain, kind)
    return msgspec.convert(_plain(array, as_bytes=_holds_bytes(kind)), kind)


def _plain(array: Array, *, as_bytes: bool = False) -> Any:
    """Give an array as Python's own values, in lists; bytes as text unless they are to stay."""
    if array.dtype == np.object_ and not as_bytes:
        text = np.empty(array.shape, dtype=np.object_)
        text.reshape(-1)[:] = [item.decode() for item in array.reshape(-1).tolist()]
        return text.tolist()
    return array.tolist()


def _holds_bytes(kind: Any) -> bool:
    return kind is bytes or any(map(_holds_bytes, get_args(kind)))


def _texts_of(array: Array, kind: Any) -> Array:
    """Make an array of BYTES one of numpy's own text, the only kind that travels between Chainlets."""
    return array.astype(np.bytes_) if "bytes_" in str(kind) else np.array(_plain(array), dtype=np.str_)
