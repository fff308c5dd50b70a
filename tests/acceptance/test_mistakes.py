"""A user's mistakes: what is wrong and how to mend it, on as many lines as there are mistakes, and a status of 2."""

import re
import socket
from pathlib import Path

import pytest

from tests.acceptance.command import HERE, Commands, chains

ORDERS = str(HERE / "chains" / "orders.py")
HELLO = str(HERE.parents[1] / "chainlets" / "hello.py")
WRONG = sorted((HERE / "wrong").glob("*.py"))
PROBLEM = re.compile(r"(?P<file>.+\.py):(?P<line>\d+) \((?P<where>[\w.]+)\) \[(?P<kind>[A-Z_]+)\]: .+")


def marked(path: Path) -> list[tuple[int, str, str]]:
    """The mistakes that a file marks: line, place and kind."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        for mark in line.partition("# ! ")[2].split(";") if "`" not in line else ():
            if mark:
                kind, where = mark.split()
                found.append((number, where, kind))
    return sorted(found)


def told(stderr: str) -> list[tuple[int, str, str]]:
    found = []
    for line in stderr.splitlines()[:-1]:
        problem = PROBLEM.fullmatch(line)
        assert problem is not None, line
        found.append((int(problem["line"]), problem["where"], problem["kind"]))
    return sorted(found)


@pytest.mark.parametrize("path", WRONG, ids=lambda path: path.stem)
def test_all_mistakes_in_a_file_are_told_at_once(path: Path) -> None:
    done = chains("check", str(path))
    assert done.returncode == 2
    assert done.stdout == ""
    assert told(done.stderr) == marked(path)
    assert done.stderr.splitlines()[-1] == f"{len(marked(path))} mistakes"


@pytest.mark.parametrize("command", ["run", "gateway", "worker", "call", "graph", "topics"])
def test_every_command_tells_of_them_alike(command: str) -> None:
    path = HERE / "wrong" / "everything.py"
    broker = ["--broker", "kafka://127.0.0.1:1"] if command in ("gateway", "worker") else []
    done, checked = chains(command, str(path), *broker), chains("check", str(path))
    assert (done.returncode, done.stdout, done.stderr) == (2, "", checked.stderr)


def test_paths_are_shown_as_seen_from_here(tmp_path: Path) -> None:
    path = HERE / "wrong" / "names.py"
    near, far = chains("check", "names.py", cwd=path.parent), chains("check", str(path), cwd=tmp_path)
    assert near.stderr.startswith("names.py:")
    assert "at names.py:" in near.stderr
    assert far.stderr.startswith(f"{path}:")


LEAF = """\
import chains_stream as chains
class Leaf(chains.ChainletBase):
    async def run_remote(self) -> None: ...
"""
TWO = """\
import chains_stream as chains
@chains.mark_entrypoint
class A(chains.ChainletBase):
    async def run_remote(self) -> None: ...
@chains.mark_entrypoint
class B(chains.ChainletBase):
    async def run_remote(self) -> None: ...
"""
RETRIES = """
class Top(chains.ChainletBase):
    def __init__(self, leaf: Leaf = chains.depends(Leaf, retries=0)) -> None: ...
