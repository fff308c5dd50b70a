"""Parts of the command line that need no process."""

import ast
import datetime as dt
import io
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from uuid import UUID

import msgspec
import pydantic
import pytest

import chains_stream as chains
from chains_stream import cli, policy
from chains_stream.chain import Chain
from chains_stream.chainlet import signature
from chains_stream.cli import feeding
from chains_stream.cli.example import example_arguments
from chains_stream.cli.hosting import try_it
from chains_stream.cli.options import _OPTIONS, _SETTINGS
from chains_stream.cli.output import Output
from chains_stream.cli.report import StoppedError, report
from chains_stream.cli.request import _failure, _lines
from chains_stream.codec import codec_of
from chains_stream.errors import from_detail, to_detail
from chains_stream.events import feed_of
from chains_stream.settings import Settings


class Inner(msgspec.Struct):
    name: str
    more: list["Inner"] = []


class Node(msgspec.Struct):
    nodes: list["Node"]


class Point(NamedTuple):
    x: float
    y: int


class Model(pydantic.BaseModel):
    email: str = pydantic.Field(examples=["grace@example.org"])
    age: int = pydantic.Field(gt=17)


def arguments_of(cls: type[chains.ChainletBase]) -> Any:
    """Make the example arguments of a Chainlet; they have to be valid."""
    json, valid = example_arguments(codec_of(signature(cls)))
    assert valid, json
    return msgspec.json.decode(json)


def test_an_example_has_the_arguments_without_a_default() -> None:
    class Chainlet(chains.ChainletBase):
        async def run_remote(
            self, names: list[str], text: str, count: int, *, flag: bool, ratio: float = 0.5
        ) -> None: ...

    assert arguments_of(Chainlet) == {"names": ["Ada"], "text": "Hello, world.", "count": 1, "flag": False}


def test_examples_of_every_kind_are_valid() -> None:
    class Chainlet(chains.ChainletBase):
        async def run_remote(
            self,
            *,
            inner: Inner,
            node: Node,
            point: Point,
            model: Model,
            when: Annotated[dt.datetime, msgspec.Meta(tz=True)],
            day: dt.date,
            local: Annotated[dt.datetime, msgspec.Meta(tz=False)],
            any_time: list[dt.time],
            any_day: dt.datetime | None,
            span: dt.timedelta,
            key: UUID,
            data: bytes,
            choice: Literal["b", "a"],
            maybe: int | None,
            either: int | str,
            nothing: None,
            anything: Any,
            numbers: dict[str, int],
            pair: tuple[int, str],
            many: set[int],
            few: Annotated[list[int], msgspec.Meta(min_length=2)],
            none: Annotated[list[int], msgspec.Meta(max_length=0)],
            short: Annotated[str, msgspec.Meta(max_length=3)],
            long: Annotated[str, msgspec.Meta(min_length=20)],
            shown: Annotated[str, msgspec.Meta(pattern="^x$", examples=["x"])],
        ) -> None: ...

    made = arguments_of(Chainlet)
    assert made["model"] == {"email": "grace@example.org", "age": 18}
    assert (made["shown"], made["choice"], made["maybe"]) == ("x", "a", 1)


@pytest.mark.parametrize(
    "bounds",
    [
        msgspec.Meta(ge=5),
        msgspec.Meta(gt=5),
        msgspec.Meta(le=-3),
        msgspec.Meta(lt=0),
        msgspec.Meta(ge=10, le=10),
        msgspec.Meta(gt=6, lt=8),
        msgspec.Meta(ge=7, multiple_of=5),
        msgspec.Meta(ge=1, le=50, multiple_of=20),
    ],
)
def test_numbers_keep_within_their_bounds(bounds: msgspec.Meta) -> None:
    whole: Any = Annotated[int, bounds]
    real: Any = Annotated[float, bounds]

    class Chainlet(chains.ChainletBase):
        async def run_remote(self, whole: whole, real: real) -> None: ...

    assert isinstance(arguments_of(Chainlet)["whole"], int)


@pytest.mark.parametrize("bounds", [msgspec.Meta(gt=0, lt=1), msgspec.Meta(ge=0.1, le=0.2)])
def test_fractions_keep_within_their_bounds(bounds: msgspec.Meta) -> None:
    fraction: Any = Annotated[float, bounds]

    class Chainlet(chains.ChainletBase):
        async def run_remote(self, number: fraction) -> None: ...

    assert 0 < arguments_of(Chainlet)["number"] < 1


def test_the_request_to_try_is_one_line_for_a_shell() -> None:
    @chains.mark_entrypoint
    class Quote(chains.ChainletBase):
        async def run_remote(self, text: Annotated[str, msgspec.Meta(examples=["it's"])]) -> AsyncIterator[str]:
            yield text

    lines = try_it(Chain.of(Quote), "http://127.0.0.1:8000").splitlines()
    assert lines[0] == "Try it:"
    assert lines[1].startswith("  curl -N http://127.0.0.1:8000/run_remote ")
    echoed = subprocess.run(lines[1].replace("curl", "printf '%s\\n'", 1), shell=True, capture_output=True, check=True)
    assert echoed.stdout.splitlines()[-1] == b'{"text":"it\'s"}'


