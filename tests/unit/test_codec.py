"""Values to bytes and back: what goes in comes out, and what does not fit is said in one line."""

import dataclasses
import enum
import ipaddress
import json
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, NotRequired, TypedDict, TypeVar

import hypothesis.extra.numpy as hnp
import jsonschema
import msgspec
import numpy as np
import numpy.typing as npt
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chains_stream.codec import Codec, codec_of
from chains_stream.errors import InvalidArgumentError, InvalidResultError
from chains_stream.signature import Signature

T = TypeVar("T")
pack = msgspec.msgpack.encode


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Node(msgspec.Struct):
    value: int
    below: "list[Node]" = []


class Circle(msgspec.Struct, tag=True, rename="camel"):
    radius_mm: float


class Square(msgspec.Struct, tag=True, array_like=False, forbid_unknown_fields=True):
    side: int = 1


class Page(msgspec.Struct, Generic[T]):
    items: list[T]


@dataclasses.dataclass
class Span:
    start: datetime
    labels: set[str] = dataclasses.field(default_factory=set)


class Options(TypedDict):
    name: str
    depth: NotRequired[int]


class Pair(NamedTuple):
    left: str
    right: int = 3


class Person(pydantic.BaseModel):
    name: str
    born: date | None = None
    seen: datetime | None = None
    height: Decimal = Decimal(1)
    photo: bytes = b""
    friends: "list[Person]" = []


class Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="forbid", populate_by_name=False)

    when: datetime
    key: uuid.UUID = pydantic.Field(alias="theKey")
    pair: tuple[int, str] = (1, "a")
    took: timedelta = timedelta(0)
    kinds: frozenset[Color] = frozenset()


