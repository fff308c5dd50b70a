"""`chains run --source`: lines of JSON through an event Chainlet, with no Kafka."""

import json
import signal
import subprocess
from pathlib import Path

from tests.acceptance.command import CHAINS, DEADLINE, HERE, chains, environment

RETOLD = str(HERE / "chains" / "retold.py")
LINES = [
    '\ufeff{"id": "a", "customer": "ada"}',
    "",
    "no JSON",
    '{"customer": "ada"}',
    '{"id": "bad"}\r',
    '{"id": "none"}',
    '{"id": "café", "customer": "ada"}',
]


def test_the_lines_that_fit_are_worked_off_and_the_others_told(tmp_path: Path) -> None:
    file = tmp_path / "tickets.jsonl"
    file.write_text("\n".join(LINES), encoding="utf-8")
    # A broker that the environment names is not for this.
    done = chains(
        "run", RETOLD, "--source", file.name, cwd=tmp_path, variables={"CHAINS_BROKER": "kafka://127.0.0.1:1"}
    )
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        {"id": "A", "customer": "ada", "at": "0@0"},
        {"id": "CAFÉ", "customer": "ada", "at": "0@6"},
    ]
    told = [line for line in done.stderr.splitlines() if line != "what a Chainlet prints is no result"]
    assert told[0] == "running Retell on the lines of tickets.jsonl"
    assert sorted(told[1:4]) == [
        "tickets.jsonl:3: the data is malformed: JSON is malformed: invalid character (byte 4)",
        "tickets.jsonl:4: Object missing required field `id`",
        "tickets.jsonl:5: ValueError: a bad ticket",
    ]
    assert told[4:] == ["3 events done, 3 failed; 2 results written"]
    assert done.returncode == 1


def test_results_come_while_more_lines_may_follow() -> None:
    command = [str(CHAINS), "run", RETOLD, "--source", "-"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment()) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        assert running.stderr is not None
        try:
            for number in range(2):
                running.stdin.write(json.dumps({"id": str(number)}) + "\n")
                running.stdin.flush()
                assert json.loads(running.stdout.readline())["at"] == f"0@{number}"
            running.send_signal(signal.SIGINT)
            running.wait(DEADLINE)
            told = running.stderr.read()
        finally:
            running.kill()
    assert running.returncode == 128 + signal.SIGINT
    assert told.splitlines()[-1] == "all lines before stdin:3 are done"
