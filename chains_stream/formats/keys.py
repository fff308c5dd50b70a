"""What an event is keyed by: a field of its value, or what a function makes of it."""

import uuid
from collections.abc import Callable
from enum import Enum
from typing import Any

import msgspec

from chains_stream import codec, foreign
from chains_stream.errors import ChainsUsageError, InvalidResultError
from chains_stream.formats.format import shown

Key = str | Callable[[Any], Any]

_sorted_json = msgspec.json.Encoder(enc_hook=foreign.encode_json_hook, order="deterministic")


def keying(key: Key, kind: Any) -> Callable[[Any], bytes | None]:
    """Give the function that makes a record's key of a value of type `kind`.

    `key` is the name of a field, checked here, or a function of the value. Raises ChainsUsageError; the function raises
    InvalidResultError.
    """
    if not isinstance(key, str):
        return lambda value: key_bytes(key(value))
    names = _fields(kind)
    if names is not None and key not in names:
        known = ", ".join(f"`{name}`" for name in names) or "none"
        raise ChainsUsageError(f"the key `{key}` is no field of `{shown(kind)}`; its fields are: {known}")
    if names is None and not _is_mapping(kind):
        raise ChainsUsageError(f"the key `{key}` names a field, and `{shown(kind)}` has none: give a function instead")
    if _is_mapping(kind):
        return lambda value: key_bytes(value.get(key))
    return lambda value: key_bytes(getattr(value, key))


def key_bytes(key: Any) -> bytes | None:
    """Give the bytes of a key: text as UTF-8, numbers as decimal text, anything else as JSON with its keys sorted.

    So equal keys have equal bytes, and those that other producers write for text and numbers. Raises
    InvalidResultError.
    """
    match key:
        case None:
            return None
        case bytes():
            return key
        case Enum():
            return key_bytes(key.value)
        case bool():
            return b"true" if key else b"false"
        case str() | int() | uuid.UUID():
            try:
                return str(key).encode()
            except UnicodeEncodeError as error:
                raise InvalidResultError(f"the key can't be written: {codec.explain(error)[0]}") from error
    try:
        return _sorted_json.encode(key)
    except Exception as error:
        raise InvalidResultError(f"the key can't be written: {codec.explain(error)[0]}") from error


def _fields(kind: Any) -> tuple[str, ...] | None:
    """Give the names of a type's fields; None if it has no fixed ones."""
    origin = getattr(kind, "__origin__", kind)
    if foreign.is_model(origin):
        return tuple(origin.model_fields)
    for attribute in ("__struct_fields__", "__dataclass_fields__", "_fields"):
        if isinstance(origin, type) and hasattr(origin, attribute):
            return tuple(getattr(origin, attribute))
    if isinstance(origin, type) and hasattr(origin, "__total__"):  # a TypedDict
        return tuple(origin.__annotations__)
    return None


def _is_mapping(kind: Any) -> bool:
    origin = getattr(kind, "__origin__", kind)
    return isinstance(origin, type) and issubclass(origin, dict)
