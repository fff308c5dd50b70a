"""The page that shows the API: its script is run, on the least of a browser that it needs."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import chains_stream as chains
from chains_stream import openai
from tests.sample import Counting, Sample
from tests.serving import serving

SCRIPT = Path(__file__).parents[1] / "page.js"
KEYS = {"api_keys": f"ada:{64 * '0'}", "secret": 32 * "s"}


class Talk(chains.ChainletBase):
    async def run_remote(self, websocket: chains.WebSocketProtocol) -> None:
        await websocket.send_text("hello")


class Chat(chains.ChainletBase):
    async def run_remote(self, request: openai.ChatCompletionRequest) -> str:
        return request.messages[0].text


@pytest.fixture
def node() -> str:
    found = shutil.which("node")
    if found is None:
        pytest.skip("needs Node.js, to run the script of the page")
    return found


async def shown(node: str, folder: Path, entrypoint: type[Any], **settings: Any) -> tuple[Any, dict[str, Any]]:
    """Give the OpenAPI document of a Chain, and what its page made of it."""
    async with serving(entrypoint, workers=False, **settings) as served:
        page = (await served.http.get("/docs")).text
        document = (await served.http.get("/openapi.json")).json()
    (folder / "page.html").write_text(page, encoding="utf-8")
    (folder / "openapi.json").write_text(json.dumps(document), encoding="utf-8")
    command = [node, str(SCRIPT), str(folder / "page.html"), str(folder / "openapi.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)  # noqa: ASYNC221 - ours
    assert done.returncode == 0, done.stderr
    return document, json.loads(done.stdout)


@pytest.mark.parametrize("entrypoint", [Sample, Counting, Talk, Chat])
async def test_the_page_shows_and_asks_all_that_the_document_describes(
    node: str, tmp_path: Path, entrypoint: type[Any]
) -> None:
    document, page = await shown(node, tmp_path, entrypoint)
    described = [f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods]
    assert page["titles"] == described
    asked = [f"{each['method']} {each['url'].removeprefix('http://gateway')}" for each in page["asked"]]
    expected = [each.replace("{request_id}", "a%20b").replace("{id}", "a%20b") for each in described]
    assert [each.partition("?")[0] for each in asked] == [each for each in expected if each != "GET /websocket"]
    assert not page["keys"]
    assert all("authorization" not in each["headers"] for each in page["asked"])


async def test_the_page_presents_a_key_where_one_is_asked_for(node: str, tmp_path: Path) -> None:
    _, page = await shown(node, tmp_path, Counting, **KEYS)
    assert page["keys"]
    headers = {each["url"].removeprefix("http://gateway"): each["headers"] for each in page["asked"]}
    assert headers["/run_remote"]["authorization"] == "Bearer secret"
    assert headers["/async_request/a%20b/events?starting_after=a%20b"]["last-event-id"] == "a b"
    assert "authorization" not in headers["/healthz"]
    assert not any("secret" in command for command in page["commands"])
    assert "authorization: Bearer $CHAINS_API_KEY" in page["commands"][0]
