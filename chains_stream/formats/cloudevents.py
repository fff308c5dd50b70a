"""CloudEvents 1.0, by its protocol binding for Kafka: in binary mode, and in structured mode as JSON.

An event's attributes are headers ``ce_…`` to whoever reads and writes it, in both modes: those of a structured event
are put there when it is read, and those that are given when one is written go into it. The media type of the data is
the header ``content-type``.
"""

import base64
import binascii
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec
from typing_extensions import override

from chains_stream import codec
from chains_stream.errors import InvalidArgumentError, InvalidResultError
from chains_stream.formats.format import NO_HEADERS, Format, Part, Reader, Writer, shown, unreadable
from chains_stream.formats.plain import PlainWriter, json_decoder
from chains_stream.formats.registry import Registry
from chains_stream.messages import CONTENT_TYPE, JSON, Headers

PREFIX = "ce_"
STRUCTURED = "application/cloudevents+json"
VERSION = "1.0"

_REQUIRED = ("id", "source", "specversion", "type")
_ATTRIBUTE = re.compile(r"[a-z0-9]+")
_JSON_TYPE = re.compile(rb"[^;]*[/+]json\s*(;.*)?", re.IGNORECASE | re.DOTALL)

_envelope = msgspec.json.Decoder(dict[str, msgspec.Raw])
_attribute = msgspec.json.Decoder(str | bool | int | None)


@dataclass(frozen=True)
class CloudEvents(Format):
    """CloudEvents; either mode is read, and `mode` is how they are written.

    The data is JSON, or text for ``str``, or what it is for ``bytes``. `source` and `type` are those of what is written
    that names no others; without a `type` it is the name of the value's class. `check` is as that of `Json`.
    """

    mode: Literal["binary", "structured"] = "binary"
    source: str = "/chains_stream"
    type: str | None = None
    check: bool = True

    name = "cloudevents"

    @property
    @override
    def content_type(self) -> str:
        return STRUCTURED if self.mode == "structured" else JSON

    @override
    def reader(self, kind: Any, registry: Registry, part: Part = "value") -> Reader:
        return CloudEventReader(_Data(kind))

    @override
    def writer(self, kind: Any, registry: Registry, part: Part = "value") -> Writer:
        data = _Data(kind)
        return CloudEventWriter(self, kind, data)


class CloudEventReader(Reader):
    """Reads the data of events of either mode."""

    needs_headers = True

    def __init__(self, data: "_Data") -> None:
        self._data = data

    @override
    def missing(self, data: bytes) -> None:
        return None

    @override
    def read(self, data: bytes, headers: dict[str, bytes], topic: str) -> Any:
        media_type = headers.get(CONTENT_TYPE, b"")
        if media_type[:23].lower() == b"application/cloudevents":
            if media_type.partition(b";")[0].strip().lower() != STRUCTURED.encode():
                raise InvalidArgumentError(
                    f"{topic}: a CloudEvent of {media_type[:80].decode(errors='replace')} can't be read; "
                    f"binary mode and {STRUCTURED} can"
                )
            return self._structured(data, headers, topic)
        _require(headers, topic)
        try:
            return self._data.read(data, media_type)
        except Exception as error:
            raise unreadable(topic, error) from error

    def _structured(self, data: bytes, headers: dict[str, bytes], topic: str) -> Any:
        try:
            event = _envelope.decode(data)
            plain, encoded = event.pop("data", None), event.pop("data_base64", None)
            media_type = JSON.encode()
            for name, raw in event.items():
                text = _header(name, raw)
                if name == "datacontenttype":
                    media_type = text or media_type
                elif text is not None:
                    headers[PREFIX + name] = text
            headers[CONTENT_TYPE] = media_type
            _require(headers, topic)
            if encoded is not None:
                return self._data.read(_unpacked(encoded), media_type)
            return self._data.read_json(b"null" if plain is None else bytes(plain), media_type)
        except InvalidArgumentError:
            raise
        except Exception as error:
            raise unreadable(topic, error) from error


