"""Starting a vLLM engine: in a thread, and with one line that says why it can't be.

What this module and `vllm_frontend` take of vLLM is what depends on its version: 0.32 here.
"""

import json
import logging
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pydantic
from prometheus_client import CollectorRegistry

import chains_stream as chains
from chainlets import vllm_watch
from chainlets.vllm_config import VLLMConfig
from chainlets.vllm_metrics import stat_logger

INSTALL = "vLLM is not installed here; install it with: pip install 'chains-stream[vllm]'"
# The engine's process is made anew: a fork would take along the threads and the event loop of this one. And what vLLM
# logs goes where other logs go.
_DEFAULTS = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
_LOGGING = "VLLM_LOGGING_CONFIG_PATH"

_one_at_a_time = threading.Lock()  # each start sets environment variables for its processes


class LastWords(logging.FileHandler):
    """Writes errors to a file while its folder is there: those of the engine's start alone are read."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            super().emit(record)


def start(config: VLLMConfig, metrics: CollectorRegistry) -> Any:
    """Start an engine, and give vLLM's ``AsyncLLM``. It takes from seconds to minutes, in a thread without a loop.

    Raises ChainsUsageError where the config is wrong, ChainsRuntimeError where the engine's process failed.
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ[vllm_watch.WORKER] = str(os.getpid())
    try:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM
    except ImportError as error:
        if error.name not in ("vllm", None):
            raise chains.ChainsUsageError(f"vLLM can't be imported: {one_line(error)}") from error
        raise chains.ChainsUsageError(INSTALL) from error
    arguments = config.arguments(AsyncEngineArgs)
    elsewhere = arguments.get("distributed_executor_backend") == "ray"  # on machines that have no such file
    with _one_at_a_time, nullcontext() if elsewhere else _last_words() as errors:
        try:
            engine_args = AsyncEngineArgs(**arguments)
            if config.structured_outputs_backend != "auto":
                engine_args.structured_outputs_config.backend = config.structured_outputs_backend
            vllm_config = engine_args.create_engine_config()
        except Exception as error:
            raise chains.ChainsUsageError(f"vLLM can't run the model {config.model}: {one_line(error)}") from error
        if continues_in_sampler(vllm_config):
            processors = vllm_config.model_config.logits_processors or ()
            vllm_config.model_config.logits_processors = [*processors, *_processors()]
        try:
            quiet = engine_args.disable_log_stats
            loggers = [] if quiet else [stat_logger(metrics)]
            return AsyncLLM.from_vllm_config(vllm_config, disable_log_stats=quiet, stat_loggers=loggers)
        except Exception as error:
            reason = _last_error(errors) or one_line(error)
            raise chains.ChainsRuntimeError(f"vLLM can't start with the model {config.model}: {reason}") from error


def continues_in_sampler(vllm_config: Any) -> bool:
    """Tell whether a resumed request needs, and may have, our part of vLLM's sampler: see `vllm_sampler`.

    vLLM's second model runner, the one for GPUs, draws the noise of a token from the seed and the token's position, and
    so needs none. With speculative decoding vLLM allows none, and a model that generates no text has no sampler.
    """
    if vllm_config.model_config.runner_type == "pooling":
        return False
    return not vllm_config.use_v2_model_runner and vllm_config.speculative_config is None


def one_line(error: BaseException) -> str:
    """Say what an error says, in a line."""
    if isinstance(error, pydantic.ValidationError):
        return "; ".join(_place(detail) + detail["msg"].removeprefix("Value error, ") for detail in error.errors())
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _place(detail: Any) -> str:
    where = ".".join(map(str, detail["loc"]))
    return f"{where}: " if where else ""


def _processors() -> list[str]:
    from chainlets import vllm_sampler

    return [f"{vllm_sampler.__name__}:{kind.__name__}" for kind in (vllm_sampler.Resumed, vllm_sampler.Seeded)]


@contextmanager
def _last_words() -> Iterator[Path | None]:
    """Have the processes that are started meanwhile log their errors to a file too: theirs alone say what is wrong."""
    from vllm.logger import DEFAULT_LOGGING_CONFIG

    if _LOGGING in os.environ or os.environ.get("VLLM_CONFIGURE_LOGGING") == "0":
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="chains-vllm-") as folder:
        errors, settings = Path(folder, "errors"), Path(folder, "logging.json")
        handler = {
            "class": f"{__name__}.{LastWords.__name__}",
            "level": "ERROR",
            "filename": str(errors),
            "delay": True,
        }
        config = json.loads(json.dumps(DEFAULT_LOGGING_CONFIG))
        config["handlers"]["errors"] = handler
        config["loggers"]["vllm"]["handlers"].append("errors")
        settings.write_text(json.dumps(config), encoding="utf-8")
        os.environ[_LOGGING] = str(settings)
        try:
            yield errors
        finally:
            del os.environ[_LOGGING]


def _last_error(errors: Path | None) -> str | None:
    """Give the error of the first traceback in a log: its only lines that begin at the margin are the last ones."""
    if errors is None or not errors.exists():
        return None
    lines = errors.read_text(encoding="utf-8", errors="replace").splitlines()
    begun = [at for at, line in enumerate(lines) if line.startswith("Traceback ")]
    after = lines[begun[0] + 1 :] if begun else []
    found = next((line for line in after if line and not line.startswith(" ")), None)
    return found.partition(": ")[2] or found if found else None
