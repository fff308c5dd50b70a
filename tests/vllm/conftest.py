"""A tiny model, and one engine for all tests of this folder: to start one takes half a minute."""

import importlib.util
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.vllm import serving, tiny

HERE = Path(__file__).parent
# No process of its own for the model, which only costs time here; and no network.
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
ENVIRONMENT |= {"VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}  # more threads wait for each other
for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = importlib.util.find_spec("vllm") is None
    for item in items:
        if HERE not in item.path.parents:
            continue
        if missing:
            item.add_marker(pytest.mark.skip(reason="no vLLM in this environment: see `make engines`"))
        # An engine belongs to its event loop, so all tests share one; and other people's warnings are theirs.
        item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)
        item.add_marker(pytest.mark.filterwarnings("ignore"))
        item.add_marker(pytest.mark.timeout(300))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("models") / "tiny")


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def served(model: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[serving.Served]:
    """Chainlets on one engine."""
    adapter = tiny.make_lora(tmp_path_factory.mktemp("models") / "adapter")
    async with serving.serve(model, adapter) as found:
        yield found
