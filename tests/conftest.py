"""What all tests share: a real Apache Kafka, started when the first test asks for one; the logs of what failed."""

import os
import subprocess
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import registry as registries
from tests.acceptance.command import STARTED

KAFKA = Path(__file__).parents[1] / "deploy" / "kafka" / "kafka"


@pytest.fixture(scope="session")
def kafka_url() -> Iterator[str]:
    """The URL of a Kafka: the one that KAFKA_URL names, else one of our own on a free port."""
    given = os.environ.get("KAFKA_URL")
    if given:
        yield given
        return
    started = subprocess.run([KAFKA, "start", "--port", "0"], capture_output=True, text=True, check=False)
    if started.returncode:
        reason = f"no Apache Kafka (it needs Java 17+ and, once, Maven): {started.stderr.strip()}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    url = started.stdout.split()[-1]
    yield url
    subprocess.run([KAFKA, "clean", "--port", url.rpartition(":")[2]], check=True)


@pytest.fixture(scope="session")
def registry() -> Iterator[registries.Registry]:
    """A schema registry: the one that REGISTRY_URL names, else one of our own on a free port."""
    with ExitStack() as stack:
        try:
            started = stack.enter_context(registries.running())
        except registries.MissingRegistryError as error:
            reason = f"no schema registry: {error}"
            if os.environ.get("CI"):
                pytest.fail(reason)
            pytest.skip(reason)
        yield started


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    passed = [report for report in terminalreporter.getreports("passed") if "kafka" in report.keywords]
    terminalreporter.write_line(f"{len(passed)} tests passed against a real Apache Kafka")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        for node in item.listchain():
            if (started := node.stash.get(STARTED, None)) is not None:
                report.sections.append(("commands", started.report()))
    return report
