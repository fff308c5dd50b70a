"""What the tests of the command share: commands that are ended, whatever a test did."""

from collections.abc import Iterator
from uuid import uuid4

import pytest

from tests.acceptance.command import HERE, STARTED, Commands, commands


@pytest.fixture
def start(request: pytest.FixtureRequest) -> Iterator[Commands]:
    """Start a command: ``start("run", "chain.py", …)``."""
    with commands() as started:
        request.node.stash[STARTED] = started
        yield started


@pytest.fixture
def namespace() -> str:
    return f"t{uuid4().hex[:12]}"


@pytest.fixture(scope="session")
def servers() -> Iterator[dict[str, str]]:
    """The URLs of the two entrypoints of `chains/orders.py`, each served on the embedded broker."""
    file = str(HERE / "chains" / "orders.py")
    with commands() as started:
        running = {name: started("run", f"{file}:{name}", "--port", "0") for name in ("Order", "Tell")}
        yield {name: command.ready() for name, command in running.items()}
