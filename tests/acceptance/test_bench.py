"""`chains bench`: what it measures of a Chain and of a running gateway, and how it ends."""

import re
import signal
import socket
from pathlib import Path

import msgspec
import pytest

from chains_stream.cli.figures import Report
from tests.acceptance.command import HERE, Command, Commands, chains

ABOVE = f"{HERE / 'chains' / 'load.py'}:Above"
COUNT = f"{HERE / 'chains' / 'load.py'}:Count"
ORDERS = str(HERE / "chains" / "orders.py")
BRIEF = ("--seconds", "0.4", "--warm-up", "0.1")
GOOD, BAD = '{"items": [{"name": "tea"}]}', '{"items": [{"name": "nothing"}]}'


def measured(*arguments: str, cwd: Path | None = None) -> Report:
    done = chains("bench", *arguments, "--format", "json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return msgspec.json.decode(done.stdout, type=Report)


def test_a_file_is_served_and_loaded_in_both_ways(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    report = measured(ABOVE, "--in-flight", "1,8", "--rate", "50,100", *BRIEF, "--out", str(out))
    assert [(load.loop, load.in_flight) for load in report.loads[:2]] == [("closed", 1), ("closed", 8)]
    assert [load.loop for load in report.loads[2:]] == ["open", "open"]
    for load in report.loads:
        assert load.faultless
        assert load.rate_per_s > 0
        assert load.latency is not None
        assert 0 < load.latency.p50 <= load.latency.p99 <= load.latency.max
        assert (load.tokens, load.first_token) == (0, None)
    assert report.complete
    assert not report.streams
    assert "embedded broker" in report.where
    assert '{"number":' in report.where  # made up
    assert any("share" in caveat for caveat in report.caveats)
    assert report.machine.versions["chains-stream"]
    assert {path.name for path in out.iterdir()} == {
        "bench.json",
        "bench.txt",
        "latency.svg",
        "latency-rate.svg",
        "throughput.svg",
    }
    assert msgspec.json.decode((out / "bench.json").read_bytes(), type=Report) == report


def test_streams_are_measured_by_their_tokens(tmp_path: Path) -> None:
    report = measured(
        *(COUNT, "--body", '{"upto": 25}', "--in-flight", "4", "--requests", "20", "--warm-up", "0"), cwd=tmp_path
    )
    assert report.streams
    assert [load.completed for load in report.loads] == [20]
    load = report.loads[0]
    assert load.tokens == 20 * 25
    assert load.first_token is not None
    assert load.first_token.count == 20
    assert load.inter_token is not None
    assert load.inter_token.count == 20 * 24
    assert list(tmp_path.iterdir()) == []  # no files unless they are asked for


def test_a_running_gateway_gets_the_lines_of_a_file_in_turn(start: Commands, tmp_path: Path) -> None:
    url = start("run", COUNT, "--port", "0").ready()
    lines = tmp_path / "bodies.jsonl"
    lines.write_text('{"upto": 1}\n\n{"upto": 3}\n', encoding="utf-8")
    report = measured(
        *(url, "--body-file", str(lines), "--in-flight", "1", "--requests", "10", "--warm-up", "0"), cwd=tmp_path
    )
    assert [load.tokens for load in report.loads] == [5 * 1 + 5 * 3]
    assert report.target == url


def test_the_table_is_for_people(servers: dict[str, str]) -> None:
    done = chains("bench", servers["Tell"], "--in-flight", "2", *BRIEF)
    assert done.returncode == 0
    assert re.search(r"^chains-stream \S+, .+, Python 3\.\d+\.\d+$", done.stdout, re.MULTILINE)
    assert re.search(r"loop +in flight +due/s +streams/s +tokens/s +first token p50 +p99 +gap p50", done.stdout)
    assert re.search(r"^closed +2 +[\d,.]+ +[\d,.]+ +[\d.]+ [mµ]s", done.stdout, re.MULTILINE)
    assert "- A closed loop hides what a stall costs" in done.stdout
    assert re.fullmatch(r"2 in flight: [\d,.]+ answers/s, p50 .+, p99 .+\n", done.stderr)


def test_a_sweep_looks_for_the_highest_rate() -> None:
    """The bound of what it asks for is the machine's business; that it rises until it can't is ours."""
    report = measured(ABOVE, "--in-flight", "8", "--sweep", *BRIEF)
    offered = [step.offered_per_s or 0.0 for step in report.sweep]
    rises = len(offered) > 1 and offered[1] > offered[0]
    assert rises or (offered and report.knee_per_s is None)
    assert all(step.loop == "open" for step in report.sweep)
    done = chains("bench", ABOVE, "--rate", "20", "--sweep", *BRIEF)
    assert done.returncode == 0
    assert re.search(r"^(Sustained up to [\d,.]+/s; |No rate of the sweep was sustained)", done.stdout, re.MULTILINE)


def test_requests_that_fail_are_told_by_kind_and_in_the_status(servers: dict[str, str], tmp_path: Path) -> None:
    lines = tmp_path / "bodies.jsonl"
    lines.write_text(f"{GOOD}\n{BAD}\n", encoding="utf-8")
    arguments = (servers["Order"], "--body-file", str(lines), "--in-flight", "1", "--requests", "10", "--warm-up", "0")
    done = chains("bench", *arguments)
    assert done.returncode == 1
    assert re.search(r"- Failed, and in no latency: 5 by HTTP 500 \S+\.", done.stdout)
    assert re.search(r"^error: 5 of 10 requests failed: 5 by HTTP 500 \S+$", done.stderr, re.MULTILINE)
    allowed = chains("bench", *arguments, "--allow-failures", "--format", "json")
    assert allowed.returncode == 0
    report = msgspec.json.decode(allowed.stdout, type=Report)
    assert [(load.completed, sum(load.failed.values())) for load in report.loads] == [(5, 5)]


def children(command: Command) -> list[str]:
    return Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text(encoding="ascii").split()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_prints_what_was_measured_so_far(start: Commands, number: signal.Signals) -> None:
    bench = start("bench", ABOVE, "--in-flight", "1,2", "--requests", "20", "--rate", "50", "--format", "json")
    assert bench.wait() == 2  # the two don't go together
    bench = start("bench", ABOVE, "--in-flight", "1", "--rate", "200,300", "--seconds", "2")
    bench.stderr.until(lambda line: line.startswith("200 due a second: "), bench)
    hosted = children(bench)
    assert len(hosted) == 1
    bench.send(number)
    assert bench.wait() == 128 + number
    table = bench.stdout.text()
    assert re.search(r"^closed +1 ", table, re.MULTILINE)
    assert re.search(r"^ +open +≤ 512 ", table, re.MULTILINE)
    assert table.rstrip().endswith("Stopped before the end.")
    assert not Path(f"/proc/{hosted[0]}").exists()


def test_what_chainlets_print_is_not_among_the_figures(tmp_path: Path) -> None:
    (tmp_path / "chain.py").write_text(
        "import chains_stream as chains\n@chains.mark_entrypoint\nclass A(chains.ChainletBase):\n"
        "    async def run_remote(self) -> int:\n        print('running ' * 1000)\n        return 1\n",
        encoding="utf-8",
    )
    report = measured("chain.py", "--in-flight", "1", "--requests", "50", "--warm-up", "0", cwd=tmp_path)
    assert [load.completed for load in report.loads] == [50]


MISTAKES = [
    (("--in-flight", "0"), r"error: .+--in-flight.+'0' is not whole numbers above 0.+See: chains bench --help"),
    (("--rate", "1,many"), r"error: .+--rate.+'1,many' is not numbers above 0, with commas between them.+"),
    (("--rate", "inf"), r"error: .+'inf' is not numbers above 0.+"),
    (("--seconds", "0"), r"error: .+--seconds.+0.+"),
    (("--body", "{}", "--body-file", ORDERS), r"error: --body and --body-file: name one of them"),
    (("--body", "[1]"), r"error: --body: not a JSON object: .+"),
    (("--body-file", "nowhere.jsonl"), r"error: .+--body-file.+nowhere\.jsonl.+does not exist.+"),
    (("--body-file", "empty.jsonl"), r"error: empty\.jsonl: no line of JSON in it"),
    (("--body-file", "bad.jsonl"), r"error: bad\.jsonl:2: not a JSON object: .+"),
    (("--requests", "5", "--seconds", "1"), r"error: --requests bounds a closed loop: leave out .+"),
]


@pytest.mark.parametrize(("arguments", "expected"), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistakes(arguments: tuple[str, ...], expected: str, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    (tmp_path / "bad.jsonl").write_text('{"number": 1}\n{"number"\n', encoding="utf-8")
    done = chains("bench", ABOVE, *arguments, cwd=tmp_path)
    assert re.fullmatch(f"{expected}\n", done.stderr), done.stderr
    assert (done.returncode, done.stdout) == (2, "")


def test_a_file_with_mistakes_is_told_as_ever() -> None:
    path = str(HERE / "wrong" / "everything.py")
    done, checked = chains("bench", path), chains("check", path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"starting {path}\n{checked.stderr}"


@pytest.mark.parametrize(
    ("target", "body", "status", "expected"),
    [
        ("Order", '{"items": [{"name": 7}]}', 2, r"error: Order\.run_remote: .+`\$\.items\[0\]\.name`"),
        ("Order", BAD, 1, r"error: ValueError: there is no price for »nothing«(?s:.+)"),
        (
            "http://127.0.0.1:1",
            "{}",
            1,
            r"error: no answer from the gateway at http://127\.0\.0\.1:1: Connection refused",
        ),
        ("http://127.0.0.1:1", None, 1, r"error: no answer from the gateway at http://127\.0\.0\.1:1: .+"),
        ("http://no.such.host.invalid", "{}", 1, r"error: no answer from the gateway at http://no\S+: .+"),
        ("http://127.0.0.1:many", "{}", 2, r"error: http://127\.0\.0\.1:many: .+"),
    ],
)
def test_what_does_not_answer_as_it_should_is_told_in_a_line(
    servers: dict[str, str], target: str, body: str | None, status: int, expected: str
) -> None:
    done = chains("bench", servers.get(target, target), *(() if body is None else ("--body", body)))
    assert re.fullmatch(f"{expected}\n", done.stderr), done.stderr
    assert (done.returncode, done.stdout) == (status, "")


def test_a_gateway_that_speaks_no_tls(servers: dict[str, str]) -> None:
    done = chains("bench", servers["Order"].replace("http:", "https:"), "--body", GOOD)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: no answer from the gateway at https://\S+: .*SSL.*\n", done.stderr), done.stderr


def test_arguments_that_could_not_be_made_up(start: Commands, tmp_path: Path) -> None:
    (tmp_path / "chain.py").write_text(
        "from typing import Annotated\nimport msgspec\nimport chains_stream as chains\n@chains.mark_entrypoint\n"
        "class A(chains.ChainletBase):\n"
        "    async def run_remote(self, code: Annotated[str, msgspec.Meta(pattern='^[0-9]{9}$')]) -> str:\n"
        "        return code\n",
        encoding="utf-8",
    )
    url = start("run", "chain.py", "--port", "0", cwd=tmp_path).ready()
    done = chains("bench", url)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: A\.run_remote: .+; the arguments {.+} were made up: name your own .+\n", done.stderr)


def test_what_speaks_another_protocol_is_no_gateway(start: Commands) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        bench = start("bench", url, "--body", "{}")
        connection, _ = server.accept()
        with connection:
            connection.recv(65_536)
            connection.sendall(b"SSH-2.0-OpenSSH_9.9\r\n\r\n")
            assert bench.wait() == 1
    assert bench.stderr.text() == f"error: no answer from the gateway at {url}: malformed HTTP"


def test_a_running_gateway_has_a_broker_of_its_own(servers: dict[str, str]) -> None:
    done = chains("bench", servers["Order"], "--broker", "kafka://127.0.0.1:1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --broker and --namespace are for a FILE; a running gateway has its own\n"


@pytest.mark.kafka
def test_a_file_on_kafka(kafka_url: str, namespace: str) -> None:
    report = measured(ABOVE, "--broker", kafka_url, "--namespace", namespace, "--in-flight", "4", "--requests", "40")
    assert kafka_url in report.where
    assert [load.completed for load in report.loads] == [40]