class Shouting(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(alias_generator=str.upper, serialize_by_alias=True)

    loud: int


class Cat(pydantic.BaseModel):
    kind: Literal["cat"] = "cat"
    lives: Annotated[int, pydantic.Field(ge=0, le=9)] = 9


class Dog(pydantic.BaseModel):
    kind: Literal["dog"] = "dog"


class Pet(pydantic.RootModel[Annotated[Cat | Dog, pydantic.Field(discriminator="kind")]]):
    pass


class Boxed(pydantic.BaseModel, Generic[T]):
    it: T


class Holder(msgspec.Struct):
    person: Person | None
    matrix: npt.NDArray[np.float32] | None = None


def codec(annotation: Any, *, default: Any = ..., stream: bool = False) -> Codec:
    """Make the codec of ``async def run_remote(self, x: annotation) -> annotation`` (or a stream of it)."""

    class Echo:
        async def run_remote(self, x: Any) -> Any:
            return x

        async def stream(self, x: Any) -> Any:
            yield x

    method = Echo.stream if stream else Echo.run_remote
    method.__annotations__.update({"x": annotation, "return": AsyncIterator[annotation] if stream else annotation})
    if default is not ...:
        method.__defaults__ = (default,)
    return codec_of(Signature.of(method, "Echo"))


def same(one: Any, other: Any) -> bool:
    """Compare values of any kind; arrays by type, shape and bytes."""
    if isinstance(one, np.ndarray):
        return (
            isinstance(other, np.ndarray)
            and (one.dtype, one.shape) == (other.dtype, other.shape)
            and one.tobytes() == other.tobytes()
        )
    if isinstance(one, Holder):
        return isinstance(other, Holder) and one.person == other.person and same(one.matrix, other.matrix)
    return type(one) is type(other) and bool(one == other)


finite = st.floats(allow_nan=False, allow_infinity=False)
ints = st.integers(-(2**63), 2**63 - 1)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
plain = st.recursive(
    st.none() | st.booleans() | ints | finite | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
# msgpack's and JSON's datetimes have microseconds, and msgspec reads the years that ISO 8601 writes in four digits.
moments = st.datetimes() | st.datetimes(min_value=datetime(1000, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001
nodes = st.recursive(
    st.builds(Node, ints), lambda inner: st.builds(Node, ints, st.lists(inner, max_size=2)), max_leaves=4
)
people = st.recursive(
    st.builds(Person, name=text, born=st.none() | st.dates(), seen=st.none() | moments, photo=text.map(str.encode)),
    lambda inner: st.builds(Person, name=text, friends=st.lists(inner, max_size=2)),
    max_leaves=3,
)
dtypes = (
    hnp.boolean_dtypes() | hnp.integer_dtypes() | hnp.floating_dtypes() | hnp.complex_number_dtypes()
    | hnp.datetime64_dtypes() | hnp.timedelta64_dtypes() | hnp.unicode_string_dtypes() | hnp.byte_string_dtypes()
)  # fmt: skip
arrays = hnp.arrays(dtypes, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))

FAMILIES: dict[str, tuple[Any, st.SearchStrategy[Any]]] = {
    "none": (None, st.none()),
    "bool": (bool, st.booleans()),
    "int": (int, st.integers(-(2**63), 2**64 - 1)),
    "float": (float, finite),
    "str": (str, text),
    "bytes": (bytes, st.binary()),
    "bytearray": (bytearray, st.binary().map(bytearray)),
    "memoryview": (memoryview, st.binary().map(memoryview)),
    "decimal": (Decimal, st.decimals(allow_nan=False, allow_infinity=False)),
    "uuid": (uuid.UUID, st.uuids()),
    "datetime": (datetime, moments),
    "date": (date, st.dates()),
    "time": (time, st.times()),
    "timedelta": (timedelta, st.timedeltas(min_value=timedelta(-10_000), max_value=timedelta(10_000))),
    "any": (Any, plain),
    "optional": (int | None, st.none() | ints),
    "union": (int | str | list[bool] | None, st.none() | ints | text | st.lists(st.booleans())),
    "literal": (Literal["a", 1] | None, st.sampled_from(["a", 1, None])),
    "enum": (Color, st.sampled_from(Color)),
    "int enum": (Level, st.sampled_from(Level)),
    "list": (list[int], st.lists(ints)),
    "sequence": (Sequence[str], st.lists(text)),
    "tuple": (tuple[int, str], st.tuples(ints, text)),
    "tuple of any length": (tuple[Color, ...], st.lists(st.sampled_from(Color)).map(tuple)),
    "set": (set[int], st.sets(ints)),
    "frozenset": (frozenset[str], st.frozensets(text)),
    "dict": (dict[str, list[int]], st.dictionaries(text, st.lists(ints))),
    "mapping of int": (Mapping[int, float], st.dictionaries(ints, finite)),
    "dict of uuid": (dict[uuid.UUID, date], st.dictionaries(st.uuids(), st.dates())),
    "constrained": (Annotated[int, msgspec.Meta(ge=0, lt=9, description="a digit")], st.integers(0, 8)),
    "struct": (Node, nodes),
    "tagged structs": (Circle | Square, st.builds(Circle, finite) | st.builds(Square, ints)),
    "generic struct": (Page[Page[int]], st.builds(Page, st.lists(st.builds(Page, st.lists(ints))))),
    "dataclass": (Span, st.builds(Span, moments, st.sets(text))),
    "typed dict": (Options, st.fixed_dictionaries({"name": text}, optional={"depth": ints})),
    "named tuple": (Pair, st.builds(Pair, text, ints)),
    "model": (Person, people),
    "models in containers": (
        dict[str, list[Cat | None]],
        st.dictionaries(text, st.lists(st.just(Cat(lives=3)) | st.none())),
    ),
    "strict model": (
        Strict,
        st.builds(Strict, when=moments, theKey=st.uuids(), kinds=st.frozensets(st.sampled_from(Color))),
    ),
    "model that writes aliases": (Shouting, st.builds(Shouting, LOUD=ints)),
    "root model": (Pet, st.builds(Pet, st.builds(Cat, lives=st.integers(0, 9)) | st.builds(Dog))),
    "generic model": (Boxed[list[Dog]], st.builds(Boxed[list[Dog]], it=st.lists(st.builds(Dog)))),
    "array": (np.ndarray, arrays),
    "array of a dtype": (npt.NDArray[np.float32], hnp.arrays(np.float32, (2, 3))),
    "array of a kind of dtype": (npt.NDArray[np.integer], hnp.arrays(hnp.integer_dtypes(), 3)),
    "array of dimensions": (np.ndarray[tuple[int, int], np.dtype[np.bool_]], hnp.arrays(bool, (2, 2))),
    "foreign values in a struct": (
        Holder,
        st.builds(Holder, st.none() | people, st.none() | hnp.arrays(np.float32, (2,))),
    ),
}

CODECS = {name: (codec(annotation), codec(annotation, stream=True)) for name, (annotation, _) in FAMILIES.items()}


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_what_goes_in_comes_out(family: str, data: st.DataObject) -> None:
    value = data.draw(FAMILIES[family][1])
    unary, stream = CODECS[family]

    sent = unary.encode_arguments((value,), {})
    assert sent == unary.encode_arguments((), {"x": value})
    assert same(unary.decode_arguments(sent)["x"], value)
    assert same(unary.decode_result(unary.encode_result(value)), value)
    assert same(stream.decode_result(msgspec.Raw(stream.encode_result(value))), value)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_what_goes_through_json_comes_out(family: str, data: st.DataObject) -> None:
    value = data.draw(FAMILIES[family][1])
    unary, stream = CODECS[family]

    arguments = unary.arguments_to_json(unary.encode_arguments((value,), {}))
    assert same(unary.decode_arguments(unary.arguments_from_json(arguments))["x"], value)
    result = stream.result_to_json(memoryview(stream.encode_result(value)))
    assert same(stream.decode_result(stream.result_from_json(result)), value)

    if family == "strict model":
        return  # pydantic documents an alias that, unless told to, it does not write
    schema = unary.schema()
    components = {"components": {"schemas": schema["$defs"]}}
    check = jsonschema.Draft202012Validator
    check.check_schema(components | schema["arguments"])
    check(components | schema["arguments"]).validate(json.loads(arguments))
    check(components | schema["result"]).validate(json.loads(result))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(list(CODECS)), st.binary(max_size=30) | plain.map(pack) | plain.map(lambda v: pack({"x": v})))
def test_no_bytes_raise_anything_but_our_errors(family: str, data: bytes) -> None:
    for method, error in (
        (CODECS[family][0].decode_arguments, InvalidArgumentError),
        (CODECS[family][0].arguments_to_json, InvalidArgumentError),
        (CODECS[family][0].decode_result, InvalidResultError),
        (CODECS[family][0].result_to_json, InvalidResultError),
    ):
        _raises_one_line_or_nothing(method, data, error)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(list(CODECS)),
    st.binary(max_size=30) | plain.map(msgspec.json.encode) | plain.map(lambda v: msgspec.json.encode({"x": v})),
)
def test_no_json_raises_anything_but_our_errors(family: str, data: bytes) -> None:
    _raises_one_line_or_nothing(CODECS[family][0].arguments_from_json, data, InvalidArgumentError)
    _raises_one_line_or_nothing(CODECS[family][0].result_from_json, data, InvalidResultError)


def _raises_one_line_or_nothing(method: Callable[[bytes], object], data: bytes, error: type[Exception]) -> None:
    try:
        method(data)
    except error as raised:
        assert "\n" not in str(raised)  # noqa: PT017 - raising is allowed here, and not asked for
        assert str(raised).startswith("Echo.run_remote: ")  # noqa: PT017


class Many:
    async def run_remote(self, a: int, b: str = "b", c: list[int] = [1], *, d: bool = False, e: float) -> str:  # noqa: B006
        return f"{a}{b}{c}{d}{e}"


class No:
    async def run_remote(self) -> None: ...


many = codec_of(Signature.of(Many.run_remote, "Many"))
no = codec_of(Signature.of(No.run_remote, "No"))


def test_a_call_binds_as_python_binds_it() -> None:
    defaults = {"b": "b", "c": [1], "d": False}
    assert many.decode_arguments(many.encode_arguments((1,), {"e": 2.0})) == {"a": 1, **defaults, "e": 2.0}
    every = {"a": 1, "b": "x", "c": [], "d": True, "e": 0.5}
    assert many.decode_arguments(many.encode_arguments((1, "x", []), {"d": True, "e": 0.5})) == every
    assert many.decode_arguments(many.encode_arguments((), every)) == every
    assert no.decode_arguments(no.encode_arguments((), {})) == {}


def test_arguments_travel_as_a_map_that_leaves_out_defaults() -> None:
    assert msgspec.msgpack.decode(many.encode_arguments((1, "b"), {"e": 2.0, "d": False})) == {
        "a": 1,
        "c": [1],
        "e": 2.0,
    }


def test_a_mutable_default_is_nobody_elses() -> None:
    first = many.decode_arguments(many.encode_arguments((1,), {"e": 2.0}))
    first["c"].append(5)
    assert many.decode_arguments(pack({"a": 1, "e": 2.0}))["c"] == [1]
    person = codec(Person, default=Person(name="Ada"))
    person.decode_arguments(b"\x80")["x"].friends.append(Person(name="Bob"))
    assert person.decode_arguments(b"\x80")["x"] == Person(name="Ada")


@pytest.mark.parametrize(
    ("args", "kwargs", "message", "path"),
    [
        ((), {}, "misses the argument `a`; misses the argument `e`", "$.a"),
        ((1,), {}, "misses the argument `e`", "$.e"),
        ((1, "b", [], True, 2.0), {}, "takes 3 arguments by position, got 5; misses the argument `e`", "$.e"),
        ((1,), {"a": 2, "e": 1.0}, "got the argument `a` by name and by position", "$.a"),
        (
            (1,),
            {"f": 2, "e": 1.0},
            "got an unexpected argument `f`; its arguments are: `a`, `b`, `c`, `d`, `e`",
            "$.f",
        ),
    ],
)
def test_a_call_that_does_not_bind_names_the_argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], message: str, path: str
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        many.encode_arguments(args, kwargs)
    assert (str(caught.value), caught.value.path) == (f"Many.run_remote: {message}", path)


