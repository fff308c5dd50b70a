"""Wrong Chain files: every mistake is found in one go, each at its line.

In the sources below, a comment ``#! KIND where`` marks a line that a problem is expected at; ``;`` parts several.
"""

import importlib.util
import itertools
import linecache
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from chains_stream.chainlet import ChainletBase, recording
from chains_stream.checks import advice, check_chain_file, check_chainlet
from chains_stream.errors import Problem

_HEADER = """\
from __future__ import annotations
import abc
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterator
from typing import Annotated, Any, Protocol, TYPE_CHECKING
import msgspec
import numpy as np
import numpy.typing as npt
import pydantic
from chains_stream.chainlet import ChainletBase, depends, depends_context, mark_entrypoint
from chains_stream.options import Compute, DeploymentContext, RemoteConfig

class Leaf(ChainletBase):
    async def run_remote(self, x: int) -> int:
        return x
"""

_numbers = itertools.count()


class Loader:
    """Writes a Chain file and imports it, as `chains` would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: list[str] = []

    def __call__(self, body: str) -> tuple[Path, list[type[ChainletBase]]]:
        name = f"wrong_chain_{next(_numbers)}"
        path = self.folder / f"{name}.py"
        path.write_text(_HEADER + body, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        self.names.append(name)
        with recording() as classes:
            spec.loader.exec_module(module)
        return path, classes

    def unload(self) -> None:
        for name in self.names:
            del sys.modules[name]


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Loader]:
    loader = Loader(tmp_path)
    yield loader
    loader.unload()


def expected(path: Path) -> list[tuple[int, str, str]]:
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        for mark in line.partition("#!")[2].split(";"):
            if mark.strip():
                kind, where = mark.split()
                found.append((number, where, kind))
    return sorted(found)


def assert_marked(path: Path, problems: list[Problem]) -> None:
    assert sorted((p.line, p.where, p.kind) for p in problems) == expected(path), "\n".join(map(str, problems))
    for problem in problems:
        assert problem.file == str(path)
        assert "\n" not in problem.message


WRONG = {
    "no method": """
class A(ChainletBase):  #! MISSING_METHOD A
    async def run(self, x: int) -> int: ...
""",
    "not a method": """
class A(ChainletBase):
    run_remote = 5  #! NOT_A_METHOD A.run_remote
class B(ChainletBase):
    run_remote: Any = "text"  #! NOT_A_METHOD B.run_remote
class C(ChainletBase):
    @staticmethod
    async def run_remote(x: int) -> int: ...  #! NOT_A_METHOD C.run_remote
class D(ChainletBase):
    @classmethod
    async def run_remote(cls, x: int) -> int: ...  #! NOT_A_METHOD D.run_remote
class E(ChainletBase):
    @property
    def run_remote(self) -> int: ...  #! NOT_A_METHOD E.run_remote
class F(ChainletBase):
    class run_remote: ...  #! NOT_A_METHOD F.run_remote
""",
    "no self": """
class A(ChainletBase):
    async def run_remote() -> int: ...  #! NOT_A_METHOD A.run_remote
class B(ChainletBase):
    async def run_remote(x: int) -> int: ...  #! NOT_A_METHOD B.run_remote
""",
    "missing annotations, several at once": """
class A(ChainletBase):
    async def run_remote(  #! MISSING_ANNOTATION A.run_remote
        self,
        x,  #! MISSING_ANNOTATION A.run_remote
        y: int,
        *,
        z=3,  #! MISSING_ANNOTATION A.run_remote
    ): ...
""",
    "variadic and positional-only": """
class A(ChainletBase):
    async def run_remote(
        self,
        first: int,  #! ARGUMENT A.run_remote
        /,
        *args: int,  #! ARGUMENT A.run_remote
        **kwargs: str,  #! ARGUMENT A.run_remote
    ) -> None: ...
""",
    "streams": """
class A(ChainletBase):
    async def run_remote(self) -> AsyncIterator[str]:  #! STREAM A.run_remote
        return "no yield"
class B(ChainletBase):
    async def run_remote(self) -> str:  #! STREAM B.run_remote
        yield "one"
class C(ChainletBase):
    def run_remote(self) -> Iterator[str]:  #! STREAM C.run_remote
        yield "sync"
class D(ChainletBase):
    async def run_remote(self) -> AsyncIterator:  #! STREAM D.run_remote
        yield "of what?"
class E(ChainletBase):
    async def run_remote(self) -> AsyncGenerator[str, int]:  #! STREAM E.run_remote
        yield "two way"
