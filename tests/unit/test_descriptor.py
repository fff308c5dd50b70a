"""What a type is described as, and what is said of those that can't travel."""

import dataclasses
import enum
import re
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, ForwardRef, Generic, Self, TypeVar

import attrs
import msgspec
import numpy as np
import numpy.typing as npt
import pydantic
import pydantic.dataclasses
import pytest
import typing_extensions

from chains_stream.descriptor import Describer, UnsupportedTypeError, describe, describe_value

T = TypeVar("T")


class Node(msgspec.Struct):
    value: int
    below: "list[Node]" = []


class Box(msgspec.Struct, Generic[T]):
    it: T


@dataclasses.dataclass
class Base(Generic[T]):
    item: T
    more: "Base[T] | None" = None


@dataclasses.dataclass
class Lists(Base[list[T]], Generic[T]):
    pass


@attrs.define
class Attrs:
    a: int
    b: list[int] = attrs.field(factory=list)


class Tree(pydantic.BaseModel):
    children: "list[Tree]" = []
    where: Path = Path("/a")


class Color(enum.Enum):
    RED = 1


class Plain:
    pass


class Cat(pydantic.BaseModel):
    x: int


class Dog(pydantic.BaseModel):
    x: int


class Swapped(pydantic.BaseModel):
    a: int = pydantic.Field(alias="b")
    b: int


class WithArray(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)

    a: np.ndarray | None


@pydantic.dataclasses.dataclass
class PydanticDataclass:
    a: int


@pytest.mark.parametrize(
    ("annotation", "described"),
    [
        (None, "null"),
        (int | None, {"union": ["int", "null"]}),
        (list, {"list": ["any"]}),
        (tuple, {"items": "any"}),
        (tuple[()], {"tuple": []}),
        (dict[str, Any], {"dict": ["str", "any"]}),
        (Annotated[int, msgspec.Meta(ge=1, title="x")], {"type": "int", "where": {"ge": 1}}),
        (int | msgspec.UnsetType, "int"),
        (T, "any"),
        (npt.NDArray[np.float32], {"ndarray": ["float32"], "ndim": None}),
        (np.ndarray, {"ndarray": [], "ndim": None}),
        (np.ndarray[tuple[int], np.dtype[np.floating | np.int8]], {"ndarray": ["floating", "int8"], "ndim": 1}),
    ],
)
def test_a_type_without_classes(annotation: Any, described: Any) -> None:
    assert describe(annotation) == {"type": described, "classes": {}}


def test_a_class_may_hold_itself() -> None:
    fields = [
        {"name": "below", "type": {"list": [{"class": "Node"}]}, "default": []},
        {"name": "value", "type": "int"},
    ]
    body = {"struct": fields, "array_like": False, "tag": None, "forbid_unknown_fields": False}
    assert describe(Node) == {"type": {"class": "Node"}, "classes": {"Node": body}}


def test_generics_are_described_by_their_arguments() -> None:
    assert set(describe(Box[Box[int]])["classes"]) == {'Box[{"class":"Box[\\"int\\"]"}]', 'Box["int"]'}
    (inherited,) = (body for name, body in describe(Lists[int])["classes"].items() if name.startswith("Lists"))
    assert {"name": "item", "type": {"list": ["int"]}} in inherited["dataclass"]


def test_attrs_are_described_as_dataclasses_are() -> None:
    fields = [{"name": "b", "type": {"list": ["int"]}, "default": []}, {"name": "a", "type": "int"}]
    assert describe(Attrs)["classes"] == {"Attrs": {"dataclass": fields}}


def test_a_model_may_hold_itself_and_what_only_pydantic_knows() -> None:
    found = describe(Tree)["classes"]
    assert set(found) == {"Tree", "Path in a model"}


