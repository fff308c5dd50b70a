"""Chainlets that take the requests of OpenAI's API, and do what the last message says."""

from collections.abc import AsyncIterator

import msgspec

import chains_stream as chains
from chains_stream import openai as api
from tests.sample import Seen
from tests.serving import WAIT

WIDE = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=64))
USAGE = api.Usage(prompt_tokens=3, completion_tokens=2, prompt_tokens_details=api.PromptTokensDetails(cached_tokens=1))


class Talk(chains.ChainletBase):
    """Streams chunks: the words of the last message, or what its first word asks for."""

    remote_config = WIDE

    async def run_remote(self, request: api.ChatCompletionRequest) -> AsyncIterator[api.ChatCompletionChunk]:
        text = request.messages[-1].text
        match text.partition(" ")[0]:
            case "/fail":
                yield api.ChatCompletionChunk.of("half")
                raise ValueError("the engine broke")
            case "/refuse":
                raise ValueError("the engine is cold")
            case "/hang":
                try:
                    yield api.ChatCompletionChunk.of("first")
                    Seen.note("hangs")
                    await Seen.until("go", seconds=WAIT)
                finally:
                    Seen.note("stopped")
            case "/tool":
                for chunk in tool_chunks():
                    yield chunk
            case _:
                for index in range(request.n or 1):
                    for word in text.split():
                        yield api.ChatCompletionChunk.of(f"{word} ", index=index)
        yield api.ChatCompletionChunk(choices=[], usage=USAGE)


def tool_chunks() -> list[api.ChatCompletionChunk]:
    """Give two calls of tools in pieces that are mixed, as engines give them."""
    begin, piece = api.ChoiceDeltaToolCall, api.ChoiceDeltaToolCallFunction
    deltas = [
        begin(0, "call_a", "function", piece("weather", "")),
        begin(0, function=piece(arguments='{"city": ')),
        begin(1, "call_b", "function", piece("clock", "{}")),
        begin(0, function=piece(arguments='"Oslo"}')),
    ]
    return [api.ChatCompletionChunk.of(tool_calls=[delta]) for delta in deltas]


class TalkText(chains.ChainletBase):
    """Streams plain text."""

    remote_config = WIDE

    async def run_remote(self, request: api.ChatCompletionRequest) -> AsyncIterator[str]:
        for word in request.messages[-1].text.split():
            yield f"{word} "


class TalkWhole(chains.ChainletBase):
    """Gives a whole answer: text, and a call of a tool."""

    remote_config = WIDE

    async def run_remote(self, request: api.ChatCompletionRequest) -> api.ChatCompletion:
        call = api.ToolCall("call_a", api.FunctionCall("weather", '{"city": "Oslo"}'))
        said = request.messages[-1].text
        return api.ChatCompletion.of(said, tool_calls=[call] if request.tools else None, usage=USAGE)


class TalkPlain(chains.ChainletBase):
    """Gives a whole text."""

    remote_config = WIDE

    async def run_remote(self, request: api.ChatCompletionRequest) -> str:
        return request.messages[-1].text.upper()


class TalkMixed(chains.ChainletBase):
    """Streams text, and then how it ended."""

    remote_config = WIDE

    async def run_remote(self, request: api.ChatCompletionRequest) -> AsyncIterator[str | api.ChatCompletionChunk]:
        yield request.messages[-1].text
        yield api.ChatCompletionChunk.of(finish_reason="length", usage=USAGE)


class TalkCounting(chains.ChainletBase):
    """Says how often it was run."""

    remote_config = WIDE

    async def run_remote(self, request: api.ChatCompletionRequest) -> AsyncIterator[str]:
        Seen.note(request.messages[-1].text)
        yield f"run {Seen.counts[request.messages[-1].text]}"


class Complete(chains.ChainletBase):
    """Goes on with each prompt by its own length."""

    remote_config = chains.RemoteConfig(name="Complete", compute=chains.Compute(predict_concurrency=64))

    async def run_remote(self, request: api.CompletionRequest) -> AsyncIterator[api.Completion]:
        for index, prompt in enumerate(request.prompts):
            yield api.Completion.of(f"{len(prompt)}", index=index)
            yield api.Completion.of("!", index=index, finish_reason="length")
        yield api.Completion(choices=[], usage=USAGE)


