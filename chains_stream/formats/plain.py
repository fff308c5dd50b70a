"""The formats that need nobody else: JSON, msgpack, text and bytes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import pydantic
from typing_extensions import override

from chains_stream import codec, foreign
from chains_stream.formats.format import NO_HEADERS, Format, Part, Reader, Writer, unfit, unreadable, unwritable
from chains_stream.formats.registry import Registry
from chains_stream.messages import JSON, MSGPACK, Headers


@dataclass(frozen=True)
class Json(Format):
    """JSON. With `check`, what is written is read back first: nothing of ours does so where it arrives."""

    check: bool = True

    name = "json"
    content_type = JSON

    @override
    def reader(self, kind: Any, registry: Registry, part: Part = "value") -> Reader:
        return PlainReader(json_decoder(self.name, kind))

    @override
    def writer(self, kind: Any, registry: Registry, part: Part = "value") -> Writer:
        decode = json_decoder(self.name, kind)
        return PlainWriter(kind, codec.to_json, decode if self.check else None)


@dataclass(frozen=True)
class Msgpack(Format):
    """msgpack. `check` is as that of `Json`."""

    check: bool = True

    name = "msgpack"
    content_type = MSGPACK

    @override
    def reader(self, kind: Any, registry: Registry, part: Part = "value") -> Reader:
        return PlainReader(self._decoder(kind))

    @override
    def writer(self, kind: Any, registry: Registry, part: Part = "value") -> Writer:
        decode = self._decoder(kind)
        return PlainWriter(kind, codec.to_msgpack, decode if self.check else None)

    def _decoder(self, kind: Any) -> Callable[[bytes], Any]:
        try:
            return msgspec.msgpack.Decoder(kind, dec_hook=foreign.decode_hook).decode
        except TypeError as error:
            raise unfit(self.name, kind, error) from error


@dataclass(frozen=True)
class Text(Format):
    """UTF-8, into ``str``."""

    name = "text"
    content_type = "text/plain"

    @override
    def reader(self, kind: Any, registry: Registry, part: Part = "value") -> Reader:
        self._require(kind)
        return PlainReader(bytes.decode)

    @override
    def writer(self, kind: Any, registry: Registry, part: Part = "value") -> Writer:
        self._require(kind)
        return PlainWriter(str, _instance_of(str, str.encode), None)

    def _require(self, kind: Any) -> None:
        if kind is not str:
            raise unfit(self.name, kind, "it is for `str`")


@dataclass(frozen=True)
class Bytes(Format):
    """The bytes as they are."""

    name = "bytes"
    content_type = "application/octet-stream"

    @override
    def reader(self, kind: Any, registry: Registry, part: Part = "value") -> Reader:
        self._require(kind)
        return PlainReader(bytes)

    @override
    def writer(self, kind: Any, registry: Registry, part: Part = "value") -> Writer:
        self._require(kind)
        return PlainWriter(bytes, _instance_of(bytes, bytes), None)

    def _require(self, kind: Any) -> None:
        if kind is not bytes:
            raise unfit(self.name, kind, "it is for `bytes`")


class PlainReader(Reader):
    """Reads with a decoder that raises what `codec.explain` explains."""

    needs_headers = False

    def __init__(self, decode: Callable[[bytes], Any]) -> None:
        self._decode = decode

    @override
    def missing(self, data: bytes) -> None:
        return None

    @override
    def read(self, data: bytes, headers: dict[str, bytes], topic: str) -> Any:
        try:
            return self._decode(data)
        except Exception as error:
            raise unreadable(topic, error) from error


class PlainWriter(Writer):
    """Writes with an encoder, and checks what it wrote with a decoder if there is one."""

    def __init__(self, kind: Any, encode: Callable[[Any], bytes], check: Callable[[bytes], Any] | None) -> None:
        # A model has been validated when it was made.
        self._valid = kind if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel) else ()
        self._encode = encode
        self._check = check

    @override
    def missing(self, topic: str) -> None:
        return None

    @override
    def write(self, value: Any, topic: str, headers: Mapping[str, bytes] = NO_HEADERS) -> tuple[bytes, Headers]:
        return self.encode(value, topic), tuple(headers.items()) if headers else ()

    def encode(self, value: Any, topic: str) -> bytes:
        """Give the bytes alone. Raises InvalidResultError."""
        try:
            data = self._encode(value)
            if self._check is not None and not isinstance(value, self._valid):
                self._check(data)
        except Exception as error:
            raise unwritable(topic, error) from error
        return data


def json_decoder(name: str, kind: Any) -> Callable[[bytes], Any]:
    """Make a decoder of JSON for the format of that name. Raises ChainsUsageError."""
    try:
        return msgspec.json.Decoder(kind, dec_hook=foreign.decode_json_hook).decode
    except TypeError as error:
        raise unfit(name, kind, error) from error


def _instance_of(kind: type, encode: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    def encoded(value: Any) -> bytes:
        if not isinstance(value, kind):
            msg = f"Expected `{kind.__name__}`, got `{type(value).__name__}`"
            raise TypeError(msg)
        return encode(value)

    return encoded