def test_a_call_of_what_takes_nothing() -> None:
    with pytest.raises(InvalidArgumentError, match=r"^No\.run_remote: takes 0 arguments by position, got 1$"):
        no.encode_arguments((1,), {})
    with pytest.raises(InvalidArgumentError, match="unexpected argument `a`; its arguments are: none"):
        no.encode_arguments((), {"a": 1})


WRONG: list[tuple[Any, Any, str, str | None]] = [
    (int, "1", "Expected `int`, got `str`", ""),
    (list[Node], [{"value": 1, "below": [{"value": "x"}]}], "Expected `int`, got `str`", "[0].below[0].value"),
    (Node, {}, "Object missing required field `value`", ""),
    (dict[str, int], {"a b": "c"}, "Expected `int`, got `str`", "[...]"),
    (dict[int, int], {"a": 1}, "Expected `int`, got `str`", ""),
    (Literal["a"], "b", "Invalid enum value 'b'", ""),
    (Annotated[int, msgspec.Meta(ge=1)], 0, "Expected `int` >= 1", ""),
    (Circle | Square, {"type": "Oval"}, "Invalid value 'Oval'", ".type"),
    (Square, {"type": "Square", "size": 1}, "Object contains unknown field `size`", ""),
    (Person, {"name": 1}, "Input should be a valid string", ".name"),
    (list[Person], [{"name": "a", "friends": [{}]}], "Field required", "[0].friends[0].name"),
    (Holder, {"person": {"name": "a", "born": "never"}}, "Input should be a valid date or datetime", ".person.born"),
    (Pet, {"kind": "fish"}, "Input tag 'fish' found using 'kind' does not match any of the expected tags", ""),
]


