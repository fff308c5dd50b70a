"""What the engine writes, piece by piece: of one choice or several, from the beginning or where it broke off."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import msgspec

import chains_stream as chains
from chainlets.vllm_core import Engine
from chainlets.vllm_frontend import Job
from chainlets.vllm_resume import Past, continuing
from chains_stream.openai import FinishReason

_FINISHES: Mapping[str, FinishReason] = {"stop": "stop", "length": "length", "repetition": "stop"}
_NOTHING = Past()


class Piece(msgspec.Struct, frozen=True):
    """What came to one choice.

    `logprobs` are vLLM's, of each token, and `prompt_logprobs` those of the prompt, with the first piece. `cached` is
    how many tokens of the prompt were in the prefix cache, if it is known. A piece that was `sent` before is here for
    those who keep account of the text.
    """

    index: int
    text: str
    token_ids: Sequence[int]
    finish_reason: FinishReason | None = None
    logprobs: Sequence[Any] | None = None
    prompt_logprobs: Sequence[Any] | None = None
    cached: int | None = None
    sent: bool = False


@dataclass(frozen=True)
class Run:
    """What all choices of a request have in common."""

    engine: Engine
    lora: Any
    priority: int
    pasts: Mapping[int, Past]

    async def pieces(self, jobs: Sequence[Job]) -> AsyncGenerator[Piece, None]:
        """Yield the pieces of all jobs as they come, first those that were sent.

        Raises what `Engine.generate` does, and StreamInterruptedError where a job can't go on.
        """
        streams = [self._of_one(job, self.pasts.get(job.index, _NOTHING)) for job in jobs]
        async with aclosing(streams[0] if len(streams) == 1 else _merged(streams)) as pieces:
            async for piece in pieces:
                yield piece

    async def _of_one(self, job: Job, past: Past) -> AsyncGenerator[Piece, None]:
        tokens = past.tokens
        if not tokens and not past.finished:
            async with aclosing(self.engine.generate(job, self.lora, self.priority)) as outputs:
                async for output in outputs:
                    if (piece := _piece(job.index, output)) is not None:
                        yield piece
            return
        text = _Text(self.engine, job)
        for number, chunk in enumerate(past.chunks, 1):
            ended = past.finished and number == len(past.chunks)
            yield Piece(job.index, text.of(chunk, ended=ended), chunk, sent=True)
        if past.finished:
            return
        rest = self._rest(job, tokens)
        async with aclosing(self.engine.generate(rest, self.lora, self.priority)) as outputs:
            async for output in outputs:
                if (piece := _piece(job.index, output)) is None:
                    continue
                piece = text.put_into(piece)
                yield piece
                if piece.finish_reason is not None:
                    return  # the engine may not know of it, and is told by the end of its generator

    def _rest(self, job: Job, tokens: list[int]) -> Job:
        params = continuing(job.params, len(tokens), self.engine.sampler)
        prompt = dict(job.prompt) | {"prompt_token_ids": job.prompt_token_ids + tokens}
        return replace(job, prompt=prompt, params=params)


class _Text:
    """The text of a choice that goes on: what the engine makes of the new tokens alone may lack what came before."""

    def __init__(self, engine: Engine, job: Job) -> None:
        self._detokenizer = engine.frontend.detokenizer(job)

    def of(self, tokens: Sequence[int], *, ended: bool) -> str:
        self._detokenizer.update(list(tokens), False)
        return str(self._detokenizer.get_next_output_text(ended, True))

    def put_into(self, piece: Piece) -> Piece:
        """Give the piece with its text as it is behind what was sent: cut, and ended, where a stop is found."""
        before = self._detokenizer.num_output_tokens()
        stop = self._detokenizer.update(list(piece.token_ids), piece.finish_reason == "stop")
        reason: FinishReason | None = "stop" if stop else piece.finish_reason
        kept = self._detokenizer.num_output_tokens() - before
        text = str(self._detokenizer.get_next_output_text(reason is not None, True))
        logprobs = None if piece.logprobs is None else piece.logprobs[:kept]
        tokens = piece.token_ids[:kept]
        return msgspec.structs.replace(piece, text=text, token_ids=tokens, finish_reason=reason, logprobs=logprobs)


def _piece(index: int, output: Any) -> Piece | None:
    """Make a piece of a ``RequestOutput``; None of one that says nothing, as in the middle of a long prompt."""
    given = output.outputs[0]
    if given.finish_reason in ("abort", "error"):
        raise chains.WorkerLostError("vLLM gave the request up")
    if not given.token_ids and not given.text and given.finish_reason is None:
        return None
    return Piece(
        index,
        given.text,
        given.token_ids,
        None if given.finish_reason is None else _FINISHES.get(given.finish_reason, "stop"),
        given.logprobs,
        output.prompt_logprobs,
        output.num_cached_tokens,
    )


async def _merged(streams: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[Piece, None]:
    """Yield what several streams give, as it comes. The first that fails ends them all."""
    came: asyncio.Queue[Piece | Exception | None] = asyncio.Queue(2 * len(streams))

    async def feed(stream: AsyncGenerator[Piece, None]) -> None:
        try:
            async with aclosing(stream):
                async for piece in stream:
                    await came.put(piece)
        except Exception as error:  # noqa: BLE001 - raised where the pieces are read
            await came.put(error)
        else:
            await came.put(None)

    tasks = [asyncio.create_task(feed(stream)) for stream in streams]
    try:
        running = len(tasks)
        while running:
            piece = await came.get()
            if isinstance(piece, Exception):
                raise piece
            if piece is None:
                running -= 1
            else:
                yield piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
