"""The Avro schemas of Python types, and values written with them by hand with fastavro."""

import io
import operator
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, IntEnum
from typing import Annotated, Any, Generic, Literal, NamedTuple, Optional, TypedDict, TypeVar

import fastavro
import msgspec
import numpy as np
import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chains_stream import foreign
from chains_stream.errors import ChainsUsageError
from chains_stream.formats import Avro
from chains_stream.formats.avro_schema import KEPT, avro_schema

T = TypeVar("T")


class Color(Enum):
    RED = "RED"
    BLUE = "BLUE"


class Odd(Enum):
    A = "not a name"


class Level(IntEnum):
    LOW = 1


class Line(msgspec.Struct):
    sku: str
    count: int = 1


class Opened(msgspec.Struct, tag="opened"):
    by: str


class Closed(msgspec.Struct, tag="closed"):
    by: str
    reason: str | None = None


class Node(msgspec.Struct):
    name: str
    children: list["Node"] = []
    at: datetime | None = None


class Box(msgspec.Struct, Generic[T]):
    held: T


@dataclass
class Plain:
    a: int
    b: list[int] = field(default_factory=list)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


class Pair(NamedTuple):
    left: int
    right: str


class Row(TypedDict):
    id: int


class Partial(TypedDict, total=False):
    id: int


class Cat(pydantic.BaseModel):
    kind: Literal["cat"] = "cat"
    lives: int


class Dog(pydantic.BaseModel):
    kind: Literal["dog"] = "dog"
    tricks: list[str]


class Home(pydantic.BaseModel):
    pet: Cat | Dog
    url: pydantic.AnyUrl
    rent: Decimal = pydantic.Field(max_digits=8, decimal_places=2)
    note: str | None = None


def field_of(kind: Any, default: Any = msgspec.NODEFAULT) -> Any:
    given = ("f", kind) if default is msgspec.NODEFAULT else ("f", kind, default)
    record = avro_schema(msgspec.defstruct("R", [given])).schema
    assert record["type"] == "record"
    (found,) = record["fields"]
    return found["type"] if default is msgspec.NODEFAULT else (found["type"], found.get("default", "none"))


LONG_TIME = {"type": "long", "logicalType": "timestamp-micros"}


@pytest.mark.parametrize(
    ("kind", "schema"),
    [
        (bool, "boolean"),
        (int, "long"),
        (float, "double"),
        (str, "string"),
        (bytes, "bytes"),
        (bytearray, "bytes"),
        (datetime, LONG_TIME),
        (Annotated[datetime, msgspec.Meta(tz=True)], LONG_TIME),
        (Annotated[datetime, msgspec.Meta(tz=False)], {"type": "long", "logicalType": "local-timestamp-micros"}),
        (date, {"type": "int", "logicalType": "date"}),
        (time, {"type": "long", "logicalType": "time-micros"}),
        (timedelta, "string"),
        (uuid.UUID, {"type": "string", "logicalType": "uuid"}),
        (Decimal, "string"),
        (
            Annotated[Decimal, msgspec.Meta(extra={"decimal": (9, 2)})],
            {"type": "bytes", "logicalType": "decimal", "precision": 9, "scale": 2},
        ),
        (Color, {"type": "enum", "name": "Color", "symbols": ["RED", "BLUE"]}),
        (Odd, "string"),
        (Level, "long"),
        (Literal["a", 1], ["long", "string"]),
        (list[int], {"type": "array", "items": "long"}),
        (set[str], {"type": "array", "items": "string"}),
        (tuple[int, ...], {"type": "array", "items": "long"}),
        (tuple[int, str], {"type": "array", "items": ["long", "string"]}),
        (Pair, {"type": "array", "items": ["long", "string"]}),
        (dict[str, float], {"type": "map", "values": "double"}),
        (dict[int, list[int]], {"type": "map", "values": {"type": "array", "items": "long"}}),
        (int | None, ["null", "long"]),
        (float | int, ["long", "double"]),
        (list[str | None], {"type": "array", "items": ["null", "string"]}),
        (Row, {"type": "record", "name": "Row", "fields": [{"name": "id", "type": "long"}]}),
        (Box[int], {"type": "record", "name": "Box_int", "fields": [{"name": "held", "type": "long"}]}),
    ],
)
def test_schemas(kind: Any, schema: Any) -> None:
    assert field_of(kind) == schema
    fastavro.parse_schema(avro_schema(msgspec.defstruct("R", [("f", kind)])).schema)


@pytest.mark.parametrize(
    ("kind", "default", "schema"),
    [
        (int, 5, ("long", 5)),
        (str, "", ("string", "")),
        (int | None, None, (["null", "long"], None)),
        (int | None, 5, (["long", "null"], 5)),
        (float, 5, ("double", 5)),
        (bytes, b"\xff", ("bytes", "\xff")),
        (Color, Color.BLUE, ({"type": "enum", "name": "Color", "symbols": ["RED", "BLUE"]}, "BLUE")),
        (list[int], [], ({"type": "array", "items": "long"}, [])),
        (datetime, datetime(2026, 1, 1, tzinfo=UTC), (LONG_TIME, "none")),
    ],
)
def test_defaults_are_of_the_first_branch(kind: Any, default: Any, schema: Any) -> None:
    assert field_of(kind, default) == schema