"""
BROKEN_FILES = {
    "syntax.py": ("def f(:\n    pass\n", r"syntax\.py:1: SyntaxError while importing the file: .+"),
    "imports.py": ("\nimport no_such_module\n", r"imports\.py:2: ModuleNotFoundError .+'no_such_module'"),
    "raises.py": ("def f():\n    return 1 / 0\n\nf()\n", r"raises\.py:2: ZeroDivisionError .+: division by zero"),
    "option.py": (f"{LEAF}chains.Compute(gpu_count=0)\n", r"option\.py:4: .*gpu_count.*greater than 0.*"),
    "retries.py": (LEAF + RETRIES, r"retries\.py:6: depends\(Leaf, retries=0\): .*greater than 0"),
    "exits.py": ("import sys\nsys.exit(0)\n", r"exits\.py: it ends the process when it is imported; .+"),
    "empty.py": ("", r"empty\.py: no Chainlet in it; .+"),
    "unmarked.py": (LEAF, r"unmarked\.py: no entrypoint; .+mark_entrypoint on one of Leaf, or name one as .+"),
    "two.py": (TWO, r"two\.py: several entrypoints, A, B; name one as two\.py:A"),
    "notes.txt": ("", r"notes\.txt: not a Python file; .+"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_file_that_is_no_chain(tmp_path: Path, name: str) -> None:
    text, expected = BROKEN_FILES[name]
    (tmp_path / name).write_text(text, encoding="utf-8")
    done = chains("check", name, cwd=tmp_path)
    assert re.fullmatch(f"error: {expected}\n", done.stderr), done.stderr
    assert (done.returncode, done.stdout) == (2, "")


def test_one_of_several_entrypoints_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(TWO, encoding="utf-8")
    assert chains("call", "two.py:B", "{}", cwd=tmp_path).stdout == "null\n"


MISTAKES = [
    ((), "Usage: chains.+"),
    (("rum", HELLO), r"error: No such command 'rum'.+See: chains --help"),
    (("run",), r"error: Missing argument 'FILE'\. See: chains run --help"),
    (("run", HELLO, "--prot", "1"), r"error: No such option.*--prot.+--port.+See: chains run --help"),
    (("run", "nowhere.py"), r"error: nowhere\.py: no such file"),
    (("run", str(HERE)), r"error: .+: no such file"),
    (("run", f"{HELLO}:Nobody"), r"error: .+: no Chainlet class named Nobody; the file defines SayHello, HelloAll"),
    (("run", HELLO, "--port", "many"), r"error: --port: should be a valid integer \(got 'many'\)"),
    (("run", HELLO, "--port", "70000"), r"error: --port: should be less than or equal to 65535 \(got '70000'\)"),
    (("run", HELLO, "--host", "no.such.host.invalid"), r"error: no\.such\.host\.invalid is not .+--host"),
    (("run", HELLO, "--namespace", "a b"), r"error: --namespace: should match .+ \(got 'a b'\)"),
    (("run", HELLO, "--log-format", "xml"), r"error: --log-format: should be 'console' or 'json' \(got 'xml'\)"),
    (("run", HELLO, "--log-level", "loud"), r"error: --log-level: should be 'debug'.+\(got 'loud'\)"),
    (("run", HELLO, "--broker", "nats://x"), r"error: .+nats://x.+memory://.+kafka://.+"),
    (("run", HELLO, "--broker", "kafka://x:y"), r"error: .+`x:y` is not host:port"),
    (("worker", HELLO), r"error: memory:// lives in one process.+chains run.+--broker kafka://.+"),
    (("gateway", HELLO), r"error: memory:// lives in one process.+chains run.+--broker kafka://.+"),
    (
        ("worker", HELLO, "--broker", "kafka://127.0.0.1:1", "--chainlet", "SayHelo"),
        r"error: .+no Chainlet named SayHelo; it has SayHello, HelloAll\. Did you mean SayHello\?",
    ),
    (("call", HELLO, '{"names": ['), r"error: HelloAll\.run_remote: the data is malformed.+"),
    (("call", HELLO, "[]"), r"error: HelloAll\.run_remote: Expected `object`, got `array`.*"),
    (("call", HELLO, "{}"), r"error: HelloAll\.run_remote: .+missing required field `names`.*"),
    (("call", HELLO, '{"names": ["Ada", 3]}'), r"error: HelloAll\.run_remote: .+`\$\.names\[1\]`"),
    (("graph", HELLO, "--format", "svg"), r"error: .+'svg' is not one of 'tree', 'mermaid'.+"),
    (("init", "nowhere/chain.py"), r"error: nowhere: no such folder"),
    (("init", "chain.txt"), r"error: chain\.txt: a Chain file ends in \.py"),
]


@pytest.mark.parametrize(("arguments", "expected"), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistakes_on_the_command_line(arguments: tuple[str, ...], expected: str, tmp_path: Path) -> None:
    done = chains(*arguments, cwd=tmp_path)
    assert re.fullmatch(f"{expected}\n", done.stderr, re.DOTALL if not arguments else 0), done.stderr
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"CHAINS_PORT": "many"}, r"CHAINS_PORT: should be a valid integer \(got 'many'\)"),
        ({"CHAINS_LOG_LEVEL": "loud"}, r"CHAINS_LOG_LEVEL: should be 'debug'.+\(got 'loud'\)"),
        ({"CHAINS_DEADLINE": "-1"}, r"CHAINS_DEADLINE: should be greater than 0 \(got '-1'\)"),
        ({"CHAINS_KAFKA_SASL_MECHANISM": "GSSAPI"}, r"CHAINS_KAFKA_SASL_MECHANISM: should be 'PLAIN'.+"),
        ({"CHAINS_KAFKA_SASL_PASWORD": "hunter2"}, r".+no such setting; did you mean CHAINS_KAFKA_SASL_PASSWORD\?"),
        (
            {"CHAINS_PORT": "x", "CHAINS_NAMESPACE": "a b"},
            r"CHAINS_NAMESPACE: should match .+; CHAINS_PORT: should be a valid integer \(got 'x'\)",
        ),
    ],
)
def test_mistakes_in_the_environment(variables: dict[str, str], expected: str) -> None:
    done = chains("run", HELLO, variables=variables)
    assert re.fullmatch(f"error: {expected}\n", done.stderr), done.stderr
    assert (done.returncode, done.stdout) == (2, "")


def test_a_flag_wins_over_the_environment(start: Commands) -> None:
    variables = {"CHAINS_PORT": "many", "CHAINS_NAMESPACE": "theirs"}
    server = start("run", HELLO, "--port", "0", "--namespace", "mine", variables=variables)
    server.ready()
    assert "topic=mine." in server.logged("worker.started")
    assert server.stop() == 0


def test_a_variable_that_looks_like_a_setting_is_pointed_out(start: Commands) -> None:
    server = start("run", HELLO, "--port", "0", variables={"CHAINS_NAMESPCE": "x"})
    assert "meant=CHAINS_NAMESPACE variable=CHAINS_NAMESPCE" in server.logged("setting.unknown")


def test_a_busy_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = chains("run", HELLO, "--port", port)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"error: port {port} on 127\.0\.0\.1 is in use: choose another with --port\n", done.stderr)


def test_init_leaves_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "chain.py").write_text("mine")
    done = chains("init", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: chain.py exists, and is left as it is; name another file\n"
    assert (tmp_path / "chain.py").read_text() == "mine"


def test_a_chainlet_that_can_t_be_built(tmp_path: Path) -> None:
    (tmp_path / "chain.py").write_text(
        "import chains_stream as chains\n@chains.mark_entrypoint\nclass A(chains.ChainletBase):\n"
        "    def __init__(self) -> None:\n        raise RuntimeError('no weights')\n"
        "    async def run_remote(self) -> None: ...\n"
    )
    done = chains("run", "chain.py", "--port", "0", "--log-level", "error", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: chain\.py:5: A\.__init__ failed: RuntimeError: no weights\n", done.stderr)


def test_tracebacks_are_to_be_had_at_debug(tmp_path: Path) -> None:
    (tmp_path / "chain.py").write_text("1 / 0\n")
    assert "Traceback" in chains("check", "chain.py", "--log-level", "debug", cwd=tmp_path).stderr