class CompletePlain(chains.ChainletBase):
    """Streams plain text."""

    remote_config = WIDE

    async def run_remote(self, request: api.CompletionRequest) -> AsyncIterator[str]:
        for prompt in request.prompts:
            yield f"<{prompt}>"
            yield "."


class Measure(chains.ChainletBase):
    """Embeds texts by their lengths."""

    remote_config = chains.RemoteConfig(name="measure-1", compute=chains.Compute(predict_concurrency=64))

    async def run_remote(self, request: api.EmbeddingRequest) -> api.EmbeddingResponse:
        vectors = [[float(len(text)), 0.5] for text in request.inputs]
        return api.EmbeddingResponse.of(vectors, prompt_tokens=len(vectors))


class MeasurePlain(chains.ChainletBase):
    """Gives plain vectors."""

    remote_config = WIDE

    async def run_remote(self, request: api.EmbeddingRequest) -> list[list[float]]:
        return [[float("nan" if text == "nan" else 1.0)] for text in request.inputs]


class TalkTokens(chains.ChainletBase):
    """Streams words with the numbers of their characters, as an engine gives the tokens that it made; by two names."""

    remote_config = WIDE
    openai_models = ("base", "lora-a")

    async def run_remote(self, request: api.ChatCompletionRequest) -> AsyncIterator[api.ChatCompletionChunk]:
        for number, word in enumerate([request.model, *request.messages[-1].text.split()]):
            choice = api.ChatCompletionChunkChoice(api.ChoiceDelta(content=f"{word} "), token_ids=[*word.encode()])
            yield api.ChatCompletionChunk(choices=[choice], prompt_token_ids=[7, 8] if not number else msgspec.UNSET)


class CompleteTokens(chains.ChainletBase):
    """The same for completions."""

    remote_config = WIDE

    async def run_remote(self, request: api.CompletionRequest) -> AsyncIterator[api.Completion]:
        for number, character in enumerate(str(request.prompt)):
            yield api.Completion(
                choices=[
                    api.CompletionChoice(
                        character,
                        token_ids=[ord(character)],
                        prompt_token_ids=[7, 8] if not number else msgspec.UNSET,
                    )
                ]
            )


class Guard(chains.ChainletBase):
    """Takes a request of the API, and gives no answer of it: it is not offered."""

    remote_config = chains.RemoteConfig(name="Guard", compute=chains.Compute(predict_concurrency=64))

    async def run_remote(self, request: api.ChatCompletionRequest) -> bool:
        return bool(request.messages)


class WithUnit(api.ChatCompletionRequest, kw_only=True, omit_defaults=True):
    """A request with a field of the user's own."""

    unit: str = "m"


class TalkUnit(chains.ChainletBase):
    """Takes more than the API has."""

    remote_config = chains.RemoteConfig(name="Unit Talk", compute=chains.Compute(predict_concurrency=64))

    async def run_remote(self, request: WithUnit) -> str:
        return f"{request.messages[-1].text} {request.unit}"


@chains.mark_entrypoint
class Several(chains.ChainletBase):
    """One model of each kind, two of chats, one Chainlet that is none, and one that has no name for clients."""

    remote_config = WIDE

    def __init__(
        self,
        unit: TalkUnit = chains.depends(TalkUnit),
        guard: Guard = chains.depends(Guard),
        complete: Complete = chains.depends(Complete),
        measure: Measure = chains.depends(Measure),
        plain: TalkPlain = chains.depends(TalkPlain),
    ) -> None:
        self._parts = unit, guard, complete, measure, plain

    async def run_remote(self, request: api.ChatCompletionRequest) -> AsyncIterator[str]:
        yield f"several: {request.messages[-1].text}"


class TalkFailing(chains.ChainletBase):
    """Fails with the status that it is told."""

    remote_config = WIDE

    async def run_remote(self, request: api.ChatCompletionRequest) -> str:
        match request.messages[-1].text:
            case "/overloaded":
                raise chains.OverloadedError("the queue is full", retry_after=7)
            case "/final":
                raise NotAgainError("this prompt breaks the engine")
            case "/long":
                raise chains.InvalidArgumentError("the prompt is too long", path="$.messages")
            case _:
                raise RuntimeError("the engine broke")


class NotAgainError(Exception):
    """A user's own error that says that trying again is useless."""

    retryable = False
