"""The life of an engine: what it is given, what keeps it from starting, who shares it, and what its death means."""

import asyncio
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pydantic
import pytest
from prometheus_client import REGISTRY

import chains_stream as chains
from chainlets.vllm_core import open_engine
from chainlets.vllm_engine import VLLMChat, VLLMConfig, VLLMGenerate
from tests.vllm import tiny
from tests.vllm.serving import Sampling, Served, collected, config_of, metric, run, until, written


def models_shown() -> set[str]:
    """Give the models whose running requests ``/metrics`` tells of."""
    families = [family for family in REGISTRY.collect() if family.name == "vllm:num_requests_running"]
    assert len(families) <= 1, "a metric is shown once"
    return {sample.labels["model_name"] for family in families for sample in family.samples}


def engine_processes() -> set[int]:
    return {child.pid for child in multiprocessing.active_children() if "EngineCore" in child.name and child.pid}


def test_a_config_is_made_of_what_is_set_on_the_command_line(model: Path) -> None:
    values = {"model": str(model), "max_model_len": "512", "enforce_eager": "true", "gpu_memory_utilization": "0.5"}
    values |= {"lora_modules": '{"fine": "/adapters/fine"}', "extra": '{"block_size": 16}'}
    with chains.parameter_values(**values):
        config = chains.parameters(VLLMConfig)
    assert (config.max_model_len, config.enforce_eager, config.gpu_memory_utilization) == (512, True, 0.5)
    assert (config.lora_modules, config.extra) == ({"fine": "/adapters/fine"}, {"block_size": 16})
    assert config.max_num_seqs == 256


def test_a_wrong_field_of_a_config_is_named() -> None:
    with pytest.raises(pydantic.ValidationError, match="max_num_sequences"):
        VLLMConfig.model_validate({"model": "m", "max_num_sequences": 4})


def test_a_worker_takes_what_its_engine_runs_unless_it_is_said_otherwise() -> None:
    given = VLLMConfig(model="m", max_num_seqs=24, lora_modules={"fine": "/fine"}, served_model_name="base")

    class Plain(VLLMChat):
        config = given

    class Own(VLLMChat):
        config = given
        remote_config = chains.RemoteConfig(
            name="own",
            compute=chains.Compute(gpu="H100", predict_concurrency=8),
            options=chains.ChainletOptions(resumable=False),
        )
        openai_models = ("mine",)

    class Larger(Plain):
        config = VLLMConfig(model="m", max_num_seqs=48)

    assert (Plain.remote_config.compute.concurrency, Plain.remote_config.options.resumable) == (24, True)
    assert (Own.remote_config.compute.concurrency, Own.remote_config.options.resumable) == (8, False)
    assert (Own.remote_config.name, Own.remote_config.compute.gpu) == ("own", "H100")

    class Other(Own):
        config = VLLMConfig(model="m", served_model_name="other")

    assert Larger.remote_config.compute.concurrency == 48
    assert (tuple(Larger.openai_models), tuple(Other.openai_models)) == ((), ("mine",))
    assert (tuple(Plain.openai_models), tuple(Own.openai_models)) == (("base", "fine"), ("mine",))


def test_a_chainlet_whose_config_is_something_else_is_refused() -> None:
    with pytest.raises(chains.ChainsUsageError, match=r"Wrong\.config is no VLLMConfig"):

        class Wrong(VLLMChat):
            config = "Qwen/Qwen3-8B"  # type: ignore[assignment] # as a user may


