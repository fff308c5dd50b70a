"""The formats that ask nobody: what lies in a record, and what is said of one that does not fit."""

import sys
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import Any, NamedTuple, TypedDict

import jsonschema
import msgspec
import numpy as np
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chains_stream.errors import ChainsUsageError, InvalidArgumentError, InvalidResultError
from chains_stream.formats import NAMES, Bytes, Format, Json, JsonSchema, Msgpack, Registry, Text, keying, named
from chains_stream.settings import RegistrySettings, Settings, from_environment

TOPIC = "tickets"


class Ticket(msgspec.Struct):
    id: int
    subject: str
    tags: list[str] = []
    score: float | None = None


class Model(pydantic.BaseModel):
    id: int
    at: datetime


@dataclass
class Point:
    x: float
    grid: np.ndarray[Any, np.dtype[np.float32]]


def written(form: Format, kind: Any, value: Any) -> bytes:
    data, headers = form.writer(kind, Registry()).write(value, TOPIC)
    assert headers == ()
    return data


def read(form: Format, kind: Any, data: bytes) -> Any:
    reader = form.reader(kind, Registry())
    assert reader.missing(data) is None
    return reader.read(data, {}, TOPIC)


def test_json_is_what_anybody_would_write() -> None:
    assert written(Json(), Ticket, Ticket(7, "é")) == '{"id":7,"subject":"é","tags":[],"score":null}'.encode()
    assert read(Json(), Ticket, b' {"id": 7, "subject": "x", "unknown": 1}') == Ticket(7, "x")


def test_msgpack_is_a_map_of_the_fields() -> None:
    golden = b"\x84\xa2id\x07\xa7subject\xa1x\xa4tags\x90\xa5score\xc0"
    assert written(Msgpack(), Ticket, Ticket(7, "x")) == golden
    assert read(Msgpack(), Ticket, golden) == Ticket(7, "x")


def test_text_and_bytes_are_as_they_are() -> None:
    assert written(Text(), str, "é") == b"\xc3\xa9"
    assert read(Text(), str, b"\xc3\xa9") == "é"
    assert written(Bytes(), bytes, b"\xff") == b"\xff"
    assert read(Bytes(), bytes, b"\xff") == b"\xff"


@pytest.mark.parametrize("form", [Json(), Msgpack()], ids=lambda form: form.name)
def test_models_and_arrays_pass(form: Format) -> None:
    model = Model(id=1, at=datetime(2026, 1, 2, tzinfo=UTC))
    assert read(form, Model, written(form, Model, model)) == model
    point = read(form, Point, written(form, Point, Point(1.5, np.arange(4, dtype=np.float32))))
    assert point.x == 1.5
    assert point.grid.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("form", [Json(), Msgpack()], ids=lambda form: form.name)
@given(value=st.builds(Ticket, id=st.integers(0, 2**63), subject=st.text(), tags=st.lists(st.text(), max_size=3)))
def test_what_is_written_is_read(form: Format, value: Ticket) -> None:
    assert read(form, Ticket, written(form, Ticket, value)) == value


def test_a_value_that_does_not_fit_names_the_field() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        read(Json(), Ticket, b'{"id": 7, "subject": "x", "tags": ["a", 1]}')
    assert str(caught.value) == "tickets: Expected `str`, got `int` - at `$.tags[1]`"
    assert caught.value.path == "$.tags[1]"
    with pytest.raises(InvalidArgumentError) as caught:
        read(Json(), Ticket, b'{"id": 7}')
    assert caught.value.path == "$.subject"


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b'"\xff"'])
@pytest.mark.parametrize("form", [Json(), Msgpack()], ids=lambda form: form.name)
def test_damaged_data_is_one_line(form: Format, data: bytes) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        read(form, Ticket, data)
    assert "\n" not in str(caught.value)


def test_text_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"^tickets: the data holds text that is not UTF-8$"):
        read(Text(), str, b"\xff")


