"""A client that openapi-python-client makes of the document of a Chain: it takes our types, and gives them back."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.command import HERE, Commands, chains

PLAIN = f"{HERE / 'chains' / 'described.py'}:Plain"
PACKAGE = "client_of_plain"


@pytest.fixture
def generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Generate the client, and let it be imported under the name that is given."""
    document = tmp_path / "openapi.json"
    document.write_text(chains("openapi", PLAIN).stdout, encoding="utf-8")
    bin_folder = Path(sys.executable).parent
    made = subprocess.run(
        [
            bin_folder / "openapi-python-client",
            *("generate", "--path", str(document), "--output-path", str(tmp_path / PACKAGE)),
            *("--meta", "none", "--fail-on-warning"),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"},  # it formats with ruff
        timeout=60,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    monkeypatch.syspath_prepend(tmp_path)
    return PACKAGE


def test_a_generated_client_runs_the_chain_and_asks_about_requests(generated: str, start: Commands) -> None:
    url = start("run", PLAIN, "--port", "0").ready()
    models = importlib.import_module(f"{generated}.models")

    def call(name: str, **arguments: Any) -> Any:
        return importlib.import_module(f"{generated}.api.default.{name}").sync(client=client, **arguments)

    with importlib.import_module(f"{generated}.client").Client(base_url=url) as client:
        note = models.Note(text="tea", count=2, kind=models.NoteKind.BOLD)
        arguments = models.RunRemoteBody(note=note, title="a ")
        copied = call("run_remote", body=arguments)
        assert (copied.texts, copied.note.kind) == (["a tea", "a tea"], models.NoteKind.BOLD)

        wrong = call("run_remote", body=models.RunRemoteBody(note=models.Note(text="tea", count=9)))
        assert isinstance(wrong, models.Problem)
        assert (wrong.status, wrong.path) == (400, "$.note.count")

        envelope = {"model_input": arguments.to_dict(), "priority": 1}
        accepted = call("async_run_remote", body=models.AsyncRunRemoteBodyType0.from_dict(envelope))
        report = call("get_async_request", request_id=accepted.request_id, prefer="wait=20")
        assert report.status == models.Status.SUCCEEDED
        assert report.result.texts == ["a tea", "a tea"]

        late = call("cancel_async_request", request_id=accepted.request_id)
        assert (late.status, late.canceled) == (models.Status.SUCCEEDED, False)
        assert call("async_queue_status").num_in_progress_requests == 0
        assert call("healthz").status == "ok"
