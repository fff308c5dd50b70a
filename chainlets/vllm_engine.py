"""Chainlets that generate with vLLM, in the worker's own process. Derive a class from one, and give it a config::

    class Chat(VLLMChat):
        config = VLLMConfig(model="Qwen/Qwen2.5-7B-Instruct")
        remote_config = chains.RemoteConfig(compute=chains.Compute(gpu="H100"))

`VLLMChat` and `VLLMCompletions` answer clients of OpenAI's API, `VLLMGenerate` other Chainlets. Those of one config
share an engine where one process hosts them. A worker takes as many requests at once as the engine runs
(`max_num_seqs`), and more wait in Kafka; a stream whose worker is lost goes on on another one. Both can be said
otherwise in `remote_config`. vLLM is an extra: ``pip install 'chains-stream[vllm]'``.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, ClassVar, Self

import chains_stream as chains
from chainlets.vllm_answers import Delta, Sampling, chat, complete, write
from chainlets.vllm_config import VLLMConfig
from chainlets.vllm_core import Engine, open_engine
from chains_stream import openai

__all__ = ["Delta", "Sampling", "VLLMChainlet", "VLLMChat", "VLLMCompletions", "VLLMConfig", "VLLMGenerate"]


class VLLMChainlet(chains.ChainletBase):
    """What Chainlets on a vLLM engine have in common: `config`, which a class derived from them gives."""

    config: ClassVar[VLLMConfig]
    _engine: Engine | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        config = getattr(cls, "config", None)
        if config is None:
            return
        if not isinstance(config, VLLMConfig):
            raise chains.ChainsUsageError(
                f"{cls.__name__}.config is no VLLMConfig; write `config = VLLMConfig(model=…)`"
            )
        cls.remote_config = _with_defaults(_own(cls, "remote_config"), config)
        named = config.served_model_name or config.lora_modules
        offered = (config.base_names[0], *config.lora_modules) if named else ()
        cls.openai_models = _own(cls, "openai_models") or offered

    async def __aenter__(self) -> Self:
        if getattr(self, "config", None) is None:
            name = type(self).__name__
            raise chains.ChainsUsageError(f"{name} has no config; write `config = VLLMConfig(model=…)` in its class")
        self._engine = await open_engine(self.config)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.close()

    def is_healthy(self) -> bool:
        """Tell whether the engine can serve."""
        return self._engine is not None and self._engine.alive

    async def failed(self) -> None:
        """Wait until the engine is dead. Raises ChainsRuntimeError, which says so."""
        await self.engine.failed()

    @property
    def engine(self) -> Engine:
        """The engine, while the Chainlet is entered; `engine.llm` is vLLM's own ``AsyncLLM``."""
        if self._engine is None:
            raise chains.ChainsUsageError(
                f"{type(self).__name__} has no engine: enter it (`async with`) before its use"
            )
        return self._engine

    @property
    def _names(self) -> Sequence[str]:
        """What the model is called, beside its own names."""
        return tuple(name for name in (type(self).__name__, self.remote_config.name) if name)


class VLLMChat(VLLMChainlet):
    """Answers conversations: clients of OpenAI's API ask for it under ``/v1/chat/completions``."""

    async def run_remote(self, request: openai.ChatCompletionRequest) -> AsyncIterator[openai.ChatCompletionChunk]:
        emitted = chains.current_request().emitted
        async with aclosing(chat(self.engine, request, self._names, emitted)) as chunks:
            async for chunk in chunks:
                yield chunk


class VLLMCompletions(VLLMChainlet):
    """Goes on with texts: clients of OpenAI's API ask for it under ``/v1/completions``."""

    async def run_remote(self, request: openai.CompletionRequest) -> AsyncIterator[openai.Completion]:
        emitted = chains.current_request().emitted
        async with aclosing(complete(self.engine, request, self._names, emitted)) as chunks:
            async for chunk in chunks:
                yield chunk


class VLLMGenerate(VLLMChainlet):
    """Goes on with a text, or with tokens: for other Chainlets of a Chain."""

    async def run_remote(self, prompt: str | list[int], sampling: Sampling = Sampling()) -> AsyncIterator[Delta]:  # noqa: B008 - frozen
        emitted = chains.current_request().emitted
        async with aclosing(write(self.engine, prompt, sampling, self._names, emitted)) as deltas:
            async for delta in deltas:
                yield delta


def _own(cls: type[VLLMChainlet], name: str) -> Any:
    """Give an attribute as a user wrote it, in the class or in one that it derives from."""
    for base in cls.__mro__:
        written = base.__dict__.get(f"_written_{name}", base.__dict__.get(name))
        if written is not None:
            setattr(cls, f"_written_{name}", written)
            return written
    raise AttributeError(name)  # ChainletBase has them all


def _with_defaults(given: chains.RemoteConfig, config: VLLMConfig) -> chains.RemoteConfig:
    """Have as many requests at once as the engine runs, and streams that go on, unless the user says otherwise."""
    compute, options = given.compute, given.options
    if "predict_concurrency" not in compute.model_fields_set:
        compute = compute.model_copy(update={"predict_concurrency": config.max_num_seqs})
    if "resumable" not in options.model_fields_set:
        options = options.model_copy(update={"resumable": True})
    return given.model_copy(update={"compute": compute, "options": options})
