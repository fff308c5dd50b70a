"""The Triton server that the tests share. Without its environment they are skipped by name."""

import shutil
from collections.abc import Iterator
from uuid import uuid4

import pytest

from tests.triton.server import ENVIRONMENT, NOTES, PORT, Server


@pytest.fixture(scope="session")
def installed() -> None:
    """Require Triton's environment."""
    if (ENVIRONMENT / ".ready").exists():
        return
    pytest.skip(f"no Triton: there is no {ENVIRONMENT.name}; `make engines` sets it up")


@pytest.fixture(scope="session")
def notes_folder(installed: None) -> Iterator[None]:
    NOTES.mkdir()
    yield
    shutil.rmtree(NOTES)


@pytest.fixture(scope="session")
def triton(notes_folder: None) -> Iterator[Server]:
    """Run a server with all models of the tests, on the port that they name."""
    server = Server("grpc-header-forward-pattern=(authorization|x-.*)", port=PORT)
    server.start()
    yield server
    server.clean()


@pytest.fixture
def key() -> str:
    """Give a name for what models note of this test's request."""
    return uuid4().hex
