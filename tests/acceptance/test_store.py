"""Large values through the commands: what works with nothing set up, and what is refused before anything starts."""

from http import HTTPStatus
from pathlib import Path

import httpx
import pytest

from tests.acceptance.command import DEADLINE, Command, Commands, chains

LARGE = 3_000_000
CHAIN = """
import chains_stream as chains

@chains.mark_entrypoint
class Twice(chains.ChainletBase):
    async def run_remote(self, text: str) -> str:
        return text * 2
"""


@pytest.fixture
def chain(tmp_path: Path) -> str:
    path = tmp_path / "twice.py"
    path.write_text(CHAIN, encoding="utf-8")
    return str(path)


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    path = tmp_path / "temporary"
    path.mkdir()
    return path


def call(command: Command) -> str:
    response = httpx.post(
        f"{command.ready()}/run_remote", json={"text": "x" * LARGE}, timeout=DEADLINE, trust_env=False
    )
    assert response.status_code == HTTPStatus.OK, response.text
    return str(response.json())


def sizes(temporary: Path) -> list[int]:
    """The sizes of the values in the only store there is, which must be this user's alone."""
    (root,) = temporary.iterdir()
    assert root.stat().st_mode & 0o777 == 0o700
    return sorted(path.stat().st_size for path in root.rglob("*") if path.is_file())


def test_large_values_need_no_set_up_in_one_process(start: Commands, chain: str, temporary: Path) -> None:
    variables = {"TMPDIR": str(temporary)}
    assert call(start("run", chain, "--port", "0", variables=variables)) == "x" * LARGE * 2
    assert sizes(temporary) == [LARGE + 11, 2 * LARGE + 5]


@pytest.mark.kafka
def test_nor_in_several_on_one_machine(
    start: Commands, chain: str, temporary: Path, kafka_url: str, namespace: str
) -> None:
    common = ("--broker", kafka_url, "--namespace", namespace)
    variables = {"TMPDIR": str(temporary)}
    start("worker", chain, *common, variables=variables).ready()
    assert call(start("gateway", chain, "--port", "0", *common, variables=variables)) == "x" * LARGE * 2
    assert sizes(temporary) == [LARGE + 11, 2 * LARGE + 5]


@pytest.mark.parametrize("command", ["gateway", "worker"])
def test_a_folder_is_no_store_for_a_broker_elsewhere(chain: str, tmp_path: Path, command: str) -> None:
    broker = ("--broker", "kafka://broker.invalid:9092")
    done = chains(command, chain, *broker, variables={"CHAINS_STORE": str(tmp_path)})
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "is a folder of this machine" in done.stderr
    assert "set CHAINS_STORE" in done.stderr


def test_a_missing_driver_is_named_with_what_to_install(chain: str) -> None:
    done = chains("run", chain, "--port", "0", variables={"CHAINS_STORE": "oss://bucket/folder"})
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install ossfs" in done.stderr
