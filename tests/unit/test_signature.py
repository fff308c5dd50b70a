"""The digest of a signature: what changes it, what does not, and that it is the same everywhere.

Run as a program, this file prints its golden digests as JSON: for another interpreter, or another hash seed.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, NewType, NotRequired, Protocol, TypedDict, TypeVar
from uuid import UUID

import msgspec
import numpy as np
import numpy.typing as npt
import pydantic
import pytest

from chains_stream.errors import ChainsUsageError, InvalidChainError
from chains_stream.signature import MISSING, Signature, read, topic_part

T = TypeVar("T")


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Point(msgspec.Struct, array_like=True, tag=True):
    x: float
    y: float = 0.0


class Circle(msgspec.Struct, tag="circle", rename="camel", forbid_unknown_fields=True):
    radius_mm: Annotated[float, msgspec.Meta(gt=0, description="in millimetres")]
    color: Color = Color.RED
    inside: list[Circle] = []


class Square(msgspec.Struct, tag="square"):
    side: int


class Page(msgspec.Struct, Generic[T]):
    items: list[T]
    following: Page[T] | None = None


@dataclasses.dataclass
class Span(Generic[T]):
    start: T
    end: T | None = None
    labels: set[str] = dataclasses.field(default_factory=set)


class Options(TypedDict):
    name: str
    depth: NotRequired[int]


class Pair(NamedTuple):
    left: str
    right: int = 3


class Person(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    name: str = pydantic.Field(min_length=1, description="the full name")
    born: date | None = None
    tags: list[Annotated[str, pydantic.Field(pattern="^[a-z]+$")]] = []
    manager: Person | None = pydantic.Field(default=None, alias="boss")


UserId = NewType("UserId", int)


class Golden(Protocol):
    """One method for each family of types."""

    async def nothing(self) -> None: ...
    async def scalars(self, a: int, b: float, c: str, d: bytes, *, e: bool, f: None) -> str: ...
    async def defaults(self, a: int = 1, b: str = "é", c: float = 0.1, *, d: list[int] = [1]) -> None: ...  # noqa: B006
    async def times(self, a: datetime, b: date, c: timedelta, d: UUID, e: Decimal = Decimal("1.50")) -> datetime: ...
    async def containers(self, a: list[int], b: dict[str, set[int]], c: tuple[int, ...], d: tuple[int, str]) -> Any: ...
    async def abstract(self, a: Sequence[int], b: Mapping[str, frozenset[int]]) -> list[Any]: ...
    async def unions(self, a: int | str | None, b: Literal["x", 1] | None, c: Circle | Square | list[int]) -> Color: ...
    async def constrained(self, a: Annotated[int, msgspec.Meta(ge=0, lt=9)], b: UserId = UserId(3)) -> Point: ...
    async def generic(self, a: Page[int], b: Page[Page[str]], c: Span[float]) -> Pair: ...
    async def typed_dicts(self, a: Options, b: Pair = Pair("x")) -> Options: ...  # noqa: B008
    async def models(self, a: Person, b: list[Person] = []) -> Person | None: ...  # noqa: B006
    async def arrays(self, a: npt.NDArray[np.float32], b: np.ndarray[Any, Any]) -> npt.NDArray[np.bool_]: ...
    async def moment(self, a: datetime = datetime(2026, 1, 2, tzinfo=UTC), b: tuple[int, ...] = (1, 2)) -> None: ...
    async def stream(self, a: str) -> AsyncIterator[str]:
        yield a

    async def generator(self, a: float) -> AsyncGenerator[Circle, None]:
        yield Circle(a)


# Digests that were given out: a change of one moves the topic of every such Chainlet.
GOLDEN = {
    "nothing": "30648f3b",
    "scalars": "816293ba",
    "defaults": "32c876cd",
    "times": "0b570cb2",
    "containers": "35778ff3",
    "abstract": "1bdce6cb",
    "unions": "47b81b18",
    "constrained": "5fde21dd",
    "generic": "9acca0f7",
    "typed_dicts": "f5bc263d",
    "models": "e27debe3",
    "arrays": "09e15f2a",
    "moment": "a68f37d5",
    "stream": "38fffda3",
    "generator": "69076b0a",
}


def digests() -> dict[str, str]:
    methods = [name for name in vars(Golden) if not name.startswith("_")]
    return {name: Signature.of(getattr(Golden, name), "Golden").digest for name in methods}


def test_the_digests_are_those_of_every_python_and_every_release() -> None:
    assert digests() == GOLDEN
    assert len(set(GOLDEN.values())) == len(GOLDEN)


@pytest.mark.parametrize("seed", ["0", "1", "4294967295"])
def test_the_digests_do_not_hang_on_the_hash_seed(seed: str) -> None:
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": root}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == GOLDEN


_HEADER = """
import dataclasses, enum, typing
from collections.abc import *
from typing import *
import msgspec, numpy as np, numpy.typing as npt, pydantic
from msgspec import Meta, Struct
from pydantic import BaseModel, Field
"""

_numbers = itertools.count()


def signature_of(text: str) -> Signature:
    """Read the first method of the last class of a module's source."""
    names: dict[str, Any] = {"__name__": f"module_{next(_numbers)}"}
    exec(compile(_HEADER + textwrap.dedent(text), "<test>", "exec", dont_inherit=True), names)
    methods = [value for value in vars(list(names.values())[-1]).values() if callable(value)]
    return Signature.of(methods[0], "X")