@pytest.mark.parametrize(("annotation", "value", "message", "path"), WRONG)
def test_what_does_not_fit_is_named_with_its_path(annotation: Any, value: Any, message: str, path: str) -> None:
    it = codec(annotation)
    for data, decode in (
        (pack({"x": value}), it.decode_arguments),
        (msgspec.json.encode({"x": value}), it.arguments_from_json),
    ):
        with pytest.raises(InvalidArgumentError) as caught:
            decode(data)
        said = str(caught.value)
        assert said.startswith(f"Echo.run_remote: {message}")
        assert said.endswith(f"`$.x{path}`")
        assert caught.value.path is not None
        assert caught.value.path.startswith(f"$.x{path}")
    for data, decode_result in (
        (pack(value), it.decode_result),
        (msgspec.json.encode(value), it.result_from_json),
    ):
        with pytest.raises(InvalidResultError) as failed:
            decode_result(data)
        assert str(failed.value).startswith(f"Echo.run_remote: invalid result: {message}")


def test_a_chunk_that_does_not_fit_is_called_one() -> None:
    with pytest.raises(InvalidResultError, match=r"^Echo\.run_remote: invalid chunk: Expected `int`, got `str`$"):
        codec(int, stream=True).decode_result(pack("a"))


def test_every_fault_of_a_model_is_said_in_one_line() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        codec(list[Person]).arguments_from_json(b'{"x": [{"name": "a"}, {"born": 1.5, "friends": [{"name": []}]}]}')
    assert str(caught.value) == (
        "Echo.run_remote: Field required - at `$.x[1].name`; "
        "Datetimes provided to dates should have zero time - e.g. be exact dates - at `$.x[1].born`; "
        "Input should be a valid string - at `$.x[1].friends[0].name`"
    )
    assert caught.value.path == "$.x[1].name"