@pytest.mark.parametrize("form", [Json(), Msgpack()], ids=lambda form: form.name)
def test_a_value_of_a_wrong_type_is_not_written(form: Format) -> None:
    wrong: Any = "7"
    with pytest.raises(InvalidResultError, match=r"^tickets: Expected `int`, got `str` - at `\$\.id`$"):
        written(form, Ticket, Ticket(wrong, "x"))
    with pytest.raises(InvalidResultError, match="Expected `object`, got `str`"):
        written(form, Ticket, "x")


def test_json_has_no_nan() -> None:
    assert written(Json(), Ticket, Ticket(7, "x", score=None)).endswith(b"null}")
    with pytest.raises(InvalidResultError, match=r"^tickets: JSON has no `nan` - at `\$\.score`$"):
        written(Json(), Ticket, Ticket(7, "x", score=float("nan")))


@pytest.mark.parametrize(("form", "value", "said"), [(Text(), b"x", "bytes"), (Bytes(), "x", "str")])
def test_text_and_bytes_are_not_mixed_up(form: Format, value: Any, said: str) -> None:
    with pytest.raises(InvalidResultError, match=f"got `{said}`"):
        written(form, str if said == "bytes" else bytes, value)


def test_a_type_that_a_format_cannot_hold_is_found_at_once() -> None:
    with pytest.raises(ChainsUsageError, match=r"^the format `text` can't hold `Ticket`: it is for `str`$"):
        Text().reader(Ticket, Registry())
    with pytest.raises(ChainsUsageError, match=r"^the format `json` can't hold"):
        Json().writer(Ticket | Point, Registry())


def test_formats_have_names() -> None:
    assert list(NAMES) == ["json", "msgpack", "text", "bytes", "avro", "json-schema", "cloudevents"]
    assert named("json") == Json()
    own = Json(check=False)
    assert named(own) is own
    with pytest.raises(ChainsUsageError, match=r"^there is no format `yaml`: use one of json, msgpack, "):
        named("yaml")


@pytest.mark.parametrize("name", ["avro", "json-schema"])
def test_a_format_without_its_registry_says_what_to_set(name: str) -> None:
    with pytest.raises(ChainsUsageError, match=r"needs a schema registry: set CHAINS_REGISTRY_URL$"):
        named(name).writer(Ticket, Registry())


@pytest.mark.parametrize(
    ("name", "package", "install"),
    [
        ("avro", "fastavro", "avro"),
        ("avro", "confluent_kafka.schema_registry", "registry"),
        ("json-schema", "confluent_kafka.schema_registry", "registry"),
    ],
)
def test_a_package_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, package: str, install: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    registry = Registry(RegistrySettings(url="http://127.0.0.1:1"))
    with pytest.raises(ChainsUsageError, match=rf"^the format `{name}` .*: pip install 'chains-stream\[{install}\]'$"):
        named(name).writer(Ticket, registry)


def test_the_registry_is_among_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHAINS_REGISTRY_URL", "https://registry:8081")
    monkeypatch.setenv("CHAINS_REGISTRY_USERNAME", "ada")
    with pytest.raises(ChainsUsageError, match="CHAINS_REGISTRY: should have a username and a password, or neither"):
        from_environment()
    monkeypatch.setenv("CHAINS_REGISTRY_PASSWORD", "very secret")
    found = from_environment().registry
    assert (found.url, found.username) == ("https://registry:8081", "ada")
    assert "very secret" not in repr(found)
    with pytest.raises(ChainsUsageError, match="registry_url: "):
        Settings.of(registry={"url": "https://ada:secret@registry"})
    with pytest.raises(ChainsUsageError, match="a token or a username, not both"):
        Settings.of(registry={"url": "http://r", "username": "a", "password": "b", "token": "c"})


def test_the_registry_is_shown_without_credentials() -> None:
    assert Registry(RegistrySettings.model_construct(url="http://ada:secret@host:81/x")).url == "http://host:81/x"