def method(arguments: str, result: str = "None", before: str = "") -> str:
    return f"{textwrap.dedent(before)}\nclass X:\n    async def run_remote(self, {arguments}) -> {result}: ...\n"


def stream(result: str) -> str:
    return f"class X:\n    async def run_remote(self) -> {result}:\n        yield 1"


STRUCT = "class S(Struct):\n    x: int = 1"
MODEL = "class M(BaseModel):\n    x: int = 1"
DATACLASS = "@dataclasses.dataclass\nclass D:\n    x: int = 1"
GENERIC = "T = TypeVar('T')\nclass G(Struct, Generic[T]):\n    x: T"

SAME = {
    "formatting, comments, docstrings and bodies": (
        method("a: list[int], b: int = 16", "str"),
        """
        class Y:  # another name
            '''Says what it does.'''
            async def run_remote(
                self,
                a: list[ int ],  # a comment
                b: int = 0x10,
            ) -> (str):
                '''And how.'''
                return str(a[b])
        """,
    ),
    "postponed annotations": (method("a: list[int]", "str | None"), method("a: 'list[int]'", "'str | None'")),
    "ways to write a type": (method("a: Optional[int], b: List[str]"), method("a: None | int, b: list[str]")),
    "the order of a union": (method("a: int | str | None"), method("a: None | str | int")),
    "the order of a literal": (method("a: Literal['x', 'y']"), method("a: Literal['y', 'x']")),
    "sequences": (method("a: Sequence[int], b: Mapping[str, int]"), method("a: list[int], b: dict[str, int]")),
    "the order of arguments": (method("a: int, b: str"), method("b: str, a: int")),
    "by keyword only": (method("a: int, b: str"), method("a: int, *, b: str")),
    "a plain def": (method("a: int"), method("a: int").replace("async def", "def")),
    "a documented argument": (
        method("a: int"),
        method("a: Annotated[int, Meta(description='what', title='A', examples=[1], extra={'k': 1})]"),
    ),
    "a note": (method("a: int"), method("a: Annotated[int, 'in seconds', Field(description='what')]")),
    "a new type": (method("a: int"), method("a: UserId", before="UserId = NewType('UserId', int)")),
    "the order of fields": (
        method("a: S", before="class S(Struct):\n    x: int\n    y: str"),
        method("a: S", before="class S(Struct):\n    '''Documented.'''\n    y: str\n    x: int"),
    ),
    "what a Struct is like in memory": (
        method("a: S", before=STRUCT),
        method("a: S", before=STRUCT.replace("Struct", "Struct, frozen=True, kw_only=True, omit_defaults=True")),
    ),
    "the names of an enum's members": (
        method("a: E", before="class E(enum.Enum):\n    A = 1\n    B = 2"),
        method("a: E", before="class E(enum.Enum):\n    TWO = 2\n    ONE = 1"),
    ),
    "documentation of a model": (
        method("a: M", before="class M(BaseModel):\n    x: int = 1\n    y: list[str] = []"),
        method(
            "a: M",
            before="""
            class M(BaseModel):
                'Documented.'
                model_config = pydantic.ConfigDict(title='The model', frozen=True)
                y: list[Annotated[str, Field(title='it')]] = Field(default_factory=list, description='all')
                x: int = Field(1, title='X', examples=[2])
            """,
        ),
    ),
    "a factory of an empty list": (
        method("a: S", before="class S(Struct):\n    x: list[int] = []"),
        method("a: S", before="class S(Struct):\n    x: list[int] = msgspec.field(default_factory=list)"),
    ),
    "AsyncGenerator": (stream("AsyncIterator[int]"), stream("AsyncGenerator[int, None]")),
}