async def test_a_chainlet_without_a_config_says_so() -> None:
    class Bare(VLLMChat):
        pass

    with pytest.raises(chains.ChainsUsageError, match="Bare has no config"):
        await Bare().__aenter__()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model": "/nowhere/at/all"}, "there is no folder /nowhere/at/all"),
        ({"model": "nobody/nothing"}, "can't run the model nobody/nothing: "),
        ({"lora_modules": {"fine": "/nowhere/fine"}}, "no folder /nowhere/fine, which fine is"),
        ({"extra": {"blocksize": 16}}, "no engine argument blocksize; did you mean block_size"),
        ({"extra": {"dtype": "half"}}, "dtype is a field of VLLMConfig"),
        ({"max_model_len": 100_000}, r"max_model_len \(100000\) is greater"),
        ({"quantization": "magic"}, "magic"),
        ({"extra": {"block_size": "many"}}, "block_size"),
    ],
)
async def test_what_keeps_an_engine_from_starting_is_said_in_a_line(
    model: Path, fields: dict[str, Any], reason: str
) -> None:
    config = config_of(model).model_copy(update=fields)
    with pytest.raises(chains.ChainsUsageError, match=reason) as caught:
        await open_engine(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fields", [{"tool_call_parser": "none-such"}, {"chat_template": "/nowhere/template.jinja"}])
async def test_what_is_wrong_with_parsers_and_templates_is_said_in_a_line(
    served: Served, fields: dict[str, Any]
) -> None:
    with pytest.raises(chains.ChainsUsageError, match=r"none-such|template\.jinja") as caught:
        await open_engine(served.config.model_copy(update=fields))
    assert "\n" not in str(caught.value)
    assert served.own_chat.is_healthy()


async def test_without_vllm_the_line_says_how_to_install_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(chains.ChainsUsageError, match=r"pip install 'chains-stream\[vllm\]'"):
        await open_engine(config_of(model))


async def test_a_request_that_was_cancelled_while_it_waited_never_reaches_the_engine(served: Served) -> None:
    given = served.config

    class One(VLLMGenerate):
        config = given
        remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=1))

    def prompts() -> float:
        return metric("vllm:prompt_tokens_total") or 0

    long = Sampling(temperature=0, max_tokens=400, ignore_eos=True)
    async with chains.run_chain(One) as one:
        before = prompts()
        first = await one.submit("x" * 10, long)
        await until(lambda: metric("vllm:num_requests_running") == 1, "the first one runs")
        second = await one.submit("x" * 100, long)
        await second.cancel()
        third = await one.submit("x" * 20, Sampling(temperature=0, max_tokens=3))
        assert len(written(await first.result())[1]) == 400
        assert len(written(await third.result())[1]) == 3
        assert prompts() - before == 30


async def test_an_engine_that_dies_fails_what_it_ran_and_leaves_others_alone(served: Served, tmp_path: Path) -> None:
    second = config_of(tiny.make(tmp_path / "second", seed=1), served_model_name="second")

    class Generate(VLLMGenerate):
        config = second

    others = engine_processes()
    generate = Generate()
    async with generate:
        assert models_shown() == {"tiny", "second"}
        (process,) = engine_processes() - others
        sampling = Sampling(temperature=0, max_tokens=10)
        assert len(written(await run(generate, "Once", sampling))[1]) == 10
        failed = asyncio.create_task(generate.failed())
        running = asyncio.create_task(run(generate, "Once", Sampling(temperature=0, max_tokens=450, ignore_eos=True)))
        await until(lambda: not running.done() and not failed.done() and running_in("second") == 1, "it runs")
        os.kill(process, signal.SIGKILL)
        with pytest.raises(chains.WorkerLostError, match="is dead"):
            await running
        assert not generate.is_healthy()
        with pytest.raises(chains.WorkerLostError, match="is dead"):
            await asyncio.wait_for(failed, 5)
        with pytest.raises(chains.WorkerLostError):
            await run(generate, "Once", sampling)
        assert len(written(await collected(served.generate.run_remote("Once", sampling)))[1]) == 10
    assert models_shown() == {"tiny"}
    assert served.own_generate.is_healthy()


def running_in(model: str) -> float | None:
    return REGISTRY.get_sample_value("vllm:num_requests_running", {"model_name": model, "engine": "0"})


async def test_an_engine_without_memory_says_so_in_a_line(model: Path) -> None:
    with pytest.raises(chains.ChainsRuntimeError, match=r"can't start with the model .*: .*memory") as caught:
        await open_engine(config_of(model, kv_cache_memory_bytes=1000))
    assert "\n" not in str(caught.value)
