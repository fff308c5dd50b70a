"""The vLLM engine of a process: one for each model, shared by the Chainlets that use it."""

import asyncio
import gc
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self, TypeVar
from weakref import WeakKeyDictionary

from prometheus_client import CollectorRegistry

import chains_stream as chains
from chainlets import vllm_metrics
from chainlets.vllm_config import VLLMConfig
from chainlets.vllm_frontend import Frontend, Job
from chainlets.vllm_start import continues_in_sampler, one_line, start

DEATH_POLL = 0.2  # seconds between two looks at whether the engine lives

EngineT = TypeVar("EngineT", bound="OpenEngine")

_cores: "WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, _Core]]" = WeakKeyDictionary()


async def open_engine(config: VLLMConfig) -> "Engine":
    """Give the engine of a config, started if this process has none that serves it; `close` lets it go.

    Raises ChainsUsageError or ChainsRuntimeError, with what is wrong in a line.
    """
    return await open_as(Engine, config)


async def open_as(kind: type[EngineT], config: VLLMConfig) -> EngineT:
    """Give the engine of a config as one `kind` of those who speak to it: see `open_engine`.

    Raises ChainsUsageError or ChainsRuntimeError, with what is wrong in a line.
    """
    here = _cores.setdefault(asyncio.get_running_loop(), {})
    core = here.setdefault(config.engine_key, _Core(config))
    await core.use()
    try:
        return await kind.of(config, core)
    except BaseException:
        await core.close()
        raise


class OpenEngine:
    """An engine as one config speaks to it. It belongs to the event loop that it was opened on: see `open_engine`."""

    def __init__(self, config: VLLMConfig, core: "_Core") -> None:
        self.config = config
        self._core = core

    @classmethod
    async def of(cls, config: VLLMConfig, core: "_Core") -> Self:
        """Make one for a config, on an engine that was started for it."""
        return cls(config, core)

    async def close(self) -> None:
        """Let it go, once. It ends with the last that is let go, and what it still runs fails."""
        await self._core.close()

    @property
    def llm(self) -> Any:
        """The engine itself, vLLM's ``AsyncLLM``."""
        return self._core.llm

    @property
    def alive(self) -> bool:
        """Whether it can serve."""
        return self._core.alive

    async def failed(self) -> None:
        """Wait until the engine is dead. Raises WorkerLostError."""
        while self._core.alive:  # noqa: ASYNC110 - vLLM tells nobody
            await asyncio.sleep(DEATH_POLL)
        raise self._death()

    @contextmanager
    def explained(self, path: str | None = None) -> Iterator[None]:
        """Turn what vLLM raises for a request into errors of ours; `path` names what is wrong of the arguments.

        Raises InvalidArgumentError for what the engine does not take, OverloadedError, WorkerLostError if it is dead.
        """
        from vllm.exceptions import GracefulHTTPError, VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        try:
            yield
        except VLLMClientError as error:
            raise chains.InvalidArgumentError(one_line(error), path=path) from error
        except GracefulHTTPError as error:
            raise chains.OverloadedError(one_line(error), retry_after=1.0) from error
        except EngineDeadError as error:
            raise self._death() from error
        except EngineGenerateError as error:
            cause = error.__cause__ or error
            if isinstance(cause, ValueError | TypeError):
                raise chains.InvalidArgumentError(one_line(cause), path=path) from error
            raise chains.ChainsRuntimeError(f"vLLM failed: {type(cause).__name__}: {one_line(cause)}") from error

    def _death(self) -> chains.ChainsRuntimeError:
        return chains.WorkerLostError(f"the vLLM engine of {self.config.model} is dead; its log says why")