DIFFERENT = {
    "a name": (method("a: int"), method("b: int")),
    "a type": (method("a: int"), method("a: float")),
    "one more argument": (method("a: int"), method("a: int, b: int = 0")),
    "a default": (method("a: int = 1"), method("a: int = 2")),
    "no default": (method("a: int = 1"), method("a: int")),
    "a default of None": (method("a: int | None"), method("a: int | None = None")),
    "a mutable default": (method("a: list[int] = []"), method("a: list[int] = [1]")),
    "a default object": (method("a: S = S(1)", before=STRUCT), method("a: S = S(2)", before=STRUCT)),
    "a default in bytes": (method("a: bytes = b'1'"), method("a: bytes = b'2'")),
    "the result": (method("a: int", "int"), method("a: int", "str")),
    "no result": (method("a: int", "int"), method("a: int", "int | None")),
    "streaming": (method("", "int"), stream("AsyncIterator[int]")),
    "a chunk": (stream("AsyncIterator[int]"), stream("AsyncIterator[str]")),
    "a constraint": (method("a: Annotated[int, Meta(ge=1)]"), method("a: Annotated[int, Meta(gt=1)]")),
    "a constraint inside a union": (method("a: int | None"), method("a: Annotated[int, Meta(ge=1)] | None")),
    "a pattern": (method("a: Annotated[str, Meta(pattern='a')]"), method("a: Annotated[str, Meta(pattern='b')]")),
    "a literal": (method("a: Literal['x']"), method("a: Literal['x', 'y']")),
    "a key": (method("a: dict[str, int]"), method("a: dict[int, int]")),
    "a tuple": (method("a: tuple[int, ...]"), method("a: tuple[int]")),
    "a set": (method("a: set[int]"), method("a: list[int]")),
    "an enum's value": (
        method("a: E", before="class E(enum.Enum):\n    A = 1"),
        method("a: E", before="class E(enum.Enum):\n    A = 2"),
    ),
    "a field's type": (
        method("a: list[S]", before=STRUCT),
        method("a: list[S]", before=STRUCT.replace("int", "str|int")),
    ),
    "a field's default": (method("a: S", before=STRUCT), method("a: S", before=STRUCT.replace("1", "2"))),
    "a field's name": (method("a: S", before=STRUCT), method("a: S", before=STRUCT.replace("x:", "y:"))),
    "a field more": (method("a: S", before=STRUCT), method("a: S", before=STRUCT + "\n    y: int = 1")),
    "a class's name": (method("a: S", before=STRUCT), method("a: R", before=STRUCT.replace("S(", "R("))),
    **{
        f"a Struct's {option}": (
            method("a: S", before=STRUCT),
            method("a: S", before=STRUCT.replace("Struct", f"Struct, {option}")),
        )
        for option in ("rename='upper'", "tag=True", "array_like=True", "forbid_unknown_fields=True")
    },
    "the order of an array-like Struct's fields": (
        method("a: S", before="class S(Struct, array_like=True):\n    x: int\n    y: int"),
        method("a: S", before="class S(Struct, array_like=True):\n    y: int\n    x: int"),
    ),
    "a dataclass's default": (method("a: D", before=DATACLASS), method("a: D", before=DATACLASS.replace("1", "2"))),
    "a generic's argument": (method("a: G[int]", before=GENERIC), method("a: G[str]", before=GENERIC)),
    "what a typed dict requires": (
        method("a: D", before="class D(TypedDict):\n    x: int"),
        method("a: D", before="class D(TypedDict):\n    x: NotRequired[int]"),
    ),
    "a model's default": (method("a: M", before=MODEL), method("a: M", before=MODEL.replace("1", "2"))),
    "a model's constraint": (method("a: M", before=MODEL), method("a: M", before=MODEL.replace("1", "Field(1, gt=0)"))),
    "a model's alias": (method("a: M", before=MODEL), method("a: M", before=MODEL.replace("1", "Field(1, alias='y')"))),
    "a constraint deep in a model": (
        method("a: M", before="class M(BaseModel):\n    x: list[int]"),
        method("a: M", before="class M(BaseModel):\n    x: list[Annotated[int, Field(gt=1)]]"),
    ),
    "what a model forbids": (
        method("a: M", before=MODEL),
        method("a: M", before=MODEL + "\n    model_config = pydantic.ConfigDict(extra='forbid')"),
    ),
    "a dtype": (method("a: npt.NDArray[np.float32]"), method("a: npt.NDArray[np.float64]")),
    "dimensions": (
        method("a: np.ndarray[tuple[int, int], np.dtype[np.int8]]"),
        method("a: np.ndarray[tuple[int], np.dtype[np.int8]]"),
    ),
}


