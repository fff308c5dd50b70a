"""Avro and JSON Schema against a real schema registry: frames, subjects, evolution, and what goes wrong."""

import asyncio
import io
import json
import struct
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any
from uuid import uuid4

import fastavro
import httpx
import jsonschema
import msgspec
import pydantic
import pytest
from confluent_kafka.schema_registry import SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroDeserializer, AvroSerializer
from confluent_kafka.schema_registry.json_schema import JSONDeserializer, JSONSerializer
from confluent_kafka.serialization import MessageField, SerializationContext
from hypothesis import given, settings
from hypothesis import strategies as st

from chains_stream.errors import (
    ChainsUsageError,
    IncompatibleSchemaError,
    InvalidArgumentError,
    InvalidResultError,
    UnknownSchemaError,
)
from chains_stream.formats import Avro, Format, JsonSchema, Registry
from chains_stream.settings import RegistrySettings
from tests import registry as registries
from tests.registry import read, write


class Ticket(msgspec.Struct):
    id: int
    subject: str
    at: datetime | None = None
    tags: list[str] = []


class Opened(msgspec.Struct, tag=True):
    by: str


class Closed(msgspec.Struct, tag=True):
    by: str
    reason: str | None = None


class Model(pydantic.BaseModel):
    id: int
    price: Decimal = pydantic.Field(max_digits=8, decimal_places=2)


TICKET = {
    "type": "record",
    "name": "Ticket",
    "fields": [
        {"name": "id", "type": "long"},
        {"name": "subject", "type": "string"},
        {
            "name": "at",
            "type": ["null", {"type": "long", "logicalType": "timestamp-micros"}],
            "default": None,
        },
        {"name": "tags", "type": {"type": "array", "items": "string"}, "default": []},
    ],
}
DRAFT_7 = "http://json-schema.org/draft-07/schema#"
WHEN = datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)


@pytest.fixture
async def asked(registry: registries.Registry) -> AsyncIterator[Registry]:
    ours = Registry(RegistrySettings(url=registry.url))
    yield ours
    await ours.close()


@pytest.fixture
def topic() -> str:
    return f"t{uuid4().hex[:12]}"


def framed(schema_id: int, schema: Any, value: Any) -> bytes:
    """Write a record as any other program would."""
    stream = io.BytesIO()
    stream.write(struct.pack(">bI", 0, schema_id))
    fastavro.schemaless_writer(stream, schema, value)
    return stream.getvalue()


async def test_avro_is_framed_with_the_id_of_the_schema(
    registry: registries.Registry, asked: Registry, topic: str
) -> None:
    data = await write(Avro().writer(Ticket, asked), Ticket(7, "é", WHEN, ["a"]), topic)
    schema_id, schema = registry.latest(f"{topic}-value")
    assert schema == TICKET
    golden = "0e 04 c3 a9 02 8c cd e7 e4 de d7 a3 06 02 02 61 00"
    assert data == struct.pack(">bI", 0, schema_id) + bytes.fromhex(golden)
    assert fastavro.schemaless_reader(io.BytesIO(data[5:]), TICKET, None) == {
        "id": 7,
        "subject": "é",
        "at": WHEN,
        "tags": ["a"],
    }
    assert await read(Avro().reader(Ticket, asked), data) == Ticket(7, "é", WHEN, ["a"])


async def test_json_is_framed_with_the_id_of_the_schema(
    registry: registries.Registry, asked: Registry, topic: str
) -> None:
    data = await write(JsonSchema().writer(Ticket, asked), Ticket(7, "x"), topic)
    schema_id, schema = registry.latest(f"{topic}-value")
    assert data == struct.pack(">bI", 0, schema_id) + b'{"id":7,"subject":"x","at":null,"tags":[]}'
    jsonschema.Draft7Validator(schema).validate(json.loads(data[5:]))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft7Validator(schema).validate({"id": "7"})
    assert (schema["title"], schema["required"]) == ("Ticket", ["id", "subject"])
    assert await read(JsonSchema().reader(Ticket, asked), data) == Ticket(7, "x")


