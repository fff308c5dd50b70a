"""Language models on Triton: `TritonGenerate` for a prompt, `TritonChat` for OpenAI's clients.

They fit TensorRT-LLM's `ensemble` and `tensorrt_llm_bls`, and whatever has `text_input` and `text_output` as those do.
Such a model streams one answer a token, or one answer in all, whether it is decoupled or not. It tells no token ids, so
a stream whose worker is lost begins anew, if nothing of it has been handed on.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any, ClassVar

import pydantic
from pydantic import Field, PositiveInt

from chainlets import triton_prompt
from chainlets.triton_check import Model
from chainlets.triton_config import TritonConfig, read
from chainlets.triton_errors import TritonMismatchError
from chainlets.triton_model import TritonModel
from chainlets.triton_sampling import Defaults, Sampling, inputs_for, missing, sampling_of
from chainlets.triton_tensors import Array
from chainlets.triton_text import Text
from chains_stream import openai

REASONS: Mapping[str, openai.FinishReason] = {"stop": "stop", "length": "length"}


class TritonTextConfig(TritonConfig):
    """A language model on Triton.

    Attributes:
        text_output: the output that the text comes in.
        accumulated: set it where each response of a stream holds all the text so far, as with TensorRT-LLM's
            `accumulate_tokens`.
        max_tokens: of an answer, where the request does not say.
        end_id: the tokenizer's, as `pad_id` is, for models that ask for them.
        chat_template: Jinja, as in a tokenizer's configuration; `chat_template_file` names a file of it. Without
            either, a conversation is plain lines, ``user: …``, and ``assistant:``.
        special_tokens: what a template may name: ``{"bos_token": "<s>"}``.
    """

    text_output: str = "text_output"
    accumulated: bool = False
    max_tokens: PositiveInt = 1024
    end_id: int | None = None
    pad_id: int | None = None
    chat_template: str | None = None
    chat_template_file: Path | None = None
    special_tokens: Mapping[str, str] = Field(default_factory=dict)

    @pydantic.model_validator(mode="after")
    def _check_template(self) -> "TritonTextConfig":
        if self.chat_template is not None and self.chat_template_file is not None:
            raise ValueError("give chat_template or chat_template_file, not both")
        return self


class _Answer:
    """What a model has said of its answer so far, beside the text."""

    def __init__(self, limit: int) -> None:
        self.tokens = 0
        self._limit = limit
        self._prompt: int | None = None
        self._reason: openai.FinishReason | None = None

    def take(self, outputs: Mapping[str, Array], *, whole: bool) -> None:
        self.tokens += 1  # a response of a stream is a token
        if whole and "num_output_tokens" in outputs:
            self.tokens = int(outputs["num_output_tokens"].reshape(-1)[0])
        if "num_input_tokens" in outputs:
            self._prompt = int(outputs["num_input_tokens"].reshape(-1)[0])
        if "finish_reason" in outputs:
            self._reason = REASONS.get(outputs["finish_reason"].reshape(-1)[0].decode(), self._reason)

    def reason(self, *, stopped: bool) -> openai.FinishReason:
        if stopped:
            return "stop"
        return self._reason or ("length" if self.tokens >= self._limit else "stop")

    @property
    def usage(self) -> openai.Usage | None:
        return None if self._prompt is None else openai.Usage(self._prompt, self.tokens)


class _TextModel(TritonModel):
    """What both Chainlets for text have in common."""

    config: ClassVar[TritonTextConfig] = TritonTextConfig()

    def check(self, model: Model) -> None:
        """Raise TritonMismatchError if the model can't generate text."""
        faults = missing(model, self._defaults)
        output = model.outputs.get(self.config.text_output)
        if output is None or output.datatype != "BYTES":
            names = ", ".join(f"`{name}`" for name in model.outputs)
            faults.append(f"the model has no output `{self.config.text_output}` of text; it has {names}")
        if faults:
            lines = "".join(f"\n  {fault}" for fault in faults)
            raise TritonMismatchError(f"{type(self).__name__} does not fit the {model.shown}:{lines}")

    @property
    def _defaults(self) -> Defaults:
        return Defaults(self.config.max_tokens, self.config.end_id, self.config.pad_id)

    async def generate(self, prompt: str, sampling: Sampling, answer: _Answer, text: Text) -> AsyncGenerator[str, None]:
        """Yield the text that the model goes on with, as it comes, and note in `answer` what else it says."""
        inputs = inputs_for(self.model, prompt, sampling, self._defaults)
        async with aclosing(self._answers(inputs)) as answers:
            async for outputs in answers:
                answer.take(outputs, whole=not self.model.decoupled)
                piece = outputs[self.config.text_output].reshape(-1)[0]
                if new := text.take(piece):
                    yield new
                if text.stopped:
                    return  # which cancels what the model would still say
        if rest := text.end():
            yield rest

    async def _answers(self, inputs: Mapping[str, Any]) -> AsyncGenerator[Mapping[str, Array], None]:
        if not self.model.decoupled:
            yield await self.infer(inputs)
            return
        async with aclosing(self.infer_stream(inputs)) as answers:
            async for outputs in answers:
                if self.config.text_output in outputs:
                    yield outputs

    def _text(self, sampling: Sampling) -> Text:
        return Text(sampling.stop, accumulated=self.config.accumulated, included=sampling.include_stop)

    def _limit(self, sampling: Sampling) -> int:
        return sampling.max_tokens or self.config.max_tokens


class TritonGenerate(_TextModel):
    """Goes on with a prompt, as text that streams. Derive a class, and set `config`."""

    async def run_remote(self, prompt: str, sampling: Sampling = Sampling()) -> AsyncIterator[str]:  # noqa: B008 - frozen
        """Yield the text in pieces. Raises what `TritonModel.predict` does."""
        answer, text = _Answer(self._limit(sampling)), self._text(sampling)
        async with aclosing(self.generate(prompt, sampling, answer, text)) as pieces:
            async for piece in pieces:
                yield piece


class TritonChat(_TextModel):
    """Answers conversations of OpenAI's API. Derive a class, and set `config`.

    What a model on Triton can't do, tools and log probabilities say, is refused with the field's name. Of usage it
    tells what the model tells: nothing, if that has no `num_input_tokens`.
    """

    _template: str | None = None

    def check(self, model: Model) -> None:
        """Raise TritonMismatchError if the model can't generate text, ChainsUsageError for a wrong chat template."""
        super().check(model)
        path = self.config.chat_template_file
        self._template = self.config.chat_template if path is None else read(path).decode()
        triton_prompt.check(self._template)

    async def run_remote(self, request: openai.ChatCompletionRequest) -> AsyncIterator[openai.ChatCompletionChunk]:
        """Yield the answer in chunks. Raises what `TritonModel.predict` does."""
        sampling = sampling_of(request)
        prompt = triton_prompt.prompt_of(request, self._template, self.config.special_tokens)
        answer, text = _Answer(self._limit(sampling)), self._text(sampling)
        async with aclosing(self.generate(prompt, sampling, answer, text)) as pieces:
            async for piece in pieces:
                yield openai.ChatCompletionChunk.of(piece)
        reason = answer.reason(stopped=text.stopped)
        yield openai.ChatCompletionChunk.of(finish_reason=reason, usage=answer.usage)
