"""The import direction of ARCHITECTURE.md: a module imports only modules above it in the reading order."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "chains_stream"

ORDER = [
    "log",
    "metrics",
    "errors",
    "load",
    "load_http",
    "options",
    "chain_parameters",
    "openai",
    "settings",
    "source",
    "foreign",
    "descriptor",
    "websocket",
    "signature",
    "schema",
    "messages",
    "fold",
    "answers",
    "store",
    "codec",
    "formats",
    "timeouts",
    "turns",
    "policy",
    "stub",
    "chainlet",
    "formats",
    "events",
    "checks",
    "chain",
    "batches",
    "local",
    "broker",
    "supply",
    "log_range",
    "brokers",
    "control",
    "letters",
    "deliveries",
    "delays",
    "balance",
    "batching",
    "calls",
    "readback",
    "following",
    "replies",
    "sessions",
    "offsets",
    "assignment",
    "quarantine",
    "cancellations",
    "outcome",
    "taking",
    "patience",
    "async_requests",
    "serving",
    "transactions",
    "breaker",
    "event_service",
    "event_lines",
    "event_worker",
    "worker",
    "http_target",
    "posting",
    "notices",
    "webhooks",
    "client",
    "gateway",
    "asyncapi",
    "telemetry",
    "cli",
]


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or not path.name.startswith("__"))


def unit(path: Path) -> str:
    """Give the entry of ORDER that a file belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            names = [node.module] if node.module != "chains_stream" else [f"{node.module}.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from names


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_import_upwards_only(path: Path) -> None:
    place = ORDER.index(unit(path))
    for name in imported(path):
        if name.startswith("chains_stream."):
            other = name.split(".")[1]
            if other == "__version__":
                continue
            assert ORDER.index(other) <= place, f"{unit(path)} imports {other}, which stands below it"


def test_worker_and_gateway_do_not_know_each_other() -> None:
    for path in modules():
        names = set(imported(path))
        if unit(path) == "worker":
            assert not any(name.startswith("chains_stream.gateway") for name in names)
        if unit(path) == "gateway":
            assert not any(name.startswith("chains_stream.worker") for name in names)


def test_only_brokers_open_imports_a_concrete_broker() -> None:
    for path in modules():
        if unit(path) != "brokers":
            assert not any(name.startswith("chains_stream.brokers.") for name in imported(path)), path


def test_only_the_kafka_broker_imports_aiokafka() -> None:
    users = {
        str(path.relative_to(PACKAGE)) for path in modules() if any(n.startswith("aiokafka") for n in imported(path))
    }
    assert "brokers/kafka.py" in users
    assert all(user.startswith("brokers/kafka") for user in users), users


@pytest.mark.parametrize("package", ["vllm", "torch", "tritonclient", "numpy", "fsspec", "fastavro", "confluent_kafka"])
def test_the_core_imports_no_engine(package: str) -> None:
    """Nor what only some use: numpy, which is an extra, and fsspec. The others should not pay for it."""
    code = f"import sys, chains_stream, chains_stream.worker, chains_stream.client; print({package!r} in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"


def test_the_examples_use_public_imports_only() -> None:
    for path in sorted((PACKAGE.parent / "chainlets").glob("*.py")):
        assert {name for name in imported(path) if name.startswith("chains_stream.")} <= {"chains_stream.openai"}, path