@pytest.mark.parametrize(
    ("data", "message", "path"),
    [
        (pack({"a": 1}), "Object missing required field `e`", "$.e"),
        (pack({"a": 1, "e": 1.0, "f": 1}), "Object contains unknown field `f`", "$.f"),
        (pack([1]), "Expected `object`, got `array`", None),
        (b"", "the data is malformed: Input data was truncated", None),
        (b"\xc1", "the data is malformed", None),
        (b"\x81\xa1a\xd9", "the data is malformed: Input data was truncated", None),
        (b"\x81\xa1b\xa1\xff", "the data holds text that is not UTF-8", None),
    ],
)
def test_a_request_that_is_wrong_as_a_whole(data: bytes, message: str, path: str | None) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        many.decode_arguments(data)
    assert str(caught.value).startswith(f"Many.run_remote: {message}")
    assert caught.value.path == path


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b'{"a": NaN, "e": 1}', b'{"a": 1e999, "e": 1}', b"\xff"])
def test_json_that_is_wrong_as_a_whole(data: bytes) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^Many\.run_remote: [^\n]+$"):
        many.arguments_from_json(data)


def test_data_nested_too_deeply_is_refused() -> None:
    for decode, data in (
        (codec(Any).decode_arguments, b"\x81\xa1x" + b"\x91" * 100_000),
        (codec(Any).arguments_from_json, b'{"x":' + b"[" * 100_000),
    ):
        with pytest.raises(InvalidArgumentError, match="nested too deeply"):
            decode(data)