@pytest.mark.parametrize(
    ("annotation", "said"),
    [
        (Plain, "`Plain` can't travel between Chainlets; use builtins, a msgspec Struct"),
        (list[dict[str, Plain]], "`Plain` can't travel"),
        (Base[complex], "`complex` can't travel"),
        (object, "`object` says nothing of the value; use `Any`"),
        (Callable[[int], int], "`Callable[[int], int]` can't travel"),
        (Self, "`Self` can't travel"),
        (Path, "`Path` can't travel"),
        (list[AsyncIterator[int]], "`AsyncIterator[int]` is a stream, which only a whole result can be; use a `list`"),
        (Iterable[int], "`Iterable[int]` is a stream"),
        (np.float32, "`float32` is a scalar of numpy's; use `int`, `float`, `bool` or an array"),
        (npt.NDArray[np.object_], "arrays of `object_` can't travel; use a dtype of numbers"),
        (npt.NDArray[np.void], "arrays of `void` can't travel"),
        (
            Cat | Dog,
            "of several pydantic models make one, `pydantic.RootModel[A | B]`, or use msgspec Structs with tags",
        ),
        (Cat | int, "`Cat | int`: type unions containing a custom type"),
        (list[int] | set[int], "`list[int] | set[int]`: type unions may not contain more than one array-like"),
        (Node | Box[int], "all Struct types must be tagged"),
        (PydanticDataclass, "`PydanticDataclass` is a dataclass of pydantic's; use `pydantic.BaseModel`"),
        (pydantic.PositiveInt, "`int` has pydantic's `Gt(gt=0)`, which only models check; use `msgspec.Meta(…)`"),
        (Annotated[str, pydantic.Field(min_length=1)], "`str` has pydantic's `MinLen(min_length=1)`"),
        (Annotated[str, msgspec.Meta(ge=1)], "can only set `ge` on a numeric type"),
        (Swapped, "`Swapped.a` has another field's name, `b`, as its alias; rename one"),
        (WithArray, "`WithArray.a` is an array, which pydantic can't read; use `NumpyArrayField` for it"),
        (ForwardRef("Nowhere"), "is a name that can't be found"),
        ("Nowhere", "`Nowhere` is a name that can't be found"),
        (msgspec.Raw, "`Raw` can't travel"),
        (3, "`3` can't travel"),
    ],
)
def test_what_can_not_travel_is_said_with_what_can(annotation: Any, said: str) -> None:
    with pytest.raises(UnsupportedTypeError, match=re.escape(said)) as caught:
        describe(annotation)
    assert "\n" not in str(caught.value)


def test_an_alias_without_end_is_refused() -> None:
    endless: Any = typing_extensions.TypeAliasType("endless", "list[endless]")
    with pytest.raises(UnsupportedTypeError):
        describe(endless)


def test_a_type_that_failed_once_fails_again() -> None:
    describer = Describer()
    for _ in range(2):
        with pytest.raises(UnsupportedTypeError):
            describer.describe(Base[complex])
    assert describer.describe(int) == "int"


@pytest.mark.parametrize(
    ("value", "described"),
    [
        (True, True),
        (1.5, 1.5),
        (float("nan"), {"float": "nan"}),
        (b"\x01", {"bytes": "01"}),
        (Color.RED, {"enum": 1}),
        ({2, 1}, {"set": [1, 2]}),
        ({"b": 1, "a": [None]}, {"dict": [["a", [None]], ["b", 1]]}),
        (Node(1), {"object": "Node", "fields": {"value": 1, "below": []}}),
        (Cat(x=1), {"object": "Cat", "fields": {"x": 1}}),
        (Base(1), {"object": "Base", "fields": {"item": 1, "more": None}}),
        (Attrs(1), {"object": "Attrs", "fields": {"a": 1, "b": []}}),
        (np.float32(1.5), {"numpy": 1.5}),
        (
            np.zeros(1, np.int8),
            {"numpy": {"dict": [["data", {"bytes": "00"}], ["dtype", "|i1"], ["shape", [1]]]}},
        ),
        (describe, {"callable": "describe"}),
        (Plain(), {"object": "Plain"}),
    ],
)
def test_a_default_is_described_by_value(value: Any, described: Any) -> None:
    assert describe_value(value) == described
