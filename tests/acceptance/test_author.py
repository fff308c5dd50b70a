"""From an empty folder to a Chain that is served: `init`, `check`, `call`, `run`, `graph`, `topics`."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

import chains_stream
from tests.acceptance.command import HERE, Commands, chains

ROOT = HERE.parents[1]
ENRICH = str(ROOT / "chainlets" / "enrich.py")
ORDERS = str(HERE / "chains" / "orders.py")


def test_init_check_call_run(start: Commands, tmp_path: Path) -> None:
    done = chains("init", "my chain.py", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    first, call, run = done.stdout.splitlines()
    assert first == "Wrote my chain.py. Try it:"

    assert chains("check", "my chain.py", cwd=tmp_path).stdout == "OK: 2 Chainlets\n"
    assert json.loads(chains(*shlex.split(call)[1:], cwd=tmp_path).stdout) == ["Hello, Ada!", "Hello, Grace!"]
    server = start(*shlex.split(run)[1:], "--port", "0", cwd=tmp_path)
    url = server.ready()
    answer = httpx.post(f"{url}/run_remote", json={"names": ["Ada"]})
    assert answer.json() == ["Hello, Ada!"]
    assert server.stop() == 0


def test_init_writes_into_a_folder(tmp_path: Path) -> None:
    assert chains("init", str(tmp_path)).returncode == 0
    assert chains("check", "chain.py", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (str(ROOT / "chainlets" / "hello.py"), '"Hello, Ada!"'),
        (str(ROOT / "chainlets" / "summarize.py"), "Hello, world.\n"),
        (ORDERS, '{"text":"Hello: Ada","total":3.0,"at":null,"data":"AP8="}'),
        (f"{ORDERS}:Tell", "nothing was told "),
    ],
)
def test_the_request_that_run_prints_works(start: Commands, file: str, expected: str) -> None:
    server = start("run", file, "--port", "0")
    server.ready()
    line = server.stdout.until(lambda line: "curl " in line, server)
    done = subprocess.run(line, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout == expected
    assert server.stop() == 0
    assert [line for line in server.stdout.text().splitlines() if "curl " in line] == [line]


def test_check_gives_hints_for_what_works_and_could_be_better(tmp_path: Path) -> None:
    (tmp_path / "chain.py").write_text(
        "import chains_stream as chains\n@chains.mark_entrypoint\nclass A(chains.ChainletBase):\n"
        "    def run_remote(self) -> int:\n        return 1\n"
    )
    done = chains("check", "chain.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "OK: 1 Chainlet\n")
    assert re.fullmatch(r"hint: chain\.py:4 \(A\.run_remote\) \[SYNC\]: .+\n", done.stderr)


def test_graphs() -> None:
    tree = chains("graph", ORDERS, "--namespace", "mine").stdout
    assert tree.startswith("Orders\n└─ Order\n   └─ Price\n\nOrder: mine.Orders.Order.run_remote.")
    drawn = chains("graph", f"{ORDERS}:Tell", "--format", "mermaid").stdout.splitlines()
    assert drawn[0] == "flowchart LR"
    assert drawn[-1].strip() == "c0 -.-> c1"


def test_topics() -> None:
    lines = chains("topics", ORDERS, "--namespace", "mine").stdout.splitlines()
    assert re.fullmatch(r"mine\.Orders\.Order\.run_remote\.[0-9a-f]{8}", lines[0])
    assert re.fullmatch(r"mine\.Orders\.Price\.run_remote\.[0-9a-f]{8}", lines[1])
    assert lines[2:] == ["mine.replies", "mine.control"]


def test_topics_of_events() -> None:
    lines = chains("topics", ENRICH, "--namespace", "mine", "--set", "urgent=soon").stdout.splitlines()
    assert lines[2:] == ["tickets", "tickets.scored", "soon", "tickets.dlq", "mine.replies", "mine.control"]


def test_version_and_help() -> None:
    assert chains("--version").stdout == f"chains {chains_stream.__version__}\n"
    module = [sys.executable, "-m", "chains_stream", "--version"]
    assert subprocess.run(module, capture_output=True, text=True, check=True).stdout == chains("--version").stdout
    commands = ["init", "check", "run", "call", "gateway", "worker", "key"]
    commands += ["graph", "topics", "openapi", "asyncapi", "dlq", "replay", "cancel", "bench"]
    assert re.findall(r"^  (\w+)  ", chains("--help").stdout, re.MULTILINE) == commands
    for command in commands:
        done = chains(command, "--help")
        assert done.returncode == 0
        assert f"Usage: chains {command} " in done.stdout


@pytest.mark.parametrize("arguments", ["--version", "--help", "run --help", "dlq purge --help"])
def test_help_is_there_at_once(arguments: str) -> None:
    """It imports none of what serving needs."""
    code = (
        "import sys, chains_stream.cli as cli; cli.main(sys.argv[1:])\n"
        "heavy = {'aiokafka', 'asyncio', 'httpx', 'msgspec', 'pydantic', 'starlette', 'structlog', 'uvloop'}\n"
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code, *arguments.split()], check=True, capture_output=True)


TOLD = """
import pydantic
import chains_stream as chains

class Options(pydantic.BaseModel):
    greeting: str = "Hello"

options = chains.parameters(Options)

@chains.mark_entrypoint
class Greet(chains.ChainletBase):
    async def run_remote(self, name: str = "Ada") -> str:
        return f"{options.greeting}, {name}!"
"""


def test_a_file_is_told_by_set(start: Commands, tmp_path: Path) -> None:
    (tmp_path / "chain.py").write_text(TOLD)
    assert json.loads(chains("call", "chain.py", "{}", cwd=tmp_path).stdout) == "Hello, Ada!"
    told = ("--set", "greeting=Hi=there")
    assert json.loads(chains("call", "chain.py", "{}", *told, cwd=tmp_path).stdout) == "Hi=there, Ada!"
    server = start("run", "chain.py", "--port", "0", *told, cwd=tmp_path)
    assert httpx.post(f"{server.ready()}/run_remote", json={}).json() == "Hi=there, Ada!"
    assert server.stop() == 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ("check", "chain.py", "--set", "greting=a"),
            "chain.py: it takes no parameter `greting`: did you mean `greeting`?",
        ),
        (("check", "chain.py", "--set", "greeting"), "Invalid value for '--set': should be NAME=VALUE"),
        (("check", "chain.py", "--set", "api-key=s3cret"), "such as model=small (got 'api-key')"),
        (("call", "http://127.0.0.1:9", "--set", "greeting=a"), "--set is for a file"),
    ],
)
def test_a_wrong_set_is_one_line(tmp_path: Path, arguments: tuple[str, ...], line: str) -> None:
    (tmp_path / "chain.py").write_text(TOLD)
    done = chains(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert line in done.stderr
    assert "Traceback" not in done.stderr