@pytest.mark.parametrize("what", SAME)
def test_what_no_byte_depends_on_keeps_the_digest(what: str) -> None:
    one, other = SAME[what]
    assert signature_of(one).digest == signature_of(other).digest


@pytest.mark.parametrize("what", DIFFERENT)
def test_what_bytes_depend_on_changes_the_digest(what: str) -> None:
    one, other = DIFFERENT[what]
    assert signature_of(one).digest != signature_of(other).digest


def test_two_classes_of_one_name_are_told_apart() -> None:
    twins = "class S(Struct):\n    x: int\nFirst = S\nclass S(Struct):\n    y: int"
    mixed, doubled = (signature_of(method(f"a: {a}, b: S", before=twins)) for a in ("First", "S"))
    assert mixed.digest != doubled.digest


class Reader:
    """Methods whose signatures are read below."""

    class Inner(msgspec.Struct):
        x: int

    async def forward(
        self,
        later: Later,
        inner: Inner,  # noqa: ARG002
        texts: list[str] = ["a"],  # noqa: ARG002, B006 - a default that must be copied
        *,
        flag: bool = False,  # noqa: ARG002
    ) -> list[Later]:
        return [later]

    def sync(self) -> None: ...

    async def stream(self) -> AsyncIterator[Later]:
        yield Later()

    async def wrong(self, a: Nowhere, b, /, *c: int) -> complex:  # type: ignore[no-untyped-def, name-defined] # noqa: ANN001, ARG002, F821
        return 1j


class Later(msgspec.Struct):
    deeper: Later | None = None


def test_a_signature_says_what_a_method_takes_and_gives() -> None:
    found = Signature.of(Reader.forward, "The Reader")
    assert [(p.name, p.annotation, p.default, p.kw_only) for p in found.parameters] == [
        ("later", Later, MISSING, False),
        ("inner", Reader.Inner, MISSING, False),
        ("texts", list[str], ["a"], False),
        ("flag", bool, False, True),
    ]
    assert (found.chainlet, found.result, found.streaming, found.is_async) == ("The Reader", list[Later], False, True)


def test_a_method_may_be_sync_or_a_stream_and_give_nothing() -> None:
    sync, streaming = Signature.of(Reader.sync, "R"), Signature.of(Reader.stream, "R")
    assert (sync.result, sync.streaming, sync.is_async) == (type(None), False, False)
    assert (streaming.result, streaming.streaming, streaming.is_async) == (Later, True, True)


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(InvalidChainError) as caught:
        Signature.of(Reader.wrong, "R")
    signature, problems = read(Reader.wrong, "R")
    assert signature is None
    assert set(caught.value.problems) == set(problems)
    kinds = [(p.line - Reader.wrong.__code__.co_firstlineno, p.where, p.kind) for p in problems]
    by_position = [(0, "Reader.wrong", "ARGUMENT")] * 3
    assert kinds == [*by_position, (0, "Reader.wrong", "UNSUPPORTED_TYPE")]


@pytest.mark.parametrize("value", [5, None, "text", int, print])
def test_what_is_no_method_is_a_problem_and_no_traceback(value: object) -> None:
    signature, problems = read(value, "R")
    assert signature is None
    assert [p.kind for p in problems] == ["NOT_A_METHOD"]


def test_topics_carry_the_names_with_dashes_for_spaces() -> None:
    found = Signature.of(Reader.sync, " My \t Chainlet ")
    assert found.topic("prod", "The  Chain") == f"prod.The-Chain.My-Chainlet.run_remote.{found.digest}"
    assert topic_part(" a \n b ") == "a-b"


@pytest.mark.parametrize(
    ("namespace", "chain", "said"),
    [
        ("prod", "Größe", "the Chain's name `Größe` has 'ß', 'ö'"),
        ("a/b", "C", "the namespace's name `a/b` has '/'"),
        ("", "C", "the namespace's name `` is empty"),
        ("prod", "C" * 250, "characters longer than Kafka allows"),
    ],
)
def test_names_that_kafka_refuses_are_refused_first(namespace: str, chain: str, said: str) -> None:
    with pytest.raises(ChainsUsageError, match=re.escape(said)):
        Signature.of(Reader.sync, "R").topic(namespace, chain)


def test_the_longest_topic_leaves_room_for_every_suffix() -> None:
    found = Signature.of(Reader.sync, "R")
    room = 249 - len(found.topic("n", "c") + ".background.dlq") + 1
    assert len(found.topic("n", "c" * room) + ".background.dlq") == 249
    with pytest.raises(ChainsUsageError, match="1 characters longer"):
        found.topic("n", "c" * (room + 1))


if __name__ == "__main__":
    sys.stdout.write(json.dumps(digests()))
