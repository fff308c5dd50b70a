"""A chat with a language model, for any client of OpenAI's API: vLLM in the worker's process, or a Triton server.

    chains run chainlets/llm.py --set model=Qwen/Qwen3-0.6B
    chains run chainlets/llm.py --set engine=triton --set url=localhost:8001 --set model=tensorrt_llm_bls
    curl -N localhost:8000/v1/chat/completions --json '{
      "stream": true, "messages": [{"role": "user", "content": "Hello!"}]}'

`model` is a folder or an id on the Hugging Face Hub; for Triton, the name of a model that it serves. Every other field
of `VLLMConfig` or `TritonTextConfig` can be set too, such as ``--set max_model_len=8192 --set tensor_parallel_size=2``,
and `gpu` says what a worker is to be deployed on, ``H100:2`` for two. On Kafka give gateway and workers the same ones.
"""

from typing import Literal

import pydantic

import chains_stream as chains


class Options(pydantic.BaseModel):
    """Which engine answers, and the GPU that its worker needs."""

    engine: Literal["vllm", "triton"] = "vllm"
    gpu: str | None = None


options = chains.parameters(Options)

if options.engine == "vllm":
    from chainlets.vllm_engine import VLLMChat, VLLMConfig

    @chains.mark_entrypoint("LLM")
    class Chat(VLLMChat):
        """Answers with vLLM, which runs as many requests at once as its `max_num_seqs`."""

        config = chains.parameters(VLLMConfig)
        remote_config = chains.RemoteConfig(compute=chains.Compute(gpu=options.gpu))

else:
    from chainlets.triton_engine import TritonChat, TritonTextConfig

    @chains.mark_entrypoint("LLM")
    class Chat(TritonChat):  # type: ignore[no-redef] # the file has one of the two
        """Answers with a model that Triton serves; the worker itself needs no GPU."""

        config = chains.parameters(TritonTextConfig)
