"""The README is true: its commands and its code run as they stand there, but for ports."""

import asyncio
import re
import shlex
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from chains_stream.brokers import open_broker
from chains_stream.settings import Settings
from tests.acceptance.command import Commands, chains, environment

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
SHELL = re.findall(r"^```sh\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
CHAIN, MODEL, EVENTS, CLIENT, TEST, RESUMABLE = CODE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the README's Chain in it."""
    (tmp_path / "cheer.py").write_text(CHAIN, encoding="utf-8")
    return tmp_path


def python(code: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=environment(),
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_first_request_prints_a_summary(start: Commands) -> None:
    url = start("run", "chainlets/summarize.py", "--port", "0", cwd=ROOT).ready()
    first = next(block for block in SHELL if block.startswith("curl"))
    assert "http://127.0.0.1:8000" in first
    command = shlex.split(first.replace("http://127.0.0.1:8000", url))
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=60)
    assert "The whale of to-day is as big as his ancestors" in done.stdout
    assert len(done.stdout.splitlines()) == 5


def test_the_commands_on_a_chain_file(folder: Path) -> None:
    block = next(block for block in SHELL if block.startswith("chains check"))
    commands = [shlex.split(line, comments=True) for line in block.splitlines()]
    answers = {words[1]: chains(*words[1:], cwd=folder) for words in commands if words[1] != "run"}
    assert set(answers) == {"check", "call", "graph"}
    for answer in answers.values():
        assert answer.returncode == 0, answer.stderr
    assert answers["call"].stdout.splitlines() == ['"ADA!"', '"GRACE!"']


def test_an_answer_is_had_again_and_without_waiting(start: Commands, folder: Path) -> None:
    url = start("run", "cheer.py", "--port", "0", cwd=folder).ready()
    block = next(block for block in SHELL if block.startswith("curl -i"))
    ids = [""]
    answers = []
    for line in block.splitlines():
        command = shlex.split(line.replace("http://127.0.0.1:8000", url).replace("/ID", f"/{ids[-1]}"), comments=True)
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder, timeout=60)
        answers.append(done.stdout)
        ids += re.findall(r'(?:x-request-id: |"request_id":")([\w-]{48})', done.stdout)
    assert answers[0].endswith("ADA!")
    assert answers[1].endswith('event: done\ndata: {"chunks":1}\n\n')
    assert '"QUEUED"' in answers[2]
    assert '"status":"SUCCEEDED"' in answers[3]
    assert '"result":["ADA!"]' in answers[3]


def test_the_test_runs(folder: Path) -> None:
    assert python(TEST, folder) == ""


def test_the_resumable_stream_runs(tmp_path: Path) -> None:
    (tmp_path / "count.py").write_text(RESUMABLE, encoding="utf-8")
    answer = chains("call", "count.py", '{"upto": 3}', cwd=tmp_path)
    assert answer.stdout.split() == ["0", "1", "2"], answer.stderr


@pytest.mark.kafka
def test_processes_on_kafka_and_the_client(start: Commands, folder: Path, kafka_url: str, namespace: str) -> None:
    block = next(block for block in SHELL if block.startswith("export CHAINS_BROKER"))
    variables = {"CHAINS_BROKER": kafka_url, "CHAINS_NAMESPACE": namespace, "CHAINS_PORT": "0"}
    started = [
        start(*shlex.split(line)[1:], cwd=folder, variables=variables)
        for line in block.splitlines()
        if line.startswith("chains")
    ]
    gateway = [command.ready() for command in started][-1]
    assert '"kafka://127.0.0.1:9092", Cheer' in CLIENT
    over_kafka = CLIENT.replace('"kafka://127.0.0.1:9092", Cheer', f'"{kafka_url}", Cheer, namespace="{namespace}"')
    lines = python(over_kafka, folder).splitlines()
    assert lines[:2] == ["ADA!", "GRACE!"]
    assert lines[2].endswith("['ALAN!']")
    over_http = CLIENT.replace("kafka://127.0.0.1:9092", gateway).partition("        handle =")[0]
    letters = next(block for block in SHELL if block.startswith("chains dlq list"))
    for line, status in zip(letters.splitlines(), (0, 2, 2, 2), strict=True):  # there are none to name, nobody to ask
        words = shlex.split(line, comments=True)[1:]
        assert chains(*words, cwd=folder, variables=variables).returncode == status, line
    assert python(f"{over_http}\n\nasyncio.run(main())", folder).splitlines() == ["ADA!", "GRACE!"]


def test_a_model_is_a_chain_where_its_engine_is_not_installed_too(tmp_path: Path) -> None:
    (tmp_path / "chat.py").write_text(MODEL, encoding="utf-8")
    checked = chains("check", "chat.py", cwd=tmp_path)
    assert (checked.returncode, checked.stdout) == (0, "OK: 1 Chainlet\n"), checked.stderr


@pytest.mark.kafka
def test_events_are_processed(start: Commands, kafka_url: str, namespace: str, tmp_path: Path) -> None:
    (tmp_path / "shorten.py").write_text(EVENTS, encoding="utf-8")
    worker = start("worker", "shorten.py", "--broker", kafka_url, "--namespace", namespace, cwd=tmp_path)
    worker.ready()
    found = asyncio.run(exchange(kafka_url))
    assert found == (b"ada", msgspec.json.encode({"customer": "ada", "text": "x" * 80}))
    assert worker.stop() == 0


async def exchange(url: str) -> tuple[bytes | None, bytes]:
    """Send a ticket, and give the first record that comes of one."""
    broker = open_broker(Settings.of(broker=url))
    try:
        await broker.start()
        ends = dict.fromkeys(range(await broker.partitions("tickets.short")))
        reader = await broker.read("tickets.short", ends, isolation="read_committed")
        ticket = msgspec.json.encode({"customer": "ada", "text": "x" * 100})
        await (await broker.publish("tickets", ticket, partition=0))
        async with asyncio.timeout(30):
            while not (records := await reader.fetch()):
                pass
        await reader.close()
    finally:
        await broker.close()
    return records[0].key, records[0].value