class CloudEventWriter(Writer):
    """Writes values as the data of events, each with an id of its own unless it is given one."""

    def __init__(self, form: CloudEvents, kind: Any, data: "_Data") -> None:
        self._form = form
        self._data = data
        self._defaults = {
            "specversion": VERSION.encode(),
            "source": form.source.encode(),
            "type": (form.type or shown(kind)).encode(),
        }
        self._encode = PlainWriter(kind, data.write, data.decode if form.check and data.is_json else None).encode

    @override
    def missing(self, topic: str) -> None:
        return None

    @override
    def write(self, value: Any, topic: str, headers: Mapping[str, bytes] = NO_HEADERS) -> tuple[bytes, Headers]:
        data = self._encode(value, topic)
        now = datetime.now(UTC).isoformat()
        attributes = {"id": str(uuid.uuid4()).encode(), **self._defaults, "time": f"{now[:-6]}Z".encode()}
        others: list[tuple[str, bytes | None]] = []
        for name, text in headers.items():
            if name.startswith(PREFIX):
                _check(name, text, topic)
                attributes[name.removeprefix(PREFIX)] = text
            elif name != CONTENT_TYPE:
                others.append((name, text))
        if self._form.mode == "binary":
            given = ((PREFIX + name, text) for name, text in attributes.items())
            return data, ((CONTENT_TYPE, self._data.media_type.encode()), *given, *others)
        return self._enveloped(data, attributes, topic), ((CONTENT_TYPE, STRUCTURED.encode()), *others)

    def _enveloped(self, data: bytes, attributes: Mapping[str, bytes], topic: str) -> bytes:
        try:
            event: dict[str, Any] = {name: text.decode() for name, text in attributes.items()}
        except UnicodeDecodeError as error:
            raise InvalidResultError(f"{topic}: an attribute of the CloudEvent is not UTF-8") from error
        event["datacontenttype"] = self._data.media_type
        if self._data.is_json:
            event["data"] = msgspec.Raw(data)
        elif self._data.is_text:
            event["data"] = data.decode()
        else:
            event["data_base64"] = base64.b64encode(data).decode()
        return msgspec.json.encode(event)


class _Data:
    """How the data of events becomes values of a type."""

    def __init__(self, kind: Any) -> None:
        self.is_text = kind is str
        self.is_bytes = kind is bytes
        self.is_json = not (self.is_text or self.is_bytes)
        self.media_type = "text/plain" if self.is_text else "application/octet-stream" if self.is_bytes else JSON
        self.decode = json_decoder("cloudevents", kind)

    def read(self, data: bytes, media_type: bytes) -> Any:
        """Read data that is bytes."""
        if self.is_bytes:
            return data
        if self.is_text and not _JSON_TYPE.fullmatch(media_type):
            return data.decode()
        return self.decode(data or b"null")

    def read_json(self, data: bytes, media_type: bytes) -> Any:
        """Read data that is a value of JSON: of another media type, it is a string that holds the data."""
        if not self.is_bytes:
            return self.decode(data)
        return data if _JSON_TYPE.fullmatch(media_type) else msgspec.json.decode(data, type=str).encode()

    def write(self, value: Any) -> bytes:
        if self.is_json:
            return codec.to_json(value)
        wanted = str if self.is_text else bytes
        if not isinstance(value, wanted):
            raise TypeError(f"Expected `{wanted.__name__}`, got `{type(value).__name__}`")
        return value.encode() if isinstance(value, str) else value


def _require(headers: Mapping[str, bytes], topic: str) -> None:
    """Check that a record is a CloudEvent."""
    lacking = [name for name in _REQUIRED if not headers.get(PREFIX + name)]
    if len(lacking) == len(_REQUIRED):
        raise InvalidArgumentError(
            f"{topic}: the record is no CloudEvent: it has no headers {PREFIX}…, "
            f"and its content-type is not {STRUCTURED}"
        )
    if lacking:
        raise InvalidArgumentError(f"{topic}: the CloudEvent has no `{lacking[0]}`")
    version = headers[f"{PREFIX}specversion"]
    if version != VERSION.encode():
        said = version[:20].decode(errors="replace")
        raise InvalidArgumentError(f"{topic}: the CloudEvent is of version {said}, and only {VERSION} can be read")


def _check(name: str, text: bytes, topic: str) -> None:
    """Check an attribute that is given for an event that is written."""
    attribute = name.removeprefix(PREFIX)
    if not _ATTRIBUTE.fullmatch(attribute) or attribute in ("data", "datacontenttype"):
        raise InvalidResultError(f"{topic}: `{name}` names no attribute of a CloudEvent: use a-z and 0-9")
    if attribute in _REQUIRED and not text:
        raise InvalidResultError(f"{topic}: the CloudEvent's `{attribute}` is empty")
    if attribute == "specversion" and text != VERSION.encode():
        raise InvalidResultError(f"{topic}: CloudEvents are written in version {VERSION} alone")


def _header(name: str, raw: msgspec.Raw) -> bytes | None:
    """Give an attribute of JSON as it would be in a header; None for null, which is none."""
    try:
        value = _attribute.decode(raw)
    except msgspec.ValidationError:
        raise ValueError(f"the attribute `{name}` is no text, number or boolean") from None
    match value:
        case None:
            return None
        case bool():
            return b"true" if value else b"false"
        case _:
            return str(value).encode()


def _unpacked(raw: msgspec.Raw) -> bytes:
    try:
        return base64.b64decode(msgspec.json.decode(raw, type=str), validate=True)
    except (binascii.Error, msgspec.ValidationError):
        raise ValueError("`data_base64` is no base64 text") from None