def looped() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (2**64, "an integer of more than 64 bits can't be sent"),
        (-(2**63) - 1, "an integer of more than 64 bits can't be sent"),
        ("\ud800", "text with a lone surrogate can't be sent"),
        (looped(), "the value is nested too deeply, or holds itself"),
        (object(), "values of type `object` can't be sent"),
        (lambda: 1, "values of type `function` can't be sent"),
        (1j, "values of type `complex` can't be sent"),
        (Path("a"), "values of type `PosixPath` can't be sent"),
        (Cat.model_construct(lives=2**64), "an integer of more than 64 bits can't be sent"),
        (np.array([object()]), "arrays of dtype `object` can't travel"),
        (np.zeros(1, "f4,i4"), "can't travel"),
        (np.zeros(1, "V3"), "arrays of dtype `|V3` can't travel"),
    ],
)
def test_a_value_that_can_not_be_sent_is_refused_in_one_line(value: Any, message: str) -> None:
    it = codec(Any)
    with pytest.raises(InvalidArgumentError) as caught:
        it.encode_arguments((value,), {})
    assert str(caught.value).startswith("Echo.run_remote: ")
    assert message in str(caught.value)
    assert caught.value.path == "$.x"
    with pytest.raises(InvalidResultError) as failed:
        it.encode_result(value)
    assert "\n" not in str(failed.value)
    assert message in str(failed.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_float_that_json_has_not_travels_in_msgpack_alone(value: float) -> None:
    it = codec(dict[str, list[float]])
    data = it.encode_result({"a": [1.0, value]})
    assert str(it.decode_result(data)["a"][1]) == str(value)
    with pytest.raises(InvalidResultError, match=rf"JSON has no `{value}` - at `\$\.a\[1\]`$"):
        it.result_to_json(data)
    with pytest.raises(InvalidArgumentError, match=rf"JSON has no `{value}` - at `\$\.x\.a\[1\]`$"):
        it.arguments_to_json(it.encode_arguments(({"a": [1.0, value]},), {}))


def test_bytes_that_look_like_a_nan_are_no_false_alarm() -> None:
    it = codec(bytes)
    assert it.result_to_json(it.encode_result(b"\xcb\x7f\xff\xca\xff\xff")) == b'"y3//yv//"'


def test_text_of_json_may_hold_half_a_pair_of_surrogates() -> None:
    with pytest.raises(InvalidArgumentError, match=r"^Echo\.run_remote: [^\n]+$"):
        codec(str).arguments_from_json(rb'{"x": "\ud800"}')


class PickyStruct(msgspec.Struct):
    value: int

    def __post_init__(self) -> None:
        if self.value == 1:
            msg = "one\nis not enough"
            raise ValueError(msg)
        if self.value == 2:
            raise KeyError(self.value)


@pytest.mark.parametrize(("value", "message"), [(1, "one is not enough"), (2, "KeyError: 2")])
def test_a_users_own_validation_is_a_typed_error(value: int, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^Echo.run_remote: {message}"):
        codec(PickyStruct).decode_arguments(pack({"x": {"value": value}}))


def test_numpy_scalars_travel_as_python_has_them() -> None:
    it = codec(Any)
    for given_value, value in ((np.float32(1.5), 1.5), (np.int64(3), 3), (np.bool_(True), True), (np.str_("a"), "a")):
        assert same(it.decode_result(it.encode_result(given_value)), value)
    assert same(it.decode_result(it.encode_result(np.longdouble(1.5))), 1.5)
    assert it.decode_result(it.encode_result({"a": [np.float64(2)]})) == {"a": [2.0]}


def test_arrays_travel_from_any_layout_and_arrive_writable() -> None:
    it = codec(np.ndarray)
    matrix = np.arange(12, dtype=">i4").reshape(3, 4)
    for array in (matrix, matrix.T, matrix[::2, ::-1], np.asfortranarray(matrix), np.array(1.5), np.empty((0, 3))):
        back = it.decode_result(it.encode_result(array))
        assert (back.dtype, back.shape) == (array.dtype, array.shape)
        assert np.array_equal(back, array)
        back += 1


def test_an_array_is_its_own_copy() -> None:
    it = codec(np.ndarray)
    data = bytearray(it.encode_result(np.zeros(3)))
    array = it.decode_result(data)
    data[:] = b"\xff" * len(data)
    assert array.tolist() == [0, 0, 0]


def test_an_array_in_json_is_what_truss_chains_reads() -> None:
    it = codec(npt.NDArray[np.float32])
    body = json.loads(it.result_to_json(it.encode_result(np.array([[1.0, 2.0]], np.float32))))
    assert body == {"data_b64": "AACAPwAAAEA=", "shape": [1, 2], "dtype": "float32"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [3]}, "Expected 12 bytes of array data for shape [3], got 8"),
        ({"shape": [-2]}, "Expected an array's `shape` as integers of 0 and more"),
        ({"shape": [2**62, 0]}, "Expected 0 bytes of array data"),
        ({"shape": [2**62, 4]}, "Expected "),
        ({"shape": [0, 2**62], "data": b""}, ""),
        ({"shape": [True, 2]}, "`shape`"),
        ({"shape": "2"}, "`shape`"),
        ({"shape": [1] * 65}, "`shape`"),
        ({"dtype": "O"}, "`dtype`"),
        ({"dtype": "object"}, "`dtype`"),
        ({"dtype": "f4,f4"}, "`dtype`"),
        ({"dtype": "V4"}, "`dtype`"),
        ({"dtype": "U0"}, "`dtype`"),
        ({"dtype": "(2,)f4"}, "`dtype`"),
        ({"dtype": "no" * 500}, "`dtype`"),
        ({"dtype": ["f4"]}, "`dtype`"),
        ({"dtype": "<f8", "shape": [1]}, "Expected an array of `float32`, got `float64`"),
        ({"dtype": "<i4"}, "Expected an array of `float32`, got `int32`"),
        ({"data": "text"}, "`data` as `bytes`"),
        ({"data": None}, "`data` as `bytes`"),
        ({"more": 1}, "Expected an array as an object of `dtype`, `shape`, `data`"),
    ],
)
def test_a_crafted_array_is_refused(change: dict[str, Any], message: str) -> None:
    it = codec(npt.NDArray[np.float32])
    good = {"dtype": "<f4", "shape": [2], "data": bytes(8)}
    assert it.decode_result(pack(good)).tolist() == [0, 0]
    with pytest.raises(InvalidResultError) as caught:
        it.decode_result(pack(good | change))
    assert "\n" not in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("data", ['"!!!"', "3", "null", '"AAA"', '"ÄÄÄÄ"'])
def test_a_crafted_array_in_json_is_refused(data: str) -> None:
    body = f'{{"x": {{"data_b64": {data}, "shape": [2], "dtype": "float32"}}}}'
    with pytest.raises(InvalidArgumentError, match=r"base64 text - at `\$\.x`"):
        codec(npt.NDArray[np.float32]).arguments_from_json(body.encode())


