"""The AsyncAPI document of a Chain's topics, held to the specification by its official parser (which needs Node)."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.command import HERE, chains

ROOT = HERE.parents[1]
FOLDER = ROOT / ".cache" / "asyncapi"
CLUSTER = ("--broker", "kafka://broker:9092,other:9093")
PARSER = "@asyncapi/parser@3.6.6"
PROGRAM = """
const { Parser } = require('@asyncapi/parser');
let text = '';
process.stdin.on('data', (part) => { text += part; }).on('end', async () => {
  const { document, diagnostics } = await new Parser().parse(text);
  const wrong = diagnostics.filter((each) => each.severity < 2);
  console.log(JSON.stringify({ valid: document !== undefined, wrong: wrong.map((each) => each.message) }));
});
"""


@pytest.fixture(scope="session")
def parser() -> Path:
    """The folder of the official parser, installed once, inside the clone."""
    if shutil.which("npm") is None:
        pytest.skip("the official AsyncAPI parser needs Node and npm, which are not there")
    ready = FOLDER / PARSER.replace("/", "-")  # an installation may have been broken off
    if not ready.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        (FOLDER / "package.json").write_text("{}")
        subprocess.run(["npm", "install", "--silent", PARSER], check=True, cwd=FOLDER, timeout=110)
        ready.touch()
    return FOLDER


def described(file: str, *options: str) -> dict[str, Any]:
    done = chains("asyncapi", file, *options)
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_it_says_what_lies_on_the_topics() -> None:
    document = described(str(ROOT / "chainlets" / "enrich.py"), *CLUSTER, "--namespace", "n")
    assert document["servers"] == {
        "kafka": {"host": "broker:9092", "protocol": "kafka"},
        "kafka-2": {"host": "other:9093", "protocol": "kafka"},
    }
    assert {"tickets", "tickets.dlq", "tickets.scored", "tickets.urgent", "n.replies"} < set(document["channels"])
    operations = document["operations"]
    actions = {name: operation["action"] for name, operation in operations.items()}
    assert actions == {
        "Enrich.run_remote": "receive",
        "Enrich.events": "receive",
        "Enrich.writes.tickets.scored": "send",
        "Enrich.writes.tickets.urgent": "send",
        "Score.run_remote": "receive",
    }
    assert operations["Enrich.events"]["bindings"]["kafka"]["groupId"] == {"const": "n.Enrich.Enrich.events"}
    messages, schemas = document["components"]["messages"], document["components"]["schemas"]
    assert messages["Enrich.event"]["payload"] == {"$ref": "#/components/schemas/Ticket"}
    assert messages["Enrich.event"]["contentType"] == "application/json"
    assert set(schemas["Scored"]["properties"]) == {"id", "customer", "text", "score", "topic", "waited_ms"}


@pytest.mark.parametrize("file", ["enrich.py", "openai_chat.py"])
def test_the_official_parser_finds_nothing_wrong(parser: Path, file: str) -> None:
    document = described(str(ROOT / "chainlets" / file), *CLUSTER)
    done = subprocess.run(
        ["node", "-e", PROGRAM],
        input=json.dumps(document),
        capture_output=True,
        text=True,
        check=True,
        cwd=parser,
        timeout=60,
    )
    assert json.loads(done.stdout) == {"valid": True, "wrong": []}