async def test_the_official_serializers_at_the_other_end(
    registry: registries.Registry, asked: Registry, topic: str
) -> None:
    """Confluent's own, which block: they do so in a thread."""
    context = SerializationContext(topic, MessageField.VALUE)
    value = {"id": 7, "subject": "é", "at": WHEN, "tags": ["a"]}

    def avro(ours: bytes) -> tuple[Any, bytes | None]:
        with SchemaRegistryClient({"url": registry.url}) as client:
            theirs = AvroSerializer(client, json.dumps(TICKET))(value, context)
            return AvroDeserializer(client)(ours, context), theirs

    data = await write(Avro().writer(Ticket, asked), Ticket(7, "é", WHEN, ["a"]), topic)
    found, theirs = await asyncio.to_thread(avro, data)
    assert found == value
    assert theirs is not None
    assert await read(Avro().reader(Ticket, asked), theirs) == Ticket(7, "é", WHEN, ["a"])

    def plain(ours: bytes, schema: str) -> tuple[Any, bytes | None]:
        with SchemaRegistryClient({"url": registry.url}) as client:
            theirs = JSONSerializer(schema, client)({"id": 7, "subject": "x"}, context)
            return JSONDeserializer(None, schema_registry_client=client)(ours, context), theirs

    topic = context.topic = f"{topic}j"
    data = await write(JsonSchema().writer(Ticket, asked), Ticket(7, "x"), topic)
    found, theirs = await asyncio.to_thread(plain, data, json.dumps(registry.latest(f"{topic}-value")[1]))
    assert found == {"id": 7, "subject": "x", "at": None, "tags": []}
    assert theirs is not None
    assert await read(JsonSchema().reader(Ticket, asked), theirs) == Ticket(7, "x")


@pytest.mark.parametrize("form", [Avro(), JsonSchema()], ids=lambda form: form.name)
async def test_models_and_unions_pass(asked: Registry, topic: str, form: Format) -> None:
    kind = list[Opened | Closed]
    values = [Opened("a"), Closed("b"), Closed("c", "d")]
    assert await read(form.reader(kind, asked), await write(form.writer(kind, asked), values, topic)) == values
    model = Model(id=1, price=Decimal("1.25"))
    data = await write(form.writer(Model, asked, "key"), model, topic)
    assert await read(form.reader(Model, asked, "key"), data) == model


@pytest.mark.parametrize("form", [Avro(), JsonSchema()], ids=lambda form: form.name)
def test_what_is_written_is_read(registry: registries.Registry, topic: str, form: Format) -> None:
    with asyncio.Runner() as runner:
        ours = Registry(RegistrySettings(url=registry.url))
        writer, reader = form.writer(Ticket, ours), form.reader(Ticket, ours)

        @given(st.integers(-(2**63), 2**63 - 1), st.text(), st.none() | st.datetimes(timezones=st.just(UTC)))
        @settings(deadline=None)
        def there_and_back(number: int, subject: str, at: datetime | None) -> None:
            value = Ticket(number, subject, at)
            assert runner.run(read(reader, runner.run(write(writer, value, topic)))) == value

        there_and_back()
        runner.run(ours.close())


@pytest.mark.parametrize(
    ("form", "part", "subject"),
    [
        (Avro(), "key", "{topic}-key"),
        (Avro(subject="record", namespace="com.acme"), "value", "com.acme.Ticket"),
        (Avro(subject="topic-record", namespace="com.acme"), "value", "{topic}-com.acme.Ticket"),
        (JsonSchema(), "value", "{topic}-value"),
        (JsonSchema(subject="topic-record"), "value", "{topic}-Ticket"),
    ],
)
async def test_subjects_are_named_by_the_strategy(
    asked: Registry, topic: str, form: Any, part: Any, subject: str
) -> None:
    data = await write(form.writer(Ticket, asked, part), Ticket(7, "x"), topic)
    async with httpx.AsyncClient() as client:
        answer = await client.get(f"{asked.url}/subjects/{subject.format(topic=topic)}/versions/latest")
    assert answer.json()["id"] == int.from_bytes(data[1:5], "big")
    assert await read(form.reader(Ticket, asked, part), data) == Ticket(7, "x")


async def test_a_type_without_a_name_has_no_subject_of_its_record(asked: Registry, topic: str) -> None:
    with pytest.raises(ChainsUsageError, match='it has no name for subject="record"'):
        await write(Avro(subject="record").writer(list[int], asked), [1], topic)
    with pytest.raises(ChainsUsageError, match='it has no name for subject="record"'):
        JsonSchema(subject="record").writer(list[int], asked)