class F(ChainletBase):
    async def run_remote(self) -> AsyncIterable[str]:  #! STREAM F.run_remote
        yield "iterable"
class G(ChainletBase):
    async def run_remote(self):  #! MISSING_ANNOTATION G.run_remote
        yield "untyped"
class H(ChainletBase):
    async def run_remote(self) -> Iterator[str]:  #! STREAM H.run_remote
        yield "wrong kind"
class I(ChainletBase):
    def run_remote(self):  #! STREAM I.run_remote; MISSING_ANNOTATION I.run_remote
        yield "sync and untyped"
class Fine(ChainletBase):
    async def run_remote(self) -> AsyncGenerator[str, None]:
        yield "fine"
""",
    "unsupported types": """
@dataclasses.dataclass
class Holder:
    inner: complex
class Thing: ...
class M1(pydantic.BaseModel): x: int
class M2(pydantic.BaseModel): x: int
class A(ChainletBase):
    async def run_remote(
        self,
        a: complex,  #! UNSUPPORTED_TYPE A.run_remote
        b: dict[str, list[Thing]],  #! UNSUPPORTED_TYPE A.run_remote
        c: Holder,  #! UNSUPPORTED_TYPE A.run_remote
        d: M1 | M2,  #! UNSUPPORTED_TYPE A.run_remote
        e:
            Undefined,  #! UNSUPPORTED_TYPE A.run_remote
        f: npt.NDArray[np.object_],  #! UNSUPPORTED_TYPE A.run_remote
        g: Annotated[int, pydantic.Field(gt=1)],  #! UNSUPPORTED_TYPE A.run_remote
        h: AsyncIterator[int],  #! UNSUPPORTED_TYPE A.run_remote
        i: list[int] | set[int],  #! UNSUPPORTED_TYPE A.run_remote
        j: Annotated[str, msgspec.Meta(ge=1)],  #! UNSUPPORTED_TYPE A.run_remote
        k: 3,  #! UNSUPPORTED_TYPE A.run_remote
        l: 1 / 0,  #! UNSUPPORTED_TYPE A.run_remote
    ) -> object: ...  #! UNSUPPORTED_TYPE A.run_remote
class B(ChainletBase):
    async def run_remote(self) -> AsyncIterator[Thing]:  #! UNSUPPORTED_TYPE B.run_remote
        yield Thing()
""",
    "a name only for the type checker": """
if TYPE_CHECKING:
    from decimal import Decimal
class A(ChainletBase):
    async def run_remote(self, x: Decimal) -> Later: ...  #! UNSUPPORTED_TYPE A.run_remote
class Later(msgspec.Struct): ...
""",
    "defaults that do not fit": """
class M(pydantic.BaseModel): x: int
class A(ChainletBase):
    async def run_remote(
        self,
        a: int = None,  #! DEFAULT A.run_remote
        b: list[int]
            = ["x"],  #! DEFAULT A.run_remote
        c: Annotated[int, msgspec.Meta(ge=1)] = 0,  #! DEFAULT A.run_remote
        d: M = {"x": "y"},  #! DEFAULT A.run_remote
        *,
        e: str = object(),  #! DEFAULT A.run_remote
        f: float = 1,
        g: list[int] = [],
    ) -> None: ...
""",
    "constructors": """
class A(ChainletBase):
    def __init__(
        self,
        size: int,  #! ARGUMENT A.__init__
        name: str = "x",  #! ARGUMENT A.__init__
        *args: int,  #! ARGUMENT A.__init__
        leaf: Leaf = depends(Leaf),
        **kwargs: int,  #! ARGUMENT A.__init__
    ) -> None: ...
    async def run_remote(self) -> None: ...
""",
    "contexts": """
class A(ChainletBase):
    def __init__(
        self,
        context: DeploymentContext = depends_context(),  #! CONTEXT A.__init__
        leaf: Leaf = depends(Leaf),
    ) -> None: ...
    async def run_remote(self) -> None: ...
class B(ChainletBase):
    def __init__(self, ctx: DeploymentContext = depends_context()) -> None: ...  #! CONTEXT B.__init__
    async def run_remote(self) -> None: ...
class C(ChainletBase):
    def __init__(self, context: int = depends_context()) -> None: ...  #! CONTEXT C.__init__
    async def run_remote(self) -> None: ...
class D(ChainletBase):
    def __init__(self, context=depends_context()) -> None: ...  #! CONTEXT D.__init__
    async def run_remote(self) -> None: ...
