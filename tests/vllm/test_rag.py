"""`chainlets/rag.py` with real engines: one that embeds, one that answers."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

import chains_stream as chains
from chains_stream import openai
from chains_stream.chain import Chain
from tests.vllm import tiny, tiny_pooling

RAG = Path(__file__).parents[2] / "chainlets" / "rag.py"
SMALL = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 8, "kv_cache_memory_bytes": 64 << 20}
TEXT = "The office opens at nine. Parking is behind the house."


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def ask(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Any]:
    """The Chain, as `chains run --set …` loads it, called over the embedded broker."""
    folder = tmp_path_factory.mktemp("rag")
    (folder / "documents").mkdir()
    (folder / "documents" / "handbook.txt").write_text(TEXT, encoding="utf-8")
    values = {
        "documents": folder / "documents",
        "model": tiny.make(folder / "llama"),
        "embedding_model": tiny_pooling.make_embedding(folder / "embedding"),
        "embedder": "vllm",
    }
    chain = Chain.load(
        str(RAG), {name: str(value) for name, value in values.items()} | {"vllm": SMALL, "embedding_vllm": SMALL}
    )
    entrypoint: Any = chain.entrypoint
    hosting: Any = chains.run_chain(entrypoint)
    async with hosting as connection:
        yield connection


async def test_an_engine_answers_from_what_another_one_found(ask: Any) -> None:
    request = openai.ChatCompletionRequest(
        messages=[openai.ChatMessage("user", "When?")], max_tokens=20, temperature=0, ignore_eos=True
    )
    chunks = [chunk async for chunk in ask.run_remote(request)]
    choices = [choice for chunk in chunks for choice in chunk.choices]
    said = "".join(choice.delta.content or "" for choice in choices)
    assert said.endswith("\n\nSources read: [1] handbook.txt")
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["length"]
    assert sum(len(choice.token_ids or ()) for choice in choices) == 20
    usage = next(chunk.usage for chunk in chunks if chunk.usage)
    assert usage.completion_tokens == 20
    assert usage.prompt_tokens > len(TEXT)  # which is in the prompt, byte by byte


async def test_what_does_not_fit_the_model_is_the_clients_error(ask: Any) -> None:
    request = openai.ChatCompletionRequest(messages=[openai.ChatMessage("user", "Why? " * 1000)])
    with pytest.raises(chains.InvalidArgumentError, match="maximum context length"):
        _ = [chunk async for chunk in ask.run_remote(request)]
