"""schemathesis reads the document of a Chain, sends what it allows and what it does not, and finds no violation."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.acceptance.command import HERE, Commands

ROOT = HERE.parents[1]
CHAINS = (
    HERE / "chains" / "described.py:Plain",
    HERE / "chains" / "described.py:Flow",
    ROOT / "chainlets" / "openai_chat.py",
)


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: chain.name)
def test_the_gateway_does_what_its_document_says(chain: Path, start: Commands, tmp_path: Path) -> None:
    url = start("run", str(chain), "--port", "0", variables={"CHAINS_DEADLINE": "5"}).ready()
    found = subprocess.run(
        [
            Path(sys.executable).with_name("schemathesis"),
            *("run", f"{url}/openapi.json", "--checks", "all", "--seed", "1", "--generation-deterministic"),
            *("--max-examples", "12", "--no-color", "--continue-on-failure"),
            *("--exclude-checks", "use_after_free"),  # a request that was cancelled is still there to be asked about
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "SCHEMATHESIS_HOOKS": str(HERE / "schemathesis_hooks.py"), "NO_PROXY": "127.0.0.1"},
        timeout=110,
    )
    assert found.returncode == 0, found.stdout + found.stderr
