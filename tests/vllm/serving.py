"""Chainlets of a tiny model on one engine, called as users call them; and the bare engine beside them."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY

import chains_stream as chains
from chainlets.vllm_engine import Delta, Sampling, VLLMChat, VLLMCompletions, VLLMConfig, VLLMGenerate
from chains_stream import openai, policy

WAIT = 30.0  # seconds for what takes a moment
MAX_LENGTH = 1024
SEQUENCES = 64
SERVED = "tiny"
ADAPTER = "other"


def config_of(model: Path, **more: Any) -> VLLMConfig:
    """Give the config of a model for tests: small, exact, and quick to start."""
    given: dict[str, Any] = {
        "model": str(model),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": MAX_LENGTH,
        "max_num_seqs": SEQUENCES,
        "kv_cache_memory_bytes": 64 << 20,
    }
    return VLLMConfig.model_validate(given | more)


@dataclass(frozen=True)
class Served:
    """Chainlets that were entered, and connections to hosts of them. `llm` is the engine that they all share."""

    config: VLLMConfig
    chat: Any
    completions: Any
    generate: Any
    own_chat: VLLMChat
    own_completions: VLLMCompletions
    own_generate: VLLMGenerate

    @property
    def llm(self) -> Any:
        return self.own_generate.engine.llm

    def tokens(self, text: str) -> list[int]:
        return list(self.llm.renderer.tokenizer.encode(text))

    async def bare(self, prompt: str | list[int], **params: Any) -> Any:
        """Give what the bare engine makes of a prompt, whole: vLLM's ``CompletionOutput``."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        tokens = self.tokens(prompt) if isinstance(prompt, str) else prompt
        sampling = SamplingParams(**params, output_kind=RequestOutputKind.FINAL_ONLY)
        async for output in self.llm.generate({"prompt_token_ids": tokens}, sampling, f"bare-{time.monotonic_ns()}"):
            found = output
        return found.outputs[0] if sampling.n == 1 else found.outputs


@asynccontextmanager
async def serve(model: Path, adapter: Path) -> AsyncIterator[Served]:
    config = config_of(
        model,
        served_model_name=SERVED,
        lora_modules={ADAPTER: str(adapter)},
        scheduling_policy="priority",
        tool_call_parser="hermes",
    )
    given = config

    class Chat(VLLMChat):
        config = given

    class Completions(VLLMCompletions):
        config = given

    class Generate(VLLMGenerate):
        config = given

    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        yield Served(
            config,
            await enter(chains.run_chain(Chat)),
            await enter(chains.run_chain(Completions)),
            await enter(chains.run_chain(Generate)),
            await enter(Chat()),
            await enter(Completions()),
            await enter(Generate()),
        )


async def collected(stream: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in stream]


@contextmanager
def request_of(emitted: Sequence[Any] = ()) -> Iterator[None]:
    """Be in a request that went on for a while in a worker that is gone, which had sent what is `emitted`."""
    scope = policy.Scope.new(60)
    scope.emitted, scope.attempt = tuple(emitted), 2 if emitted else 1
    token = policy.current.set(scope)
    try:
        yield
    finally:
        policy.current.reset(token)


async def run(chainlet: Any, *arguments: Any, emitted: Sequence[Any] = ()) -> list[Any]:
    """Give what `run_remote` of an entered Chainlet yields."""
    with request_of(emitted):
        return await collected(type(chainlet).run_remote(chainlet, *arguments))


def said(*contents: str, **fields: Any) -> openai.ChatCompletionRequest:
    """Give a conversation of messages by the user and the assistant in turn."""
    roles: tuple[openai.Role, ...] = ("user", "assistant")
    messages = [openai.ChatMessage(roles[number % 2], content) for number, content in enumerate(contents)]
    return openai.ChatCompletionRequest(messages=messages, **fields)


def content_of(chunks: Sequence[openai.ChatCompletionChunk], index: int = 0) -> str:
    return "".join(choice.delta.content or "" for choice in choices_of(chunks, index))


def text_of(chunks: Sequence[openai.Completion], index: int = 0) -> str:
    return "".join(choice.text for choice in choices_of(chunks, index))


def tokens_of(chunks: Sequence[Any], index: int = 0) -> list[int]:
    return [token for choice in choices_of(chunks, index) for token in choice.token_ids]


def choices_of(chunks: Sequence[Any], index: int = 0) -> list[Any]:
    return [choice for chunk in chunks for choice in chunk.choices if choice.index == index]


def written(deltas: Sequence[Delta]) -> tuple[str, list[int]]:
    """Give the text of deltas, and its tokens."""
    return "".join(delta.text for delta in deltas), [token for delta in deltas for token in delta.token_ids]


def metric(name: str) -> float | None:
    """Give a metric of the engine as `/metrics` shows it; None if it is not there."""
    for family in REGISTRY.collect():
        for sample in family.samples:
            if sample.name == name:
                return float(sample.value)
    return None


async def until(condition: Callable[[], bool], what: str, seconds: float = WAIT) -> float:
    """Wait until something is so, and give how many seconds it took."""
    begun = time.monotonic()
    while not condition():
        if time.monotonic() - begun > seconds:
            raise AssertionError(f"not so after {seconds} s: {what}")
        await asyncio.sleep(0.01)
    return time.monotonic() - begun


__all__ = ["ADAPTER", "MAX_LENGTH", "SEQUENCES", "SERVED", "Delta", "Sampling", "Served", "config_of", "serve"]