class Engine(OpenEngine):
    """An engine whose model generates."""

    def __init__(self, config: VLLMConfig, core: "_Core", frontend: Frontend) -> None:
        super().__init__(config, core)
        self.frontend = frontend
        self.sampler = Sampler(core.llm.vllm_config)

    @classmethod
    async def of(cls, config: VLLMConfig, core: "_Core") -> Self:
        """Make one for a config. Raises ChainsUsageError for a template or a parser that is wrong."""
        # In a thread, as its imports alone take a second or more.
        return cls(config, core, await asyncio.to_thread(Frontend, core.llm, config))

    def adapter(self, name: str, others: Sequence[str]) -> Any:
        """Give the LoRA adapter that a request asks for by `name`; None for the model itself, as one of the `others`.

        Raises InvalidArgumentError for a name that nobody has, where there are names to choose from.
        """
        loras, config = self._core.loras, self.config
        if name in loras:
            return loras[name]
        if not name or name in others or name in config.base_names:
            return None
        if not loras and config.served_model_name is None:
            return None  # there is one model, whatever clients call it
        known = ", ".join(dict.fromkeys([*config.base_names, *loras]))
        raise chains.InvalidArgumentError(f"there is no model `{name}`; there are {known}", path="$.model")

    async def generate(self, job: Job, lora: Any, priority: int) -> AsyncGenerator[Any, None]:
        """Yield what the engine gives for a job, vLLM's ``RequestOutput``; closed, it frees what the request holds.

        Raises what `explained` does.
        """
        # A request may be of many sequences, of which the engine runs no more than it has places for.
        async with self._core.places:
            outputs = self.llm.generate(
                job.prompt, job.params, str(uuid.uuid4()), lora_request=lora, priority=priority, **job.options
            )
            try:
                with self.explained():
                    async for output in outputs:
                        yield output
            finally:
                await outputs.aclose()


class Sampler:
    """What is known of an engine's sampler: see `vllm_resume`."""

    def __init__(self, vllm_config: Any) -> None:
        self.continues = continues_in_sampler(vllm_config)
        self.by_position = bool(vllm_config.use_v2_model_runner)
        self.speculative = vllm_config.speculative_config is not None


class _Core:
    """An ``AsyncLLM`` with its adapters, and how many use it."""

    def __init__(self, config: VLLMConfig) -> None:
        self.loras: dict[str, Any] = {}
        self.places = asyncio.Semaphore(config.max_num_seqs)
        self._config = config
        self._users = 0
        self._metrics = CollectorRegistry()
        self._starting: asyncio.Task[None] | None = None
        self._llm: Any = None

    @property
    def llm(self) -> Any:
        assert self._llm is not None, "the engine is open"
        return self._llm

    @property
    def alive(self) -> bool:
        return self._llm is not None and not self._llm.errored

    async def use(self) -> None:
        """Start it if nobody has yet, and wait until it can serve; `close` it as often as this succeeded."""
        self._users += 1
        try:
            if self._starting is None:
                self._starting = asyncio.create_task(self._start(), name=f"start vLLM with {self._config.model}")
            await asyncio.shield(self._starting)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        self._users -= 1
        if self._users:
            return
        del _cores[asyncio.get_running_loop()][self._config.engine_key]
        if self._starting is not None:
            await asyncio.wait([self._starting])  # a start can't be broken off: it is in a thread
        vllm_metrics.hide(self._metrics)
        if self._llm is not None:
            await asyncio.to_thread(self._llm.shutdown)
            self._llm = None
            gc.unfreeze()
            await asyncio.to_thread(gc.collect)

    async def _start(self) -> None:
        await asyncio.to_thread(self._start_here)
        vllm_metrics.show(self._metrics)
        from vllm.lora.request import LoRARequest

        for number, (name, folder) in enumerate(self._config.lora_modules.items(), 1):
            self.loras[name] = lora = LoRARequest(name, number, folder)
            try:
                await self._llm.add_lora(lora)
            except Exception as error:
                reason = one_line(error.__cause__ or error)
                raise chains.ChainsUsageError(f"VLLMConfig.lora_modules: {name} can't be loaded: {reason}") from error
        # Some 600,000 objects that stay, which a full collection goes through in 0.4 s: all streams would stand still.
        gc.collect()
        gc.freeze()

    def _start_here(self) -> None:
        # Not returned: errors that vLLM's imports keep hold on to the frames that they passed, and so to what a thread
        # returns. The engine would then outlive its end, and be in the way of the interpreter's.
        self._llm = start(self._config, self._metrics)
