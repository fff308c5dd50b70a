"""The answers of a vLLM engine: what it writes as chunks of OpenAI's API, and as deltas for use inside of Chains."""

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Any

import msgspec

import chains_stream as chains
from chainlets import vllm_logprobs
from chainlets.vllm_core import Engine
from chainlets.vllm_frontend import Conversation, Job
from chainlets.vllm_generation import Piece, Run
from chainlets.vllm_resume import Sent, pasts
from chains_stream import openai

COMPLETION_TOKENS = 16  # of a completion, if the client does not say: as in OpenAI's API


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a text is to be written; None leaves it to the model's own defaults. See vLLM's ``SamplingParams``.

    `model` is the name of a LoRA adapter, empty for the model itself. `max_tokens` is as many as there is room for, if
    it is None. `logprobs` asks for the logprobs of the tokens, and of that many of the likeliest at each place.
    `structured_outputs` holds the answer to a ``json`` schema, a ``regex``, a ``choice`` or a ``grammar``.
    """

    model: str = ""
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    ignore_eos: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    logprobs: int | None = None
    structured_outputs: dict[str, Any] | None = None
    priority: int | None = None


class Delta(msgspec.Struct, omit_defaults=True):
    """What comes to a text, with the tokens that it is of; the last one has a reason, and the usage of them all."""

    text: str
    token_ids: list[int]
    finish_reason: openai.FinishReason | None = None
    logprobs: list[openai.TokenLogprob] | None = None
    usage: openai.Usage | None = None


class Tally:
    """How many tokens a request took."""

    def __init__(self, jobs: Sequence[Job], choices: int) -> None:
        """Count for `jobs`, of which each `choices` are of one prompt."""
        self._prompt = sum(len(job.prompt_token_ids) for job in jobs[::choices])
        self._written = 0
        self._cached: dict[int, int] = {}
        self._choices = choices
        self.reasoning: int | None = None

    def count(self, piece: Piece) -> None:
        self._written += len(piece.token_ids)
        if piece.cached is not None:  # the first choice of a prompt may find it there; the others find hers
            self._cached.setdefault(piece.index // self._choices, piece.cached)

    @property
    def usage(self) -> openai.Usage:
        cached, reasoning = self._cached, self.reasoning
        return openai.Usage(
            self._prompt,
            self._written,
            prompt_tokens_details=openai.PromptTokensDetails(cached_tokens=min(sum(cached.values()), self._prompt))
            if cached
            else None,
            completion_tokens_details=None
            if reasoning is None
            else openai.CompletionTokensDetails(reasoning_tokens=reasoning),
        )


class _Voice:
    """One choice of a conversation: its parser, and what it is told of the output."""

    def __init__(self, conversation: Conversation, job: Job) -> None:
        self._conversation = conversation
        self._parser = conversation.parser()
        self._prompt = job.prompt_token_ids if self._parser is not None else []
        self._tokens: list[int] = []
        self._calls = False

    def say(self, piece: Piece) -> tuple[openai.ChoiceDelta, openai.FinishReason | None]:
        """Give what comes to the message with a piece, and why it ends."""
        if self._parser is None:
            return openai.ChoiceDelta(content=piece.text or None), piece.finish_reason
        self._tokens += piece.token_ids
        message = self._parser.parse_delta(
            piece.text,
            list(piece.token_ids),
            self._conversation.request,
            self._prompt,
            finished=piece.finish_reason is not None,
        )
        if message is None:
            return openai.ChoiceDelta(), self._reason(piece)
        calls = [
            _tool_call(call) for call in message.tool_calls or () if not (self._conversation.one_tool and call.index)
        ]
        self._calls = self._calls or bool(calls)
        delta = openai.ChoiceDelta(
            content=message.content or None, reasoning_content=message.reasoning or None, tool_calls=calls or None
        )
        return delta, self._reason(piece)

    @property
    def reasoning_tokens(self) -> int:
        return 0 if self._parser is None else int(self._parser.count_reasoning_tokens(tuple(self._tokens)))

    def _reason(self, piece: Piece) -> openai.FinishReason | None:
        called = self._calls and not self._conversation.named_tool
        return "tool_calls" if called and piece.finish_reason == "stop" else piece.finish_reason


async def chat(
    engine: Engine, request: openai.ChatCompletionRequest, names: Sequence[str], emitted: Sequence[Any]
) -> AsyncGenerator[openai.ChatCompletionChunk, None]:
    """Go on with a conversation; `emitted` are the chunks that were sent, and `names` what the model is called."""
    if _is_whole(emitted):
        return
    lora = engine.adapter(request.model, names)
    conversation = await engine.frontend.chat(request)
    run = Run(engine, lora, request.priority or 0, pasts(_sent(emitted)))
    jobs, tally = conversation.jobs, Tally(conversation.jobs, request.n or 1)
    voices = [_Voice(conversation, job) for job in jobs]
    prompt = jobs[0].prompt_token_ids if request.return_token_ids and not emitted else None
    async with aclosing(run.pieces(jobs)) as pieces:
        async for piece in pieces:
            tally.count(piece)
            delta, reason = voices[piece.index].say(piece)
            if piece.sent:
                continue
            logprobs = None
            if request.logprobs and piece.logprobs is not None:
                top = request.top_logprobs or 0
                its = vllm_logprobs.of_chat(piece.token_ids, piece.logprobs, top, engine.frontend.decode)
                logprobs = openai.ChoiceLogprobs(content=its)
            choice = openai.ChatCompletionChunkChoice(delta, piece.index, reason, logprobs, list(piece.token_ids))
            chunk = openai.ChatCompletionChunk(choices=[choice])
            if prompt is not None:
                chunk.prompt_token_ids, prompt = prompt, None
            yield chunk
    if engine.config.reasoning_parser is not None:
        tally.reasoning = sum(voice.reasoning_tokens for voice in voices)
    yield openai.ChatCompletionChunk(choices=[], usage=tally.usage)


async def complete(
    engine: Engine, request: openai.CompletionRequest, names: Sequence[str], emitted: Sequence[Any]
) -> AsyncGenerator[openai.Completion, None]:
    """Go on with texts; `emitted` are the chunks that were sent, and `names` what the model is called."""
    if _is_whole(emitted):
        return
    choices = request.n or 1
    if request.best_of is not None and request.best_of != choices:
        raise chains.InvalidArgumentError("vLLM has no best_of: ask for n", path="$.best_of")
    lora = engine.adapter(request.model, names)
    limit = COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    jobs = await engine.frontend.completion(request, max_tokens=limit)
    run, tally = Run(engine, lora, request.priority or 0, pasts(_sent(emitted))), Tally(jobs, choices)
    texts = _Texts(engine, request, jobs, emitted)
    async with aclosing(run.pieces(jobs)) as pieces:
        async for piece in pieces:
            tally.count(piece)
            if not piece.sent:
                for choice in texts.choices(piece):
                    yield openai.Completion(choices=[choice])
    yield openai.Completion(choices=[], usage=tally.usage)


class _Texts:
    """The choices of a completion: which have begun, and where the text of their next token is."""

    def __init__(
        self, engine: Engine, request: openai.CompletionRequest, jobs: Sequence[Job], emitted: Sequence[Any]
    ) -> None:
        self._frontend = engine.frontend
        self._request = request
        self._jobs = jobs
        sent = [choice for chunk in emitted for choice in chunk.choices]
        self._begun = {choice.index for choice in sent}
        self._offsets = {
            choice.index: vllm_logprobs.end_of(choice.logprobs) for choice in sent if choice.logprobs is not None
        }

    def choices(self, piece: Piece) -> Iterator[openai.CompletionChoice]:
        """Give what comes to a text with a piece: first, if the client asks for it, its prompt."""
        job, index = self._jobs[piece.index], piece.index
        first = index not in self._begun
        self._begun.add(index)
        prompt = job.prompt_token_ids if first and (self._request.echo or self._request.return_token_ids) else []
        if first and self._request.echo:
            logprobs = self._logprobs(index, prompt, piece.prompt_logprobs)
            yield openai.CompletionChoice(self._frontend.text_of(job), index, None, logprobs, [])
        logprobs = self._logprobs(index, piece.token_ids, piece.logprobs)
        choice = openai.CompletionChoice(piece.text, index, piece.finish_reason, logprobs, list(piece.token_ids))
        if prompt and self._request.return_token_ids:
            choice.prompt_token_ids = prompt
        yield choice

    def _logprobs(
        self, index: int, tokens: Sequence[int], logprobs: Sequence[Any] | None
    ) -> openai.CompletionLogprobs | None:
        top = self._request.logprobs
        if top is None or logprobs is None:
            return None
        offset = self._offsets.get(index, 0)
        found = vllm_logprobs.of_completion(tokens, logprobs, top, self._frontend.decode, offset)
        if tokens:
            self._offsets[index] = vllm_logprobs.end_of(found)
        return found


async def write(
    engine: Engine, prompt: str | list[int], sampling: Sampling, names: Sequence[str], emitted: Sequence[Delta]
) -> AsyncGenerator[Delta, None]:
    """Go on with one text; `emitted` are the deltas that were sent."""
    if any(delta.finish_reason for delta in emitted):
        return
    given = {name: value for name in sampling.__struct_fields__ if (value := getattr(sampling, name)) is not None}
    if sampling.logit_bias is not None:
        given["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
    request = openai.CompletionRequest(prompt=prompt, **given)
    lora = engine.adapter(sampling.model, names)
    jobs = await engine.frontend.completion(request, max_tokens=sampling.max_tokens)
    past = pasts(Sent(0, delta.token_ids, bool(delta.finish_reason)) for delta in emitted)
    run, tally = Run(engine, lora, sampling.priority or 0, past), Tally(jobs, 1)
    async with aclosing(run.pieces(jobs)) as pieces:
        async for piece in pieces:
            tally.count(piece)
            if piece.sent:
                continue
            delta = Delta(piece.text, list(piece.token_ids), piece.finish_reason)
            if sampling.logprobs is not None and piece.logprobs is not None:
                top, decode = sampling.logprobs, engine.frontend.decode
                delta.logprobs = vllm_logprobs.of_chat(piece.token_ids, piece.logprobs, top, decode)
            if piece.finish_reason is not None:
                delta.usage = tally.usage
            yield delta


def _is_whole(emitted: Sequence[Any]) -> bool:
    """Tell whether all was sent: the usage comes last."""
    return any(chunk.usage is not None for chunk in emitted)


def _sent(emitted: Sequence[Any]) -> Iterator[Sent]:
    for chunk in emitted:
        for choice in chunk.choices:
            tokens = choice.token_ids
            yield Sent(choice.index, tokens if isinstance(tokens, list) else None, choice.finish_reason is not None)


def _tool_call(call: Any) -> openai.ChoiceDeltaToolCall:
    function = call.function
    its = None if function is None else openai.ChoiceDeltaToolCallFunction(function.name, function.arguments)
    return openai.ChoiceDeltaToolCall(call.index, call.id, call.type, its)