class E(ChainletBase):
    def __init__(self, context: DeploymentContext) -> None: ...  #! CONTEXT E.__init__
    async def run_remote(self) -> None: ...
""",
    "dependencies": """
class Runs(Protocol):
    async def run_remote(self, x: int) -> int: ...
class Jumps(Protocol):
    async def jump(self) -> int: ...
class Other(ChainletBase):
    async def run_remote(self) -> None: ...
class A(ChainletBase):
    def __init__(
        self,
        one: Leaf = depends(Leaf),
        two: Leaf = depends(Leaf),  #! DEPENDENCY A.__init__
        three: int = depends(int),  #! DEPENDENCY A.__init__
        four: Any = depends([5]),  #! DEPENDENCY A.__init__
        five: Leaf = depends(Other),  #! DEPENDENCY A.__init__
    ) -> None: ...
    async def run_remote(self) -> None: ...
class B(ChainletBase):
    def __init__(self, runs: Runs = depends(Leaf), jumps:
            Jumps = depends(Other)) -> None: ...  #! DEPENDENCY B.__init__
    async def run_remote(self) -> None: ...
class C(ChainletBase):
    def __init__(self, base: ChainletBase = depends(Leaf), untyped=depends(Other)):  #! MISSING_ANNOTATION C.__init__
        ...
    async def run_remote(self) -> None: ...
class D(ChainletBase):
    def __init__(self, leaf: Nowhere = depends(Leaf)) -> None: ...  #! DEPENDENCY D.__init__
    async def run_remote(self) -> None: ...
""",
    "health checks": """
class A(ChainletBase):
    async def run_remote(self) -> None: ...
    def is_healthy(self, deep: bool) -> bool: ...  #! HEALTH_CHECK A.is_healthy
class B(ChainletBase):
    async def run_remote(self) -> None: ...
    async def is_healthy(self) -> int: ...  #! HEALTH_CHECK B.is_healthy
class C(ChainletBase):
    async def run_remote(self) -> None: ...
    is_healthy = True  #! HEALTH_CHECK C.is_healthy
class D(ChainletBase):
    async def run_remote(self) -> None: ...
    def is_healthy(): ...  #! HEALTH_CHECK D.is_healthy; HEALTH_CHECK D.is_healthy
class E(ChainletBase):
    async def run_remote(self) -> None: ...
    async def is_healthy(self) -> bool:  #! HEALTH_CHECK E.is_healthy
        yield True
class Fine(ChainletBase):
    async def run_remote(self) -> None: ...
    async def is_healthy(self) -> bool: ...
""",
    "names of models": """
class A(ChainletBase):
    openai_models = "llama"  #! MODELS A.openai_models
    async def run_remote(self) -> None: ...
class Fine(ChainletBase):
    openai_models = ("llama",)
    async def run_remote(self) -> None: ...
""",
    "lives": """
class A(ChainletBase):
    async def run_remote(self) -> None: ...
    async def __aenter__(self): ...  #! LIFE A.__aenter__
class B(ChainletBase):
    async def run_remote(self) -> None: ...
    async def __aexit__(self, kind, error, trace) -> None: ...  #! LIFE B.__aexit__
class Fine(ChainletBase):
    async def run_remote(self) -> None: ...
    async def __aenter__(self): ...
    async def __aexit__(self, kind, error, trace) -> None: ...
""",
    "deaths": """
class A(ChainletBase):
    async def run_remote(self) -> None: ...
    def failed(self) -> None: ...  #! FAILED A.failed
class B(ChainletBase):
    async def run_remote(self) -> None: ...
    async def failed(self, how: str) -> None: ...  #! FAILED B.failed
class C(ChainletBase):
    async def run_remote(self) -> None: ...
    failed = False  #! FAILED C.failed
class D(ChainletBase):
    async def run_remote(self) -> None: ...
    async def failed(self) -> None:  #! FAILED D.failed
        yield
class Fine(ChainletBase):
    async def run_remote(self) -> None: ...
    async def failed(self) -> None: ...
""",
    "names": """
class A(ChainletBase):
    remote_config = RemoteConfig(name="Größe!")  #! NAME A
    async def run_remote(self) -> None: ...
class B(ChainletBase):
    remote_config = RemoteConfig(name=" ")  #! NAME B
    async def run_remote(self) -> None: ...
class C(ChainletBase):
    remote_config = RemoteConfig(name="My name")
    async def run_remote(self) -> None: ...