async def test_what_others_wrote_is_fitted_into_the_type(
    registry: registries.Registry, asked: Registry, topic: str
) -> None:
    """A field that we don't have is dropped, one that was not written has its default; a record's name is nothing."""
    schema = {
        "type": "record",
        "name": "TicketCreated",
        "namespace": "com.acme",
        "fields": [
            {"name": "priority", "type": {"type": "enum", "name": "P", "symbols": ["LOW", "HIGH"]}},
            {"name": "subject", "type": "string"},
            {"name": "id", "type": "int"},
            {"name": "at", "type": {"type": "long", "logicalType": "timestamp-millis"}},
        ],
    }
    schema_id = registry.register(f"{topic}-value", schema)
    data = framed(schema_id, schema, {"priority": "HIGH", "subject": "x", "id": 7, "at": WHEN})
    found = await read(Avro().reader(Ticket, asked), data)
    assert found == Ticket(7, "x", WHEN.replace(microsecond=0), [])
    plain = await read(Avro().reader(dict[str, Any], asked), data)
    assert plain["priority"] == "HIGH"


async def test_a_type_may_grow_where_the_registry_allows_it(
    registry: registries.Registry, asked: Registry, topic: str
) -> None:
    old = await write(Avro().writer(Ticket, asked), Ticket(7, "x"), topic)
    registry.require(f"{topic}-value", "BACKWARD")
    grown = msgspec.defstruct("Ticket", [("id", int), ("subject", str), ("who", str | None, None), ("level", int, 3)])
    new = await write(Avro().writer(grown, asked), grown(8, "y", "ada"), topic)
    assert new[:5] != old[:5]
    reader = Avro().reader(grown, asked)
    assert await read(reader, old) == grown(7, "x", None, 3)
    assert await read(reader, new) == grown(8, "y", "ada", 3)
    assert await read(Avro().reader(Ticket, asked), new) == Ticket(8, "y")


async def test_a_schema_that_is_not_compatible_is_one_line(
    registry: registries.Registry, asked: Registry, topic: str
) -> None:
    await write(Avro().writer(Ticket, asked), Ticket(7, "x"), topic)
    registry.require(f"{topic}-value", "BACKWARD")
    broken = msgspec.defstruct("Ticket", [("id", int), ("subject", str), ("who", str)])
    said = f"^subject {topic}-value: the schema registry .* 409: "
    with pytest.raises(IncompatibleSchemaError, match=said) as caught:
        await write(Avro().writer(broken, asked), broken(7, "x", "ada"), topic)
    assert "\n" not in str(caught.value)
    assert not caught.value.retryable


@pytest.mark.parametrize("form", [Avro(register="lookup"), JsonSchema(register="lookup")], ids=lambda form: form.name)
async def test_a_schema_may_be_looked_up_only(
    registry: registries.Registry, asked: Registry, topic: str, form: Format
) -> None:
    with pytest.raises(UnknownSchemaError, match=f"^subject {topic}-value: ") as caught:
        await write(form.writer(Ticket, asked), Ticket(7, "x"), topic)
    assert not caught.value.retryable
    assert f"{topic}-value" not in registry.subjects()
    registering: Format = Avro() if form.name == "avro" else JsonSchema()
    expected = await write(registering.writer(Ticket, asked), Ticket(7, "x"), topic)
    assert await write(form.writer(Ticket, asked), Ticket(7, "x"), topic) == expected


async def test_the_latest_schema_of_the_subject_may_be_written_with(
    registry: registries.Registry, asked: Registry, topic: str
) -> None:
    schema = {
        "type": "record",
        "name": "Invoice",
        "namespace": "com.acme",
        "fields": [
            {"name": "at", "type": {"type": "long", "logicalType": "timestamp-millis"}},
            {"name": "price", "type": {"type": "bytes", "logicalType": "decimal", "precision": 9, "scale": 2}},
            {"name": "id", "type": ["null", "int"]},
            {"name": "note", "type": "string", "default": "none"},
        ],
    }
    schema_id = registry.register(f"{topic}-value", schema)
    kind = msgspec.defstruct("Bill", [("id", int), ("price", Decimal), ("at", datetime)])
    data = await write(Avro(register="latest").writer(kind, asked), kind(7, Decimal("1.25"), WHEN), topic)
    assert struct.unpack(">bI", data[:5]) == (0, schema_id)
    found = fastavro.schemaless_reader(io.BytesIO(data[5:]), schema, None)
    when = WHEN.replace(microsecond=0)
    assert found == {"id": 7, "price": Decimal("1.25"), "at": when, "note": "none"}
    wrong = msgspec.defstruct("Bill", [("id", int), ("price", Decimal), ("at", datetime), ("more", int)])
    with pytest.raises(InvalidResultError, match="more fields than the schema specifies: more"):
        await write(Avro(register="latest").writer(wrong, asked), wrong(7, Decimal(1), WHEN, 1), topic)


