"""What turns requests into prompts, and the output of a model into messages: vLLM's own renderer and parsers.

What this module and `vllm_start` take of vLLM is what depends on its version: 0.32 here.
"""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec

import chains_stream as chains
from chainlets.vllm_config import VLLMConfig
from chainlets.vllm_start import one_line
from chains_stream import openai

# Of our requests: what is said of the answer's way, and not of the answer.
_NOT_FOR_VLLM = {"stream", "stream_options", "n", "user", "prompt_cache_key", "return_token_ids", "best_of"}


@dataclass(frozen=True)
class Job:
    """What the engine is to write for one choice: `prompt` is vLLM's input, `params` its ``SamplingParams``."""

    index: int
    prompt: Mapping[str, Any]
    params: Any
    options: Mapping[str, Any]  # for ``AsyncLLM.generate``

    @property
    def prompt_token_ids(self) -> list[int]:
        return list(self.prompt["prompt_token_ids"])


class Frontend:
    """The renderer, the parsers and the tokenizer of one engine."""

    def __init__(self, engine: Any, config: VLLMConfig) -> None:
        """Take them from `engine`, vLLM's ``AsyncLLM``. Raises ChainsUsageError for what they can't be made of."""
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest
        from vllm.renderers.chat_utils import load_chat_template
        from vllm.renderers.online_renderer import OnlineRenderer

        self._chat_request, self._completion_request = ChatCompletionRequest, CompletionRequest
        model = self._model = engine.model_config
        self._config = config
        try:
            self._renderer = OnlineRenderer(
                model,
                engine.renderer,
                request_logger=None,
                chat_template=load_chat_template(config.chat_template),
                chat_template_content_format=config.chat_template_content_format,
                trust_request_chat_template=config.trust_request_chat_template,
                enable_auto_tools=config.tool_call_parser is not None,
                tool_parser=config.tool_call_parser,
                reasoning_parser=config.reasoning_parser or "",
                default_chat_template_kwargs=dict(config.chat_template_kwargs),
            )
        except Exception as error:
            cause = error.__cause__ or error  # vLLM names its own flags, the cause what is wrong
            raise chains.ChainsUsageError(f"VLLMConfig of {config.model}: {one_line(cause)}") from error
        self.tokenizer = engine.renderer.tokenizer
        self._defaults = model.get_diff_sampling_param()
        own = model.generation_config not in ("auto", "vllm")
        overrides = getattr(model, "override_generation_config", None) or {}
        self._most_tokens = self._defaults.get("max_tokens") if own else overrides.get("max_new_tokens")

    async def chat(self, request: openai.ChatCompletionRequest) -> "Conversation":
        """Render a conversation. Raises InvalidArgumentError."""
        given = _fields(request, self._chat_request)
        if request.continue_final_message and request.add_generation_prompt is None:
            given["add_generation_prompt"] = False
        with client_errors():
            theirs = self._chat_request.model_validate(given | {"stream": True})
            rendered = await self._renderer.render_chat(theirs)
            prompts = _prompts(rendered[1] if isinstance(rendered, tuple) else rendered)
            kwargs = self._renderer.effective_chat_template_kwargs(theirs)
            options = self._reasoning(theirs, kwargs, prompts[0])
            jobs = self._jobs(theirs, prompts, request.token_limit, request.n or 1, options)
        return Conversation(self, theirs, jobs, kwargs)

    async def completion(self, request: openai.CompletionRequest, *, max_tokens: int | None) -> list[Job]:
        """Render the prompts of a request for texts of `max_tokens`, or as many as there is room for.

        Raises InvalidArgumentError.
        """
        given = _fields(request, self._completion_request) | {"stream": True, "max_tokens": max_tokens}
        with client_errors():
            theirs = self._completion_request.model_validate(given)
            prompts = _prompts(await self._renderer.render_completion(theirs))
            return self._jobs(theirs, prompts, max_tokens, request.n or 1, {})

    def parser(self, request: Any, chat_template_kwargs: Mapping[str, Any]) -> Any:
        """Give a parser for one choice of a conversation, vLLM's ``Parser``; None if output is taken as it is."""
        kind = self._renderer.parser
        if kind is None:
            return None
        return kind(
            self.tokenizer,
            request.tools,
            chat_template_kwargs=dict(chat_template_kwargs),
            model_config=self._model,
        )

    def detokenizer(self, job: Job) -> Any:
        """Give what makes text of the tokens of one choice, and finds its stops: vLLM's ``IncrementalDetokenizer``."""
        from vllm.v1.engine import EngineCoreRequest
        from vllm.v1.engine.detokenizer import IncrementalDetokenizer

        request = EngineCoreRequest(
            request_id="",
            prompt_token_ids=job.prompt_token_ids,
            mm_features=None,
            sampling_params=job.params,
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        return IncrementalDetokenizer.from_new_request(self.tokenizer, request)

    def text_of(self, job: Job) -> str:
        """Give the text of a prompt."""
        text = job.prompt.get("prompt")
        return text if isinstance(text, str) else self.decode(job.prompt_token_ids)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens)))

    def _jobs(
        self, request: Any, prompts: Sequence[Any], limit: int | None, choices: int, options: Mapping[str, Any]
    ) -> list[Job]:
        """Give the jobs of a request: as vLLM does, the seed of a choice is that of the request and its number."""
        from vllm.entrypoints.serve.utils.api_utils import get_max_tokens

        jobs: list[Job] = []
        for prompt in prompts:
            length = len(prompt["prompt_token_ids"])
            if length >= self._model.max_model_len:
                raise ValueError(
                    f"the prompt has {length} tokens, and leaves none of the model's {self._model.max_model_len}"
                )
            most = get_max_tokens(self._model.max_model_len, limit, length, self._defaults, self._most_tokens)
            params = request.to_sampling_params(most, self._defaults)
            for choice in range(choices):
                own = copy.deepcopy(params) if choice else params
                if own.seed is not None:
                    own.seed += choice
                jobs.append(Job(len(jobs), prompt, own, options))
        return jobs

    def _reasoning(self, request: Any, kwargs: Mapping[str, Any], prompt: Mapping[str, Any]) -> dict[str, Any]:
        """Give what the engine is told of the model's reasoning: a grammar holds from its end on."""
        parser = self.parser(request, kwargs)
        ended = request.resolve_reasoning_ended(parser, prompt["prompt_token_ids"])
        if parser is None or parser.reasoning_parser is None:
            return {"reasoning_ended": ended}
        return {"reasoning_ended": ended, "reasoning_parser_kwargs": {"chat_template_kwargs": dict(kwargs)}}


