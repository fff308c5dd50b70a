"""`chains call`: what it prints, where it reads its arguments, and how it ends."""

import json
import os
import pty
import re
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests.acceptance.command import CHAINS, HERE, Commands, chains, environment, until

ORDERS = str(HERE / "chains" / "orders.py")
TELL = f"{ORDERS}:Tell"
GATE = str(HERE / "chains" / "gate.py")
TEA = '{"items": [{"name": "tea"}]}'


@pytest.fixture(scope="module", params=["in this process", "through a gateway"])
def targets(request: pytest.FixtureRequest, servers: dict[str, str]) -> dict[str, str]:
    """Where to call the two entrypoints; what is printed is the same."""
    return {"Order": ORDERS, "Tell": TELL} if request.param == "in this process" else servers


def test_a_result_is_json(targets: dict[str, str]) -> None:
    done = chains("call", targets["Order"], TEA)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"text": "Hello: tea", "total": 3.0, "at": None, "data": "AP8="}


def test_chunks_are_json_a_line_each(targets: dict[str, str]) -> None:
    """Whatever the reader takes for the end of a line."""
    done = chains("call", targets["Tell"], '{"text": "eins zwölf\\n\\u2028"}')
    assert (done.returncode, done.stderr) == (0, "")
    assert [json.loads(line) for line in done.stdout.splitlines()] == ["eins ", "zwölf\n\u2028 "]


def test_raw_text_is_as_it_is(targets: dict[str, str]) -> None:
    done = chains("call", targets["Tell"], '{"text": "eins zwölf\\n\\u2028"}', "--raw")
    assert (done.returncode, done.stdout, done.stderr) == (0, "eins zwölf\n\u2028 ", "")


@pytest.mark.parametrize("arguments", [(), ("-",)])
def test_arguments_from_standard_input(targets: dict[str, str], arguments: tuple[str, ...]) -> None:
    assert chains("call", targets["Tell"], *arguments, stdin='{"text": "piped"}').stdout == '"piped "\n'


def test_nothing_on_standard_input_is_no_arguments(targets: dict[str, str]) -> None:
    assert chains("call", targets["Tell"], "--raw").stdout == "nothing was told "


def test_wrong_arguments_name_the_field(targets: dict[str, str]) -> None:
    done = chains("call", targets["Order"], '{"items": [{"name": 7}]}')
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: Order\.run_remote: .+`\$\.items\[0\]\.name`\n", done.stderr)


def test_a_user_s_error_comes_with_its_way_through_the_chainlets(targets: dict[str, str]) -> None:
    done = chains("call", targets["Order"], '{"items": [{"name": "nothing"}]}')
    assert (done.returncode, done.stdout) == (1, "")
    first, *way = done.stderr.splitlines()
    assert first == "error: ValueError: there is no price for »nothing«"
    assert [line.strip() for line in way if ".py" not in line] == ["Order", "└─ Price"]
    frames = [line for line in way if ".py" in line]
    assert all("orders.py:" in line and "in run_remote: " in line for line in frames)
    assert 'raise ValueError("there is no price for »nothing«")' in frames[-1]


def test_a_stream_that_fails_prints_what_came_first(targets: dict[str, str]) -> None:
    done = chains("call", targets["Tell"], '{"text": "one two stop! three"}')
    assert (done.returncode, done.stdout) == (1, '"one "\n"two "\n')
    assert done.stderr.startswith("error: ValueError: told to stop\n")


def test_on_a_terminal_text_is_printed_as_text(targets: dict[str, str]) -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [CHAINS, "call", targets["Tell"], '{"text": "eins zwölf"}'], stdin=theirs, stdout=theirs, env=environment()
    ) as process:
        os.close(theirs)
        assert process.wait(30) == 0
        assert os.read(ours, 1000).decode() == "eins zwölf \r\n"
    os.close(ours)


def test_chunks_are_printed_as_they_come(start: Commands, tmp_path: Path) -> None:
    call = start("call", GATE, json.dumps({"folder": str(tmp_path)}))
    assert call.stdout.until(lambda _: True, call) == '"waiting"'
    (tmp_path / "go").touch()
    assert call.stdout.until(lambda _: True, call) == '"let go"'
    assert call.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cancels_the_call(start: Commands, tmp_path: Path, number: signal.Signals) -> None:
    call = start("call", GATE, json.dumps({"folder": str(tmp_path)}))
    until((tmp_path / "began").exists)
    call.send(number)
    assert call.wait() == 128 + number
    assert (tmp_path / "cancelled").exists()
    assert call.stderr.text() == ""


def test_a_reader_that_leaves_ends_the_call_quietly(tmp_path: Path) -> None:
    command = [str(CHAINS), "call", GATE, json.dumps({"folder": str(tmp_path)})]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b'"waiting"\n'
        process.stdout.close()
        (tmp_path / "go").touch()
        assert process.wait(30) == 128 + signal.SIGPIPE
        assert process.stderr.read() == b""


def test_what_chainlets_print_is_not_the_answer(tmp_path: Path) -> None:
    (tmp_path / "chain.py").write_text(
        "import chains_stream as chains\nprint('importing')\n@chains.mark_entrypoint\n"
        "class A(chains.ChainletBase):\n    async def run_remote(self) -> int:\n        print('running')\n"
        "        return 1\n"
    )
    done = chains("call", "chain.py", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "importing\nrunning\n")


def test_a_deadline_that_passes(tmp_path: Path) -> None:
    done = chains("call", GATE, json.dumps({"folder": str(tmp_path)}), variables={"CHAINS_DEADLINE": "0.5"})
    assert done.returncode == 1
    assert done.stdout in ("", '"waiting"\n')
    assert re.match(r"error: .*deadline of the request passed", done.stderr)


def test_a_gateway_that_is_not_there() -> None:
    done = chains("call", "http://127.0.0.1:1", "{}")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: no answer from the gateway at http://127\.0\.0\.1:1: .+\n", done.stderr)


def test_something_that_is_no_gateway() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        subprocess.Popen(
            [CHAINS, "call", f"http://127.0.0.1:{server.getsockname()[1]}", "{}"],
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        ) as process,
    ):
        connection, _ = server.accept()
        with connection:
            connection.recv(65_536)
            connection.sendall(b"HTTP/1.1 404 Not Found\r\ncontent-length: 4\r\n\r\nwhat")
            assert process.wait(30) == 1
        assert process.stderr is not None
        assert re.fullmatch(r"error: http://\S+ is not a gateway of a Chain: it answered 404\n", process.stderr.read())


@pytest.mark.kafka
def test_without_a_worker_it_says_what_it_waits_for(start: Commands, kafka_url: str, namespace: str) -> None:
    options = ("--broker", kafka_url, "--namespace", namespace)
    call = start("call", ORDERS, TEA, *options)
    said = call.stderr.until(lambda line: line.startswith("waiting: "), call)
    assert f"no worker serves Order in the namespace {namespace}" in said
    start("worker", ORDERS, *options).ready()
    assert call.wait() == 0
    assert json.loads(call.stdout.text())["total"] == 3.0
