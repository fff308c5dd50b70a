"""Avro, framed as Confluent's serializers frame it: a value names its schema, which a registry keeps.

A value is read by the schema that it was written with, and then fitted into the type: a field that the type does not
have is dropped, one that was not written has its default, and the names of records do not matter.
"""

import io
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import pydantic
from typing_extensions import override

from chains_stream import foreign
from chains_stream.errors import ChainsUsageError, InvalidArgumentError, UnknownSchemaError
from chains_stream.formats.avro_schema import KEPT, AvroSchema, Change, avro_schema
from chains_stream.formats.format import (
    NO_HEADERS,
    Format,
    Part,
    Reader,
    Writer,
    one_line,
    unfit,
    unreadable,
    unwritable,
)
from chains_stream.formats.registry import (
    FRAME_BYTES,
    Naming,
    Register,
    Registered,
    Registry,
    frame,
    framed_id,
    subject_of,
)
from chains_stream.messages import Headers

_BINARY = (bytes, bytearray, memoryview)  # text is not taken for base64


@dataclass(frozen=True)
class Avro(Format):
    """Avro with a schema registry.

    `subject` is Confluent's strategy of that name; `register` whether a type's schema is registered when it is first
    written, only looked up, or not used at all: ``latest`` writes with the newest schema that the subject has by then.
    `namespace` is that of the type's records. `decimal` is the precision and scale of a ``Decimal``: one without is
    written as text, unless ``Meta(extra={"decimal": (precision, scale)})`` or the ``max_digits`` and ``decimal_places``
    of a pydantic field say more. With `check`, values are validated before they are written.
    """

    subject: Naming = "topic"
    register: Register = "register"
    namespace: str | None = None
    decimal: tuple[int, int] | None = None
    check: bool = True

    name = "avro"
    content_type = "application/avro"

    @override
    def reader(self, kind: Any, registry: Registry, part: Part = "value") -> Reader:
        self._require(registry)
        try:
            msgspec.inspect.type_info(kind)
        except TypeError as error:
            raise unfit(self.name, kind, error) from error
        return AvroReader(kind, registry)

    @override
    def writer(self, kind: Any, registry: Registry, part: Part = "value") -> Writer:
        self._require(registry)
        if self.register != "latest":
            self.schema(kind)
        return AvroWriter(self, kind, registry, part)

    def schema(self, kind: Any) -> AvroSchema:
        """Derive the schema of a type. Raises ChainsUsageError for one that has none."""
        try:
            return avro_schema(kind, namespace=self.namespace, decimal=self.decimal)
        except TypeError as error:
            raise unfit(self.name, kind, error) from error

    def _require(self, registry: Registry) -> None:
        try:
            import fastavro  # noqa: F401 - only whoever reads such records has it
        except ImportError:
            raise ChainsUsageError("the format `avro` needs fastavro: pip install 'chains-stream[avro]'") from None
        registry.require(self.name)


class AvroReader(Reader):
    """Reads values of any schema into one type."""

    needs_headers = False
    needs_registry = True

    def __init__(self, kind: Any, registry: Registry) -> None:
        self._kind = kind
        self._registry = registry
        self._parsed: dict[bytes, _Parsed] = {}
        try:
            self._tags = avro_schema(kind).tags
        except TypeError:
            self._tags = {}  # a type may be read that can't be written, such as a plain dict

    @override
    def missing(self, data: bytes) -> Awaitable[None] | None:
        known = len(data) < FRAME_BYTES or data[0] or data[1:FRAME_BYTES] in self._parsed
        return None if known else self._learn(data[1:FRAME_BYTES])

    @override
    def read(self, data: bytes, headers: dict[str, bytes], topic: str) -> Any:
        parsed = self._parsed[framed_id(data, topic)]
        stream = io.BytesIO(data)
        stream.seek(FRAME_BYTES)
        try:
            plain = parsed.read(stream)
        except Exception as error:
            raise parsed.misfit(topic, error) from error
        if stream.tell() != len(data):
            raise parsed.misfit(topic, ValueError(f"{len(data) - stream.tell()} bytes are left over"))
        try:
            if parsed.chooses:
                plain = _tagged(self._tags, plain)
            return msgspec.convert(
                plain, self._kind, builtin_types=_BINARY, str_keys=True, dec_hook=foreign.decode_hook
            )
        except Exception as error:
            raise unreadable(topic, error) from error

    async def _learn(self, schema_id: bytes) -> None:
        registered = await self._registry.schema(int.from_bytes(schema_id, "big"))
        self._parsed[schema_id] = _Parsed(registered)