class Tree(msgspec.Struct):
    name: str
    pair: tuple[int, str] = (0, "")
    below: list["Tree"] = []


class Opened(msgspec.Struct, tag=True):
    by: str


class Closed(msgspec.Struct, tag=True):
    by: str


@pytest.mark.parametrize(
    ("kind", "value", "wrong"),
    [
        (Ticket, Ticket(7, "x"), {"id": "7", "subject": "x"}),
        (Model, Model(id=1, at=datetime(2026, 1, 1, tzinfo=UTC)), {"id": 1}),
        (list[Model], [Model(id=1, at=datetime(2026, 1, 1, tzinfo=UTC))], [{"id": 1}]),
        (Tree, Tree("a", (1, "b"), [Tree("c")]), {"name": "a", "pair": [1, 2]}),
        (Tree, Tree("a"), {"name": "a", "pair": [1, "x", 3]}),
        (Opened | Closed, Closed("x"), {"type": "Other", "by": "x"}),
        (dict[str, int | None], {"a": None}, {"a": "x"}),
        (Point, Point(1.0, np.zeros(2, np.float32)), {"x": 1.0, "grid": [0]}),
    ],
)
def test_the_json_schema_of_a_type_is_a_document_by_itself(kind: Any, value: Any, wrong: Any) -> None:
    schema = JsonSchema().schema(kind)
    assert schema["$schema"] == "http://json-schema.org/draft-07/schema#"
    jsonschema.Draft7Validator.check_schema(schema)
    validator = jsonschema.Draft7Validator(schema)
    validator.validate(msgspec.json.decode(written(Json(), kind, value)))
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(wrong)


class Kind(Enum):
    URGENT = "urgent"


class Pair(NamedTuple):
    left: int
    right: str


class Row(TypedDict):
    id: int


@pytest.mark.parametrize(
    ("key", "kind", "value", "expected"),
    [
        ("subject", Ticket, Ticket(7, "é"), b"\xc3\xa9"),
        ("id", Ticket, Ticket(7, "x"), b"7"),
        ("score", Ticket, Ticket(7, "x"), None),
        ("tags", Ticket, Ticket(7, "x", ["a"]), b'["a"]'),
        ("id", Model, Model(id=1, at=datetime(2026, 1, 1, tzinfo=UTC)), b"1"),
        ("right", Pair, Pair(1, "x"), b"x"),
        ("id", Row, {"id": 5}, b"5"),
        ("id", dict[str, Any], {"id": True}, b"true"),
        ("id", dict[str, Any], {}, None),
        (lambda value: value["kind"], dict[str, Any], {"kind": Kind.URGENT}, b"urgent"),
        (lambda _: b"\xff", Ticket, Ticket(7, "x"), b"\xff"),
        (lambda _: uuid.UUID(int=1), Ticket, Ticket(7, "x"), b"00000000-0000-0000-0000-000000000001"),
        (lambda _: {"b": 1, "a": 2}, Ticket, Ticket(7, "x"), b'{"a":2,"b":1}'),
    ],
)
def test_keys(key: Any, kind: Any, value: Any, expected: bytes | None) -> None:
    assert keying(key, kind)(value) == expected


def test_a_key_that_is_no_field_is_found_at_once() -> None:
    with pytest.raises(ChainsUsageError, match=r"^the key `ident` is no field of `Ticket`; its fields are: `id`, "):
        keying("ident", Ticket)
    with pytest.raises(ChainsUsageError, match=r"^the key `id` names a field, and `str` has none: give a function"):
        keying("id", str)


def test_a_key_that_cannot_be_written_is_one_line() -> None:
    with pytest.raises(InvalidResultError, match=r"^the key can't be written: "):
        keying(lambda _: object(), Ticket)(Ticket(7, "x"))
    with pytest.raises(InvalidResultError, match="lone surrogate"):
        keying(lambda _: "\ud800", Ticket)(Ticket(7, "x"))