async def test_a_schema_that_refers_to_others_is_read(
    registry: registries.Registry, asked: Registry, topic: str
) -> None:
    line = {"type": "record", "name": "Line", "namespace": "com.acme", "fields": [{"name": "sku", "type": "string"}]}
    registry.register(f"{topic}-line", line)
    order = {
        "type": "record",
        "name": "Order",
        "namespace": "com.acme",
        "fields": [{"name": "lines", "type": {"type": "array", "items": "com.acme.Line"}}],
    }
    references = [{"name": "com.acme.Line", "subject": f"{topic}-line", "version": 1}]
    schema_id = registry.register(f"{topic}-value", order, references=references)
    whole = json.loads(json.dumps(order).replace('"com.acme.Line"', json.dumps(line)))
    data = framed(schema_id, whole, {"lines": [{"sku": "a"}, {"sku": "b"}]})
    item = msgspec.defstruct("Item", [("sku", str)])
    kind = msgspec.defstruct("Basket", [("lines", list[item])])  # type: ignore[valid-type] # made here
    assert await read(Avro().reader(kind, asked), data) == kind([item("a"), item("b")])


async def test_a_union_of_records_of_others_is_told_apart_by_their_names(
    registry: registries.Registry, asked: Registry, topic: str
) -> None:
    fields = [{"name": "by", "type": "string"}]
    branches = [{"type": "record", "name": name, "fields": fields} for name in ("Opened", "Closed")]
    schema = {"type": "record", "name": "E", "fields": [{"name": "what", "type": branches}]}
    schema_id = registry.register(f"{topic}-value", schema)
    kind = msgspec.defstruct("E", [("what", Opened | Closed)])
    for name, expected in (("Opened", Opened("x")), ("Closed", Closed("x"))):
        data = framed(schema_id, schema, {"what": (name, {"by": "x"})})
        assert await read(Avro().reader(kind, asked), data) == kind(expected)
    either = msgspec.defstruct("E", [("what", dict[str, str])])
    assert await read(Avro().reader(either, asked), data) == either({"by": "x"})


@pytest.mark.parametrize("data", [b"", b"\0\0\0", b'{"id": 7}', b"\1" + bytes(20)])
@pytest.mark.parametrize("form", [Avro(), JsonSchema()], ids=lambda form: form.name)
async def test_a_value_without_a_frame_is_one_line(asked: Registry, form: Format, data: bytes) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^topic: the value has no schema id of a registry: it begins with"):
        await read(form.reader(Ticket, asked), data)


async def test_a_value_that_does_not_fit_the_type_names_the_field(
    registry: registries.Registry, asked: Registry, topic: str
) -> None:
    schema = {"type": "record", "name": "T", "fields": [{"name": "id", "type": "string"}]}
    data = framed(registry.register(f"{topic}-value", schema), schema, {"id": "7"})
    with pytest.raises(InvalidArgumentError, match=r"^topic: Expected `int`, got `str` - at `\$\.id`$") as caught:
        await read(Avro().reader(Ticket, asked), data)
    assert caught.value.path == "$.id"


def test_damaged_values_are_one_line(registry: registries.Registry, topic: str) -> None:
    with asyncio.Runner() as runner:
        ours = Registry(RegistrySettings(url=registry.url))
        data = runner.run(write(Avro().writer(Ticket, ours), Ticket(7, "x", WHEN, ["a"]), topic))
        reader = Avro().reader(Ticket, ours)
        runner.run(read(reader, data))
        runner.run(ours.close())

    @given(st.binary(max_size=60), st.integers(0, len(data) - 5))
    @settings(deadline=None, max_examples=300)
    def damaged(noise: bytes, kept: int) -> None:
        try:
            reader.read(data[: 5 + kept] + noise, {}, topic)
        except InvalidArgumentError as error:
            said = str(error)
        else:
            said = ""  # noise may be a value
        assert "\n" not in said

    damaged()


