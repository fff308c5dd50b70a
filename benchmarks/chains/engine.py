"""A vLLM engine as a Chain serves it, and what measures it from inside: bare, and through the broker without HTTP.

    chains run benchmarks/chains/engine.py --set engine='{"model": "folder"}'

`Chat` is what clients ask, and `Measure`, the entrypoint, what `benchmarks.engines` and `benchmarks.gpu` do.
"""

import uuid
from collections.abc import Callable
from typing import Any, Literal, Self

import pydantic

import chains_stream as chains
from benchmarks.generation import Client, Figures, Load, Tokens, measure, request
from chainlets.vllm_answers import chat
from chainlets.vllm_core import Engine, open_engine
from chainlets.vllm_engine import VLLMChat, VLLMConfig
from chains_stream import openai

SECONDS = 3600.0  # what a measurement may take
First = Callable[[], None]
Chunks = list[openai.ChatCompletionChunk]


class Settings(pydantic.BaseModel):
    """What ``--set`` takes: the fields of a `VLLMConfig`."""

    engine: dict[str, Any]


settings = chains.parameters(Settings)


class Chat(VLLMChat):
    """Answers conversations."""

    remote_config = chains.RemoteConfig(name="chat")
    config = VLLMConfig.model_validate(settings.engine)


@chains.mark_entrypoint
class Measure(chains.ChainletBase):
    """Asks the questions of a load, and says what that gave.

    ``bare`` asks the engine itself, with prompts that were rendered before; ``chain`` asks `Chat` through the broker;
    ``resumed`` has `Chat` go on in the middle of each answer that the engine gave, as after the loss of a worker.
    """

    def __init__(self, answer: Chat = chains.depends(Chat, timeout_sec=SECONDS, concurrency_limit=1024)) -> None:
        self._answer = answer
        self._engine: Engine

    async def __aenter__(self) -> Self:
        self._engine = await open_engine(Chat.config)  # the same that `Chat` has
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._engine.close()

    async def run_remote(self, way: Literal["bare", "chain", "resumed"], load: Load) -> Figures:
        if way == "chain":
            return await measure(self._through_the_chain(load), load)
        bare = await measure(await self._bare(load), load)
        return bare if way == "bare" else await measure(self._resumed(load, bare), load)

    async def _bare(self, load: Load) -> Client[Tokens]:
        rendered = [await self._engine.frontend.chat(request(number, load.tokens)) for number in range(load.questions)]
        llm = self._engine.llm

        async def read(number: int, first: First) -> Tokens:
            [job] = rendered[number].jobs
            found: Tokens = []
            async for output in llm.generate(job.prompt, job.params, str(uuid.uuid4())):
                tokens = output.outputs[0].token_ids
                if tokens and not found:
                    first()
                found += tokens
            return found

        return Client(read, list)

    def _through_the_chain(self, load: Load) -> Client[Chunks]:
        async def read(number: int, first: First) -> Chunks:
            found: Chunks = []
            begun = False
            async for chunk in self._answer.run_remote(request(number, load.tokens)):
                found.append(chunk)
                if not begun and tokens_of([chunk]):
                    begun = True
                    first()
            return found

        return Client(read, tokens_of)

    def _resumed(self, load: Load, bare: Figures) -> Client[Chunks]:
        async def read(number: int, first: First) -> Chunks:
            half = bare.answers[number][: load.tokens // 2]
            delta = openai.ChatCompletionChunkChoice(openai.ChoiceDelta(content=""), token_ids=half)
            sent = openai.ChatCompletionChunk(choices=[delta])
            rest = [chunk async for chunk in chat(self._engine, request(number, load.tokens), (), (sent,))]
            first()
            return [sent, *rest]

        return Client(read, tokens_of)


def tokens_of(chunks: Chunks) -> Tokens:
    return [token for chunk in chunks for choice in chunk.choices for token in choice.token_ids or ()]