def test_an_enum_has_its_default_wherever_it_comes_again() -> None:
    fields: list[Any] = [
        ("a", Color),
        ("b", Color, Color.RED),
        ("c", Color | None, Color.BLUE),
        ("d", Color | None, None),
    ]
    schema = avro_schema(msgspec.defstruct("R", fields), namespace="com.acme").schema
    assert [(each["type"], each.get("default")) for each in schema["fields"][1:]] == [
        ("com.acme.Color", "RED"),
        (["com.acme.Color", "null"], "BLUE"),
        (["null", "com.acme.Color"], None),
    ]
    fastavro.parse_schema(schema)


def test_a_default_that_is_made_anew_is_none_to_others() -> None:
    fields = {each["name"]: each for each in avro_schema(Plain).schema["fields"]}
    assert fields["b"] == {"name": "b", "type": {"type": "array", "items": "long"}, "default": []}
    assert fields["id"] == {"name": "id", "type": "string"}


def test_decimals_may_have_a_scale_that_the_format_gives() -> None:
    decimals = Avro(decimal=(9, 2)).schema(Decimal).schema
    assert decimals == {"type": "bytes", "logicalType": "decimal", "precision": 9, "scale": 2}


def test_a_class_that_comes_again_is_named() -> None:
    schema = avro_schema(Node, namespace="com.acme").schema
    assert schema["name"] == "com.acme.Node"
    assert schema["fields"][1]["type"] == {"type": "array", "items": "com.acme.Node"}


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Any, "Avro has no form for `Any`: name the type"),
        (Partial, r"`Partial.id` may be missing, and in Avro every field is there"),
        (msgspec.defstruct("A", [("x", int)], array_like=True), "the Struct `A` is array_like"),
        (
            msgspec.defstruct("B", [("x", int)], rename={"x": "no-name"}),
            "the field `no-name` of `B` is no name in Avro",
        ),
        (list[msgspec.defstruct("Line", [("x", Line)])], "two classes are called `Line`"),  # type: ignore[misc] # made here
        (datetime | int, "tell"),
    ],
)
def test_a_type_without_a_form_is_one_line(kind: Any, said: str) -> None:
    if said == "tell":  # two of them in a union are told apart: a long that is a time, and one that is none
        said = "Avro can't tell two kinds of `long` apart in one union"
    with pytest.raises(ChainsUsageError, match=said) as caught:
        Avro().schema(kind)
    assert "\n" not in str(caught.value)


def round_trip(kind: Any, value: Any, namespace: str | None = None) -> Any:
    """Write a value and read it, by hand."""
    made = avro_schema(kind, namespace=namespace)
    plain = msgspec.to_builtins(value, builtin_types=KEPT, str_keys=True, enc_hook=foreign.encode_plain_hook)
    stream = io.BytesIO()
    fastavro.schemaless_writer(stream, made.schema, made.change(plain) if made.change else plain)
    stream.seek(0)
    read = fastavro.schemaless_reader(stream, made.schema, None)
    return msgspec.convert(read, kind, builtin_types=(bytes,), str_keys=True, dec_hook=foreign.decode_hook)


WHEN = datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (list[Opened | Closed], [Opened("a"), Closed("a"), Closed("b", "r")]),
        (dict[str, Opened | Closed | None], {"a": None, "b": Closed("x")}),
        (Node, Node("a", [Node("b", at=WHEN), Node("c", [Node("d")])], WHEN)),
        (tuple[int, str] | None, (1, "long")),
        (list[tuple[int, str] | None], [None, (1, "string")]),
        (Pair, Pair(1, "x")),
        (dict[int, Decimal], {5: Decimal("1.50")}),
        (Decimal | None, Decimal("1E+3")),
        (set[int], {1, 2}),
        (Plain, Plain(1, [2], "x")),
        (Row, {"id": 5}),
        (Level, Level.LOW),
        (Odd | None, Odd.A),
        (timedelta, timedelta(days=1, microseconds=5)),
        (Annotated[datetime, msgspec.Meta(tz=False)], datetime(2026, 1, 2, 3, 4, 5, 6)),  # noqa: DTZ001 - a local time
        (time | None, time(1, 2, 3, 4)),
        (float | int | str | None, 5),
        (list[float | int | bool | None], [1, 1.0, True, None]),
        (Box[list[Color]], Box([Color.RED])),
        (
            Home,
            Home(pet=Dog(tricks=["sit"]), url=pydantic.AnyUrl("http://a/"), rent=Decimal("1.25")),
        ),
        (list[Home], [Home(pet=Cat(lives=9), url=pydantic.AnyUrl("http://a/"), rent=Decimal("-1.25"), note="x")]),
    ],
)
def test_values_come_back(kind: Any, value: Any) -> None:
    found = round_trip(kind, value)
    assert found == value
    assert type(found) is type(value)