def test_a_request_that_can_t_be_made_up_says_so() -> None:
    @chains.mark_entrypoint
    class Picky(chains.ChainletBase):
        async def run_remote(self, code: Annotated[str, msgspec.Meta(pattern="^[0-9]{4}$")]) -> None: ...

    assert try_it(Chain.of(Picky), "http://x").startswith("Try it, with arguments of your own:\n")


class Stdout(io.TextIOWrapper):
    def __init__(self, *, terminal: bool) -> None:
        super().__init__(io.BytesIO())
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    @property
    def written(self) -> bytes:
        buffer = self.buffer
        assert isinstance(buffer, io.BytesIO)
        return buffer.getvalue()


@pytest.mark.parametrize(
    ("raw", "terminal", "written"),
    [
        (False, False, b'"a"\n"b\\n"\n3\n'),
        (True, False, b"ab\n3\n"),
        (False, True, b"ab\n3\n"),
    ],
)
def test_chunks_of_text_are_text_where_a_person_reads(
    monkeypatch: pytest.MonkeyPatch, *, raw: bool, terminal: bool, written: bytes
) -> None:
    stdout = Stdout(terminal=terminal)
    monkeypatch.setattr(sys, "stdout", stdout)
    output = Output(raw=raw)
    for json, value in ((b'"a"', "a"), (b'"b\\n"', "b\n"), (b"3", 3)):
        output.chunk(json, value)
    output.end()
    assert stdout.written == written


def test_a_result_is_json_even_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = Stdout(terminal=True)
    monkeypatch.setattr(sys, "stdout", stdout)
    Output(raw=False).result(b'"a"', "a")
    assert stdout.written == b'"a"\n'


def test_bytes_are_written_as_they_are_if_raw(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = Stdout(terminal=False)
    monkeypatch.setattr(sys, "stdout", stdout)
    output = Output(raw=True)
    output.result(b'"AP8="', b"\x00\xff")
    output.end()
    assert stdout.written == b"\x00\xff"


def test_lines_end_at_line_feeds_alone() -> None:
    assert list(_lines([b'"a\xe2\x80', b'\xa8"\n"b', b'"\n', b'"c"'])) == [b'"a\xe2\x80\xa8"', b'"b"', b'"c"']


def test_a_chunk_that_looks_like_a_failure_is_none() -> None:
    problem = b'{"title":"t","status":500,"detail":"d","code":"remote","request_id":"r"}'
    assert _failure(b'{"error":' + problem + b"}") is not None
    for line in (b'{"error":null}', b'{"error":{}}', b'{"error":' + problem + b',"more":1}', b'"error"'):
        assert _failure(line) is None


def test_an_error_of_ours_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(chains.BrokerError("no\nanswer\x1b[31m")) == 1
    assert report(chains.ChainsUsageError("mend\nit")) == 2
    assert report(FileNotFoundError(2, "No such file", "x")) == 1
    assert capsys.readouterr().err == "error: no answer�[31m\nerror: mend it\nerror: x: No such file\n"


def test_a_user_s_error_has_its_tree(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(from_detail(to_detail(KeyError("x"), "Leaf"))) == 1
    assert capsys.readouterr().err == "error: KeyError: 'x'\nLeaf\n"


def test_what_nobody_expected_has_a_status_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(ZeroDivisionError("odd")) == 70
    said = capsys.readouterr().err
    assert said == "error: internal error: ZeroDivisionError: odd (run with --log-level debug for the traceback)\n"


def test_a_signal_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(StoppedError(2)) == 130
    assert capsys.readouterr().err == ""


def test_main_gives_the_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert cli.main(["check", "nowhere.py"]) == 2
    assert cli.main(["nothing"]) == 2
    assert capsys.readouterr().out == f"chains {chains.__version__}\n"


HELLO = str(Path(__file__).parents[2] / "chainlets" / "hello.py")
KAFKA = ["--broker", "kafka://127.0.0.1:1"]  # nothing is there, and nothing is asked


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["dlq", "list", HELLO], "memory:// lives in one process, and no other can look into it"),
        (["dlq", "purge", HELLO, "--all", "--yes"], "memory:// lives in one process"),
        (["cancel", "a" * 22], "memory:// lives in one process"),
        (["dlq", "list", HELLO, "--chainlet", "SayHallo", *KAFKA], "has no Chainlet named SayHallo; it has"),
        (["dlq", "show", HELLO, "Nobody/0", *KAFKA], "has no Chainlet named Nobody; it has"),
        (["dlq", "show", HELLO, *KAFKA], "Missing argument 'ID'"),
        *(
            (["dlq", "show", HELLO, wrong, *KAFKA], "is no id of a letter: write CHAINLET/NUMBER, as in HelloAll/0")
            for wrong in ("7", "HelloAll", "HelloAll/x", "HelloAll/", f"HelloAll/{'9' * 30}")
        ),
        (
            ["dlq", "replay", HELLO, *KAFKA],
            "name the letters to send again, or say --all. See: chains dlq replay --help",
        ),
        (["dlq", "replay", HELLO, "HelloAll/0", "--all", *KAFKA], "or say --all"),
        (["dlq", "replay", HELLO, "HelloAll/0", "--chainlet", "HelloAll", *KAFKA], "--chainlet goes with --all"),
        (["dlq", "purge", HELLO, "--yes", *KAFKA], "say --all, or --before a letter"),
        (["dlq", "purge", HELLO, "--all", "--before", "HelloAll/0", *KAFKA], "say --all, or --before a letter"),
        (["dlq", "purge", HELLO, "--before", "HelloAll/0", "--chainlet", "HelloAll"], "--chainlet goes with --all"),
        (["dlq", "purge", HELLO, "--all", *KAFKA], "standard input is no terminal: say --yes"),
        (["dlq", "purge", HELLO, "HelloAll/0", *KAFKA], "can't be deleted alone"),
        (["cancel", *KAFKA], "Missing argument 'REQUEST_ID"),
        (["cancel", "a" * 21, *KAFKA], "a request id has 22 letters"),
        (["cancel", "a" * 21 + "/", *KAFKA], "a request id has 22 letters"),
        (["cancel", "a" * 22 + "\n", *KAFKA], "a request id has 22 letters"),
        (["cancel", "--nothing", "a" * 22, *KAFKA], "No such option"),
    ],
)
def test_a_mistake_is_told_in_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.delenv("CHAINS_BROKER", raising=False)
    monkeypatch.setattr(sys, "stdin", Stdout(terminal=False))
    assert cli.main(arguments) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert said in told.err
    assert (told.err.startswith("error: "), told.err.count("\n")) == (True, 1)


