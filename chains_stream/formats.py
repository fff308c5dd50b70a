"""Stub."""

from collections.abc import Callable
from typing import Any

import msgspec

from chains_stream.codec import explain
from chains_stream.errors import InvalidArgumentError
from chains_stream.messages import Headers

Reader = Callable[[bytes, Headers], Any]
Writer = Callable[[Any], tuple[bytes, Headers]]


def reader_of(name: str, kind: Any) -> Reader:
    decode = msgspec.json.Decoder(kind).decode

    def read(value: bytes, headers: Headers) -> Any:
        try:
            return decode(value)
        except Exception as error:
            text, path = explain(error)
            raise InvalidArgumentError(text, path=path) from error

    return read


def writer_of(name: str, kind: Any) -> Writer:
    encode = msgspec.json.Encoder().encode
    return lambda value: (encode(value), ())