class AvroWriter(Writer):
    """Writes values of one type, with the schema that each topic's subject has."""

    needs_registry = True

    def __init__(self, form: Avro, kind: Any, registry: Registry, part: Part) -> None:
        self._form = form
        self._kind = kind
        self._registry = registry
        self._part = part
        self._plans: dict[str, _Plan] = {}
        # A model has been validated when it was made.
        self._valid = kind if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel) else ()

    @override
    def missing(self, topic: str) -> Awaitable[None] | None:
        return None if topic in self._plans else self._learn(topic)

    @override
    def write(self, value: Any, topic: str, headers: Mapping[str, bytes] = NO_HEADERS) -> tuple[bytes, Headers]:
        plan = self._plans[topic]
        stream = io.BytesIO()
        stream.write(plan.frame)
        try:
            plain = msgspec.to_builtins(value, builtin_types=KEPT, str_keys=True, enc_hook=foreign.encode_plain_hook)
            if self._form.check and not isinstance(value, self._valid):
                msgspec.convert(plain, self._kind, builtin_types=_BINARY, str_keys=True, dec_hook=foreign.decode_hook)
            plan.write(stream, plain if plan.change is None else plan.change(plain))
        except Exception as error:
            raise unwritable(topic, error) from error
        return stream.getvalue(), tuple(headers.items())

    async def _learn(self, topic: str) -> None:
        form = self._form
        if form.register == "latest":
            derived, text = None, ""
        else:
            derived = form.schema(self._kind)
            text = json.dumps(derived.schema, separators=(",", ":"))
        subject = subject_of(form.subject, topic, self._part, self._record_name(derived))
        registered = await self._registry.of_subject(subject, "AVRO", text, form.register)
        change = self._change_for(registered) if derived is None else derived.change
        self._plans[topic] = _Plan(frame(registered.id), change, _Parsed(registered).write)

    def _record_name(self, derived: AvroSchema | None) -> str | None:
        """Give the name that a subject may be named after."""
        if self._form.subject == "topic":
            return None
        schema = (derived or self._form.schema(self._kind)).schema
        if not isinstance(schema, dict) or "name" not in schema:
            raise unfit("avro", self._kind, f'it has no name for subject="{self._form.subject}"')
        return str(schema["name"])

    def _change_for(self, registered: Registered) -> Change | None:
        """Give the change of a value for a schema that others made: what the type says, and how that writes it."""
        try:
            root = json.loads(registered.text)
            namespace = root.get("namespace") if isinstance(root, dict) else None
            decimals = (1, 0) if '"decimal"' in registered.text else None  # as text, unless it has Decimals
            return avro_schema(self._kind, namespace=namespace, decimal=decimals).change
        except TypeError:
            return None


class _Plan(NamedTuple):
    """How values are written to one topic."""

    frame: bytes
    change: Change | None
    write: Callable[[io.BytesIO, Any], None]


class _Parsed:
    """A schema of the registry's, ready to read and write with. Raises UnknownSchemaError for one that is no good.

    Attributes:
        chooses: whether there is a union of several records, whose values come with the record's name.
    """

    def __init__(self, registered: Registered) -> None:
        import fastavro
        import fastavro._read_py

        self._id = registered.id
        if registered.type != "AVRO":
            raise UnknownSchemaError(f"schema {registered.id} is one of {registered.type}, not of Avro")
        try:
            named: dict[str, Any] = {}
            for text in registered.references:
                fastavro.parse_schema(json.loads(text), named)
            parsed = fastavro.parse_schema(json.loads(registered.text), named)
            looked = _Look(named)
            looked.at(parsed)
        except Exception as error:
            raise UnknownSchemaError(f"schema {registered.id} can't be used: {one_line(error)}") from error
        self.chooses = looked.chooses
        # Compiled, it takes no note of how deep it is, and a short record may be deep enough to end the process.
        self._read = fastavro._read_py.schemaless_reader if looked.recursive else fastavro.schemaless_reader  # noqa: SLF001 - it has no other way in
        self._write = fastavro.schemaless_writer
        self._schema = parsed

    def read(self, stream: io.BytesIO) -> Any:
        if not self.chooses:
            return self._read(stream, self._schema)
        return self._read(stream, self._schema, return_record_name=True, return_record_name_override=True)

    def write(self, stream: io.BytesIO, plain: Any) -> None:
        self._write(stream, self._schema, plain, strict_allow_default=True)

    def misfit(self, topic: str, error: Exception) -> InvalidArgumentError:
        """Say that a value was not written with this schema, or is damaged."""
        return InvalidArgumentError(f"{topic}: the value does not fit its schema {self._id}: {one_line(error)}")


class _Look:
    """Looks through a parsed schema for what matters to its reader."""

    def __init__(self, named: Mapping[str, Any]) -> None:
        self.chooses = False
        self.recursive = False
        self._named = named
        self._within: list[str] = []  # the records that lie around, outermost first
        self._seen: dict[str, bool] = {}  # records, once each: they may refer to each other many times over

    def at(self, schema: Any) -> bool:
        """Look at a schema; tell whether its values may take no bytes at all."""
        if isinstance(schema, list):
            self._at_union(schema)
            return False
        if isinstance(schema, str):
            return self.at(self._named[schema]) if schema in self._named else schema == "null"
        match schema["type"]:
            case "record" | "error":
                return self._at_record(schema["name"], schema["fields"])
            case "array":
                if self.at(schema["items"]):
                    raise ValueError("it has an array of items that take no bytes")  # a few would be any number of them
            case "map":
                self.at(schema["values"])
            case "fixed":
                return bool(schema["size"] == 0)
            case kind:
                return self.at(kind)
        return False

    def _at_union(self, branches: list[Any]) -> None:
        self.chooses |= sum(map(self._is_record, branches)) > 1
        for each in branches:
            self.at(each)

    def _at_record(self, name: str, fields: Any) -> bool:
        if name in self._within:
            self.recursive = True
            return False
        if name not in self._seen:
            self._within.append(name)
            empty = [self.at(field["type"]) for field in fields]  # each is looked at
            self._seen[name] = all(empty)
            self._within.pop()
        return self._seen[name]

    def _is_record(self, schema: Any) -> bool:
        found = self._named.get(schema) if isinstance(schema, str) else schema
        return isinstance(found, dict) and found.get("type") in ("record", "error")


def _tagged(tags: Mapping[str, tuple[str, Any]], value: Any) -> Any:
    """Take the names of records out of what was read, and give tagged Structs their tags by them."""
    if isinstance(value, tuple):
        name, record = value
        found = _tagged(tags, record)
        tag = tags.get(str(name).rpartition(".")[2])
        if tag is not None and isinstance(found, dict):
            found.setdefault(*tag)
        return found
    if isinstance(value, dict):
        return {key: _tagged(tags, each) for key, each in value.items()}
    if isinstance(value, list):
        return [_tagged(tags, each) for each in value]
    return value