def test_a_strict_model_takes_json_as_pydantic_does() -> None:
    body = b'{"x": {"when": "2026-01-02T03:04:05Z", "theKey": "12345678-1234-5678-1234-567812345678", "took": "PT1S"}}'
    it = codec(Strict)
    found = it.decode_arguments(it.arguments_from_json(body))["x"]
    assert (found.when, found.took) == (datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), timedelta(seconds=1))
    with pytest.raises(InvalidArgumentError, match=r"valid integer - at `\$\.x\.pair\[0\]`"):
        it.arguments_from_json(body.replace(b'"took"', b'"pair": ["1", "a"], "took"'))


def test_a_model_is_written_by_name_in_msgpack_and_by_its_own_rule_in_json() -> None:
    it, shouted = codec(Shouting), Shouting.model_validate({"LOUD": 1})
    data = it.encode_result(shouted)
    assert msgspec.msgpack.decode(data) == {"loud": 1}
    assert it.result_to_json(data) == b'{"LOUD":1}'
    assert it.decode_result(pack({"LOUD": 1})) == shouted


class Exotic(pydantic.BaseModel):
    path: Path = Path("/a")
    address: ipaddress.IPv4Address = ipaddress.IPv4Address("10.0.0.1")
    secret: pydantic.SecretStr = pydantic.SecretStr("hush")
    url: pydantic.HttpUrl = pydantic.HttpUrl("http://a.b/c")


def test_what_only_pydantic_knows_travels_inside_of_a_model() -> None:
    it = codec(Exotic)
    found = it.decode_result(it.encode_result(Exotic()))
    assert found == Exotic()
    assert found.secret.get_secret_value() == "hush"


def test_a_models_bytes_that_are_no_text_have_no_json_without_its_say() -> None:
    it = codec(Person)
    data = it.encode_result(Person(name="a", photo=b"\xff"))
    assert it.decode_result(data).photo == b"\xff"
    with pytest.raises(InvalidResultError):
        it.result_to_json(data)


def test_the_schema_documents_arguments_and_defaults() -> None:
    class Search:
        async def run_remote(
            self,
            query: Annotated[str, msgspec.Meta(description="what to look for", min_length=1)],
            near: list[Cat] = [Cat(lives=2)],  # noqa: B006, B008
            limit: int = 10,
        ) -> AsyncIterator[Person]:
            yield Person(name=f"{query}{near}{limit}")

    schema = codec_of(Signature.of(Search.run_remote, "Search")).schema()
    properties = schema["arguments"]["properties"]
    assert properties["query"] == {"type": "string", "minLength": 1, "description": "what to look for"}
    assert properties["near"]["default"] == [{"kind": "cat", "lives": 2}]
    assert properties["limit"] == {"type": "integer", "default": 10}
    assert schema["arguments"]["required"] == ["query"]
    assert schema["arguments"]["additionalProperties"] is False
    assert schema["result"] == {"$ref": "#/components/schemas/Person"}
    assert set(schema["$defs"]) == {"Cat", "Person"}


def test_a_model_and_a_struct_of_one_name_have_two_schemas() -> None:
    model = pydantic.create_model("Node", cat=(Cat, ...))
    schema = codec(tuple[Node, model]).schema()  # type: ignore[valid-type] # made while running
    assert set(schema["$defs"]) == {"Node", "Node.model", "Cat.model"}


def test_a_codec_is_made_once_and_goes_with_its_signature() -> None:
    signature = Signature.of(Many.run_remote, "Many")
    assert codec_of(signature) is codec_of(signature)
    assert codec_of(signature) is not many


def test_numpy_is_not_imported_for_those_who_do_without() -> None:
    code = "import sys, chains_stream.codec, chains_stream.checks; sys.exit('numpy' in sys.modules)"
    root = str(Path(__file__).parents[2])
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


def test_a_field_whose_name_has_line_ends_is_named_on_one_line() -> None:
    """Of a pydantic model that takes no other fields the name of a wrong one is the sender's own text."""
    with pytest.raises(InvalidArgumentError) as caught:
        codec(Strict).arguments_from_json(b'{"x": {"a\\nb": 1}}')
    assert "\n" not in str(caught.value)