@pytest.mark.parametrize(
    "request_id", [pytest.param(policy.new_request_id(), id="new"), "-" + "a" * 21, "--" + "h" * 20, "-h" + "_" * 20]
)
def test_what_new_request_id_makes_is_a_request_id(capsys: pytest.CaptureFixture[str], request_id: str) -> None:
    assert cli.main(["cancel", request_id, "--broker", "memory://"]) == 2
    assert cli.main(["cancel", "--broker", "memory://", "--", request_id]) == 2
    assert capsys.readouterr().err.count("error: memory:// lives in one process") == 2


def test_the_defaults_that_the_options_tell_are_those_of_the_settings() -> None:
    for option, (_, text) in _OPTIONS.items():
        name = _SETTINGS.get(option, option)
        default = Settings.model_fields[name].default
        told = re.search(r"default (\S+?)[.,]? *(?:$|and)", text)
        if told and option != "quiet_log_level":
            assert told[1] == str(default), option
    assert Settings().broker == "memory://"


def test_the_public_names_are_there() -> None:
    """Each in `__all__` for programs, under TYPE_CHECKING for type checkers, and to be had."""
    assert chains.__file__ is not None
    tree = ast.parse(Path(chains.__file__).read_text(encoding="utf-8"))
    typed = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed - {"import_module", "TYPE_CHECKING", "Any"} == set(chains.__all__)
    for name in chains.__all__:
        assert getattr(chains, name) is not None
    assert set(chains.__all__) <= set(dir(chains))
    with pytest.raises(AttributeError, match="no attribute `nothing`"):
        chains.nothing  # noqa: B018 - the access is under test


def test_a_path_is_relative_to_the_caller_s_file() -> None:
    assert chains.make_abs_path_here("data/x") == Path(__file__).parent / "data" / "x"


def test_the_package_is_light() -> None:
    """A Chain file brings in neither HTTP nor a broker."""
    code = (
        "import sys, chains_stream as chains\nprint(len(sys.modules))\nchains.ChainletBase, chains.run_local\n"
        "print({'httpx', 'aiokafka', 'starlette', 'httptools', 'pydantic_settings'} & set(sys.modules) or 'light')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules, light = done.stdout.splitlines()
    assert int(modules) < 100
    assert light == "light"


class Fed(chains.ChainletBase):
    source = chains.Source("declared", delivery="exactly_once")
    sink = chains.Sink("written", key="name")

    async def run_remote(self, inner: Inner) -> Inner:
        return inner


@pytest.mark.parametrize(("sinks", "written"), [((), ["written"]), (("a", "b"), ["a", "b"])])
def test_a_source_that_is_told_leaves_the_rest_to_its_class(sinks: tuple[str, ...], written: list[str]) -> None:
    fed: Any = type("Fed", (Fed,), {"__module__": __name__})
    feeding.declare(Chain.of(fed), (), feeding.Declared("told", sinks, None, None))
    assert (fed.source.topic, fed.source.delivery) == ("told", "exactly_once")
    found = feed_of(fed)
    assert found is not None
    assert [sink.topic for sink in found.sinks] == written