class Conversation:
    """A chat request that was rendered: the jobs of its choices, and what parses what they give."""

    def __init__(self, frontend: Frontend, request: Any, jobs: list[Job], kwargs: Mapping[str, Any]) -> None:
        self.jobs = jobs
        self.request = request
        self._frontend = frontend
        self._kwargs = kwargs

    def parser(self) -> Any:
        return self._frontend.parser(self.request, self._kwargs)

    @property
    def one_tool(self) -> bool:
        """Whether the client wants no more than one call of a tool."""
        return self.request.parallel_tool_calls is False

    @property
    def named_tool(self) -> bool:
        """Whether the client wants a certain tool called: that is no reason for the answer's end."""
        return not (self.request.tool_choice is None or isinstance(self.request.tool_choice, str))


@contextmanager
def client_errors() -> Iterator[None]:
    """Turn what vLLM says of a request that it does not take into InvalidArgumentError, in one line."""
    from jinja2 import TemplateError
    from vllm.exceptions import VLLMClientError

    try:
        yield
    except (VLLMClientError, TemplateError, ValueError, TypeError) as error:
        raise chains.InvalidArgumentError(one_line(error), path=_path_of(error)) from error


def _path_of(error: Exception) -> str | None:
    parameter = getattr(error, "parameter", None)
    return f"$.{parameter}" if isinstance(parameter, str) else None


def _fields(request: openai.GenerationRequest, theirs: Any) -> dict[str, Any]:
    """Give the fields of a request that vLLM has too, those of classes derived from ours included."""
    given: dict[str, Any] = msgspec.to_builtins(request)
    known = set(theirs.model_fields) - _NOT_FOR_VLLM
    return {name: value for name, value in given.items() if name in known and value is not None}


def _prompts(rendered: Any) -> list[Any]:
    """Give what was rendered, or raise ValueError: vLLM returns an answer that says why it was not."""
    if isinstance(rendered, list):
        return rendered
    message = rendered.error.message.replace("--enable-auto-tool-choice and ", "")
    raise ValueError(re.sub(r"--([a-z-]+)", lambda flag: flag[1].replace("-", "_"), message))
