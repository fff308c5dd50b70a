"""JSON whose schema a registry keeps, framed as Confluent's serializers frame it."""

from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from typing_extensions import override

from chains_stream import codec, schema
from chains_stream.formats.format import NO_HEADERS, Format, Part, Reader, Writer, unfit
from chains_stream.formats.plain import PlainReader, PlainWriter, json_decoder
from chains_stream.formats.registry import FRAME_BYTES, Naming, Register, Registry, frame, framed_id, subject_of
from chains_stream.messages import JSON, Headers


@dataclass(frozen=True)
class JsonSchema(Format):
    """JSON with a schema registry; the options are those of `Avro`.

    A value is validated against the type that it is read into, and the registry is not asked for the schema that it
    was written with: JSON can be read without.
    """

    subject: Naming = "topic"
    register: Register = "register"
    check: bool = True

    name = "json-schema"
    content_type = JSON

    @override
    def reader(self, kind: Any, registry: Registry, part: Part = "value") -> Reader:
        return JsonSchemaReader(json_decoder(self.name, kind))

    @override
    def writer(self, kind: Any, registry: Registry, part: Part = "value") -> Writer:
        registry.require(self.name)
        return JsonSchemaWriter(self, kind, registry, part)

    def schema(self, kind: Any) -> dict[str, Any]:
        """Derive the schema of a type. Raises ChainsUsageError for one that has none."""
        try:
            return schema.document(kind)
        except (TypeError, ValueError) as error:
            raise unfit(self.name, kind, error) from error


class JsonSchemaReader(PlainReader):
    """Reads the JSON behind the frame."""

    @override
    def read(self, data: bytes, headers: dict[str, bytes], topic: str) -> Any:
        framed_id(data, topic)
        return super().read(data[FRAME_BYTES:], headers, topic)


class JsonSchemaWriter(Writer):
    """Writes JSON behind the frame that each topic's subject asks for."""

    needs_registry = True

    def __init__(self, form: JsonSchema, kind: Any, registry: Registry, part: Part) -> None:
        self._form = form
        self._registry = registry
        self._part = part
        self._schema = form.schema(kind)
        self._json = PlainWriter(kind, codec.to_json, json_decoder(form.name, kind) if form.check else None)
        self._frames: dict[str, bytes] = {}
        if form.subject != "topic" and "title" not in self._schema:
            raise unfit(form.name, kind, f'it has no name for subject="{form.subject}"')

    @override
    def missing(self, topic: str) -> Awaitable[None] | None:
        return None if topic in self._frames else self._learn(topic)

    @override
    def write(self, value: Any, topic: str, headers: Mapping[str, bytes] = NO_HEADERS) -> tuple[bytes, Headers]:
        return self._frames[topic] + self._json.encode(value, topic), tuple(headers.items())

    async def _learn(self, topic: str) -> None:
        subject = subject_of(self._form.subject, topic, self._part, self._schema.get("title"))
        text = msgspec.json.encode(self._schema).decode()
        registered = await self._registry.of_subject(subject, "JSON", text, self._form.register)
        self._frames[topic] = frame(registered.id)