def test_values_come_back_in_a_namespace() -> None:
    kind = dict[str, list[Opened | Closed | None]]
    value = {"a": [Opened("a"), None, Closed("b", "r"), Closed("c")], "b": []}
    assert round_trip(kind, value, "com.acme") == value
    nested = msgspec.defstruct("N", [("first", Opened | Closed), ("then", list[Opened | Closed]), ("at", Node)])
    whole = nested(Closed("a"), [Opened("b")], Node("x", [Node("y")]))
    assert round_trip(nested, whole, "com.acme") == whole


def test_arrays_come_back() -> None:
    found = round_trip(dict[str, np.ndarray], {"a": np.arange(6, dtype="<i2").reshape(2, 3)})["a"]
    assert found.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found.dtype == np.dtype("<i2")


Scalars = msgspec.defstruct(
    "Scalars",
    [
        *(("i", int), ("f", float), ("s", str), ("b", bytes), ("u", uuid.UUID), ("d", date), ("t", datetime)),
        *(("o", int | None), ("l", list[str]), ("m", dict[str, list[int]]), ("z", bool)),
    ],
)


@given(
    st.fixed_dictionaries(
        {
            "i": st.integers(-(2**63), 2**63 - 1),
            "f": st.floats(allow_nan=False),
            "s": st.text(),
            "b": st.binary(),
            "u": st.uuids(),
            "d": st.dates(),
            "t": st.datetimes(timezones=st.just(UTC)),
            "o": st.none() | st.integers(0, 9),
            "l": st.lists(st.text(), max_size=4),
            "m": st.dictionaries(st.text(), st.lists(st.integers(0, 9), max_size=3), max_size=3),
            "z": st.booleans(),
        }
    )
)
def test_any_value_comes_back(fields: dict[str, Any]) -> None:
    make: Callable[..., Any] = Scalars
    assert round_trip(Scalars, make(**fields)) == make(**fields)


Typed = tuple[Any, st.SearchStrategy[Any]]  # a type, and values of it

SCALARS: list[Typed] = [
    (int, st.integers(-(2**63), 2**63 - 1)),
    (float, st.floats(allow_nan=False)),
    (bool, st.booleans()),
    (str, st.text()),
    (bytes, st.binary()),
    (date, st.dates()),
    (time, st.times()),
    (datetime, st.datetimes(timezones=st.just(UTC))),
    (timedelta, st.timedeltas(timedelta(days=-9999), timedelta(days=9999))),
    (uuid.UUID, st.uuids()),
    (Decimal, st.decimals(allow_nan=False, allow_infinity=False)),
    (Color, st.sampled_from(Color)),
    (Opened | Closed, st.builds(Opened, st.text()) | st.builds(Closed, st.text(), st.none() | st.text())),
    (Plain, st.builds(Plain, st.integers(0, 9))),
    (Node, st.builds(Node, st.text(), st.lists(st.builds(Node, st.text()), max_size=2))),
]


def compound(inner: st.SearchStrategy[Typed]) -> st.SearchStrategy[Typed]:
    def record(parts: list[Typed]) -> Typed:
        kind = msgspec.defstruct(f"R{uuid.uuid4().hex}", [(f"f{n}", each) for n, (each, _) in enumerate(parts)])
        return kind, st.builds(kind, *(values for _, values in parts))

    # Subscripted as values: no checker of types can follow.
    get: Any = operator.getitem
    return st.one_of(
        inner.map(lambda of: (get(list, of[0]), st.lists(of[1], max_size=3))),
        inner.map(lambda of: (get(dict, (str, of[0])), st.dictionaries(st.text(), of[1], max_size=3))),
        inner.map(lambda of: (get(Optional, of[0]), st.none() | of[1])),
        inner.map(lambda of: (get(tuple, (of[0], ...)), st.lists(of[1], max_size=3).map(tuple))),
        st.lists(inner, min_size=1, max_size=4).map(record),
    )


TYPES = st.recursive(st.sampled_from(SCALARS), compound, max_leaves=8)


@given(st.data())
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_type_comes_back(data: st.DataObject) -> None:
    kind, values = data.draw(TYPES)
    value = data.draw(values)
    assert round_trip(kind, value) == value


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        (datetime, datetime(2026, 1, 1), "has no time zone"),  # noqa: DTZ001 - that is the fault
        (Annotated[datetime, msgspec.Meta(tz=False)], WHEN, "has a time zone, and its field is of local times"),
        (time, time(1, tzinfo=UTC), "has a time zone, which Avro's times have not"),
    ],
)
def test_a_time_is_not_taken_for_another(kind: Any, value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        round_trip(kind, value)