async def test_bytes_that_are_left_over_are_not_overlooked(asked: Registry, topic: str) -> None:
    data = await write(Avro().writer(Ticket, asked), Ticket(7, "x"), topic)
    with pytest.raises(InvalidArgumentError, match=r"does not fit its schema .*: 1 bytes are left over$"):
        await read(Avro().reader(Ticket, asked), data + b"x")


async def test_a_record_nested_without_end_does_not_end_the_process(
    registry: registries.Registry, asked: Registry, topic: str
) -> None:
    schema = {"type": "record", "name": "Node", "fields": [{"name": "next", "type": ["null", "Node"]}]}
    schema_id = registry.register(f"{topic}-value", schema)
    data = struct.pack(">bI", 0, schema_id) + b"\2" * 2_000_000 + b"\0"
    with pytest.raises(InvalidArgumentError, match="does not fit its schema"):
        await read(Avro().reader(dict[str, Any], asked), data)
    few = struct.pack(">bI", 0, schema_id) + b"\2\2\0"
    assert await read(Avro().reader(dict[str, Any], asked), few) == {"next": {"next": {"next": None}}}


async def test_a_schema_whose_arrays_take_no_bytes_is_refused(
    registry: registries.Registry, asked: Registry, topic: str
) -> None:
    schema = {"type": "record", "name": "N", "fields": [{"name": "f", "type": {"type": "array", "items": "null"}}]}
    schema_id = registry.register(f"{topic}-value", schema)
    data = struct.pack(">bI", 0, schema_id) + b"\x80\x80\x80\x80\x80\x80\x80\x80\x40"
    with pytest.raises(UnknownSchemaError, match="it has an array of items that take no bytes"):
        await read(Avro().reader(dict[str, Any], asked), data)


async def test_a_schema_that_refers_to_itself_many_times_over_is_read_at_once(
    registry: registries.Registry, asked: Registry, topic: str
) -> None:
    schema: Any = {"type": "record", "name": "R0", "fields": [{"name": "x", "type": "null"}]}
    for level in range(1, 30):
        fields = [{"name": "a", "type": schema}, {"name": "b", "type": f"R{level - 1}"}]
        schema = {"type": "record", "name": f"R{level}", "fields": fields}
    schema = {"type": "record", "name": "Root", "fields": [{"name": "f", "type": ["string", schema]}]}
    data = framed(registry.register(f"{topic}-value", schema), schema, {"f": "x"})
    assert await read(Avro().reader(dict[str, Any], asked), data) == {"f": "x"}


async def test_a_schema_of_another_kind_is_refused(registry: registries.Registry, asked: Registry, topic: str) -> None:
    schema_id = registry.register(f"{topic}-value", {"$schema": DRAFT_7, "type": "object"}, "JSON")
    with pytest.raises(UnknownSchemaError, match="is one of JSON, not of Avro"):
        await read(Avro().reader(Ticket, asked), struct.pack(">bI", 0, schema_id) + b"{}")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"id": "7", "subject": "x"}, r"Expected `int`, got `str` - at `\$\.id`"),
        (Ticket(2**70, "x"), "int"),
        (Ticket(7, "x", datetime(2026, 1, 1)), "2026-01-01 00:00:00 has no time zone"),  # noqa: DTZ001 - that is the fault
    ],
)
async def test_a_value_that_does_not_fit_is_not_written(asked: Registry, topic: str, value: Any, said: str) -> None:
    with pytest.raises(InvalidResultError, match=f"^{topic}: .*{said}") as caught:
        await write(Avro().writer(Ticket, asked), value, topic)
    assert "\n" not in str(caught.value)


async def test_a_decimal_keeps_its_scale(asked: Registry, topic: str) -> None:
    kind = msgspec.defstruct("R", [("d", Annotated[Decimal, msgspec.Meta(extra={"decimal": (5, 2)})])])
    writer = Avro().writer(kind, asked)
    data = await write(writer, kind(Decimal("1.5")), topic)
    assert str((await read(Avro().reader(kind, asked), data)).d) == "1.50"
    with pytest.raises(InvalidResultError, match=f"^{topic}: "):
        await write(writer, kind(Decimal("1.555")), topic)
