"""vLLM by itself, with nothing of ours around it: what it says to prompts, in a process that ends afterwards."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

# In one process, which is there soonest.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


class Asked(NamedTuple):
    """A chat of one message, and how it is answered."""

    prompt: str
    max_tokens: int
    seed: int | None = None
    temperature: float = 0.0


class Said(NamedTuple):
    """What an engine says."""

    text: str
    token_ids: tuple[int, ...]


def generate(model: Path, asked: Sequence[Asked]) -> list[Said]:
    """Have an engine answer all of these. Raises CalledProcessError."""
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(model)],
        input=json.dumps(asked),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | ENVIRONMENT,
    )
    return [Said(text, tuple(token_ids)) for text, token_ids in json.loads(done.stdout.splitlines()[-1])]


def main(model: str) -> None:
    from vllm import LLM, SamplingParams  # here, as the engine imports this file too

    asked = [Asked(*each) for each in json.load(sys.stdin)]
    more: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 256 << 20}
    engine = LLM(model, max_num_seqs=64, **more)
    settings = [
        SamplingParams(max_tokens=a.max_tokens, seed=a.seed, temperature=a.temperature, ignore_eos=True) for a in asked
    ]
    chats: Any = [[{"role": "user", "content": a.prompt}] for a in asked]
    outputs = engine.chat(chats, settings, use_tqdm=False)
    print(json.dumps([(output.outputs[0].text, list(output.outputs[0].token_ids)) for output in outputs]))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1])