class D(ChainletBase):  #! NAME D
    remote_config = RemoteConfig(name="My  name")
    async def run_remote(self) -> None: ...
@mark_entrypoint("Ça")
class E(ChainletBase):  #! NAME E
    async def run_remote(self) -> None: ...
class Twin(ChainletBase):
    async def run_remote(self) -> None: ...
class Twin(ChainletBase):  #! NAME Twin
    async def run_remote(self) -> str: ...
class F(ChainletBase):
    remote_config = RemoteConfig(name="Leaf")
    async def run_remote(self) -> None: ...
""".replace("class F(ChainletBase):", "class F(ChainletBase):  #! NAME F"),
    "options": """
class A(ChainletBase):
    remote_config = Compute(cpu_count=3)  #! CONFIG A
    async def run_remote(self) -> None: ...
class B(ChainletBase):
    remote_config: Any = {"compute": 3}  #! CONFIG B
    async def run_remote(self, x) -> None: ...  #! MISSING_ANNOTATION B.run_remote
""",
    "made by hand": """
import sys
class A(ChainletBase):
    def __init__(self) -> None:
        self.leaf = Leaf()  #! INSTANTIATION A.__init__
    async def run_remote(self) -> int:
        def inner():
            return [Leaf() for _ in range(3)]  #! INSTANTIATION A.run_remote
        module = sys.modules[__name__]
        return await Leaf().run_remote(1)  #! INSTANTIATION A.run_remote
class B(ChainletBase):
    leaf = Leaf()  #! INSTANTIATION B
    def __init__(self, leaf: Leaf = depends(Leaf)) -> None:
        super().__init__()
        self.leaf = leaf
    async def run_remote(self) -> int:
        return await self.leaf.run_remote(1)
class C(ChainletBase):
    class Part:
        def make(self):
            return B()  #! INSTANTIATION C.make
    async def run_remote(self) -> None: ...
outside = Leaf()
""",
    "entrypoints": """
@mark_entrypoint
class A(ChainletBase):
    async def run_remote(self) -> None: ...
@mark_entrypoint("Named")
class B(ChainletBase):
    async def run_remote(self) -> None: ...
@mark_entrypoint
class C(B):
    ...
""",
    "everything at once": """
@mark_entrypoint("bad/name")
class A(ChainletBase):  #! NAME A
    remote_config = 3  #! CONFIG A
    def __init__(self, x: int, context: int = depends_context()):  #! ARGUMENT A.__init__; CONTEXT A.__init__
        Leaf()  #! INSTANTIATION A.__init__
    def is_healthy(self): ...  #! HEALTH_CHECK A.is_healthy
    async def run_remote(  #! MISSING_ANNOTATION A.run_remote
        self,
        *args,  #! ARGUMENT A.run_remote
        a, b: complex,  #! MISSING_ANNOTATION A.run_remote; UNSUPPORTED_TYPE A.run_remote
        c: int = "x",  #! DEFAULT A.run_remote
    ):
        yield 1
class Leaf2(ChainletBase):  #! NAME Leaf2; MISSING_METHOD Leaf2
    remote_config = RemoteConfig(name="Leaf")
""",
}

RIGHT = """
class Item(msgspec.Struct):
    text: str
class Base(ChainletBase, abc.ABC):
    @abc.abstractmethod
    async def run_remote(self, item: Item) -> AsyncIterator[str]: ...
class Abstract(ChainletBase, abc.ABC):
    @abc.abstractmethod
    def other(self) -> None: ...
def logged(function):
    import functools
    @functools.wraps(function)
    async def wrapper(*args, **kwargs):
        return await function(*args, **kwargs)
    return wrapper
class Decorated(ChainletBase):
    class Local(msgspec.Struct):
        x: int
    @logged
    async def run_remote(self, local: Local, later: Later | None = None) -> list[Local]: ...
class Later(msgspec.Struct):
    nested: Later | None = None
class Sync(ChainletBase):
    def run_remote(self, x: int = 3, *, ys: list[int] = [1]) -> None: ...
class Deep(Base):
    remote_config = RemoteConfig(name="Deep down", compute=Compute(cpu_count=2))
    async def run_remote(self, item: Item) -> AsyncIterator[str]:
        yield item.text
class Runs(Protocol):
    attribute: int
class HasRun(Protocol):
    async def run_remote(self, item: Item) -> AsyncIterator[str]: ...
@mark_entrypoint("The Chain")
class Entry(ChainletBase):
    def __init__(
        self,
        deep: HasRun = depends(Deep, retries=3),
        base: Base = depends(Base),
        leaf: Leaf = depends(Leaf),
        context: DeploymentContext = depends_context(),
    ) -> None:
        self.other = Item("x")
    async def run_remote(self, item: Item) -> AsyncIterator[str]:
        yield "x"
    async def is_healthy(self) -> bool:
        return True
    def public_helper(self) -> int:
        return 3
"""


@pytest.mark.parametrize("name", WRONG)
def test_every_mistake_is_found_at_its_line(name: str, load: Loader) -> None:
    path, classes = load(WRONG[name])
    assert_marked(path, check_chain_file(classes))


def test_without_postponed_annotations_the_lines_are_the_same(load: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "_HEADER", _HEADER.replace("from __future__ import annotations", "# evaluated"))
    for name in ("missing annotations, several at once", "streams", "defaults that do not fit", "contexts"):
        path, classes = load(WRONG[name])
        assert_marked(path, check_chain_file(classes))


def test_a_right_file_has_no_problems(load: Loader) -> None:
    _, classes = load(RIGHT)
    assert check_chain_file(classes) == []


def test_a_dependency_from_another_file_is_checked_too(load: Loader) -> None:
    there, classes = load(WRONG["options"])
    found = check_chain_file([_user_of(classes[-1])])
    assert {(p.file, p.kind) for p in found} == {(str(there), "CONFIG"), (str(there), "MISSING_ANNOTATION")}


def _user_of(wanted: type[ChainletBase]) -> type[ChainletBase]:
    from chains_stream.chainlet import depends

    class User(ChainletBase):
        def __init__(self, it: ChainletBase = depends(wanted)) -> None: ...  # noqa: B008 - how one is declared

        async def run_remote(self) -> None: ...

    return User


def test_messages_say_how_to_mend(load: Loader) -> None:
    _, classes = load(WRONG["everything at once"])
    text = "\n".join(map(str, check_chain_file(classes)))
    for mend in (
        "`depends(SomeChainlet)`",
        "annotate `DeploymentContext`",
        "`depends(Leaf)`",
        "`async def is_healthy(self) -> bool`",
        "write out each one with its type",
        "`a: str`",
        "write `remote_config = RemoteConfig(…)`",
        "`RemoteConfig(name=…)`",
        "`-> AsyncIterator[T]` for a stream",
    ):
        assert mend in text
    assert re.search(
        r"^.+\.py:\d+ \(A\.run_remote\) \[DEFAULT\]: the default in `c: int = 'x'` does not fit", text, re.MULTILINE
    )


def test_a_class_without_source_is_checked_by_the_lines_python_knows() -> None:
    names: dict[str, object] = {"ChainletBase": ChainletBase, "__name__": "nowhere"}
    text = """
class A(ChainletBase):
    def __init__(self, x): ...
    async def run_remote(self, x, y: complex = 3): ...
    is_healthy = 1
class B(ChainletBase): ...
"""
    exec(text, names)
    one, two = names["A"], names["B"]
    assert isinstance(one, type)
    assert isinstance(two, type)
    assert issubclass(one, ChainletBase)
    assert issubclass(two, ChainletBase)
    found = [(p.file, p.line, p.where, p.kind) for p in check_chainlet(one)]
    assert found == [
        ("<string>", 3, "A.__init__", "ARGUMENT"),
        ("<string>", 3, "A.is_healthy", "HEALTH_CHECK"),
        ("<string>", 4, "A.run_remote", "MISSING_ANNOTATION"),
        ("<string>", 4, "A.run_remote", "MISSING_ANNOTATION"),
        ("<string>", 4, "A.run_remote", "UNSUPPORTED_TYPE"),
    ]
    assert [(p.file, p.line, p.kind) for p in check_chainlet(two)] == [("<unknown>", 0, "MISSING_METHOD")]


def test_a_file_that_changed_since_its_import_is_no_crash(load: Loader) -> None:
    path, classes = load(WRONG["streams"])
    path.write_text("def broken(:\n", encoding="utf-8")
    linecache.clearcache()
    assert {p.kind for p in check_chain_file(classes)} == {"STREAM", "MISSING_ANNOTATION"}


def test_advice_names_a_method_that_is_not_asynchronous(load: Loader) -> None:
    path, classes = load(RIGHT)
    found = [problem for cls in classes for problem in advice(cls)]
    line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if "class Sync" in text) + 1
    assert [(p.file, p.line, p.where, p.kind) for p in found] == [(str(path), line, "Sync.run_remote", "SYNC")]
